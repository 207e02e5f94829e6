"""The schedule runs on progress; progress on steps, tokens or the data's own length."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.schedule import accumulation, learning_rate_factor, planned_steps, progress
from mllm.recipe import Cosine, Epochs, Recipe, Steps, Tokens
from pipelines.types import Position


@given(st.floats(0, 1), st.floats(0, 0.5), st.floats(0, 0.5))
def test_the_rate_stays_between_nothing_and_its_peak(at: float, warmup: float, floor: float) -> None:
    assert 0 <= learning_rate_factor(Cosine(warmup=warmup, floor=floor), at) <= 1 + 1e-9


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
