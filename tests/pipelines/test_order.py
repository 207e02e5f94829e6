"""The order is a pure function: every row exactly once an epoch, the same rows whoever asks and whenever."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.manifest import Manifest, Shard
from pipelines.order import Order, Permutation
from pipelines.types import Window


def manifest(name: str, shards: list[int]) -> Manifest:
    return Manifest(
        corpus=name,
        shards=tuple(Shard(uri=f"{name}/{i}", rows=rows, index="", stamp=str(rows)) for i, rows in enumerate(shards)),
    )


def rows(window: Window) -> list[tuple[int, int, int, int]]:
    return [(c.source, c.epoch, c.shard, row) for c in window.chunks for row in range(c.start, c.stop)]


corpora = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(corpora, st.integers(1, 30), st.integers(1, 9), st.integers(0, 5), st.integers(1, 3))
def test_an_epoch_by_size_holds_every_row_exactly_once(
    shards: list[list[int]], window: int, chunk: int, seed: int, epochs: int
) -> None:
    manifests = [manifest(f"c{i}", sizes) for i, sizes in enumerate(shards)]
    order = Order.of(manifests, [None] * len(manifests), seed, window, chunk)
    drawn = Counter(row for k in range(order.windows(epochs)) for row in rows(order.window(k, epochs)))
    expected = {
        (source, epoch, shard, row)
        for source, sizes in enumerate(shards)
        for epoch in range(epochs)
        for shard, size in enumerate(sizes)
        for row in range(size)
    }
    assert set(drawn) == expected
    assert set(drawn.values()) == {1}
    assert rows(order.window(order.windows(epochs), epochs)) == []


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0.05, 5)), min_size=1, max_size=4),
    st.integers(4, 40),
    st.integers(1, 9),
    st.integers(2, 12),
)
def test_weights_hold_in_every_window_and_no_row_repeats_within_an_epoch(
    sources: list[tuple[int, float]], window: int, chunk: int, windows: int
) -> None:
    order = Order.of(
        [manifest(f"c{i}", [n]) for i, (n, _) in enumerate(sources)], [w for _, w in sources], 1, window, chunk
    )
    seen: Counter[tuple[int, int, int, int]] = Counter()
    for k in range(windows):
        drawn = rows(order.window(k))
        seen.update(drawn)
        for source, weight in enumerate(order.weights):
            share = sum(row[0] == source for row in drawn)
            assert abs(share - weight * window) <= 1
    assert max(seen.values()) == 1


@given(st.integers(1, 3000), st.text(max_size=5))
@settings(max_examples=60, deadline=None)
def test_the_permutation_is_one_and_its_inverse_undoes_it(n: int, key: str) -> None:
    permutation = Permutation(n, key)
    places = [permutation[i] for i in range(n)]
    assert sorted(places) == list(range(n))
    assert [permutation.where(value) for value in places] == list(range(n))


def test_seeds_and_epochs_change_the_order_and_asking_again_does_not() -> None:
    corpus = manifest("c", [100, 50])
    one, two = (Order.of([corpus], [None], seed, 30, 4) for seed in (1, 2))
    first = [rows(one.window(k)) for k in range(10)]
    assert first == [rows(one.window(k)) for k in range(10)]
    assert first[0] != rows(two.window(0))
    epochs = [[row[2:] for k in range(5 * e, 5 * e + 5) for row in first[k]] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]
    assert one.fingerprint != two.fingerprint


def test_any_window_of_a_huge_corpus_is_cheap() -> None:
    order = Order.of([manifest("huge", [10_000] * 10_000)], [None], 0, 1024, 32)
    assert order.window(90_000).rows == 1024
    assert order.rows == 100_000_000


def test_a_weight_for_some_sources_only_is_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 sources have a weight"):
        Order.of([manifest("a", [3]), manifest("b", [3])], [0.5, None], 0, 8, 2)
    with pytest.raises(ValueError, match="'b' holds no rows"):
        Order.of([manifest("a", [3]), manifest("b", [0])], [None, None], 0, 8, 2)
    assert Order.of([manifest("a", [3]), manifest("b", [9])], [1, 3], 0, 8, 2).weights == (
        Fraction(1, 4),
        Fraction(3, 4),
    )
