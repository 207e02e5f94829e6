"""The schedule runs on progress; progress on steps, tokens or the data's own length."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.schedule import accumulation, learning_rate_factor, planned_steps, progress
from mllm.recipe import WSD, Constant, Cosine, Epochs, Linear, Recipe, Schedule, Steps, Tokens
from pipelines.types import Position

half = st.floats(0, 0.5)
schedules = st.one_of(
    st.builds(Cosine, warmup=half, floor=half),
    st.builds(Linear, warmup=half, floor=half),
    st.builds(Constant, warmup=half),
    st.builds(WSD, warmup=half, decay=st.floats(0.01, 0.5)),
)


@given(schedules, st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_every_rate_climbs_to_its_peak_and_never_climbs_again(schedule: Schedule, at: list[float]) -> None:
    earlier, later = (learning_rate_factor(schedule, progress) for progress in sorted(at))
    assert 0 <= min(earlier, later) <= max(earlier, later) <= 1 + 1e-9
    if max(at) < schedule.warmup:
        assert earlier <= later
    elif min(at) >= schedule.warmup:
        assert later <= earlier + 1e-9


def test_what_each_schedule_says_in_the_middle_and_at_the_end() -> None:
    for schedule, middle, end in [
        (Cosine(warmup=0, floor=0.1), 0.55, 0.1),
        (Linear(warmup=0, floor=0.2), 0.6, 0.2),
        (Constant(warmup=0), 1, 1),
        (WSD(warmup=0, decay=0.2, halvings=4), 1, 1 / 16),
    ]:
        assert learning_rate_factor(schedule, 0.5) == pytest.approx(middle)
        assert learning_rate_factor(schedule, 1) == pytest.approx(end)
    assert learning_rate_factor(WSD(warmup=0, decay=0.2, halvings=4), 0.9) == pytest.approx(1 / 4)
    with pytest.raises(ValueError, match="more than the whole stage"):
        WSD(warmup=0.5, decay=0.6)


def test_warm_up_peak_and_floor() -> None:
    schedule = Cosine(warmup=0.1, floor=0.2)
    assert learning_rate_factor(schedule, 0.05) == pytest.approx(0.5)
    assert learning_rate_factor(schedule, 0.1) == pytest.approx(1)
    assert learning_rate_factor(schedule, 0.55) == pytest.approx(0.6)
    assert learning_rate_factor(schedule, 1) == pytest.approx(0.2)


@given(st.integers(1, 500), st.integers(1, 64))
def test_ranks_share_a_step_with_less_than_one_empty_pack_each(packs: int, world: int) -> None:
    each = accumulation(packs, world)
    assert 0 <= each * world - packs < world


def test_progress_of_each_kind_of_duration(recipe: Recipe) -> None:
    stage = recipe.stage("align")
    at = Position(window=3, pack=5)
    assert progress(replace(stage, duration=Steps(count=8)), None, 2, 0, at, 10) == 0.25
    assert progress(replace(stage, duration=Tokens(count=1000)), None, 2, 1500, at, 10) == 1
    assert progress(replace(stage, duration=Epochs()), 7, 2, 0, at, 10) == 0.5
    assert planned_steps(replace(stage, duration=Steps(count=8))) == 8
    assert planned_steps(replace(stage, duration=Epochs())) is None
