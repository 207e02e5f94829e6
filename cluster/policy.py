"""What is to be done when something goes wrong, as pure functions: the controller and the workers act on what they say.

after_start     a group of workers begins again: at once, after a pause, or no more
judge           a step's loss and gradient norm: fine, no number, or a leap
stragglers      ranks that compute for longer than the others, step after step
overdue         ranks that have been at one thing for longer than this run's own history explains
gate_values     what a stage's entry looks at, and whether it is open
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median, median_low
from typing import Annotated, Literal

from pydantic import Field

from cluster.journal import GroupStarted
from cluster.metrics import Evaluation
from cluster.phases import Pace, PhaseName
from cluster.standing import Phase, Standing
from mllm.care import Gate, Guard
from pipelines.types import spec

Seconds = Annotated[float, Field(gt=0)]


@spec
class Watch:
    """How a run is watched. `restarts` is how often a stage's workers may begin again from the same step, `pause` the longest
    time between two such beginnings.

    A rank hangs when its process has given no sign of life for `least` seconds, or when it has been at a step for longer than
    `patience` times the 99th percentile of this run's steps, and than `least` seconds. Other phases may take `most` seconds, or
    as many times their own percentile, whichever is longer. `notice` is what a run is given to save and end when asked to.
    A rank is a straggler whose steps take more than `straggler` times what is usual among ranks.
    """

    restarts: Annotated[int, Field(ge=0)] = 8
    pause: Seconds = 60.0
    patience: Annotated[float, Field(gt=1)] = 3.0
    least: Seconds = 30.0
    most: Seconds = 600.0
    notice: Seconds = 60.0
    straggler: Annotated[float, Field(gt=1)] = 1.5


def after_start(watch: Watch, groups: Sequence[GroupStarted], step: int) -> float | str:
    """Seconds to wait before workers begin from `step`, or why they must not. `groups` are those of the stage so far.

    Only beginnings without progress between them count; the first two cost no pause, later ones twice as much each time.
    """
    idle = 0
    for group in reversed(groups):
        if group.step != step:
            break
        idle += 1
    if idle > watch.restarts:
        return (
            f"the workers began {idle} times after step {step} and never got to the next checkpoint; see what ended them in the "
            "journal (mllm status) and the logs, mend it, and the same command goes on"
        )
    return 0.0 if idle < 2 else min(watch.pause, 2.0 ** (idle - 2))


Verdict = Literal["fine", "not_finite", "spike"]

FEWEST = 8
"""Steps without which nobody knows what is usual."""


def judge(guard: Guard, recent: Sequence[tuple[float, float]], loss: float, grad_norm: float) -> Verdict:
    """What to think of a step, given (loss, gradient norm) of those taken before it, the latest last."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return "not_finite"
    if guard.spike is None or len(recent) < FEWEST:
        return "fine"
    losses, norms = zip(*recent[-guard.window :], strict=True)
    usual = median(losses)
    spread = median(abs(one - usual) for one in losses)
    leaps = grad_norm > guard.spike * median(norms)
    rises = loss - usual > guard.spike * max(spread, 1e-3 * abs(usual))  # a loss that stands still has no spread
    return "spike" if leaps or rises else "fine"


def percentile99(seconds: Sequence[float]) -> float:
    return sorted(seconds)[math.ceil(0.99 * len(seconds)) - 1]


KNOWN = 5
"""Times that a phase must have been seen before its length is known."""


def allowed(watch: Watch, phase: Phase, history: Sequence[float]) -> float:
    """Seconds that a rank may be in a phase, given how long the run's earlier ones took."""
    if phase == "step":
        return max(watch.least, watch.patience * percentile99(history)) if len(history) >= KNOWN else watch.most
    return max(watch.most, watch.patience * percentile99(history)) if history else watch.most


def overdue(watch: Watch, ranks: Sequence[Standing], history: Mapping[Phase, Sequence[float]]) -> list[Standing]:
    """Ranks that hang, those of the earliest step first; among those of one step nobody can tell who waits for whom."""
    late = [r for r in ranks if r.silent > watch.least or r.seconds > allowed(watch, r.phase, history.get(r.phase, ()))]
    return sorted(late, key=lambda r: (r.step, -r.silent, -r.seconds))


@spec
class Straggler:
    """A rank that others wait for, the phase in which it loses most, and its seconds a step there beside the usual ones.

    `times` is how many times the usual time it takes to compute, or, where it waits for data, to compute and to wait.
    """

    rank: int
    phase: PhaseName
    seconds: float
    usual: float
    times: float

    def words(self, node: str, steps: int) -> str:
        """`rank 3 on host7 took 2.1 times the usual time over the last 64 steps, most of it in lm: 2.10 s a step, ...`"""
        return (
            f"rank {self.rank} on {node} took {self.times:.1f} times the usual time over the last {steps} steps, lost in "
            f"{self.phase}: {self.seconds:.3g} s a step, where {self.usual:.3g} s is usual"
        )


def stragglers(watch: Watch, ranks: Sequence[Pace]) -> list[Straggler]:
    """Ranks that take more than `watch.straggler` times the usual time, given what all of them, in order, took for each step.

    Usual is the median, of two in the middle the lower one: of two ranks the faster one is right. Who has more to do than
    others is no straggler, so a rank must be slow by the token as well as by the step.
    """
    busy = [pace for pace in ranks if pace.tokens > 0]
    if len(busy) < 2:
        return []
    own = median_low(pace.phases.own for pace in busy)
    by_token = median_low(pace.phases.own / pace.tokens for pace in busy)
    usual = {name: median_low(getattr(pace.phases, name) for pace in busy) for name in ("data", "vision", "lm")}
    found: list[Straggler] = []
    for rank, pace in enumerate(ranks):
        lost = {name: getattr(pace.phases, name) - usual[name] for name in usual}
        computes = pace.tokens > 0 and min(
            _times(pace.phases.own, own), _times(pace.phases.own / pace.tokens, by_token)
        )
        waits = _times(own + lost["data"], own)  # milliseconds more are no matter, however many times the usual ones
        names: list[PhaseName] = []
        if computes > watch.straggler:
            names.extend(("vision", "lm"))
        if waits > watch.straggler:
            names.append("data")
        if names:
            phase = max(names, key=lambda name: lost[name])
            times = waits if phase == "data" else computes
            seconds = getattr(pace.phases, phase)
            found.append(Straggler(rank=rank, phase=phase, seconds=seconds, usual=usual[phase], times=times))
    return found


def _times(value: float, usual: float) -> float:
    return value / usual if usual > 0 else 1.0


def gate_values(gate: Gate, before: Evaluation | None, tokens: int) -> Iterator[tuple[str, float, bool]]:
    """Each thing that a gate asks, in words, with what there is and whether that suffices; of no evaluation, no number does."""
    if gate.tokens is not None:
        yield f"{gate.tokens:,} tokens", float(tokens), tokens >= gate.tokens
    scores = [score for score in before.scores if gate.source in (None, score.source)] if before else []
    weight = sum(score.tokens for score in scores)
    where = f" on {gate.source}" if gate.source else ""
    if gate.loss is not None:
        loss = sum(s.loss * s.tokens for s in scores) / weight if weight else math.inf
        yield f"held-out loss of {gate.loss:g} at most{where}", loss, loss <= gate.loss
    if gate.accuracy is not None:
        right = sum(s.accuracy * s.tokens for s in scores) / weight if weight else 0.0
        yield f"held-out accuracy of {gate.accuracy:g} at least{where}", right, right >= gate.accuracy
