"""Hops 2 to 6 for one window: read, measure, encode, plan, and then cut its packs one by one.

    chunks of rows -> documents -> pictures measured, text encoded -> which samples make which pack -> pixels

A window is planned from headers and text alone; a picture is decoded when its pack is due. So the first pack comes soon, a
resumed window decodes nothing of the packs before, and an actor holds the files of one window and the pixels of one pack.
`PackWindows` is what a preprocessing actor holds; it knows nothing of Ray, so tests, previews and evaluation call it too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines import packing, storage, tiling
from pipelines.chat import Template
from pipelines.corpora import Corpus
from pipelines.encode import Encoder, TextCodec
from pipelines.order import Order
from pipelines.storage import Storage
from pipelines.tiling import Tiling
from pipelines.types import (
    Budget,
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

    `corpora` are the order's sources, one by one; `tokenizer` is a folder; `bos` and `eos` are tokens by name.
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
    limits: Limits = Limits()
    storage: Storage = Storage()

    @property
    def windows(self) -> int | None:
        return self.order.windows

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(corpus.name for corpus in self.corpora)


@spec
class Plan:
    """A window before its pictures are decoded: the samples of each pack, in order, and the rows that were dropped."""

    window: int
    groups: tuple[tuple[Sample, ...], ...]
    dropped: tuple[Rejected, ...]

    def tiles(self, number: int) -> int:
        """Tiles of pack `number`."""
        return sum(sample.tiles for sample in self.groups[number]) if self.groups else 0


class PackWindows:
    """Makes the packs of any window of a stream."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        storage.use(stream.storage)

    @cached_property
    def encoder(self) -> Encoder:
        s = self.stream
        return Encoder(TextCodec(s.tokenizer, s.bos, s.eos), s.template, s.layout, s.budget)

    def packs(self, k: int, first: int = 0) -> Iterator[Pack]:
        """The packs of window k from number `first` on; a window has at least one. Raises StorageError."""
        plan = self.plan(k)
        for number in range(first, max(1, len(plan.groups))):
            yield self.cut(plan, number)

    def plan(self, k: int) -> Plan:
        """Which samples make which pack of window k."""
        s = self.stream
        samples, dropped = self.samples(s.order.window(k))
        rng = random.Random(f"{s.order.seed} packs {k}")
        rng.shuffle(samples)
        groups = packing.plan(samples, s.budget, rng, s.grouping)
        return Plan(window=k, groups=tuple(map(tuple, groups)), dropped=tuple(dropped))

    def cut(self, plan: Plan, number: int, out: NDArray[np.uint8] | None = None) -> Pack:
        """Pack `number` of a planned window, its pictures decoded, into `out` if that is given (with room enough).

        A sample whose picture is broken is left out and named.
        """
        at = Position(window=plan.window, pack=number)
        dropped = plan.dropped if number == 0 else ()
        if not plan.groups:  # all rows were dropped; the window keeps its place in the order
            return Pack.empty(self.stream.tiling.shape, at, dropped)
        samples, of = plan.groups[number], len(plan.groups)
        try:
            return Pack.of_samples(samples, self.pixels(samples, out), at, of, dropped)
        except SkipSample:
            kept, broken = self._sound(samples)
            return Pack.of_samples(kept, self.pixels(kept, out), at, of, (*dropped, *broken))

    def pixels(self, samples: Sequence[Sample], out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Tiles of the samples' pictures in order, uint8 (N, *shape of a tile). Raises SkipSample when one is broken."""
        pictures = [picture for sample in samples for picture in sample.pictures]
        if out is None:
            out = np.empty((sum(sample.tiles for sample in samples), *self.stream.tiling.shape), np.uint8)
        once = list({id(picture): picture for picture in pictures}.values())
        if len(once) == len(pictures):
            return tiling.pixels(pictures, self.stream.tiling, out[: sum(sample.tiles for sample in samples)])
        return self._repeated(pictures, once, out)

    def _repeated(self, pictures: list[Picture], once: list[Picture], out: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Pictures that come several times (both answers of a preference row show them) are decoded once."""
        tiles = tiling.pixels(once, self.stream.tiling)
        ends = np.cumsum([0, *(picture.cut.tiles for picture in once)])
        places = {id(picture): slice(ends[i], ends[i + 1]) for i, picture in enumerate(once)}
        return np.concatenate([tiles[places[id(p)]] for p in pictures], out=out[: sum(p.cut.tiles for p in pictures)])

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

    def samples(self, window: Window) -> tuple[list[Sample], list[Rejected]]:
        """Samples of the window's rows in reading order, and the rows that were dropped."""
        samples: list[Sample] = []
        dropped: list[Rejected] = []
        for row in self.documents(window):
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

    def documents(self, window: Window) -> Iterator[Measured | Rejected]:
        """The window's rows as measured documents; rows of a grouped source come joined."""
        groups = {i: source.group for i, source in enumerate(self.stream.order.sources) if source.group > 1}
        open_groups: dict[int, list[Measured]] = {source: [] for source in groups}
        for row in self._rows(window):
            if isinstance(row, Rejected) or row.source not in groups:
                yield row
                continue
            group = open_groups[row.source]
            group.append(row)
            if len(group) == groups[row.source]:
                yield joined(group)
                group.clear()
        yield from (joined(group) for group in open_groups.values() if group)

    def _rows(self, window: Window) -> Iterator[Measured | Rejected]:
        s = self.stream
        for chunk in window.chunks:
            shard = s.order.sources[chunk.source].manifest.shards[chunk.shard]
            for row in s.corpora[chunk.source].read(shard, chunk):
                if isinstance(row, Rejected):
                    yield row
                    continue
                try:
                    yield tiling.measure(row, s.tiling, s.limits)
                except SkipSample as skip:
                    yield Rejected(row=row.id, reason=skip.reason, detail=skip.detail)


def joined(rows: Sequence[Measured]) -> Measured:
    """Several rows as one document, an empty line between them (VILA's grouped pairs)."""
    gap = Text(text="\n\n", learn=False)
    segments = [segment for row in rows for segment in (gap, *row.segments)][1:]
    return replace(rows[0], segments=tuple(segments), more=tuple(row.id for row in rows[1:]))


def single_threaded() -> None:
    """Each actor takes one core: torch's own threads would fight with the trainers for the others."""
    torch.set_num_threads(1)
