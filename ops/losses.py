"""Losses that never hold the full logits."""
# Kernels for GPUs are not on every machine:
# pyright: reportMissingImports=false

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORED = -100

NUMBERS = 2**27
"""Logits that exist at a time, if nothing else is said: 512 MiB in float32, and as much again for their gradient."""


Fused = Literal["liger", "torch"]
"""Whose code takes the loss: Liger's kernel, or some of torch's own in turn."""


class TokenLosses(NamedTuple):
    """`sum` () with gradient; of each position its loss (T,) float32 and whether the argmax is right (T,), both without."""

    sum: Float[Tensor, ""]
    each: Float[Tensor, " T"]
    correct: Bool[Tensor, " T"]


def fused_by(device: str, dtype: torch.dtype, installed: bool) -> tuple[Fused, str]:
    """What `linear_cross_entropy` takes by itself for hidden states of `dtype` on a `device`, and why it is not Liger."""
    if device != "cuda":
        return "torch", f"Liger's kernel needs CUDA, and the tensors are on {device}"
    if dtype == torch.float64:
        return "torch", "Liger's kernel computes in float32, and the hidden states are float64"
    if not installed:
        return "torch", "needs liger-kernel 0.8.5 or later: pip install 'mllm[liger]'"
    return "liger", ""


@cache
def liger_is_there() -> bool:
    """Whether a Liger is installed that weighs rows, which came with 0.8.5."""
    try:
        numbers = re.findall(r"\d+", version("liger-kernel"))
    except PackageNotFoundError:
        return False
    return [int(number) for number in numbers[:3]] >= [0, 8, 5]


def linear_cross_entropy(
    hidden: Float[Tensor, "T D"],
    weight: Float[Tensor, "C D"],
    labels: Int[Tensor, " T"],
    counts: Float[Tensor, " T"] | None = None,
    z: float = 0.0,
    chunk: int | None = None,
    by: Fused | None = None,
) -> TokenLosses:
    """Cross-entropy of `hidden @ weight.T` against `labels`, in float32, each position times its `counts`, summed.

    Positions labelled -100 get loss 0, False, and cost nothing: only learned rows are multiplied. Rows go `chunk` at a time
    (as many as make `NUMBERS` logits), and their gradients are taken at once while the logits are there, so that backward
    multiplies nothing again: three products in all where computing logits twice takes four (Liger, arXiv:2410.10989, 3.2).
    `z` adds z * log(sum(exp(logits)))^2 (PaLM, arXiv:2204.02311, 5). Without a word `by` is what `fused_by` says: Liger's
    kernel where it is installed and the tensors are on CUDA, and nowhere else.
    """
    if counts is None:
        counts = torch.ones(labels.shape, dtype=torch.float32, device=hidden.device)
    chunk = max(1, NUMBERS // len(weight)) if chunk is None else chunk
    if by is None:
        by, _ = fused_by(hidden.device.type, hidden.dtype, liger_is_there())
    return TokenLosses(*_Function.apply(hidden, weight, labels, counts, z, chunk, torch.is_grad_enabled(), by))


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        counts: Tensor,
        z: float,
        chunk: int,
        trained: bool,
        by: Fused,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight = (trained and wanted for wanted in ctx.needs_input_grad[:2])
        take = _by_liger if by == "liger" else _by_torch
        head = weight.to(hidden.dtype)
        each, correct, by_hidden, by_weight = take(hidden, head, labels, counts, z, chunk, wants_hidden, wants_weight)
        ctx.save_for_backward(by_hidden, None if by_weight is None else by_weight.to(weight.dtype))
        ctx.mark_non_differentiable(each, correct)
        return (each * counts).sum(), each, correct

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        slope = slopes[0]
        by_hidden, by_weight = ctx.saved_tensors
        return (
            None if by_hidden is None else by_hidden * slope.to(by_hidden.dtype),
            None if by_weight is None else by_weight * slope.to(by_weight.dtype),
            *[None] * 6,
        )


Taken = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Each position's loss (T,) and whether its argmax is right (T,), and the sum's gradients (T, D) and (C, D) as wanted."""


def _by_torch(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    counts: Tensor,
    z: float,
    chunk: int,
    wants_hidden: bool,
    wants_weight: bool,
) -> Taken:
    precise = torch.promote_types(hidden.dtype, torch.float32)
    each = torch.zeros(labels.shape, dtype=precise, device=hidden.device)
    correct = torch.zeros(labels.shape, dtype=torch.bool, device=hidden.device)
    by_hidden = torch.zeros_like(hidden) if wants_hidden else None
    by_weight = torch.zeros(head.shape, dtype=precise, device=hidden.device) if wants_weight else None
    for rows in (labels != IGNORED).nonzero().squeeze(1).split(chunk):
        inputs, targets = hidden[rows], labels[rows].long()
        logits = (inputs @ head.T).to(precise)
        total = logits.logsumexp(1)
        each[rows] = total - logits.gather(1, targets[:, None]).squeeze(1) + z * total**2
        correct[rows] = logits.argmax(1) == targets
        if by_hidden is None and by_weight is None:
            continue
        slope = logits.sub_(total[:, None]).exp_()  # softmax, in the memory of the logits
        if z:
            slope.mul_((1 + 2 * z * total)[:, None])
        slope.scatter_add_(1, targets[:, None], slope.new_full((len(rows), 1), -1))
        slope = slope.mul_(counts[rows].to(precise)[:, None]).to(hidden.dtype)
        if by_hidden is not None:
            by_hidden[rows] = slope @ head
        if by_weight is not None:
            by_weight += slope.T @ inputs
    return each, correct, by_hidden, by_weight


def _by_liger(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    counts: Tensor,
    z: float,
    chunk: int,
    wants_hidden: bool,
    wants_weight: bool,
) -> Taken:
    """The same by Liger's kernel, which reads the logits twice.

    It is called below Liger's own autograd function: that one tells no loss of a position unless backward takes the logits
    once more, while what it calls weighs rows, and tells their losses and gradients, in one go.
    """
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    each = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
    correct = torch.zeros(labels.shape, dtype=torch.bool, device=hidden.device)
    by_hidden = torch.zeros_like(hidden) if wants_hidden else None
    by_weight = torch.zeros_like(head, dtype=torch.float32) if wants_weight else None
    rows = (labels != IGNORED).nonzero().squeeze(1)
    if not len(rows):
        return each, correct, by_hidden, by_weight
    wanted = wants_hidden or wants_weight
    inputs = hidden[rows]
    each[rows], _, right, _, slope, by_weight, _ = fused_linear_cross_entropy_forward(
        inputs,
        head,
        labels[rows].long(),
        lse_square_scale=z,
        reduction="none",
        accum_dtype=torch.float32,
        return_token_accuracy=True,
        token_grad_output=counts[rows] if wanted else None,
        compute_gradients=wanted,
        weight_requires_grad=wants_weight,
        chunk_mem_const=max(
            1, chunk * len(head) // inputs.numel()
        ),  # numbers of a chunk's logits, in those of `inputs`
    )
    correct[rows] = right.bool()
    if by_hidden is not None:
        by_hidden[rows] = slope
    return each, correct, by_hidden, by_weight
