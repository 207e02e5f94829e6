"""Two ranks that train stage after stage by the real loop, without Ray Train and Ray Data.

They are actors that stay, so that a stage costs its steps and no imports. What Ray Train does for each group of workers is done
here: a process group of its own, a pulse, and hands of packs that are dealt in turns.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.exceptions
import torch.distributed as dist

from cluster import worker
from cluster.failure import Failures
from cluster.job import StageJob
from cluster.pulse import start_pulse
from cluster.standing import stacks
from pipelines.stream import from_table, hands, portions, to_table
from pipelines.types import Sample
from pipelines.windows import PackWindows, Plan, Stream

WORLD = 2

DEADLINE = 60.0
"""Seconds within which a stage must be through: ranks wait for each other for ever if one of them skips a collective."""

GRACE = 5.0
"""Seconds for the other rank, once one has failed."""

Groups = Sequence[tuple[Sample, ...]]
"""Samples of each pack of a window."""


class Rank:
    """One of them: an actor."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        os.environ["LOCAL_WORLD_SIZE"] = str(WORLD)
        worker.DRAIN = math.inf  # only Ray Train could tell of nodes that are about to be taken away

    def pid(self) -> int:
        return os.getpid()

    def train(self, job: bytes, pulse: Any, tables: list[pa.Table], meeting: str) -> None:
        """Train a stage, as a worker of a group does."""
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=self.rank, world_size=WORLD)
        try:
            worker.train(pickle.loads(job), pulse, tables)
        finally:
            dist.destroy_process_group()


class Ranks:
    """Both, started when they are first asked, and anew after a failure."""

    def __init__(self) -> None:
        self.pulse: Any = None
        self.actors: list[Any] = []
        self.pids: list[int] = []

    def train(self, job: StageJob, tables: Sequence[list[pa.Table]]) -> None:
        """Train a stage on each rank's `tables`. Raises AssertionError: what a rank raised, or where it stands if it hangs."""
        self._begin()
        data = pickle.dumps(job)
        with TemporaryDirectory() as folder:
            running = [
                actor.train.remote(data, self.pulse, mine, f"{folder}/meeting")
                for actor, mine in zip(self.actors, tables, strict=True)
            ]
            first, others = ray.wait(running, timeout=DEADLINE)
            failed = any(_raised(each) for each in first)
            ray.wait(others, num_returns=len(others), timeout=GRACE if failed else DEADLINE)
            said = [words for rank, each in enumerate(running) if (words := self._trouble(rank, each))]
        if said:
            self.end()
        if Failures(job.folder).found():  # what no other group could mend, a worker writes down and does not raise
            said += [log.read_text() for log in sorted(job.folder.logs.glob("failure-*.txt"))]
        assert not said, f"{job.recipe.name}, stage {job.stage.name}:\n" + "\n".join(said)

    def end(self) -> None:
        for actor in (*self.actors, self.pulse):
            if actor is not None:
                ray.kill(actor)
        self.actors, self.pulse = [], None

    def _begin(self) -> None:
        if not self.actors:
            self.pulse = start_pulse()
            self.actors = [ray.remote(Rank).options(num_cpus=0).remote(rank) for rank in range(WORLD)]
            self.pids = ray.get([actor.pid.remote() for actor in self.actors])

    def _trouble(self, rank: int, running: ray.ObjectRef) -> str:
        """Why a rank has not come to its end; an empty word where it has."""
        if not ray.wait([running], timeout=0)[0]:
            return f"rank {rank} hangs:\n{stacks(self.pids[rank])}"
        return _raised(running) and f"rank {rank}: {_raised(running)}"


def _raised(ended: ray.ObjectRef) -> str:
    try:
        ray.get(ended)
    except ray.exceptions.RayError as error:
        return str(error)
    return ""


def dealt(stream: Stream, windows: Sequence[Groups]) -> list[list[pa.Table]]:
    """Each rank's hands of windows of these packs, as preprocessors make them of a stream's, and annotators change them."""
    make = PackWindows(stream)
    tables = [
        table
        for k, groups in enumerate(windows)
        for portion in portions(Plan(window=k, groups=tuple(groups), dropped=()), stream, 0, WORLD)
        for table in _annotated(make, hands(make, portion))
    ]
    return [tables[rank::WORLD] for rank in range(WORLD)]


def _annotated(make: PackWindows, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    for table in tables:
        hand = from_table(table, 0)
        packs = tuple(map(make.annotated, hand.packs))
        yield to_table(replace(hand, packs=packs), np.concatenate([pack.tiles for pack in packs]) if packs else None)
