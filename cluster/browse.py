"""A page that shows rows of a corpus as a person would read them; no recipe, no tokenizer, no model.

    rows drawn at random  ->  read and decoded as training would  ->  text by role, pictures, frames, boxes  ->  preview.html

What is shown is what a `Document` holds: the text that is learned is marked, and a row that training would drop says why.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from rich.console import Console

from cluster.datacheck import manifest_of
from cluster.report import render_page
from cluster.rows import draw, in_order
from cluster.site import Site
from pipelines import pictures
from pipelines.corpora import Corpus
from pipelines.manifest import Manifest
from pipelines.place import Place
from pipelines.tiling import Native
from pipelines.types import (
    Chunk,
    Codes,
    Document,
    Image,
    Limits,
    Measured,
    Picture,
    Region,
    Rejected,
    RowId,
    SkipSample,
    Text,
    Video,
    spec,
)

THUMBNAILS = Native(size=1, patch=1, merge=1, min_pixels=1, max_pixels=320 * 240)
"""Patches of one pixel: a picture small enough for a page, decoded and cut by the very code of training."""

FRAMES = Native(size=1, patch=1, merge=1, min_pixels=1, max_pixels=160 * 120)
"""The same for frames of videos, of which there are many."""

NEIGHBOURS = 4
"""Rows that are drawn together: so many requests fewer, and enough places of the corpus seen."""

LONGEST = 6000
"""Characters of one run of text that are shown."""


@spec
class Words:
    """A run of text and whether it is learned; `more` are its characters that are not shown."""

    text: str
    learned: bool
    more: int = 0


@spec
class Shot:
    """A picture or a frame as a data URI, with its size as stored and the boxes on it."""

    image: str
    height: int
    width: int
    boxes: tuple[Region, ...] = ()
    frame: int | None = None


@spec
class Strip:
    """The frames of a video that training shows."""

    frames: tuple[Shot, ...]


Part = Words | Shot | Strip


@spec
class Turn:
    """Consecutive parts of one role; None outside conversations."""

    role: str | None
    parts: tuple[Part, ...]


@spec
class RowPage:
    """One row, ready to be read. A preference row has two `answers`, the preferred one first; `turns` are then its question."""

    row: RowId
    turns: tuple[Turn, ...]
    answers: tuple[Turn, ...] = ()
    label: int | None = None
    name: str = ""
    characters: int = 0
    pictures: int = 0
    videos: int = 0
    regions: tuple[Region, ...] = ()


def write_rows(corpus: Corpus, site: Site, console: Console, count: int, out: Path) -> Path:
    """Write about `count` rows of a corpus, drawn at random, to the page `out`, and return `out`."""
    manifest = manifest_of(corpus, site, console)
    drawn = draw(corpus, manifest, count, size=NEIGHBOURS)
    rows: list[RowPage | Rejected] = []
    for found in in_order(partial(_pages, corpus, manifest, site.limits), drawn, console, f"reading {corpus.name}"):
        rows += found
    bad = [row for row in rows if isinstance(row, Rejected)]
    page = render_page(
        "rows.html.j2",
        corpus=corpus,
        manifest=manifest,
        drawn=drawn,
        rows=[(row, isinstance(row, Rejected)) for row in rows],
        bad=bad,
        reasons=Counter(str(row.reason) for row in bad).most_common(),
    )
    Place(out).write(page.encode())
    return out


def _pages(corpus: Corpus, manifest: Manifest, limits: Limits, chunk: Chunk) -> list[RowPage | Rejected]:
    found: list[RowPage | Rejected] = []
    for row in corpus.read(manifest.shards[chunk.shard], chunk, limits):
        if isinstance(row, Rejected):
            found.append(row)
            continue
        try:
            found.append(read_row(row, limits, getattr(corpus, "classes", ())))
        except SkipSample as skip:
            found.append(Rejected(row=row.id, reason=skip.reason, detail=skip.detail))
    return found


def read_row(document: Document, limits: Limits | None = None, classes: Sequence[str] = ()) -> RowPage:
    """A document ready to be read. Raises SkipSample when training would drop it for a picture."""
    tiling = FRAMES if any(isinstance(segment, Video) for segment in document.segments) else THUMBNAILS
    measured = pictures.measure(document, tiling, limits)
    shots = _shots(measured, tiling, document.regions)
    turns = []
    for role, run in groupby(measured.segments, key=lambda segment: segment.role):
        turns.append(Turn(role=role, parts=tuple(_parts(list(run), shots))))
    answers: tuple[Turn, ...] = ()
    if document.rejected:
        other = Turn(role="assistant", parts=tuple(_words(text) for text in document.rejected))
        answers = (turns.pop(), other)
    texts = [segment.text for segment in (*document.segments, *document.rejected) if isinstance(segment, Text)]
    label = document.label
    return RowPage(
        row=document.id,
        turns=tuple(turns),
        answers=answers,
        label=label,
        name=classes[label] if label is not None and label < len(classes) else "",
        characters=sum(map(len, texts)),
        pictures=sum(isinstance(segment, Image) for segment in document.segments),
        videos=sum(isinstance(segment, Video) for segment in document.segments),
        regions=document.regions,
    )


def _shots(measured: Measured, tiling: Native, regions: Sequence[Region]) -> Iterator[Shot]:
    """The document's pictures and frames in order, all decoded. Raises SkipSample when one cannot be."""
    found = [segment for segment in measured.segments if isinstance(segment, Picture)]
    pixels = pictures.pixels(found, tiling)
    shots = []
    at = 0
    for number, picture in enumerate(found):
        cut = picture.cut
        image = pixels[at : at + cut.tiles].reshape(*cut.canvas, 3)
        at += cut.tiles
        boxes = tuple(region for region in regions if region.image == number)
        shots.append(Shot(image=jpeg(image), height=cut.height, width=cut.width, boxes=boxes, frame=picture.frame))
    return iter(shots)


def _parts(run: Sequence[Text | Picture | Codes], shots: Iterator[Shot]) -> Iterator[Part]:
    for of, group in groupby(run, key=lambda s: id(s.of) if isinstance(s, Picture) and s.frame is not None else None):
        group = list(group)
        if of is not None:
            yield Strip(frames=tuple(next(shots) for _ in group))
            continue
        for segment in group:
            match segment:
                case Text():
                    yield _words(segment)
                case Picture():
                    yield next(shots)
                case Codes():
                    yield Words(text=f"[{len(segment.ids):,} codes of a picture]", learned=segment.learn)


def _words(text: Text) -> Words:
    return Words(text=text.text[:LONGEST], learned=text.learn, more=max(0, len(text.text) - LONGEST))


def jpeg(pixels: NDArray[np.uint8]) -> str:
    """Pixels (h, w, 3) as a data URI."""
    buffer = io.BytesIO()
    PILImage.fromarray(np.ascontiguousarray(pixels)).save(buffer, "JPEG", quality=86)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
