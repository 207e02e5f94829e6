"""Samples of a window -> groups within two budgets, tokens and tiles, in an order that keeps ranks level."""

from __future__ import annotations

import random
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.types import Budget, Sample

TINY = 1e-9
"""Shares are sums of fractions; a pack that is exactly full is not over-full."""

TRIES, PATCH, REACH = 40, 16, 1.03
"""How often a packing is mended and how many packs at a time, if it is within `REACH` of the bound: farther off, samples are
so large that no arrangement comes near."""

Grouping = Literal["mixed", "modality", "source"]
"""Which samples may share a pack: any; those with pictures or those without (LLaVA's grouping); those of one source."""

NEIGHBOURS = 8
"""Packs of like cost that stay side by side: the deal hands neighbours to different ranks at the same moment."""


def assign(costs: list[tuple[int, int]], budget: Budget) -> list[list[int]]:
    """Groups of indices, each within `budget`; every index in exactly one group. The same costs give the same groups.

    Two rules are tried and the fewer packs taken: bin-centric L2, which fills one pack at a time with the sample nearest to
    the room that is left (best where both budgets are scarce), and first-fit-decreasing (best where one is). What is left
    above the bound that no packing passes is mended: a few packs with room are emptied and filled again, as long as that
    helps (large neighbourhood search). O(n²) in vectorised steps: a tenth of a second or two for a window of 1024.
    Raises ValueError when one sample alone exceeds the budget; `encode` never makes such a sample.
    """
    limits = np.array([budget.tokens, budget.tiles], float)
    sizes = np.array(costs, float).reshape(-1, 2)
    if len(sizes) and (sizes > limits).any():
        worst = int(np.argmax((sizes / limits).max(axis=1)))
        raise ValueError(
            f"sample {worst} costs {costs[worst]} (tokens, tiles) and a pack holds {(budget.tokens, budget.tiles)}"
        )
    sizes /= limits
    everyone = np.arange(len(sizes))
    groups = min(_nearest(sizes, everyone, np.ones(2)), _first_fit(sizes), key=len)
    return _mended(sizes, groups)


def bound(sizes: NDArray[np.float64]) -> int:
    """Packs that are needed at least for samples of `sizes` (n, 2), in shares of the budgets: the scarcer one decides."""
    return int(np.ceil(sizes.sum(axis=0).max(initial=0) - TINY))


def _nearest(
    sizes: NDArray[np.float64], chosen: NDArray[np.int64], weights: NDArray[np.float64], pairs: bool = False
) -> list[list[int]]:
    """Bin-centric L2 (Panigrahy et al., Heuristics for Vector Bin Packing, 2011, section 3.2)."""
    mine = sizes[chosen]
    waiting = np.ones(len(mine), bool)
    groups: list[list[int]] = []
    while waiting.any():
        room = np.ones(2)
        groups.append([])
        while True:
            fits = waiting & (mine <= room + TINY).all(axis=1)
            if not fits.any():
                break
            for place in _best(mine, np.flatnonzero(fits), room, weights, pairs):
                groups[-1].append(int(chosen[place]))
                waiting[place] = False
                room -= mine[place]
    return groups


def _best(
    mine: NDArray[np.float64],
    fits: NDArray[np.int64],
    room: NDArray[np.float64],
    weights: NDArray[np.float64],
    pairs: bool,
) -> list[int]:
    """The sample of `fits` that comes nearest to filling `room`; with `pairs`, or the two that do, once few more will fit."""
    single = ((room - mine[fits]) ** 2) @ weights
    nearest = int(single.argmin())
    if not pairs or (room > 4 * mine[fits].mean(axis=0)).all():
        return [int(fits[nearest])]
    both = mine[fits][:, None] + mine[fits][None]
    allowed = (both <= room + TINY).all(axis=2) & ~np.eye(len(fits), dtype=bool)
    double = np.where(allowed, ((room - both) ** 2) @ weights, np.inf)
    if double.min() >= single[nearest]:
        return [int(fits[nearest])]
    return [int(fits[place]) for place in np.unravel_index(int(double.argmin()), double.shape)]


def _first_fit(sizes: NDArray[np.float64]) -> list[list[int]]:
    """First-fit-decreasing, by the larger share."""
    room = np.ones((len(sizes), 2))
    groups: list[list[int]] = []
    for i in np.argsort(-sizes.max(axis=1, initial=0), kind="stable"):
        fits = (sizes[i] <= room[: len(groups)] + TINY).all(axis=1)
        place = int(fits.argmax()) if fits.any() else len(groups)
        if place == len(groups):
            groups.append([])
        groups[place].append(int(i))
        room[place] -= sizes[i]
    return groups


def _mended(sizes: NDArray[np.float64], groups: list[list[int]]) -> list[list[int]]:
    """Empty `PATCH` packs, those with room more often, and fill them again; keep what has fewer packs, or fuller full ones."""
    least = bound(sizes)
    rng = np.random.default_rng(0)
    for attempt in range(TRIES if least < len(groups) <= REACH * least + 1 else 0):
        room = np.array([2 - sizes[group].sum() for group in groups]) + 0.02
        patch = rng.choice(len(groups), min(PATCH, len(groups)), replace=False, p=room / room.sum())
        old = [groups[i] for i in patch]
        inside = rng.permutation(np.concatenate(old))
        new = _nearest(sizes, inside, rng.uniform(0.3, 1, 2), pairs=attempt % 2 == 0)
        if _score(sizes, new) < _score(sizes, old):
            gone = set(patch.tolist())
            groups = [group for i, group in enumerate(groups) if i not in gone] + new
        if len(groups) == least:
            break
    return groups


def _score(sizes: NDArray[np.float64], groups: list[list[int]]) -> tuple[int, float]:
    """Smaller is better: fewer packs, and of as many those whose room is gathered in few, where something may yet fit."""
    return len(groups), -float(sum((sizes[group].sum(axis=0) ** 2).sum() for group in groups))


def plan(samples: list[Sample], budget: Budget, rng: random.Random, grouping: Grouping = "mixed") -> list[list[Sample]]:
    """The samples of each pack of one window, in the window's order. Costs alone decide: no picture is decoded for it.

    Packs of like cost are neighbours, because neighbours are dealt to different ranks; groups of neighbours are shuffled,
    so that a step's cost says nothing of its place in the window.
    """
    kinds: dict[int, list[int]] = {}
    for i, sample in enumerate(samples):
        kinds.setdefault(_kind(sample, grouping), []).append(i)
    groups = [
        [kind[i] for i in group] for kind in kinds.values() for group in assign([samples[i].cost for i in kind], budget)
    ]

    def cost(group: list[int]) -> tuple[int, int]:
        return sum(samples[i].tiles for i in group), sum(len(samples[i].input_ids) for i in group)

    groups.sort(key=lambda group: (cost(group), group))
    neighbourhoods = [groups[i : i + NEIGHBOURS] for i in range(0, len(groups), NEIGHBOURS)]
    rng.shuffle(neighbourhoods)
    return [[samples[i] for i in sorted(group)] for neighbourhood in neighbourhoods for group in neighbourhood]


def _kind(sample: Sample, grouping: Grouping) -> int:
    match grouping:
        case "mixed":
            return 0
        case "modality":
            return int(bool(sample.pictures))
        case "source":
            return sample.source
