"""What a model remembers of itself and of steps gone by: a slow twin of its weights (MoCo, arXiv:1911.05722) and a queue.

Both are buffers: checkpoints hold them, no optimiser sees them, no pattern of `Stage.tune` matches them.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

WRAPPED = "_checkpoint_wrapped_module."
"""What torch's wrapper for recomputation puts into the names of the weights below it."""


def as_buffers(module: nn.Module) -> nn.Module:
    """A copy of `module` whose parameters are buffers."""
    twin = deepcopy(module)
    for part in twin.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                del part._parameters[name]
                part.register_buffer(name, parameter.detach().clone())
    return twin.eval()


@torch.no_grad()
def follow(twin: nn.Module, module: nn.Module, momentum: float) -> None:
    """Move each weight of `twin` towards that of the same name in `module`: momentum * old + (1 - momentum) * new.

    Where weights are sharded it is a collective, one weight after the other: every rank must call it.
    """
    from torch.distributed.tensor import DTensor  # late: whoever only describes a recipe shards nothing

    slow = dict(twin.named_buffers())
    for name, parameter in module.named_parameters():
        held = slow.get(name.replace(WRAPPED, ""))
        if held is None:
            continue
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        held.lerp_(whole.detach().to(held), 1 - momentum)


class Queue(nn.Module):
    """The embeddings of the last `size` pairs of steps gone by, unit length; until there are so many, those that there are.

    `seen` int64 (1,) counts all that ever came.
    """

    images: Tensor
    texts: Tensor
    seen: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("images", torch.zeros(size, width))
        self.register_buffer("texts", torch.zeros(size, width))
        self.register_buffer("seen", torch.zeros(1, dtype=torch.long))

    def held(self) -> tuple[Float[Tensor, "F E"], Float[Tensor, "F E"]]:
        """What is in it, in no order that means anything."""
        filled = min(int(self.seen), self.size)
        return self.images[:filled], self.texts[:filled]

    @torch.no_grad()
    def feed(self, images: Float[Tensor, "A E"], texts: Float[Tensor, "A E"]) -> None:
        """Put these in the place of the oldest."""
        count = len(images)
        kept = min(count, self.size)
        first = int(self.seen) + count - kept
        places = (first + torch.arange(kept, device=self.images.device)) % max(self.size, 1)
        if kept:
            self.images[places] = images[count - kept :].to(self.images)
            self.texts[places] = texts[count - kept :].to(self.texts)
        self.seen += count


def unit(x: Tensor) -> Tensor:
    """Of unit length along the last dimension, in float32."""
    return F.normalize(x.float(), dim=-1)


def shed(module: nn.Module, names: tuple[str, ...]) -> None:
    """Take away children called `names`, wherever they are in `module`: a twin needs no heads that nobody asks it for."""
    for part in list(module.modules()):
        children: Mapping[str, nn.Module | None] = part._modules
        for name in [name for name in children if name in names]:
            delattr(part, name)
