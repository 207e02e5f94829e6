"""One rank's share of a stream of packs, and the proof that it is the right one.

Pack i of the stream goes to rank i mod W, and the packs of step s are `[s * B, (s + 1) * B)` whatever W is. Before each step the
ranks tell one another which packs they hold; a gap, a repeat or a swap stops the run with both positions.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch.distributed as dist

from cluster.schedule import accumulation
from pipelines.types import Pack, Position, Rejected


class OrderError(RuntimeError):
    """The packs of a step are not the ones that the order says."""


@dataclass(frozen=True, slots=True)
class Held:
    """What a rank says of one of its packs. `index` counts packs since the run (re)started."""

    index: int
    at: Position
    of: int
    digest: int
    tokens: int
    images: int
    rows: tuple[tuple[str, int], ...]
    dropped: tuple[Rejected, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """The packs of one optimiser step: `mine` to train on (filled up with empty ones), `all` in order, over all ranks."""

    mine: list[Pack]
    all: list[Held]
    waited: float
    following: Position
    packs_in_window: int


class Deal:
    """Iterates over steps. The stream is read by a thread that keeps `AHEAD` packs, so that reading hides behind training."""

    AHEAD = 4

    def __init__(
        self,
        packs: Iterable[Pack],
        start: Position,
        packs_per_step: int,
        rank: int,
        world: int,
        tile: int,
        group: object,
    ) -> None:
        self.packs_per_step = packs_per_step
        self.rank = rank
        self.world = world
        self.tile = tile
        self.group = group
        self.expected = start
        self.first = 0
        self.held: Pack | None = None
        self.index = rank
        self.queue: queue.Queue[Pack | BaseException | None] = queue.Queue(self.AHEAD)
        threading.Thread(target=self._read, args=(iter(packs),), daemon=True, name="packs").start()

    def _read(self, packs: Iterator[Pack]) -> None:
        try:
            for pack in packs:
                self.queue.put(pack)
            self.queue.put(None)
        except BaseException as error:
            self.queue.put(error)

    def _next(self) -> Pack | None:
        if self.held is None:
            pack = self.queue.get()
            if isinstance(pack, BaseException):
                raise pack
            if pack is None:
                self.queue.put(None)  # the end stays the end
            self.held = pack
        return self.held

    def __iter__(self) -> Iterator[Step]:
        """Steps until the stream ends; the last may hold fewer packs. Raises OrderError, or what the stream raised."""
        while True:
            started = time.perf_counter()
            mine: list[Pack] = []
            said: list[Held] = []
            end = self.first + self.packs_per_step
            while self.index < end and (pack := self._next()) is not None:
                mine.append(pack)
                said.append(describe(pack, self.index))
                self.held = None
                self.index += self.world
            waited = time.perf_counter() - started
            everyone: list[list[Held]] = [[] for _ in range(self.world)]
            dist.all_gather_object(everyone, said, group=self.group)  # type: ignore[arg-type]
            together = sorted((held for rank in everyone for held in rank), key=lambda held: held.index)
            if not together:
                return
            following = self._check(together)
            mine += [Pack.empty(self.tile)] * (accumulation(self.packs_per_step, self.world) - len(mine))
            yield Step(mine, together, waited, following, together[-1].of)
            self.first = end

    def _check(self, together: list[Held]) -> Position:
        expected = self.expected
        for held in together:
            if held.at != expected:
                raise OrderError(
                    f"pack {held.index} since the start should be {expected} of the order and is {held.at}; "
                    "Ray Data dealt packs out of order (preserve_order, one-row blocks and equal=False must all hold)"
                )
            expected = after(held.at, held.of)
        self.expected = expected
        return expected


def after(at: Position, of: int) -> Position:
    """The position that follows `at`, in a window of `of` packs."""
    return Position(window=at.window, pack=at.pack + 1) if at.pack + 1 < of else Position(window=at.window + 1)


def describe(pack: Pack, index: int) -> Held:
    return Held(
        index=index,
        at=pack.at,
        of=pack.of,
        digest=pack.digest,
        tokens=len(pack.input_ids),
        images=len(pack.grids),
        rows=tuple((f"{row.corpus}/{row.shard}", row.row) for row in pack.rows),
        dropped=pack.dropped,
    )
