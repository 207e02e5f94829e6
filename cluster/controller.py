"""The controller walks the stages: one Ray Train run each, found again by fingerprint, decided by the journal.

Whatever it does it writes down first, under the token of its lease, and doing it again does no harm: a controller that is killed
is replaced by another one, here or elsewhere, which reads the journal and goes on.
"""

from __future__ import annotations

import json
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Protocol

from cluster import checkpoint, quarantine
from cluster.beside import Beside
from cluster.callbacks import Stage, failures, resizing, root_of
from cluster.dealer import dumped, foresee, start_dealer
from cluster.enter import DATASET, asking, placeholder, train_worker
from cluster.failure import Failures
from cluster.job import StageJob
from cluster.journal import (
    Decision,
    Fault,
    Fenced,
    GateJudged,
    Journal,
    RunFailed,
    RunFinished,
    RunStarted,
    RunState,
    RunStopped,
    StageFinished,
    StageStarted,
)
from cluster.lease import Held, Lease
from cluster.leaving import AFTER, Stopped, end_within
from cluster.metrics import Evaluation, RunFolder
from cluster.policy import Standing, gate_values
from cluster.preflight import refusals, this_machine, untrusted
from cluster.profiling import Profiles
from cluster.pulse import Watcher as PulseWatcher
from cluster.pulse import start_pulse
from cluster.reference import with_reference
from cluster.schedule import planned_steps
from cluster.site import Site
from cluster.supervisor import is_driver
from cluster.versions import versions
from mllm.recipe import Recipe, dump, fingerprint, load
from pipelines.place import Place
from pipelines.storage import StorageError

LOST = 4
"""Times that Ray's own controller may be lost at one checkpoint before the run gives up."""


class RunError(RuntimeError):
    """The run cannot begin or go on, in words for a person."""


class ClusterLost(RuntimeError):
    """The Ray cluster or the storage is gone, or this process's way to it: another process may find it again."""


class Watcher(Protocol):
    """What wants to know of a run as it goes."""

    def say(self, text: str) -> None: ...

    def stage_started(self, event: StageStarted) -> None: ...

    def stage_finished(self, event: StageFinished, before: Evaluation | None, after: Evaluation | None) -> None: ...


class Silent:
    """Watches and says nothing."""

    def say(self, text: str) -> None: ...

    def stage_started(self, event: StageStarted) -> None: ...

    def stage_finished(self, event: StageFinished, before: Evaluation | None, after: Evaluation | None) -> None: ...


class Controller:
    """Trains a recipe on a site under a run's name, from wherever the journal says it is."""

    def __init__(self, recipe: Recipe, site: Site, name: str | None = None, watcher: Watcher | None = None) -> None:
        self.recipe = recipe
        self.site = site
        self.folder = RunFolder(f"{site.runs}/{name or recipe.name}")
        self.journal = Journal(self.folder.root)
        self.watcher = watcher or Silent()
        self.versions = versions()
        self.lease: Lease | None = None
        self.dealer: Any = None
        self.beside = Beside(self.watcher.say)
        self.fingerprints: dict[str, str] = {}
        for stage in recipe.stages:
            before = recipe.before(stage)
            self.fingerprints[stage.name] = fingerprint(recipe, stage, self.fingerprints[before.name] if before else "")

    def prepare(self) -> RunState:
        """Check everything that can be checked before a worker starts; nothing is written. Returns the run's state so far.

        Raises RunError when this machine cannot train it or the folder holds a run of another recipe, SiteError when corpora
        or tokenizer are not there.
        """
        fewest, most = self.site.world
        machine = this_machine(self.site.gpus)
        worlds = range(fewest, most + 1)
        refused = dict.fromkeys(why for world in worlds for why in refusals(self.recipe, world, machine))
        refused |= dict.fromkeys(untrusted(self.recipe, self.site))
        if refused:
            raise RunError(f"recipe {self.recipe.name!r} cannot be trained here: {'; '.join(refused)}")
        state = self.journal.state()
        self._same_recipe(state)
        return state

    @contextmanager
    def leased(self) -> Iterator[None]:
        """Have the right to write the run as long as this lasts. Raises RunError where another controller has it."""
        try:
            self.lease = Lease(self.folder.root, waiting=self.watcher.say)
        except Held as error:
            raise RunError(str(error)) from error
        self.journal = self.lease.journal
        try:
            yield
        finally:
            self.lease.release()

    def run(self) -> RunState:
        """Train every stage that is not finished, within `leased`. Raises RunError when a stage fails, Stopped when asked to."""
        assert self.lease, "take the lease first"
        self.dealer = start_dealer()  # its process starts while this one plans
        self.folder.recipe.write(dump(self.recipe).encode())
        self.folder.name_stages(self.fingerprints)
        self.jobs = {stage.name: self._job(stage.name) for stage in self.recipe.stages}
        state = self.journal.state()
        self.journal.append(
            RunStarted(time=time.time(), recipe=self.recipe.name, workers=self.site.world, versions=self.versions)
        )
        stage = None
        try:
            for job in self.jobs.values():
                stage = job.stage.name
                done = state.finished_stage(job.fingerprint)
                if done is None:
                    done = self._train(self._follow(job))
                self.beside.finished(job, self.folder.root / done.checkpoint)
            self.beside.wait()
        except Fenced:
            raise
        except (Stopped, KeyboardInterrupt) as error:
            self.journal.append(RunStopped(time=time.time(), stage=stage, why=str(error) or "interrupted"))
            raise
        except StorageError as error:
            raise ClusterLost(str(error)) from error  # the run's own storage: another process may find it answering
        except ClusterLost:
            raise
        except BaseException as error:
            words = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
            self.journal.append(RunFailed(time=time.time(), stage=stage, error=words))
            raise
        finally:
            if not self.lease.lost.is_set():
                with suppress(StorageError):
                    quarantine.write_table(self.folder)
        return self.journal.state()

    def finish(self) -> None:
        self.journal.append(RunFinished(time=time.time()))

    def final_checkpoint(self) -> Place:
        """The last stage's last checkpoint. Raises RunError when the run has not got that far."""
        last = self.journal.state().finished_stages
        if not last:
            raise RunError(f"run {self.folder.name!r} has finished no stage yet")
        return self.folder.root / last[-1].checkpoint

    def _same_recipe(self, state: RunState) -> None:
        """Refuse a recipe under which nothing of the run's work would be left; of another, say what is trained again."""
        if not self.folder.recipe.is_file():
            return
        before = load(self.folder.recipe.read_bytes())
        if _science(before) == _science(self.recipe):
            return
        begun = {event.stage: event.fingerprint for event in state.started_stages}
        kept = [name for name, mine in self.fingerprints.items() if begun.get(name) == mine]
        what = first_difference(_science(before), _science(self.recipe))
        if begun and not kept:
            raise RunError(
                f"run {self.folder.name!r} in {self.folder.root} was started with another recipe "
                f"({what}); go on with that one, or choose another name with --run"
            )
        again = [name for name in begun if name in self.fingerprints and name not in kept]
        self.watcher.say(
            f"the recipe was changed ({what}): {', '.join(kept) or 'nothing'} stays as it is, "
            f"{', '.join(again) or 'nothing that was begun'} is trained again"
        )

    def _job(self, name: str) -> StageJob:
        assert self.lease
        stage = self.recipe.stage(name)
        return StageJob(
            recipe=self.recipe,
            stage=stage,
            stream=self.site.stream(self.recipe, stage),
            held_out=self.site.held_out(self.recipe, stage),
            run=str(self.folder.root),
            token=self.lease.token,
            watch=self.site.watch,
            fingerprint=self.fingerprints[name],
            previous=None,
            weights=self.site.weights,
            versions=self.versions,
        )

    def _follow(self, job: StageJob) -> StageJob:
        """The job, with the weights and the evaluation of the stage before it. Raises RunError where its entry is shut."""
        before = self.recipe.before(job.stage)
        if before is None:
            return job
        done = self.journal.state().finished_stage(self.fingerprints[before.name])
        if done is None:
            raise RunError(f"stage {job.stage.name!r} follows {before.name!r}, which is not finished")
        evaluation = self.folder.evaluation(before.name, "after")
        if evaluation and self.folder.evaluation(job.stage.name, "before") is None:
            self.folder.write_evaluation(replace(evaluation, stage=job.stage.name, when="before"))
        last = self.folder.root / done.checkpoint
        self._enter(job, before.name, evaluation, checkpoint.read_state(last).tokens)
        return with_reference(replace(job, previous=str(last)))

    def _enter(self, job: StageJob, before: str, evaluation: Evaluation | None, tokens: int) -> None:
        stage = job.stage
        for words, value, is_open in gate_values(stage.entry, evaluation, tokens) if stage.entry else ():
            self.journal.append(GateJudged(time=time.time(), stage=stage.name, gate=words, value=value, open=is_open))
            if not is_open:
                raise RunError(
                    f"stage {stage.name!r} does not begin: its entry asks for {words}, and {before!r} came to {value:g}; train "
                    f"{before!r} longer or better, or change stages.{stage.name}.entry"
                )

    def _train(self, job: StageJob) -> StageFinished:
        # What it trains the workers tell, who build the model: this process need not import what it is made of.
        steps = planned_steps(job.stage)
        started = StageStarted(time=time.time(), stage=job.stage.name, fingerprint=job.fingerprint, steps=steps)
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
            checkpoint=last.under(self.folder.root),
        )
        self.journal.append(finished)
        name = job.stage.name
        self.watcher.stage_finished(
            finished, self.folder.evaluation(name, "before"), self.folder.evaluation(name, "after")
        )
        return finished

    def _same_shards(self, job: StageJob) -> None:
        """Note what the stage reads when it begins; when it goes on, name the shards that are not what they were."""
        now = {
            f"{s.manifest.corpus}/{shard.name}": shard.digest
            for s in job.stream.order.sources
            for shard in s.manifest.shards
        }
        file = self.folder.root / "shards" / f"{self.folder.key(job.stage.name)}.json"
        if not checkpoint.checkpoints(job.checkpoints) or not file.is_file():
            file.write(json.dumps(now, indent=1).encode())
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
        """Train the stage; begin again where Ray's own controller was lost, which Ray does not do. Raises what `run` does."""
        written = Failures(self.folder)
        written.clear()
        lost: dict[str, int] = {}
        while True:
            try:
                self._fit_once(job)
                break
            except (Stopped, KeyboardInterrupt, Fenced):
                raise
            except Exception as error:
                words = root_of(error)
                if not _of_the_cluster(error):
                    raise RunError(f"stage {job.stage.name!r} failed: {words}; see {self.folder.logs}") from error
                self._fault("controller", job.stage.name, words)
                if not _cluster_answers():
                    raise ClusterLost(f"the Ray cluster does not answer any more: {words}") from error
                at = str(job.resume_from())
                lost[at] = lost.get(at, 0) + 1
                if lost[at] > LOST:
                    raise RunError(
                        f"stage {job.stage.name!r} failed: Ray's controller was lost {lost[at]} times at {at}: {words}"
                    ) from error
                self.journal.append(
                    Decision(time=time.time(), what="restart", stage=job.stage.name, why="Ray's controller was lost")
                )
                time.sleep(2.0 ** (lost[at] - 1) - 1)
        if failure := written.found():
            raise RunError(f"stage {job.stage.name!r}: {failure}")

    def _fit_once(self, job: StageJob) -> None:
        """One Ray Train run. Ray restarts a crashed group; each start asks the dealer for the data anew."""
        import ray.train
        import torch

        from cluster.group import Dealing, Meeting, Trainer
        from cluster.local import divert_ray_logging

        gpu = torch.cuda.is_available() if self.site.gpus is None else self.site.gpus
        pulse = start_pulse()
        fewest, most = self.site.world
        told = Stage(name=job.stage.name, run=job.run, token=job.token, storage=job.stream.storage)
        dealt = dumped(job, self.site.pools, 0 if gpu else 1)
        foresee(self.dealer, dealt, most)
        called: list[Any] = [Dealing(self.dealer, dealt), failures(told, pulse), resizing(told, pulse), asking()]
        trainer = Trainer(
            train_worker,
            train_loop_config={"job": pickle.dumps(job), "pulse": pulse},
            backend_config=Meeting(backend="nccl" if gpu else "gloo"),
            datasets={DATASET: placeholder},
            scaling_config=ray.train.ScalingConfig(
                num_workers=most if fewest == most else (fewest, most),
                use_gpu=gpu,
                elastic_resize_monitor_interval_s=RESIZE,
            ),
            run_config=ray.train.RunConfig(
                name=f"{self.folder.name}-{job.stage.name}",
                # Ray's own notes of the run: nothing here reads them, so they need not outlive the cluster.
                storage_path=str(Path(gettempdir()) / "mllm" / "ray"),
                failure_config=ray.train.FailureConfig(max_failures=-1),  # `after_start` says when it is enough
                callbacks=called,
            ),
        )
        divert_ray_logging()

        def hung(rank: Standing, words: str, ended: bool) -> None:
            self._fault("hang", job.stage.name, words, rank.step, rank.rank)
            if ended:
                why = f"rank {rank.rank} is ended, and the group begins again from the last checkpoint"
                self.journal.append(Decision(time=time.time(), what="restart", stage=job.stage.name, why=why))

        with (
            PulseWatcher(pulse, self.site.watch, hung, self.dealer.ready.remote) as watcher,
            self.beside.watching(job),
            Profiles(self.folder, pulse),
        ):
            self._obediently(trainer.fit, job, pulse, watcher)

    def _obediently(self, fit: Callable[[], object], job: StageJob, pulse: Any, watcher: PulseWatcher) -> None:
        """Call `fit` in a thread and do what this process is asked meanwhile. Ray Train would take the signals for itself.

        SIGTERM and the first Ctrl-C save and stop, within `notice` seconds; the second Ctrl-C stops at once. A driver that hangs
        all the same is ended (`cluster/leaving.py`). Raises Fenced when another controller has taken the run over, Stopped,
        KeyboardInterrupt, or what `fit`, the watcher or the lease met.
        """
        raised: list[BaseException] = []

        def guarded() -> None:
            try:
                fit()
            except BaseException as error:
                raised.append(error)

        thread = threading.Thread(target=guarded, daemon=True, name="fit")
        thread.start()
        with _signals() as asked:
            since: float | None = None
            while thread.is_alive():
                thread.join(0.2)
                if self.lease and self.lease.lost.is_set():
                    self.journal.events()
                    self.journal.check()
                if error := watcher.error or (self.lease and self.lease.error):
                    raise error
                if asked and since is None:
                    since = time.monotonic()
                    if is_driver():  # else the process is not this run's alone
                        end_within(self.site.watch.notice + AFTER, self.folder.logs)
                    self.watcher.say(f"{asked[0]}: saving, then stopping (Ctrl-C again stops at once)")
                    why = f"{asked[0]}: to be gone within {self.site.watch.notice:.0f} s"
                    self.journal.append(Decision(time=time.time(), what="save_and_stop", stage=job.stage.name, why=why))
                    pulse.ask.remote("save_and_stop")
                late = since is not None and time.monotonic() - since > self.site.watch.notice
                # Ray Train waits some seconds for workers to end that have nothing more to do; there is no need to.
                saved = since is not None and _all_left(pulse)
                if late or saved or asked[1:].count("Ctrl-C"):
                    break
        if asked:
            if asked[-1] == "Ctrl-C":
                raise KeyboardInterrupt("Ctrl-C")
            raise Stopped(asked[0])
        if raised:
            raise raised[0]

    def _fault(self, what: Any, stage: str, detail: str, step: int = -1, rank: int | None = None) -> None:
        self.journal.append(Fault(time=time.time(), what=what, stage=stage, step=step, detail=detail, rank=rank))


RESIZE = 5.0
"""Seconds between two looks whether there are more workers to be had, or fewer."""


@contextmanager
def _signals() -> Iterator[list[str]]:
    """The signals that asked this process to stop, in order, as a list that grows. Elsewhere than in the main thread: none."""
    asked: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    names = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
    before = {number: signal.signal(number, lambda n, _: asked.append(names[signal.Signals(n)])) for number in names}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _all_left(pulse: Any) -> bool:
    """Whether no rank is at work; those that were asked to stop have saved before they leave.

    A cluster that does not answer soon says nothing: who asks has a deadline of its own to keep.
    """
    import ray
    import ray.exceptions

    try:
        return not ray.get(pulse.look.remote(), timeout=1)[0]
    except (ray.exceptions.RayError, ConnectionError, TimeoutError):
        return False


def _of_the_cluster(error: BaseException | None) -> bool:
    """Whether the error tells of Ray's processes, or of storage, and not of what they were asked to do."""
    import ray.exceptions as of_ray

    kinds = (of_ray.ActorDiedError, of_ray.RaySystemError, of_ray.NodeDiedError, of_ray.LocalRayletDiedError)
    more = (
        of_ray.WorkerCrashedError,
        of_ray.OwnerDiedError,
        of_ray.ActorUnavailableError,
        ConnectionError,
        StorageError,
    )
    while error is not None:
        if isinstance(error, (*kinds, *more)) or type(error).__name__ == "RpcError":
            return True
        error = getattr(error, "controller_failure", None) or error.__cause__  # Ray's word for what its controller met
    return False


def _cluster_answers() -> bool:
    """Whether this process still reaches its cluster."""
    import ray

    answered: list[Any] = []
    asking = threading.Thread(target=lambda: answered.append(ray.nodes()), daemon=True)
    asking.start()
    asking.join(10)
    return bool(answered and answered[0])


def first_difference(before: str, after: str) -> str:
    """The first line in which two recipes differ."""
    for old, new in zip(before.splitlines(), after.splitlines(), strict=False):
        if old != new:
            return f"it says {old.strip().rstrip(',')} and now {new.strip().rstrip(',')}"
    return "one has more fields"


def _science(recipe: Recipe) -> str:
    """The recipe without what changes nothing of the result."""
    free = {"save_every": 1, "save_minutes": None, "evaluate_every": None, "entry": None}
    return dump(replace(recipe, paper="", stages=tuple(replace(stage, **free) for stage in recipe.stages)))
