"""Stacks of equal layers in a vision-language model, and the model with fewer: memory goes straight with their number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from mllm.encoders import Encoder
from mllm.recipe import Stage
from mllm.vlm import VLM

DEPTH = 3
"""Layers that are built of a deeper stack, and one more to see what a layer adds: two at either end, which differ by what is
gathered ahead of them and still sent behind them; between them memory goes straight.
"""


@dataclass(frozen=True, slots=True)
class Stack:
    """`layers` that a model has and how many of them are `built`; after `period` of them it repeats itself. A stack that only
    `lies` there is of a tower that keeps nothing of what it computes.
    """

    layers: int
    built: int
    period: int = 1
    lies: bool = False


Depths = tuple[tuple[str, int], ...]
"""Layers of each stack, by where the model's spec says their number."""


def stacks_of(model: VLM, stage: Stage) -> dict[str, Stack]:
    """The stacks of a model that can be shortened, by where its spec says how many layers they have."""
    learns = any(part.split(".")[0] == "encoder" for part in stage.tune)
    found: dict[str, Stack] = {}
    for where, layers, least, period in _places(model):
        lies = where.startswith("encoder") and not learns
        least += 2 if lies else DEPTH
        least += (layers - least) % period  # as many patterns are left out as added
        found[where] = Stack(layers, layers if layers <= least + period else least, period, lies)
    return found


def shortened(model: VLM, depths: Depths) -> VLM:
    """The model with so many layers in its stacks."""
    for where, layers in depths:
        model = _with(model, where.split("."), layers)
    return model


def layer_weights(model: VLM, where: str) -> int:
    """Parameters of a layer of the tower whose layers are told at `where`."""
    return _weights_of_one(_at(model, where.removesuffix(".arch.layers")))


@cache
def _weights_of_one(tower: Encoder) -> int:
    alone = replace(tower, arch=replace(tower.arch, layers=1), layer=-1)  # type: ignore[call-arg]  # it has layers, see _places
    with torch.device("meta"):
        built = alone.build(str)
    return sum(p.numel() for p in built.units()[0].parameters())


def _places(model: VLM) -> Iterator[tuple[str, int, int, int]]:
    """Where a number of layers stands, the number, how many of them are unlike the others, the period of the others."""
    encoder = model.encoder
    towers = {f"encoder.towers.{number}": tower for number, tower in enumerate(encoder.towers)}
    if isinstance(encoder, Encoder):
        towers = {"encoder": encoder}
    for where, tower in towers.items():
        layers = getattr(tower.arch, "layers", None)
        # Where what is read counts from the end, what is behind it is not computed.
        if layers is not None and tower.layer < 0:
            yield f"{where}.arch.layers", layers, -tower.layer - 1, 1
    yield "lm.arch.layers", model.lm.arch.layers, 0, model.fusion.period


def _at(value: Any, where: str) -> Any:
    for step in where.split("."):
        value = value[int(step)] if step.isdigit() else getattr(value, step)
    return value


def _with(value: Any, steps: list[str], layers: int) -> Any:
    if not steps:
        return layers
    first, *rest = steps
    if first.isdigit():
        return tuple(_with(one, rest, layers) if n == int(first) else one for n, one in enumerate(value))
    return replace(value, **{first: _with(getattr(value, first), rest, layers)})
