"""How the tokens of a picture's tiles become its run in the sequence; each is the model's half of a tiling's `join`.

A join owns the embeddings of newlines and separators. It counts as `VisionLayout.tokens` does, and lays down exactly that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mllm.towers import Grid
from ops.visual import Marks, Places, around, joined_scales, slices_places, tiles_places, unpad_places
from pipelines.types import Cut, Separators, spec


@spec
class Join:
    """What all joins say: the marks that they lay, and how many newlines they own."""

    separators: Separators = Separators()

    @property
    def newlines(self) -> int:
        return 0


@spec
class OneScale(Join):
    """A join of tiles of one scale."""

    @property
    def scales(self) -> tuple[int, ...]:
        """Scales whose features are joined over channels."""
        return (1,)


@spec
class Tiles(OneScale):
    """Tiles one after the other (InternVL, and whatever has one tile a picture)."""

    kind: Literal["tiles"] = "tiles"


@spec
class Unpad(OneScale):
    """The overview, then the grid without its padding and a learned newline after each row (LLaVA-NeXT's `spatial_unpad`)."""

    kind: Literal["unpad"] = "unpad"

    @property
    def newlines(self) -> int:
        return 1


@spec
class Scales(Join):
    """S2 (arXiv:2403.13043): features of all scales on the first one's grid, joined over channels before the connector."""

    kind: Literal["scales"] = "scales"
    scales: tuple[int, ...] = (1, 2)


@spec
class Slices(OneScale):
    """Slices of the picture's own shape with separators that tell where they lay (LLaVA-UHD, MiniCPM-V)."""

    kind: Literal["slices"] = "slices"


Joining = Annotated[Tiles | Unpad | Scales | Slices, Field(discriminator="kind")]


def cuts_of(numbers: Sequence[Sequence[int]], row: Sequence[int]) -> list[Cut]:
    """Pictures as a batch's `cuts` has them; `row` is the shape of one row of its `tiles`."""
    patch = math.isqrt(row[0] // 3) if len(row) == 1 else None
    found = []
    for _, _, rows, cols, overview, height, width, *canvases in numbers:
        whole, beside = tuple(canvases[:2]), tuple(canvases[2:])
        found.append(
            Cut(
                height=height,
                width=width,
                rows=rows,
                cols=cols,
                canvas=(whole[0], whole[1]),
                overview=(beside[0], beside[1]) if overview else None,
                patch=patch,
            )
        )
    return found


def slice_grids(cuts: Sequence[Cut]) -> list[Grid]:
    """Rows and columns of patches of each slice of the pictures, overviews first; one lone patch where there is none."""
    found: list[Grid] = []
    for cut in cuts:
        patch = cut.patch or 1
        if cut.overview is not None:
            found.append((cut.overview[0] // patch, cut.overview[1] // patch))
        found += [(cut.canvas[0] // cut.rows // patch, cut.canvas[1] // cut.cols // patch)] * (cut.rows * cut.cols)
    return found or [(1, 1)]


class Joined(nn.Module):
    """Tokens of tiles, `each` a tile, and pictures' cuts -> visual tokens (V, D), each picture's run where its positions are.

    Without pictures all there is comes back, for the fusion to add times zero: every mark has its gradient on every rank.
    """

    def __init__(self, spec: Joining, width: int) -> None:
        super().__init__()
        self.spec = spec
        counts = spec.separators
        names = [
            *(["open", "close"] if counts.picture else []),
            *(["slice_open", "slice_close"] if counts.slice else []),
            *(["group_open", "group_close"] if counts.group else []),
            *(["column"] if counts.column else []),
            *(["row"] if counts.row or spec.newlines else []),
        ]
        for name, count, full in (
            ("picture", counts.picture, 2),
            ("slice", counts.slice, 2),
            ("group", counts.group, 2),
            ("column", counts.column, 1),
            ("row", counts.row, 1),
        ):
            if count not in (0, full):
                raise ValueError(f"separators.{name}={count}; this model lays {full} there, or none")
        self.names = tuple(names)
        self.marks = nn.Parameter(torch.randn(len(names), width) / width**0.5) if names else None

    @property
    def trivial(self) -> bool:
        """Whether tokens already lie as they come."""
        return self.marks is None and self.spec.kind in ("tiles", "scales")

    def forward(self, visual: Float[Tensor, "K D"], each: int, cuts: Sequence[Cut]) -> Float[Tensor, "V D"]:
        everything = visual if self.marks is None else torch.cat([visual, self.marks.to(visual.dtype)])
        if not cuts:
            return everything
        places = torch.from_numpy(self.places(cuts, each, len(visual)))
        return everything.index_select(0, places.to(visual.device, non_blocking=True))

    def places(self, cuts: Sequence[Cut], each: int, marks_at: int) -> Places:
        """Which row stands at each visual position, tiles having `each`; marks lie from `marks_at` on."""
        marks = Marks(**{name: marks_at + number for number, name in enumerate(self.names)})
        found, first = [], 0
        for cut in cuts:
            run, tiles = self._run(cut, first, each, marks)
            found.append(around(marks, run))
            first += tiles * each
        return np.concatenate(found)

    def _run(self, cut: Cut, first: int, each: int, marks: Marks) -> tuple[Places, int]:
        """A picture's places between its marks, and how many tiles it had."""
        grid = cut.rows * cut.cols
        match self.spec.kind:
            case "slices":
                tiles = grid + (cut.overview is not None)
                run = slices_places(first, each, cut.rows, cut.cols, cut.overview is not None, marks)
            case "unpad" if cut.overview is not None:
                side = int(each**0.5)
                tiles = grid + 1
                run = unpad_places(first, side, cut.rows, cut.cols, cut.unpadded(side), marks.row)
            case "scales":
                tiles, run = 1, tiles_places(first, 1, each)
            case _:
                tiles = grid + (cut.overview is not None)
                run = tiles_places(first, tiles, each)
        return run, tiles


def with_scales(features: Float[Tensor, "N P D"], scales: Sequence[int]) -> Float[Tensor, "I P E"]:
    """`joined_scales`; a batch without pictures has one blank tile, which then stands for all of one picture's."""
    each = sum(scale * scale for scale in scales)
    if len(features) < each:
        features = features[:1].expand(each, -1, -1)
    return joined_scales(features, scales)
