"""The controller walks the stages: one Ray Train run each, found again by fingerprint, decided by the journal."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from cluster import checkpoint, quarantine
from cluster.fsdp import context_of
from cluster.journal import (
    Journal,
    RunFailed,
    RunFinished,
    RunStarted,
    RunState,
    StageFinished,
    StageStarted,
    write_atomically,
)
from cluster.metrics import Evaluation, RunFolder
from cluster.plan import meta_model
from cluster.preflight import refusals, this_machine
from cluster.schedule import planned_steps
from cluster.site import Site
from cluster.worker import DATASET, StageJob, failure_file, train_worker
from mllm.recipe import Recipe, dump, fingerprint, load
from mllm.tune import apply_tuning, describe
from pipelines.place import Place
from pipelines.types import Position
from pipelines.windows import Pools

RESTARTS = 3
"""Times that a stage's workers are started again after a crash before the run gives up."""


class RunError(RuntimeError):
    """The run cannot begin or go on, in words for a person."""


class Watcher(Protocol):
    """What wants to know of a run as it goes."""

    def stage_started(self, event: StageStarted) -> None: ...

    def stage_finished(self, event: StageFinished, before: Evaluation | None, after: Evaluation | None) -> None: ...


class Silent:
    """Watches and says nothing."""

    def stage_started(self, event: StageStarted) -> None: ...

    def stage_finished(self, event: StageFinished, before: Evaluation | None, after: Evaluation | None) -> None: ...


class Controller:
    """Trains a recipe on a site under a run's name, from wherever the journal says it is."""

    def __init__(self, recipe: Recipe, site: Site, name: str | None = None, watcher: Watcher | None = None) -> None:
        self.recipe = recipe
        self.site = site
        self.folder = RunFolder(Path(site.runs) / (name or recipe.name))
        self.journal = Journal(self.folder.root)
        self.watcher = watcher or Silent()
        self.versions = versions()

    def prepare(self) -> RunState:
        """Check everything that can be checked before a worker starts. Returns the run's state so far.

        Raises RunError when this machine cannot train it or the folder holds a run of another recipe, SiteError when corpora
        or tokenizer are not there.
        """
        if refused := refusals(self.recipe, self.site.workers, this_machine()):
            raise RunError(f"recipe {self.recipe.name!r} cannot be trained here: {'; '.join(refused)}")
        self._same_recipe()
        self.jobs = self._jobs()
        return self.journal.state()

    def run(self) -> RunState:
        """Train every stage that is not finished; call `prepare` first. Raises RunError when a stage fails."""
        state = self.journal.state()
        self.journal.append(
            RunStarted(time=time.time(), recipe=self.recipe.name, workers=self.site.workers, versions=self.versions)
        )
        stage = None
        try:
            for job in self.jobs:
                stage = job.stage.name
                if state.finished_stage(job.fingerprint) is None:
                    self._train(self._follow(job))
        except BaseException as error:
            words = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
            self.journal.append(RunFailed(time=time.time(), stage=stage, error=words))
            raise
        finally:
            quarantine.write_table(self.folder)
        return self.journal.state()

    def finish(self) -> None:
        self.journal.append(RunFinished(time=time.time()))

    def final_checkpoint(self) -> Place:
        """The last stage's last checkpoint. Raises RunError when the run has not got that far."""
        last = self.journal.state().finished_stages
        if not last:
            raise RunError(f"run {self.folder.root.name!r} has finished no stage yet")
        return Place(self.folder.root / last[-1].checkpoint)

    def _same_recipe(self) -> None:
        text = dump(self.recipe)
        if self.folder.recipe.is_file():
            before = load(self.folder.recipe.read_bytes())
            if _science(before) != _science(self.recipe):
                raise RunError(
                    f"run {self.folder.root.name!r} in {self.folder.root} was started with another recipe "
                    f"({first_difference(dump(before), text)}); go on with that one, or choose another name with --run"
                )
        write_atomically(self.folder.recipe, text.encode())

    def _jobs(self) -> list[StageJob]:
        jobs: list[StageJob] = []
        before = ""
        for stage in self.recipe.stages:
            before = fingerprint(self.recipe, stage, before)
            jobs.append(
                StageJob(
                    recipe=self.recipe,
                    stage=stage,
                    stream=self.site.stream(self.recipe, stage),
                    held_out=self.site.held_out(self.recipe, stage),
                    run=str(self.folder.root),
                    fingerprint=before,
                    previous=None,
                    weights=self.site.weights,
                    versions=self.versions,
                )
            )
        return jobs

    def _follow(self, job: StageJob) -> StageJob:
        """The job, with the weights and the evaluation of the stage before it."""
        at = [j.fingerprint for j in self.jobs].index(job.fingerprint)
        if at == 0:
            return job
        earlier = self.jobs[at - 1]
        done = self.journal.state().finished_stage(earlier.fingerprint)
        if done is None:
            raise RunError(f"stage {job.stage.name!r} follows {earlier.stage.name!r}, which is not finished")
        evaluation = self.folder.evaluation(earlier.stage.name, "after")
        if evaluation and self.folder.evaluation(job.stage.name, "before") is None:
            self.folder.write_evaluation(replace(evaluation, stage=job.stage.name, when="before"))
        return replace(job, previous=str(self.folder.root / done.checkpoint))

    def _train(self, job: StageJob) -> None:
        model = meta_model(self.recipe.model)
        apply_tuning(model, job.stage.tune)
        started = StageStarted(
            time=time.time(),
            stage=job.stage.name,
            fingerprint=job.fingerprint,
            steps=planned_steps(job.stage),
            parts=tuple(describe(model, job.stage.tune)),
        )
        self._same_shards(job)
        self.journal.append(started)
        self.watcher.stage_started(started)
        last = job.resume_from()
        if last is None or not checkpoint.read_manifest(last).final or self._unevaluated(job):
            self._fit(job)
            last = job.resume_from()
        if last is None or not checkpoint.read_manifest(last).final:
            raise RunError(f"stage {job.stage.name!r} ended without its last checkpoint; see {self.folder.logs}")
        finished = StageFinished(
            time=time.time(),
            stage=job.stage.name,
            fingerprint=job.fingerprint,
            checkpoint=last.under(Place(self.folder.root)),
        )
        self.journal.append(finished)
        name = job.stage.name
        self.watcher.stage_finished(
            finished, self.folder.evaluation(name, "before"), self.folder.evaluation(name, "after")
        )

    def _same_shards(self, job: StageJob) -> None:
        """Note what the stage reads when it begins; when it goes on, name the shards that are not what they were."""
        now = {
            f"{s.manifest.corpus}/{shard.name}": shard.digest
            for s in job.stream.order.sources
            for shard in s.manifest.shards
        }
        file = self.folder.root / "shards" / f"{job.stage.name}.json"
        if not checkpoint.checkpoints(job.checkpoints) or not file.is_file():
            write_atomically(file, json.dumps(now, indent=1).encode())
            return
        before: dict[str, str] = json.loads(file.read_bytes())
        changes = [f"{name} is new" for name in sorted(now.keys() - before.keys())]
        changes += [f"{name} is gone" for name in sorted(before.keys() - now.keys())]
        changes += [
            f"{name} has other contents" for name in sorted(now.keys() & before.keys()) if now[name] != before[name]
        ]
        if changes:
            raise RunError(
                f"stage {job.stage.name!r} began with other data: {'; '.join(changes[:5])}"
                + (f"; and {len(changes) - 5} more" if len(changes) > 5 else "")
                + "; put them back, or train under another --run"
            )

    def _unevaluated(self, job: StageJob) -> bool:
        return job.held_out is not None and self.folder.evaluation(job.stage.name, "after") is None

    def _fit(self, job: StageJob) -> None:
        """One Ray Train run. Ray restarts a crashed group; each start asks `packs_from_here` for the data anew."""
        import ray.train
        import torch
        from ray.train.torch import TorchConfig, TorchTrainer

        from cluster.local import divert_ray_logging

        failure_file(self.folder).unlink(missing_ok=True)
        gpu = torch.cuda.is_available()
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"job": job},
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            datasets={DATASET: placeholder},
            dataset_config=dealing(job, self.site.pools),
            scaling_config=ray.train.ScalingConfig(num_workers=self.site.workers, use_gpu=gpu),
            run_config=ray.train.RunConfig(
                name=job.stage.name,
                storage_path=str(self.folder.root / "checkpoints"),
                failure_config=ray.train.FailureConfig(max_failures=RESTARTS),
            ),
        )
        divert_ray_logging()
        try:
            _interruptibly(trainer.fit)
        except Exception as error:
            raise RunError(f"stage {job.stage.name!r} failed: {_root(error)}; see {self.folder.logs}") from error
        if failure_file(self.folder).is_file():
            raise RunError(f"stage {job.stage.name!r}: {failure_file(self.folder).read_text()}")


def _interruptibly(call: Callable[[], object]) -> None:
    """Make `call` in a thread, so that Ctrl-C reaches this one: Ray Train would take the signal and end the process."""
    raised: list[BaseException] = []

    def guarded() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=guarded, daemon=True, name="fit")
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if raised:
        raise raised[0]


def dealing(job: StageJob, pools: Pools) -> Any:
    """Ray Train's data configuration, changed to deal the stage's packs from its last checkpoint on.

    Ray Train asks it anew at every start of a worker group, with the group's size. Its own split is `equal=True`, which
    drops rows, and knows no position.
    """
    from ray.train import DataConfig

    class Dealing(DataConfig):
        def configure(self, datasets: Any, world_size: int, *_: Any, **__: Any) -> list[dict[str, Any]]:  # noqa: ARG002 -- Ray's
            from cluster.local import divert_ray_logging
            from pipelines.stream import dataset

            divert_ray_logging()
            resumed = job.resume_from()
            start = checkpoint.read_state(resumed).position if resumed else Position()
            hands = dataset(job.stream, start, job.stream.windows, pools, world_size, context_of(job.stage.parallel))
            return [{DATASET: split} for split in hands.streaming_split(world_size, equal=False)]

    return Dealing()


def placeholder() -> Any:
    """What Ray Train must be given as a dataset: `dealing` puts the true one in its place once the group's size is known."""
    import ray.data

    return ray.data.range(1)


def versions() -> dict[str, str]:
    """What the run was made with."""
    packages = ("mllm", "torch", "transformers", "ray", "numpy", "tokenizers")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def first_difference(before: str, after: str) -> str:
    """The first line in which two recipes differ."""
    for old, new in zip(before.splitlines(), after.splitlines(), strict=False):
        if old != new:
            return f"it says {old.strip().rstrip(',')} and now {new.strip().rstrip(',')}"
    return "one has more fields"


def _science(recipe: Recipe) -> str:
    """The recipe without what changes nothing of the result."""
    return dump(
        replace(recipe, stages=tuple(replace(stage, save_every=1, save_minutes=None) for stage in recipe.stages))
    )


def _root(error: BaseException) -> str:
    """The words of the innermost cause: Ray wraps a worker's exception several times over."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, cause = next(iter(failures.items()))
        return f"rank {rank}: {_root(cause)}"
    inner = error.__cause__ or getattr(error, "cause", None)
    if isinstance(inner, BaseException) and inner is not error:
        return _root(inner)
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
