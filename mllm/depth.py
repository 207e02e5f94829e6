"""Stochastic depth (arXiv:1603.09382): in training a layer's branches are left out by chance, of one picture and not of another.

What is left out is a function of a row's seed, so it is the same on whatever rank and in whatever pack the row is trained on,
and both times where an objective goes over a step twice. Outside training nothing is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from mllm.chance import chosen

DropPath = Annotated[float, Field(ge=0, lt=1)]
"""The share of branches left out in the last layer; before it shares rise evenly from none in the first (section 3)."""

SALT = 64


def branch_factors(seeds: Int[Tensor, " N"], layers: int, rate: float) -> Float[Tensor, "N branches"]:
    """What each of two branches of each layer is multiplied by for each seed: zero, or the inverse of the share that is kept."""
    branches = 2 * layers
    place = torch.arange(branches, device=seeds.device)
    owner = torch.arange(len(seeds), device=seeds.device)
    drawn = chosen(seeds, owner.repeat_interleave(branches), place.repeat(len(seeds)), SALT).view(-1, branches)
    dropped = rate * (place // 2) / max(layers - 1, 1)
    return (drawn >= dropped) / (1 - dropped)


class Depth:
    """Leaves out branches of `layers`, modules of others' making: `branches` are the two of each whose output is added.

    `draw` says for whom, until it is called again, so that what is computed again in the backward pass is the same.
    """

    def __init__(self, branches: Sequence[tuple[nn.Module, nn.Module]], rate: float) -> None:
        self.rate = rate
        self.layers = len(branches)
        self.factors: Tensor | None = None
        for number, module in enumerate(module for pair in branches for module in pair):
            module.register_forward_hook(partial(self._scaled, number))

    def draw(self, seeds: Int[Tensor, " N"] | None) -> None:
        """From here on the first dimension of what the layers see is of these seeds; None leaves nothing out."""
        self.factors = None if seeds is None else branch_factors(seeds, self.layers, self.rate)

    def _scaled(self, number: int, module: nn.Module, _: Any, output: Any) -> Any:
        if self.factors is None or not module.training:
            return output
        branch = output[0] if isinstance(output, tuple) else output
        factor = self.factors[:, number].to(branch.dtype).view(-1, *[1] * (branch.dim() - 1))
        return (branch * factor, *output[1:]) if isinstance(output, tuple) else branch * factor


def branches_of(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The two modules of a transformer's layer whose output is added to what comes in, whatever `transformers` calls them.

    Raises ValueError for a layer that has none, or that norms them once more before it adds them.
    """
    attention: Any = getattr(layer, "self_attn", None) or getattr(layer, "attention", None)
    mlp: Any = getattr(layer, "mlp", None)
    if not isinstance(attention, nn.Module) or not isinstance(mlp, nn.Module):
        raise ValueError(f"{type(layer).__name__} has no two branches to leave out; set drop_path to 0")
    return attention, mlp
