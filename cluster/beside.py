"""Work on committed checkpoints beside training: evaluations while a stage goes on, and a stage's weights as files of parts.

Tasks do it where the cluster has a CPU to spare, and wait where it has none; nothing is held between them, which a larger group
might want. Training waits for them only at the end of the run. Who reads a checkpoint changes nothing of what is learned, so it
may fail: that is told, and nothing else happens.

The run's driver imports this file before its first step, and what reads tensors takes long to import.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cluster import checkpoint
from cluster.callbacks import root_of
from cluster.journal import Fault, GateJudged
from cluster.policy import gate_values
from pipelines import storage, trust
from pipelines.place import Place

if TYPE_CHECKING:
    from cluster.job import StageJob
    from cluster.metrics import Evaluation

LOOK = 5.0
"""Seconds between two looks for a checkpoint to evaluate."""


def evaluate(job: StageJob, folder: Place, step: int) -> Evaluation:
    """Score the checkpoint on what the stage holds out, have it answer the same questions as before the stage, and keep both
    under its step. Pictures are left out: the evaluation before the stage has them.
    """
    from dataclasses import replace

    import torch

    from cluster import loading
    from cluster.engines import alone, build_engine
    from cluster.scoring import evaluation_of
    from mllm.recipe import FSDP

    assert job.held_out
    storage.use(job.stream.storage)
    trust.use(job.stream.trust_remote_code)
    device = torch.device("cpu")  # GPUs are the trainers'
    how = replace(job.stage, parallel=FSDP(dtype=job.stage.parallel.dtype), ema=None)
    with alone():
        model = loading.read_model(job.recipe, job.stage, folder)
        engine = build_engine(model, how, len(job.stage.mixture), device)
        found = evaluation_of(engine, job.held_out, job.recipe, job.stage.name, "during")
    found = replace(found, step=step, answers=tuple(replace(answer, image="") for answer in found.answers))
    job.folder.write_evaluation(found)
    return found


def parts(job: StageJob, folder: Place, out: Place) -> None:
    """Write the stage's weights, adapters merged, as safetensors. In a process of its own, which stands back behind all others:
    the next stage begins meanwhile.
    """
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    from cluster import loading
    from cluster.parts import write_parts

    storage.use(job.stream.storage)
    trust.use(job.stream.trust_remote_code)
    write_parts(out, loading.read_model(job.recipe, job.stage, folder).state_dict())


class Beside:
    """The controller's side: starts tasks, and keeps those that write. `say` hears what came of evaluations."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self.say = say
        self.writing: dict[Any, StageJob] = {}

    def finished(self, job: StageJob, last: Place) -> None:
        """Have the weights of a finished stage written as parts, if they are not there."""
        from cluster.parts import INDEX

        out = job.folder.parts(job.stage.name)
        if not (out / INDEX).is_file():
            self.writing[_task(parts, max_calls=1).remote(job, last, out)] = job

    def wait(self) -> None:
        """Wait until all parts are written; those that could not be are told."""
        import ray

        for task, job in self.writing.items():
            try:
                ray.get(task)
            except Exception as error:
                _failed(job, f"the weights of {job.stage.name!r} were not written as parts", error)
        self.writing = {}

    def watching(self, job: StageJob) -> Evaluations:
        """Evaluates the stage's checkpoints as long as it is entered."""
        return Evaluations(self, job)


def _task(work: Callable[..., Any], **options: Any) -> Any:
    import ray

    return ray.remote(num_cpus=1, max_retries=2, **options)(work)


class Evaluations:
    """Has the newest checkpoint evaluated whenever `evaluate_every` steps have gone by since the last that was.

    What comes of it is judged by the entries of the stages that follow, so that one knows long before whether they will open.
    """

    def __init__(self, beside: Beside, job: StageJob) -> None:
        self.beside = beside
        self.job = job
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True, name="evaluations")

    def __enter__(self) -> Evaluations:
        if self.job.stage.evaluate_every and self.job.held_out:
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()

    def _look(self) -> None:
        every = self.job.stage.evaluate_every
        assert every
        done = max((each.step or 0 for each in self.job.folder.evaluations(self.job.stage.name)), default=0)
        while not self.over.wait(LOOK):
            try:
                there = checkpoint.checkpoints(self.job.checkpoints)
                manifest = checkpoint.read_manifest(there[-1]) if there else None
                if manifest is None or manifest.final or manifest.step < done + every:
                    continue  # the last one is evaluated by the workers, together
                done = manifest.step
                self._evaluate(there[-1], manifest.step, manifest.tokens)
            except Exception as error:
                if not self.over.is_set():
                    _failed(self.job, "a checkpoint was not evaluated", error)

    def _evaluate(self, folder: Place, step: int, tokens: int) -> None:
        import ray

        checkpoint.hold(self.job.checkpoints, folder.name)
        try:
            found: Evaluation = ray.get(_task(evaluate).remote(self.job, folder, step))
        finally:
            checkpoint.hold(self.job.checkpoints, "")
        weight = sum(score.tokens for score in found.scores)
        loss = sum(score.loss * score.tokens for score in found.scores) / max(1, weight)
        self.beside.say(f"{self.job.stage.name}: held-out loss {loss:.4f} after step {step:,}")
        for stage in self.job.recipe.stages:
            before = self.job.recipe.before(stage)
            if stage.entry and before and before.name == self.job.stage.name:
                for gate, value, is_open in gate_values(stage.entry, found, tokens):
                    words = f"{gate}, after step {step:,}"
                    event = GateJudged(time=time.time(), stage=stage.name, gate=words, value=value, open=is_open)
                    self.job.journal.append(event)


def _failed(job: StageJob, what: str, error: Exception) -> None:
    detail = f"{what}: {root_of(error)}"
    job.journal.append(Fault(time=time.time(), what="beside", stage=job.stage.name, step=-1, detail=detail))
