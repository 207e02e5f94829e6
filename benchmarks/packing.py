"""How full packs are, beside the bound that no packer passes, first-fit-decreasing, and padding.

The bound is max(tokens / tokens of a pack, tiles / tiles of a pack) packs, rounded up; "of bound" is bound by packs used.
First-fit-decreasing, by the larger share of the two budgets, is the textbook's packer; padding to the longest of random
batches of eight is what trainers without packing do (it has no second budget). Fair because all three get the same samples,
which the pipeline itself made, window by window; the times are of the assignment alone.

Imbalance is what ranks wait for the slowest: a step's largest number of tiles (or tokens) over the mean, averaged over steps of
one pack for each of eight ranks; in the order that the planner gives packs, and in ten random orders of the same packs.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np

from benchmarks.common import Section, ratios, scratch
from cluster.site import EXAMPLE, load_site
from mllm.recipe import Epochs, Source
from mllm.recipes import by_name
from pipelines.corpora import Conversations, Corpus, Interleaved, Pairs, TextOnly
from pipelines.packing import assign, level
from pipelines.types import Budget
from pipelines.windows import PackWindows

RANKS = 8

Costs = list[tuple[int, int]]
Packer = Callable[[Costs, Budget], list[list[int]]]


def first_fit_decreasing(costs: Costs, budget: Budget) -> list[list[int]]:
    limits = np.array([budget.tokens, budget.tiles], float)
    sizes = np.array(costs, float).reshape(-1, 2) / limits
    room = np.ones((len(sizes), 2))
    groups: list[list[int]] = []
    for i in np.argsort(-sizes.max(axis=1), kind="stable"):
        fits = (sizes[i] <= room[: len(groups)] + 1e-9).all(axis=1)
        place = int(fits.argmax()) if fits.any() else len(groups)
        if place == len(groups):
            groups.append([])
        groups[place].append(int(i))
        room[place] -= sizes[i]
    return groups


def padded_fill(costs: Costs, rng: random.Random) -> float:
    lengths = [tokens for tokens, _ in costs]
    rng.shuffle(lengths)
    batches = [lengths[i : i + 8] for i in range(0, len(lengths), 8)]
    return sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def bound(costs: Costs, budget: Budget) -> int:
    tokens, tiles = (sum(column) for column in zip(*costs, strict=True))
    return max(-(-tokens // budget.tokens), -(-tiles // budget.tiles))


def example_windows(corpora: tuple[Corpus, ...], windows: int, cache: Path) -> tuple[list[Costs], Budget]:
    """Costs of the samples of the first windows, as the smoke recipe's own settings make them."""
    recipe = by_name("vila_smoke")
    stage = replace(recipe.stages[0], mixture=tuple(Source(corpus=corpus) for corpus in corpora), duration=Epochs())
    stream = replace(load_site(str(EXAMPLE)), cache=str(cache)).stream(recipe, stage)
    packs = PackWindows(stream)
    windows = min(windows, stream.order.windows or windows)
    return [[s.cost for s in packs.samples(packs.rows(k))[0]] for k in range(windows)], stream.budget


def synthetic(windows: int) -> tuple[list[Costs], Budget]:
    """Documents of 2 to 6 tiles and 128 to 1238 tokens, evenly: the two budgets run out together."""
    rng = random.Random(0)
    costs = [[(rng.randint(128, 1238), rng.randint(2, 6)) for _ in range(1024)] for _ in range(windows)]
    return costs, Budget(tokens=4096, tiles=24)


def timed(packer: Packer, costs: Costs, budget: Budget) -> tuple[list[list[int]], float]:
    started = time.perf_counter()
    groups = packer(costs, budget)
    return groups, len(costs) / (time.perf_counter() - started)


def imbalance(groups: list[list[int]], costs: Costs, axis: int) -> float:
    """Mean over steps of (most of a rank / mean of the ranks); steps without any cost are left out."""
    loads = [sum(costs[i][axis] for i in group) for group in groups]
    steps = [loads[at : at + RANKS] for at in range(0, len(loads) - RANKS + 1, RANKS)]
    return mean(max(step) * RANKS / sum(step) for step in steps if sum(step))


def balance(section: Section, name: str, many: list[Costs], budget: Budget) -> None:
    rng = random.Random(0)
    for axis, unit in ((1, "tiles"), (0, "tokens")):
        planned: list[float] = []
        shuffled: list[float] = []
        for costs in many:
            groups = assign(costs, budget)
            if len(groups) < RANKS or not any(cost[axis] for cost in costs):
                continue
            planned.append(mean(imbalance(level(groups, costs, rng), costs, axis) for _ in range(10)))
            shuffled.append(mean(imbalance(rng.sample(groups, len(groups)), costs, axis) for _ in range(10)))
        section.add(f"{name}, imbalance of {unit} over {RANKS} ranks", "ratio", planned)
        section.add(f"{name}, imbalance of {unit}, packs in random order", "ratio", shuffled)


def measure(section: Section, quick: bool) -> None:
    windows = 2 if quick else 5
    with scratch() as cache:
        mixes = {
            "captions": example_windows((Pairs(name="example-pairs"),), windows, cache),
            "pages": example_windows((Interleaved(name="example-pages"),), windows, cache),
            "talk and text": example_windows(
                (Conversations(name="example-instructions"), TextOnly(name="example-text")), windows, cache
            ),
            "synthetic": synthetic(windows),
        }
    assign(mixes["synthetic"][0][0], mixes["synthetic"][1])  # first calls are slow
    for name, (many, budget) in mixes.items():
        rng = random.Random(0)
        columns: dict[str, list[float]] = {}
        for costs in many:
            least = bound(costs, budget)
            tokens = sum(cost[0] for cost in costs)
            for label, packer in (("assign", assign), ("first-fit-decreasing", first_fit_decreasing)):
                groups, speed = timed(packer, costs, budget)
                assert sorted(i for group in groups for i in group) == list(range(len(costs)))
                columns.setdefault(f"{label}: fill", []).append(tokens / (len(groups) * budget.tokens))
                columns.setdefault(f"{label}: of bound", []).append(least / len(groups))
                columns.setdefault(f"{label}: speed", []).append(speed)
            columns.setdefault("padding: fill", []).append(padded_fill(costs, rng))
        rows = f"{len(many[0])} samples a window, {budget.tokens} tokens and {budget.tiles} tiles a pack"
        for label, values in columns.items():
            unit = "samples/s" if label.endswith("speed") else "share"
            section.add(f"{name}, {label}", unit, values, rows if label == "assign: fill" else "")
        speeds = ratios(columns["assign: speed"], columns["first-fit-decreasing: speed"])
        section.add(f"{name}, speed of assign / first-fit", "ratio", speeds)
        balance(section, name, many, budget)
    section.facts.append("n counts windows; the range is over them; captions and pages may give a last short window")
