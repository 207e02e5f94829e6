"""The named types that data wears on its way from a shard to the model.

Shape letters: T tokens of a pack, S documents in it, N tiles, I images, H x W pixels of a tile.

>>> RowId(corpus="pairs", shard="00000.tar", epoch=0, row=7).label()
'pairs/00000.tar row 7'
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Self, TypeVar, dataclass_transform

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def spec(cls: type[T]) -> type[T]:
    """A frozen value with keyword fields: the one form of every configuration and every record here.

    Read from JSON, it refuses fields that it does not have.
    """
    cls.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]  # pydantic's own word for a dataclass
    return dataclass(frozen=True, kw_only=True, slots=True)(cls)


IMAGE_TOKEN = -200
"""Stands in `input_ids` where a visual feature goes. Outside every vocabulary, so no text can ever spell it (LLaVA)."""

NOT_LEARNED = -100
"""The label of a position that carries no loss (torch's `ignore_index`)."""

Role = Literal["system", "user", "assistant"]


class Reason(StrEnum):
    """Why a row was dropped. The words are what a person reads in `mllm status` and in the report."""

    BAD_JSON = "not valid JSON"
    BAD_UTF8 = "text is not UTF-8"
    MISSING_FIELD = "a field is missing"
    EMPTY = "empty document"
    MISSING_IMAGE = "image is missing"
    IMAGE_INDEX = "image index out of range"
    LITERAL_IMAGE = "text holds a literal <image>"
    NOT_AN_IMAGE = "file is not an image"
    TRUNCATED_IMAGE = "image file is truncated"
    HUGE_IMAGE = "image has too many pixels"
    TRUNCATED_SHARD = "shard ends inside the row"
    IMAGE_TOO_LONG = "one image exceeds the pack's budget"
    NOTHING_TO_LEARN = "no token carries loss"
    NOT_A_VIDEO = "file is not a video"
    HUGE_FILE = "file has too many bytes"
    EXTREME_RATIO = "image is far longer than wide"
    TEXT_TOO_LONG = "text is too long"
    DEEP_JSON = "JSON is nested too deep"
    UNSAFE_PATH = "path leads out of the corpus"
    REMOTE_IMAGE = "image is an address on the web"
    FILTERED = "left out by a filter"
    TOO_MANY_PICTURES = "too many pictures"
    DAMAGED_SHARD = "shard is damaged here"
    DUPLICATE = "page may be a duplicate"
    BAD_BOX = "box is not inside the picture"
    SAME_ANSWERS = "both answers are the same"


class SkipSample(Exception):
    """Raised by any hop when a row cannot be used; caught once, in `windows.py`, where it becomes a `Rejected`."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason
        self.detail = detail


@spec
class Limits:
    """What one row may ask of a machine; a row beyond is dropped with its reason. A site may set its own.

    `pixels` of a picture, `ratio` of its longer to its shorter side, `bytes` of a file, `characters` of a row's text,
    `depth` of nested JSON, `pictures` of a row.
    """

    pixels: int = 100_000_000
    ratio: float = 100.0
    bytes: int = 2**28
    characters: int = 2_000_000
    depth: int = 64
    pictures: int = 1_000


@spec
class RowId:
    """Where a sample came from: the row of a shard, on which pass over it, and which piece of a long document."""

    corpus: str
    shard: str
    epoch: int
    row: int
    piece: int = 0

    def label(self) -> str:
        piece = f" piece {self.piece}" if self.piece else ""
        return f"{self.corpus}/{self.shard} row {self.row}{piece}"


@spec
class Rejected:
    """A row that was dropped, and why."""

    row: RowId
    reason: Reason
    detail: str = ""

    def label(self) -> str:
        return f"{self.row.label()}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@spec
class Chunk:
    """Consecutive rows `[start, stop)` of one shard: what is read with one range request."""

    source: int
    shard: int
    epoch: int
    start: int
    stop: int


@spec
class Window:
    """The k-th window of a mixture: the rows that are shuffled and packed together."""

    k: int
    chunks: tuple[Chunk, ...]

    @property
    def rows(self) -> int:
        return sum(chunk.stop - chunk.start for chunk in self.chunks)


@spec
class Position:
    """The data's cursor: the next pack to be trained on is number `pack` of window `window`. Two integers, no more."""

    window: int = 0
    pack: int = 0


@spec
class Text:
    """A run of text. `role` is None outside conversations; `learn` says whether its tokens carry loss."""

    text: str
    role: Role | None = None
    learn: bool = True


@spec
class Image:
    """An image as stored: its encoded bytes."""

    data: bytes
    role: Role | None = None


@spec
class Frames:
    """Which frames of a video are shown: `count` of them, evenly spread; or, with `fps`, that many a second, at most `count`."""

    count: int = 8
    fps: float | None = None


@spec
class Video:
    """A video as stored: the encoded file, or its frames as encoded images in order; and which of them are shown."""

    data: bytes | tuple[bytes, ...]
    frames: Frames = Frames()
    role: Role | None = None


@spec
class Region:
    """A box in picture number `image` of its document, in shares of its sides from the top left: x0 <= x1, y0 <= y1.

    `label` is what it shows.
    """

    image: int
    box: tuple[float, float, float, float]
    label: str = ""


@spec
class Document:
    """One row, read: text, images and videos in reading order.

    `rejected` is the answer that was not preferred (a preference row has two: the one in `segments`, and this one, which
    follows the same question); `label` is the class of an image-only row; `regions` are boxes of its pictures.
    """

    id: RowId
    source: int
    segments: tuple[Text | Image | Video, ...]
    rejected: tuple[Text, ...] = ()
    label: int | None = None
    regions: tuple[Region, ...] = ()


@spec
class Cut:
    """How one picture is cut, known from its size alone: a grid of tiles, and perhaps the whole picture beside it.

    `height` and `width` are the picture's own, `canvas` the (height, width) that it is resized to for the grid. A tiling of
    fixed tiles has `rows * cols` of them; one of patches has `canvas` / `patch` patches instead, and the same of `overview`.
    """

    height: int
    width: int
    rows: int
    cols: int
    canvas: tuple[int, int]
    overview: tuple[int, int] | None = None
    patch: int | None = None

    @property
    def tiles(self) -> int:
        """Rows that the picture takes in a pack's `tiles`: what the tile budget counts."""
        if self.patch is None:
            return self.rows * self.cols + (self.overview is not None)
        return sum(h // self.patch * (w // self.patch) for h, w in (self.canvas, self.overview or (0, 0)))


@spec
class Picture:
    """A picture that has its place and its cost, and is not decoded yet: an image, or frame `frame` of a video."""

    of: Image | Video
    cut: Cut
    frame: int | None = None
    role: Role | None = None


@spec
class Measured:
    """A document whose pictures are measured: all that planning needs, and none of the pixels."""

    id: RowId
    source: int
    segments: tuple[Text | Picture, ...]
    rejected: tuple[Text, ...] = ()
    label: int | None = None
    regions: tuple[Region, ...] = ()


@spec
class Tiles:
    """One image, cut: `pixels` uint8 (n, 3, H, W), its tile `grid` (rows, cols) and original (height, width)."""

    pixels: Tensor
    grid: tuple[int, int]
    original: tuple[int, int]
    role: Role | None = None


@spec
class Tiled:
    """A document whose images are tiles."""

    id: RowId
    source: int
    segments: tuple[Text | Tiles, ...]


@spec
class VisionLayout:
    """All that the pipeline must know of a model: the side of its tiles in pixels and the tokens each one becomes."""

    tile: int
    tokens_per_tile: int

    def tokens(self, tiles: int) -> int:
        """Positions that an image of `tiles` tiles takes in the sequence; the planner, packer and model all ask here."""
        return tiles * self.tokens_per_tile


@spec
class Budget:
    """What one pack may hold."""

    tokens: int
    tiles: int


@spec
class Sample:
    """A document (or a piece of one) as tokens.

    `input_ids` int32 (t,) with `IMAGE_TOKEN` at visual positions; `labels` int32 (t,) already shifted: `labels[i]` is
    the token to be predicted at position i, or `NOT_LEARNED`; `tiles` uint8 (n, 3, H, W); `grids` int16 (i, 2).
    """

    id: RowId
    source: int
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    tiles: NDArray[np.uint8]
    grids: NDArray[np.int16]

    @property
    def cost(self) -> tuple[int, int]:
        return len(self.input_ids), len(self.tiles)


@spec
class Pack:
    """Samples laid end to end; the unit of work that travels from the pipeline to a worker.

    `input_ids`, `labels`, `positions` int32 (T,), positions restarting at every document; `cu_seqlens` int32 (S+1,);
    `sources` int16 (S,); `tiles` uint8 (N, 3, H, W); `grids` int16 (I, 2). `at` is its place in the order and `of` the
    number of packs in its window; `rows` were trained on here, `dropped` rows of the window are named by its first pack.
    """

    at: Position
    of: int
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    positions: NDArray[np.int32]
    cu_seqlens: NDArray[np.int32]
    sources: NDArray[np.int16]
    tiles: NDArray[np.uint8]
    grids: NDArray[np.int16]
    rows: tuple[RowId, ...]
    dropped: tuple[Rejected, ...] = ()

    @classmethod
    def of_samples(
        cls, samples: list[Sample], at: Position, of: int, tile: int, dropped: tuple[Rejected, ...] = ()
    ) -> Self:
        """Concatenate `samples`, which may be none: an empty pack is a legal pack of weight zero."""
        lengths = [len(sample.input_ids) for sample in samples]

        def joined(arrays: list[NDArray], empty: NDArray) -> NDArray:
            return np.concatenate([empty, *arrays])

        return cls(
            at=at,
            of=of,
            input_ids=joined([s.input_ids for s in samples], np.zeros(0, np.int32)),
            labels=joined([s.labels for s in samples], np.zeros(0, np.int32)),
            positions=joined([np.arange(n, dtype=np.int32) for n in lengths], np.zeros(0, np.int32)),
            cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
            sources=np.array([s.source for s in samples], np.int16),
            tiles=joined([s.tiles for s in samples], np.zeros((0, 3, tile, tile), np.uint8)),
            grids=joined([s.grids for s in samples], np.zeros((0, 2), np.int16)),
            rows=tuple(s.id for s in samples),
            dropped=dropped,
        )

    @classmethod
    def empty(cls, tile: int, at: Position | None = None, dropped: tuple[Rejected, ...] = ()) -> Self:
        return cls.of_samples([], at or Position(), 1, tile, dropped)

    @property
    def learned(self) -> int:
        """Tokens that carry loss."""
        return int((self.labels != NOT_LEARNED).sum())

    @property
    def digest(self) -> int:
        """CRC-32 of everything the model sees, so that two runs can be compared pack by pack."""
        crc = 0
        for array in (self.input_ids, self.labels, self.cu_seqlens, self.tiles, self.grids):
            crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
        return crc


@dataclass(slots=True)
class Batch:
    """A pack as tensors on a device, with no batch dimension.

    `input_ids`, `labels`, `positions` int64 (T,); `visual` bool (T,) marks positions that hold visual features;
    `cu_seqlens` int32 (S+1,); `sources` int64 (S,); `tiles` uint8 (max(N, 1), 3, H, W) -- a batch without images carries
    one blank tile, whose features the model multiplies by zero, so that every rank runs the same modules.
    """

    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    visual: Tensor
    visual_count: int
    cu_seqlens: Tensor
    max_seqlen: int
    sources: Tensor
    tiles: Tensor
    grids: Tensor

    @classmethod
    def of(cls, pack: Pack, device: torch.device | str = "cpu") -> Self:
        """Move `pack` to `device`. An empty pack becomes one position that is neither learned nor visual."""

        def on(array: NDArray) -> Tensor:
            return torch.from_numpy(np.array(array)).to(device)

        blank = len(pack.input_ids) == 0
        ids = np.zeros(1, np.int32) if blank else pack.input_ids
        cu_seqlens = np.array([0, 1], np.int32) if blank else pack.cu_seqlens
        tiles = pack.tiles if len(pack.tiles) else np.zeros((1, *pack.tiles.shape[1:]), np.uint8)
        return cls(
            input_ids=on(ids).long(),
            labels=on(np.full(1, NOT_LEARNED) if blank else pack.labels).long(),
            positions=on(np.zeros(1) if blank else pack.positions).long(),
            visual=on(ids == IMAGE_TOKEN),
            visual_count=int((ids == IMAGE_TOKEN).sum()),
            cu_seqlens=on(cu_seqlens),
            max_seqlen=int(np.diff(cu_seqlens).max()),
            sources=on(np.zeros(1) if blank else pack.sources).long(),
            tiles=on(tiles),
            grids=on(pack.grids),
        )

    def document_of_token(self) -> Tensor:
        """Index of the document that each position belongs to, int64 (T,)."""
        lengths = self.cu_seqlens.diff().long()
        return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
