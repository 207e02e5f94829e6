"""Losses that never hold the full logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

IGNORED = -100

NUMBERS = 2**27
"""Logits that exist at a time, if nothing else is said: 512 MiB in float32, and as much again for their gradient."""


class TokenLosses(NamedTuple):
    """`sum` () with gradient; of each position its loss (T,) float32 and whether the argmax is right (T,), both without."""

    sum: Float[Tensor, ""]
    each: Float[Tensor, " T"]
    correct: Bool[Tensor, " T"]


def linear_cross_entropy(
    hidden: Float[Tensor, "T D"],
    weight: Float[Tensor, "C D"],
    labels: Int[Tensor, " T"],
    counts: Float[Tensor, " T"] | None = None,
    z: float = 0.0,
    chunk: int | None = None,
) -> TokenLosses:
    """Cross-entropy of `hidden @ weight.T` against `labels`, in float32, each position times its `counts`, summed.

    Positions labelled -100 get loss 0, False, and cost nothing: only learned rows are multiplied. Rows go `chunk` at a time
    (as many as make `NUMBERS` logits), and their gradients are taken at once while the logits are there, so that backward
    multiplies nothing again: three products in all where computing logits twice takes four (as Liger, arXiv:2410.10989, 3.2,
    whose kernels know no weight of a row). `z` adds z * log(sum(exp(logits)))^2 (PaLM, arXiv:2204.02311, 5).
    """
    if counts is None:
        counts = torch.ones(labels.shape, dtype=torch.float32, device=hidden.device)
    chunk = max(1, NUMBERS // len(weight)) if chunk is None else chunk
    return TokenLosses(*_Function.apply(hidden, weight, labels, counts, z, chunk, torch.is_grad_enabled()))


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, counts: Tensor, z: float, chunk: int, trained: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight = (trained and wanted for wanted in ctx.needs_input_grad[:2])
        precise = torch.promote_types(hidden.dtype, torch.float32)
        head = weight.to(hidden.dtype)
        each = torch.zeros(labels.shape, dtype=precise, device=hidden.device)
        correct = torch.zeros(labels.shape, dtype=torch.bool, device=hidden.device)
        by_hidden = torch.zeros_like(hidden) if wants_hidden else None
        by_weight = torch.zeros(weight.shape, dtype=precise, device=hidden.device) if wants_weight else None
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
            *[None] * 5,
        )
