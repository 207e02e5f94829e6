"""The limit and ourselves, each a child process: `python -m benchmarks.data.ours WHAT FOLDER PART ROWS WINDOW`; prints one line.

    limit    plain processes, as many as workers: read a tar, decode, resize, tokenise, forget
    strict   `pipelines.stream` as a run uses it: shuffled chunks, packing, strict order; consumed in the driver
    loose    the same without `preserve_order`: what strict order costs
    lean     strict, with a quarter of the buffer
    s3       strict, the shards in a bucket whose address is in BENCH_S3
    starts   seconds to the first pack, from the beginning and from deep in the corpus, in turns
    index    scans what no manifest has yet, and says how full packs are, and padded batches of the same samples

PART is a folder of tars, ROWS are read of it in windows of WINDOW rows.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from benchmarks.data.corpus import EXAMPLES, read, shards
from benchmarks.data.work import BATCH, SIZE, WORKERS, Report, began, consumed, prepared, steady, tell
from benchmarks.packing import bound, padded_fill
from cluster.local import ray_running
from pipelines import late
from pipelines import stream as streams
from pipelines.chat import ChatML
from pipelines.corpora import Pairs
from pipelines.manifest import Manifest, index
from pipelines.order import Drawn, Order
from pipelines.storage import Storage, use
from pipelines.tiling import Resize
from pipelines.types import Budget, Position, VisionLayout
from pipelines.windows import PackWindows, Pools, Stream

BUDGET = Budget(tokens=4096, tiles=16)
TOKENS_PER_TILE = 144
"""A picture is 144 tokens after pooling, a caption 270 in the mean; tiles are not the scarce budget."""

BUFFER = 2**30
"""Bytes that may be made ahead: what a site has if it says nothing."""

FILLED = 5
"""Windows whose packs' fill is told."""

S3 = "BENCH_S3"
BUCKET = "s3://corpus/grainy"


def stream(folder: Path, uris: list[str], rows: int, window: int, storage: Storage) -> Stream:
    """`rows` rows of the tars at `uris`; a bucket that holds fewer is gone round."""
    use(storage)
    corpus = Pairs(name="grainy")
    found = index(corpus, uris, str(folder / "manifests"))
    held = found.shards * -(-rows // found.rows)
    return Stream(
        order=Order(seed=0, sources=(Drawn(manifest=Manifest(corpus="grainy", shards=held)),), window_rows=window),
        corpora=(corpus,),
        tiling=Resize(size=SIZE, mode="squash"),
        template=ChatML(),
        layout=VisionLayout(shape=(3, SIZE, SIZE), tokens_per_tile=TOKENS_PER_TILE),
        budget=BUDGET,
        tokenizer=str(EXAMPLES / "tokenizer"),
        bos="<|endoftext|>",
        eos="<|im_end|>",
        loss_weights=(1.0,),
        storage=storage,
    )


def limit(folder: Path, rows: int) -> Report:
    """Two processes that hand nothing over; every batch's worth of rows is an event, merged by time."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    uris = shards(folder)
    processes = [context.Process(target=bare, args=(uris[i::WORKERS], results)) for i in range(WORKERS)]
    for process in processes:
        process.start()
    done = sorted(event for _ in processes for event in results.get())
    for process in processes:
        process.join()
    events = [(at, (number + 1) * BATCH) for number, (at, _) in enumerate(done)]
    first = events[0][0] - began()
    return Report(first=first, steady=steady(events), images=rows, tokens=sum(tokens for _, tokens in done))


def bare(uris: list[str], results: Any) -> None:
    events: list[tuple[float, int]] = []
    tokens = number = 0
    for uri in uris:
        for _, picture, caption in read(uri):
            tokens += len(prepared(picture, caption)[1])
            number += 1
            if number % BATCH == 0:
                events.append((time.monotonic(), tokens))
                tokens = 0
    results.put(events)


def packs(one: Stream, start: Position, stop: int | None, buffer: int = BUFFER) -> Generator[tuple[int, int]]:
    """Images and tokens of text of each pack, in the process of one trainer."""
    pools = Pools(preprocessors=(WORKERS, WORKERS), buffer=buffer)
    for hand in streams.hands_of(late.tables_of(streams.dataset(one, start, stop, pools, 1).iterator())):
        for pack in hand.packs:
            yield len(pack.tiles), len(pack.input_ids) - TOKENS_PER_TILE * len(pack.tiles)


def through_ray(one: Stream, folder: Path, rows: int, buffer: int) -> dict[str, Any]:
    """A fresh local Ray, gone afterwards. `spilled`: bytes that its object store moved to disk."""
    with ray_running(None, WORKERS + 1, folder / "cache" / "logs"):
        return {**consumed(packs(one, Position(), rows // one.order.window_rows, buffer), rows), **spilled()}


def spilled() -> dict[str, Any]:
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address
    from ray._private.worker import global_worker

    assert global_worker.node is not None
    stats = get_memory_info_reply(get_state_from_address(global_worker.node.gcs_address)).store_stats
    return {"spilled": stats.spilled_bytes_total}


def starts(one: Stream, folder: Path, rows: int) -> dict[str, list[float]]:
    """Seconds to the first pack, fresh and deep in turns; a start before them brings the modules into the page cache."""
    deep = Position(window=rows // one.order.window_rows * 3 // 4, pack=50)
    found: dict[str, list[float]] = {"fresh": [], "deep": []}
    with ray_running(None, WORKERS + 1, folder / "cache" / "logs"):
        seconds(one, Position())
        for _ in range(5):
            found["fresh"].append(seconds(one, Position()))
            found["deep"].append(seconds(one, deep))
    return found


def seconds(one: Stream, start: Position) -> float:
    began = time.monotonic()
    found = packs(one, start, start.window + 2)
    next(found)
    took = time.monotonic() - began
    found.close()
    return took


def fills(one: Stream, windows: int) -> dict[str, list[float]]:
    """Of each window: how full its packs are, of the bound, and how full a collator's padded batches of its samples are."""
    packer = PackWindows(one)
    rng = random.Random(0)
    found: dict[str, list[float]] = {"fill": [], "of bound": [], "padding": []}
    for k in range(windows):
        groups = packer.plan(k, packer.rows(k)).groups
        costs = [sample.cost for group in groups for sample in group]
        found["fill"].append(sum(cost[0] for cost in costs) / len(groups) / one.budget.tokens)
        found["of bound"].append(bound(costs, one.budget) / len(groups))
        found["padding"].append(padded_fill(costs, rng))
    return found


def run(what: str, folder: Path, part: str, rows: int, window: int) -> Any:
    if what == "limit":
        return limit(folder / part, rows)
    storage = Storage(**json.loads(os.environ[S3])) if what == "s3" else Storage()
    uris = [f"{BUCKET}/{Path(uri).name}" for uri in shards(folder / part)] if what == "s3" else shards(folder / part)
    one = stream(folder, uris, rows, window, storage)
    if what == "index":
        return fills(one, min(FILLED, rows // window))
    if what == "starts":
        return starts(one, folder, rows)
    if what == "loose":
        from ray.data import ExecutionOptions

        ordered = streams.execution_options

        def unordered(pools: Pools) -> ExecutionOptions:
            options = ordered(pools)
            options.preserve_order = False
            return options

        streams.execution_options = unordered
    return through_ray(one, folder, rows, BUFFER // 4 if what == "lean" else BUFFER)


if __name__ == "__main__":
    tell(run(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])))
