"""Torch's collectives through which gradients go back, under the names that a release of torch has for them."""

from __future__ import annotations

import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


def gather_rows(mine: Float[Tensor, "v D"], group: dist.ProcessGroup) -> Float[Tensor, "V D"]:
    """All ranks' rows, equally many, in the order of ranks; gradients go back to whose they are. A collective.

    What it is made of is imported where it is used: it brings torch's compiler with it.
    """
    from torch.distributed import _functional_collectives as collectives

    named = "all_gather_single_autograd"  # since 2.13, which warns of the name before
    gather = getattr(collectives, named, None) or collectives.all_gather_tensor_autograd
    return gather(mine.contiguous(), 0, group)
