"""Follows a run's files from its driver and tells each step to whoever wants to know: Ray's metrics, TensorBoard, W&B.

    with Telemetry(run, recipe, sinks):          sinks hear of every step, evaluation and fault, some seconds late

Like the view in the terminal it reads what the run has written, so it can neither slow the run down nor break it. A sink that
fails is left out from then on, and one line says so.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

from cluster import gauges
from cluster.gauges import Board
from cluster.journal import FAULT_KINDS, Event, Fault, GroupStarted, Journal, StageStarted
from cluster.lines import Follower
from cluster.metrics import Evaluation, RunFolder, StepRecord, parse_step
from cluster.views import StageView
from mllm.recipe import Recipe, dump
from pipelines.storage import StorageError
from pipelines.types import Reason

if TYPE_CHECKING:
    from cluster.site import Sink as SinkKind
    from pipelines.place import Place

POLL = 2.0
"""Seconds between two looks at the run's files, which on S3 are requests."""


class Sink(Protocol):
    """Somewhere that a run's numbers go to. Steps come in order; one that is done again after a crash comes again."""

    def step(self, view: StageView, record: StepRecord) -> None:
        """A step of the stage that `view` has all steps of."""
        ...

    def evaluation(self, evaluation: Evaluation, step: int) -> None:
        """Held-out results after `step` of its stage."""
        ...

    def events(self, events: Sequence[Event], stage: str) -> None:
        """The journal, as long as it is now."""
        ...

    def close(self) -> None: ...


class Telemetry:
    """The thread that follows. `say` tells a person what went wrong with a sink."""

    def __init__(
        self, run: RunFolder, recipe: Recipe, sinks: Sequence[Sink], say: Callable[[str], object], poll: float = POLL
    ) -> None:
        self.run = run
        self.stages = [stage.name for stage in recipe.stages]
        self.sinks = list(sinks)
        self.say = say
        self.poll = poll
        self.journal = Journal(run.root)
        self.view: StageView | None = None
        self.tail: Follower | None = None
        self.evaluated: set[tuple[str, str, int | None]] = set()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._follow, name="telemetry", daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join(timeout=10)
        for sink in self.sinks:
            self._tell(sink, sink.close)

    def _follow(self) -> None:
        while not self.over.wait(self.poll):
            self._look()
        self._look()  # what came between the last look and the end

    def _look(self) -> None:
        try:
            events = self.journal.events()
            stage = next((e.stage for e in reversed(events) if isinstance(e, StageStarted)), None)
            fresh = self._steps(stage)
            found = self._evaluations()
        except StorageError:  # the next look may succeed, and sees all that this one did not
            return
        if self.view is None:
            return
        for sink in list(self.sinks):
            for record in fresh:
                self._tell(sink, sink.step, self.view, record)
            for evaluation, step in found:
                self._tell(sink, sink.evaluation, evaluation, step)
            self._tell(sink, sink.events, events, self.view.name)

    def _steps(self, stage: str | None) -> list[StepRecord]:
        """Steps written since the last look. Those that were there when the stage was first seen are no news."""
        if stage is None or stage not in self.stages:
            return []
        known = self.view is not None and self.view.name == stage
        if not known:
            self.view, self.tail = StageView(name=stage), Follower(self.run.steps_file(stage))
        assert self.view is not None
        assert self.tail is not None
        records = [record for line in self.tail.read() if (record := parse_step(line))]
        for record in records:
            self.view.add(record)
        return records if known else records[-1:]

    def _evaluations(self) -> list[tuple[Evaluation, int]]:
        if self.view is None:
            return []
        name = self.view.name
        last = self.view.last.step if self.view.last else 0
        before = self.run.evaluation(name, "before")
        found = [(before, 0)] if before else []
        found += [(each, each.step or 0) for each in self.run.evaluations(name)]
        after = self.run.evaluation(name, "after")
        found += [(after, last)] if after else []
        fresh = [(each, step) for each, step in found if (name, each.when, each.step) not in self.evaluated]
        self.evaluated |= {(name, each.when, each.step) for each, _ in fresh}
        return fresh

    def _tell(self, sink: Sink, what: Callable[..., None], *words: Any) -> None:
        if sink not in self.sinks:
            return
        try:
            what(*words)
        except Exception as error:
            self.sinks.remove(sink)
            self.say(
                f"{type(sink).__name__} gets no more numbers of this run ({type(error).__name__}: {error}); the run goes on"
            )


class RayMetrics:
    """Ray's own metrics, which the dashboard and Prometheus show."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.stage: str | None = None

    def step(self, view: StageView, record: StepRecord) -> None:
        board = Board(self.run, view.name)
        for metric, value in (
            (gauges.STEP, record.step),
            (gauges.PROGRESS, record.progress),
            (gauges.LOSS, record.loss),
            (gauges.GRAD_NORM, record.grad_norm),
            (gauges.LR, record.lr),
            (gauges.STEP_SECONDS, record.seconds),
            (gauges.DATA_WAIT, record.data_wait),
            (gauges.FILL, record.fill),
            (gauges.IMBALANCE, record.imbalance),
            (gauges.WORLD, record.world),
            (gauges.NOT_TAKEN, sum(not step.taken for step in view.steps)),
            (gauges.GOODPUT, goodput(view)),
        ):
            board.set(metric, value)
        if record.mfu is not None:
            board.set(gauges.MFU, record.mfu)
        if view.remaining is not None:
            board.set(gauges.END, record.time + view.remaining)
        for metric, value in (
            (gauges.TOKENS, record.tokens),
            (gauges.LEARNED, record.learned),
            (gauges.IMAGES, record.images),
            (gauges.ROWS, record.rows),
        ):
            board.add(metric, value)
        for source in record.sources:
            board.set(gauges.SOURCE_LOSS, source.loss, source=source.source)
            board.set(gauges.SOURCE_ACCURACY, source.accuracy, source=source.source)
            board.add(gauges.SOURCE_TOKENS, source.tokens, source=source.source)
        dropped = view.dropped
        for reason in Reason:  # those of which there are none, too: an alert asks by how much they grow
            board.set(gauges.DROPPED, dropped[str(reason)], reason=str(reason))

    def evaluation(self, evaluation: Evaluation, step: int) -> None:  # noqa: ARG002 -- Prometheus has a time of its own
        board = Board(self.run, evaluation.stage)
        for score in evaluation.scores:
            board.set(gauges.HELD_OUT_LOSS, score.loss, source=score.source)

    def events(self, events: Sequence[Event], stage: str) -> None:
        board = Board(self.run, stage)
        groups = [event for event in events if isinstance(event, GroupStarted) and event.stage == stage]
        board.set(gauges.RESTARTS, max(0, len(groups) - 1))
        faults = Counter(event.what for event in events if isinstance(event, Fault) and event.stage == stage)
        for what in FAULT_KINDS:
            board.set(gauges.FAULTS, faults[what], what=what)

    def close(self) -> None: ...


class TensorBoard:
    """Files for TensorBoard, a folder for each stage. A stage that goes on at an earlier step hides what it does again."""

    def __init__(self, folder: Place) -> None:
        if not folder.local:
            raise ValueError(
                f"TensorBoard's files are kept on a disk, and this run lies on {folder}; take tensorboard out of sinks"
            )
        self.folder = folder
        self.writers: dict[str, Any] = {}
        self.last: dict[str, int] = {}

    def step(self, view: StageView, record: StepRecord) -> None:
        again = record.step <= self.last.get(view.name, 0)
        writer = self._writer(view.name, record.step if again else None)
        self.last[view.name] = record.step
        for name, value in scalars(record).items():
            writer.add_scalar(name, value, record.step, walltime=record.time)

    def evaluation(self, evaluation: Evaluation, step: int) -> None:
        writer = self._writer(evaluation.stage, None)
        for score in evaluation.scores:
            writer.add_scalar(f"held_out/{score.source}/loss", score.loss, step)
            writer.add_scalar(f"held_out/{score.source}/accuracy", score.accuracy, step)

    def events(self, events: Sequence[Event], stage: str) -> None: ...

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()

    def _writer(self, stage: str, again_from: int | None) -> Any:
        from tensorboardX import SummaryWriter

        if again_from is not None and stage in self.writers:
            self.writers.pop(stage).close()
        if stage not in self.writers:
            self.writers[stage] = SummaryWriter(str(self.folder.path / stage), purge_step=again_from, flush_secs=10)
        return self.writers[stage]


class WeightsAndBiases:
    """A run of W&B, offline unless the environment says otherwise (WANDB_MODE); `wandb sync` sends it later.

    A driver that goes on with a run goes on with W&B's too: the run's folder keeps its id.
    """

    def __init__(self, run: str, folder: Place, recipe: Recipe) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise ValueError(
                "the site's sinks name wandb, and it is not installed; pip install 'mllm[wandb]', or take it out"
            )
        if not folder.local:
            raise ValueError(f"W&B's files are kept on a disk, and this run lies on {folder}; take wandb out of sinks")
        self.run = run
        self.folder = folder
        self.recipe = recipe
        self.begun: Any = None

    def step(self, view: StageView, record: StepRecord) -> None:
        values = {f"{view.name}/{name}": value for name, value in scalars(record).items()}
        self._run().log({"step": record.step, **values})

    def evaluation(self, evaluation: Evaluation, step: int) -> None:
        losses = {f"{evaluation.stage}/held_out/{score.source}/loss": score.loss for score in evaluation.scores}
        self._run().log({"step": step, **losses})

    def events(self, events: Sequence[Event], stage: str) -> None: ...

    def close(self) -> None:
        if self.begun is not None:
            self.begun.finish()

    def _run(self) -> Any:
        if self.begun is None:
            import wandb  # pyright: ignore[reportMissingImports] -- an extra

            self.folder.path.mkdir(parents=True, exist_ok=True)
            kept = self.folder / "id"
            kept.create(secrets.token_hex(4).encode())  # unless a driver before did
            mode: Any = os.environ.get("WANDB_MODE", "offline")
            self.begun = wandb.init(
                project="mllm",
                id=kept.read_text(),
                resume="allow",
                name=self.run,
                dir=self.folder.path,
                mode=mode,
                config=json.loads(dump(self.recipe)),
                settings=wandb.Settings(silent=True, console="off"),
            )
            self.begun.define_metric("*", step_metric="step")
        return self.begun


def scalars(record: StepRecord) -> dict[str, float]:
    """A step's numbers under the names that curves have."""
    found = {
        "loss": record.loss,
        "grad_norm": record.grad_norm,
        "lr": record.lr,
        "tokens_per_second": record.tokens / record.seconds if record.seconds else 0.0,
        "data_wait": record.data_wait,
        "fill": record.fill,
        "imbalance": record.imbalance,
        "world": float(record.world),
    }
    if record.mfu is not None:
        found["mfu"] = record.mfu
    for source in record.sources:
        found[f"source/{source.source}/loss"] = source.loss
        found[f"source/{source.source}/accuracy"] = source.accuracy
    return found


def goodput(view: StageView) -> float:
    """Share of the time from the stage's first step to its last that went into steps that count: what was lost to restarts,
    checkpoints and evaluations, and steps that were done twice, is the rest.
    """
    if not view.steps:
        return 0.0
    first = view.steps[0]
    whole = view.steps[-1].time - first.time + first.seconds
    return min(1.0, view.seconds / whole) if whole > 0 else 1.0


def sinks_of(kinds: Sequence[SinkKind], run: RunFolder, recipe: Recipe) -> list[Sink]:
    """The sinks that a site names, and Ray's metrics. Raises ValueError where one cannot be here."""
    sinks: list[Sink] = [RayMetrics(run.name)]
    for kind in dict.fromkeys(kinds):
        if kind == "tensorboard":
            sinks.append(TensorBoard(run.root / "tensorboard"))
        else:
            sinks.append(WeightsAndBiases(run.name, run.root / "wandb", recipe))
    return sinks
