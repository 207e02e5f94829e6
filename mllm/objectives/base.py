"""What an objective gives, and what one asks that must see all packs of a step before it can learn from one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.types import Batch


@dataclass(slots=True)
class LossOutput:
    """`sum` () float32, with gradient; `weight` () float32, what to divide by, summed over all packs of a step.

    `documents` float32 (S, 3), detached: each document's loss sum, learned tokens and correctly predicted tokens.
    """

    sum: Tensor
    weight: Tensor
    documents: Tensor


Collected = tuple[Tensor, ...]
"""What an objective keeps of one pack: embeddings, say. Those that are floating-point can have gradients."""


class Gathered:
    """An objective whose loss of one pack depends on the other packs of the step, those of other ranks too.

    An engine goes over a step's packs twice (GradCache, arXiv:2101.06983): first without gradient, `collect` of each; `whole`
    finds the loss of all, and its slope by what was collected; then `again` of each pack gives that pack's part of the loss with
    the gradient that it has in the whole. So the result depends on the packs of the step alone, however they are spread over
    ranks and turns.
    """

    __slots__ = ()

    def collect(self, model: Any, batch: Batch) -> Collected:
        """What the whole needs to know of a pack. Run within the model's forward."""
        raise NotImplementedError

    def whole(self, packs: Sequence[Collected], group: dist.ProcessGroup | None) -> list[Any]:
        """For each of this rank's packs what `again` must be told. A collective over `group`; None is a rank by itself."""
        raise NotImplementedError

    def again(self, model: Any, batch: Batch, told: Any) -> LossOutput:
        """The pack's part of the loss, with its gradient."""
        raise NotImplementedError

    def settle(self, model: Any, told: Sequence[Any]) -> None:
        """Let the model remember what it must of a step that was taken, `told` what `whole` gave. Called on every rank."""

    def __call__(self, model: Any, batch: Batch) -> LossOutput:
        """The loss of a batch as if it were the whole step, as when it is scored."""
        with torch.no_grad():
            collected = self.collect(model, batch)
        group = None if batch.share is None else batch.share.context.group
        return self.again(model, batch, self.whole([collected], group)[0])


def leaves(packs: Sequence[Collected]) -> list[Collected]:
    """The same numbers, from which gradients can be taken."""
    return [tuple(x.detach().requires_grad_(x.is_floating_point()) for x in pack) for pack in packs]


def slopes(loss: Tensor, packs: Sequence[Collected]) -> list[Collected]:
    """The gradient of `loss` by each of `leaves`; zeros where it does not depend on one."""
    wanted = [x for pack in packs for x in pack if x.requires_grad]
    found = torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad else [None] * len(wanted)
    by = {id(x): torch.zeros_like(x) if slope is None else slope for x, slope in zip(wanted, found, strict=True)}
    return [tuple(by.get(id(x), torch.zeros_like(x)) for x in pack) for pack in packs]


def steered(collected: Collected, slope: Collected) -> Tensor:
    """A scalar of value zero whose gradient is that of a loss with the given slopes by `collected`."""
    products = [(x.float() * s.float()).sum() for x, s in zip(collected, slope, strict=True) if x.is_floating_point()]
    total = torch.stack(products).sum()
    return total - total.detach()


def no_documents(batch: Batch) -> Tensor:
    """The table of a batch's documents, float32 (S, 3), with nothing in it."""
    return torch.zeros(len(batch.sources), 3, device=batch.sources.device)
