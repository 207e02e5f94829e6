"""Run a function on several gloo processes, as an ordinary call."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.queues import Queue
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = [
    "cluster.engines",
    "pipelines.windows",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama",
]


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` on each of `world` ranks of a process group; their results in rank order."""
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
        collected = [results.get(timeout=120) for _ in started]
        for process in started:
            process.join(timeout=30)
    for rank, _, error in collected:
        if error:
            raise AssertionError(f"rank {rank}:\n{error}")
    return [value for _, value, _ in sorted(collected, key=lambda item: item[0])]


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
