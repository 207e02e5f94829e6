"""Positions of a pack by the weights that they go through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Ways:
    """Positions of each way, int64, and where each position is found once the ways' results lie behind one another."""

    places: tuple[Int[Tensor, " t"], ...]
    back: Int[Tensor, " T"]

    @classmethod
    def of(cls, way: Int[Tensor, " T"], count: int) -> Ways:
        """For positions that each go one of `count` ways, numbered from zero."""
        places = tuple((way == number).nonzero().squeeze(1) for number in range(count))
        return cls(places, torch.cat(places).argsort())

    def __call__(self, x: Float[Tensor, "T D"], *ways: Callable[[Tensor], Tensor]) -> Float[Tensor, "T F"]:
        """Each of `ways` of its own positions. All run whatever there is: an empty part has gradients."""
        parts = [way(x[places]) for places, way in zip(self.places, ways, strict=True)]
        return torch.cat(parts)[self.back]
