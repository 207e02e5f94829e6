"""MPT over packs: its layers with this project's attention, whose scores fall with distance (ALiBi)."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mllm.lm import LanguageModel, attend


class ALiBiModel(LanguageModel):
    """`LanguageModel` of transformers' MPT, whose layers know nothing of positions but how far they are apart."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        for layer in self.layers:
            layer.__class__ = _over_packs()  # the same weights under the same names

    @property
    def layers(self) -> nn.ModuleList:
        return self.decoder.blocks

    @property
    def norm(self) -> nn.Module:
        return self.decoder.norm_f

    def placed(
        self,
        hidden: Float[Tensor, "1 T D"],
        places: Int[Tensor, "1 T"],  # noqa: ARG002 -- a position is nothing by itself
    ) -> tuple[Float[Tensor, "1 T D"], dict[str, Any]]:
        slopes = torch.tensor(alibi_slopes(self.decoder.num_heads), dtype=torch.float32)
        return hidden, {"slopes": slopes.to(hidden.device, non_blocking=True)}


def alibi_slopes(heads: int) -> list[float]:
    """How fast each head's scores fall: 2 ** (-8 i / n), i from 1 on, for n heads (arXiv:2108.12409, 3).

    Where n is no power of two those of the next one, every second of them first (MPT's `build_mpt_alibi_tensor`).
    """
    power = 2 ** math.ceil(math.log2(heads))
    slopes = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    return slopes if power == heads else [*slopes[1::2], *slopes[::2]][:heads]


@cache
def _over_packs() -> type[nn.Module]:
    from transformers.models.mpt.modeling_mpt import MptBlock

    class PackedBlock(MptBlock):
        def forward(self, hidden_states: Tensor, **words: Any) -> Tensor:
            attention: Any = self.attn
            projected = attention.Wqkv(self.norm_1(hidden_states))
            if attention.clip_qkv:
                projected = projected.clamp(-attention.clip_qkv, attention.clip_qkv)
            q, k, v = (x.unflatten(2, (attention.n_heads, -1)).transpose(1, 2) for x in projected.chunk(3, dim=2))
            found, _ = attend(attention, q, k, v, scaling=attention.softmax_scale, **words)
            hidden_states = hidden_states + attention.out_proj(found.flatten(2))
            return self.ffn(self.norm_2(hidden_states), hidden_states)

    return PackedBlock
