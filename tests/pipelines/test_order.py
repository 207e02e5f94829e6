"""The order is a pure function: every row exactly once an epoch, the same rows whoever asks and whenever."""

import time
import tracemalloc
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.manifest import Manifest, Shard
from pipelines.order import BySize, ByWeight, Drawn, Knot, Order, Permutation, Scheduled
from pipelines.types import Window

Row = tuple[int, int, int, int]
"""Source, its epoch, shard, row."""


def manifest(name: str, shards: list[int]) -> Manifest:
    return Manifest(
        corpus=name,
        shards=tuple(Shard(uri=f"{name}/{i}", rows=rows, index="", stamp=str(rows)) for i, rows in enumerate(shards)),
    )


def sources(*sizes: list[int], weights: list[float] | None = None) -> tuple[Drawn, ...]:
    given = weights or [None] * len(sizes)
    return tuple(
        Drawn(manifest=manifest(f"c{i}", s), weight=w) for i, (s, w) in enumerate(zip(sizes, given, strict=True))
    )


def rows(window: Window) -> list[Row]:
    return [(c.source, c.epoch, c.shard, row) for c in window.chunks for row in range(c.start, c.stop)]


def drawn(order: Order, windows: int | None = None) -> list[Row]:
    return [row for k in range(windows or order.windows or 0) for row in rows(order.window(k))]


def sequence(order: Order, source: int, windows: int) -> list[tuple[int, int]]:
    """Epoch and place in the corpus of a source's rows, in the order in which windows take them."""
    starts = [0]
    for shard in order.sources[source].manifest.shards:
        starts.append(starts[-1] + shard.rows)
    return [(epoch, starts[shard] + row) for s, epoch, shard, row in drawn(order, windows) if s == source]


corpora = st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(corpora, st.integers(1, 30), st.integers(1, 9), st.integers(0, 5), st.integers(1, 3))
def test_an_epoch_by_size_holds_every_row_exactly_once(
    shards: list[list[int]], window: int, chunk: int, seed: int, epochs: int
) -> None:
    order = Order(seed=seed, sources=sources(*shards), window_rows=window, chunk_rows=chunk, epochs=epochs)
    expected = {
        (source, epoch, shard, row)
        for source, sizes in enumerate(shards)
        for epoch in range(epochs)
        for shard, size in enumerate(sizes)
        for row in range(size)
    }
    counts = Counter(drawn(order))
    assert set(counts) == expected
    assert set(counts.values()) == {1}
    assert order.windows is not None
    assert rows(order.window(order.windows)) == []


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0.05, 5)), min_size=1, max_size=4),
    st.integers(4, 40),
    st.integers(1, 9),
    st.integers(2, 12),
)
def test_weights_hold_in_every_window_and_each_epoch_of_a_source_is_whole(
    given_sources: list[tuple[int, float]], window: int, chunk: int, windows: int
) -> None:
    sizes = [[n] for n, _ in given_sources]
    order = Order(
        seed=1,
        sources=sources(*sizes, weights=[w for _, w in given_sources]),
        sampling=ByWeight(),
        window_rows=window,
        chunk_rows=chunk,
    )
    seen: Counter[Row] = Counter()
    for k in range(windows):
        found = rows(order.window(k))
        seen.update(found)
        for source, share in enumerate(order.shares(k * window)):
            assert abs(sum(row[0] == source for row in found) - share * window) <= 1
    assert max(seen.values()) == 1
    for source, (size,) in enumerate(sizes):
        epochs = Counter(epoch for s, epoch, _, _ in seen if s == source)
        assert all(epochs[epoch] == size for epoch in range(max(epochs, default=0)))


@settings(max_examples=80, deadline=None)
@given(
    st.integers(20, 90),
    st.lists(st.integers(1, 89), max_size=4),
    st.tuples(st.integers(3, 40), st.integers(3, 40)),
    st.floats(0.1, 3),
)
def test_a_sources_rows_follow_one_another_whatever_the_company_windows_and_shards(
    size: int, cuts: list[int], windows: tuple[int, int], weight: float
) -> None:
    """Read through windows of one row a chunk, since chunks are shuffled inside a window."""
    bounds = sorted({0, size, *(cut for cut in cuts if cut < size)})
    shards = [b - a for a, b in pairwise(bounds)]
    alone = Order(seed=3, sources=sources([size]), window_rows=1, chunk_rows=4)
    line = sequence(alone, 0, 2 * size)
    for window in windows:
        company = Order(
            seed=3,
            sources=sources(shards, [50], weights=[weight, 1.0]),
            sampling=ByWeight(),
            window_rows=window,
            chunk_rows=4,
        )
        done = 0
        for k in range(2 * size // window):
            taken = sequence_of(company, k)
            assert sorted(taken) == sorted(line[done : done + len(taken)])
            done += len(taken)


def sequence_of(order: Order, k: int) -> list[tuple[int, int]]:
    starts = [0]
    for shard in order.sources[0].manifest.shards:
        starts.append(starts[-1] + shard.rows)
    return [(epoch, starts[shard] + row) for s, epoch, shard, row in rows(order.window(k)) if s == 0]


@given(st.integers(1, 3000), st.text(max_size=5))
@settings(max_examples=60, deadline=None)
def test_the_permutation_is_one_and_its_inverse_undoes_it(n: int, key: str) -> None:
    permutation = Permutation(n, key)
    places = [permutation[i] for i in range(n)]
    assert sorted(places) == list(range(n))
    assert [permutation.where(value) for value in places] == list(range(n))


def test_seeds_and_epochs_change_the_order_and_asking_again_does_not() -> None:
    one, two = (Order(seed=seed, sources=sources([100, 50]), window_rows=30, chunk_rows=4) for seed in (1, 2))
    first = [rows(one.window(k)) for k in range(10)]
    assert first == [rows(one.window(k)) for k in range(10)]
    assert first[0] != rows(two.window(0))
    epochs = [[row[2:] for k in range(5 * e, 5 * e + 5) for row in first[k]] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]
    assert one.fingerprint != two.fingerprint


def test_size_to_a_power() -> None:
    def shares(power: float) -> list[float]:
        order = Order(seed=0, sources=sources([100], [400], [2500]), sampling=BySize(power=power))
        return [float(share) for share in order.shares(0)]

    assert shares(1) == pytest.approx([1 / 30, 4 / 30, 25 / 30])
    assert shares(0.5) == pytest.approx([10 / 80, 20 / 80, 50 / 80])
    assert shares(0) == pytest.approx([1 / 3] * 3)


def test_a_cap_takes_other_rows_each_epoch_and_all_in_the_end() -> None:
    big, small = manifest("big", [100]), manifest("small", [30])
    order = Order(
        seed=0, sources=(Drawn(manifest=big, cap=25), Drawn(manifest=small)), window_rows=11, chunk_rows=4, epochs=4
    )
    counts = Counter(drawn(order))
    assert order.rows == 55
    assert {row for row in counts if row[0] == 0} == {(0, 0, 0, row) for row in range(100)}
    assert {row for row in counts if row[0] == 1} == {(1, e, 0, row) for e in range(4) for row in range(30)}
    assert set(counts.values()) == {1}


def test_repeat_factors_take_a_source_so_many_times_an_epoch() -> None:
    twice = Drawn(manifest=manifest("twice", [20]), repeat=2)
    half = Drawn(manifest=manifest("half", [20]), repeat=0.5)
    found = drawn(Order(seed=0, sources=(twice, half), window_rows=7, chunk_rows=3, epochs=1))
    assert sorted(row[1:] for row in found if row[0] == 0) == [(e, 0, row) for e in (0, 1) for row in range(20)]
    assert len({row for row in found if row[0] == 1}) == 10
    both = drawn(Order(seed=0, sources=(twice, half), window_rows=7, chunk_rows=3, epochs=2))
    assert {row[1:] for row in both if row[0] == 1} == {(0, 0, row) for row in range(20)}


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(5, 60), st.integers(6, 30))
def test_groups_are_whole_in_every_window(group: int, size: int, window: int) -> None:
    grouped = Drawn(manifest=manifest("pairs", [size]), group=group)
    order = Order(seed=0, sources=(grouped, *sources([40])), window_rows=window, chunk_rows=8, epochs=2)
    assert order.windows is not None
    for k in range(order.windows - 1):
        assert sum(row[0] == 0 for row in rows(order.window(k))) % group == 0
    assert sum(row[0] == 0 for row in drawn(order)) == 2 * size


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 4), st.floats(0, 4)), min_size=1, max_size=4),
    st.integers(9, 90),
)
def test_a_schedule_of_weights_is_met_window_by_window(points: list[tuple[float, float, float]], window: int) -> None:
    knots = tuple(Knot(at=at, weights=(a, b)) for at, a, b in sorted({round(p[0], 3): p for p in points}.values()))
    order = Order(
        seed=0,
        sources=sources([500], [700]),
        sampling=Scheduled(knots=knots),
        window_rows=window,
        chunk_rows=4,
        epochs=1,
    )
    assert order.windows is not None
    total = 0
    for k in range(order.windows - 1):
        found = rows(order.window(k))
        total += len(found)
        ends = [order.shares(k * window)[0], order.shares((k + 1) * window)[0]]
        inside = [Fraction(str(knot.at)) * 1200 for knot in knots]
        ends += [order.shares(int(at))[0] for at in inside if k * window <= at <= (k + 1) * window]
        ends += [order.shares(int(at) + 1)[0] for at in inside if k * window <= at <= (k + 1) * window]
        taken = sum(row[0] == 0 for row in found)
        assert min(ends) * window - 1 <= taken <= max(ends) * window + 1
    assert abs(total - (order.windows - 1) * window) <= 2


def test_ten_thousand_shards_of_a_hundred_million_rows_are_planned_at_once() -> None:
    tracemalloc.start()
    started = time.process_time()
    huge = manifest("huge", [10_000] * 10_000)
    order = Order(seed=0, sources=(Drawn(manifest=huge), *sources([10_000])), epochs=1)
    assert order.fingerprint
    assert order.rows == 100_010_000
    assert order.windows is not None
    for k in (0, order.windows // 2, order.windows - 2):
        assert order.window(k).rows in (1023, 1024, 1025)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200 * 2**20
    assert time.process_time() - started < 20  # 2 s without the tracing; the benchmark says how long it takes


@pytest.mark.parametrize(
    ("sampling", "weights", "words"),
    [
        (ByWeight(), [0.5, None], "1 of 2 sources have a weight"),
        (BySize(), [0.5, 0.5], r"\['c0', 'c1'\] have a weight"),
        (Scheduled(knots=()), None, "stand at growing progress"),
        (Scheduled(knots=(Knot(at=0.5, weights=(1, 1)), Knot(at=0.2, weights=(1, 1)))), None, "growing progress"),
        (Scheduled(knots=(Knot(at=0, weights=(1,)),), rows=9), None, "for 2 sources"),
        (Scheduled(knots=(Knot(at=0, weights=(1, 1)),)), None, "measured in epochs, or its own `rows`"),
    ],
)
def test_a_sampling_that_does_not_fit_is_refused(sampling, weights, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Order(seed=0, sources=sources([3], [3], weights=weights), sampling=sampling)


def test_a_source_without_rows_and_a_group_beyond_a_chunk_are_refused() -> None:
    with pytest.raises(ValueError, match="'c1': an epoch takes no rows"):
        Order(seed=0, sources=sources([3], [0]))
    with pytest.raises(ValueError, match="group=9 rows make one document and chunk=8"):
        Order(seed=0, sources=(Drawn(manifest=manifest("c", [30]), group=9),), chunk_rows=8)


def test_the_mixture_reads_as_a_tree() -> None:
    order = Order(
        seed=0,
        sources=(Drawn(manifest=manifest("pages", [60, 40]), cap=50), Drawn(manifest=manifest("pairs", [50]), group=4)),
        epochs=2,
    )
    first, pages, pairs = order.tree().splitlines()
    assert "100 rows an epoch, 2 epochs" in first
    assert pages.split() == ["pages", "50.0%", "100", "rows", "in", "2", "shards,", "capped", "at", "50"]
    assert pairs.split() == ["pairs", "50.0%", "50", "rows", "in", "1", "shards,", "4", "rows", "a", "document"]
