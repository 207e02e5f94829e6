"""Attention from runs of positions to runs of something else: text to the image that it follows, a document to its prompts.

    runs = Runs(queries=(5, 9), keys=(64, 64))      the first 5 queries see the first 64 keys, the next 9 the next 64
    cross_attention(q, k, v, runs)

No mask is made: what is seen is a run of keys, so that a pack of many documents costs no more than each of them alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ops.attention import BACKENDS, WITH_BLOCKS, Backend, available, flash


@dataclass(frozen=True, slots=True)
class Runs:
    """Lengths of neighbouring runs of queries and of the runs of keys that they see; host integers. Keys may not be empty."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.queries) != len(self.keys) or 0 in self.keys:
            raise ValueError(
                f"{len(self.queries)} runs of queries and {len(self.keys)} of keys, of lengths {set(self.keys)}: each run of "
                "queries needs one of keys, and none may be empty"
            )

    def check(self, queries: int, keys: int) -> None:
        """Raises ValueError when they do not add up to so many rows."""
        if (sum(self.queries), sum(self.keys)) != (queries, keys):
            raise ValueError(
                f"runs of {sum(self.queries)} queries and {sum(self.keys)} keys, and there are {queries} and {keys} rows: they "
                "come from different packs"
            )


def cross_attention(
    q: Float[Tensor, "T H E"],
    k: Float[Tensor, "V K E"],
    v: Float[Tensor, "V K E"],
    runs: Runs,
    *,
    scale: float | None = None,
    backend: Backend | None = None,
) -> Float[Tensor, "T H E"]:
    """Each run of `q` attends to its whole run of `k` and `v`; H is a multiple of K and `scale` defaults to E ** -0.5.

    On a GPU in 16 bits by the fastest kernel there is, elsewhere run by run. Without queries the result is empty and keeps
    its graph. Raises ValueError when runs do not add up to the rows.
    """
    runs.check(len(q), len(k))
    if not len(q):
        return q + 0 * (k.sum() + v.sum())
    kernel = _kernel(q, backend)
    if kernel is not None:
        bounds, key_bounds = (
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=q.device)
            for lengths in (runs.queries, runs.keys)
        )
        longest, longest_keys = max(runs.queries), max(runs.keys)
        return flash(kernel, q, k, v, bounds, longest, scale, False, key_bounds, longest_keys)
    grouped = q.shape[1] != k.shape[1]
    outputs = []
    for a, b, c in zip(q.split(runs.queries), k.split(runs.keys), v.split(runs.keys), strict=True):
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (a, b, c))
        out = F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=grouped)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def _kernel(q: Tensor, asked: Backend | None) -> Backend | None:
    """The kernel for `q`; None where there is none, or one without kernels was asked for."""
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
        return None
    able = available()
    kernels: list[Backend] = [backend for backend in BACKENDS if backend not in WITH_BLOCKS and not able[backend]]
    if asked is not None:
        kernels = [backend for backend in kernels if backend == asked]
    return kernels[0] if kernels else None
