"""The same packs in the same order through Ray Data, from any position, dealt to any number of ranks."""

import threading

import pytest

from pipelines.stream import COLUMN, dataset, from_bytes
from pipelines.types import Pack, Position
from pipelines.windows import PackWindows, Stream

WINDOWS = 5


def expected(packs: PackWindows, start: Position) -> list[tuple[Position, int]]:
    every = [p for k in range(start.window, WINDOWS) for p in packs.packs(k)]
    return [(p.at, p.digest) for p in every if p.at.window > start.window or p.at.pack >= start.pack]


def dealt(stream: Stream, start: Position, world: int) -> list[list[Pack]]:
    splits = dataset(stream, start, WINDOWS - start.window, actors=2).streaming_split(world, equal=False)
    ranks: list[list[Pack]] = [[] for _ in range(world)]

    def read(rank: int) -> None:
        ranks[rank] += [from_bytes(row[COLUMN]) for row in splits[rank].iter_rows()]

    threads = [threading.Thread(target=read, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ranks


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("world", "start"), [(1, Position()), (3, Position()), (2, Position(window=2, pack=3))])
def test_rank_r_gets_pack_r_and_every_worldth_after_it(
    stream: Stream, packs: PackWindows, world: int, start: Position
) -> None:
    ranks = dealt(stream, start, world)
    order = expected(packs, start)
    assert len(order) > 6
    for rank, got in enumerate(ranks):
        assert [(p.at, p.digest) for p in got] == order[rank::world]


def test_a_window_packs_the_same_whoever_asks(stream: Stream) -> None:
    once, again = (PackWindows(stream).packs(3) for _ in range(2))
    assert [p.digest for p in once] == [p.digest for p in again]
    assert [p.rows for p in once] == [p.rows for p in again]


def test_an_epoch_trains_every_row_once(packs: PackWindows, stream: Stream) -> None:
    from dataclasses import replace

    one = PackWindows(replace(stream, epochs=1.0))
    windows = one.stream.windows
    assert windows
    rows = [
        r for k in range(windows) for p in one.packs(k) for r in p.rows if r.piece == 0 and r.corpus == "example-pairs"
    ]
    assert len({(r.shard, r.row) for r in rows if r.epoch == 0}) == len([r for r in rows if r.epoch == 0])
