"""Language models: `transformers` decoders over packs, with this project's attention. Their shapes are in `archs.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mllm.archs import MPT, T5, Llama, TextArch
from mllm.encoders import Folder
from mllm.weights import load
from ops.attention import Backend, varlen_attention
from ops.context import Share
from pipelines.chat import ChatML, Template
from pipelines.types import Batch, spec

__all__ = ["CausalLM", "LanguageModel", "Llama", "TextArch", "register_attention"]

ATTENTION = "mllm_varlen"

Before = Callable[[int, Tensor], tuple[Tensor, dict[str, Any]]]
"""What a fusion does before layer `i`: takes hidden states (T, D), gives them on, with more words for the layer."""

Beside = Callable[[Any, Tensor, float], Tensor]
"""What a layer's attention adds to its own: of the attention module, its queries (T, H, E) and their scale, (T, H, E)."""


@spec
class CausalLM:
    """A decoder (or T5's encoder and decoder), its tokenizer and the way conversations are written for it.

    `weights` None trains it from scratch; rotary positions are the arch's, whatever the weights' own folder says. `tokenizer`
    names a folder with a `tokenizer.json` and defaults to `weights`.
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
        import transformers

        register_attention()
        family = getattr(transformers, self.arch.family)
        module, auto, attention = LanguageModel, "AutoModelForCausalLM", ATTENTION
        if isinstance(self.arch, T5):
            from mllm.seq2seq import EncoderDecoder

            module, auto, attention = EncoderDecoder, "AutoModelForSeq2SeqLM", "sdpa"
        if isinstance(self.arch, MPT):
            from mllm.mpt import ALiBiModel

            module, attention = ALiBiModel, "eager"
        if self.weights is None:
            return module(family._from_config(self.arch.config(), attn_implementation=attention))
        place = folder(self.weights)
        model = load(family, auto, place, attn_implementation=attention, dtype=torch.float32)
        if self.arch.vocab_size > model.config.vocab_size:  # rows for new words, drawn like the old ones
            model.resize_token_embeddings(self.arch.vocab_size)
        for field in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            wanted, has = getattr(self.arch.config(), field), getattr(model.config, field)
            if wanted != has:
                raise ValueError(
                    f"weights {place!r} have {field}={has} and the recipe's arch says {wanted}; mend the arch"
                )
        _positions_as_said(model, self.arch.config())
        return module(model)


def _positions_as_said(model: Any, said: Any) -> None:
    """Give a model that was loaded the rotary positions of the recipe's arch, where its own folder says something else."""
    asked, has = getattr(said, "rope_parameters", None), getattr(model.config, "rope_parameters", None)
    if asked and {word: (has or {}).get(word) for word in asked} != asked:
        model.config.rope_parameters = asked
        decoder = model.get_decoder()
        decoder.rotary_emb = type(decoder.rotary_emb)(config=model.config)


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
    def decoder(self) -> Any:
        """The stack of layers with what is before and after it, as transformers has it."""
        return self.model.get_decoder()

    @property
    def layers(self) -> nn.ModuleList:
        return self.decoder.layers

    @property
    def norm(self) -> nn.Module:
        """The norm after the last layer."""
        decoder = self.decoder
        return decoder.norm if hasattr(decoder, "norm") else decoder.final_layer_norm

    def placed(
        self, hidden: Float[Tensor, "1 T D"], places: Int[Tensor, "1 T"]
    ) -> tuple[Float[Tensor, "1 T D"], dict[str, Any]]:
        """`hidden` with learned positions, where there are such, and what layers are told of positions otherwise."""
        decoder = self.decoder
        if hasattr(decoder, "rotary_emb"):
            return hidden, {"position_embeddings": decoder.rotary_emb(hidden, position_ids=places)}
        return hidden + decoder.embed_positions(None, position_ids=places), {}

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    @property
    def head(self) -> Tensor:
        """The output matrix (C, D); the embedding itself where they are tied."""
        weight = self.model.lm_head.weight
        return _Rows.apply(weight, self.first_predicted) if self.first_predicted else weight

    def embed(self, ids: Int[Tensor, " T"]) -> Float[Tensor, "T D"]:
        """Embeddings; positions that hold no vocabulary id (images) get row 0, to be replaced."""
        embedded = self.embedding(ids.clamp(min=0))
        if (scale := getattr(self.model.config, "embedding_multiplier", 1.0)) != 1.0:
            embedded = embedded * scale  # Granite's own forward would do it to visual tokens too
        if not self.first_embedded:
            return embedded
        return torch.where((ids >= self.first_embedded).unsqueeze(1), embedded, embedded.detach())

    def forward(
        self,
        embeddings: Float[Tensor, "T D"],
        batch: Batch,
        positions: Int[Tensor, " T"] | None = None,
        before: Before | None = None,
    ) -> Float[Tensor, "T D"]:
        """Final hidden states, after the last norm; of this rank's positions, where ranks share the pack.

        `positions` stand in place of the batch's, and `before` is called before each layer. Layers are called one by one
        and not by the decoder of transformers, which would let nothing between them.
        """
        places = (batch.positions if positions is None else positions).unsqueeze(0)
        hidden, words = self.placed(embeddings.unsqueeze(0), places)
        for number, layer in enumerate(self.layers):
            more: dict[str, Any] = {}
            if before is not None:
                states, more = before(number, hidden.squeeze(0))
                hidden = states.unsqueeze(0)
            hidden = layer(
                hidden,
                attention_mask=None,
                position_ids=places,
                use_cache=False,
                documents=batch.cu_seqlens,
                longest=batch.max_seqlen,
                share=batch.share,
                backend=self.backend,
                **words,
                **more,
            )
        out = self.norm(hidden).squeeze(0)
        scale = getattr(self.model.config, "logits_scaling", 1.0)
        return out if scale == 1.0 else out / scale

    def units(self) -> list[nn.Module]:
        return list(self.layers)


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


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,  # noqa: ARG001 -- documents stand in `documents`
    *,
    scaling: float,
    documents: Tensor,
    longest: int,
    share: Share | None = None,
    backend: Backend | None = None,
    beside: Beside | None = None,
    slopes: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention call, (1, H, T, E), over the documents of a pack; what `beside` sees is added to it."""
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if share is not None:
        return share.attend(q, k, v, scaling).unsqueeze(0), None
    seen = varlen_attention(q, k, v, documents, longest, scale=scaling, slopes=slopes, backend=backend)
    return (seen if beside is None else seen + beside(module, q, scaling)).unsqueeze(0), None


def register_attention() -> None:
    """Make `varlen_attention` known to transformers under the name `ATTENTION`; no mask is built for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)
