"""Every sample in exactly one pack, no pack over either budget."""

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.packing import assign, plan
from pipelines.types import Budget, Cut, Image, Pack, Picture, RowId, Sample

costs = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 8)), max_size=80)


def sample(tokens: int, tiles: int, row: int = 0) -> Sample:
    return Sample(
        id=RowId(corpus="c", shard="s", epoch=0, row=row),
        source=0,
        input_ids=np.arange(tokens, dtype=np.int32),
        labels=np.arange(tokens, dtype=np.int32),
        lengths=(tokens,),
        pictures=(Picture(of=Image(data=b""), cut=Cut(height=4, width=4, rows=1, cols=tiles, canvas=(4, 4))),),
        visual=(tiles,),
        rows=(RowId(corpus="c", shard="s", epoch=0, row=row),),
    )


@settings(max_examples=200, deadline=None)
@given(costs)
def test_each_once_and_within_both_budgets(sizes: list[tuple[int, int]]) -> None:
    groups = assign(sizes, Budget(tokens=100, tiles=8))
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    for group in groups:
        assert sum(sizes[i][0] for i in group) <= 100
        assert sum(sizes[i][1] for i in group) <= 8


@settings(max_examples=50, deadline=None)
@given(costs, st.integers(0, 3))
def test_a_plan_keeps_every_sample_and_packs_restart_positions(sizes: list[tuple[int, int]], seed: int) -> None:
    samples = [sample(tokens, tiles, row) for row, (tokens, tiles) in enumerate(sizes)]
    groups = plan(samples, Budget(tokens=100, tiles=8), random.Random(seed))
    assert sorted(s.id.row for group in groups for s in group) == list(range(len(sizes)))
    for group in groups:
        pack = Pack.of_samples(group, np.zeros((sum(s.tiles for s in group), 3, 4, 4), np.uint8))
        for start, stop in pairwise(pack.cu_seqlens):
            assert pack.positions[start:stop].tolist() == list(range(stop - start))


def test_a_full_window_is_packed_tightly() -> None:
    rng = random.Random(0)
    sizes = [(rng.randint(20, 900), rng.randint(0, 6)) for _ in range(1024)]
    groups = assign(sizes, Budget(tokens=4096, tiles=24))
    bound = max(sum(t for t, _ in sizes) / 4096, sum(n for _, n in sizes) / 24)
    assert bound / len(groups) > 0.97


def test_a_sample_beyond_the_budget_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"costs \(11, 0\).*holds \(10, 1\)"):
        assign([(3, 0), (11, 0)], Budget(tokens=10, tiles=1))
