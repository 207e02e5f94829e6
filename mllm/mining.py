"""Connectors that look at several towers at once: a grid of queries, each at its own window of every tower's features."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ops.visual import side_of
from pipelines.types import spec


def windows(features: Float[Tensor, "N P D"], side: int, window: int) -> Float[Tensor, "N Q W D"]:
    """The features that each cell of a `side` x `side` grid looks at: squares of `window` x `window`, row by row.

    A grid of another size is resized, bilinear (Cambrian-1, `cambrian_arch.py`).
    """
    found, wanted = side_of(features.shape[1]), side * window
    grid = features.transpose(1, 2).unflatten(2, (found, found))
    if found != wanted:
        grid = F.interpolate(grid.float(), size=(wanted, wanted), mode="bilinear", align_corners=False).to(
            features.dtype
        )
    cells = grid.unflatten(3, (side, window)).unflatten(2, (side, window))  # N D side window side window
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


@spec
class SVA:
    """Cambrian-1's spatial vision aggregator (arXiv:2406.16860, 3.2): `side`² queries, each at its window of every tower.

    `windows` are the sides of these windows, one a tower; a layer joins each query with the mean of all towers, attends all its
    windows in one softmax, and has an MLP. Two matrices follow, and one learned token ends each row of queries.
    """

    kind: Literal["sva"] = "sva"
    windows: tuple[int, ...] = (1, 1, 1, 4)
    side: int = 24
    hidden_size: int = 1024
    layers: int = 3
    heads: int = 16

    def tokens(self, patches: tuple[int, ...]) -> int:
        """Visual tokens of a tile. Raises ValueError when there are not as many towers as windows."""
        if len(patches) != len(self.windows):
            raise ValueError(f"sva: {len(patches)} towers and {len(self.windows)} windows; give each tower its window")
        return self.side * (self.side + 1)

    def tiny(self) -> Self:
        return replace(self, side=4, hidden_size=32, layers=2, heads=4, windows=tuple(min(w, 2) for w in self.windows))

    def build(self, d_in: tuple[int, ...], d_out: int) -> nn.Module:
        return Aggregator(self, d_in, d_out)


class Aggregator(nn.Module):
    """`SVA`."""

    def __init__(self, spec: SVA, d_in: tuple[int, ...], d_out: int) -> None:
        super().__init__()
        width = spec.hidden_size
        self.side, self.windows = spec.side, spec.windows
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(d, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width)) for d in d_in
        )
        self.query = nn.Parameter(torch.randn(width) / math.sqrt(width))
        self.layers = nn.ModuleList(AggregatorLayer(spec) for _ in range(spec.layers))
        self.project = nn.Sequential(nn.Linear(width, d_out), nn.GELU(), nn.Linear(d_out, d_out))
        self.newline = nn.Parameter(torch.randn(d_out) / math.sqrt(d_out))

    def forward(self, features: tuple[Float[Tensor, "N _ _"], ...]) -> Float[Tensor, "N Q D"]:
        projected = [tower(x) for tower, x in zip(self.towers, features, strict=True)]
        means = torch.stack([x.mean(1) for x in projected]).mean(0)
        cells = [windows(x, self.side, w) for x, w in zip(projected, self.windows, strict=True)]
        queries = self.query.to(means.dtype).expand(len(means), self.side**2, -1)
        for layer in self.layers:
            queries = layer(queries, means, cells)
        rows = self.project(queries).unflatten(1, (self.side, self.side))
        ends = self.newline.to(rows.dtype).expand(len(rows), self.side, 1, -1)
        return torch.cat([rows, ends], dim=2).flatten(1, 2).clone()


class AggregatorLayer(nn.Module):
    """One softmax over the windows of all towers, whose keys and values each tower has for itself."""

    def __init__(self, spec: SVA) -> None:
        super().__init__()
        width = spec.hidden_size
        self.heads = spec.heads
        self.join = nn.Linear(2 * width, width, bias=False)
        self.norm_queries = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.places = nn.ParameterList(nn.Parameter(torch.randn(w * w, width) * 0.02) for w in spec.windows)
        self.keys = nn.ModuleList(_normed(width) for _ in spec.windows)
        self.values = nn.ModuleList(_normed(width) for _ in spec.windows)
        self.out = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width, bias=False), nn.GELU(), nn.Linear(width, width, bias=False))

    def forward(
        self, queries: Float[Tensor, "N Q D"], means: Float[Tensor, "N D"], cells: list[Tensor]
    ) -> Float[Tensor, "N Q D"]:
        joined = self.join(torch.cat([queries, means.unsqueeze(1).expand_as(queries)], dim=2))
        placed = [x + place.to(x.dtype) for x, place in zip(cells, self.places, strict=True)]
        keys = torch.cat([key(x) for key, x in zip(self.keys, placed, strict=True)], dim=2)
        values = torch.cat([value(x) for value, x in zip(self.values, placed, strict=True)], dim=2)
        q = self.query(self.norm_queries(joined)).unsqueeze(2)
        found = windowed(q, keys, values, self.heads)
        x = queries + self.out(found)
        return x + self.mlp(self.norm(x))


def _normed(width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))


def windowed(
    q: Float[Tensor, "N Q 1 D"], k: Float[Tensor, "N Q W D"], v: Float[Tensor, "N Q W D"], heads: int
) -> Float[Tensor, "N Q D"]:
    """Attention of each query to its own window, in `heads` heads."""
    tiles, queries = q.shape[:2]
    q, k, v = (x.flatten(0, 1).unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    found = F.scaled_dot_product_attention(q, k, v)  # N*Q heads 1 E
    return found.transpose(1, 2).flatten(1).unflatten(0, (tiles, queries))


@spec
class PatchMining:
    """Mini-Gemini's patch info mining (arXiv:2403.18814, 3.2): each feature of the first tower looks at its window of the second.

    What it finds there is added to it, and an MLP of `depth` matrices follows.
    """

    kind: Literal["patch_mining"] = "patch_mining"
    window: int = 4
    depth: int = 2

    def tokens(self, patches: tuple[int, ...]) -> int:
        """Visual tokens of a tile: the first tower's. Raises ValueError when there are not two towers."""
        if len(patches) != 2:
            raise ValueError(
                f"patch_mining: looks from one tower to another, and there are {len(patches)}; give it two"
            )
        return side_of(patches[0]) ** 2

    def tiny(self) -> Self:
        return replace(self, window=2)

    def build(self, d_in: tuple[int, ...], d_out: int) -> nn.Module:
        return Miner(self, d_in, d_out)


class Miner(nn.Module):
    """`PatchMining`."""

    def __init__(self, spec: PatchMining, d_in: tuple[int, ...], d_out: int) -> None:
        super().__init__()
        low, high = d_in
        self.window = spec.window
        self.query = nn.Sequential(nn.LayerNorm(low), nn.Linear(low, low))
        self.key = nn.Sequential(nn.LayerNorm(high), nn.Linear(high, low))
        self.value = nn.Sequential(nn.LayerNorm(high), nn.Linear(high, low))
        first = [nn.Linear(low, d_out)]
        self.layers = nn.ModuleList([*first, *(nn.Linear(d_out, d_out) for _ in range(spec.depth - 1))])

    def forward(self, features: tuple[Float[Tensor, "N _ _"], ...]) -> Float[Tensor, "N P D"]:
        low, high = features
        cells = windows(high, side_of(low.shape[1]), self.window)
        x = low + windowed(self.query(low).unsqueeze(2), self.key(cells), self.value(cells), 1)
        first, *rest = self.layers
        x = first(x)
        for layer in rest:
            x = layer(F.gelu(x))
        return x.clone()
