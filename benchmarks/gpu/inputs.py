"""What the kernels are given: numbers and documents of mixed lengths, drawn from fixed seeds."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.device import DEVICE, DOUBLE


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers; a seed gives the same ones whenever it is asked."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    return made.to(DEVICE, dtype)


def lengths(tokens: int, rng: random.Random) -> list[int]:
    """Documents' lengths, from few to half of all, evenly by their logarithm, that add up to `tokens`."""
    found: list[int] = []
    left = tokens
    while left:
        length = round(2 ** rng.uniform(4, np.log2(max(32, tokens // 2))))
        found.append(min(left, length))
        left -= found[-1]
    return found


def bounds(each: Sequence[int]) -> Tensor:
    """Where documents of these lengths begin in their pack, and where the last one ends."""
    return torch.tensor([0, *np.cumsum(each)], dtype=torch.int32, device=DEVICE)
