"""Policies are pure: what is done about a fault follows from what is known of the run, and from nothing else."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.journal import GroupStarted
from cluster.metrics import Evaluation
from cluster.phases import Pace, Phases
from cluster.policy import (
    Phase,
    Standing,
    Watch,
    after_start,
    allowed,
    gate_values,
    judge,
    overdue,
    percentile99,
    stragglers,
)
from mllm.care import Gate, Guard
from mllm.evaluate import SourceScore

WATCH = Watch(restarts=3, least=2.0, most=600.0, patience=3.0, pause=5.0)


def groups(*steps: int) -> list[GroupStarted]:
    return [GroupStarted(time=0.0, stage="align", fingerprint="f", world=2, step=step) for step in steps]


def test_workers_begin_again_at_once_then_after_growing_pauses_and_at_last_no_more() -> None:
    said = [after_start(WATCH, groups(*[40] * idle), 40) for idle in range(5)]
    assert said[:4] == [0.0, 0.0, 1.0, 2.0]
    assert isinstance(said[4], str)
    assert "4 times after step 40" in said[4]
    assert after_start(WATCH, groups(*[40] * 9), 45) == 0.0, "progress was made: the count begins anew"
    assert after_start(Watch(restarts=99), groups(*[0] * 50), 0) == 60.0


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(0, 5))
def test_a_run_that_makes_progress_is_never_given_up(steps: list[int], step: int) -> None:
    said = after_start(WATCH, groups(*steps), step)
    tail = len(steps) - next((i for i in range(len(steps), 0, -1) if steps[i - 1] != step), 0)
    assert isinstance(said, str) == (tail > WATCH.restarts)


CALM = [(3.0 + 0.01 * (i % 5), 1.0 + 0.1 * (i % 3)) for i in range(32)]


@pytest.mark.parametrize(
    ("loss", "norm", "verdict"),
    [
        (3.02, 1.1, "fine"),
        (2.0, 0.1, "fine"),
        (3.02, 9.0, "spike"),
        (3.5, 1.1, "spike"),
        (math.nan, 1.0, "not_finite"),
        (3.0, math.inf, "not_finite"),
    ],
)
def test_a_step_is_judged_by_those_before_it(loss: float, norm: float, verdict: str) -> None:
    assert judge(Guard(spike=5.0), CALM, loss, norm) == verdict
    unguarded = judge(Guard(), CALM, loss, norm)
    assert unguarded == ("not_finite" if verdict == "not_finite" else "fine")


def test_of_too_few_steps_nobody_knows_what_is_usual() -> None:
    assert judge(Guard(spike=2.0), CALM[:7], 100.0, 100.0) == "fine"
    assert judge(Guard(spike=2.0), CALM[:8], 100.0, 100.0) == "spike"


@given(st.lists(st.floats(0.1, 100.0), min_size=5, max_size=300))
def test_a_step_may_take_three_times_what_this_runs_slowest_take(history: list[float]) -> None:
    limit = allowed(WATCH, "step", history)
    assert limit == max(2.0, 3 * percentile99(history))
    assert sum(seconds > percentile99(history) for seconds in history) <= 0.01 * len(history)


def standing(rank: int, phase: Phase, step: int, seconds: float, silent: float = 0.5) -> Standing:
    return Standing(rank=rank, phase=phase, step=step, seconds=seconds, silent=silent, node="n", pid=rank)


def test_ranks_hang_that_are_silent_or_longer_at_a_step_than_history_explains() -> None:
    history: dict[Phase, list[float]] = {"step": [0.5] * 50}
    assert overdue(WATCH, [standing(0, "step", 9, 1.9), standing(1, "data", 9, 300.0)], history) == []
    late = [standing(0, "step", 9, 5.0), standing(1, "data", 8, 4.0, silent=4.0)]
    assert [rank.rank for rank in overdue(WATCH, late, history)] == [1, 0], "the one that is behind comes first"
    assert overdue(WATCH, [standing(0, "step", 1, 599.0)], {"step": [0.5]}) == [], (
        "the first steps compile, and nobody knows"
    )
    assert overdue(WATCH, [standing(0, "save", 9, 700.0)], {"save": [300.0]}) == []


def test_a_gate_looks_at_what_it_names() -> None:
    scores = (
        SourceScore(source="pairs", loss=2.0, accuracy=0.5, tokens=100),
        SourceScore(source="pages", loss=4.0, accuracy=0.3, tokens=300),
    )
    before = Evaluation(stage="align", when="after", scores=scores)
    (loss,) = gate_values(Gate(loss=3.4), before, 0)
    assert loss == ("held-out loss of 3.4 at most", 3.5, False)
    (one,) = gate_values(Gate(loss=3.4, source="pairs"), before, 0)
    assert one == ("held-out loss of 3.4 at most on pairs", 2.0, True)
    tokens, right = gate_values(Gate(tokens=1000, accuracy=0.3), before, 999)
    assert not tokens[2]
    assert right[1] == pytest.approx(0.35)
    assert right[2]
    assert not next(gate_values(Gate(loss=9.0), None, 0))[2], "what was not evaluated opens no gate"


def pace(vision: float, lm: float, data: float = 0.01, tokens: float = 1000.0) -> Pace:
    return Pace(phases=Phases(data=data, vision=vision, lm=lm, communication=1.0), tokens=tokens)


TIMES = st.floats(1e-3, 1e3)


@given(TIMES, TIMES, st.integers(1, 512))
def test_of_equal_ranks_none_is_a_straggler(vision: float, lm: float, world: int) -> None:
    assert stragglers(WATCH, [pace(vision, lm)] * world) == []


@given(TIMES, TIMES, st.integers(2, 64), st.data(), st.floats(1.6, 50.0), st.booleans())
def test_a_rank_that_is_so_many_times_slower_is_the_one_that_is_named(
    vision: float, lm: float, world: int, data: st.DataObject, times: float, in_vision: bool
) -> None:
    slow = data.draw(st.integers(0, world - 1))
    more = (times - 1) * (vision + lm)
    paces = [pace(vision, lm)] * world
    paces[slow] = pace(vision + more, lm) if in_vision else pace(vision, lm + more)
    (found,) = stragglers(WATCH, paces)
    assert (found.rank, found.phase) == (slow, "vision" if in_vision else "lm")
    assert found.times == pytest.approx(times)


def test_a_rank_that_waits_for_data_is_named_for_that_and_milliseconds_are_no_matter() -> None:
    (found,) = stragglers(WATCH, [pace(0.5, 0.5), pace(0.5, 0.5, data=1.01), pace(0.5, 0.5)])
    assert (found.rank, found.phase, found.seconds, found.usual) == (1, "data", 1.01, 0.01)
    assert "rank 1 on host7 took 2.0 times" in found.words("host7", 64)
    assert stragglers(WATCH, [pace(0.5, 0.5), pace(0.5, 0.5, data=0.1), pace(0.5, 0.5)]) == []


def test_who_has_more_to_do_is_no_straggler() -> None:
    assert stragglers(WATCH, [pace(0.5, 0.5), pace(1.0, 1.0, tokens=2000.0), pace(0.5, 0.5)]) == []
    assert stragglers(WATCH, [pace(0.5, 0.5), pace(0.4, 0.4, tokens=400.0), pace(0.5, 0.5)]) == []
    assert stragglers(WATCH, [pace(0.5, 0.5), pace(0.1, 0.1, tokens=0.0)]) == [], "one that has nothing is not compared"


def test_of_two_ranks_the_faster_is_right_and_patience_is_the_sites() -> None:
    ranks = [pace(0.5, 1.5), pace(0.5, 0.5)]
    assert [(one.rank, one.phase) for one in stragglers(WATCH, ranks)] == [(0, "lm")]
    assert stragglers(Watch(straggler=2.5), ranks) == []
