"""Run a function on several gloo processes, as an ordinary call."""

from __future__ import annotations

import multiprocessing
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.queues import Queue
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = [
    "cluster.fsdp",
    "pipelines.windows",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama",
]


DEADLINE = 120.0
"""Seconds within which ranks must be done: they wait for each other for ever if one of them skips a collective."""


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` on each of `world` ranks of a process group; their results in rank order.

    Fails with the first rank's traceback, or after `DEADLINE` seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)  # imports are most of a fresh process's first seconds
    results: Queue[tuple[int, Any, str]] = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        started = [
            context.Process(target=_rank, args=(rank, world, f"{folder}/meet", results, function, arguments))
            for rank in range(world)
        ]
        for process in started:
            process.start()
        try:
            values = _collect(results, world)
            for process in started:
                process.join(timeout=30)
        finally:
            for process in started:
                process.kill()
                process.join()
    return [values[rank] for rank in range(world)]


def _collect(results: Queue[tuple[int, Any, str]], world: int) -> dict[int, Any]:
    values: dict[int, Any] = {}
    ends = time.monotonic() + DEADLINE
    while len(values) < world:
        try:
            rank, value, error = results.get(timeout=max(0.0, ends - time.monotonic()))
        except queue.Empty:
            late = sorted(set(range(world)) - set(values))
            raise AssertionError(f"ranks {late} of {world} have not come to an end in {DEADLINE:.0f} s") from None
        if error:
            raise AssertionError(f"rank {rank}:\n{error}")
        values[rank] = value
    return values


def _rank(
    rank: int, world: int, meet: str, results: Queue[Any], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world)
    try:
        results.put((rank, function(*arguments), ""))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        dist.destroy_process_group()
