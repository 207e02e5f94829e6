"""What a run would be, told before it is: mixture, trained parts, memory, steps, accumulation. No GPU, no data is read."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.preflight import refusals, this_machine
from cluster.schedule import accumulation, planned_steps
from cluster.site import Site, SiteError
from mllm.recipe import Recipe, Stage, Tokens
from mllm.tune import PartReport, apply_tuning, describe
from mllm.vlm import VLM, VisionLanguageModel
from pipelines.types import spec

WORLDS = (1, 2, 4, 8, 16, 64, 128)


def meta_model(model: VLM) -> VisionLanguageModel:
    """The module without memory: shapes from the recipe, no weights read."""
    return model.meta()


@spec
class StagePlan:
    """One stage. `rows` and `windows` are None when its corpora are not on the site; `memory` is bytes a GPU by world size."""

    name: str
    parts: tuple[PartReport, ...]
    mixture: str
    rows: int | None
    steps: str
    packs_per_step: int
    accumulation: dict[int, int]
    memory: dict[int, int]


@spec
class Plan:
    """A recipe on a site. `refused` says why this machine could not train it with the site's workers."""

    recipe: str
    tokens_per_image: str
    stages: tuple[StagePlan, ...]
    refused: tuple[str, ...]


def plan(recipe: Recipe, site: Site, worlds: Iterable[int] = WORLDS) -> Plan:
    """Plan `recipe`. Corpora that the site lacks are named, not demanded."""
    model = meta_model(recipe.model)
    layout = recipe.model.layout(recipe.tiling)
    return Plan(
        recipe=recipe.name,
        tokens_per_image=f"{layout.tokens_per_tile} tokens a tile of {layout.tile} x {layout.tile} pixels",
        stages=tuple(_stage(recipe, stage, site, model, tuple(worlds)) for stage in recipe.stages),
        refused=refusals(recipe, site.workers, this_machine()),
    )


def _stage(recipe: Recipe, stage: Stage, site: Site, model: VisionLanguageModel, worlds: tuple[int, ...]) -> StagePlan:
    apply_tuning(model, stage.tune)
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
        memory={world: memory(model, stage, world) for world in worlds},
    )


def _steps(stage: Stage, rows: int | None) -> str:
    fixed = planned_steps(stage)
    if fixed is not None:
        return f"{fixed:,} steps"
    if isinstance(stage.duration, Tokens):
        return f"about {stage.duration.count / stage.tokens_per_step:,.0f} steps ({stage.duration.count:,} tokens)"
    count = f"{stage.duration.count:g} epoch{'s' if stage.duration.count != 1 else ''}"
    return f"{count} of {rows:,} rows" if rows is not None else f"{count} of rows that are not on this site"


def memory(model: VisionLanguageModel, stage: Stage, world: int) -> int:
    """An estimate of the peak bytes on each of `world` GPUs.

    Sharded: 4 bytes a parameter, 12 more where it is trained (gradient and Adam's two moments, float32). Whole: the root's
    parameters and the two largest units, in the compute type, and the root's gradients. Activations: the inputs of each
    unit, one unit's insides (34 T D bytes for a decoder layer in bfloat16, arXiv:2205.05198), one chunk of logits.
    """
    item = 2 if stage.parallel.dtype == "bfloat16" else 4
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    units = model.units()
    inside = {id(p) for unit in units for p in unit.parameters()}
    root = [p for p in model.parameters() if id(p) not in inside]
    largest = sorted((sum(p.numel() for p in unit.parameters()) for unit in units), reverse=True)[:2]
    whole = item * (sum(p.numel() for p in root) + sum(largest)) + 4 * sum(p.numel() for p in root if p.requires_grad)
    layer = 17 * item * stage.context * model.lm.width
    kept = len(units) * item * stage.context * model.lm.width
    activations = kept + layer if stage.parallel.recompute == "full" else len(model.lm.units()) * layer
    logits = 2 * 4 * min(2048, stage.context) * model.lm.head.shape[0]
    return (4 * total + 12 * trained) // world + (whole if world > 1 else whole // 2) + activations + logits
