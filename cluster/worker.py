"""The one training loop. Ray Train runs it on every rank; it does the same on one laptop core and on 512 GPUs."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist

from cluster import checkpoint, gauges, loading
from cluster.checkpoint import CorruptCheckpoint, Manifest, PassedOver, TrainState
from cluster.deal import Deal, Step
from cluster.engines import Engine, StepReport, build_engine, local
from cluster.failure import Failures
from cluster.job import Leave, StageJob, StopRun
from cluster.journal import Decision, Fault, FaultKind, Fenced, GroupStarted, PartsDescribed
from cluster.phases import PHASES, Paces, Phases
from cluster.policy import Verdict, after_start, judge, stragglers
from cluster.profiling import Profiler
from cluster.pulse import Beats
from cluster.recording import meter_of, record_step, tally_of
from cluster.saver import SaveFailed, Saver
from cluster.schedule import due, learning_rate_factor, progress, stale
from cluster.scoring import empty_pack, evaluation_of
from mllm.model import Model
from pipelines import storage, trust
from pipelines.garbage import collect_usually
from pipelines.place import Place


def train(job: StageJob, pulse: Any, tables: Iterable[pa.Table]) -> None:
    """Train one stage on this rank's `tables` of packs, telling the `Pulse` what it is at.

    A `StopRun` or any ValueError is written down for the controller, and not raised where all ranks have met one, since Ray would
    only start the group again and meet it again.
    """
    storage.use(job.stream.storage)
    trust.use(job.stream.trust_remote_code)
    beats = Beats(pulse, dist.get_rank())
    beats("start", 0)
    try:
        _train(job, beats, tables)
    except (StopRun, ValueError) as error:
        if not Failures(job.folder).note(dist.get_rank(), dist.get_world_size(), error):
            raise  # the others wait for this rank
    finally:
        beats.close()


def _train(job: StageJob, beats: Beats, tables: Iterable[pa.Table]) -> None:
    from pipelines.stream import hands_of

    rank, world = dist.get_rank(), dist.get_world_size()
    control: Any = dist.new_group(backend="gloo")  # small objects go beside the gradients, never through the GPU
    begun = _begin(job, control)
    if begun is None:
        return
    resumed, state, empty = begun
    deal = Deal(
        hands_of(tables),
        state.position,
        job.stage.packs_per_step,
        rank,
        world,
        empty_pack(job.stream),
        control,
    )

    model = empty if resumed or rank != 0 else _build_model(job)
    engine = build_engine(model, job.stage, len(job.stage.mixture), _device(), restored=resumed is not None)
    _restore(engine, job, resumed)
    if rank == 0:
        _describe(job, engine)
    collect_usually()
    if job.held_out and job.folder.evaluation(job.stage.name, "before") is None:
        beats("evaluate", state.step)
        _evaluate(job, engine, "before")

    done = state.progress >= 1  # when only the evaluation was cut off
    if not done:
        with Saver(job.checkpoints) as saver:
            done = Training(job, engine, deal, state, beats, saver).run()
    if done and job.held_out:
        beats("evaluate", state.step)
        _evaluate(job, engine, "after")


Begun = tuple[Place | None, TrainState]
"""The checkpoint to go on from, and where it stands."""


def _begin(job: StageJob, control: Any) -> tuple[Place | None, TrainState, Model] | None:
    """Where to go on from, as rank 0 finds it, once the pause is over that its policy says; None where the run is another's.

    With it a model without weights, which is laid out while storage is asked. Raises StopRun where the policy says to begin no
    more, or a rank of the group before this one has written down why.
    """
    if not torch.cuda.is_available():  # ranks of one machine share its cores instead of each taking all
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    said: list[Begun | str | None] = [None]
    with ThreadPoolExecutor(1) as pool:
        noted = pool.submit(_noted, job) if dist.get_rank() == 0 else None
        empty = job.recipe.model_of(job.stage).empty()
        if noted is not None:
            with suppress(Fenced):
                said = [noted.result()]
    dist.broadcast_object_list(said, src=0, group=control)
    if isinstance(said[0], str):
        raise StopRun(said[0])
    return None if said[0] is None else (*said[0], empty)


def _noted(job: StageJob) -> Begun | str:
    """What `_begin` says, written down. Raises Fenced."""
    if failure := Failures(job.folder).found():
        return failure
    journal = job.journal
    passed: list[PassedOver] = []
    resumed = job.resume_from(passed.append)
    state = checkpoint.read_state(resumed) if resumed else TrainState()
    pause = after_start(job.watch, journal.state().groups_of(job.fingerprint), state.step)
    if isinstance(pause, str):
        journal.append(Decision(time=time.time(), what="give_up", stage=job.stage.name, why=pause))
        return pause
    time.sleep(pause)
    begun = GroupStarted(
        time=time.time(),
        stage=job.stage.name,
        fingerprint=job.fingerprint,
        world=dist.get_world_size(),
        step=state.step,
        passed_over=tuple(map(str, passed)),
    )
    journal.append(begun)
    return resumed, state


def _describe(job: StageJob, engine: Engine) -> None:
    """Write down what the stage trains, if no group before this one has."""
    journal = job.journal
    told = (event.fingerprint for event in journal.events() if isinstance(event, PartsDescribed))
    if job.fingerprint not in told:
        with suppress(Fenced):  # as the first checkpoint will find
            journal.append(
                PartsDescribed(
                    time=time.time(), stage=job.stage.name, fingerprint=job.fingerprint, parts=tuple(engine.parts)
                )
            )


DRAIN = 2.0
"""Seconds between two questions whether a node is about to be taken away."""

SICK = 2
"""Checkpoints in a row that processes could not write, for a reason of their own, before others take their place: with each one
more would have to be done again.
"""

LEAVING = "save_and_leave"
DRAINING = "ask"


class Training:
    """The loop over steps of one group: trains, judges, saves, and does what is wished of the run."""

    def __init__(
        self, job: StageJob, engine: Engine, deal: Deal, state: TrainState, beats: Beats, saver: Saver
    ) -> None:
        self.job = job
        self.engine = engine
        self.deal = deal
        self.state = state
        self.beats = beats
        self.saver = saver
        self.rank = dist.get_rank()
        self.first = self.rank == 0
        self.meter = meter_of(job, engine.device) if self.first else None
        self.folder = job.folder
        self.skipped = self.unwritten = 0
        self.board = gauges.Board(job.folder.name, job.stage.name)
        self.asked = time.monotonic()
        self.profiler = Profiler(beats, job.folder)
        self.paces = Paces(dist.get_world_size())
        self.slow: set[int] = set()
        self.nodes: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(socket.gethostname(), self.nodes if self.first else None)

    def run(self) -> bool:
        """Train to the stage's end; False where the run was asked to stop before. Raises StopRun when the data ends first."""
        self.beats("data", self.state.step)
        for step in self.deal:
            self.beats("step", self.state.step)
            with self.profiler:
                self._train(step)
            done = self.state.progress >= 1
            wish = "" if done else self._agreed(step)
            if done:
                self.profiler.close()
                self.saver.settle()
                self.engine.finish()
            if done or wish or due(self.job.stage, self.state.step):
                self.beats("save", self.state.step)
                self._save(final=done, wait=done or wish in (LEAVING, "save_and_stop"))
            if done:
                return True
            if wish == "save_and_stop":
                return False
            if wish == LEAVING:
                raise Leave("this group makes room for another; what was learned is saved")
            self.beats("data", self.state.step)
            self.deal.note = self._note()
        raise StopRun(
            f"the stream ended at {self.state.progress:.1%} after {self.state.step} steps; "
            "its mixture is smaller than its duration asks, give the duration in epochs"
        )

    def _note(self) -> str:
        """What this rank wishes: what the run was asked to do; by rank 0 alone, to leave, or, now and then, to ask for drained
        nodes.
        """
        if self.beats.wish:
            return self.beats.wish
        if self.unwritten >= SICK:
            self._decide(
                LEAVING,
                f"{self.unwritten} checkpoints in a row could not be written by these processes; others begin again",
            )
            return LEAVING
        if self.first and time.monotonic() - self.asked > DRAIN:
            self.asked = time.monotonic()
            return DRAINING
        return "save" if self.first and stale(self.job.stage, self.saver.since) else ""

    def _agreed(self, step: Step) -> str:
        """What all ranks do after this step besides going on; all say the same, since all have the same notes."""
        for wish in ("save_and_stop", LEAVING, "save"):
            if wish in step.notes:
                return wish
        if DRAINING not in step.notes:
            return ""
        import ray.train

        info = ray.train.get_preemption_info()
        if info is None:
            return ""
        if self.first:
            ranks = ", ".join(map(str, info.preempted_ranks))
            self._fault("preemption", f"the nodes of ranks {ranks} are about to be taken away")
            self._decide(LEAVING, "saved now, nothing is done twice; the other nodes go on at once")
        return LEAVING

    def _save(self, final: bool, wait: bool) -> None:
        """Begin a checkpoint. What failed of one is told, and training goes on with the one before; the last one must succeed."""
        job, state = self.job, self.state
        manifest = Manifest(
            run=self.folder.name,
            stage=job.stage.name,
            fingerprint=job.fingerprint,
            order=job.stream.order.fingerprint,
            step=state.step,
            world=dist.get_world_size(),
            final=final,
            versions=job.versions,
            token=job.token,
        )
        self.folder.flush_steps()  # the record of a step is there before a checkpoint after it is
        if self.first:
            job.journal.guard()
        try:
            outcomes = self.saver.save(self.engine.state(), state, manifest, wait=wait)
        except SaveFailed as error:
            if final:
                raise
            outcomes = []
            if self.first:
                self._fault("checkpoint", str(error))
        for outcome in outcomes:
            self.board.set(gauges.STALL, outcome.stall, rank=str(self.rank))
        for outcome in outcomes if self.first else ():
            self.unwritten = self.unwritten + 1 if outcome.sick else 0
            if outcome.trouble:
                self._fault("checkpoint", outcome.trouble)

    def _train(self, step: Step) -> None:
        job, state = self.job, self.state
        following = _progress(job, state, step)
        factor = learning_rate_factor(job.stage.schedule, (state.progress + following) / 2)
        report, verdict = self._judged(step, factor)
        self.skipped = 0 if report.taken else self.skipped + 1
        if self.skipped > job.stage.guard.most:
            raise StopRun(_no_number(job, state, step, report))
        recent = state.recent
        if report.taken and job.stage.guard.spike is not None:
            recent = (*recent, (report.loss, report.grad_norm))[-job.stage.guard.window :]
        tokens = sum(held.tokens for held in step.all)
        tally = tally_of(job, state.shards, step.all)
        self.state = replace(state.advanced(tokens, following, step.following, tally), recent=recent)
        self._compare(record_step(job, self.state, step, report, factor, self.meter, self.folder))
        self._show(replace(report.phases, data=step.waited))
        if verdict != "fine" and job.stage.guard.bad == "stop" and not report.taken:
            raise StopRun(_no_number(job, state, step, report))

    def _show(self, phases: Phases) -> None:
        """Tell a monitor what only this rank knows."""
        rank = str(self.rank)
        for name in PHASES:
            self.board.set(gauges.PHASE, getattr(phases, name), rank=rank, phase=name)
        if self.engine.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.engine.device)
        else:
            memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.board.set(gauges.MEMORY, memory, rank=rank, device=self.engine.device.type)

    def _compare(self, ranks: list[tuple[Phases, int]]) -> None:
        """Rank 0, which has all ranks' phases and tokens, tells of those that the others wait for: once, until they catch up."""
        paces = self.paces.add(ranks) if self.first else []
        if not paces:
            return
        found = stragglers(self.job.watch, paces)
        for one in found:
            if one.rank not in self.slow:
                node = self.nodes[one.rank]
                self._fault("straggler", one.words(node, self.paces.steps), rank=one.rank)
                self._decide(
                    "go_on",
                    f"all ranks wait for it at every step; look at {node} (a device that is throttled or shared, a slow disk), "
                    "or drain the node: the run saves and goes on without it",
                )
        self.slow = {one.rank for one in found}

    def _judged(self, step: Step, factor: float) -> tuple[StepReport, Verdict]:
        """The step, done again on the same packs and weights if it came out badly; and what was thought of it last."""
        guard, recent = self.job.stage.guard, self.state.recent
        verdicts: list[Verdict] = []

        def fine(loss: float, grad_norm: float) -> bool:
            self.saver.settle()  # the last moment at which weights are what they were before this step
            verdicts.append(judge(guard, recent, loss, grad_norm))
            return verdicts[-1] == "fine"

        report = self.engine.train_step(step.mine, factor, fine)
        if report.taken:
            return report, "fine"
        self._blame(verdicts[-1], step, report, "replay", "the same packs on the same weights tell data from machine")
        if not _sound(self.engine):
            self._decide(
                "roll_back", "the weights hold what is no number: a machine's fault; back to the last checkpoint"
            )
            raise Leave(f"after step {self.state.step} the weights held what is no number")
        report = self.engine.train_step(step.mine, factor, fine)
        if report.taken:
            self._decide("take", "the second time it came out well: a machine was at fault, and the step is taken")
        elif guard.bad == "skip":
            self._decide(
                "skip", f"it came out badly again ({verdicts[-1]}): the data is at fault, and the step is left out"
            )
        else:
            self._decide("stop", f"it came out badly again ({verdicts[-1]}): the data is at fault")
        return report, verdicts[-1]

    def _blame(self, what: Verdict, step: Step, report: StepReport, then: Any, why: str) -> None:
        if not self.first or what == "fine":
            return
        rows = tuple(f"{shard} row {row}" for held in step.all for shard, row in held.rows)
        self._fault(what, f"loss {report.loss:g}, gradient norm {report.grad_norm:g}", rows)
        self._decide(then, why)

    def _fault(self, what: FaultKind, detail: str, rows: tuple[str, ...] = (), rank: int | None = None) -> None:
        stage, step = self.job.stage.name, self.state.step
        fault = Fault(time=time.time(), what=what, stage=stage, step=step, detail=detail, rank=rank, rows=rows)
        self.job.journal.append(fault)

    def _decide(self, what: Any, why: str) -> None:
        if self.first:
            self.job.journal.append(Decision(time=time.time(), what=what, stage=self.job.stage.name, why=why))


def _sound(engine: Engine) -> bool:
    """Whether all weights, on all ranks, are numbers."""
    parts = [local(tensor) for tensor in engine.model_state().values()]
    good = all(bool(torch.isfinite(part).all()) for part in parts if part.is_floating_point())
    everywhere = torch.tensor(int(good), device=engine.device)
    dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
    return bool(everywhere)


def _no_number(job: StageJob, state: TrainState, step: Step, report: StepReport) -> str:
    packs = ", ".join(f"pack {held.at.pack} of window {held.at.window}" for held in step.all[:4])
    most = job.stage.guard.most
    before = f" and the {most} before it" if job.stage.guard.bad == "skip" else ""
    return (
        f"step {state.step + 1}{before} had loss {report.loss:g} and "
        f"gradient norm {report.grad_norm:g}, and were not taken; the last trained on {packs}. A rate that is too high does "
        "this (lower it, or warm up longer), and so do weights that are broken"
    )


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    import ray.train.torch

    return ray.train.torch.get_device()


def _build_model(job: StageJob) -> Model:
    """The model that the stage begins with: rank 0 reads or draws weights, and the engine hands them on to the others.

    Where there is a checkpoint to go on from, which holds all of them, nobody reads what it replaces.
    """
    torch.manual_seed(job.recipe.seed)
    if job.previous and job.adapted:
        assert job.before is not None  # whose checkpoint `previous` is
        return loading.read_model(job.recipe, job.before, Place(job.previous))
    return job.recipe.model_of(job.stage).build(job.place)


def _restore(engine: Engine, job: StageJob, resumed: Place | None) -> None:
    """Fill the engine from the checkpoint to go on from, or from the stage before.

    Raises CorruptCheckpoint where the former is not what was written: it is marked, and the group that Ray starts next takes the
    one before it, with the data from there. Raises StopRun for the latter, which has nothing before it.
    """
    if resumed:
        state = engine.state()
        try:
            loading.load(resumed, state)
        except CorruptCheckpoint as error:
            if dist.get_rank() == 0:
                checkpoint.reject(resumed, str(error))
            dist.barrier()
            raise
        engine.load_state(state)
    elif job.previous and not job.adapted:  # else rank 0 has read it, and merged what was to be merged
        try:
            _take_over(engine, job, Place(job.previous))
        except CorruptCheckpoint as error:
            raise StopRun(f"it begins from the stage before it, and cannot: {error}") from error


def _take_over(engine: Engine, job: StageJob, previous: Place) -> None:
    """The weights of the stage before, and its moments where the stage asks for them; rates and decay are the stage's own."""
    if not job.stage.carry_optimizer:
        state: dict[str, Any] = {"model": engine.model_state()}
        loading.load(previous, state)
        engine.load_model_state(state["model"])
        return
    state = engine.state()
    moments = {"state": state["optimizer"]["state"]}
    loading.load(previous, {"model": state["model"], "optimizer": moments})
    engine.load_state({**state, "optimizer": {**state["optimizer"], **moments}})


def _progress(job: StageJob, state: TrainState, step: Step) -> float:
    """Progress once the step is done."""
    tokens = state.tokens + sum(held.tokens for held in step.all)
    of = step.packs_in_window if step.following.pack else 1
    return progress(job.stage, job.stream.windows, state.step + 1, tokens, step.following, of)


def _evaluate(job: StageJob, engine: Engine, when: str) -> None:
    """Held-out scores over all ranks, the few-shot probe and written answers; rank 0 keeps them."""
    assert job.held_out is not None
    result = evaluation_of(engine, job.held_out, job.recipe, job.stage.name, when)
    if dist.get_rank() == 0:
        job.folder.write_evaluation(result)
