"""FLOPs of kinds of models whose packs are counted as wholes, and of objectives that see a step's packs together.

    pack_flops(model, objective, batch)           one forward and backward, whatever is in it
    fitted_cost(model, objective, batches)        what a tile, a token, a pair of tokens cost in such packs

Both on a model without memory, by torch's own formulas; what FLOPs are counted is told by `mllm.flops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mllm.counting import Shapes
from mllm.dropout import nothing_left_out
from mllm.flops import Cost, Flops, Work
from mllm.model import Model
from mllm.objectives import Gathered, Objective, OneOf
from mllm.recipe import Recompute
from pipelines.types import Batch


class UncountedError(ValueError):
    """FLOPs that shapes alone do not tell."""


def pack_flops(model: Model, objective: Objective, batch: Batch) -> float:
    """Model FLOPs of one forward and backward on `batch`, counted as a whole; `model` is on the meta device.

    For kinds whose packs differ in more than `Work` tells, and objectives that see a step's packs together: these are asked as if
    the step had no other. What is collected for them first is not counted, since it is computed again. Attention counts whole
    where a mask hides half of it. An objective that has one of several terms a step counts as their mean, by how often
    each comes. Raises UncountedError where what is computed hangs on numbers that a model without memory has not.
    """
    return sum(_counted(model, objective, batch))


def fitted_cost(
    model: Model, objective: Objective, batches: Sequence[tuple[Work, Batch]], recompute: Recompute = "none"
) -> Cost:
    """What a pack's tiles, or its documents where it has none, its tokens and their pairs cost, told by packs that differ.

    The packs are of documents alike, each pack's of another length: a document's FLOPs are a polynomial of second degree in it,
    which three lengths tell. A blank tile that packs without pictures see counts as theirs. Hardware FLOPs have the forward again
    where `recompute` is "full". Raises UncountedError.
    """
    works = [work for work, _ in batches]
    counts = np.array([_counted(model, objective, batch) for _, batch in batches])
    again = 2.0 if recompute == "full" else 1.0
    needed, computed = (_fit(works, counts @ np.array(times)) for times in ((1.0, 1.0), (again, 1.0)))
    return Cost(model=needed, hardware=computed)


def _fit(works: Sequence[Work], flops: np.ndarray) -> Flops:
    """The polynomial through all of them; a straight line where pairs of tokens would cost less than nothing, which chance can
    make of how many words a mask hides. Positions of pictures are tokens too, so what is left for a tile may be negative.
    """
    first = "per_tile" if any(work.tiles for work in works) else "per_document"
    grows = {
        first: [work.tiles if first == "per_tile" else work.documents for work in works],
        "per_token": [work.tokens for work in works],
        "per_pair": [work.pairs for work in works],
    }
    if len({work.tokens for work in works}) == 1:  # documents of one length only: all of it belongs to each
        del grows["per_token"], grows["per_pair"]
    found = _solved(grows, flops)
    if found.get("per_pair", 0.0) < 0:
        del grows["per_pair"]
        found = _solved(grows, flops)
    return Flops(**{"per_tile": 0.0, "per_token": 0.0, "per_pair": 0.0, "per_learned": 0.0, **found})


def _solved(grows: dict[str, list[int]], flops: np.ndarray) -> dict[str, float]:
    """By least squares of what each is wrong by, as a share."""
    columns = np.array(list(grows.values()), dtype=np.float64).T / flops[:, None]
    size = np.abs(columns).max(axis=0)
    found = np.linalg.lstsq(columns / size, np.ones(len(flops)), rcond=None)[0] / size
    return dict(zip(grows, map(float, found), strict=True))


def _counted(model: Model, objective: Objective, batch: Batch) -> tuple[float, float]:
    """FLOPs of the forward and of the backward. Raises UncountedError."""
    if isinstance(objective, OneOf):
        parts = [_counted(model, term.objective, batch) for term in objective.terms]
        shares = np.array([term.weight for term in objective.terms])
        forward, backward = shares @ np.array(parts) / shares.sum()
        return float(forward), float(backward)
    try:
        return _once(model, objective, batch)
    except (NotImplementedError, RuntimeError) as error:  # as torch says so
        raise UncountedError(
            f"FLOPs are not predicted: what {objective.kind!r} computes with {type(model).__name__} hangs on its numbers"
        ) from error


def _once(model: Model, objective: Objective, batch: Batch) -> tuple[float, float]:
    count = _Total()
    for module in model.modules():  # whole numbers are known, and begin at nothing
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_floating_point():
                module.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype))
    if batch.tiles.ndim == 4:  # pictures, which are large; what says something of regions is looked at
        batch = replace(batch, tiles=batch.tiles.to("meta"))
    learned_by: Any = objective
    with nothing_left_out(model), count:  # what is drawn by chance costs no products, and long to draw
        told: Any = None
        if isinstance(learned_by, Gathered):
            with torch.no_grad():
                found = learned_by.collect(model, batch)  # type: ignore[arg-type]  # a kind that can, as a recipe makes sure
                count.on = True
                told = learned_by.whole([tree_map_only(Tensor, _somewhere, found)], None)[0]
        count.on = True
        output = learned_by(model, batch) if told is None else learned_by.again(model, batch, told)
        forward = count.sum
        output.sum.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return forward, count.sum - forward


def _somewhere(x: Tensor) -> Tensor:
    """Numbers to choose by, in place of those that nobody knows."""
    return torch.zeros(x.shape, dtype=x.dtype) if x.is_meta else x


class _Total(TorchDispatchMode):
    """Adds up products while it is `on`. What is on the meta device draws the rest after it; whole numbers are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = Shapes()
        self.sum = 0.0
        self.on = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, flops = self.shapes(func, args, kwargs or {})
        if self.on:
            self.sum += flops
        return result
