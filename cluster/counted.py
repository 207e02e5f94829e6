"""FLOPs of a stage's packs, counted on its model without memory: what a plan foretells, and what a run's MFU is reckoned from.

A worker counts before its first step, so nothing here takes long to import.
"""

from __future__ import annotations

from mllm.annotators import FrozenFeatures
from mllm.flops import Cost, cost_of
from mllm.model import Model
from mllm.objectives import DPO, Gathered
from mllm.recipe import Recipe, Stage
from mllm.tune import apply_tuning
from mllm.vlm import VLM, VisionLanguageModel


def takes_features(stage: Stage) -> bool:
    """Whether a stage's packs carry the encoder's features."""
    return any(isinstance(annotator, FrozenFeatures) for annotator in stage.annotators)


def unpredicted(recipe: Recipe, stage: Stage) -> str:
    """Why the FLOPs of a stage's packs are not told pack by pack; an empty word where they are."""
    if not isinstance(recipe.model, VLM):
        return f"packs' FLOPs are not told one by one: they are counted for kind 'vlm', and the model is {recipe.model.kind!r}"
    if isinstance(stage.objective, Gathered | DPO):
        return f"FLOPs are not predicted: they are counted for single packs and models, not {stage.objective.kind!r}"
    return ""


def stage_cost(recipe: Recipe, stage: Stage) -> Cost:
    """FLOPs of a stage's packs, as `mllm.flops.cost_of` counts them. Raises ValueError where they are not told pack by pack."""
    if why := unpredicted(recipe, stage):
        raise ValueError(why)
    model = recipe.model.meta()
    apply_tuning(model, stage.tune)
    return model_cost(model, recipe, stage)


def model_cost(model: Model, recipe: Recipe, stage: Stage) -> Cost:
    """The same of the stage's own `model`, a vision-language model without memory, its parts tuned."""
    assert isinstance(model, VisionLanguageModel)
    spec, tiling = recipe.vlm, recipe.tiling_of(stage)
    features = spec.encoder.tokens(tiling.size) if takes_features(stage) else None
    patches = features if isinstance(features, int) else None
    cut = tiling.cut(tiling.size, tiling.size, single=True)
    return cost_of(model, stage.objective, spec.layout(tiling), stage.parallel.recompute, patches, cut)
