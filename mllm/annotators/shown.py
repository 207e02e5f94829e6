"""The pictures of rows, as a model is asked about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby, islice
from typing import TypeVar

import torch
from torch import Tensor

from pipelines import pictures
from pipelines.annotate import Rows
from pipelines.tiling import Resize
from pipelines.types import Codes, Document, Image, Picture, Rejected, SkipSample, Text, Video

T = TypeVar("T")

AT_ONCE = 32
"""Pictures or tiles that a model sees together."""


Segment = Text | Image | Video | Codes
Shown = tuple[Document, int]
"""A row, and the place of the segment in it that a picture is of."""


def by_pictures(
    rows: Rows,
    places: Callable[[Document], Sequence[int]],
    tiling: Resize,
    ask: Callable[[list[Shown], Tensor], Sequence[T]],
    change: Callable[[Document, dict[int, list[T]]], Document | Rejected],
) -> Rows:
    """`rows`, each changed by what a model says of its pictures.

    `places` names the segments of a row that are shown; `ask` gets tiles uint8 (n, 3, S, S), `AT_ONCE` at most, and gives
    an answer for each; `change` gets a row and, by place, the answers to its pictures, of which a video has several. Rows
    without such segments pass; one with a picture that is broken, or beyond the usual `Limits`, is rejected. Headers
    are read first, and no more than `AT_ONCE` tiles are held: a window's pictures would not fit into memory.
    """
    asked: list[tuple[int, int, Picture]] = []
    broken: dict[int, SkipSample] = {}
    for n, row in enumerate(rows):
        if isinstance(row, Document):
            try:
                asked += [(n, place, picture) for place in places(row) for picture in measured(row, place, tiling)]
            except SkipSample as skip:
                broken[n] = skip
    answers: dict[int, dict[int, list[T]]] = {}
    for start in range(0, len(asked), AT_ONCE):
        tiles = tiles_of(asked[start : start + AT_ONCE], tiling, broken)
        if not tiles:
            continue
        shown: list[Shown] = []
        for (n, place), some in tiles.items():
            row = rows[n]
            assert isinstance(row, Document)  # only such were asked about
            shown += [(row, place)] * len(some)
        said = iter(ask(shown, torch.cat(list(tiles.values()))))
        for (n, place), some in tiles.items():
            answers.setdefault(n, {}).setdefault(place, []).extend(islice(said, len(some)))
    return [_changed(row, broken.get(n), answers.get(n), change) for n, row in enumerate(rows)]


def _changed(
    row: Document | Rejected,
    broken: SkipSample | None,
    answers: dict[int, list[T]] | None,
    change: Callable[[Document, dict[int, list[T]]], Document | Rejected],
) -> Document | Rejected:
    if isinstance(row, Rejected):
        return row
    if broken is not None:
        return Rejected(row=row.id, reason=broken.reason, detail=broken.detail)
    return row if answers is None else change(row, answers)


def measured(row: Document, place: int, tiling: Resize) -> list[Picture]:
    """The pictures of one segment: one, or a video's frames. Raises SkipSample."""
    alone = pictures.measure(replace(row, segments=(row.segments[place],)), tiling)
    return [picture for picture in alone.segments if isinstance(picture, Picture)]


def tiles_of(
    asked: Sequence[tuple[int, int, Picture]], tiling: Resize, broken: dict[int, SkipSample]
) -> dict[tuple[int, int], Tensor]:
    """Tiles uint8 (n, 3, S, S) by row and place; rows of which a picture is broken go to `broken`."""
    found: dict[tuple[int, int], Tensor] = {}
    for (n, place), some in groupby(asked, key=lambda one: one[:2]):
        if n in broken:
            continue
        try:
            found[n, place] = torch.from_numpy(pictures.pixels([picture for _, _, picture in some], tiling))
        except SkipSample as skip:
            broken[n] = skip
    return {(n, place): tiles for (n, place), tiles in found.items() if n not in broken}


def images_of(row: Document) -> list[int]:
    return [place for place, segment in enumerate(row.segments) if isinstance(segment, Image)]


def shown_of(row: Document) -> list[int]:
    return [place for place, segment in enumerate(row.segments) if isinstance(segment, (Image, Video))]


def pictures_with_text(row: Document) -> list[int]:
    return images_of(row) if any(isinstance(s, Text) and s.text.strip() for s in row.segments) else []


def text_of(row: Document, place: int) -> str:
    """The text that follows a picture, or the one before where none does; the row has some."""
    after = [s.text for s in row.segments[place + 1 :] if isinstance(s, Text) and s.text.strip()]
    before = [s.text for s in row.segments[:place] if isinstance(s, Text) and s.text.strip()]
    return (after[0] if after else before[-1]).strip()


def is_pair(row: Document) -> bool:
    return [type(segment) for segment in row.segments] == [Image, Text] and not row.rejected


def without(row: Document, places: set[int]) -> Document:
    """The row without some of its pictures; boxes go with theirs, and follow the others' new numbers."""
    left = [number for number, place in enumerate(images_of(row)) if place not in places]
    regions = [replace(region, image=left.index(region.image)) for region in row.regions if region.image in left]
    segments = [segment for place, segment in enumerate(row.segments) if place not in places]
    return replace(row, segments=tuple(segments), regions=tuple(regions))
