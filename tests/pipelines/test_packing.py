"""Every sample in exactly one pack, no pack over either budget."""

import random
from collections.abc import Callable
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


def captions(rng: np.random.Generator) -> list[tuple[int, int]]:
    return [(144 + int(np.clip(n, 16, 1200)), 1) for n in rng.lognormal(5.4, 0.65, 1024)]


def conversations(rng: np.random.Generator) -> list[tuple[int, int]]:
    return [(int(np.clip(n, 20, 4096)), 0) for n in rng.lognormal(6, 1.2, 1024)]


def both_scarce(rng: np.random.Generator) -> list[tuple[int, int]]:
    return [(int(tokens), int(tiles)) for tokens, tiles in rng.integers([128, 2], [1239, 7], (1024, 2))]


def dynamic_tiles(rng: np.random.Generator) -> list[tuple[int, int]]:
    return [(256 * int(n) + int(rng.integers(30, 700)), int(n)) for n in rng.choice([1, 3, 5, 7, 9, 13], 1024)]


@pytest.mark.parametrize(
    ("window", "budget"),
    [
        (captions, Budget(tokens=4096, tiles=16)),
        (conversations, Budget(tokens=4096, tiles=1)),
        (both_scarce, Budget(tokens=4096, tiles=24)),
        (dynamic_tiles, Budget(tokens=16384, tiles=48)),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_full_window_is_packed_to_a_hundredth_of_the_bound(
    window: Callable[[np.random.Generator], list[tuple[int, int]]], budget: Budget, seed: int
) -> None:
    sizes = window(np.random.default_rng(seed))
    tokens, tiles = (sum(column) for column in zip(*sizes, strict=True))
    bound = max(-(-tokens // budget.tokens), -(-tiles // budget.tiles))
    assert bound / len(assign(sizes, budget)) >= 0.99


def test_a_sample_beyond_the_budget_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"costs \(11, 0\).*holds \(10, 1\)"):
        assign([(3, 0), (11, 0)], Budget(tokens=10, tiles=1))
