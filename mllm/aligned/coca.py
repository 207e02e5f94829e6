"""CoCa (arXiv:2205.01917): a captioner whose lower half reads text alone, so that the contrast comes with the same pass."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mllm.aligned.bert import Aligning, backwards
from mllm.aligned.rows import Rows
from mllm.aligned.twin import unit
from mllm.dual import Layers
from pipelines.types import spec


@spec
class CoCa:
    """CoCa (3.2): `text` layers read backwards alone, and `fusion` more of the same shape look at the picture.

    A learned token behind each text, which sees all of it, is its embedding. The picture is asked by attention twice: by one
    query for the contrast, by `queries` for the caption (3.2, "attentional poolers"; in figure 2 both ask the encoder itself).
    `context` is the longest text, its first and last mark with it. `width` of the embeddings is the text's own.
    """

    learns: ClassVar[tuple[str, ...]] = ("contrastive", "captioning")
    kind: Literal["coca"] = "coca"
    text: Layers
    fusion: int
    queries: int = 256
    vocab_size: int = 64_000
    context: int = 64

    @property
    def width(self) -> int:
        return self.text.hidden_size

    def tiny(self) -> Self:
        shape = Layers(hidden_size=32, layers=2, heads=2, intermediate_size=64)
        return replace(self, text=shape, fusion=2, queries=4, vocab_size=2048, context=24)

    def build(self, vision: int) -> Aligning:
        return CoCaNet(self, vision)


class Attention(nn.Module):
    """Attention of `x` to itself or to what it is given."""

    def __init__(self, width: int, heads: int, keys: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(keys or width, width)
        self.value = nn.Linear(keys or width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, given: Tensor, seen: Bool[Tensor, "S 1 L L"] | None = None) -> Tensor:
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(x), self.key(given), self.value(given))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """A layer that norms what it reads; if it `looks`, at the picture between its attention and its feed-forward."""

    def __init__(self, shape: Layers, looks: bool) -> None:
        super().__init__()
        width = shape.hidden_size
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, shape.heads)
        self.looking_norm = nn.LayerNorm(width) if looks else None
        self.looking = Attention(width, shape.heads) if looks else None
        self.inner_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, shape.intermediate_size)
        self.down = nn.Linear(shape.intermediate_size, width)

    def forward(self, x: Tensor, seen: Tensor, picture: Tensor | None = None) -> Float[Tensor, "S L W"]:
        normed = self.norm(x)
        x = x + self.attention(normed, normed, seen)
        if self.looking is not None and self.looking_norm is not None:
            x = x + self.looking(self.looking_norm(x), picture)
        return x + self.down(F.gelu(self.up(self.inner_norm(x))))


class Pooler(nn.Module):
    """Attention from learned queries to a picture's features, and a norm behind it."""

    def __init__(self, queries: int, width: int, heads: int, vision: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width) * width**-0.5)
        self.attention = Attention(width, heads, vision)
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Float[Tensor, "S P D"]) -> Float[Tensor, "S Q W"]:
        queries = self.queries.to(features.dtype).expand(len(features), -1, -1)
        return self.norm(self.attention(queries, features))


class CoCaNet(Aligning):
    """`CoCa`. `look` gives the contrast's one token; `read` the texts' states, the learned token last."""

    def __init__(self, spec: CoCa, vision: int) -> None:
        super().__init__()
        shape, width = spec.text, spec.text.hidden_size
        self.embeddings = nn.Embedding(spec.vocab_size, width)
        self.positions = nn.Embedding(spec.context, width)
        self.cls = nn.Parameter(torch.randn(1, width) * 0.02)
        self.layers = nn.ModuleList(Layer(shape, looks=False) for _ in range(shape.layers))
        self.fusion = nn.ModuleList(Layer(shape, looks=True) for _ in range(spec.fusion))
        self.contrast_pool = Pooler(1, width, shape.heads, vision)
        self.caption_pool = Pooler(spec.queries, width, shape.heads, vision)
        self.text_norm = nn.LayerNorm(width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, spec.vocab_size, bias=False)
        for table in (self.embeddings, self.positions, self.head):
            nn.init.normal_(table.weight, std=0.02)

    def look(self, features: Tensor, seeds: Tensor | None = None) -> Tensor:  # noqa: ARG002 -- nothing is left out
        return self.contrast_pool(features)

    def read(self, rows: Rows) -> Tensor:
        places = torch.arange(rows.ids.shape[1], device=rows.ids.device)
        x = self.embeddings(rows.ids) + self.positions(places)
        x = torch.cat([x, self.cls.to(x.dtype).expand(len(x), 1, -1)], dim=1)
        seen = backwards(F.pad(rows.there, (0, 1), value=True))
        for layer in self.layers:
            x = layer(x, seen)
        return x

    def embed_pictures(self, looked: Tensor) -> Tensor:
        return unit(looked)

    def embed_texts(self, read: Tensor) -> Tensor:
        return unit(self.text_norm(read[:, -1]))

    def caption(self, features: Tensor, rows: Rows, read: Tensor | None = None) -> Tensor:
        x = (self.read(rows) if read is None else read)[:, :-1]
        picture, seen = self.caption_pool(features), backwards(rows.there)
        for layer in self.fusion:
            x = layer(x, seen, picture)
        return self.head(self.norm(x))

    def units(self) -> list[nn.Module]:
        return [*self.layers, *self.fusion]

    def heads(self) -> list[nn.Parameter]:
        modules = (self.contrast_pool, self.caption_pool, self.text_norm, self.norm, self.head)
        return [p for module in modules for p in module.parameters()]
