"""The named types that data wears on its way from a shard to the model.

Shape letters: T tokens of a pack, S documents in it, N tiles, I images, H x W pixels of a tile.

>>> RowId(corpus="pairs", shard="00000.tar", epoch=0, row=7).label()
'pairs/00000.tar row 7'
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum, StrEnum
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ops.context import Context, Share
from pipelines.value import spec

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
    TRUNCATED_VIDEO = "video file is truncated"
    HUGE_IMAGE = "image has too many pixels"
    TRUNCATED_SHARD = "shard ends inside the row"
    IMAGE_TOO_LONG = "one image exceeds the pack's budget"
    NOTHING_TO_LEARN = "no token carries loss"
    TOO_LONG = "longer than a pack, and cannot be cut"
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
class ConversationLimits(Limits):
    """What one conversation may ask of a machine that answers it: less than a row of a corpus, for anybody may ask."""

    pixels: int = 25_000_000
    bytes: int = 10 * 2**20
    characters: int = 200_000
    pictures: int = 16


CONVERSATION = ConversationLimits()


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

    @property
    def seed(self) -> int:
        """A number below 2 ** 32 for all chance that concerns the row on this pass: wherever and however often it is drawn."""
        return zlib.crc32(f"{self.epoch} {self.label()}".encode())


@spec
class Rejected:
    """A row that was dropped, and why; `sha` is the SHA-256 of the row as it lies in its shard, where rows are bytes there."""

    row: RowId
    reason: Reason
    detail: str = ""
    sha: str = ""

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
    """An image as stored: its encoded bytes; `objects` is what a detector found in it, a `.npz` (see `pipelines.objects`)."""

    data: bytes
    role: Role | None = None
    objects: bytes | None = None


@spec
class Frames:
    """Which frames of a video are shown: `count` of them, evenly spread; or, with `fps`, that many a second, at most `count`."""

    count: int = 8
    fps: float | None = None


@spec
class Codes:
    """A picture as tokens of the vocabulary, int ids in reading order (VQ codes, shifted to where the vocabulary has them)."""

    ids: tuple[int, ...]
    role: Role | None = None
    learn: bool = True


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
    segments: tuple[Text | Image | Video | Codes, ...]
    rejected: tuple[Text, ...] = ()
    label: int | None = None
    regions: tuple[Region, ...] = ()


@spec
class Cut:
    """How one picture is cut, known from its size alone: a grid of tiles, and perhaps the whole picture beside it.

    `height` and `width` are the picture's own, `canvas` the (height, width) that it is resized to for the grid, so that each
    slice of it is `canvas` / (`rows`, `cols`). A tiling of fixed tiles has `rows * cols` of them and one for `overview`; one
    of patches has `canvas` / `patch` patches instead, and the same of `overview`. With `scales` the picture is cut once
    at each: scale s gives s x s tiles, and the grid is that of the largest.
    """

    height: int
    width: int
    rows: int
    cols: int
    canvas: tuple[int, int]
    overview: tuple[int, int] | None = None
    patch: int | None = None
    scales: tuple[int, ...] = ()

    @property
    def numbers(self) -> tuple[int, ...]:
        """Rows, columns, whether an overview comes too, height, width; height and width of the canvas and of the overview."""
        shown = self.overview is not None
        return self.rows, self.cols, int(shown), self.height, self.width, *self.canvas, *(self.overview or (0, 0))

    @property
    def tiles(self) -> int:
        """Rows that the picture takes in a pack's `tiles`: what the tile budget counts."""
        if self.scales:
            return sum(scale * scale for scale in self.scales)
        if self.patch is None:
            return self.rows * self.cols + (self.overview is not None)
        return sum(h // self.patch * (w // self.patch) for h, w in (self.canvas, self.overview or (0, 0)))

    def unpadded(self, side: int) -> tuple[int, int, int, int]:
        """Top, left, rows and columns of the features that show the picture, each tile of the grid having side x side.

        The picture lies in the middle of the canvas, its aspect kept, and the features beside it show padding (LLaVA-NeXT's
        `unpad_image`, in whole numbers: both margins are cut by the smaller of the two).
        """
        high, wide = self.rows * side, self.cols * side
        if self.width * high > self.height * wide:
            top = (high - self.height * wide // self.width) // 2
            return top, 0, high - 2 * top, wide
        left = (wide - self.width * high // self.height) // 2
        return 0, left, high, wide - 2 * left


@spec
class Picture:
    """A picture that has its place and its cost, and is not decoded yet: an image, or frame `frame` of a video."""

    of: Image | Video
    cut: Cut
    frame: int | None = None
    role: Role | None = None


@spec
class Measured:
    """A document whose pictures are measured: all that planning needs, and none of the pixels.

    `more` are the rows that were joined to it, when a source makes one document of several rows.
    """

    id: RowId
    source: int
    segments: tuple[Text | Picture | Codes, ...]
    rejected: tuple[Text, ...] = ()
    label: int | None = None
    regions: tuple[Region, ...] = ()
    more: tuple[RowId, ...] = ()


Join = Literal["tiles", "unpad", "scales", "slices", "patches"]
"""How the features of a picture's tiles become its run of tokens; `VisionLayout.tokens` says what each one counts."""


@spec
class Separators:
    """Positions of a picture that hold marks beside its features; the model owns their embeddings.

    `picture`: around the whole (Qwen-VL's `<img>` and `</img>`: 2). `slice`: around the overview and each slice (MiniCPM-V's
    start and end: 2). `group`: around all the slices together, where there are several (MiniCPM-V 2.0: 2). `column`: between
    neighbours in a row of slices (LLaVA-UHD's comma: 1). `row`: between two rows of slices (their newline: 1).
    """

    picture: int = 0
    slice: int = 0
    group: int = 0
    column: int = 0
    row: int = 0


@spec
class VisionLayout:
    """All that the pipeline must know of a model: the shape of one row of `tiles` and the tokens that a picture becomes.

    `shape` is (3, side, side) for fixed tiles and (3 * patch * patch,) for patches. `merge` is the side of the square of
    patches that becomes one token where `join` is "patches". With `together` the frames of a video become the tokens of one,
    all at once: its first frame has their positions and the others none. With `around` a mark stands before and behind each
    picture, and one alone between neighbours, which counts to the first of them. Raises ValueError when the numbers contradict
    one another.
    """

    shape: tuple[int, ...]
    tokens_per_tile: int
    join: Join = "tiles"
    merge: int = 1
    separators: Separators = Separators()
    together: bool = False
    around: bool = False

    def __post_init__(self) -> None:
        if self.join == "unpad" and self.side**2 != self.tokens_per_tile:
            raise ValueError(
                f"join='unpad' cuts margins off a square of features, and {self.tokens_per_tile} tokens a tile are none; "
                "take a connector that keeps the grid"
            )

    @property
    def tile(self) -> int:
        """Side of a fixed tile in pixels. Raises ValueError where the rows of `tiles` are patches."""
        if len(self.shape) != 3:
            raise ValueError(
                f"rows of {self.shape[0]} numbers are patches, which have no side as tiles do; use `shape`"
            )
        return self.shape[-1]

    @property
    def side(self) -> int:
        """Side of the square of tokens that a tile becomes, rounded down."""
        return math.isqrt(self.tokens_per_tile)

    def tokens(self, cut: Cut) -> int:
        """Positions that a picture takes in the sequence; the planner, packer and model all ask here.

        tiles: every tile's tokens, one after the other. unpad: the overview's, then the grid's without its padding and one
        newline a row; a tile alone has no newline. scales: those of one tile, scales being joined over channels.
        slices: `tokens_per_tile` for the overview and for each slice, whatever their shapes. patches: one a square of `merge`
        x `merge` patches. Separators are added to each, and both marks `around` it.
        """
        return self.separators.picture + 2 * self.around + self._features(cut)

    def _features(self, cut: Cut) -> int:
        match self.join:
            case "tiles":
                return cut.tiles * self.tokens_per_tile
            case "unpad":
                if cut.overview is None:
                    return cut.tiles * self.tokens_per_tile
                _, _, rows, cols = cut.unpadded(self.side)
                return self.tokens_per_tile + rows * (cols + 1)
            case "scales":
                return self.tokens_per_tile
            case "slices":
                return self._slices(cut)
            case "patches":
                square = (cut.patch or 1) * self.merge
                return cut.canvas[0] // square * (cut.canvas[1] // square)

    def _slices(self, cut: Cut) -> int:
        marks = self.separators
        slices = cut.rows * cut.cols
        each = (slices + (cut.overview is not None)) * (self.tokens_per_tile + marks.slice)
        between = marks.column * cut.rows * (cut.cols - 1) + marks.row * (cut.rows - 1)
        return each + between + (marks.group if slices > 1 else 0)


@spec
class Budget:
    """What one pack may hold."""

    tokens: int
    tiles: int


@spec
class Sample:
    """A document (or a piece of one) as tokens, its pictures measured and not yet decoded.

    `input_ids` int32 (t,) with `IMAGE_TOKEN` at visual positions; `labels` int32 (t,) already shifted: `labels[i]` is
    the token to be predicted at position i, or `NOT_LEARNED`; `lengths` of its sequences: one, or two where a row has a
    preferred and a rejected answer, which stay in one pack. `visual` are the positions that each of `pictures` takes, none for
    a frame that is read together with the one before it; `rows` all that went into it, `id` first; `weight` multiplies the loss
    of its tokens.
    """

    id: RowId
    source: int
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    lengths: tuple[int, ...]
    pictures: tuple[Picture, ...]
    visual: tuple[int, ...]
    rows: tuple[RowId, ...]
    label: int | None = None
    weight: float = 1.0

    @property
    def tiles(self) -> int:
        return sum(picture.cut.tiles for picture in self.pictures)

    @property
    def cost(self) -> tuple[int, int]:
        return len(self.input_ids), self.tiles


class Branch(IntEnum):
    """What a sequence of a pack is: a document, or one of the two answers to a question."""

    ONLY = 0
    PREFERRED = 1
    REJECTED = 2


@spec
class Pack:
    """Samples laid end to end; the unit of work that travels from the pipeline to a worker.

    `input_ids`, `labels`, `positions` int32 (T,), positions restarting at every document; `cu_seqlens` int32 (S+1,).
    Of each document: `sources` int16 (S,); `branches` int8 (S,), of `Branch`; `classes` int32 (S,), -1 where it has none;
    `weights` float32 (S,), what the loss of its tokens is multiplied by; `ids` (S,), its row. `tiles` uint8 (N, *shape of
    a tile); `cuts` int32 (I, 11) of each picture: its tiles, its positions and `Cut.numbers`; one of no positions is a further
    frame of the video that the picture before it belongs to. `at` is the pack's place in the order and `of` the number of packs
    in its window; `rows` were trained on here, `dropped` rows are named by the pack that they would have been in, or by the
    window's first. Annotators may add `features`, bfloat16 as uint16 (N, P, D), of the frozen
    encoder in place of the tiles; `references` float32 (S, 2), under a reference model the log-probability of each document's
    learned tokens, and of those among them that the other answer has not (`pipelines.answers`); and `instructions` int32 (S, L),
    each document's prompt in another vocabulary, filled up with `NOT_LEARNED`.
    """

    at: Position
    of: int
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    positions: NDArray[np.int32]
    cu_seqlens: NDArray[np.int32]
    sources: NDArray[np.int16]
    branches: NDArray[np.int8]
    classes: NDArray[np.int32]
    weights: NDArray[np.float32]
    ids: tuple[RowId, ...]
    tiles: NDArray[np.uint8]
    cuts: NDArray[np.int32]
    rows: tuple[RowId, ...]
    dropped: tuple[Rejected, ...] = ()
    features: NDArray[np.uint16] | None = None
    references: NDArray[np.float32] | None = None
    instructions: NDArray[np.int32] | None = None

    @classmethod
    def of_samples(
        cls,
        samples: Sequence[Sample],
        tiles: NDArray[np.uint8],
        at: Position | None = None,
        of: int = 1,
        dropped: tuple[Rejected, ...] = (),
    ) -> Self:
        """Lay out `samples`, which may be none: an empty pack is a legal pack of weight zero. `tiles` are their pictures'."""
        lengths = [length for sample in samples for length in sample.lengths]
        cuts = [pair for sample in samples for pair in zip(sample.pictures, sample.visual, strict=True)]

        def joined(arrays: list[NDArray[np.int32]]) -> NDArray[np.int32]:
            return np.concatenate(arrays) if arrays else np.zeros(0, np.int32)

        return cls(
            at=at or Position(),
            of=of,
            input_ids=joined([s.input_ids for s in samples]),
            labels=joined([s.labels for s in samples]),
            positions=joined([np.arange(n, dtype=np.int32) for n in lengths]),
            cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
            sources=np.array([s.source for s in samples for _ in s.lengths], np.int16),
            branches=np.array([b for s in samples for b in ((0,) if len(s.lengths) == 1 else (1, 2))], np.int8),
            classes=np.array([-1 if s.label is None else s.label for s in samples for _ in s.lengths], np.int32),
            weights=np.array([s.weight for s in samples for _ in s.lengths], np.float32),
            ids=tuple(s.id for s in samples for _ in s.lengths),
            tiles=tiles,
            cuts=np.array([(p.cut.tiles, n, *p.cut.numbers) for p, n in cuts], np.int32).reshape(-1, 11),
            rows=tuple(row for s in samples for row in s.rows),
            dropped=dropped,
        )

    @classmethod
    def empty(cls, shape: tuple[int, ...], at: Position | None = None, dropped: tuple[Rejected, ...] = ()) -> Self:
        """A pack of nothing, for tiles of `shape`."""
        return cls.of_samples([], np.zeros((0, *shape), np.uint8), at, 1, dropped)

    @property
    def learned(self) -> int:
        """Tokens that carry loss."""
        return int((self.labels != NOT_LEARNED).sum())

    @property
    def digest(self) -> int:
        """CRC-32 of all that the pipeline itself made, so that two runs can be compared pack by pack."""
        crc = 0
        parts = (
            self.input_ids,
            self.labels,
            self.cu_seqlens,
            self.branches,
            self.classes,
            self.weights,
            self.tiles,
            self.cuts,
        )
        for array in parts:
            crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
        return crc


@spec
class Hand:
    """One rank's packs among packs `[first, last)` of window `window`, which has `of` packs."""

    window: int
    of: int
    first: int
    last: int
    packs: tuple[Pack, ...]


def _lively(features: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """As with tiles: a batch without pictures carries the features of one blank, so that every rank runs the same modules."""
    return features if len(features) else np.zeros((1, *features.shape[1:]), np.uint16)


@dataclass(slots=True)
class Batch:
    """A pack as tensors on a device, with no batch dimension.

    `input_ids`, `labels`, `positions` int64 (T,); `visual` bool (T,) marks positions that hold visual features;
    `cu_seqlens` int32 (S+1,); `sources`, `classes` int64, `branches` int8, `weights` float32 and `pictured` bool (whether it
    has pictures), all (S,), and so are `seeds` int64, those of their rows; `cuts` int32 (I, 11) as in `Pack`; `tiles` uint8
    (max(N, 1), 3, H, W) -- a batch without images carries one blank tile, whose features the model multiplies by zero, so that
    every rank runs the same modules. `features` bfloat16 (max(N, 1), P, D), `references` float32 (S, 2) and `instructions` int64
    (S, L) where annotators made them. With a `share` the batch holds some positions of its pack and some of its tiles, as many
    on each rank that shares it; what is said of documents stays whole.
    """

    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    visual: Tensor
    visual_count: int
    cu_seqlens: Tensor
    max_seqlen: int
    sources: Tensor
    branches: Tensor
    classes: Tensor
    weights: Tensor
    pictured: Tensor
    tiles: Tensor
    cuts: Tensor
    seeds: Tensor | None = None
    features: Tensor | None = None
    references: Tensor | None = None
    instructions: Tensor | None = None
    share: Share | None = None

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
            classes=on(np.full(1, -1) if blank else pack.classes).long(),
            branches=on(np.zeros(1, np.int8) if blank else pack.branches),
            weights=on(np.ones(1, np.float32) if blank else pack.weights),
            pictured=on(np.logical_or.reduceat(ids == IMAGE_TOKEN, cu_seqlens[:-1])),
            tiles=on(tiles),
            cuts=on(pack.cuts),
            seeds=on(
                np.array([row.seed for row in pack.ids], np.int64)
                if pack.ids
                else np.zeros(len(cu_seqlens) - 1, np.int64)
            ),
            features=None if pack.features is None else on(_lively(pack.features).view(np.int16)).view(torch.bfloat16),
            references=None
            if pack.references is None
            else on(np.zeros((1, 2), np.float32) if blank else pack.references),
            instructions=None
            if pack.instructions is None
            else on(np.full((1, 1), NOT_LEARNED) if blank else pack.instructions).long(),
        )

    def document_of_token(self) -> Tensor:
        """Index of the document that each position belongs to, int64 (T,)."""
        if self.share is not None:
            return self.share.documents
        lengths = self.cu_seqlens.diff().long()
        return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on `device`; itself where they lie there."""
        tensors = ((f.name, getattr(self, f.name)) for f in fields(self))
        return replace(self, **{name: x.to(device) for name, x in tensors if isinstance(x, Tensor)})

    def shared(self, context: Context) -> Batch:
        """What this rank holds where the ranks of `context` share the pack between them.

        Positions are filled up with some that are not learned, tiles with blank ones, so that all hold equally many.
        """
        length, tiles = len(self.input_ids), len(self.tiles)
        more = context.padded(length) - length
        each = -(-tiles // context.size)
        first = context.rank * each

        def positions(x: Tensor, fill: int) -> Tensor:
            return torch.nn.functional.pad(x, (0, more), value=fill)[mine]

        def pictures(x: Tensor) -> Tensor:
            part = x[first : first + each]
            return torch.cat([part, x.new_zeros(each - len(part), *x.shape[1:])])

        mine = context.positions(length + more).to(self.input_ids.device)
        visual = positions(self.visual, 0)
        bounds = tuple(self.cu_seqlens.tolist())
        return replace(
            self,
            input_ids=positions(self.input_ids, 0),
            labels=positions(self.labels, NOT_LEARNED),
            positions=positions(self.positions, 0),
            visual=visual,
            visual_count=int(visual.sum()),
            tiles=pictures(self.tiles),
            features=None if self.features is None else pictures(self.features),
            share=Share(
                context=context,
                bounds=(*bounds, length + more) if more else bounds,
                positions=mine,
                documents=positions(self.document_of_token(), len(self.sources) - 1),
                visual=positions(self.visual.long().cumsum(0) - 1, 0)[visual],
            ),
        )
