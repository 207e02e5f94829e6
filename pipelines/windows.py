"""Hops 2 to 6 for one window: read, measure, encode, plan, and then cut its packs one by one.

    chunks of rows -> documents -> pictures measured, text encoded -> which samples make which pack -> pixels

A window is planned from headers and text alone; a picture is decoded when its pack is due. So the first pack comes soon, a
resumed window decodes nothing of the packs before, and an actor holds the files of one window and the pixels of one pack.
`PackWindows` is what a preprocessing actor holds; it knows nothing of Ray, so tests, previews and evaluation call it too.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import field, replace
from functools import cached_property, partial
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from pipelines import packing, pictures, storage, trust
from pipelines.annotate import Annotator, OfDocuments, OfPacks, Rows
from pipelines.chat import Template
from pipelines.corpora import Corpus
from pipelines.encode import Encoder, TextCodec
from pipelines.manifest import Shard
from pipelines.order import Order
from pipelines.storage import Storage
from pipelines.tiling import Tiling
from pipelines.types import (
    Budget,
    Document,
    Limits,
    Measured,
    Pack,
    Picture,
    Position,
    Rejected,
    Sample,
    SkipSample,
    Text,
    VisionLayout,
    Window,
    spec,
)


@spec
class Stream:
    """All that decides which packs a stage sees: a value that travels to the preprocessing actors.

    `corpora` are the order's sources, one by one; `tokenizer` is a folder; `bos` and `eos` are tokens by name; `folders` are
    where annotators find weights that they name, and `trust_remote_code` says whether Python beside weights may run.
    """

    order: Order
    corpora: tuple[Corpus, ...]
    tiling: Tiling
    template: Template
    layout: VisionLayout
    budget: Budget
    tokenizer: str
    bos: str | None
    eos: str | None
    loss_weights: tuple[float, ...]
    grouping: packing.Grouping = "mixed"
    annotators: tuple[Annotator, ...] = ()
    folders: dict[str, str] = field(default_factory=dict)
    limits: Limits = Limits()
    storage: Storage = Storage()
    trust_remote_code: bool = False

    @property
    def windows(self) -> int | None:
        return self.order.windows

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(corpus.name for corpus in self.corpora)


@spec
class Pools:
    """Actors that make packs, fewest and most: `preprocessors` hold `cpus` each; `annotators` hold models, on `gpus` each.

    `buffer` is how many bytes may be made ahead of the trainers, all actors together; they wait in Ray's object store.
    """

    preprocessors: tuple[int, int] = (1, 1)
    annotators: tuple[int, int] = (1, 1)
    gpus: float = 0.0
    cpus: float = 1.0
    buffer: int = 2**30

    def within(self, cpus: float) -> Pools:
        """The same actors where the trainers leave `cpus`: too few, and none is held, since trainers would wait for ever."""
        annotators = 0 if self.gpus else self.annotators[0]
        return self if self.cpus * (self.preprocessors[0] + annotators) <= cpus else replace(self, cpus=0.0)


@spec
class Plan:
    """A window before its pictures are decoded: the samples of each pack, in order, and the rows that were dropped."""

    window: int
    groups: tuple[tuple[Sample, ...], ...]
    dropped: tuple[Rejected, ...]

    @property
    def packs(self) -> int:
        """Packs of the window: at least one, so that a window whose rows were all dropped keeps its place in the order."""
        return max(1, len(self.groups))

    def tiles(self, number: int) -> int:
        """Tiles of pack `number`."""
        return sum(sample.tiles for sample in self.groups[number]) if self.groups else 0

    def only(self, numbers: Iterable[int]) -> Plan:
        """What there is to know of packs `numbers`, light enough to send: the others are empty."""
        wanted = set(numbers)
        groups = tuple(group if n in wanted else () for n, group in enumerate(self.groups))
        return replace(self, groups=groups, dropped=self.dropped if 0 in wanted else ())


class PackWindows:
    """Makes the packs of any window of a stream, models of annotators included, all in this process."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        storage.use(stream.storage)
        trust.use(stream.trust_remote_code)

    @cached_property
    def encoder(self) -> Encoder:
        s = self.stream
        return Encoder(TextCodec(s.tokenizer, s.bos, s.eos), s.template, s.layout, s.budget)

    @cached_property
    def of_documents(self) -> list[Callable[[Rows], Rows]]:
        """The stream's annotators of documents, their models loaded."""
        return [a.documents(self._folder) for a in self.stream.annotators if isinstance(a, OfDocuments)]

    @cached_property
    def of_packs(self) -> list[Callable[[Pack], Pack]]:
        """The stream's annotators of packs, their models loaded."""
        return [a.packs(self._folder) for a in self.stream.annotators if isinstance(a, OfPacks)]

    def _folder(self, name: str) -> str:
        return self.stream.folders.get(name, name)

    def packs(self, k: int, first: int = 0) -> Iterator[Pack]:
        """The packs of window k from number `first` on; a window has at least one. Raises StorageError."""
        plan = self.plan(k, self.rows(k))
        for number in range(first, plan.packs):
            yield self.annotated(self.cut(plan, number))

    def rows(self, k: int) -> Rows:
        """The rows of window k as read, in reading order, annotators of documents applied."""
        rows: Rows = list(self._read(self.stream.order.window(k)))
        for annotate in self.of_documents:
            rows = annotate(rows)
        return rows

    def plan(self, k: int, rows: Rows) -> Plan:
        """Which samples make which pack of window k, which has `rows`."""
        s = self.stream
        samples, dropped = self.samples(rows)
        rng = random.Random(f"{s.order.seed} packs {k}")
        rng.shuffle(samples)
        groups = packing.plan(samples, s.budget, rng, s.grouping)
        return Plan(window=k, groups=tuple(map(tuple, groups)), dropped=tuple(dropped))

    def annotated(self, pack: Pack) -> Pack:
        """The pack with what the stream's annotators add."""
        for annotate in self.of_packs:
            pack = annotate(pack)
        return pack

    def cut(self, plan: Plan, number: int, out: NDArray[np.uint8] | None = None) -> Pack:
        """Pack `number` of a planned window, its pictures decoded, into `out` if that is given (with room enough).

        A sample whose picture is broken is left out and named.
        """
        at = Position(window=plan.window, pack=number)
        dropped = tuple(map(self._signed, plan.dropped)) if number == 0 else ()
        if not plan.groups:
            return Pack.empty(self.stream.tiling.shape, at, dropped)
        samples, of = plan.groups[number], len(plan.groups)
        try:
            return Pack.of_samples(samples, self.pixels(samples, out), at, of, dropped)
        except SkipSample:
            kept, broken = self._sound(samples)
            return Pack.of_samples(kept, self.pixels(kept, out), at, of, (*dropped, *map(self._signed, broken)))

    def pixels(self, samples: Sequence[Sample], out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Tiles of the samples' pictures in order, uint8 (N, *shape of a tile). Raises SkipSample when one is broken."""
        shown = [picture for sample in samples for picture in sample.pictures]
        if out is None:
            out = np.empty((sum(sample.tiles for sample in samples), *self.stream.tiling.shape), np.uint8)
        once = list({id(picture): picture for picture in shown}.values())
        if len(once) == len(shown):
            return pictures.pixels(shown, self.stream.tiling, out[: sum(sample.tiles for sample in samples)])
        return self._repeated(shown, once, out)

    def _repeated(self, shown: list[Picture], once: list[Picture], out: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Pictures that come several times (both answers of a preference row show them) are decoded once."""
        tiles = pictures.pixels(once, self.stream.tiling)
        ends = np.cumsum([0, *(picture.cut.tiles for picture in once)])
        places = {id(picture): slice(ends[i], ends[i + 1]) for i, picture in enumerate(once)}
        return np.concatenate([tiles[places[id(p)]] for p in shown], out=out[: sum(p.cut.tiles for p in shown)])

    def _signed(self, rejected: Rejected) -> Rejected:
        """With the digest of the row's bytes: a person who mends a shard can tell whether it is the same row still."""
        shard = self._shards[rejected.row.corpus, rejected.row.shard]
        if rejected.sha or shard.uri.endswith(".parquet"):
            return rejected
        starts, row = shard.load().starts, rejected.row.row
        data = storage.read(shard.uri, int(starts[row]), int(starts[row + 1]))
        return replace(rejected, sha=hashlib.sha256(data).hexdigest())

    @cached_property
    def _shards(self) -> dict[tuple[str, str], Shard]:
        manifests = [source.manifest for source in self.stream.order.sources]
        return {(manifest.corpus, shard.name): shard for manifest in manifests for shard in manifest.shards}

    def _sound(self, samples: Sequence[Sample]) -> tuple[list[Sample], list[Rejected]]:
        kept: list[Sample] = []
        broken: list[Rejected] = []
        for sample in samples:
            try:
                self.pixels([sample])
            except SkipSample as skip:
                broken += [Rejected(row=row, reason=skip.reason, detail=skip.detail) for row in sample.rows]
            else:
                kept.append(sample)
        return kept, broken

    def samples(self, rows: Rows) -> tuple[list[Sample], list[Rejected]]:
        """Samples of `rows`, in their order, and the rows that were dropped."""
        samples: list[Sample] = []
        dropped: list[Rejected] = []
        for row in self.documents(rows):
            if isinstance(row, Rejected):
                dropped.append(row)
                continue
            try:
                found = self.encoder.encode(row)
            except SkipSample as skip:
                dropped += [Rejected(row=r, reason=skip.reason, detail=skip.detail) for r in (row.id, *row.more)]
            else:
                weight = self.stream.loss_weights[row.source]
                samples += found if weight == 1 else [replace(sample, weight=weight) for sample in found]
        return samples, dropped

    def documents(self, rows: Rows) -> Iterator[Measured | Rejected]:
        """`rows` measured; those of a grouped source come joined."""
        groups = {i: source.group for i, source in enumerate(self.stream.order.sources) if source.group > 1}
        waiting: dict[int, list[Measured]] = {source: [] for source in groups}
        for row in map(self._measured, rows):
            if isinstance(row, Rejected) or row.source not in groups:
                yield row
                continue
            group = waiting[row.source]
            group.append(row)
            if len(group) == groups[row.source]:
                yield joined(group)
                group.clear()
        yield from (joined(group) for group in waiting.values() if group)

    def _measured(self, row: Document | Rejected) -> Measured | Rejected:
        if isinstance(row, Rejected):
            return row
        try:
            return pictures.measure(row, self.stream.tiling, self.stream.limits)
        except SkipSample as skip:
            return Rejected(row=row.id, reason=skip.reason, detail=skip.detail)

    def _read(self, window: Window) -> Iterator[Document | Rejected]:
        """The window's rows, chunk by chunk; chunks on remote storage are fetched before they are needed."""
        s = self.stream
        reads = []
        remote = False
        for chunk in window.chunks:
            shard = s.order.sources[chunk.source].manifest.shards[chunk.shard]
            remote = remote or storage.scheme(shard.uri) != "file"
            reads.append(partial(s.corpora[chunk.source].read, shard, chunk, s.limits))
        if not remote or s.storage.ahead < 1:
            return chain.from_iterable(read() for read in reads)
        return chain.from_iterable(storage.ahead([partial(_listed, read) for read in reads], s.storage.ahead))


def _listed(read: Callable[[], Iterator[Document | Rejected]]) -> list[Document | Rejected]:
    return list(read())


def joined(rows: Sequence[Measured]) -> Measured:
    """Several rows as one document, an empty line between them (VILA's grouped pairs)."""
    gap = Text(text="\n\n", learn=False)
    segments = [segment for row in rows for segment in (gap, *row.segments)][1:]
    return replace(rows[0], segments=tuple(segments), more=tuple(row.id for row in rows[1:]))
