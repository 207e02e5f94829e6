"""FLOPs of a stage's packs, counted on its model without memory: what a plan foretells, and what a run's MFU is reckoned from.

A worker counts before its first step, so nothing here takes long to import.
"""

from __future__ import annotations

from mllm.annotators import FrozenFeatures, ReferenceLogProbs
from mllm.flops import Cost, cost_of, reference_cost
from mllm.model import Model
from mllm.objectives import Gathered, TwoVocabularies
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
    if isinstance(stage.objective, TwoVocabularies):
        return f"FLOPs are not predicted: they are counted for packs of one vocabulary, not {stage.objective.kind!r}"
    if isinstance(stage.objective, Gathered):
        return f"packs' FLOPs are not told one by one: {stage.objective.kind!r} compares the packs of a step"
    return ""


def at_once(recipe: Recipe, stage: Stage) -> bool:
    """Whether FLOPs are counted for a full pack as a whole, since what is in it does not tell them."""
    return not isinstance(recipe.model, VLM) or (
        isinstance(stage.objective, Gathered) and not isinstance(stage.objective, TwoVocabularies)
    )


def stage_cost(recipe: Recipe, stage: Stage) -> Cost:
    """FLOPs that those who train spend on a stage's packs, as `mllm.flops.cost_of` counts them.

    Raises ValueError where they are not told pack by pack.
    """
    if why := unpredicted(recipe, stage):
        raise ValueError(why)
    model = recipe.model.meta()
    apply_tuning(model, stage.tune)
    return model_cost(model, recipe, stage)


def model_cost(model: Model, recipe: Recipe, stage: Stage, references: bool = False) -> Cost:
    """The same of the stage's own `model`, a vision-language model without memory, its parts tuned.

    With `references` a frozen reference's forward on the same packs counts too, where the stage has one: others compute it, and
    it is paid for. It is taken for a model of the same shape.
    """
    assert isinstance(model, VisionLanguageModel)
    spec, tiling = recipe.vlm, recipe.tiling_of(stage)
    features = spec.encoder.tokens(tiling.size) if takes_features(stage) else None
    patches = features if isinstance(features, int) else None
    cut = tiling.cut(tiling.size, tiling.size, single=True)
    layout = spec.layout(tiling)
    cost = cost_of(model, stage.objective, layout, stage.parallel.recompute, patches, cut)
    if references and any(isinstance(annotator, ReferenceLogProbs) for annotator in stage.annotators):
        cost += reference_cost(model, layout, patches, cut)
    return cost
