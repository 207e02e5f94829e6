"""InternVL's first stages: a contrast of InternViT with a LLaMA, then that LLaMA with queries, by BLIP-2's three tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn

from mllm.aligned.bert import Aligning, backwards, both_ways
from mllm.aligned.querying import after_queries
from mllm.aligned.rows import Rows
from mllm.aligned.twin import unit
from mllm.qllama import Middle, QLLaMA
from pipelines.types import spec


@spec
class QLLaMAPairs:
    """QLLaMA with its text half (InternVL, arXiv:2312.14238, 3.3), before any other language model.

    InternVL-C, without `asks`: a picture's features are pooled by attention from their mean, a text is a LLaMA's state at its
    last mark. InternVL-G, which `asks`: it is QLLaMA's queries that are pooled, and BLIP-2's tasks are learned by its masks:
    queries and text apart for the contrast, all seeing all for matching, text after queries for captions. Text sees what comes
    before it wherever it is alone. `connector` is what the stage with a language model behind takes over.

    `context` is the longest text, its first and last mark with it; `width` that of embeddings, `pool_heads` the heads of the
    pooling.
    """

    kind: Literal["qllama_pairs"] = "qllama_pairs"
    connector: QLLaMA = QLLaMA()
    asks: bool = True
    vocab_size: int = 49_954
    context: int = 80
    width: int = 768
    pool_heads: int = 16
    both: ClassVar[tuple[str, ...]] = ("momentum_contrast", "hard_matching", "captioning")

    @property
    def learns(self) -> tuple[str, ...]:
        """Kinds of objectives: without queries nothing looks from a text at a picture."""
        return ("contrastive", *self.both) if self.asks else ("contrastive", "momentum_contrast")

    def tiny(self) -> Self:
        return replace(self, connector=self.connector.tiny(), vocab_size=2048, context=24, width=16, pool_heads=2)

    def build(self, vision: int) -> Aligning:
        return QLLaMANet(self, vision)


class MeanPool(nn.Module):
    """Attention from the mean of what there is to all of it, every one normed before; biases, a width of its own behind."""

    def __init__(self, width: int, heads: int, out: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_query, self.norm_key, self.norm_value = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, out)

    def forward(self, x: Float[Tensor, "S N W"]) -> Float[Tensor, "S 1 E"]:
        mean = x.mean(1, keepdim=True)
        q, k, v = (
            y.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for y in (
                self.query(self.norm_query(mean)),
                self.key(self.norm_key(x)),
                self.value(self.norm_value(x)),
            )
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class QLLaMANet(Aligning):
    """`QLLaMAPairs`."""

    def __init__(self, spec: QLLaMAPairs, vision: int) -> None:
        super().__init__()
        width = spec.connector.hidden_size
        self.asks = spec.asks
        self.embeddings = nn.Embedding(spec.vocab_size, width)
        self.middle = Middle(spec.connector, vision, spec.asks)
        self.picture_pool = MeanPool(width if spec.asks else vision, spec.pool_heads, spec.width)
        self.text_projection = nn.Linear(width, spec.width, bias=False)
        tables: list[nn.Embedding | nn.Linear] = [self.embeddings, self.text_projection]
        if spec.asks:
            self.words = nn.Linear(width, spec.vocab_size, bias=False)
            self.match = nn.Linear(width, 2)
            tables.append(self.words)
        for table in tables:
            nn.init.normal_(table.weight, std=0.02)

    def look(self, features: Tensor, seeds: Tensor | None = None) -> Tensor:  # noqa: ARG002 -- nothing is left out
        if not self.asks:
            return features
        queries = self.middle.asked(features)
        return self.middle.run(queries, features, queries.shape[1])

    def read(self, rows: Rows) -> Tensor:
        """Hidden states of texts alone; only the last mark's of each, which is what it is known by."""
        x = self.middle.run(self.embeddings(rows.ids), seen=backwards(rows.there))
        last = rows.there.sum(1) - 1
        return x[torch.arange(len(x), device=x.device), last][:, None]

    def embed_pictures(self, looked: Tensor) -> Tensor:
        return unit(self.picture_pool(looked))

    def embed_texts(self, read: Tensor) -> Tensor:
        return unit(self.text_projection(read[:, 0]))

    def _together(self, features: Tensor, rows: Rows, seen: Tensor) -> Float[Tensor, "S N W"]:
        queries = self.middle.asked(features)
        x = torch.cat([queries, self.embeddings(rows.ids)], dim=1)
        return self.middle.run(x, features, queries.shape[1], seen.expand(-1, -1, x.shape[1], -1))

    def matched(self, features: Tensor, rows: Rows) -> Tensor:
        queries = self.middle.asked(features).shape[1]
        there = F.pad(rows.there, (queries, 0), value=True)
        return self.match(self._together(features, rows, both_ways(there))[:, :queries]).mean(1)

    def caption(self, features: Tensor, rows: Rows, read: Tensor | None = None) -> Tensor:  # noqa: ARG002 -- its text sees queries
        queries = self.middle.asked(features).shape[1]
        x = self._together(features, rows, after_queries(rows.there, queries))
        return self.words(x[:, queries:])

    def begun_as(self, name: str) -> str | None:
        """What LLaMA calls it."""
        if name.startswith("middle.layers."):
            number, _, rest = name.removeprefix("middle.layers.").partition(".")
            return f"model.layers.{number}.{rest.removeprefix('layer.')}" if rest.startswith("layer.") else None
        return {
            "embeddings.weight": "model.embed_tokens.weight",
            "middle.norm.weight": "model.norm.weight",
            "words.weight": "lm_head.weight",
        }.get(name)

    def units(self) -> list[nn.Module]:
        return list(self.middle.layers)

    def heads(self) -> list[nn.Parameter]:
        modules = [self.picture_pool, self.text_projection, *([self.match] if self.asks else [])]
        return [p for module in modules for p in module.parameters()]


def go_on(model: nn.Module, folder: str) -> None:
    """Take from an export of this project, of InternVL-C or of InternVL-G, whatever `model` has under the same name.

    Raises ValueError where it holds none of the encoder or none of the layers, or some in another shape.
    """
    own = model.state_dict()
    file = Path(folder) / "model.safetensors"
    if not file.is_file():
        raise ValueError(
            f"weights {folder!r}: there is no model.safetensors; name what a stage of pairs was exported to"
        )
    found: dict[str, Tensor] = {}
    with safe_open(file, "pt") as tensors:
        for name in own.keys() & set(tensors.keys()):
            value = tensors.get_tensor(name)
            if "picture_pool" in name and value.shape != own[name].shape:
                continue  # InternVL-C pools the encoder's features, InternVL-G the queries
            if value.shape != own[name].shape:
                raise ValueError(
                    f"weights {folder!r} have {name} of {tuple(value.shape)} and the recipe's model {tuple(own[name].shape)}; "
                    "mend the recipe's numbers"
                )
            found[name] = value
    for part in ("encoder.", "net.middle.layers."):
        if not any(name.startswith(part) for name in found):
            raise ValueError(f"weights {folder!r} hold nothing of {part[:-1]}; name what internvl_c was exported to")
    model.load_state_dict(found, strict=False)
