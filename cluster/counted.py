"""FLOPs of a stage's packs, counted on its model without memory: what a plan foretells, and what a run's MFU is reckoned from.

A worker counts before its first step, so nothing here takes long to import.
"""

from __future__ import annotations

from cluster.fullest import unlike
from mllm.annotators import FrozenFeatures, ReferenceLogProbs
from mllm.archs import T5
from mllm.flops import Cost, cost_of, reference_cost, work_of
from mllm.model import Model
from mllm.objectives import Gathered, NextToken, TwoVocabularies
from mllm.recipe import Recipe, Stage
from mllm.tune import apply_tuning
from mllm.vlm import VLM, VisionLanguageModel
from mllm.whole_flops import fitted_cost
from pipelines.types import Batch


def takes_features(stage: Stage) -> bool:
    """Whether a stage's packs carry the encoder's features."""
    return any(isinstance(annotator, FrozenFeatures) for annotator in stage.annotators)


def as_wholes(recipe: Recipe, stage: Stage) -> bool:
    """Whether FLOPs are counted of packs as wholes, and what a tile and a token cost is told by how those differ.

    A T5 reads documents as rows of a rectangle, so that a pack of a single one and of several are not alike.
    """
    if not isinstance(recipe.model, VLM) or isinstance(recipe.model.lm.arch, T5):
        return True
    return isinstance(stage.objective, Gathered) and not isinstance(stage.objective, TwoVocabularies)


def stage_cost(recipe: Recipe, stage: Stage) -> Cost:
    """FLOPs that those who train spend on a stage's packs, as `mllm.flops.cost_of` counts them, or `mllm.whole_flops`.

    Raises UncountedError where numbers alone would tell them.
    """
    model = recipe.model.meta()
    apply_tuning(model, stage.tune)
    return model_cost(model, recipe, stage)


def model_cost(model: Model, recipe: Recipe, stage: Stage, references: bool = False) -> Cost:
    """The same of the stage's own `model`, one without memory, its parts tuned.

    With `references` a frozen reference's forward on the same packs counts too, where the stage has one: others compute it, and
    it is paid for. It is taken for a model of the same shape. Codes count as words: where there are two vocabularies, the heads
    are a fiftieth of what a 7B model computes.
    """
    if as_wholes(recipe, stage):
        packs = [(work_of(pack), Batch.of(pack)) for pack in unlike(recipe, stage)]
        return fitted_cost(model, stage.objective, packs, stage.parallel.recompute)
    assert isinstance(model, VisionLanguageModel)
    spec, tiling = recipe.vlm, recipe.tiling_of(stage)
    features = spec.encoder.tokens(tiling.size) if takes_features(stage) else None
    patches = features if isinstance(features, int) else None
    cut = tiling.cut(tiling.size, tiling.size, single=True)
    layout = spec.layout(tiling)
    objective = NextToken() if isinstance(stage.objective, TwoVocabularies) else stage.objective
    cost = cost_of(model, objective, layout, stage.parallel.recompute, patches, cut)
    if references and any(isinstance(annotator, ReferenceLogProbs) for annotator in stage.annotators):
        cost += reference_cost(model, layout, patches, cut)
    return cost
