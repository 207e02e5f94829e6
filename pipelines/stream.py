"""A stream of packs as a Ray Data dataset, in order, from any position. The only file of this floor that imports Ray.

    window numbers --planners--> portions --preprocessors--> hands [--annotators-->] --streaming_split(W)--> ranks

A *hand* is what one rank gets of a run of neighbouring packs of one window: pack number n of a window goes to rank n mod W
(`rank_of` where ranks share packs). A run has a hand for each rank, in the order of ranks, even an empty one; so hand i of the
stream is rank i mod W's, and every rank learns from its own hands how many packs there were in all. Handing over costs a few
milliseconds of many processes' time however much is in the hand, which is why packs do not travel one by one.

A *portion* is some neighbouring hands before their pictures are decoded: what one preprocessor makes in one call. Ranks take
hands in order, so what actors make ahead must wait in the object store; were a whole window one actor's, the store would have
to hold a window for each actor, and where it cannot, all actors but one stand still. Of portions it holds a few a piece. Only
one or two preprocessors are too few to have planners beside them: each plans and cuts whole windows, in turns.

Three settings make the deal exact (each has a test): `preserve_order`, blocks of one row, and `equal=False`, since `equal`
drops rows. Ray's splitter promises no order in words, so every pack carries its position and the worker checks it.

A hand is one row of two binary cells: its tiles as they lie in memory, and the rest pickled. Tiles are decoded into one
buffer and copied once, into the object store; a trainer on the same node reads them where they are.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy, DataContext, ExecutionOptions, ExecutionResources

from ops import images
from pipelines import pace
from pipelines.annotate import OfDocuments, OfPacks
from pipelines.late import Annotator, Planner, Preprocessor, Windows, late
from pipelines.types import Hand, Position, spec
from pipelines.windows import PackWindows, Plan, Pools, Stream

if TYPE_CHECKING:
    from ray.data import Dataset

HAND_BYTES = 16 * 2**20
"""About what one hand weighs at most, unless a single pack weighs more."""

MOST_PACKS = 64
"""Packs of one hand at most: packs of text alone weigh next to nothing, and a rank should not wait for thousands."""

PORTION_BYTES = 64 * 2**20
"""About what the hands of one portion weigh together: some tenths of a second of one core."""

AHEAD = 8
"""Hands (or portions) that an actor may have made and Ray Data not yet taken; of the default, 2, actors fall idle."""

FEW = 2
"""So many preprocessors take whole windows, one each; of more, some plan and the others share what is planned."""

WINDOW_AHEAD = 32
"""As `AHEAD`, where an actor makes a whole window while the trainers take another's."""


@spec
class Slot:
    """A hand that is planned: packs `first` to `last` are dealt together, and these are the `numbers` of one rank's."""

    first: int
    last: int
    numbers: tuple[int, ...]


@spec
class Portion:
    """Neighbouring hands that are planned: what the plan says of them, with the bytes of their pictures."""

    plan: Plan
    slots: tuple[Slot, ...]


class _Planner:
    """An actor that reads and plans: window numbers in, portions out. Holds the annotators of documents."""

    def __init__(self, stream: Stream, start: Position, world: int, context: int) -> None:
        images.settle()
        self.windows = PackWindows(stream)
        _ = self.windows.of_documents  # loaded before the first window comes
        self.start = start
        self.world = world
        self.context = context

    def portions(self, batch: pa.Table) -> Iterator[Portion]:
        for k in batch["window"].to_pylist():
            plan = self.windows.plan(k, self.windows.rows(k))
            first = self.start.pack if k == self.start.window else 0
            yield from portions(plan, self.windows.stream, first, self.world, self.context)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for portion in self.portions(batch):
            yield pa.table({"portion": _cell(pickle.dumps(portion, protocol=5))})


class _Cutter:
    """An actor that decodes: portions in, hands out."""

    def __init__(self, stream: Stream) -> None:
        images.settle()
        self.windows = PackWindows(stream)

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for row in range(len(table)):
            yield from hands(self.windows, pickle.loads(_bytes(table, "portion", row)))


class _Both:
    """The actor of a small pool: it plans windows and cuts them, since one more process would take a core from them."""

    def __init__(self, stream: Stream, start: Position, world: int, context: int) -> None:
        self.planner = _Planner(stream, start, world, context)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for portion in self.planner.portions(batch):
            yield from hands(self.planner.windows, portion)


class _Annotator:
    """An actor with annotators of packs: hands in, hands out."""

    def __init__(self, stream: Stream) -> None:
        self.windows = PackWindows(stream)
        _ = self.windows.of_packs

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        for row in range(len(table)):
            hand = from_table(table, row)
            hand = replace(hand, packs=tuple(self.windows.annotated(pack) for pack in hand.packs))
            yield to_table(hand, np.concatenate([pack.tiles for pack in hand.packs]) if hand.packs else None)


def rank_of(number: int, world: int, context: int = 1) -> int:
    """The rank that is dealt pack `number` of a window.

    Where neighbours share packs, `context` of them, each group of neighbours gets a pack before any gets its second.
    """
    groups = world // context
    return number % groups * context + number // groups % context


def portions(plan: Plan, stream: Stream, first: int, world: int, context: int = 1) -> Iterator[Portion]:
    """A window from pack `first` on, in portions, in the order in which their hands are dealt to `world` ranks."""
    weight = prod(stream.tiling.shape)
    each = max(1, min(MOST_PACKS, HAND_BYTES // (stream.budget.tiles * weight + 16 * stream.budget.tokens)))
    slots: list[Slot] = []
    tiles = 0
    for start in range(first, plan.packs, each * world):
        stop = min(plan.packs, start + each * world)
        for rank in range(world):
            numbers = tuple(n for n in range(start, stop) if rank_of(n, world, context) == rank)
            slots.append(Slot(first=start, last=stop, numbers=numbers))
            tiles += sum(map(plan.tiles, slots[-1].numbers))
            if tiles * weight >= PORTION_BYTES:
                yield Portion(plan=plan.only(n for slot in slots for n in slot.numbers), slots=tuple(slots))
                slots, tiles = [], 0
    if slots:
        yield Portion(plan=plan.only(n for slot in slots for n in slot.numbers), slots=tuple(slots))


def hands(windows: PackWindows, portion: Portion) -> Iterator[pa.Table]:
    """The hands of a portion, one by one, as `to_table` writes them."""
    plan = portion.plan
    for slot in portion.slots:
        tiles = np.empty((sum(map(plan.tiles, slot.numbers)), *windows.stream.tiling.shape), np.uint8)
        at, packs = 0, []
        for n in slot.numbers:
            packs.append(windows.cut(plan, n, tiles[at:]))
            at += len(packs[-1].tiles)
        hand = Hand(window=plan.window, of=plan.packs, first=slot.first, last=slot.last, packs=tuple(packs))
        yield to_table(hand, tiles[:at])


def execution_options(pools: Pools) -> ExecutionOptions:
    """How Ray Data must run a stream for its order, and for what waits in the object store to stay within `pools.buffer`."""
    return ExecutionOptions(
        preserve_order=True, resource_limits=ExecutionResources(object_store_memory=float(pools.buffer))
    )


def dataset(stream: Stream, start: Position, stop: int | None, pools: Pools, world: int, context: int = 1) -> Dataset:
    """Hands for `world` ranks from `start` on, up to window `stop` or without end, made by the actors of `pools`.

    Split it with `streaming_split(world, equal=False)`; each row is a hand as `to_table` writes it.
    """
    data = DataContext.get_current()
    data.target_max_block_size = 1  # every yielded row becomes its own block: the unit that the deal hands out
    data.execution_options = execution_options(pools)
    of_documents = any(isinstance(annotator, OfDocuments) for annotator in stream.annotators)
    whole = pools.preprocessors[1] <= FEW and not of_documents
    data._max_num_blocks_in_streaming_gen_buffer = WINDOW_AHEAD if whole else AHEAD
    data.memory_usage_poll_interval_s = None  # else each actor walks its whole memory map every second
    pace.settle(data)
    data.enable_progress_bars = False
    data.print_on_execution_start = False
    cutters = pools.preprocessors
    # Planning is a tenth of the work with pictures and nearly all of it without; planners share the preprocessors' cores.
    planners = {"compute": _pool(((cutters[0] + 1) // 2, (cutters[1] + 1) // 2)), "num_cpus": 0}
    annotators = {
        "compute": _pool(pools.annotators),
        **({"num_gpus": pools.gpus} if pools.gpus else {"num_cpus": pools.cpus}),
    }
    each = {"batch_size": 1, "batch_format": "pyarrow"}
    own = {**each, "num_cpus": pools.cpus}
    rows = ray.data.read_datasource(Windows(start.window, stop), override_num_blocks=1, num_cpus=0)
    if whole:  # the next window lies with the actor, and no more: those after it are for whoever is first
        made = late(_Both, stream, start, world, context)
        rows = rows.map_batches(Preprocessor, fn_constructor_args=made, compute=_pool(cutters, 2), **own)
    else:
        made = late(_Planner, stream, start, world, context)
        rows = rows.map_batches(Planner, fn_constructor_args=made, **each, **(annotators if of_documents else planners))
        rows = rows.map_batches(Preprocessor, fn_constructor_args=late(_Cutter, stream), compute=_pool(cutters), **own)
    if any(isinstance(annotator, OfPacks) for annotator in stream.annotators):
        rows = rows.map_batches(Annotator, fn_constructor_args=late(_Annotator, stream), **each, **annotators)
    return rows


def _pool(actors: tuple[int, int], tasks: int = 4) -> ActorPoolStrategy:
    """Actors that have the next of their `tasks` waiting beside the one they work on."""
    fewest, most = actors
    return ActorPoolStrategy(min_size=fewest, max_size=most, initial_size=fewest, max_tasks_in_flight_per_actor=tasks)


def hands_of(tables: Iterable[pa.Table]) -> Iterator[Hand]:
    """Hands from what `tables_of` gave. The packs' tiles lie in the object store and cannot be written to."""
    for table in tables:
        for row in range(len(table)):
            yield from_table(table, row)


def to_table(hand: Hand, tiles: NDArray[np.uint8] | None) -> pa.Table:
    """One row: `tiles`, the bytes of all packs' tiles, not copied; `features`, likewise; `rest`, all else."""
    if tiles is None:
        tiles = np.zeros(0, np.uint8)
    counts = [len(pack.tiles) for pack in hand.packs]
    features = [pack.features for pack in hand.packs if pack.features is not None]
    depth = [len(part) for part in features]
    bare = replace(hand, packs=tuple(replace(p, tiles=p.tiles[:0], features=None) for p in hand.packs))
    joined = np.concatenate(features) if features else np.zeros(0, np.uint16)
    rest = pickle.dumps((bare, counts, tiles.shape[1:], depth, joined.shape[1:]), protocol=5)
    cells = {"tiles": tiles.reshape(-1).data, "features": joined.reshape(-1).view(np.uint8).data, "rest": rest}
    return pa.table({name: _cell(data) for name, data in cells.items()})


def from_table(table: pa.Table, row: int) -> Hand:
    """Read what `to_table` wrote. Only ever called on blocks that this job's own actors made."""
    hand, counts, shape, depth, feature_shape = pickle.loads(_bytes(table, "rest", row))
    tiles = _parts(np.frombuffer(_bytes(table, "tiles", row), np.uint8), counts, shape)
    if not depth:
        return replace(hand, packs=tuple(replace(p, tiles=t) for p, t in zip(hand.packs, tiles, strict=True)))
    features = _parts(np.frombuffer(_bytes(table, "features", row), np.uint16), depth, feature_shape)
    packs = zip(hand.packs, tiles, features, strict=True)
    return replace(hand, packs=tuple(replace(p, tiles=t, features=f) for p, t, f in packs))


def _parts(flat: NDArray, counts: list[int], shape: tuple[int, ...]) -> list[NDArray]:
    return np.split(flat.reshape(sum(counts), *shape), np.cumsum(counts)[:-1]) if counts else []


def _cell(data: memoryview | bytes) -> pa.Array:
    """A column of one binary value that refers to `data`; Arrow's own constructors copy it."""
    ends = pa.array([0, len(data)], pa.int64()).buffers()[1]
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, ends, pa.py_buffer(data)])


def _bytes(table: pa.Table, column: str, row: int) -> pa.Buffer:
    """One cell where it lies; Arrow's scalars copy it."""
    (cells,) = table.slice(row, 1).column(column).chunks
    _, ends, data = cells.buffers()
    start, stop = np.frombuffer(ends, np.int64)[cells.offset : cells.offset + 2].tolist()
    return data.slice(start, stop - start)
