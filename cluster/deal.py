"""One rank's share of a stream of packs, and the proof that it is the right one.

The packs of step s are `[s * B, (s + 1) * B)` of the stream, whatever the number of ranks W is. Pack n of a window goes to
rank n mod W (or as `pipelines.stream.rank_of` says), in hands that tell every rank how many packs the window has; so each
knows, without asking, which of its packs belong to which step. Before each step the ranks tell one another which packs they
hold; a gap, a repeat or a swap stops the run with both positions.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count

import torch.distributed as dist

from cluster.schedule import accumulation
from pipelines.types import Hand, Pack, Position, Rejected


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
    """The packs of one optimiser step: `mine` to train on (filled up with empty ones), `all` in order, over all ranks.

    `notes` is what each rank had written on the deal when the step was dealt, by rank.
    """

    mine: list[Pack]
    all: list[Held]
    waited: float
    following: Position
    packs_in_window: int
    notes: tuple[str, ...]


class Deal:
    """Iterates over steps. The stream is read by a thread that keeps a hand ready, so that reading hides behind training.

    `empty` is the pack which fills up a rank's share. What a rank writes into `note` reaches all ranks with the next step, the
    same step for all: so they agree on what to do besides training without asking one another.
    """

    AHEAD = 1

    def __init__(
        self,
        hands: Iterable[Hand],
        start: Position,
        packs_per_step: int,
        rank: int,
        world: int,
        empty: Pack,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.packs_per_step = packs_per_step
        self.rank = rank
        self.world = world
        self.empty = empty
        self.group = group
        self.expected = start
        self.note = ""
        self.read = 0  # packs of the stream, all ranks', that the hands so far speak of
        self.waiting: deque[tuple[int, Pack]] = deque()
        self.queue: queue.Queue[Hand | BaseException | None] = queue.Queue(self.AHEAD)
        threading.Thread(target=self._read, args=(iter(hands),), daemon=True, name="hands").start()

    def _read(self, hands: Iterator[Hand]) -> None:
        try:
            for hand in hands:
                self.queue.put(hand)
            self.queue.put(None)
        except BaseException as error:
            self.queue.put(error)

    def _take(self) -> bool:
        """Wait for the next hand; False at the end of the stream."""
        hand = self.queue.get()
        if isinstance(hand, BaseException):
            raise hand
        if hand is None:
            self.queue.put(None)  # the end stays the end
            return False
        self.waiting += [(self.read + pack.at.pack - hand.first, pack) for pack in hand.packs]
        self.read += hand.last - hand.first
        return True

    def __iter__(self) -> Iterator[Step]:
        """Steps until the stream ends; the last may hold fewer packs. Raises OrderError, or what the stream raised."""
        for step in count():
            started = time.perf_counter()
            end = (step + 1) * self.packs_per_step
            while self.read < end and self._take():
                pass
            mine: list[Pack] = []
            said: list[Held] = []
            while self.waiting and self.waiting[0][0] < end:
                index, pack = self.waiting.popleft()
                mine.append(pack)
                said.append(describe(pack, index))
            waited = time.perf_counter() - started
            gathered: list[tuple[list[Held], str]] = [([], "")] * self.world
            dist.all_gather_object(gathered, (said, self.note), group=self.group)
            self.note = ""
            everyone, notes = [held for held, _ in gathered], tuple(note for _, note in gathered)
            together = sorted((held for rank in everyone for held in rank), key=lambda held: held.index)
            if not together:
                return
            following = self._check(together)
            # Where a step spans two windows one rank may hold a pack more than another: all go through as many.
            most = max(accumulation(self.packs_per_step, self.world), *(len(rank) for rank in everyone), 0)
            mine += [self.empty] * (most - len(mine))
            yield Step(mine, together, waited, following, together[-1].of, notes)

    def _check(self, together: list[Held]) -> Position:
        expected = self.expected
        for held in together:
            if held.at != expected:
                raise OrderError(
                    f"pack {held.index} since the start should be {expected} of the order and is {held.at}; "
                    "Ray Data dealt them out of order (preserve_order, one-row blocks and equal=False must all hold)"
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
        images=len(pack.cuts),
        rows=tuple((f"{row.corpus}/{row.shard}", row.row) for row in pack.rows),
        dropped=pack.dropped,
    )
