"""The curves of a report, as tables by columns: a run of any length becomes some hundred points a curve.

    steps  ->  bins of equal size  ->  the mean of each, and its lowest and highest value

A mean alone would hide the one step in a thousand that leapt, which is the one that a person looks for: so each bin keeps its
extremes, and charts draw them as a band.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.journal import Decision, Fault, RunState
from cluster.metrics import Evaluation, StepRecord
from cluster.phases import PHASES
from cluster.views import StageView
from pipelines.types import spec

POINTS = 300
"""Of a curve at most."""

MARKS = 1000
"""Faults and decisions on the timeline at most, the latest."""

Rows = dict[str, list[Any]]
"""A table by columns: a third of the size of one by rows."""

Numbers = NDArray[np.float64]


@spec
class Binned:
    """Values of consecutive steps, binned: of each bin its mean and its extremes."""

    mean: Numbers
    low: Numbers
    high: Numbers

    @classmethod
    def of(cls, values: Numbers, edges: NDArray[np.intp], weights: Numbers | None = None) -> Binned:
        """Bins begin at `edges`, the last ends with `values` (n,). `weights` (n,) are those of the mean."""
        weights = np.ones_like(values) if weights is None else weights
        total = np.add.reduceat(weights, edges)
        mean = np.add.reduceat(values * weights, edges) / np.where(total == 0, 1, total)
        return cls(mean=mean, low=np.minimum.reduceat(values, edges), high=np.maximum.reduceat(values, edges))

    def rows(self, name: str) -> Rows:
        """Columns `name`, `name_low` and `name_high`."""
        columns = ((name, self.mean), (f"{name}_low", self.low), (f"{name}_high", self.high))
        return {column: [short(float(value)) for value in values] for column, values in columns}


def bins(steps: int, points: int = POINTS) -> NDArray[np.intp]:
    """Where the bins of so many steps begin: at most `points` of one size, the last one perhaps smaller."""
    return np.arange(0, steps, max(1, -(-steps // points)))


def step_rows(steps: Sequence[StepRecord]) -> Rows:
    """The curves of a stage. `smooth` is the loss's moving average over a twentieth of the stage."""
    if not steps:
        return {}
    edges = bins(len(steps))
    ends = np.append(edges[1:], len(steps)) - 1

    def column(name: str) -> Numbers:
        return np.array([getattr(step, name) for step in steps], float)

    loss, learned, tokens, seconds = (column(name) for name in ("loss", "learned", "tokens", "seconds"))
    pace = np.where(seconds == 0, 1.0, seconds)
    peaks = np.array([step.world * step.peak for step in steps], float) * pace
    flops = column("flops")
    shares: dict[str, tuple[Numbers, Numbers | None]] = {
        "loss": (loss, learned),
        "tokens": (tokens / pace, seconds),
        "images": (column("images") / pace, seconds),
        "seconds": (seconds, None),
        "wait": (column("data_wait") / pace, seconds),
        "learned": (learned / np.where(tokens == 0, 1.0, tokens), tokens),
        "fill": (column("fill"), None),
        "imbalance": (column("imbalance"), None),
        "lr": (column("lr"), None),
        "grad_norm": (column("grad_norm"), None),
        "flops": (flops / pace, seconds),
        "mfu": (np.divide(flops, peaks, out=np.zeros_like(flops), where=peaks > 0), peaks),
    }
    rows: Rows = {"step": [steps[end].step for end in ends]}
    smooth = smoothed(loss.tolist(), len(steps) / 20)
    rows["smooth"] = [short(smooth[end]) for end in ends]
    for name, (values, weights) in shares.items():
        rows |= Binned.of(values, edges, weights).rows(name)
    return rows


def source_rows(steps: Sequence[StepRecord], sources: Sequence[str]) -> Rows:
    """Smoothed training loss by source."""
    sums: dict[str, dict[int, tuple[float, int]]] = {source: {} for source in sources}
    size = max(1, -(-len(steps) // POINTS))
    for number, step in enumerate(steps):
        for found in step.sources:
            by_bin = sums.get(found.source)
            if by_bin is not None:
                total, tokens = by_bin.get(number // size, (0.0, 0))
                by_bin[number // size] = total + found.loss * found.tokens, tokens + found.tokens
    rows: Rows = {"step": [], "source": [], "loss": []}
    for source, by_bin in sums.items():
        points = [(at, total / tokens) for at, (total, tokens) in by_bin.items() if tokens]
        smooth = smoothed([loss for _, loss in points], len(points) / 20)
        for (at, _), loss in zip(points, smooth, strict=True):
            rows["step"].append(steps[min((at + 1) * size, len(steps)) - 1].step)
            rows["source"].append(source)
            rows["loss"].append(short(loss))
    return rows


def phase_rows(steps: Sequence[StepRecord]) -> Rows:
    """Seconds of the middle rank in each phase of a step; nothing for runs that did not tell."""
    if not any(getattr(step.usual, name) for step in steps[-50:] for name in PHASES):
        return {}
    edges = bins(len(steps))
    ends = np.append(edges[1:], len(steps)) - 1
    rows: Rows = {"step": [], "phase": [], "order": [], "seconds": []}
    for order, name in enumerate(PHASES):
        means = Binned.of(np.array([getattr(step.usual, name) for step in steps], float), edges).mean
        rows["step"] += [steps[end].step for end in ends]
        rows["phase"] += [name] * len(ends)
        rows["order"] += [order] * len(ends)
        rows["seconds"] += [short(float(value)) for value in means]
    return rows


def slowest_rank(steps: Sequence[StepRecord]) -> tuple[int, float] | None:
    """The rank that computed longest most often, and in what share of the steps; None where one rank trains or nobody told."""
    ranks = Counter(step.slowest[0] for step in steps if step.slowest and step.world > 1)
    if not ranks:
        return None
    rank, count = ranks.most_common(1)[0]
    return rank, count / ranks.total()


def crew_rows(views: Sequence[StageView], state: RunState) -> Rows:
    """Workers over time, in milliseconds since 1970 as browsers count: from each beginning of a group to the next, or to the
    moment at which the run was last heard of.
    """
    changes = [(group.time, group.world, group.stage) for group in state.groups]
    changes += [(event.time, 0, event.stage) for event in state.finished_stages]
    moments = [step.time for view in views for step in view.steps[-1:]] + [time for time, _, _ in changes]
    if not state.groups:
        return {}
    changes.sort(key=lambda change: change[0])
    end = max(moments)
    if end > changes[-1][0]:
        changes.append((end, changes[-1][1], changes[-1][2]))
    return {
        "time": [round(1000 * time) for time, _, _ in changes],
        "workers": [world for _, world, _ in changes],
        "stage": [stage for _, _, stage in changes],
    }


def fault_rows(state: RunState) -> Rows:
    """Faults, and what was done about them, over time; in the same milliseconds."""
    events = sorted((*state.faults, *state.decisions), key=lambda event: event.time)[-MARKS:]
    return {
        "time": [round(1000 * event.time) for event in events],
        "kind": ["fault" if isinstance(event, Fault) else "done about it" for event in events],
        "what": [event.what.replace("_", " ") for event in events],
        "stage": [event.stage for event in events],
        "words": [_words(event) for event in events],
    }


def _words(event: Fault | Decision) -> str:
    text = event.why if isinstance(event, Decision) else event.detail
    return (text.splitlines() or [""])[0][:200]


def held_out_rows(evaluations: Sequence[tuple[str, Evaluation]]) -> Rows:
    """Held-out results by border of the curriculum and source."""
    found = [(border, score) for border, evaluation in evaluations for score in evaluation.scores if score.tokens]
    return {
        "border": [border for border, _ in found],
        "source": [score.source for _, score in found],
        "loss": [short(score.loss) for _, score in found],
        "accuracy": [short(score.accuracy) for _, score in found],
    }


def probe_rows(evaluations: Sequence[tuple[str, Evaluation]]) -> Rows:
    """Few-shot results by border and shots."""
    found = [(border, score) for border, evaluation in evaluations for score in evaluation.probe if score.questions]
    return {
        "border": [border for border, _ in found],
        "shots": [f"{score.shots}-shot" for _, score in found],
        "accuracy": [short(score.accuracy) for _, score in found],
    }


def chance_of(evaluations: Sequence[tuple[str, Evaluation]]) -> float | None:
    """What guessing would get of the probe's questions; None where there is no probe."""
    return next((1 / score.choices for _, evaluation in evaluations for score in evaluation.probe), None)


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """Exponential moving average over about `span` values, at least 7, its start corrected as Adam corrects its moments."""
    keep = 1 - 2 / (max(span, 7.0) + 1)
    out: list[float] = []
    mean = weight = 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out


def short(value: float) -> float:
    """Five digits: a page need not carry more."""
    return value if isinstance(value, int) else float(f"{value:.5g}")
