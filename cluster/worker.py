"""The one training loop. Ray Train runs it on every rank; it does the same on one laptop core and on 512 GPUs."""

from __future__ import annotations

import base64
import io
import os
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster import checkpoint, quarantine
from cluster.checkpoint import Manifest, PassedOver, ShardTally, TrainState
from cluster.deal import Deal, Held, Step
from cluster.engines import Engine, StepReport, build_engine
from cluster.journal import write_atomically
from cluster.metrics import Evaluation, PackRecord, RunFolder, SourceLoss, StepRecord
from cluster.mfu import peak_flops
from cluster.saver import Saver
from cluster.schedule import due, learning_rate_factor, progress
from cluster.shards import CorruptCheckpoint
from mllm import evaluate
from mllm.flops import Cost, Work, work_of
from mllm.recipe import LoRA, Recipe, Source, Stage
from mllm.tune import peak_rate
from mllm.vlm import VisionLanguageModel
from pipelines.annotate import OfPacks
from pipelines.place import Place
from pipelines.types import Measured, Pack, Picture, Rejected, Text, spec
from pipelines.windows import PackWindows, Stream

DATASET = "packs"
"""The dataset's name in Ray Train's views."""

QUESTIONS = 24
"""Pictures of the few-shot probe."""

ANSWERS_EACH = 3
"""Held-out rows of each source that the model writes an answer to."""

ANSWER_TOKENS = 24

MOST_SKIPPED = 10
"""Steps in a row that may be left out for having no finite loss or gradient before the run stops."""


@spec
class StageJob:
    """All that a worker needs to train a stage: values and paths, no handles."""

    recipe: Recipe
    stage: Stage
    stream: Stream
    held_out: Stream | None
    run: str
    fingerprint: str
    previous: str | None
    weights: dict[str, str]
    versions: dict[str, str]

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.run)

    @property
    def before(self) -> Stage:
        """The stage that this one follows."""
        return self.recipe.stages[self.recipe.stages.index(self.stage) - 1]

    @property
    def adapted(self) -> bool:
        """Whether this stage or the one before has adapters, so that their checkpoints have other names."""
        return any(isinstance(how, LoRA) for stage in (self.before, self.stage) for how in stage.tune.values())

    def place(self, name: str) -> str:
        """The folder (or hub id) of weights by their name in the recipe."""
        return self.weights.get(name, name)

    @property
    def checkpoints(self) -> Place:
        return Place(self.folder.checkpoints(self.stage.name))

    def resume_from(self, tell: Callable[[PassedOver], object] = lambda _: None) -> Place | None:
        """The checkpoint to go on from, or None at the stage's beginning; `tell` hears of those that are passed over."""
        found = checkpoint.newest(self.checkpoints, self.fingerprint, self.stream.order.fingerprint, tell)
        return found.folder if found else None


class StopRun(RuntimeError):
    """A fault that trying again cannot mend: the stage ends at once, with these words."""


class TooManyBadRows(StopRun):
    """A shard's share of dropped rows exceeds what its source declares."""


def train_worker(config: dict[str, Any]) -> None:
    """Train one stage, from its last checkpoint or its beginning, to its end.

    `config` holds one `StageJob` under "job". A `StopRun` or any ValueError is written down for the controller and not
    raised, since Ray would only start the group again and meet it again.
    """
    job: StageJob = config["job"]
    failure = failure_file(job.folder)
    try:
        _train(job)
    except (StopRun, ValueError) as error:
        if dist.get_rank() == 0:
            write_atomically(failure, str(error).encode())
            job.folder.logs.mkdir(parents=True, exist_ok=True)
            (job.folder.logs / "failure.txt").write_text(traceback.format_exc())


def failure_file(run: RunFolder) -> Path:
    return run.root / "failure.txt"


def _train(job: StageJob) -> None:
    import ray.train

    from pipelines.stream import hands_of

    rank, world = dist.get_rank(), dist.get_world_size()
    resumed = job.resume_from(partial(_note, job))
    state = checkpoint.read_state(resumed) if resumed else TrainState()
    control: Any = dist.new_group(backend="gloo")  # small objects go beside the gradients, never through the GPU
    shard = ray.train.get_dataset_shard(DATASET)
    assert shard is not None  # Ray Train's type allows for runs without data
    deal = Deal(
        hands_of(shard),
        state.position,
        job.stage.packs_per_step,
        rank,
        world,
        empty_pack(job.stream),
        control,
    )

    if rank == 0:
        job.folder.mend_steps(job.stage.name)
    engine = build_engine(_build_model(job, resumed), job.stage, len(job.stage.mixture), _device())
    _restore(engine, job, resumed)
    if job.held_out and job.folder.evaluation(job.stage.name, "before") is None:
        _evaluate(job, engine, "before")

    if state.progress < 1:  # it is 1 when only the evaluation was cut off
        with Saver(job.checkpoints) as saver:
            _steps(job, engine, deal, state, saver)
    if job.held_out:
        _evaluate(job, engine, "after")


def _steps(job: StageJob, engine: Engine, deal: Deal, state: TrainState, saver: Saver) -> None:
    """Train from `state` to the stage's end, saving on the way. Raises StopRun when the data ends first."""
    meter = _meter(job, engine.device) if dist.get_rank() == 0 else None
    skipped = 0
    for step in deal:
        following = _progress(job, state, step)
        factor = learning_rate_factor(job.stage.schedule, (state.progress + following) / 2)
        report = engine.train_step(step.mine, factor)
        skipped = 0 if report.taken else skipped + 1
        if skipped > MOST_SKIPPED:
            raise StopRun(_no_number(job, state, step, report))
        state = state.advanced(
            sum(held.tokens for held in step.all), following, step.following, _tally(job, state.shards, step.all)
        )
        _record(job, state, step, report, factor, meter)
        done = state.progress >= 1
        if done:
            engine.finish()
        if done or due(job.stage, state.step, _since(job, saver, deal.group)):
            _save(job, engine, state, saver, final=done)
        if done:
            return
    raise StopRun(
        f"stage {job.stage.name!r}: the stream ended at {state.progress:.1%} after {state.step} steps; "
        "its mixture is smaller than its duration asks, give the duration in epochs"
    )


def _no_number(job: StageJob, state: TrainState, step: Step, report: StepReport) -> str:
    packs = ", ".join(f"pack {held.at.pack} of window {held.at.window}" for held in step.all[:4])
    return (
        f"stage {job.stage.name!r}: step {state.step + 1} and the {MOST_SKIPPED} before it had loss {report.loss:g} and "
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


def _build_model(job: StageJob, resumed: Place | None) -> VisionLanguageModel:
    """The model to train: rank 0 reads weights, and the engine hands them on to the others."""
    if not torch.cuda.is_available():  # ranks of one machine share its cores instead of each taking all
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    torch.manual_seed(job.recipe.seed)
    if dist.get_rank() != 0:
        return job.recipe.model.empty()
    if job.previous and not resumed and job.adapted:
        return checkpoint.read_model(job.recipe, job.before, Place(job.previous), job.place)
    return job.recipe.model.build(job.place)


def _restore(engine: Engine, job: StageJob, resumed: Place | None) -> None:
    """Fill the engine from the checkpoint to go on from, or from the stage before.

    Raises CorruptCheckpoint where the former is not what was written: it is marked, and the group that Ray starts next takes the
    one before it, with the data from there. Raises StopRun for the latter, which has nothing before it.
    """
    if resumed:
        state = engine.state()
        try:
            checkpoint.load(resumed, state)
        except CorruptCheckpoint as error:
            if dist.get_rank() == 0:
                checkpoint.reject(resumed, str(error))
            dist.barrier()
            raise
        engine.load_state(state)
    elif job.previous and not job.adapted:  # else rank 0 has read it, and merged what was to be merged
        state = {"model": engine.model_state()}
        try:
            checkpoint.load(Place(job.previous), state)
        except CorruptCheckpoint as error:
            raise StopRun(f"stage {job.stage.name!r} begins from {job.before.name!r}: {error}") from error
        engine.load_model_state(state["model"])


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
        _check_share(limits[rejected.row.corpus], tally, rejected, job.folder.root.name)
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
    from cluster.plan import stage_cost  # simulates memory as well, by parts of torch that take a second to import

    try:
        cost = stage_cost(job.recipe, job.stage)
    except (ValueError, RuntimeError):  # a run does not stop for want of a number; `mllm plan` says why it is missing
        cost = None
    return Meter(cost, peak_flops(device, job.stage.parallel.dtype))


def _record(
    job: StageJob, state: TrainState, step: Step, report: StepReport, factor: float, meter: Meter | None
) -> None:
    """Rank 0, which has the `meter`, writes the step's line."""
    timings: list[Any] = [None] * dist.get_world_size()
    tokens = sum(len(pack.input_ids) for pack in step.mine)
    work = sum((work_of(pack) for pack in step.mine), Work())
    dist.gather_object((step.waited, report.seconds, tokens, work), timings if dist.get_rank() == 0 else None)
    if meter is None:
        return
    waits, seconds, loads, works = zip(*timings, strict=True)
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
    )
    job.folder.write_step(job.stage.name, record)


def _since(job: StageJob, saver: Saver, group: dist.ProcessGroup | None) -> float:
    """Seconds since the last checkpoint was begun, as rank 0 says it; 0 where the stage does not ask."""
    if job.stage.save_minutes is None:
        return 0.0
    since = torch.tensor(saver.since, dtype=torch.float64)
    dist.broadcast(since, 0, group=group)
    return float(since)


def _save(job: StageJob, engine: Engine, state: TrainState, saver: Saver, final: bool) -> None:
    """Begin a checkpoint; the last one is waited for, and its failure ends the run."""
    manifest = Manifest(
        run=job.folder.root.name,
        stage=job.stage.name,
        fingerprint=job.fingerprint,
        order=job.stream.order.fingerprint,
        step=state.step,
        world=dist.get_world_size(),
        final=final,
        versions=job.versions,
    )
    for outcome in saver.save(engine.state(), state, manifest, wait=final):
        if outcome.trouble:
            _note(job, outcome.trouble)


def _note(job: StageJob, words: object) -> None:
    """Rank 0 keeps what went wrong with a checkpoint, and training goes on."""
    if dist.get_rank() == 0:
        job.folder.logs.mkdir(parents=True, exist_ok=True)
        with (job.folder.logs / "checkpoints.txt").open("a") as out:
            out.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {words}\n")


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
    questions = evaluate.few_shot_questions(documents, windows.encoder, recipe.shots, QUESTIONS)
    probe = evaluate.probe_sums(engine.score, questions, windows.pixels, recipe.shots, engine.device)
    return Evaluation(
        stage=stage,
        when=when,
        scores=evaluate.source_scores(sums, held_out.sources),
        probe=evaluate.probe_scores(probe, recipe.shots),
        answers=tuple(_answers(engine, windows, documents)),
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
