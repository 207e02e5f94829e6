"""What every loader does with a row, and how it is timed: the same for the limit, the competitors and ourselves.

Runs in the project's environment and in the competitors', so it imports torch, tokenizers and `ops` alone.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.data.corpus import EXAMPLES
from ops import images

SIZE = 336
BATCH = 64
WORKERS = 2
NICE = 15
"""Ray's own `worker_niceness`: workers give way to the consumer, in every loader alike."""

STARTED = "BENCH_STARTED"
"""The environment's word for when the command was given, on the clock that all processes share."""

Row = tuple[Tensor, Tensor]


class Batch(TypedDict):
    """`pixels` uint8 (batch, 3, SIZE, SIZE); `tokens` int64 (batch, longest), zeros after each row's `lengths`."""

    pixels: Tensor
    tokens: Tensor
    lengths: Tensor


class Report(TypedDict):
    """What a child prints: seconds from the command to its first batch, images a second of the middle half, and totals."""

    first: float
    steady: float
    images: int
    tokens: int


def prepared(picture: bytes, caption: bytes | str) -> Row:
    """Pixels and tokens of one row. The first call tells its process to be one thread and as nice as all workers."""
    settle()
    text = caption if isinstance(caption, str) else caption.decode()
    return images.resize(images.decode(picture), SIZE, SIZE), torch.tensor(tokenizer().encode(text).ids)


@cache
def settle() -> None:
    images.settle()
    if multiprocessing.parent_process() is not None:
        os.nice(max(0, NICE - os.nice(0)))


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(EXAMPLES / "tokenizer" / "tokenizer.json"))


def collate(rows: Iterable[Row]) -> Batch:
    """Pictures stacked, tokens padded to the longest: what trainers without packing do."""
    pixels, tokens = zip(*rows, strict=True)
    return Batch(
        pixels=torch.stack(pixels),
        tokens=torch.nn.utils.rnn.pad_sequence(list(tokens), batch_first=True),
        lengths=torch.tensor([len(ids) for ids in tokens]),
    )


def counted(batches: Iterable[Batch]) -> Iterator[tuple[int, int]]:
    """Images and useful tokens of each batch."""
    for batch in batches:
        yield len(batch["pixels"]), int(batch["lengths"].sum())


def began() -> float:
    """When the command was given; now, where nobody said so."""
    return float(os.environ.get(STARTED) or time.monotonic())


def consumed(counts: Iterable[tuple[int, int]], rows: int) -> Report:
    """Take batches in this process until `rows` images have come, and forget them."""
    events: list[tuple[float, int]] = []
    first = images_seen = tokens_seen = 0
    for count, tokens in counts:
        first = first or time.monotonic() - began()
        images_seen += count
        tokens_seen += tokens
        events.append((time.monotonic(), images_seen))
        if images_seen >= rows:
            break
    return Report(first=first, steady=steady(events), images=images_seen, tokens=tokens_seen)


def steady(events: list[tuple[float, int]]) -> float:
    """Images a second between the first quarter and the last of a run; `events` are times and images so far.

    What a loader has made ahead when the clock starts it has also made ahead when it stops.
    """
    total = events[-1][1]
    begin = next(event for event in events if event[1] >= total / 4)
    end = next(event for event in events if event[1] >= total * 3 / 4)
    return (end[1] - begin[1]) / (end[0] - begin[0]) if end[0] > begin[0] else float("nan")


def tell(report: Mapping[str, Any]) -> None:
    """The last line of standard output; then gone, whatever threads a loader may have left."""
    print(json.dumps(report), flush=True)
    os._exit(0)


def repeated_index(index: Path, key: str, rows: list[dict], target: Path) -> None:
    """An index of shards, as JSON, with `rows` in the place of its own list under `key`."""
    target.write_text(json.dumps({**json.loads(index.read_text()), key: rows}))
