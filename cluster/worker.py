"""The one training loop. Ray Train runs it on every rank; it does the same on one laptop core and on 512 GPUs."""

from __future__ import annotations

import base64
import io
import os
import resource
import socket
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist

from cluster import checkpoint, gauges, loading, quarantine
from cluster.checkpoint import CorruptCheckpoint, Manifest, PassedOver, ShardTally, TrainState
from cluster.counted import stage_cost
from cluster.deal import Deal, Held, Step
from cluster.engines import Engine, StepReport, build_engine, local
from cluster.journal import Decision, Fault, FaultKind, Fenced, GroupStarted, Journal
from cluster.metrics import Evaluation, PackRecord, RunFolder, SourceLoss, StepRecord
from cluster.mfu import peak_flops
from cluster.phases import PHASES, Paces, Phases
from cluster.policy import Verdict, Watch, after_start, judge, stragglers
from cluster.profiling import Profiler
from cluster.pulse import Beats
from cluster.saver import SaveFailed, Saver
from cluster.schedule import due, learning_rate_factor, progress, stale
from mllm import evaluate
from mllm.flops import Cost, Work, work_of
from mllm.model import Model
from mllm.recipe import LoRA, Recipe, Source, Stage
from mllm.tune import peak_rate
from pipelines import storage, trust
from pipelines.annotate import OfPacks
from pipelines.place import Place
from pipelines.types import Measured, Pack, Picture, Rejected, Text, spec
from pipelines.windows import PackWindows, Stream

QUESTIONS = 24
"""Pictures of the few-shot probe."""

ANSWERS_EACH = 3
"""Held-out rows of each source that the model writes an answer to."""

ANSWER_TOKENS = 24


@spec
class StageJob:
    """All that a worker needs to train a stage: values and paths, no handles."""

    recipe: Recipe
    stage: Stage
    stream: Stream
    held_out: Stream | None
    run: str
    token: int
    watch: Watch
    fingerprint: str
    previous: str | None
    weights: dict[str, str]
    versions: dict[str, str]

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.run)

    @property
    def journal(self) -> Journal:
        """The run's journal, to be written under the token of the controller that made this job."""
        return Journal(self.folder.root, self.token)

    @property
    def before(self) -> Stage | None:
        """The stage that this one follows."""
        return self.recipe.before(self.stage)

    @property
    def adapted(self) -> bool:
        """Whether this stage or the one before has adapters, so that their checkpoints have other names."""
        stages = [stage for stage in (self.before, self.stage) if stage]
        return any(isinstance(how, LoRA) for stage in stages for how in stage.tune.values())

    def place(self, name: str) -> str:
        """The folder (or hub id) of weights by their name in the recipe."""
        return self.weights.get(name, name)

    @property
    def checkpoints(self) -> Place:
        return self.folder.checkpoints(self.stage.name)

    def resume_from(self, tell: Callable[[PassedOver], object] = lambda _: None) -> Place | None:
        """The checkpoint to go on from, or None at the stage's beginning; `tell` hears of those that are passed over."""
        found = checkpoint.newest(self.checkpoints, self.fingerprint, self.stream.order.fingerprint, tell)
        return found.folder if found else None


class StopRun(RuntimeError):
    """A fault that trying again cannot mend: the stage ends at once, with these words."""


class TooManyBadRows(StopRun):
    """A shard's share of dropped rows exceeds what its source declares."""


class Leave(RuntimeError):
    """The group ends so that Ray starts another from the checkpoint: trying again is the mend."""


def train(job: StageJob, pulse: Any, tables: Iterable[pa.Table]) -> None:
    """Train one stage on this rank's `tables` of packs, telling the `Pulse` what it is at.

    A `StopRun` or any ValueError is written down for the controller and not raised, since Ray would only start the group again
    and meet it again.
    """
    storage.use(job.stream.storage)
    trust.use(job.stream.trust_remote_code)
    beats = Beats(pulse, dist.get_rank())
    beats("start", 0)
    try:
        _train(job, beats, tables)
    except (StopRun, ValueError) as error:
        if dist.get_rank() == 0:
            failure_file(job.folder).write(str(error).encode())
            job.folder.logs.mkdir(parents=True, exist_ok=True)
            (job.folder.logs / "failure.txt").write_text(traceback.format_exc())
    finally:
        beats.close()


def failure_file(run: RunFolder) -> Place:
    return run.root / "failure.txt"


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
    more.
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
        raise StopRun(f"stage {job.stage.name!r}: {said[0]}")
    return None if said[0] is None else (*said[0], empty)


def _noted(job: StageJob) -> Begun | str:
    """What `_begin` says, written down. Raises Fenced."""
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
        self.meter = _meter(job, engine.device) if self.first else None
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
            f"stage {self.job.stage.name!r}: the stream ended at {self.state.progress:.1%} after {self.state.step} steps; "
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
        tally = _tally(job, state.shards, step.all)
        self.state = replace(state.advanced(tokens, following, step.following, tally), recent=recent)
        self._compare(_record(job, self.state, step, report, factor, self.meter, self.folder))
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
        f"stage {job.stage.name!r}: step {state.step + 1}{before} had loss {report.loss:g} and "
        f"gradient norm {report.grad_norm:g}, and were not taken; the last trained on {packs}. A rate that is too high does "
        "this (lower it, or warm up longer), and so do weights that are broken"
    )


def empty_pack(stream: Stream) -> Pack:
    """What fills up a rank's share: the same kind of pack as all others, so that every rank runs the same modules."""
    pack = Pack.empty(stream.tiling.shape)
    for annotator in stream.annotators:
        pack = annotator.empty(pack) if isinstance(annotator, OfPacks) else pack
    return pack


def _device() -> torch.device:
    import ray.train.torch

    return ray.train.torch.get_device() if torch.cuda.is_available() else torch.device("cpu")


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
            raise StopRun(f"stage {job.stage.name!r} begins from the stage before it, and cannot: {error}") from error


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


def _tally(job: StageJob, before: dict[str, ShardTally], held: list[Held]) -> dict[str, ShardTally]:
    """Rows met and dropped by shard. Raises TooManyBadRows, on every rank alike."""
    tally = dict(before)
    fresh: list[Rejected] = []
    for pack in held:
        for shard in {shard for shard, _ in pack.rows}:
            old = tally.get(shard, ShardTally())
            rows = len({row for name, row in pack.rows if name == shard})
            tally[shard] = replace(old, seen=old.seen + rows)
        for rejected in pack.dropped:
            shard = f"{rejected.row.corpus}/{rejected.row.shard}"
            old = tally.get(shard, ShardTally())
            tally[shard] = ShardTally(seen=old.seen + 1, dropped=old.dropped + 1)
            fresh.append(rejected)
    if fresh and dist.get_rank() == 0:
        quarantine.append(job.folder, job.stage.name, fresh)
    limits = {source.corpus.name: source for source in job.stage.mixture}
    for rejected in fresh:
        _check_share(limits[rejected.row.corpus], tally, rejected, job.folder.name)
    return tally


def _check_share(source: Source, tally: dict[str, ShardTally], last: Rejected, run: str) -> None:
    shard = f"{last.row.corpus}/{last.row.shard}"
    found = tally[shard]
    if found.seen >= source.min_rows and found.dropped > source.max_bad * found.seen:
        raise TooManyBadRows(
            f"shard {shard}: {found.dropped} of {found.seen} rows were dropped, more than the {source.max_bad:.0%} that its "
            f"source allows (max_bad); the last was {last.label()}. See them with: mllm data quarantine {run}"
        )


@dataclass(frozen=True, slots=True)
class Meter:
    """What a pack costs and what a device could compute, FLOP/s. `cost` is None for a model that cannot be counted."""

    cost: Cost | None
    peak: float


def _meter(job: StageJob, device: torch.device) -> Meter:
    try:
        cost = stage_cost(job.recipe, job.stage)
    except (ValueError, RuntimeError):  # a run does not stop for want of a number; `mllm plan` says why it is missing
        cost = None
    return Meter(cost, peak_flops(device, job.stage.parallel.dtype))


def _record(
    job: StageJob,
    state: TrainState,
    step: Step,
    report: StepReport,
    factor: float,
    meter: Meter | None,
    folder: RunFolder,
) -> list[tuple[Phases, int]]:
    """Rank 0, which has the `meter`, writes the step's line, and gets the phases and tokens of all ranks."""
    timings: list[Any] = [None] * dist.get_world_size()
    tokens = sum(len(pack.input_ids) for pack in step.mine)
    work = sum((work_of(pack) for pack in step.mine), Work())
    phases = replace(report.phases, data=step.waited)
    dist.gather_object((phases, report.seconds, tokens, work), timings if dist.get_rank() == 0 else None)
    if meter is None:
        return []
    ranks, seconds, loads, works = zip(*timings, strict=True)
    waits = [each.data for each in ranks]
    slowest = max(range(len(ranks)), key=lambda rank: ranks[rank].own)
    work = sum(works, Work())
    total = sum(held.tokens for held in step.all)
    dropped = [rejected for held in step.all for rejected in held.dropped]
    reasons: dict[str, int] = {}
    for rejected in dropped:
        reasons[str(rejected.reason)] = reasons.get(str(rejected.reason), 0) + 1
    record = StepRecord(
        step=state.step,
        progress=state.progress,
        loss=report.loss,
        grad_norm=report.grad_norm,
        lr=factor * peak_rate(job.stage.tune),
        tokens=total,
        learned=report.learned,
        images=sum(held.images for held in step.all),
        rows=sum(len(held.rows) for held in step.all),
        fill=total / (len(step.all) * job.stage.context),
        imbalance=max(loads) * len(loads) / max(1, sum(loads)),
        seconds=max(seconds) + max(waits),
        data_wait=max(waits),
        taken=report.taken,
        world=len(loads),
        time=time.time(),
        sources=tuple(
            SourceLoss(source=source.corpus.name, loss=total / weight, accuracy=right / weight, tokens=int(weight))
            for source, (total, weight, right) in zip(job.stage.mixture, report.sources.tolist(), strict=True)
            if weight
        ),
        packs=tuple(PackRecord(window=h.at.window, pack=h.at.pack, digest=h.digest) for h in step.all),
        dropped=tuple(rejected.label() for rejected in dropped),
        reasons=reasons,
        flops=meter.cost.model_flops(work) if meter.cost else 0.0,
        hardware_flops=meter.cost.hardware_flops(work) if meter.cost else 0.0,
        peak=meter.peak,
        usual=Phases(**{name: median(getattr(each, name) for each in ranks) for name in PHASES}),
        slowest=(slowest, ranks[slowest]),
    )
    folder.write_step(job.stage.name, record)
    return list(zip(ranks, loads, strict=True))


def _evaluate(job: StageJob, engine: Engine, when: str) -> None:
    """Held-out scores over all ranks, the few-shot probe and written answers; rank 0 keeps them."""
    assert job.held_out is not None
    result = evaluation_of(engine, job.held_out, job.recipe, job.stage.name, when)
    if dist.get_rank() == 0:
        job.folder.write_evaluation(result)


def evaluation_of(engine: Engine, held_out: Stream, recipe: Recipe, stage: str, when: Any) -> Evaluation:
    """Evaluate the engine's model on the held-out stream; every rank must call it together."""
    rank, world = dist.get_rank(), dist.get_world_size()
    windows = PackWindows(held_out)
    mine = [pack for k in range(rank, held_out.windows or 0, world) for pack in windows.packs(k)]
    most = torch.tensor(len(mine), device=engine.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    mine += [empty_pack(held_out)] * (int(most) - len(mine))
    sums = evaluate.source_sums(engine.score, mine, len(held_out.corpora), engine.device)
    dist.all_reduce(sums)

    documents = [
        document
        for k in range(held_out.windows or 0)
        for document in windows.documents(windows.rows(k))
        if isinstance(document, Measured)
    ]
    documents.sort(key=lambda document: (document.source, document.id.shard, document.id.row))
    # Without a language model's loss there is nothing to compare, and nothing to write.
    speaks = recipe.stage(stage).objective.kind in ("next_token", "two_vocabularies", "dpo")
    shots = recipe.shots if speaks else ()
    questions = evaluate.few_shot_questions(documents, windows.encoder, shots, QUESTIONS) if shots else []
    probe = evaluate.probe_sums(engine.score, questions, windows.pixels, shots, engine.device)
    return Evaluation(
        stage=stage,
        when=when,
        scores=evaluate.source_scores(sums, held_out.sources),
        probe=evaluate.probe_scores(probe, shots),
        answers=tuple(_answers(engine, windows, documents)) if speaks else (),
    )


def _answers(engine: Engine, windows: PackWindows, documents: list[Measured]) -> Iterator[evaluate.Answer]:
    """What the model writes about a few held-out pictures, greedily."""
    codec = windows.encoder.codec
    asked: list[tuple[str, Measured, str]] = []
    for source, name in enumerate(windows.stream.sources):
        shown = [d for d in documents if d.source == source and isinstance(d.segments[0], Picture)]
        for document in shown[:: max(1, len(shown) // ANSWERS_EACH)][:ANSWERS_EACH]:
            question, expected = evaluate.prompt_of(document)
            asked.append((name, question, expected))
    prompts = [windows.encoder.prompt(question) for _, question, _ in asked]
    stop = codec.special(codec.eos) if codec.eos else None
    written = evaluate.greedy(engine.next_logits, prompts, windows.pixels(prompts), stop, ANSWER_TOKENS, engine.device)
    for (name, question, expected), prompt, tokens in zip(asked, prompts, written, strict=True):
        yield evaluate.Answer(
            source=name,
            row=question.id.label(),
            image=_png(windows.pixels([prompt])[0]),
            prompt=" ".join(s.text.strip() for s in question.segments if isinstance(s, Text)).strip(),
            expected=expected[:400],
            written=codec.decode(tokens).strip(),
        )


def _png(tile: Any) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(tile.transpose(1, 2, 0)).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
