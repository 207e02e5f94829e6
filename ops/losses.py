"""Losses that never hold the full logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100


def linear_cross_entropy(
    hidden: Float[Tensor, "T D"], weight: Float[Tensor, "C D"], labels: Int[Tensor, " T"], chunk: int = 2048
) -> tuple[Float[Tensor, " T"], Bool[Tensor, " T"]]:
    """Cross-entropy of `hidden @ weight.T` against `labels`, per position, in float32; and whether the argmax is right.

    Positions labelled -100 get loss 0, False, and cost nothing: only learned rows are multiplied. Rows go `chunk` at a
    time and each chunk's logits are computed again in the backward pass, so the peak is chunk x C numbers, not T x C.
    """
    learned = labels != IGNORED
    rows, targets = hidden[learned], labels[learned]

    def losses_of(rows: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = (rows @ weight.to(rows.dtype).T).float()
        return F.cross_entropy(logits, targets, reduction="none"), logits.detach().argmax(-1) == targets

    parts = [
        checkpoint(losses_of, part, weight, target, use_reentrant=False)
        for part, target in zip(rows.split(chunk), targets.split(chunk), strict=True)
    ]
    losses = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
    correct = torch.zeros(labels.shape, dtype=torch.bool, device=hidden.device)
    losses = losses.masked_scatter(learned, torch.cat([loss for loss, _ in parts]))
    correct = correct.masked_scatter(learned, torch.cat([right for _, right in parts]))
    return losses, correct
