"""Grids of visual features: squares gathered into channels, positions, and how tiles become one run of tokens.

Shape letters: N tiles (or slices), P = R x C features of one in row-major order, D their width, V visual tokens.

A join is arithmetic on indices: each function says which rows of (tiles' tokens, then marks) stand where, as int64 numbers, so
that joining is one gather, and what it needs to know of a picture are whole numbers from its cut.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

Places = NDArray[np.int64]


def side_of(features: int) -> int:
    """Side of a square of `features`. Raises ValueError when they are none."""
    side = math.isqrt(features)
    if side * side != features:
        raise ValueError(
            f"{features} features are no square grid; take an encoder that drops its CLS token, or a connector without a grid"
        )
    return side


def space_to_depth(features: Float[Tensor, "N P D"], factor: int = 2) -> Float[Tensor, "N Q E"]:
    """Each square of `factor` x `factor` features as one, `factor`² times as wide: the inverse of the pixel shuffle.

    An odd grid is filled up with zeros at its right and bottom (VILA-1.5's `flat_square`). Within a square features come row by
    row. Raises ValueError for a grid that is no square.
    """
    side = side_of(features.shape[1])
    more = -side % factor
    grid = F.pad(features.unflatten(1, (side, side)), (0, 0, 0, more, 0, more))
    squares = grid.unflatten(2, (-1, factor)).unflatten(1, (-1, factor)).transpose(2, 3)
    return squares.flatten(3).flatten(1, 2)


def pooled(features: Float[Tensor, "N P D"], stride: int) -> Float[Tensor, "N Q D"]:
    """Means of squares of `stride` x `stride` features; a margin that fills no square is left away."""
    side = side_of(features.shape[1])
    grid = features.transpose(1, 2).unflatten(2, (side, side))
    return F.avg_pool2d(grid, stride).flatten(2).transpose(1, 2)


def interpolated_positions(table: Float[Tensor, "P D"], grid: tuple[int, int]) -> Float[Tensor, "Q D"]:
    """A square table of learned positions stretched to `grid` rows and columns, bicubic, in float32 (arXiv:2010.11929, 3.2)."""
    side = side_of(len(table))
    if grid == (side, side):
        return table
    square = table.float().T.unflatten(1, (side, side)).unsqueeze(0)
    stretched = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return stretched.squeeze(0).flatten(1).T.to(table.dtype)


def sincos_2d(width: int, rows: int, cols: int, device: torch.device | str | None = None) -> Float[Tensor, "P D"]:
    """Fixed positions of a grid, float32: the first half of the channels tells the column, the other the row.

    Each is sine and cosine of the place times 10,000 ** -(2 i / half) (MAE's `get_2d_sincos_pos_embed`, whose first half goes
    by the column; used by Qwen-VL and MiniCPM-V). Raises ValueError when `width` is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"positions of rows and columns need a width that 4 divides, and it is {width}")
    rates = 10_000.0 ** -(torch.arange(width // 4, device=device, dtype=torch.float32) / (width / 4))

    def line(length: int) -> Tensor:
        angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    across = line(cols).expand(rows, cols, width // 2)
    down = line(rows)[:, None].expand(rows, cols, width // 2)
    return torch.cat([across, down], dim=2).flatten(0, 1)


def joined_scales(features: Float[Tensor, "N P D"], scales: Sequence[int]) -> Float[Tensor, "I P E"]:
    """S2 (arXiv:2403.13043, 3): the tiles of each scale put together, pooled to one tile's grid, joined over channels.

    Tiles come picture by picture, scale by scale, row by row; a rest that is no whole picture is left away.
    """
    each = sum(scale * scale for scale in scales)
    side = side_of(features.shape[1])
    pictures = features[: len(features) // each * each].unflatten(0, (-1, each))
    found, first = [], 0
    for scale in scales:
        tiles = pictures[:, first : first + scale * scale]
        whole = (
            tiles.unflatten(2, (side, side)).unflatten(1, (scale, scale)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        )
        small = F.interpolate(whole.movedim(3, 1), size=(side, side), mode="area") if scale > 1 else whole.movedim(3, 1)
        found.append(small.flatten(2).transpose(1, 2))
        first += scale * scale
    return torch.cat(found, dim=2)


@dataclass(frozen=True, slots=True)
class Marks:
    """Where each mark's row lies; -1 where there is none."""

    open: int = -1
    close: int = -1
    slice_open: int = -1
    slice_close: int = -1
    group_open: int = -1
    group_close: int = -1
    column: int = -1
    row: int = -1


def _row(mark: int) -> list[Places]:
    return [] if mark < 0 else [np.array([mark])]


def around(marks: Marks, places: Places) -> Places:
    """A picture's run between its marks."""
    return np.concatenate([*_row(marks.open), places, *_row(marks.close)])


def tiles_places(first: int, tiles: int, each: int) -> Places:
    """Tiles one after the other; `first` is the picture's first token."""
    return np.arange(first, first + tiles * each)


def unpad_places(first: int, side: int, rows: int, cols: int, kept: tuple[int, int, int, int], newline: int) -> Places:
    """The overview, then the canvas of `rows` x `cols` tiles of `side` x `side` features row by row, `newline` after each.

    `kept` are top, left, rows and columns of the features that show the picture (LLaVA-NeXT, `llava_arch.py`).
    """
    top, left, high, wide = kept
    overview = side * side
    tiles = np.arange(rows * cols * overview).reshape(rows, cols, side, side) + first + overview
    canvas = tiles.transpose(0, 2, 1, 3).reshape(rows * side, cols * side)[top : top + high, left : left + wide]
    lines = np.concatenate([canvas, np.full((high, 1), newline)], axis=1)
    return np.concatenate([np.arange(first, first + overview), lines.reshape(-1)])


def slices_places(first: int, each: int, rows: int, cols: int, overview: bool, marks: Marks) -> Places:
    """The overview, then a group of slices row by row, with marks around each and between (MiniCPM-V, LLaVA-UHD)."""
    found: list[Places] = []

    def one(number: int) -> list[Places]:
        start = first + number * each
        return [*_row(marks.slice_open), np.arange(start, start + each), *_row(marks.slice_close)]

    grouped = rows * cols > 1
    if overview:
        found += one(0)
    found += _row(marks.group_open) if grouped else []
    for row in range(rows):
        found += _row(marks.row) if row else []
        for col in range(cols):
            found += _row(marks.column) if col else []
            found += one(int(overview) + row * cols + col)
    found += _row(marks.group_close) if grouped else []
    return np.concatenate(found)
