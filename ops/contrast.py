"""Contrastive losses over the pairs of all ranks: each rank has its own pairs, and compares them with everybody's.

What ranks get are sums over their own rows. Added over ranks they are the loss of all pairs on one rank, and so are their
gradients: those that others' rows have by this rank's columns come back through the exchange.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ops.collectives import gather_rows


class Rows(NamedTuple):
    """`sum` () with gradient; of each of this rank's pairs its loss (N,) and whether its text is the nearest (N,), without."""

    sum: Float[Tensor, ""]
    each: Float[Tensor, " N"]
    right: Bool[Tensor, " N"]


def contrastive_rows(
    images: Float[Tensor, "N D"],
    texts: Float[Tensor, "N D"],
    scale: Float[Tensor, ""],
    group: dist.ProcessGroup | None = None,
) -> Rows:
    """InfoNCE both ways (CLIP, arXiv:2103.00020, fig. 3), of this rank's pairs; to be divided by all ranks' pairs.

    Rows are of unit length, and row i of `images` belongs to row i of `texts`. Ranks may have different numbers of pairs, or
    none. A collective: every rank of `group` must call it; None is a rank by itself.
    """
    losses, unused = [], scale.new_zeros(())
    right = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    for number, (rows, columns) in enumerate(((images, texts), (texts, images))):
        everyone, first, there = _gather(columns, group)
        logits = (scale * rows @ everyone.T).float().masked_fill(~there, -torch.inf)
        labels = torch.arange(first, first + len(rows), device=rows.device)
        losses.append(F.cross_entropy(logits, labels, reduction="none") / 2 if len(rows) else logits.new_zeros(0))
        unused = (
            unused + 0 * everyone.sum()
        )  # without rows of its own a rank still takes part in the exchange's backward
        if number == 0 and len(rows):
            right = logits.argmax(1) == labels
    each = losses[0] + losses[1]
    return Rows(each.sum() + unused, each.detach(), right)


def contrastive_loss(
    images: Float[Tensor, "N D"],
    texts: Float[Tensor, "N D"],
    scale: Float[Tensor, ""],
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """The sum of `contrastive_rows`."""
    return contrastive_rows(images, texts, scale, group).sum


def sigmoid_rows(
    images: Float[Tensor, "N D"],
    texts: Float[Tensor, "N D"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    group: dist.ProcessGroup | None = None,
) -> Rows:
    """Each pair for itself, right or wrong (SigLIP, arXiv:2303.15343, alg. 1): this rank's images against all texts.

    To be divided by all ranks' pairs; otherwise as `contrastive_rows`.
    """
    everyone, first, there = _gather(texts, group)
    logits = (scale * images @ everyone.T + bias).float()
    signs = -torch.ones_like(logits)
    own = torch.arange(len(images), device=images.device)
    signs[own, first + own] = 1
    each = -(F.logsigmoid(signs * logits) * there).sum(1)
    if len(images):
        right = logits.masked_fill(~there, -torch.inf).argmax(1) == first + own
    else:
        right = torch.zeros(0, dtype=torch.bool, device=images.device)
    return Rows(each.sum() + 0 * everyone.sum(), each.detach(), right)


def sigmoid_loss(
    images: Float[Tensor, "N D"],
    texts: Float[Tensor, "N D"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    group: dist.ProcessGroup | None = None,
) -> Float[Tensor, ""]:
    """The sum of `sigmoid_rows`."""
    return sigmoid_rows(images, texts, scale, bias, group).sum


def _gather(
    mine: Float[Tensor, "N D"], group: dist.ProcessGroup | None
) -> tuple[Float[Tensor, "A D"], int, Bool[Tensor, " A"]]:
    """Rows of all ranks, where this rank's begin, and which of them there are: ranks are filled up to the same number."""
    if group is None:
        return mine, 0, torch.ones(len(mine), dtype=torch.bool, device=mine.device)
    count = torch.tensor([len(mine)], device=mine.device)
    counts = [torch.empty_like(count) for _ in range(group.size())]
    dist.all_gather(counts, count, group=group)
    each = torch.cat(counts)
    most = max(1, int(each.max()))
    filled = F.pad(mine, (0, 0, 0, most - len(mine)))
    there = torch.arange(most, device=mine.device)[None] < each[:, None]
    return gather_rows(filled, group), group.rank() * most, there.flatten()
