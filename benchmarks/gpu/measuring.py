"""Time and memory on the device, and whether its memory suffices."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import peak_bytes
from benchmarks.gpu.device import CUDA

GIB = 2**30


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def free() -> None:
    gc.collect()
    if CUDA:
        torch.compiler.reset()  # after so many shapes torch would leave flex uncompiled, all scores at once
        torch.cuda.empty_cache()


def seconds(act: Callable[[], Any], repetitions: int, warm_up: int = 2) -> list[float]:
    """Seconds of each call, everything that it starts on the device included, after some calls that do not count."""
    times = []
    for _ in range(warm_up + repetitions):
        wait()
        started = time.perf_counter()
        act()
        wait()
        times.append(time.perf_counter() - started)
    return times[warm_up:]


def above(act: Callable[[], Any]) -> int:
    """The most bytes that `act` holds on the device above what lies there before."""
    if not CUDA:
        return peak_bytes(act)
    free()
    wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    act()
    wait()
    return torch.cuda.max_memory_allocated() - before


def steps_of(build: Callable[[], Callable[[], Any]], repetitions: int) -> tuple[list[float], int]:
    """Seconds of the steps that `build` gives, and the most bytes that one holds, weights and states among them."""
    if CUDA:
        step = build()
        seconds(step, 0)
        torch.cuda.reset_peak_memory_stats()
        return seconds(step, repetitions, 0), torch.cuda.max_memory_allocated()

    def twice() -> None:  # the profiler sees only what comes while it looks
        step = build()
        step()
        step()

    held = peak_bytes(twice)
    return seconds(build(), repetitions), held


def attempt(act: Callable[[], tuple[list[float], int]]) -> tuple[list[float], int] | None:
    """None where the device's memory does not suffice."""
    try:
        return act()
    except torch.OutOfMemoryError:
        return None
    finally:
        free()
