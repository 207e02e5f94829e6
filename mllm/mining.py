"""Connectors that look at several towers at once: a grid of queries, each at its own window of every tower's features."""

from __future__ import annotations

import math
from collections.abc import Sequence
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

    `windows` are the sides of these windows, one a tower. A layer joins each query with the mean of the first tower's features,
    attends all its windows in one softmax, and has an MLP (`vision_sampler.py` of the released code). Two matrices follow,
    and one learned token ends each row of queries. Towers of another grid are resized behind their own matrices.
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
    """`SVA`. With `shows_cells` what the queries looked at comes with the tokens: the means and each tower's cells."""

    def __init__(self, spec: SVA, d_in: tuple[int, ...], d_out: int) -> None:
        super().__init__()
        width = spec.hidden_size
        self.side, self.windows = spec.side, spec.windows
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(d, width), nn.GELU(), nn.Linear(width, width), nn.LayerNorm(width)) for d in d_in
        )
        self.query = nn.Parameter(torch.randn(width) / math.sqrt(width))
        self.layers = nn.ModuleList(CellAttention(width, spec) for _ in range(spec.layers))
        self.project = nn.Sequential(nn.Linear(width, d_out), nn.GELU(), nn.Linear(d_out, d_out))
        self.newline = nn.Parameter(torch.randn(d_out) / math.sqrt(d_out))
        self.shows_cells = False

    def forward(self, features: tuple[Float[Tensor, "N _ _"], ...]) -> Float[Tensor, "N Q D"] | tuple[Tensor, ...]:
        projected = [tower(x) for tower, x in zip(self.towers, features, strict=True)]
        means = projected[0].mean(1)
        cells = [windows(x, self.side, w) for x, w in zip(projected, self.windows, strict=True)]
        queries = self.query.to(means.dtype).expand(len(means), self.side**2, -1)
        for layer in self.layers:
            queries = layer(queries, means, cells)
        rows = self.project(queries).unflatten(1, (self.side, self.side))
        ends = self.newline.to(rows.dtype).expand(len(rows), self.side, 1, -1)
        tokens = torch.cat([rows, ends], dim=2).flatten(1, 2).clone()
        return (tokens, means, *(x.clone() for x in cells)) if self.shows_cells else tokens


class CellAttention(nn.Module):
    """Queries of `width`, each at its cell of every tower: one softmax over all, keys and values each tower's own.

    What is found is added to a query that was joined with the mean of a tile, as wide as the cells, and enters through an MLP
    beside the query itself. Windows of more than one feature have learned positions.
    """

    def __init__(self, width: int, spec: SVA) -> None:
        super().__init__()
        inner = spec.hidden_size
        self.heads = spec.heads
        self.context = nn.Linear(inner, inner, bias=False)
        self.join = nn.Linear(width + inner, inner, bias=False)
        self.query = _normed(inner)
        self.places = nn.ParameterDict(
            {str(n): nn.Parameter(torch.randn(w * w, inner) * 0.02) for n, w in enumerate(spec.windows) if w > 1}
        )
        self.keys = nn.ModuleList(_normed(inner) for _ in spec.windows)
        self.values = nn.ModuleList(_normed(inner) for _ in spec.windows)
        self.out = nn.Linear(inner, inner, bias=False)
        self.norm = nn.LayerNorm(inner)
        self.mlp = nn.Sequential(nn.Linear(inner, inner, bias=False), nn.GELU(), nn.Linear(inner, width, bias=False))

    def forward(
        self, queries: Float[Tensor, "N Q D"], means: Float[Tensor, "N E"], cells: Sequence[Float[Tensor, "N Q _ E"]]
    ) -> Float[Tensor, "N Q D"]:
        context = self.context(means).unsqueeze(1).expand(-1, queries.shape[1], -1)
        joined = self.join(torch.cat([queries, context], dim=2))
        placed = [x + self.places[str(n)].to(x.dtype) if str(n) in self.places else x for n, x in enumerate(cells)]
        keys = torch.cat([key(x) for key, x in zip(self.keys, placed, strict=True)], dim=2)
        values = torch.cat([value(x) for value, x in zip(self.values, placed, strict=True)], dim=2)
        found = joined + self.out(windowed(self.query(joined).unsqueeze(2), keys, values, self.heads))
        return queries + self.mlp(self.norm(found))


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
