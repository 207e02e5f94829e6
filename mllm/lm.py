"""Language models: `transformers` decoders over packs, with this project's attention.

To add a family: an architecture with `config`, its name in `TextArch`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mllm.encoders import Folder
from mllm.weights import load
from ops.attention import Backend, varlen_attention
from ops.context import Share
from pipelines.chat import ChatML, Template
from pipelines.types import spec

ATTENTION = "mllm_varlen"


@spec
class Llama:
    """The shape of a Llama-family decoder (arXiv:2302.13971): RMSNorm, rotary positions, SwiGLU, grouped queries.

    `init_std` is the deviation of weights that are trained from scratch.
    """

    kind: Literal["llama"] = "llama"
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    context: int = 4096
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = False
    init_std: float = 0.02

    def config(self) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.context,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            rms_norm_eps=self.norm_eps,
            tie_word_embeddings=self.tied,
            initializer_range=self.init_std,
            use_cache=False,
        )


TextArch = Llama


@spec
class CausalLM:
    """A decoder, its tokenizer and the way conversations are written for it.

    `weights` None trains it from scratch. `tokenizer` names a folder with a `tokenizer.json` and defaults to `weights`.
    """

    arch: TextArch
    weights: str | None = None
    tokenizer: str | None = None
    chat: Template = ChatML()
    bos: str | None = None
    eos: str | None = "<|im_end|>"

    def __post_init__(self) -> None:
        if self.tokenizer is None and self.weights is None:
            raise ValueError("a language model without weights needs a tokenizer; set lm.tokenizer to a folder's name")

    @property
    def text_codec(self) -> str:
        """The name that the site maps to the tokenizer's folder."""
        return self.tokenizer or self.weights or ""

    def build(self, folder: Folder) -> LanguageModel:
        from transformers import LlamaForCausalLM

        register_attention()
        if self.weights is None:
            return LanguageModel(LlamaForCausalLM._from_config(self.arch.config(), attn_implementation=ATTENTION))
        place = folder(self.weights)
        model = load(
            LlamaForCausalLM, "AutoModelForCausalLM", place, attn_implementation=ATTENTION, dtype=torch.float32
        )
        if self.arch.vocab_size > model.config.vocab_size:  # rows for new words, drawn like the old ones
            model.resize_token_embeddings(self.arch.vocab_size)
        for field in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            wanted, has = getattr(self.arch.config(), field), getattr(model.config, field)
            if wanted != has:
                raise ValueError(
                    f"weights {place!r} have {field}={has} and the recipe's arch says {wanted}; mend the arch"
                )
        return LanguageModel(model)


class LanguageModel(nn.Module):
    """A decoder over one pack. The head is applied by the objective, which never makes the full logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.backend: Backend | None = None
        self.first_embedded = self.first_predicted = (
            0  # rows before these learn nothing, where the whole would be trained
        )

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    @property
    def head(self) -> Tensor:
        """The output matrix (C, D); the embedding itself where they are tied."""
        weight = self.model.lm_head.weight
        return _Rows.apply(weight, self.first_predicted) if self.first_predicted else weight

    def embed(self, ids: Int[Tensor, " T"]) -> Float[Tensor, "T D"]:
        """Embeddings; positions that hold no vocabulary id (images) get row 0, to be replaced."""
        embedded = self.model.model.embed_tokens(ids.clamp(min=0))
        if not self.first_embedded:
            return embedded
        return torch.where((ids >= self.first_embedded).unsqueeze(1), embedded, embedded.detach())

    def forward(
        self,
        embeddings: Float[Tensor, "T D"],
        positions: Int[Tensor, " T"],
        cu_seqlens: Int[Tensor, " bounds"],
        max_seqlen: int,
        share: Share | None = None,
    ) -> Float[Tensor, "T D"]:
        """Final hidden states, after the last norm; of this rank's positions, where ranks share the pack."""
        output = self.model.model(
            inputs_embeds=embeddings.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            attention_mask=None,
            use_cache=False,
            documents=cu_seqlens,
            longest=max_seqlen,
            share=share,
            backend=self.backend,
        )
        return output.last_hidden_state.squeeze(0)

    def units(self) -> list[nn.Module]:
        return list(self.model.model.layers)


class _Rows(torch.autograd.Function):
    """A matrix as it is, whose rows before `first` get no gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, first: int) -> Tensor:
        ctx.first = first
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        slope = slopes[0].clone()
        slope[: ctx.first] = 0
        return slope, None


def _attend(
    module: nn.Module,  # noqa: ARG001 -- the signature is transformers'
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 -- documents stand in `documents`
    scaling: float,
    documents: Tensor,
    longest: int,
    share: Share | None = None,
    backend: Backend | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention call, (1, H, T, E), over the documents of a pack."""
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if share is not None:
        return share.attend(q, k, v, scaling).unsqueeze(0), None
    return varlen_attention(q, k, v, documents, longest, scale=scaling, backend=backend).unsqueeze(0), None


def register_attention() -> None:
    """Make `varlen_attention` known to transformers under the name `ATTENTION`; no mask is built for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attend)
