"""Every sample in exactly one pack, no pack over either budget."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.packing import assign, pack
from pipelines.types import Budget, Position, Reason, Rejected, RowId, Sample

costs = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 8)), max_size=80)


def sample(tokens: int, tiles: int, row: int = 0) -> Sample:
    return Sample(
        id=RowId(corpus="c", shard="s", epoch=0, row=row),
        source=0,
        input_ids=np.arange(tokens, dtype=np.int32),
        labels=np.arange(tokens, dtype=np.int32),
        tiles=np.zeros((tiles, 3, 4, 4), np.uint8),
        grids=np.ones((tiles, 2), np.int16),
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
def test_packs_keep_every_token_and_restart_positions(sizes: list[tuple[int, int]], seed: int) -> None:
    samples = [sample(tokens, tiles, row) for row, (tokens, tiles) in enumerate(sizes)]
    packs = pack(samples, Budget(tokens=100, tiles=8), 5, 4, random.Random(seed))
    assert [p.at for p in packs] == [Position(window=5, pack=i) for i in range(len(packs))]
    assert {p.of for p in packs} == {len(packs)}
    assert sorted(row.row for p in packs for row in p.rows) == list(range(len(sizes)))
    for p in packs:
        for start, stop in zip(p.cu_seqlens, p.cu_seqlens[1:], strict=False):
            assert p.positions[start:stop].tolist() == list(range(stop - start))


def test_a_full_window_is_packed_tightly() -> None:
    rng = random.Random(0)
    sizes = [(rng.randint(20, 900), rng.randint(0, 6)) for _ in range(1024)]
    groups = assign(sizes, Budget(tokens=4096, tiles=24))
    bound = max(sum(t for t, _ in sizes) / 4096, sum(n for _, n in sizes) / 24)
    assert bound / len(groups) > 0.97


def test_a_window_whose_rows_were_all_dropped_keeps_its_place() -> None:
    bad = Rejected(row=RowId(corpus="c", shard="s", epoch=0, row=1), reason=Reason.EMPTY)
    (empty,) = pack([], Budget(tokens=10, tiles=1), 3, 4, random.Random(0), (bad,))
    assert empty.at == Position(window=3)
    assert empty.learned == 0
    assert empty.dropped == (bad,)


def test_a_sample_beyond_the_budget_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"costs \(11, 0\).*holds \(10, 1\)"):
        assign([(3, 0), (11, 0)], Budget(tokens=10, tiles=1))
