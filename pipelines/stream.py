"""A stream of packs as a Ray Data dataset, in order, from any position. The only file of this floor that imports Ray.

    range of windows --actor pool, one window a call--> one-row blocks, each a pack --streaming_split(W)--> rank i mod W

Three settings make the deal exact (each has a test): `preserve_order`, blocks of one row, and `equal=False`, since `equal`
drops rows. Ray's splitter promises no order in words, so every pack carries its position and the worker checks it.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from pipelines.types import Pack, Position
from pipelines.windows import PackWindows, Stream, single_threaded

if TYPE_CHECKING:
    import ray.data
    from ray.data import ExecutionOptions


COLUMN = "pack"

BLOCKS_AHEAD = 64
"""Packs that an actor may have made and Ray Data not yet taken; the default, 2, leaves actors idle most of the time."""


class _Packer:
    """The actor: windows in, rows out."""

    def __init__(self, stream: Stream, start: Position) -> None:
        single_threaded()
        self.windows = PackWindows(stream)
        self.start = start

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, list[bytes]]]:
        for k in batch["id"]:
            window = self.start.window + int(k)
            for pack in self.windows.packs(window):
                if window > self.start.window or pack.at.pack >= self.start.pack:
                    yield {COLUMN: [to_bytes(pack)]}


def execution_options() -> ExecutionOptions:
    """How Ray Data must run a stream for its order to hold."""
    from ray.data import ExecutionOptions

    return ExecutionOptions(preserve_order=True)


def dataset(stream: Stream, start: Position, windows: int, actors: int) -> ray.data.Dataset:
    """Packs from `start` on, over at most `windows` more windows, made by `actors` preprocessing actors.

    Each row has one column, a pack as `to_bytes` writes it.
    """
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.target_max_block_size = 1  # every yielded row becomes its own block: the unit that the deal hands out
    context.execution_options = execution_options()
    # A window's packs are many small blocks; the default lets an actor make two before it waits for Ray Data's scheduler.
    context._max_num_blocks_in_streaming_gen_buffer = BLOCKS_AHEAD
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return ray.data.range(windows, override_num_blocks=windows).map_batches(
        _Packer,
        fn_constructor_args=(stream, start),
        batch_size=1,
        compute=ActorPoolStrategy(size=actors),
    )


def to_bytes(pack: Pack) -> bytes:
    """A pack as one binary cell: arrays of different lengths in one Arrow table would be pickled one by one."""
    return pickle.dumps(pack, protocol=5)


def from_bytes(data: bytes) -> Pack:
    """Read what `to_bytes` wrote. Only ever called on blocks that this job's own actors made."""
    return pickle.loads(data)
