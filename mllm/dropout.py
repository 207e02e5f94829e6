"""Dropout (Srivastava et al., JMLR 15, 2014) that rows alone decide, in layers of others' making.

What is left out is a function of a row's seed, of a position in it and of the layer: the same on whatever rank and in whatever
pack the row is trained on, in both passes of an objective that goes over a step twice, and where activations are computed again.
Attention's weights are not for this: its kernels never hold them, and those that can leave some out draw by a counter of the
device. A mask costs some twenty reads and writes of its input in 32 bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from mllm.chance import mixed, row_seeds
from pipelines.types import Batch

Dropout = Annotated[float, Field(ge=0, lt=1)]
"""The share of numbers that are left out, in steps of 2 ** -16."""

HALF = 16
"""Bits that decide about one number: each draw of 32 is used twice."""


def draws(seeds: Int[Tensor, " P"], owner: Int[Tensor, " T"], place: Int[Tensor, " T"]) -> Int[Tensor, " T"]:
    """The chance of each position, of its row's seed and its place there."""
    return mixed(mixed(seeds)[owner] + place * 0x9E3779B1)


def kept(drawn: Int[Tensor, " T"], width: int, number: int, rate: float) -> Bool[Tensor, "T width"]:
    """Which of `width` numbers at each position stay; another `number`, another mask."""
    channels = torch.arange(-(-width // 2), device=drawn.device) * 0x85EBCA77 + number * 0xC2B2AE3D
    bits = mixed(drawn[:, None] + channels)
    least = round(rate * 2**HALF)
    halves = torch.stack([bits & (2**HALF - 1), bits >> HALF], dim=2)
    return (halves >= least).flatten(1)[:, :width]


class RowDropout(nn.Module):
    """Leaves out a share of its input's numbers in training and makes up for them; `number` is its own in the model.

    It leaves out nothing until it is `told` by which chance. That is told in every forward of a layer, from what the layer is
    called with: a layer that is computed again for the backward pass may have seen other packs since.
    """

    def __init__(self, rate: float, number: int) -> None:
        super().__init__()
        self.rate = rate
        self.number = number
        self.drawn: Tensor | None = None

    def chance(
        self, batch: Batch, documents: Int[Tensor, " P"], owner: Int[Tensor, " T"], place: Int[Tensor, " T"]
    ) -> Int[Tensor, " T"] | None:
        """The chance of positions, each a `place` in the `owner`-th of `documents`; None where nothing is to be left out."""
        if not self.training or not self.rate:
            return None
        return draws(row_seeds(batch)[documents] if len(documents) else torch.zeros_like(owner), owner, place)

    def told(self, drawn: Int[Tensor, " T"] | None) -> None:
        """From here on the positions it sees are of this chance; None leaves nothing out."""
        self.drawn = drawn

    def forward(self, x: Float[Tensor, "*batch T D"]) -> Float[Tensor, "*batch T D"]:
        if not self.training or not self.rate or self.drawn is None:
            return x
        mask = kept(self.drawn, x.shape[-1], self.number, self.rate)
        return torch.where(mask, x, 0.0) / (1 - round(self.rate * 2**HALF) / 2**HALF)


class Dropouts:
    """Those of one layer."""

    def __init__(self, modules: Iterable[RowDropout]) -> None:
        self.modules = tuple(modules)

    def told(self, drawn: Int[Tensor, " T"] | None) -> None:
        """`RowDropout.told`, each of them."""
        for module in self.modules:
            module.told(drawn)

    def told_by(self, layer: nn.Module) -> None:
        """Have them told by what `layer` is called with as `draws`, which it does not see itself."""

        def hand_over(_: nn.Module, args: tuple[Any, ...], words: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            self.told(words.pop("draws", None))
            return args, words

        layer.register_forward_pre_hook(hand_over, with_kwargs=True)


def within(modules: Iterable[nn.Module], rate: float, first: int) -> Dropouts:
    """Put dropout of ours in the place of each module's `dropout`; their numbers begin at `first`."""
    found = []
    for number, module in enumerate(modules, first):
        found.append(RowDropout(rate, number))
        module.dropout = found[-1]
    return Dropouts(found)
