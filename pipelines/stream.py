"""A stream of packs as a Ray Data dataset, in order, from any position. The only file of this floor that imports Ray.

    window numbers --actor pool, one window a call--> hands --streaming_split(W)--> rank i mod W

A *hand* is what one rank gets of a run of neighbouring packs of one window: pack number n of a window goes to rank n mod W. A
run has a hand for each rank, in the order of ranks, even an empty one; so hand i of the stream is rank i mod W's, and every
rank learns from its own hands how many packs there were in all. Handing over costs a few milliseconds of many processes'
time however much is in the hand, which is why packs do not travel one by one.

Three settings make the deal exact (each has a test): `preserve_order`, blocks of one row, and `equal=False`, since `equal`
drops rows. Ray's splitter promises no order in words, so every pack carries its position and the worker checks it.

A hand is one row of two binary cells: its tiles as they lie in memory, and the rest pickled. Tiles are decoded into one
buffer and copied once, into the object store; a trainer on the same node reads them where they are.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import count
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, DataContext, Datasource, ExecutionOptions, ReadTask
from ray.data.block import BlockMetadata

from pipelines.types import Hand, Position
from pipelines.windows import PackWindows, Stream, single_threaded

if TYPE_CHECKING:
    from ray.data import DataIterator, Dataset

HAND_BYTES = 16 * 2**20
"""About what one hand weighs at most, unless a single pack weighs more."""

MOST_PACKS = 64
"""Packs of one hand at most: packs of text alone weigh next to nothing, and a rank should not wait for thousands."""

HANDS_AHEAD = 8
"""Hands that an actor may have made and Ray Data not yet taken; the default, 2, leaves actors idle between rounds."""


class _Packer:
    """The actor: window numbers in, hands out."""

    def __init__(self, stream: Stream, start: Position, world: int) -> None:
        single_threaded()
        self.windows = PackWindows(stream)
        self.start = start
        self.world = world

    def __call__(self, batch: dict[str, NDArray[np.int64]]) -> Iterator[pa.Table]:
        for k in batch["window"]:
            first = self.start.pack if int(k) == self.start.window else 0
            yield from hands(self.windows, int(k), first, self.world)


def hands(windows: PackWindows, k: int, first: int, world: int) -> Iterator[pa.Table]:
    """Hands of window k from pack `first` on, in the order in which they are dealt."""
    plan = windows.plan(k)
    of = max(1, len(plan.groups))
    budget, shape = windows.stream.budget, windows.stream.tiling.shape
    each = max(1, min(MOST_PACKS, HAND_BYTES // (budget.tiles * prod(shape) + 16 * budget.tokens)))
    for start in range(first, of, each * world):
        stop = min(of, start + each * world)
        for rank in range(world):
            numbers = [n for n in range(start, stop) if n % world == rank]
            tiles = np.empty((sum(plan.tiles(n) for n in numbers), *shape), np.uint8)
            at, packs = 0, []
            for n in numbers:
                packs.append(windows.cut(plan, n, tiles[at:]))
                at += len(packs[-1].tiles)
            yield to_table(Hand(window=k, of=of, first=start, last=stop, packs=tuple(packs)), tiles[:at])


class _Windows(Datasource):
    """Window numbers from `first` on, up to `stop` or without end: one task that yields them as they are asked for."""

    def __init__(self, first: int, stop: int | None) -> None:
        super().__init__()
        self.first = first
        self.stop = stop

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: object, **__: object) -> list[ReadTask]:  # noqa: ARG002 -- order needs one
        first, stop = self.first, self.stop

        def numbers() -> Iterable[pa.Table]:
            for k in count(first) if stop is None else range(first, stop):
                yield pa.table({"window": [k]})

        return [ReadTask(numbers, BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None))]


def execution_options() -> ExecutionOptions:
    """How Ray Data must run a stream for its order to hold."""
    return ExecutionOptions(preserve_order=True)


def dataset(stream: Stream, start: Position, stop: int | None, actors: int, world: int) -> Dataset:
    """Hands for `world` ranks from `start` on, up to window `stop` or without end, made by `actors` preprocessing actors.

    Split it with `streaming_split(world, equal=False)`; each row is a hand as `to_table` writes it.
    """
    context = DataContext.get_current()
    context.target_max_block_size = 1  # every yielded row becomes its own block: the unit that the deal hands out
    context.execution_options = execution_options()
    context._max_num_blocks_in_streaming_gen_buffer = HANDS_AHEAD
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return ray.data.read_datasource(_Windows(start.window, stop), override_num_blocks=1, num_cpus=0).map_batches(
        _Packer,
        fn_constructor_args=(stream, start, world),
        batch_size=1,
        compute=ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=4),
    )


def hands_of(rows: DataIterator) -> Iterator[Hand]:
    """One rank's hands. The packs' tiles lie in the object store and cannot be written to."""
    for table in rows.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        for row in range(len(table)):
            yield from_table(table, row)


def to_table(hand: Hand, tiles: NDArray[np.uint8]) -> pa.Table:
    """One row: `tiles`, the bytes of all packs' tiles, not copied; `rest`, all else."""
    counts = [len(pack.tiles) for pack in hand.packs]
    bare = replace(hand, packs=tuple(replace(pack, tiles=tiles[:0]) for pack in hand.packs))
    rest = pickle.dumps((bare, counts, tiles.shape[1:]), protocol=5)
    return pa.table({"tiles": _cell(tiles.reshape(-1).data), "rest": _cell(rest)})


def from_table(table: pa.Table, row: int) -> Hand:
    """Read what `to_table` wrote. Only ever called on blocks that this job's own actors made."""
    hand, counts, shape = pickle.loads(_bytes(table, "rest", row))
    tiles = np.frombuffer(_bytes(table, "tiles", row), np.uint8).reshape(sum(counts), *shape)
    parts = np.split(tiles, np.cumsum(counts)[:-1]) if counts else []
    return replace(hand, packs=tuple(replace(p, tiles=part) for p, part in zip(hand.packs, parts, strict=True)))


def _cell(data: memoryview | bytes) -> pa.Array:
    """A column of one binary value that refers to `data`; Arrow's own constructors copy it."""
    ends = pa.array([0, len(data)], pa.int64()).buffers()[1]
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, pa.py_buffer(data)])


def _bytes(table: pa.Table, column: str, row: int) -> pa.Buffer:
    return table.column(column)[row].as_buffer()
