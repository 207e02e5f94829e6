"""What Ray Train's own processes are given to unpickle: it imports nothing that takes long.

Workers ask for data before anything else. Who makes packs is started when somebody waits for them, and needs as long to start as
a worker needs to import torch, to meet the other ranks and to read a checkpoint; so both happen at once.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from pipelines.garbage import collect_rarely

T = TypeVar("T")

DATASET = "packs"
"""The dataset's name in Ray Train's views."""


_ASKED: list[Iterator[Any]] = []
"""What this process has asked for and not yet begun to train on."""


def asking() -> Any:
    """What Ray Train calls in each worker's process as soon as the group is complete, before torch's processes meet."""
    from ray.train.v2._internal.execution.callback import WorkerCallback  # a developers' interface of Ray's

    class Asking(WorkerCallback):
        def after_init_train_context(self) -> None:
            from cluster.enter import ask

            ask()

    return Asking()


def placeholder() -> Any:
    """What Ray Train is given as a dataset, for its views: `cluster.group.Dealing` deals the true one, and nobody calls this."""
    import ray.data

    return ray.data.range(1)


def ask() -> None:
    """Ask for this worker's packs, the first thing in its process that is not Ray's. The first is waited for by a thread."""
    collect_rarely()
    import ray.train

    from pipelines.late import tables_of

    def tables() -> Iterator[Any]:
        shard = ray.train.get_dataset_shard(DATASET)
        assert shard is not None  # Ray Train's type allows for runs without data
        yield from tables_of(shard)

    _ASKED[:] = [begun(tables())]


def train_worker(config: dict[str, Any]) -> None:
    """Train one stage, from its last checkpoint or its beginning, to its end or until the run is asked to stop.

    `config` holds the run's `Pulse` under "pulse" and a `StageJob` under "job", pickled: Ray Train's controller reads this too.
    """
    from cluster.worker import train

    train(pickle.loads(config["job"]), config["pulse"], _ASKED.pop())


def begun(items: Iterable[T]) -> Iterator[T]:
    """The same items; the first is waited for in another thread, from now on."""
    rest = iter(items)
    none: list[T] = []
    pool = ThreadPoolExecutor(1, thread_name_prefix="begun")
    first = pool.submit(lambda: next(([item] for item in rest), none))
    pool.shutdown(wait=False)

    def all_of_them() -> Iterator[T]:
        yield from first.result()
        yield from rest

    return all_of_them()
