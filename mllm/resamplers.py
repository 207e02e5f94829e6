"""Connectors with learned queries: however many patches a tile has, it becomes `queries` tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from safetensors import safe_open
from torch import Tensor, nn

from mllm.towers import Grid
from ops.visual import interpolated_positions, side_of, sincos_2d
from pipelines.types import spec


@spec
class QFormer:
    """BLIP-2's querying transformer (arXiv:2301.12597, 3.1): BERT-base whose queries look at the features every second layer.

    Its output goes through one matrix. The class is transformers' `Blip2QFormerModel`; `weights` name a folder in BLIP-2's form,
    of which the Q-Former and its queries are read, not the matrix. BLIP-2's 188 million numbers count its feed-forward and
    embeddings for text, which this connector has no use for. No dropout: a tile's tokens depend on nothing but the tile.
    """

    kind: Literal["q_former"] = "q_former"
    queries: int = 32
    hidden_size: int = 768
    layers: int = 12
    heads: int = 12
    intermediate_size: int = 3072
    every: int = 2
    weights: str | None = None

    def tokens(self, patches: int) -> int:  # noqa: ARG002 -- as many as there are queries
        """Visual tokens of a tile."""
        return self.queries

    def tiny(self) -> Self:
        return replace(self, queries=4, hidden_size=32, layers=2, heads=4, intermediate_size=64, weights=None)

    def config(self, d_in: int) -> Any:
        from transformers import Blip2QFormerConfig

        return Blip2QFormerConfig(
            hidden_size=self.hidden_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.intermediate_size,
            cross_attention_frequency=self.every,
            encoder_hidden_size=d_in,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )

    def build(self, d_in: int, d_out: int) -> nn.Module:
        from transformers import Blip2QFormerModel

        model = Blip2QFormerModel._from_config(self.config(d_in), attn_implementation="sdpa")
        return Querying(model, self.queries, self.hidden_size, d_out)


class Querying(nn.Module):
    """`QFormer`."""

    def __init__(self, model: Any, queries: int, width: int, d_out: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width) * 0.02)
        self.model = model
        self.project = nn.Linear(width, d_out)

    def own_name(self, name: str) -> str | None:
        """What the model calls the weight that BLIP-2's form calls `name`; None for what is not the Q-Former's."""
        return name.rpartition("qformer.")[2] if "qformer." in name or name.endswith("query_tokens") else None

    def read(self, folder: str) -> None:
        """Take the Q-Former and its queries from a folder or hub id in BLIP-2's form. Raises ValueError for what it lacks."""
        found: dict[str, Tensor] = {}
        for file in _safetensors(folder):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 -- it is no dict
                    own = self.own_name(name)
                    if own is not None:
                        found[own] = tensors.get_tensor(name)
        queries = next((value for name, value in found.items() if name.endswith("query_tokens")), None)
        own = self.model.state_dict()
        missing = [name for name in own if name not in found or found[name].shape != own[name].shape]
        if queries is None or missing or queries.squeeze(0).shape != self.queries.shape:
            raise ValueError(
                f"weights {folder!r} are no Q-Former of the recipe's shape: {missing[:3] or 'query_tokens'} is missing or has "
                "another shape; mend the connector's numbers or name a folder in BLIP-2's form"
            )
        self.model.load_state_dict({name: found[name] for name in own})
        with torch.no_grad():
            self.queries.copy_(queries.squeeze(0))

    def forward(self, features: Float[Tensor, "N P Dv"]) -> Float[Tensor, "N Q D"]:
        queries = self.queries.expand(len(features), -1, -1)
        found = self.model(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        return self.project(found).clone()


def _safetensors(folder: str) -> list[Path]:
    if not Path(folder).is_dir():
        from huggingface_hub import snapshot_download

        folder = snapshot_download(folder, allow_patterns="*.safetensors")
    return sorted(Path(folder).glob("*.safetensors"))


@spec
class Perceiver:
    """Flamingo's resampler (arXiv:2204.14198, 3.1, app. A.1.1), in OpenFlamingo's form: latents attend [features; latents].

    As wide as the features, then one matrix to the language model's width. With `frames`, frames of a video are read together:
    to the features of each a learned embedding of its time is added, the first of `frames` to a picture by itself, and the
    latents see them all. A video of more frames has the embeddings stretched to their number, linearly, as the paper does where
    it is asked. Without, each frame is resampled as a picture. Idefics (arXiv:2306.16527, as transformers has it) has ReLU for
    `activation`, LayerNorm of each head's queries and keys (`qk_norm`), and no matrix behind (`projected`): its latents leave as
    wide as the features are.
    """

    kind: Literal["perceiver"] = "perceiver"
    queries: int = 64
    depth: int = 6
    heads: int = 8
    head_size: int = 64
    activation: Literal["gelu", "relu"] = "gelu"
    qk_norm: bool = False
    projected: bool = True
    frames: Annotated[int, Field(ge=0)] = 0

    def tokens(self, patches: int) -> int:  # noqa: ARG002 -- as many as there are latents
        """Visual tokens of a tile, or of a video."""
        return self.queries

    def tiny(self) -> Self:
        return replace(self, queries=4, depth=2, heads=2, head_size=8)

    def build(self, d_in: int, d_out: int) -> nn.Module:
        return Resampler(self, d_in, d_out)


class Resampler(nn.Module):
    """`Perceiver`."""

    def __init__(self, spec: Perceiver, d_in: int, d_out: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(spec.queries, d_in))
        self.times = nn.Parameter(0.02 * torch.randn(spec.frames, d_in)) if spec.frames else None
        self.layers = nn.ModuleList(ResamplerLayer(spec, d_in) for _ in range(spec.depth))
        self.norm = nn.LayerNorm(d_in)
        self.project = nn.Linear(d_in, d_out) if spec.projected else nn.Identity()

    def forward(self, features: Float[Tensor, "N P Dv"], frames: Sequence[int] = ()) -> Float[Tensor, "M Q D"]:
        """`frames` are how many of the tiles, one after the other, are one video's; each is a picture if nothing is said.

        Raises ValueError when they are not as many as there are tiles.
        """
        if self.times is None:
            return self._read(features)
        counts = list(frames) or [1] * len(features)
        if sum(counts) != len(features):
            raise ValueError(
                f"{len(counts)} videos have {sum(counts)} frames, and there are {len(features)} tiles: they come from different "
                "packs"
            )
        starts = [end - count for end, count in zip(accumulate(counts), counts, strict=True)]
        found, order = [], []
        for count in dict.fromkeys(counts):  # videos of as many frames all at once
            mine = [number for number, own in enumerate(counts) if own == count]
            places = torch.tensor([[starts[n] + frame for frame in range(count)] for n in mine], device=features.device)
            shown = features[places] + self._embeddings(count).to(features.dtype)[:, None]
            found.append(self._read(shown.flatten(1, 2)))
            order += mine
        back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=features.device)
        return torch.cat(found)[back]

    def _read(self, features: Float[Tensor, "M K Dv"]) -> Float[Tensor, "M Q D"]:
        latents = self.latents.to(features.dtype).expand(len(features), -1, -1)
        for layer in self.layers:
            latents = layer(features, latents)
        return self.project(self.norm(latents)).clone()

    def _embeddings(self, count: int) -> Float[Tensor, "count Dv"]:
        """Of the times of a video of `count` frames."""
        assert self.times is not None
        if count <= len(self.times):
            return self.times[:count]
        return F.interpolate(self.times.T[None], size=count, mode="linear", align_corners=True)[0].T


class ResamplerLayer(nn.Module):
    """Attention of latents to features and to themselves, and a feed-forward, both beside what passes by."""

    def __init__(self, spec: Perceiver, width: int) -> None:
        super().__init__()
        inner = spec.heads * spec.head_size
        self.heads = spec.heads
        self.activation = F.gelu if spec.activation == "gelu" else F.relu
        self.norm_features = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        self.norm_query, self.norm_key = (
            nn.LayerNorm(spec.head_size) if spec.qk_norm else nn.Identity() for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, features: Float[Tensor, "N P D"], latents: Float[Tensor, "N Q D"]) -> Float[Tensor, "N Q D"]:
        queries = self.norm_latents(latents)
        keys = torch.cat([self.norm_features(features), queries], dim=1)
        q, k = (
            norm(x.unflatten(2, (self.heads, -1))).flatten(2)
            for norm, x in ((self.norm_query, self.query(queries)), (self.norm_key, self.key(keys)))
        )
        latents = latents + self.out(attend(q, k, self.value(keys), self.heads))
        return latents + self.down(self.activation(self.up(self.norm(latents))))


def attend(q: Float[Tensor, "N Q D"], k: Float[Tensor, "N P D"], v: Float[Tensor, "N P D"], heads: int) -> Tensor:
    """Attention in `heads` heads, (N, Q, D)."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@spec
class CrossPool:
    """One layer of attention from learned queries to the features, with positions of rows and columns on both.

    Qwen-VL (arXiv:2308.12966, 2.1) has 256 queries; MiniCPM-V 64 or 96 (arXiv:2408.01800, 3.1); LLaVA-UHD 64 a slice
    (arXiv:2403.11703, 3.2). Queries stand on a square grid and the features' positions are that grid's, stretched; where the
    queries are no square they have none, and the features those of their own grid. As wide as the language model, heads of
    128, then LayerNorm and one matrix. Slices of any shape are read.
    """

    kind: Literal["cross_pool"] = "cross_pool"
    queries: int = 256
    head_size: int = 128

    def tokens(self, patches: int) -> int:
        """Visual tokens of a tile or slice. Raises ValueError when a tile has no square grid of features, which have places."""
        side_of(patches)
        return self.queries

    def tiny(self) -> Self:
        square = math.isqrt(self.queries) ** 2 == self.queries
        return replace(self, queries=4 if square else 5, head_size=8)

    def build(self, d_in: int, d_out: int) -> nn.Module:
        return CrossAttention(self, d_in, d_out)


class CrossAttention(nn.Module):
    """`CrossPool`."""

    def __init__(self, spec: CrossPool, d_in: int, d_out: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(spec.queries, d_out) * 0.02)
        self.project_in = nn.Linear(d_in, d_out, bias=False)
        self.norm_features = nn.LayerNorm(d_out)
        self.norm_queries = nn.LayerNorm(d_out)
        self.attention = nn.MultiheadAttention(d_out, d_out // spec.head_size, batch_first=True)
        self.norm = nn.LayerNorm(d_out)
        self.project = nn.Linear(d_out, d_out, bias=False)
        side = math.isqrt(spec.queries)
        self.side = side if side * side == spec.queries else None

    def forward(self, features: Float[Tensor, "N P Dv"], grids: Sequence[Grid] | None = None) -> Float[Tensor, "N Q D"]:
        """`grids` are each slice's rows and columns where they differ; what is behind them fills up."""
        keys = self.norm_features(self.project_in(features))
        length = keys.shape[1]
        if grids is None:
            side = side_of(length)
            places, hidden = self._positions(keys, (side, side)), None
        else:
            shapes = list(dict.fromkeys(grids))
            each = [self._positions(keys, grid) for grid in shapes]
            places = torch.stack([F.pad(place, (0, 0, 0, length - len(place))) for place in each])
            places = places[torch.tensor([shapes.index(grid) for grid in grids], device=keys.device)]
            seen = torch.tensor([rows * cols for rows, cols in grids], device=keys.device)
            hidden = torch.arange(length, device=keys.device) >= seen[:, None]
        queries = self.norm_queries(self.queries.to(keys.dtype))
        if self.side is not None:
            queries = queries + sincos_2d(queries.shape[1], self.side, self.side, keys.device).to(keys.dtype)
        queries = queries.expand(len(keys), -1, -1)
        found, _ = self.attention(queries, keys + places, keys, key_padding_mask=hidden, need_weights=False)
        return self.project(self.norm(found)).clone()

    def _positions(self, keys: Tensor, grid: Grid) -> Float[Tensor, "P D"]:
        width, device = keys.shape[2], keys.device
        if self.side is None:
            return sincos_2d(width, *grid, device).to(keys.dtype)
        return interpolated_positions(sincos_2d(width, self.side, self.side, device), grid).to(keys.dtype)


@spec
class Abstractor:
    """mPLUG-Owl's visual abstractor (arXiv:2304.14178, 3.1): layers of attention from queries to [features; queries].

    Each layer has a gated feed-forward; behind the queries stands one learned end token.
    """

    kind: Literal["abstractor"] = "abstractor"
    queries: int = 64
    hidden_size: int = 1024
    layers: int = 6
    heads: int = 16
    intermediate_size: int = 2816

    def tokens(self, patches: int) -> int:  # noqa: ARG002 -- as many as there are queries, and the end
        """Visual tokens of a tile."""
        return self.queries + 1

    def tiny(self) -> Self:
        return replace(self, queries=4, hidden_size=32, layers=2, heads=4, intermediate_size=64)

    def build(self, d_in: int, d_out: int) -> nn.Module:
        return VisualAbstractor(self, d_in, d_out)


class VisualAbstractor(nn.Module):
    """`Abstractor`."""

    def __init__(self, spec: Abstractor, d_in: int, d_out: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(spec.queries, spec.hidden_size) * 0.02)
        self.layers = nn.ModuleList(AbstractorLayer(spec, d_in) for _ in range(spec.layers))
        self.project = nn.Linear(spec.hidden_size, d_out)
        self.end = nn.Parameter(torch.randn(1, d_out) * 0.02)

    def forward(self, features: Float[Tensor, "N P Dv"]) -> Float[Tensor, "N Q D"]:
        queries = self.queries.to(features.dtype).expand(len(features), -1, -1)
        for layer in self.layers:
            queries = layer(features, queries)
        found = self.project(queries)
        return torch.cat([found, self.end.to(found.dtype).expand(len(found), 1, -1)], dim=1)


class AbstractorLayer(nn.Module):
    """Attention of queries to features and to themselves, then a gated feed-forward."""

    def __init__(self, spec: Abstractor, d_in: int) -> None:
        super().__init__()
        width = spec.hidden_size
        self.heads = spec.heads
        self.features = nn.Linear(d_in, width) if d_in != width else nn.Identity()
        self.norm_queries = nn.LayerNorm(width)
        self.norm_keys = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, spec.intermediate_size)
        self.up = nn.Linear(width, spec.intermediate_size)
        self.inner_norm = nn.LayerNorm(spec.intermediate_size)
        self.down = nn.Linear(spec.intermediate_size, width)

    def forward(self, features: Float[Tensor, "N P Dv"], queries: Float[Tensor, "N Q D"]) -> Float[Tensor, "N Q D"]:
        normed = self.norm_queries(queries)
        keys = self.norm_keys(torch.cat([self.features(features), normed], dim=1))
        queries = queries + self.out(attend(self.query(normed), self.key(keys), self.value(keys), self.heads))
        x = self.norm(queries)
        return queries + self.down(self.inner_norm(F.silu(self.gate(x)) * self.up(x)))
