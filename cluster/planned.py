"""A plan as a person reads it: `mllm plan RECIPE`, and what another recipe would change of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cluster import cost
from cluster.amounts import flop_words, quantity
from cluster.compare import differences
from cluster.cost import RunCost, Speed, hours_words
from cluster.doubts import doubts
from cluster.plan import Plan, StagePlan, plan
from cluster.run import open_run
from cluster.site import Site
from cluster.stats import bytes_words
from mllm.recipe import Recipe

SHOWN = (8, 128)
"""Numbers of GPUs for which days are told."""


def speed_of(site: Site, gpu: str, mfu: str, run: str | None) -> Speed:
    """The speed that is meant: a run's own, or a share of a GPU's peak. Raises RunError, ValueError."""
    if run is None:
        return cost.assumed(gpu, cost.shares_of(mfu))
    folder, recipe, _ = open_run(site, run)
    return cost.measured(folder, recipe)


def lines(recipe: Recipe, site: Site, speed: Speed, price: float | None, other: Recipe | None) -> Iterator[str]:
    """The plan; with `other`, in what it differs, and what comes of that."""
    if price is not None and not price >= 0:
        raise ValueError(f"--price {price:g}: give what a GPU-hour costs")
    if other is not None:
        yield from _difference(recipe, other, site, speed, price)
        return
    made = plan(recipe, site)
    yield f"{made.recipe}: {made.tokens_per_image}"
    for stage in made.stages:
        yield from _stage(stage)
    yield ""
    yield from cost.lines(cost.cost(recipe, site, speed, price, made), SHOWN)
    found = doubts(recipe, site.world[1])
    if found:
        yield "\nworth a second look:"
        yield from (f"  {words}" for words in found)
    yield from (f"\nnot here: {why}" for why in made.refused)


def _stage(stage: StagePlan) -> Iterator[str]:
    yield f"\n{stage.name}: {stage.steps}, {stage.packs_per_step} packs a step"
    yield stage.mixture
    yield from (f"  {part.line()}" for part in stage.parts)
    whole = f", {flop_words(stage.total_flops)} in all" if stage.total_flops is not None else ""
    if stage.flops is not None:
        yield f"  {flop_words(stage.flops)} a full step{whole}"
    if stage.unknown:
        yield f"  {stage.unknown}"
    yield f"  {'workers':>10} {'packs each':>11} {'memory a GPU (estimate)':>25}"
    for world, packs in stage.accumulation.items():
        bytes_ = stage.memory.get(world)
        words = ("cannot be" if stage.memory else "not predicted") if bytes_ is None else bytes_words(bytes_)
        yield f"  {world:>10} {packs:>11} {words:>25}"


def _difference(one: Recipe, other: Recipe, site: Site, speed: Speed, price: float | None) -> Iterator[str]:
    found = differences([one, other])
    if not found:
        yield f"{one.name} and {other.name} are the same"
        return
    yield f"{'':<44} {one.name:>28} {other.name:>28}"
    for name, mine, theirs in found:
        yield f"{name:<44} {_short(mine):>28} {_short(theirs):>28}"
    plans = [plan(recipe, site, ()) for recipe in (one, other)]
    costs = [cost.cost(recipe, site, speed, price, made) for recipe, made in zip((one, other), plans, strict=True)]
    yield f"\nwhat comes of it, by {speed.source}:"
    for title, told in NUMBERS:
        mine, theirs = (told(made, run) for made, run in zip(plans, costs, strict=True))
        if mine != theirs:
            yield f"{title:<44} {mine:>28} {theirs:>28}"


def _short(value: str) -> str:
    return value if len(value) <= 28 else f"{value[:25]}..."


def _parameters(made: Plan, _: RunCost) -> str:
    return quantity(sum(part.trained + part.frozen for part in made.stages[-1].parts))


def _trained(made: Plan, _: RunCost) -> str:
    return ", ".join(quantity(sum(part.trained for part in stage.parts)) for stage in made.stages)


def _a_step(made: Plan, _: RunCost) -> str:
    return ", ".join("?" if stage.flops is None else flop_words(stage.flops) for stage in made.stages)


def _steps(made: Plan, _: RunCost) -> str:
    return ", ".join(str(stage.packs_per_step) for stage in made.stages)


def _picture(made: Plan, _: RunCost) -> str:
    return made.tokens_per_image.partition(" ")[0]


def _tokens(_: Plan, run: RunCost) -> str:
    ends = [[stage.shape.tokens[end] for stage in run.stages if stage.shape is not None] for end in (0, 1)]
    return f"{quantity(sum(ends[0]))} to {quantity(sum(ends[1]))}" if ends[0] else "not known"


def _flops(_: Plan, run: RunCost) -> str:
    ends = [[stage.flops[end] for stage in run.stages if stage.flops is not None] for end in (0, 1)]
    return f"{flop_words(sum(ends[0]))} to {flop_words(sum(ends[1]))}" if ends[0] else "not known"


def _hours(_: Plan, run: RunCost) -> str:
    if not run.known:
        return "not known"
    return hours_words(run.hours).removesuffix(" GPU-hours") + ("" if run.whole else " (some stages)")


def _money(_: Plan, run: RunCost) -> str:
    return "" if run.money is None or not run.known else f"{run.money[0]:,.0f} to {run.money[1]:,.0f}"


NUMBERS: tuple[tuple[str, Callable[[Plan, RunCost], str]], ...] = (
    ("parameters", _parameters),
    ("trained, by stage", _trained),
    ("tokens a tile", _picture),
    ("packs a step, by stage", _steps),
    ("FLOPs of a full step, by stage", _a_step),
    ("tokens in all", _tokens),
    ("FLOPs computed in all", _flops),
    ("GPU-hours", _hours),
    ("cost", _money),
)
"""What a difference changes, each with how it is read off a plan."""
