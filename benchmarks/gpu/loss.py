"""Forward and backward of the fused loss, by torch and by Liger's kernel, beside `F.cross_entropy` of full logits in
float32, as transformers has it, every position learned. Memory is that above what lies there before.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Row, ratios
from benchmarks.gpu.cases import Case, Found
from benchmarks.gpu.device import COMPUTED, DEVICE, DTYPE, without_liger
from benchmarks.gpu.inputs import drawn
from benchmarks.gpu.measuring import GIB, above, seconds
from benchmarks.gpu.sizes import Sizes
from ops.losses import Fused, linear_cross_entropy


def cases(sizes: Sizes) -> Iterator[Case]:
    tokens, width, vocabularies = sizes.losses
    for words in vocabularies:
        name = f"{tokens:,} tokens, {words:,} words"
        rows = (
            Row(f"{name}: fused", "ms", []),
            Row(f"{name}: full logits", "ms", []),
            Row(f"{name}: time, fused / full", "ratio", []),
            Row(f"{name}: memory, fused", "GiB", []),
            Row(f"{name}: memory, full logits", "GiB", []),
            Row(f"{name}: memory, fused / full", "ratio", []),
        )
        yield Case(rows, partial(loss_times, tokens, width, words, sizes.repetitions))
        rows = (Row(f"liger, {name}: time", "ms", []), Row(f"liger, {name}: memory", "GiB", []))
        yield Case(rows, partial(liger_times, tokens, width, words, sizes.repetitions))


def loss_times(tokens: int, width: int, words: int, repetitions: int) -> list[Found]:
    hidden, weight, labels = loss_inputs(tokens, width, words)
    fused = partial(fused_loss, hidden, weight, labels, "torch")

    def full() -> None:
        F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum").backward()
        hidden.grad = weight.grad = None

    note = f"width {width:,}, {DTYPE}"
    times, held = seconds(fused, repetitions), above(fused)
    ours: list[Found] = [([1e3 * t for t in times], note), ([held / GIB], "")]
    try:
        full_times, full_held = seconds(full, repetitions), above(full)
    except torch.OutOfMemoryError:
        none: Found = ([], "full logits do not fit")
        return [ours[0], none, none, ours[1], none, none]
    return [
        ours[0],
        ([1e3 * t for t in full_times], ""),
        (ratios(times, full_times), ""),
        ours[1],
        ([full_held / GIB], ""),
        ([held / full_held], ""),
    ]


def liger_times(tokens: int, width: int, words: int, repetitions: int) -> list[Found]:
    if reason := without_liger(COMPUTED):
        return [([], reason)] * 2
    act = partial(fused_loss, *loss_inputs(tokens, width, words), "liger")
    return [([1e3 * t for t in seconds(act, repetitions)], ""), ([above(act) / GIB], "")]


def fused_loss(hidden: Tensor, weight: Tensor, labels: Tensor, by: Fused) -> None:
    linear_cross_entropy(hidden, weight, labels, by=by).sum.backward()
    hidden.grad = weight.grad = None


def loss_inputs(tokens: int, width: int, words: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (T, D) and head (C, D) with gradient, and labels (T,)."""
    hidden = drawn(tokens, width, dtype=COMPUTED, seed=0).requires_grad_()
    weight = (drawn(words, width, dtype=COMPUTED, seed=1) / width**0.5).requires_grad_()
    return hidden, weight, torch.randint(words, (tokens,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
