"""Writes checkpoints beside training, which waits for next to nothing of it.

    saver = Saver(folder)
    outcomes = saver.save(engine.state(), at, manifest)      # on every rank; the step after it may begin
    saver.settle()                                           # before that step changes a weight
    outcomes = saver.wait()                                  # ends the one under way, and raises what failed

Weights and moments change at the end of a step and not before, so they are copied while the next one computes. A thread on each
rank copies, writes its shards and then meets the other ranks' threads in a process group of their own. Rank 0 writes
the manifest when all have written, and then takes old checkpoints away. A process that ends before leaves no manifest.
"""

from __future__ import annotations

import errno
import io
import queue
import shutil
import threading
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from cluster.checkpoint import (
    INDEX,
    MANIFEST,
    STATE,
    FileMark,
    Manifest,
    TrainState,
    attempts,
    digest,
    discard,
    dump_manifest,
    dump_state,
    folder_name,
    retain,
    step_and_token,
)
from cluster.shards import SavePlanner, ShardWriter, plain
from pipelines.place import Place
from pipelines.storage import StorageError
from pipelines.types import spec

Item = tuple[WriteItem, Tensor | io.BytesIO]

Written = tuple[bool, str | None, bool]
"""Whether a checkpoint is whole, what went wrong, and whether that was a process's own trouble."""


class SaveFailed(RuntimeError):
    """A checkpoint that had to be written was not."""


@spec
class Outcome:
    """How a save ended: `stall` seconds for which training stood still, in `save` and in `settle`; `seconds` until the manifest
    was there.

    `size` is the bytes of all ranks' tensors, which only rank 0 knows; the others have 0. `trouble` says what went wrong; a
    checkpoint may be `whole` in spite of it, when only older ones could not be taken away. `sick` says that it was a process's
    own trouble, and neither storage that did not answer nor a disk that was full.
    """

    folder: Place
    step: int
    whole: bool
    trouble: str | None
    sick: bool
    stall: float
    seconds: float
    size: int


@dataclass(slots=True)
class _Job:
    """One save under way."""

    folder: Place
    items: list[Item]
    copied: bool
    metadata: Metadata | None
    at: TrainState
    manifest: Manifest
    began: float
    ready: Any = None
    stall: float = 0.0
    seconds: float = 0.0
    settled: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)


class Saver:
    """Writes a stage's checkpoints to `folder` and keeps the `keep` newest whole ones, and those that `protected` names.

    Made by all ranks together. Copies take as much of the host's memory as a rank writes of a checkpoint, and are used again.
    `since` are seconds since the last one was begun, by this rank's monotonic clock.
    """

    def __init__(self, folder: Place, keep: int = 2, protected: Collection[str] = frozenset()) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep} checkpoints would leave a run with none; keep one at least")
        self.folder = folder
        self.keep = keep
        self.protected = protected
        together = dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if together else 0
        self.world = dist.get_world_size() if together else 1
        self.group: Any = dist.new_group(backend="gloo") if together else None
        self.last: _Job | None = None
        # Threads for all saves: a process without memory may hang where it starts another, and hold up all ranks.
        self.jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self.digests = ThreadPoolExecutor(2, thread_name_prefix="digest")
        threading.Thread(target=self._work, daemon=True, name="checkpoint").start()
        self.ended: list[Outcome] = []
        self.buffers: dict[MetadataIndex, Tensor] = {}
        self.local: SavePlan | None = None
        self.plan: SavePlan | None = None
        self.metadata: Metadata | None = None
        self.begun = time.monotonic()
        self.job: _Job | None = None
        self.broken: Exception | None = None

    @property
    def since(self) -> float:
        return time.monotonic() - self.begun

    def save(self, state: dict[str, Any], at: TrainState, manifest: Manifest, wait: bool = False) -> list[Outcome]:
        """Begin to write `state`, all ranks together; none of it may change before `settle` has returned.

        Waits for a save that is still under way. Returns how earlier ones ended; with `wait` this one too, and raises SaveFailed
        when it failed. Raises TypeError, on the rank that has it, for a value that a checkpoint cannot keep.
        """
        self.begun = time.monotonic()
        self._join()
        items = self._planned_items(state)
        folder = self.folder / folder_name(at.step, manifest.token)
        job = self.job = _Job(folder, items, not wait, self.metadata, at, manifest, self.begun)
        if torch.cuda.is_available():
            job.ready = torch.cuda.Event()
            job.ready.record()
        job.stall = self.since
        self.last = job
        self.jobs.put(job)
        return self.wait() if wait else self.poll()

    def settle(self) -> None:
        """Wait until the last save has a copy of all that it writes, so that the state may change.

        Raises RuntimeError where the ranks could not agree on a save: whoever of them goes on waits for ever.
        """
        if self.broken is not None:
            raise RuntimeError(f"the ranks lost one another over a checkpoint: {_words(self.broken)}") from self.broken
        if self.job is not None:
            began = time.monotonic()
            self.job.settled.wait()
            self.job.stall += time.monotonic() - began
            self.job = None

    def poll(self) -> list[Outcome]:
        """How saves ended since this was last asked, not waiting for any. Ranks may learn it at different times."""
        ended, self.ended = self.ended, []
        return ended

    def wait(self) -> list[Outcome]:
        """End the save that is under way, if any. Raises SaveFailed when the last one failed."""
        self._join()
        ended = self.poll()
        if ended and not ended[-1].whole:
            raise SaveFailed(str(ended[-1].trouble))
        return ended

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Let the save under way end, unless the process is being interrupted."""
        if kind is None or issubclass(kind, Exception):
            self._join()
        self.jobs.put(None)

    def _join(self) -> None:
        if self.last is not None:
            self.last.done.wait()
            self.last = None

    def _work(self) -> None:
        """The thread: one save after the other."""
        while (job := self.jobs.get()) is not None:
            try:
                self._run(job)
            finally:
                job.done.set()
        self.digests.shutdown(wait=False)

    def _planned_items(self, state: dict[str, Any]) -> list[Item]:
        """What this rank is to write of `state`, where it lies."""
        planner = SavePlanner()
        planner.set_up_planner(state, is_coordinator=self.rank == 0)
        plan = self._planned(planner)
        return [(item, planner.resolve_data(item)) for item in plan.items]

    def _copy(self, job: _Job) -> None:
        """Put copies in the host's memory in the place of the state's own tensors."""
        held: dict[MetadataIndex, Tensor] = {}
        with _beside(job.ready):
            for number, (item, value) in enumerate(job.items):
                if isinstance(value, Tensor):
                    held[item.index] = self._copied(item.index, plain(value))
                    job.items[number] = item, held[item.index]
        self.buffers = held

    def _planned(self, planner: SavePlanner) -> SavePlan:
        """Who writes what. Planning takes longer than a copy, and is done again only where a rank's state has another form."""
        local = planner.create_local_plan()
        changed = torch.tensor(int(local != self.local))
        if self.group is not None:
            dist.all_reduce(changed, op=dist.ReduceOp.MAX, group=self.group)
        if changed or self.plan is None:
            plans = self._gathered(local)
            final: list[SavePlan] = []
            if plans is not None:
                final, self.metadata = planner.create_global_plan(plans)
            plan: SavePlan = self._scattered(final)
            self.plan, self.local = plan, local
        return self.plan

    def _copied(self, index: MetadataIndex, tensor: Tensor) -> Tensor:
        buffer = self.buffers.get(index)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return buffer.copy_(tensor, non_blocking=True)

    def _run(self, job: _Job) -> None:
        """One save: whatever happens becomes words, the same on every rank."""
        failure: Exception | None = None
        try:
            if job.copied:
                self._copy(job)
        except Exception as error:
            failure = error
        job.settled.set()
        try:
            whole, trouble, sick = self._written(job, failure)
        except Exception as error:  # the group itself failed: the others wait for this rank, or this one for them
            whole, trouble, sick, self.broken = False, _words(error), False, error
        if trouble is not None:
            trouble = f"checkpoint {job.folder.name}: {trouble}"
        size = self._size(job.metadata)
        seconds = job.seconds or time.monotonic() - job.began
        self.ended.append(
            Outcome(
                folder=job.folder,
                step=job.at.step,
                whole=whole,
                trouble=trouble,
                sick=sick,
                stall=job.stall,
                seconds=seconds,
                size=size,
            )
        )

    def _written(self, job: _Job, failure: Exception | None) -> Written:
        """Write it, all ranks together, unless something failed before."""
        refused = self._told(self._cleared(job) if self.rank == 0 else None)
        if refused:
            return False, refused, False
        writer = ShardWriter(job.folder, self.rank, self.digests)
        results: list[WriteResult] = []
        try:
            results = [] if failure else writer.write(job.items)
        except Exception as error:
            failure = error
        everyone = self._gathered((results, None if failure is None else (_words(failure), _kind(failure))))
        return self._told(self._committed(job, writer, everyone) if everyone is not None else (False, None, False))

    def _cleared(self, job: _Job) -> str | None:
        """Rank 0 makes room for the new one, whose folder an earlier attempt may have left; why it may not, in words."""
        try:
            above = [place.name for place in attempts(self.folder) if _token(place) > job.manifest.token]
            if above:
                return (
                    f"{above[-1]} was written under a later token than this run's {job.manifest.token}: another controller has "
                    "taken the run over, and this one must end"
                )
            discard(job.folder)
        except Exception as error:
            return _words(error)
        return None

    def _committed(
        self, job: _Job, writer: ShardWriter, everyone: list[tuple[list[WriteResult], tuple[str, str] | None]]
    ) -> Written:
        """Rank 0 ends it: index, state, manifest, and then what is too old; or, where a rank failed, takes it away."""
        failures = [failure for _, failure in everyone if failure is not None]
        if not failures:
            try:
                self._manifest(job, writer, [results for results, _ in everyone])
                job.seconds = time.monotonic() - job.began
            except Exception as error:
                failures = [(_words(error), _kind(error))]
        if failures:
            return False, self._abandoned(job, failures), failures[0][1] == "other"
        try:
            retain(self.folder, self.keep, self.protected, job.manifest.token)
        except Exception as error:
            return True, f"is whole, but older ones could not be taken away: {_words(error)}", False
        return True, None, False

    def _manifest(self, job: _Job, writer: ShardWriter, results: list[list[WriteResult]]) -> None:
        assert job.metadata is not None
        writer.finish(job.metadata, results)
        state = dump_state(job.at)
        (job.folder / STATE).write(state)
        files = {name: FileMark(size=size) for name, size in writer.files.items()}
        files[INDEX] = replace(files[INDEX], digest=writer.index_digest)
        files[STATE] = FileMark(size=len(state), digest=digest(state))
        manifest = replace(
            job.manifest,
            step=job.at.step,
            progress=job.at.progress,
            tokens=job.at.tokens,
            time=time.time(),
            files=files,
        )
        (job.folder / MANIFEST).write(dump_manifest(manifest))

    def _abandoned(self, job: _Job, failures: list[tuple[str, str]]) -> str:
        """What went wrong, in words; the half-written folder is taken away unless storage itself does not answer."""
        words, kind = failures[0]
        if kind != "storage":
            with suppress(Exception):
                job.folder.remove()
        if kind == "full":
            free = shutil.disk_usage(self.folder.path).free if self.folder.local else 0
            words += (
                f"; {_bytes(free)} are free where {self.folder} lies, and a checkpoint takes {_bytes(self._size(job.metadata))}: "
                "make room there"
            )
        return f"was not written: {words}"

    def _size(self, metadata: Metadata | None) -> int:
        """Bytes of all tensors of a checkpoint; 0 on ranks that have not planned it."""
        stored = metadata.state_dict_metadata.values() if metadata else ()
        return sum(
            each.size.numel() * each.properties.dtype.itemsize
            for each in stored
            if isinstance(each, TensorStorageMetadata)
        )

    def _gathered(self, mine: Any) -> list[Any] | None:
        """Everyone's on rank 0, None on the others."""
        if self.group is None:
            return [mine]
        everyone: list[Any] | None = [None] * self.world if self.rank == 0 else None
        dist.gather_object(mine, everyone, group=self.group)
        return everyone

    def _scattered(self, parts: list[Any]) -> Any:
        if self.group is None:
            return parts[0]
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, parts or None, group=self.group)
        return mine[0]

    def _told(self, words: Any) -> Any:
        """What rank 0 says, on all ranks."""
        if self.group is None:
            return words
        said = [words]
        dist.broadcast_object_list(said, group=self.group)
        return said[0]


@contextmanager
def _beside(ready: Any) -> Iterator[None]:
    """On GPUs: copy on a stream of its own what was computed until `ready`, and be through at the end."""
    if ready is None:
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_event(ready)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def save(folder: Place, state: dict[str, Any], at: TrainState, manifest: Manifest, keep: int = 2) -> Place:
    """Write one checkpoint and wait for it, all ranks together. Raises SaveFailed."""
    with Saver(folder, keep) as saver:
        return saver.save(state, at, manifest, wait=True)[-1].folder


def _token(folder: Place) -> int:
    return (step_and_token(folder.name) or (0, 0))[1]


def _kind(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "full"
    return "storage" if isinstance(error, StorageError) else "other"


def _words(error: BaseException) -> str:
    return str(error) if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"


def _bytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
