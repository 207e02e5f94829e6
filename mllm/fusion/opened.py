"""Layers of Llama's form, opened: what fusions put between their parts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mllm.lm import LanguageModel, attend

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, slots=True)
class Route:
    """Positions by the weights that they go through, both int64, and where each position is found behind one another."""

    text: Int[Tensor, " t"]
    image: Int[Tensor, " v"]
    back: Int[Tensor, " T"]

    def __call__(
        self, x: Float[Tensor, "1 T D"], base: Callable[[Tensor], Tensor], expert: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "1 T F"]:
        """`base` of text positions and `expert` of image positions. Both run whatever there is: an empty part has gradients."""
        rows = x.squeeze(0)
        return torch.cat([base(rows[self.text]), expert(rows[self.image])])[self.back].unsqueeze(0)


def copied(module: nn.Module) -> nn.Module:
    """`module` with parameters of its own, which tensors without memory can have too."""
    return copy.deepcopy(module, {id(p): nn.Parameter(p.detach().clone()) for p in module.parameters()})


def open_layers(lm: LanguageModel, what: str) -> None:
    """Open each layer of `lm` for `what`. Raises ValueError for layers that are not of Llama's form."""
    for layer in lm.layers:
        if type(layer).__name__ not in ("LlamaDecoderLayer", "Qwen2DecoderLayer", "MistralDecoderLayer"):
            raise ValueError(
                f"fusion: {what} know layers of Llama's form, and these are {type(layer).__name__}; take a llama, "
                "qwen2 or mistral as the language model"
            )
        layer.__class__ = _opened(type(layer))


@cache
def _opened(kind: type) -> type:
    """The decoder layer `kind` of transformers with two doors.

    With a `route` image positions go through `self.expert`; with `aside` its arguments go to `self.side`, whose output is
    added between attention and feed-forward.
    """
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    class OpenedLayer(kind):
        def forward(
            self,
            hidden_states: Tensor,
            position_embeddings: tuple[Tensor, Tensor],
            route: Route | None = None,
            aside: tuple[Any, ...] | None = None,
            **words: Any,
        ) -> Tensor:
            attention, expert = self.self_attn, getattr(self, "expert", None)
            own = {name: getattr(attention, name) for name in PROJECTIONS}
            mine = expert.attention if expert is not None and len(expert.attention) else own

            def through(x: Tensor, base: Any, other: Any) -> Tensor:
                return base(x) if route is None else route(x, base, other)

            x = self.input_layernorm(hidden_states)
            q, k, v = (
                through(x, own[name], mine[name]).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                for name in PROJECTIONS[:3]
            )
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
            out, _ = attend(attention, q, k, v, scaling=attention.scaling, **words)
            hidden_states = hidden_states + through(out.flatten(2), own["o_proj"], mine["o_proj"])
            if aside is not None:
                hidden_states = hidden_states + self.side(hidden_states, *aside)
            x = self.post_attention_layernorm(hidden_states)
            return hidden_states + through(x, self.mlp, None if expert is None else expert.mlp)

    OpenedLayer.__name__ = f"Opened{kind.__name__}"
    return OpenedLayer
