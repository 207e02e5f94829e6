"""BLIP-2's first stage: a Q-Former that reads text as well, by three masks for three tasks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mllm.aligned.bert import (
    LOOKED,
    MATCHED,
    READ,
    WRITTEN,
    Aligning,
    Words,
    both_ways,
    chance_of,
    text_config,
)
from mllm.aligned.rows import Rows
from mllm.aligned.twin import unit
from mllm.dropout import Dropout, RowDropout, WeightDropout, among, within
from mllm.dual import Layers
from mllm.resamplers import QFormer
from pipelines.types import spec


@spec
class QFormerPairs:
    """BLIP-2's Q-Former with its text half (arXiv:2301.12597, 3.1, fig. 2), for the stage before any language model.

    `connector` is what the second stage takes over: its queries and layers, without the matrix behind them. Queries and texts
    share self-attention and have a feed-forward each. Contrast: neither sees the other, and of a picture's queries the nearest
    counts. Matching: all see all. Captions, which begin with `dec`: queries see queries, text sees them and what comes before.
    `context` is the longest text, its first and last mark with it. `dropout` is the share of hidden states that is left out in
    training, `attention_dropout` that of attention's weights (see `mllm.dropout`); in the second stage nothing is left out.
    """

    learns: ClassVar[tuple[str, ...]] = ("momentum_contrast", "hard_matching", "captioning")
    kind: Literal["q_former_pairs"] = "q_former_pairs"
    connector: QFormer = QFormer()
    vocab_size: int = 30_523
    positions: int = 512
    context: int = 32
    dec: int = 30_522
    width: int = 256
    dropout: Dropout = 0.0
    attention_dropout: Dropout = 0.0

    def tiny(self) -> Self:
        return replace(
            self, connector=self.connector.tiny(), vocab_size=2048, positions=32, context=24, dec=4, width=16
        )

    def config(self, vision: int) -> Any:
        """transformers' configuration."""
        config = self.connector.config(vision)
        config.use_qformer_text_input = True
        config.vocab_size = self.vocab_size
        config.max_position_embeddings = self.positions
        return config

    def build(self, vision: int) -> Aligning:
        return QFormerNet(self, vision)


class QFormerNet(Aligning):
    """`QFormerPairs`; modules are called as transformers' `Blip2ForImageTextRetrieval` calls them."""

    def __init__(self, spec: QFormerPairs, vision: int) -> None:
        from transformers import Blip2QFormerModel
        from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

        super().__init__()
        config, connector = spec.config(vision), spec.connector
        width = connector.hidden_size
        shape = Layers(
            hidden_size=width,
            layers=connector.layers,
            heads=connector.heads,
            intermediate_size=connector.intermediate_size,
        )
        self.query_tokens = nn.Parameter(torch.randn(1, connector.queries, width) * 0.02)
        self.embeddings = Blip2TextEmbeddings(config)
        register_left_out()
        self.qformer = Blip2QFormerModel._from_config(config, attn_implementation=LEFT_OUT)
        self.begins = RowDropout(spec.dropout, 0)
        former: Any = self.qformer
        for number, layer in enumerate(former.encoder.layer):
            _leave_out(layer, spec, number)
        self.vision_projection = nn.Linear(width, spec.width)
        self.text_projection = nn.Linear(width, spec.width)
        self.itm_head = nn.Linear(width, 2)
        self.words = Words(text_config(shape, spec.vocab_size, spec.positions, vision, crosses=False))
        for module in (self.vision_projection, self.text_projection, self.itm_head, self.words.transform.dense):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        for table in (self.embeddings.word_embeddings, self.embeddings.position_embeddings):
            nn.init.normal_(table.weight, std=0.02)
        self.queries = connector.queries
        self.dec = spec.dec

    def _run(
        self, x: Tensor, seen: Tensor | None, features: Tensor | None, queries: int, drawn: Tensor | None
    ) -> Float[Tensor, "S N W"]:
        """Layers over [queries; text], of which the first `queries` look at the picture; `seen` bool (S, 1, N or 1, N).

        `drawn` int64 (S, N) is the chance of positions by which something is left out, None for nothing.
        """
        former: Any = self.qformer
        self.begins.told(drawn)
        x = self.begins(former.layernorm(x))
        if seen is not None:
            seen = seen.expand(-1, -1, x.shape[1], -1)
        for layer in former.encoder.layer:
            x = layer(x, seen, features, query_length=queries, draws=drawn)
        return x

    def _embed(self, rows: Rows) -> Float[Tensor, "S L W"]:
        table: Any = self.embeddings
        places = torch.arange(rows.ids.shape[1], device=rows.ids.device)
        return table.word_embeddings(rows.ids) + table.position_embeddings(places)

    def _asked(self, features: Tensor) -> Float[Tensor, "S Q W"]:
        return self.query_tokens.to(features.dtype).expand(len(features), -1, -1)

    def look(self, features: Tensor, seeds: Tensor | None = None) -> Tensor:
        drawn = chance_of(self, seeds, self.queries, LOOKED)
        return self._run(self._asked(features), None, features, self.queries, drawn)

    def read(self, rows: Rows) -> Tensor:
        drawn = chance_of(self, rows.seeds, rows.ids.shape[1], READ)
        return self._run(self._embed(rows), both_ways(rows.there), None, 0, drawn)

    def embed_pictures(self, looked: Tensor) -> Tensor:
        return unit(self.vision_projection(looked))

    def embed_texts(self, read: Tensor) -> Tensor:
        return unit(self.text_projection(read[:, 0]))

    def _together(self, features: Tensor, rows: Rows, seen: Tensor, salt: int) -> Float[Tensor, "S N W"]:
        words = self._embed(rows)
        x = torch.cat([self._asked(words), words], dim=1)
        return self._run(x, seen, features, self.queries, chance_of(self, rows.seeds, x.shape[1], salt))

    def matched(self, features: Tensor, rows: Rows) -> Tensor:
        there = nn.functional.pad(rows.there, (self.queries, 0), value=True)
        x = self._together(features, rows, both_ways(there), MATCHED)
        return self.itm_head(x[:, : self.queries]).mean(1)

    def caption(self, features: Tensor, rows: Rows, read: Tensor | None = None) -> Tensor:  # noqa: ARG002 -- its text sees queries
        rows = rows.begun_with(self.dec)
        x = self._together(features, rows, after_queries(rows.there, self.queries), WRITTEN)
        table: Any = self.embeddings
        return self.words(x[:, self.queries :], table.word_embeddings.weight)

    def begun_as(self, name: str) -> str | None:
        """What BERT calls it; the feed-forward of queries begins as that of texts."""
        part, _, rest = name.partition(".")
        if part == "words":
            return f"cls.predictions.{rest}"
        if part == "embeddings":
            return name
        if part != "qformer" or "crossattention" in rest:
            return None
        rest = rest.replace("intermediate_query", "intermediate").replace("output_query", "output")
        return rest.replace("attention.attention", "attention.self").replace("layernorm.", "embeddings.LayerNorm.")

    def units(self) -> list[nn.Module]:
        former: Any = self.qformer
        return list(former.encoder.layer)

    def heads(self) -> list[nn.Parameter]:
        modules = (self.vision_projection, self.text_projection, self.itm_head, self.words)
        return [p for module in modules for p in module.parameters()]


def _leave_out(layer: Any, of: QFormerPairs, number: int) -> None:
    """Let a layer of the Q-Former leave out a share of what it adds and of attention's weights, told by its keyword `draws`.

    What only queries go through is told of them alone, what only text goes through of what stands behind them.
    """
    across: Any = getattr(layer, "crossattention", None)
    first = 1 + 4 * number
    every = within((layer.attention.output,), of.dropout, first)
    every += among((layer.attention.attention,), of.attention_dropout, 2 * number)
    asking = within((layer.output_query,), of.dropout, first + 1)
    if across is not None:
        asking += within((across.output,), of.dropout, first + 2)
        asking += among((across.attention,), of.attention_dropout, 2 * number + 1)
    reading = within((layer.output,), of.dropout, first + 3)

    def tell(_: nn.Module, args: tuple[Any, ...], words: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        drawn, queries = words.pop("draws", None), words.get("query_length", 0)
        every.told(drawn)
        asking.told(None if drawn is None else drawn[:, :queries])
        reading.told(None if drawn is None else drawn[:, queries:])
        return args, words

    layer.register_forward_pre_hook(tell, with_kwargs=True)


LEFT_OUT = "mllm_left_out"


def register_left_out() -> None:
    """Make attention that may leave out some of its weights known to transformers under the name `LEFT_OUT`."""
    from transformers import AttentionInterface

    AttentionInterface.register(LEFT_OUT, _attend)


def _attend(
    module: nn.Module,
    query: Float[Tensor, "S H L E"],
    key: Float[Tensor, "S H K E"],
    value: Float[Tensor, "S H K E"],
    attention_mask: Bool[Tensor, "S 1 L K"] | None,
    scaling: float | None = None,
    **_: object,
) -> tuple[Float[Tensor, "S L H E"], None]:
    """transformers' attention call; by torch's own kernels where nothing is left out."""
    left_out = module.left_out
    assert isinstance(left_out, WeightDropout)
    if not left_out.active:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
        return out.transpose(1, 2), None
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    return (left_out(scores.float().softmax(-1).to(value.dtype)) @ value).transpose(1, 2), None


def after_queries(there: Bool[Tensor, "S L"], queries: int) -> Bool[Tensor, "S 1 N N"]:
    """Queries see queries; a token sees them, itself and what comes before it in its text (BLIP-2, fig. 2, in the middle)."""
    keys = nn.functional.pad(there, (queries, 0), value=True)
    places = torch.arange(keys.shape[1], device=keys.device).sub(queries - 1).clamp(min=0)  # all queries stand at 0
    return keys[:, None, None] & (places[:, None] >= places)
