"""Samples of a window -> groups within two budgets, tokens and tiles, in an order that keeps ranks level."""

from __future__ import annotations

import random
from typing import Literal

import numpy as np

from pipelines.types import Budget, Sample

Grouping = Literal["mixed", "modality", "source"]
"""Which samples may share a pack: any; those with pictures or those without (LLaVA's grouping); those of one source."""

NEIGHBOURS = 8
"""Packs of like cost that stay side by side: the deal hands neighbours to different ranks at the same moment."""


def assign(costs: list[tuple[int, int]], budget: Budget) -> list[list[int]]:
    """Groups of indices, each within `budget`; every index in exactly one group.

    Bin-centric L2 rule: one pack is open at a time and takes the sample whose (tokens, tiles), as shares of the budget,
    come nearest to the room that is left. Where both budgets are scarce it comes within a few hundredths of the bound and
    first-fit-decreasing does not; where only tokens are, the two are alike (`benchmarks/packing.py`). O(n²) in vectorised
    steps: tens of milliseconds for a window of 1024.
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
    waiting = np.ones(len(sizes), bool)
    groups: list[list[int]] = []
    while waiting.any():
        room = np.ones(2)
        groups.append([])
        while True:
            fits = waiting & (sizes <= room + 1e-9).all(axis=1)
            if not fits.any():
                break
            distance = np.where(fits, ((room - sizes) ** 2).sum(axis=1), np.inf)
            chosen = int(distance.argmin())
            groups[-1].append(chosen)
            waiting[chosen] = False
            room -= sizes[chosen]
    return groups


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
