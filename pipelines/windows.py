"""Hops 2 to 5 for one window: read, tile, encode, pack. A pure function of the window's number.

`PackWindows` is what a preprocessing actor holds; it knows nothing of Ray, so tests, previews and evaluation call it too.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from functools import cached_property

import torch

from pipelines.chat import Template
from pipelines.corpora import Corpus
from pipelines.encode import Encoder, TextCodec
from pipelines.manifest import Shard
from pipelines.order import Order
from pipelines.packing import pack
from pipelines.tiling import Tiling, tile
from pipelines.types import (
    Budget,
    Chunk,
    Document,
    Pack,
    Rejected,
    Sample,
    SkipSample,
    Tiled,
    VisionLayout,
    Window,
    spec,
)


@spec
class Stream:
    """All that decides which packs a stage sees: a value that travels to the preprocessing actors.

    `epochs` is None for a stage that ends otherwise; `tokenizer` is a folder; `bos` and `eos` are tokens by name.
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
    epochs: float | None = None

    @property
    def windows(self) -> int | None:
        return None if self.epochs is None else self.order.windows(self.epochs)

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(corpus.name for corpus in self.corpora)


ATTEMPTS = 4
"""Times that a read is tried before storage's error stops the run. Bad rows are dropped; a bad network never is."""


class PackWindows:
    """Makes the packs of any window of a stream."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    @cached_property
    def encoder(self) -> Encoder:
        s = self.stream
        return Encoder(TextCodec(s.tokenizer, s.bos, s.eos), s.template, s.layout, s.budget)

    def packs(self, k: int) -> list[Pack]:
        """The packs of window k, at least one. Raises OSError when storage fails `ATTEMPTS` times in a row."""
        s = self.stream
        samples, dropped = self.samples(s.order.window(k, s.epochs))
        rng = random.Random(f"{s.order.seed} packs {k}")
        rng.shuffle(samples)
        return pack(samples, s.budget, k, s.layout.tile, rng, tuple(dropped))

    def samples(self, window: Window) -> tuple[list[Sample], list[Rejected]]:
        """Samples of the window's rows in reading order, and the rows that were dropped."""
        samples: list[Sample] = []
        dropped: list[Rejected] = []
        for row in self.documents(window):
            if isinstance(row, Rejected):
                dropped.append(row)
                continue
            try:
                samples += self.encoder.encode(row)
            except SkipSample as skip:
                dropped.append(Rejected(row=row.id, reason=skip.reason, detail=skip.detail))
        return samples, dropped

    def documents(self, window: Window) -> Iterator[Tiled | Rejected]:
        """The window's rows as tiled documents."""
        for chunk in window.chunks:
            corpus = self.stream.corpora[chunk.source]
            shard = self.stream.order.manifests[chunk.source].shards[chunk.shard]
            for row in _read(corpus, shard, chunk):
                if isinstance(row, Rejected):
                    yield row
                    continue
                try:
                    yield tile(row, self.stream.tiling)
                except SkipSample as skip:
                    yield Rejected(row=row.id, reason=skip.reason, detail=skip.detail)


def _read(corpus: Corpus, shard: Shard, chunk: Chunk) -> list[Document | Rejected]:
    """The chunk's rows, whole or not at all: a read that storage breaks off is begun again, with growing pauses."""
    for attempt in range(1, ATTEMPTS):
        try:
            return list(corpus.read(shard, chunk))
        except FileNotFoundError:
            break  # waiting does not bring it
        except OSError:
            time.sleep(0.2 * 2**attempt * (1 + random.random()))
    return list(corpus.read(shard, chunk))


def single_threaded() -> None:
    """Each actor takes one core: torch's own threads would fight with the trainers for the others."""
    torch.set_num_threads(1)
