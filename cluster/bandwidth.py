"""How fast the nodes of a cluster add numbers together: one process on each, as trainers will be, and an all-reduce.

It uses the addresses, the ports and the library (NCCL, or gloo on CPU) that training uses, so that what is in the way of one is
in the way of the other: a firewall, an interface without a route, a driver that does not fit.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import Any

from pipelines.types import spec

SIZE = 32 * 2**20
"""Bytes that are added together."""

ROUNDS = 3

JOIN = 60.0
"""Seconds within which all nodes must have met."""


@spec
class Speed:
    """Bytes of an all-reduce by its seconds, among `ranks` processes; or why there is no number."""

    ranks: int
    library: str
    rate: float = 0.0
    trouble: str = ""


class Rank:
    """One process of the measurement; an actor that holds neither a CPU nor a GPU."""

    def address(self) -> tuple[str, int]:
        """Where the others find this process: its node's address and a port that is free."""
        from ray.util import get_node_ip_address

        with socket.socket() as free:
            free.bind(("", 0))
            return get_node_ip_address(), free.getsockname()[1]

    def seconds(self, rank: int, ranks: int, meeting: tuple[str, int], cuda: int | None) -> float:
        """Seconds of one all-reduce, the median of `ROUNDS`. `cuda` is the number of a GPU, which Ray has not given to anybody
        for this: it is used for a moment and nothing is kept on it.
        """
        import os
        from datetime import timedelta
        from statistics import median

        if cuda is not None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # by which Ray hides the GPUs
        import torch
        import torch.distributed as dist

        device = torch.device("cpu" if cuda is None else f"cuda:{cuda}")
        host, port = meeting
        dist.init_process_group(
            "gloo" if cuda is None else "nccl",
            init_method=f"tcp://{host}:{port}",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=JOIN),
        )
        try:
            numbers = torch.ones(SIZE // 4, device=device)
            taken = []
            for _ in range(ROUNDS + 1):  # the first one meets the others
                if cuda is not None:
                    torch.cuda.synchronize(device)
                began = time.perf_counter()
                dist.all_reduce(numbers)
                if cuda is not None:
                    torch.cuda.synchronize(device)
                taken.append(time.perf_counter() - began)
            return median(taken[1:])
        finally:
            dist.destroy_process_group()


def between(nodes: Sequence[str], gpus: bool, each: int = 1) -> Speed:
    """An all-reduce among `each` processes on every one of `nodes`, by Ray's ids of them."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from cluster.callbacks import root_of

    library, ranks = "nccl" if gpus else "gloo", len(nodes) * each
    actors: list[Any] = [
        ray.remote(Rank)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        .remote()
        for node in nodes
        for _ in range(each)
    ]
    try:
        meeting = ray.get(actors[0].address.remote(), timeout=JOIN)
        calls = [
            actor.seconds.remote(rank, ranks, meeting, rank % each if gpus else None)
            for rank, actor in enumerate(actors)
        ]
        slowest = max(ray.get(calls, timeout=2 * JOIN))
    except Exception as error:  # whatever it is would end a run's first step
        return Speed(ranks=ranks, library=library, trouble=root_of(error))
    finally:
        for actor in actors:
            ray.kill(actor)
    return Speed(ranks=ranks, library=library, rate=SIZE / slowest)
