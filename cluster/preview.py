"""A page that shows packs as a person would read them: every document's words and tiles, and which tokens are learned.

    stream  ->  PackWindows(stream).packs(0), packs(1), ...  ->  preview.html

Made from the packs themselves, after tiling, encoding and packing: what the page shows is what the model gets.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, groupby, islice, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cluster.report import render_page
from mllm.annotators import ReferenceLogProbs
from pipelines.encode import TextCodec
from pipelines.objects import Objects
from pipelines.place import Place
from pipelines.tiling import AnyTiling, DynamicTiles
from pipelines.types import IMAGE_TOKEN, NOT_LEARNED, Cut, Pack, Rejected, RowId, spec
from pipelines.windows import PackWindows, Stream


@spec
class Words:
    """A run of text whose tokens are all learned, or all not. A `special` run is a token by its name."""

    text: str
    learned: bool
    special: bool = False


@spec
class Grid:
    """Tiles or slices of one view of a picture as data URIs, row by row, `columns` a row; `what` it is, where it needs saying."""

    columns: int
    tiles: tuple[str, ...]
    what: str = ""


@spec
class Picture:
    """One picture: the views that the model gets of it, the positions that it takes, its size before it was cut."""

    views: tuple[Grid, ...]
    tokens: int
    height: int
    width: int


@spec
class DocumentPage:
    """One document of a pack, ready to be read."""

    row: RowId
    source: int
    tokens: int
    learned: int
    runs: tuple[Words | Picture, ...]


@spec
class PackPage:
    """A pack, ready to be read."""

    window: int
    number: int
    of: int
    tokens: int
    tiles: int
    learned: int
    documents: tuple[DocumentPage, ...]
    dropped: tuple[Rejected, ...]


def write_preview(stream: Stream, count: int, out: Path) -> Path:
    """Write the first `count` packs of `stream` (fewer, where it ends before) to the page `out`, and return `out`."""
    # What answers are compared with is nothing to look at, and may not be there yet.
    shown = tuple(a for a in stream.annotators if not isinstance(a, ReferenceLogProbs))
    windows = PackWindows(replace(stream, annotators=shown))
    numbers = itertools.count() if stream.windows is None else range(stream.windows)
    reader = Reader(windows.encoder.codec, stream.tiling)
    packs = islice(chain.from_iterable(windows.packs(k) for k in numbers), count)
    pages = [reader.pack(pack) for pack in packs]
    page = render_page("preview.html.j2", stream=stream, packs=pages)
    Place(out).write(page.encode())
    return out


@dataclass(frozen=True)
class Reader:
    """Turns packs back into words and pictures."""

    codec: TextCodec
    tiling: AnyTiling

    @cached_property
    def special(self) -> dict[int, str]:
        """Tokens that no plain text spells, by their names."""
        return {
            i: token.content for i, token in self.codec.tokenizer.get_added_tokens_decoder().items() if token.special
        }

    def pack(self, pack: Pack) -> PackPage:
        pictures = _pictures(pack, self.tiling)
        documents = [
            self.document(
                row, int(source), pack.input_ids[start:stop], learned_tokens(pack.labels[start:stop]), pictures
            )
            for row, source, (start, stop) in zip(pack.ids, pack.sources, pairwise(pack.cu_seqlens), strict=True)
        ]
        return PackPage(
            window=pack.at.window,
            number=pack.at.pack,
            of=pack.of,
            tokens=len(pack.input_ids),
            tiles=len(pack.tiles),
            learned=pack.learned,
            documents=tuple(documents),
            dropped=pack.dropped,
        )

    def document(
        self,
        row: RowId,
        source: int,
        ids: NDArray[np.int32],
        learned: NDArray[np.bool_],
        pictures: Iterator[Picture],
    ) -> DocumentPage:
        """One document; takes its pictures from the pack's, which come in the same order as their positions."""
        runs: list[Words | Picture] = []
        tokens = list(zip(ids.tolist(), learned.tolist(), strict=True))
        for kind, run in groupby(tokens, key=lambda token: self._kind(token[0])):
            run = list(run)
            if kind == "visual":
                left = len(run)
                while left > 0:  # pictures without text between them
                    picture = next(pictures)
                    runs.append(picture)
                    left -= picture.tokens
            elif kind == "special":
                runs += [Words(text=self.special[token], learned=learn, special=True) for token, learn in run]
            else:
                runs += self._words(run)
        return DocumentPage(row=row, source=source, tokens=len(ids), learned=int(learned.sum()), runs=tuple(runs))

    def _kind(self, token: int) -> str:
        return "visual" if token == IMAGE_TOKEN else "special" if token in self.special else "text"

    def _words(self, run: Sequence[tuple[int, bool]]) -> Iterator[Words]:
        """Text of plain tokens, split where learning begins or ends.

        Each part is what the text grows by, since a token alone may be half a character, or lose the space before it.
        """
        ids: list[int] = []
        before = ""
        for learn, tokens in groupby(run, key=lambda token: token[1]):
            ids += [token for token, _ in tokens]
            text = self.codec.decode(ids)
            if len(ids) < len(run):
                text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # the rest of the character belongs to the next part
            yield Words(text=text[len(before) :], learned=learn)
            before = text


def learned_tokens(labels: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Which tokens of a document are learned: `labels[i]` is the token predicted at i, so it speaks of token i + 1."""
    return np.concatenate([[False], labels[:-1] != NOT_LEARNED])


def _pictures(pack: Pack, tiling: AnyTiling) -> Iterator[Picture]:
    found: list[Picture] = []
    at = 0
    for tiles, tokens, *numbers in pack.cuts.tolist():
        cut = cut_of(tiling, tiles, tuple(numbers))
        views = tuple(_views(pack.tiles[at : at + tiles], cut, tiling))
        if tokens:
            found.append(Picture(views=views, tokens=tokens, height=cut.height, width=cut.width))
        else:  # a frame that is read together with those before it
            found[-1] = replace(found[-1], views=(*found[-1].views, *views))
        at += tiles
    return iter(found)


def cut_of(tiling: AnyTiling, tiles: int, numbers: tuple[int, ...]) -> Cut:
    """How a picture was cut, from its row of a pack's `cuts`: the numbers of `Cut.numbers`.

    A pack does not say how many tiles a picture was allowed, so each limit is tried; those that give the same grid cut alike.
    Raises ValueError when none does: the pack was made with another tiling.
    """
    if isinstance(tiling, Objects) and numbers[0] == tiles:
        return tiling.counted(tiles)
    height, width = numbers[3:5]
    most = getattr(tiling, "max_tiles", 1)
    tries = chain(
        (tiling.cut(height, width),),
        (tiling.cut(height, width, limit=limit) for limit in range(most, 0, -1)),
        (tiling.cut(height, width, single=True),),
    )
    found = next((cut for cut in tries if cut.numbers == numbers and cut.tiles == tiles), None)
    if found is None:
        raise ValueError(
            f"a picture of {width} x {height} came as {tiles} tiles in a grid of {numbers[0]} x {numbers[1]}, and {tiling} never "
            "cuts it so; preview a pack with the tiling that made it"
        )
    return found


def _views(tiles: NDArray[np.uint8], cut: Cut, tiling: AnyTiling) -> Iterator[Grid]:
    """The views of one picture in the order in which the model gets them."""
    if isinstance(tiling, Objects):
        yield _grid([_outlines(tiling.boxes(tiles))], 1, f"{len(tiles)} regions, the surest in black")
        return
    if cut.scales:
        at = 0
        for scale in cut.scales:
            yield _grid(tiles[at : at + scale * scale], scale, f"scale {scale}")
            at += scale * scale
        return
    if cut.patch is not None:
        yield from _slices(tiles, cut, cut.patch)
        return
    if cut.overview is None:
        yield _grid(tiles, cut.cols, "")
    elif isinstance(tiling, DynamicTiles):
        yield _grid(tiles[:-1], cut.cols, f"{cut.rows} x {cut.cols} tiles")
        yield _grid(tiles[-1:], 1, "thumbnail")
    else:
        yield _grid(tiles[:1], 1, "overview")
        yield _grid(tiles[1:], cut.cols, f"{cut.rows} x {cut.cols} tiles")


def _outlines(boxes: NDArray[np.float32], side: int = 256) -> NDArray[np.uint8]:
    """Boxes in shares of the sides drawn on white, uint8 (3, side, side): the first in black, each after it paler."""
    canvas = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(canvas)
    for place, box in reversed([*enumerate((boxes * (side - 1)).tolist())]):
        draw.rectangle(box, outline=(224 * place // len(boxes),) * 3)
    return np.asarray(canvas).transpose(2, 0, 1)


def _slices(patches: NDArray[np.uint8], cut: Cut, patch: int) -> Iterator[Grid]:
    """Patches (n, 3 * patch * patch) put together again: the overview first, then each slice."""
    at = 0
    if cut.overview is not None:
        at = cut.overview[0] * cut.overview[1] // patch**2
        yield _grid([_whole(patches[:at], cut.overview, patch)], 1, "overview")
    size = cut.canvas[0] // cut.rows, cut.canvas[1] // cut.cols
    each = size[0] * size[1] // patch**2
    slices = [_whole(patches[first : first + each], size, patch) for first in range(at, len(patches), each)]
    what = (
        f"{cut.rows} x {cut.cols} slices of {size[1]} x {size[0]}" if len(slices) > 1 else f"as {size[1]} x {size[0]}"
    )
    yield _grid(slices, cut.cols, what)


def _whole(patches: NDArray[np.uint8], size: tuple[int, int], patch: int) -> NDArray[np.uint8]:
    """Pixels (3, *size) of one slice, whose patches come row by row with channels first inside."""
    rows, cols = size[0] // patch, size[1] // patch
    return patches.reshape(rows, cols, 3, patch, patch).transpose(2, 0, 3, 1, 4).reshape(3, *size)


def _grid(tiles: Sequence[NDArray[np.uint8]] | NDArray[np.uint8], columns: int, what: str) -> Grid:
    return Grid(columns=columns, tiles=tuple(_png(tile) for tile in tiles), what=what)


def _png(tile: NDArray[np.uint8]) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(tile.transpose(1, 2, 0))).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
