"""Samples of a window -> groups within two budgets, tokens and tiles, in an order that keeps ranks level."""

from __future__ import annotations

import random
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.types import Budget, Sample

TINY = 1e-9
"""Shares are sums of fractions; a pack that is exactly full is not over-full."""

NEAR, CHOICE = 10, 32
"""A pack is filled at random until about `NEAR` samples are missing; those are chosen exactly, among `CHOICE` that fit."""

GRAIN = (4096, 128)
"""The steps of (tokens, tiles) into which the room that is left is divided at most: sums are exact up to these."""

ATTEMPTS = 2
"""How often sums are sought, each time among others, before rules of thumb are."""

Grouping = Literal["mixed", "modality", "source"]
"""Which samples may share a pack: any; those with pictures or those without (LLaVA's grouping); those of one source."""

NEIGHBOURS = 8
"""Packs of like cost that stay side by side: the deal hands neighbours to different ranks at the same moment."""


def assign(costs: list[tuple[int, int]], budget: Budget) -> list[list[int]]:
    """Groups of indices, each within `budget`; every index in exactly one group. The same costs give the same groups.

    Sums of samples are made that fill each pack to the last token; that mostly ends at the bound which no packing passes.
    Where it does not, two rules of thumb are tried as well, bin-centric L2 (best where both budgets are scarce) and
    first-fit-decreasing (best for a few large samples). O(n²) in vectorised steps: tens of milliseconds for a window of 1024.
    Raises ValueError when one sample alone exceeds the budget; `encode` never makes such a sample.
    """
    limits = np.array([budget.tokens, budget.tiles])
    whole = np.array(costs, np.int64).reshape(-1, 2)
    if len(whole) and (whole > limits).any():
        worst = int(np.argmax((whole / np.maximum(limits, 1)).max(axis=1)))
        raise ValueError(
            f"sample {worst} costs {costs[worst]} (tokens, tiles) and a pack holds {(budget.tokens, budget.tiles)}"
        )
    sizes = whole / np.maximum(limits, 1)
    rng = np.random.default_rng(0)
    least = bound(sizes)
    found: list[list[list[int]]] = []
    for _ in range(ATTEMPTS):
        found.append(_sums(whole, limits, rng))
        if len(found[-1]) <= least:
            return found[-1]
    return min(*found, _nearest(sizes), _first_fit(sizes), key=len)


def bound(sizes: NDArray[np.float64]) -> int:
    """Packs that are needed at least for samples of `sizes` (n, 2), in shares of the budgets: the scarcer one decides."""
    return int(np.ceil(sizes.sum(axis=0).max(initial=0) - TINY))


def _sums(whole: NDArray[np.int64], limits: NDArray[np.int64], rng: np.random.Generator) -> list[list[int]]:
    """Each pack the largest sample that waits, others at random, and at last those whose sum comes nearest to the room left.

    Minimum bin slack (Gupta and Ho, A new heuristic algorithm for the one-dimensional bin-packing problem, 1999) with two
    budgets and the sums by dynamic programming. The scarcer budget weighs more in what is near.
    """
    if not len(whole):
        return []
    shares = whole / np.maximum(limits, 1)
    loads = shares.sum(axis=0)
    scarce = int(loads.argmax())
    weights = (loads / loads.max()) ** 4 if loads.max() > 0 else np.ones(2)
    near = NEAR * shares[:, scarce].mean() * limits[scarce]
    waiting = np.argsort(-shares.max(axis=1), kind="stable")
    groups: list[list[int]] = []
    while len(waiting):
        mine = whole[waiting]
        taken = [0]
        room = limits - mine[0]
        if room[scarce] > near:
            shuffled = 1 + rng.permutation(len(waiting) - 1)
            inside = (mine[shuffled].cumsum(axis=0) <= room).all(axis=1)
            inside &= mine[shuffled, scarce].cumsum() <= room[scarce] - near
            some = shuffled[: int(inside.argmin()) if not inside.all() else len(inside)]
            taken += some.tolist()
            room = room - mine[some].sum(axis=0)
        fits = (mine <= room).all(axis=1)
        fits[taken] = False
        places = np.flatnonzero(fits)
        if len(places) > CHOICE:
            places = np.sort(rng.choice(places, CHOICE, replace=False))
        taken += places[_fullest(mine[places], room, weights / np.maximum(limits, 1) ** 2)].tolist()
        groups.append(waiting[taken].tolist())
        waiting = np.delete(waiting, taken)
    return groups


def _fullest(sizes: NDArray[np.int64], room: NDArray[np.int64], weights: NDArray[np.float64]) -> list[int]:
    """Which of `sizes` (n, 2), together, leave least of `room`: the smallest weighted sum of squares of what is left.

    Bit `tokens + stride * tiles` of `sums` says whether some of the samples so far have that sum; adding a sample is a shift.
    Where several choices have the same sum, the earlier samples are taken: the larger ones, since small ones fit anywhere.
    """
    grains = np.maximum(1, -(-room // np.array(GRAIN)))
    tokens, tiles = (room // grains).tolist()
    steps = (-(-sizes // grains)).tolist()
    stride = 2 * tokens + 2  # a row of sums has as much again beside it, where those that are too long fall
    row = (1 << (tokens + 1)) - 1
    rows = sum(row << (stride * n) for n in range(tiles + 1))
    sums = [1]
    for long, wide in steps:
        sums.append(sums[-1] | ((sums[-1] << (long + stride * wide)) & rows))
    longest = np.array([((sums[-1] >> (stride * n)) & row).bit_length() - 1 for n in range(tiles + 1)])
    left = (np.stack([tokens - longest, tiles - np.arange(tiles + 1)], axis=1) * grains) ** 2 @ weights
    best = int(np.where(longest < 0, np.inf, left).argmin())
    at = int(longest[best]) + stride * best
    chosen: list[int] = []
    for i in range(len(steps) - 1, -1, -1):
        if not sums[i] >> at & 1:
            chosen.append(i)
            at -= steps[i][0] + stride * steps[i][1]
    return chosen


def _nearest(sizes: NDArray[np.float64]) -> list[list[int]]:
    """Bin-centric L2 (Panigrahy et al., Heuristics for Vector Bin Packing, 2011, section 3.2)."""
    waiting = np.ones(len(sizes), bool)
    groups: list[list[int]] = []
    while waiting.any():
        room = np.ones(2)
        groups.append([])
        while True:
            fits = np.flatnonzero(waiting & (sizes <= room + TINY).all(axis=1))
            if not len(fits):
                break
            place = int(fits[((room - sizes[fits]) ** 2).sum(axis=1).argmin()])
            groups[-1].append(place)
            waiting[place] = False
            room -= sizes[place]
    return groups


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


def plan(samples: list[Sample], budget: Budget, rng: random.Random, grouping: Grouping = "mixed") -> list[list[Sample]]:
    """The samples of each pack of one window, in the window's order. Costs alone decide: no picture is decoded for it."""
    kinds: dict[int, list[int]] = {}
    for i, sample in enumerate(samples):
        kinds.setdefault(_kind(sample, grouping), []).append(i)
    costs = [sample.cost for sample in samples]
    groups = [[kind[i] for i in group] for kind in kinds.values() for group in assign([costs[i] for i in kind], budget)]
    return [[samples[i] for i in sorted(group)] for group in level(groups, costs, rng)]


def level(groups: list[list[int]], costs: list[tuple[int, int]], rng: random.Random) -> list[list[int]]:
    """`groups` in an order that gives ranks work of like size at the same time.

    Packs of like cost are neighbours, because neighbours are dealt to different ranks; groups of neighbours are shuffled,
    so that a step's cost says nothing of its place in the window.
    """

    def cost(group: list[int]) -> tuple[int, int]:
        return sum(costs[i][1] for i in group), sum(costs[i][0] for i in group)

    groups = sorted(groups, key=lambda group: (cost(group), group))
    neighbourhoods = [groups[i : i + NEIGHBOURS] for i in range(0, len(groups), NEIGHBOURS)]
    rng.shuffle(neighbourhoods)
    return [group for neighbourhood in neighbourhoods for group in neighbourhood]


def _kind(sample: Sample, grouping: Grouping) -> int:
    match grouping:
        case "mixed":
            return 0
        case "modality":
            return int(bool(sample.pictures))
        case "source":
            return sample.source
