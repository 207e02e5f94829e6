"""The same packs in the same order through Ray Data, from any position, dealt to any number of ranks."""

import threading
from dataclasses import replace

import pytest

from cluster.site import Site
from mllm.recipe import Epochs, Recipe
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


def test_an_epoch_trains_every_row_once(site: Site, recipe: Recipe) -> None:
    stage = recipe.stage("pretrain")
    by_size = replace(stage, duration=Epochs(), mixture=tuple(replace(source, weight=None) for source in stage.mixture))
    once = site.stream(recipe, by_size)
    assert once.windows
    packs = [pack for k in range(once.windows) for pack in PackWindows(once).packs(k)]
    rows = [(row.corpus, row.shard, row.row) for pack in packs for row in pack.rows if row.piece == 0]
    assert len(rows) == len(set(rows)) == once.order.rows
    assert not any(pack.dropped for pack in packs)
