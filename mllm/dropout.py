"""Dropout (Srivastava et al., JMLR 15, 2014) that rows alone decide, in layers of others' making.

What is left out is a function of a row's seed, of a position in it and of the layer: the same on whatever rank and in whatever
pack the row is trained on, in both passes of an objective that goes over a step twice, and where activations are computed again.
Of hidden states numbers are left out, of attention its weights, by query, key and head. Kernels never hold those weights, and
kernels that can leave some out draw by a counter of the device: so where some are to be left out, attention is computed plainly.
A mask costs some twenty reads and writes of its input in 32 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from mllm.chance import mixed, row_seeds
from ops.cross import Runs
from ops.weighed import weighed_attention
from pipelines.types import Batch

Dropout = Annotated[float, Field(ge=0, lt=1)]
"""The share of numbers that are left out, in steps of 2 ** -16."""

HALF = 16
"""Bits that decide about one number: each draw of 32 is used twice."""


HEADS = 64
"""Pairs of heads that a key's draws have room for."""


def draws(seeds: Int[Tensor, " P"], owner: Int[Tensor, " T"], place: Int[Tensor, " T"]) -> Int[Tensor, " T"]:
    """The chance of each position, of its row's seed and its place there."""
    return mixed(mixed(seeds)[owner] + place * 0x9E3779B1)


def draws_of_rows(seeds: Int[Tensor, " S"], length: int, salt: int) -> Int[Tensor, "S length"]:
    """The chance of the first positions of each row; another `salt`, another chance for another pass over the same rows."""
    owner = torch.arange(len(seeds), device=seeds.device).repeat_interleave(length)
    place = torch.arange(length, device=seeds.device).repeat(len(seeds))
    return draws(seeds + salt * 0xC2B2AE3D, owner, place).view(len(seeds), length)


def kept(drawn: Int[Tensor, "*T"], width: int, number: int, rate: float) -> Bool[Tensor, "*T width"]:
    """Which of `width` numbers at each position stay; another `number`, another mask."""
    channels = torch.arange(-(-width // 2), device=drawn.device) * 0x85EBCA77 + number * 0xC2B2AE3D
    bits = mixed(drawn[..., None] + channels)
    return torch.stack(_halves(bits, rate), dim=-1).flatten(-2)[..., :width]


def kept_weights(drawn: Int[Tensor, "S L"], heads: int, keys: int, number: int, rate: float) -> Bool[Tensor, "S H L K"]:
    """Which of attention's weights stay, of queries with these chances, to each of their `keys`; at most 128 heads."""
    pairs = torch.arange(-(-heads // 2), device=drawn.device)[:, None, None]
    places = torch.arange(keys, device=drawn.device) * HEADS + pairs
    bits = mixed(mixed(drawn + number * 0xC2B2AE3D)[:, None, :, None] + places * 0x85EBCA77)
    return torch.stack(_halves(bits, rate), dim=2).flatten(1, 2)[:, :heads]


def _halves(bits: Int[Tensor, "..."], rate: float) -> tuple[Bool[Tensor, "..."], Bool[Tensor, "..."]]:
    """Two decisions of each draw of 32 bits: whether something stays."""
    least = round(rate * 2**HALF)
    return bits & (2**HALF - 1) >= least, bits >> HALF >= least


def _without(x: Float[Tensor, "..."], mask: Bool[Tensor, "..."], rate: float) -> Float[Tensor, "..."]:
    """What stays, made greater by as much as goes."""
    return torch.where(mask, x, 0.0) / (1 - round(rate * 2**HALF) / 2**HALF)


class _Told(nn.Module):
    """What leaves out a share of something in training; `number` is its own among those of its kind in the model.

    It leaves out nothing until it is `told` by which chance. That is told in every forward of a layer, from what the layer is
    called with: a layer that is computed again for the backward pass may have seen other packs since.
    """

    def __init__(self, rate: float, number: int) -> None:
        super().__init__()
        self.rate = rate
        self.number = number
        self.drawn: Tensor | None = None

    def told(self, drawn: Int[Tensor, "*T"] | None) -> None:
        """From here on the positions it sees are of this chance; None leaves nothing out."""
        self.drawn = drawn

    @property
    def active(self) -> bool:
        """Whether anything is left out now."""
        return self.training and self.rate > 0 and self.drawn is not None


@contextmanager
def nothing_left_out(model: nn.Module) -> Iterator[None]:
    """The model as it is without dropout, whatever else training changes."""
    active = [module for module in model.modules() if isinstance(module, _Told) and module.training]
    for module in active:
        module.eval()
    try:
        yield
    finally:
        for module in active:
            module.train()


class RowDropout(_Told):
    """Leaves out a share of its input's numbers and makes up for them."""

    def forward(self, x: Float[Tensor, "*batch T D"]) -> Float[Tensor, "*batch T D"]:
        if not self.active or self.drawn is None:
            return x
        return _without(x, kept(self.drawn, x.shape[-1], self.number, self.rate), self.rate)


class WeightDropout(_Told):
    """Leaves out a share of attention's weights and makes up for them; the chance it is told is that of queries."""

    def forward(self, weights: Float[Tensor, "S H L K"]) -> Float[Tensor, "S H L K"]:
        """Of weights over rows of equal length, their chance being (S, L)."""
        return weights if not self.active or self.drawn is None else self._of(weights, self.drawn)

    def attention(
        self,
        q: Float[Tensor, "T H E"],
        k: Float[Tensor, "V K E"],
        v: Float[Tensor, "V K E"],
        runs: Runs,
        scale: float | None = None,
    ) -> Float[Tensor, "T H E"]:
        """Attention over packs without them, each run of queries seeing its whole run of keys; the chance is (T,)."""
        drawn = self.drawn
        assert drawn is not None
        return weighed_attention(q, k, v, runs, lambda weights, at: self._of(weights, drawn[at]), scale=scale)

    def _of(self, weights: Float[Tensor, "S H L K"], drawn: Int[Tensor, "S L"]) -> Float[Tensor, "S H L K"]:
        heads, _, keys = weights.shape[1:]
        return _without(weights, kept_weights(drawn, heads, keys, self.number, self.rate), self.rate)


def chance(
    batch: Batch, documents: Int[Tensor, " P"], owner: Int[Tensor, " T"], place: Int[Tensor, " T"]
) -> Int[Tensor, " T"]:
    """The chance of positions, each a `place` in the `owner`-th of `documents`. Raises ValueError for a batch without seeds."""
    return draws(row_seeds(batch)[documents] if len(documents) else torch.zeros_like(owner), owner, place)


class Dropouts:
    """Those of one layer."""

    def __init__(self, modules: Iterable[RowDropout | WeightDropout]) -> None:
        self.modules = tuple(modules)

    def __add__(self, other: Dropouts) -> Dropouts:
        return Dropouts((*self.modules, *other.modules))

    def told(self, drawn: Int[Tensor, "*T"] | None) -> None:
        """`told`, each of them."""
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


def among(attentions: Iterable[nn.Module], rate: float, first: int, name: str = "left_out") -> Dropouts:
    """Give each attention, as its `name`, what leaves out some of its weights; their numbers begin at `first`.

    Attention whose function is one of ours looks for it as `left_out`; one that has dropout of its own over weights (S, H, L, K)
    calls it in that one's place.
    """
    found = []
    for number, attention in enumerate(attentions, first):
        found.append(WeightDropout(rate, number))
        setattr(attention, name, found[-1])
    return Dropouts(found)
