"""Whatever the number of ranks, step s is the packs [s * B, (s + 1) * B); anything else stops the run."""

import dataclasses

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from benchmarks.common import on_ranks
from cluster.deal import Deal, OrderError
from pipelines.stream import from_table, portions
from pipelines.stream import hands as stream_hands
from pipelines.types import Hand, Pack, Position
from pipelines.windows import PackWindows, Stream


def hands_for(windows: PackWindows, rank: int, world: int, start: Position) -> list[Hand]:
    """What `rank` is dealt of the first three windows."""
    hands: list[Hand] = []
    for k in range(start.window, 3):
        first = start.pack if k == start.window else 0
        planned = portions(windows.plan(k, windows.rows(k)), windows.stream, first, world)
        tables = [table for portion in planned for table in stream_hands(windows, portion)]
        hands += [from_table(table, 0) for table in tables[rank::world]]
    return hands


def steps(stream: Stream, per_step: int, start: Position) -> list[tuple[list[int], int, Position]]:
    rank, world = dist.get_rank(), dist.get_world_size()
    hands = hands_for(PackWindows(stream), rank, world, start)
    deal = Deal(hands, start, per_step, rank, world, Pack.empty((3, 96, 96)), None)
    return [([held.digest for held in step.all], len(step.mine), step.following) for step in deal]


@pytest.mark.parametrize("start", [Position(), Position(window=1, pack=2)])
def test_steps_are_the_same_for_any_number_of_ranks(stream: Stream, start: Position) -> None:
    windows = PackWindows(stream)
    order = [p.digest for k in range(3) for p in windows.packs(k) if (k, p.at.pack) >= (start.window, start.pack)]
    expected = [order[i : i + 4] for i in range(0, len(order), 4)]
    for world in (1, 2, 3):
        ranks = on_ranks(world, steps, stream, 4, start)
        for rank in ranks:
            assert [digests for digests, _, _ in rank] == expected
            assert rank[-1][2] == Position(window=3)
        for taken in zip(*([packs for _, packs, _ in rank] for rank in ranks), strict=True):
            assert len(set(taken)) == 1  # every rank goes through as many packs
            assert -(-4 // world) <= taken[0] <= -(-4 // world) + 1


@dataclasses.dataclass
class Alone:
    """A process group of one, for the length of a test."""

    def __enter__(self) -> None:
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)

    def __exit__(self, *_: object) -> None:
        dist.destroy_process_group()


def hand(pack: Pack) -> Hand:
    return Hand(window=pack.at.window, of=pack.of, first=pack.at.pack, last=pack.at.pack + 1, packs=(pack,))


@pytest.mark.parametrize("fault", ["gap", "repeat", "swap"])
def test_a_gap_a_repeat_and_a_swap_are_found_and_named(packs: PackWindows, fault: str) -> None:
    order = list(packs.packs(0))[:6]
    broken: dict[str, list[Pack]] = {
        "gap": [*order[:2], *order[3:]],
        "repeat": [*order[:3], *order[2:]],
        "swap": [*order[:2], order[3], order[2], *order[4:]],
    }
    with Alone(), pytest.raises(OrderError, match=r"should be Position\(window=0, pack=\d\) .* and is Position"):
        list(Deal([hand(pack) for pack in broken[fault]], Position(), 4, 0, 1, Pack.empty((3, 96, 96)), None))


def test_what_the_stream_raises_reaches_the_loop(packs: PackWindows) -> None:
    def failing():
        yield hand(next(packs.packs(0)))
        raise OSError("the disk is gone")

    with Alone(), pytest.raises(OSError, match="the disk is gone"):
        list(Deal(failing(), Position(), 2, 0, 1, Pack.empty((3, 96, 96)), None))
