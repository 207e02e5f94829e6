"""What Ray Data's own processes unpickle of a stream: it imports nothing that takes long.

Between the processes that make packs and those that train on them Ray has others, which only number, count and hand on. They
read a dataset with all its operators; an actor that is made of bytes costs them nothing.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from pipelines.garbage import collect_rarely, collect_usually

if TYPE_CHECKING:
    from ray.data import DataIterator

Maker = Callable[[pa.Table], Iterator[pa.Table]]


def late(maker: Callable[..., Maker], *arguments: Any) -> tuple[bytes]:
    """The arguments of an actor below, which calls `maker(*arguments)` where it is to work."""
    return (pickle.dumps(partial(maker, *arguments)),)


class Late:
    """An actor that is made of bytes."""

    def __init__(self, made: bytes) -> None:
        collect_rarely()
        self.maker: Maker = pickle.loads(made)()
        collect_usually()

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        return self.maker(table)


class Planner(Late):
    """Reads and plans."""


class Preprocessor(Late):
    """Decodes and cuts."""


class Annotator(Late):
    """Holds models that see packs."""


class Windows(Datasource):
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


def tables_of(rows: DataIterator) -> Iterable[pa.Table]:
    """One rank's hands as Ray Data has them."""
    return rows.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0)
