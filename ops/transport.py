"""Optimal transport between the tokens of a text and the patches of a picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def transport_cost(
    left: Float[Tensor, "P A D"],
    right: Float[Tensor, "P B D"],
    there: Bool[Tensor, "P A"],
    beta: float = 0.5,
    rounds: int = 50,
    onto: Bool[Tensor, "P B"] | None = None,
) -> Float[Tensor, " P"]:
    """For each pair the cost of moving `left` onto `right`, evenly weighed, where a distance is one less the cosine.

    The plan is found by IPOT (arXiv:1802.04307, alg. 1) as UNITER and ViLT use it (arXiv:1909.11740, arXiv:2102.03334): it is a
    number for the gradient, which goes through distances alone. Rows of `left` that are not `there` take no part, nor do
    rows of `right` that are not in `onto`, by default all; a pair without any has cost 0.
    """
    cost = 1 - F.normalize(left.float(), dim=-1) @ F.normalize(right.float(), dim=-1).transpose(1, 2)
    both = there[..., None] if onto is None else there[..., None] & onto[:, None]
    cost = cost.masked_fill(~both, 0.0)
    return (cost * plan(cost.detach(), there, beta, rounds, onto)).sum((1, 2))


@torch.no_grad()
def plan(
    cost: Float[Tensor, "P A B"],
    there: Bool[Tensor, "P A"],
    beta: float = 0.5,
    rounds: int = 50,
    onto: Bool[Tensor, "P B"] | None = None,
) -> Float[Tensor, "P A B"]:
    """How much of each row goes to each column. Rows that are `there` give 1 / their number in all, columns in `onto` (all, if
    it is not given) take 1 / theirs.
    """
    onto = torch.ones_like(cost[:, 0], dtype=torch.bool) if onto is None else onto
    rows = there.float() / there.sum(1, keepdim=True).clamp(min=1)
    column = onto.float() / onto.sum(1, keepdim=True).clamp(min=1)
    both = (there[..., None] & onto[:, None]).float()
    kernel = torch.exp(-cost / beta) * both
    moved = both
    by_column = column.clone()
    for _ in range(rounds):
        flow = kernel * moved
        by_row = rows / (flow @ by_column[..., None]).squeeze(-1).clamp(min=1e-30)
        by_column = column / (flow.transpose(1, 2) @ by_row[..., None]).squeeze(-1).clamp(min=1e-30)
        moved = by_row[..., None] * flow * by_column[:, None]
    return moved
