"""What a run's files tell of its stages, for whoever shows it: terminal, page, report, monitors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from cluster.journal import RunState, StageFinished, StageStarted
from cluster.metrics import Evaluation, RunFolder, StepRecord, utilisation
from mllm.evaluate import ProbeScore, SourceScore
from mllm.recipe import Recipe

Standing = Literal["done", "running", "stopped", "failed", "waiting"]

RECENT = 10
"""Steps over which rates are averaged."""


@dataclass(slots=True)
class StageView:
    """All that a run's files tell of one stage."""

    name: str
    standing: Standing = "waiting"
    started: StageStarted | None = None
    finished: StageFinished | None = None
    steps: list[StepRecord] = field(default_factory=list)
    before: Evaluation | None = None
    after: Evaluation | None = None
    during: list[Evaluation] = field(default_factory=list)

    @property
    def last(self) -> StepRecord | None:
        return self.steps[-1] if self.steps else None

    @property
    def total(self) -> int | None:
        """Steps of the stage: as planned, or estimated from progress."""
        if self.started and self.started.steps:
            return self.started.steps
        return round(self.last.step / self.last.progress) if self.last and self.last.progress > 0 else None

    @property
    def total_words(self) -> str:
        """`60`, or `~60` where it is an estimate."""
        planned = self.standing == "done" or (self.started and self.started.steps)
        return "?" if self.total is None else f"{'' if planned else '~'}{self.total:,}"

    @property
    def tokens(self) -> int:
        return sum(step.tokens for step in self.steps)

    @property
    def images(self) -> int:
        return sum(step.images for step in self.steps)

    @property
    def seconds(self) -> float:
        """Time spent in steps; evaluations and checkpoints come on top."""
        return sum(step.seconds for step in self.steps)

    @property
    def dropped(self) -> Counter[str]:
        """Rows dropped, by reason."""
        reasons: Counter[str] = Counter()
        for step in self.steps:
            reasons.update(step.reasons)
        return reasons

    def rate(self, what: Literal["tokens", "images", "flops"], last: int | None = None) -> float:
        """`what` a second, over the `last` steps or all of them."""
        steps = self.steps if last is None else self.steps[-last:]
        seconds = sum(step.seconds for step in steps)
        return sum(getattr(step, what) for step in steps) / seconds if seconds else 0.0

    def mfu(self, last: int | None = None) -> float | None:
        """Share of what the devices could compute that went into the model, waiting included; None where it is unknown."""
        return utilisation(self.steps if last is None else self.steps[-last:])

    def wait(self, last: int | None = None) -> float:
        """Share of the time spent waiting for data."""
        steps = self.steps if last is None else self.steps[-last:]
        seconds = sum(step.seconds for step in steps)
        return sum(step.data_wait for step in steps) / seconds if seconds else 0.0

    @property
    def remaining(self) -> float | None:
        """Seconds to the stage's end at the pace of its last steps."""
        steps = self.steps[-5 * RECENT :]
        gained = steps[-1].progress - steps[0].progress if steps else 0.0
        if gained <= 0:
            return None
        return (1 - steps[-1].progress) * sum(step.seconds for step in steps[1:]) / gained

    def add(self, record: StepRecord) -> None:
        """Append a step; one that was trained again after a crash replaces what it undid."""
        while self.steps and self.steps[-1].step >= record.step:
            self.steps.pop()
        self.steps.append(record)


def run_standing(state: RunState) -> Literal["finished", "stopped", "failed", "running", "not started"]:
    """The run in a word. `stopped` is by a person's hand; one that was killed still says `running`."""
    if state.finished:
        return "finished"
    if state.stopped:
        return "stopped"
    if state.failure:
        return "failed"
    return "running" if state.starts else "not started"


def stage_views(run: RunFolder, recipe: Recipe, state: RunState) -> list[StageView]:
    """The recipe's stages, in order, as far as the run has got with them."""
    started = {event.stage: event for event in state.started_stages}
    finished = {event.stage: event for event in state.finished_stages}
    word = run_standing(state)
    current: Standing = word if word in ("failed", "stopped") else "running"
    views = []
    for name in (stage.name for stage in recipe.stages):
        standing: Standing = "done" if name in finished else current if name == state.stage else "waiting"
        views.append(
            StageView(
                name=name,
                standing=standing,
                started=started.get(name),
                finished=finished.get(name),
                steps=run.steps(name),
                before=run.evaluation(name, "before"),
                after=run.evaluation(name, "after"),
                during=run.evaluations(name),
            )
        )
    return views


def borders(views: Sequence[StageView]) -> list[tuple[str, Evaluation]]:
    """The evaluations through the curriculum: before it, during each stage and after it, which is before the next one."""
    first = next((view.before for view in views if view.before), None)
    found = [("before training", first)] if first else []
    for view in views:
        found += [(f"{view.name}, step {each.step:,}", each) for each in view.during if each.step is not None]
        found += [(f"after {view.name}", view.after)] if view.after else []
    return found


def paired_scores(
    before: Evaluation | None, after: Evaluation | None
) -> list[tuple[str, SourceScore | None, SourceScore | None]]:
    """Each held-out source with its score on either side of a stage."""
    old = {score.source: score for score in before.scores} if before else {}
    new = {score.source: score for score in after.scores} if after else {}
    return [(source, old.get(source), new.get(source)) for source in {**old, **new}]


def paired_probes(
    before: Evaluation | None, after: Evaluation | None
) -> list[tuple[int, ProbeScore | None, ProbeScore | None]]:
    """The same for each number of shots; a probe that asked nothing is left out."""
    old = {score.shots: score for score in before.probe if score.questions} if before else {}
    new = {score.shots: score for score in after.probe if score.questions} if after else {}
    return [(shots, old.get(shots), new.get(shots)) for shots in {**old, **new}]
