"""What a run would be, told before it is: mixture, trained parts, memory, steps, accumulation. No GPU, no data is read."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.counted import as_wholes, model_cost, takes_features
from cluster.fullest import fullest
from cluster.memory import Unforetold, memory
from cluster.preflight import refusals, this_machine, untrusted
from cluster.schedule import accumulation, planned_steps
from cluster.site import Site, SiteError
from mllm.flops import Cost, work_of
from mllm.model import Model
from mllm.parts import PartReport
from mllm.recipe import Frozen, Full, Recipe, Stage, Tokens, Tuning
from mllm.tune import apply_tuning, describe
from mllm.whole_flops import UncountedError
from pipelines.types import spec

WORLDS = (1, 2, 4, 8, 16, 64, 128)


@spec
class StagePlan:
    """One stage. `rows` and `windows` are None when its corpora are not on the site; `memory` is the peak bytes a GPU by world
    size, without sizes that cannot be; `flops` are the model's in a step of full packs, which is the most, with those of a
    reference that reads them, and `total_flops` those of all steps where their number is known. `unknown` says why memory or
    FLOPs are not predicted, where they are not; `counted` are a pack's FLOPs by what is in it, and `uncounted` says why they are
    not told, where they are not.
    """

    name: str
    parts: tuple[PartReport, ...]
    mixture: str
    rows: int | None
    steps: str
    packs_per_step: int
    accumulation: dict[int, int]
    memory: dict[int, int]
    flops: float | None
    total_flops: float | None
    unknown: str = ""
    counted: Cost | None = None
    uncounted: str = ""


@spec
class Plan:
    """A recipe on a site. `refused` says why this machine could not train it with the site's workers."""

    recipe: str
    tokens_per_image: str
    stages: tuple[StagePlan, ...]
    refused: tuple[str, ...]


_Costs = dict[tuple[object, ...], Cost]
"""Costs by what they depend on, for stages that are alike."""


def plan(recipe: Recipe, site: Site, worlds: Iterable[int] = WORLDS) -> Plan:
    """Plan `recipe`. Corpora that the site lacks are named, not demanded."""
    layout = recipe.model.layout(recipe.tiling)
    costs: _Costs = {}
    alike = all(_leaves_alone(how) for stage in recipe.stages for how in stage.tune.values())
    shapes = recipe.model.meta() if alike else None
    return Plan(
        recipe=recipe.name,
        tokens_per_image=f"{layout.tokens_per_tile} tokens a tile of {recipe.tiling.size} x {recipe.tiling.size} pixels",
        stages=tuple(_stage(recipe, stage, shapes, site, tuple(worlds), costs) for stage in recipe.stages),
        refused=refusals(recipe, site.world[1], this_machine(site.gpus)) + untrusted(recipe, site, fetch=False),
    )


def _leaves_alone(how: Tuning) -> bool:
    """Whether it changes nothing of a model but what learns, so that another stage can be told of the same."""
    return isinstance(how, Frozen) or (isinstance(how, Full) and not how.first_row)


def _stage(
    recipe: Recipe, stage: Stage, shapes: Model | None, site: Site, worlds: tuple[int, ...], costs: _Costs
) -> StagePlan:
    """One stage. `shapes` are the model's without memory, where stages can share them."""
    model = recipe.model.meta() if shapes is None else shapes
    apply_tuning(model, stage.tune)
    trained = tuple(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    packs = (stage.context, stage.max_tiles, stage.mixture) if as_wholes(recipe, stage) else None
    key = (trained, stage.objective, stage.parallel.recompute, takes_features(stage), recipe.tiling_of(stage), packs)
    foretold, why = _memory(recipe, stage, worlds)
    flops = cost = None
    uncounted = ""
    try:
        cost = costs.get(key) or costs.setdefault(key, model_cost(model, recipe, stage, references=True))
        flops = stage.packs_per_step * cost.model_flops(work_of(fullest(recipe, stage, takes_features(stage))))
    except UncountedError as error:
        uncounted = str(error)
    count = planned_steps(stage)
    rows = None
    try:
        order = site.stream(recipe, stage).order
        rows, mixture = order.rows, order.tree()
    except SiteError:
        mixture = "\n".join(
            f"  {source.corpus.name} ({source.corpus.kind}): not on this site, so its size is unknown"
            for source in stage.mixture
        )
    return StagePlan(
        name=stage.name,
        parts=tuple(describe(model, stage.tune)),
        mixture=mixture,
        rows=rows,
        steps=_steps(stage, rows),
        packs_per_step=stage.packs_per_step,
        accumulation={world: accumulation(stage.packs_per_step, world) for world in worlds},
        memory=foretold,
        flops=flops,
        total_flops=None if count is None or flops is None else count * flops,
        unknown="; ".join(filter(None, (why, uncounted))),
        counted=cost,
        uncounted=uncounted,
    )


def _memory(recipe: Recipe, stage: Stage, worlds: tuple[int, ...]) -> tuple[dict[int, int], str]:
    """Peak bytes by world size, or none and why."""
    try:
        return memory(recipe, stage, worlds), ""
    except Unforetold as error:
        return {}, str(error)


def _steps(stage: Stage, rows: int | None) -> str:
    fixed = planned_steps(stage)
    if fixed is not None:
        return f"{fixed:,} steps"
    if isinstance(stage.duration, Tokens):
        return f"about {stage.duration.count / stage.tokens_per_step:,.0f} steps ({stage.duration.count:,} tokens)"
    count = f"{stage.duration.count:g} epoch{'s' if stage.duration.count != 1 else ''}"
    return f"{count} of {rows:,} rows" if rows is not None else f"{count} of rows that are not on this site"
