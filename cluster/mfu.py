"""What a device could compute at best, against which a run's model FLOPs are held (MFU, PaLM, arXiv:2204.02311, B)."""

from __future__ import annotations

import time

import torch

from mllm.recipe import Dtype
from pipelines.types import spec

MEASURED = 0.2
"""Seconds for which a CPU's products are timed."""

SIDE = 1024
"""Rows and columns of their matrices."""


@spec
class Gpu:
    """Peak FLOP/s of products of dense bfloat16 matrices, for GPUs with all of `words` in their names."""

    words: tuple[str, ...]
    peak: float


GPUS = (
    Gpu(words=("B200",), peak=2250e12),
    Gpu(words=("H200", "NVL"), peak=835e12),
    Gpu(words=("H200",), peak=989e12),
    Gpu(words=("H100", "PCIe"), peak=756e12),
    Gpu(words=("H100", "NVL"), peak=835e12),
    Gpu(words=("H100",), peak=989e12),
    Gpu(words=("A100",), peak=312e12),
    Gpu(words=("L40S",), peak=362e12),
    Gpu(words=("RTX", "4090"), peak=165e12),
    Gpu(words=("A10",), peak=125e12),
)
"""NVIDIA's data sheets, without sparsity; the first whose words fit is meant."""


def peak_flops(device: torch.device, dtype: Dtype) -> float:
    """Peak FLOP/s of `device`; 0 where nobody has told, and then there is no MFU.

    Of a GPU the data sheet's for bfloat16, whatever the layers compute in. Of a CPU what torch itself gets out of this
    process's threads on large matrices of `dtype`, measured now: no bound, but the best that products do here.
    """
    if device.type == "cuda":
        return gpu_peak(torch.cuda.get_device_name(device))
    return _measured(torch.bfloat16 if dtype == "bfloat16" else torch.float32)


def gpu_peak(name: str) -> float:
    """Peak FLOP/s of a GPU by the name that torch gives it; 0 for one that is not in the table."""
    words = set(name.replace("-", " ").split())
    return next((gpu.peak for gpu in GPUS if words.issuperset(gpu.words)), 0.0)


def _measured(dtype: torch.dtype) -> float:
    a = torch.randn(SIDE, SIDE, dtype=dtype)
    out = torch.empty_like(a)
    best, end = float("inf"), time.perf_counter() + MEASURED
    with torch.no_grad():
        torch.mm(a, a, out=out)  # the first starts threads
        while time.perf_counter() < end or best == float("inf"):
            started = time.perf_counter()
            torch.mm(a, a, out=out)
            best = min(best, time.perf_counter() - started)
    return 2 * SIDE**3 / best
