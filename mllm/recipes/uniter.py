"""UNITER (arXiv:1909.11740): BERT over words and regions, one of four tasks in each step.

COCO, Visual Genome, Conceptual Captions and SBU; 36 regions a picture or as many as the detector is surer of than 0.2, from 10 to
100; matching with alignment by optimal transport (0.1), masked words, the features of masked regions and their distribution of
classes, drawn 2 : 2 : 1 : 1; rate 5e-5, 200,000 steps, 10,000 of them warm-up, decay 0.01, gradients of norm 5, 10,240 tokens a
batch on each of 8 GPUs, texts of up to 60 tokens. Deviations: a region's seed alone says
whether it is hidden, where the released code hides at least one; divergence of classes is summed over classes, as the paper has
it, where the released code takes their mean; weights begin at BERT's where they are given. How many GPUs shared a batch is not
certain.
"""

from mllm.crossmodal import UNITER, CrossModal
from mllm.dual import Layers
from mllm.objectives import MaskedRegions, MaskedTokens, Matching, OneOf, Term
from mllm.recipe import AdamW, Linear, Recipe, Source, Stage, Steps
from mllm.recipes.shared import decayed
from pipelines.corpora import Pairs
from pipelines.objects import Objects, RegionRow

BERT_BASE = Layers(hidden_size=768, layers=12, heads=12, intermediate_size=3072)
BERT_LARGE = Layers(hidden_size=1024, layers=24, heads=16, intermediate_size=4096)
PARTS = ("text", "vision", "layers", "head")
FREE = ("*.bias", "*LayerNorm.weight", "*norm.weight")
"""Without weight decay."""

DETECTED = RegionRow(features=2048, classes=1601)
"""Of a Faster R-CNN of Visual Genome; class 0 is background."""


def _recipe(name: str, shape: Layers, weights: str) -> Recipe:
    regions = Objects(row=DETECTED, least=10, most=100, confidence=0.2)
    stage = Stage(
        name="pretrain",
        mixture=tuple(Source(corpus=Pairs(name=name)) for name in ("coco-captions", "visual-genome", "cc3m", "sbu")),
        tune=decayed(PARTS, 5e-5, 0.01, FREE),
        context=10_240,
        max_tiles=10_240,
        tokens_per_step=8 * 10_240,
        duration=Steps(count=200_000),
        objective=OneOf(
            terms=(
                Term(objective=Matching(alignment=0.1), weight=2.0),
                Term(objective=MaskedTokens(), weight=2.0),
                Term(objective=MaskedRegions(targets=("features",)), weight=1.0),
                Term(objective=MaskedRegions(targets=("kl",), first=1), weight=1.0),
            )
        ),
        optimizer=AdamW(betas=(0.9, 0.98), clip=5.0),
        schedule=Linear(warmup=0.05),
    )
    model = CrossModal(
        arch=UNITER(shape=shape, row=DETECTED), weights=weights, mask=103, dropout=0.1, attention_dropout=0.1
    )
    return Recipe(name=name, paper="arXiv:1909.11740", model=model, tiling=regions, stages=(stage,))


def uniter_base() -> Recipe:
    """UNITER on BERT-base (the released code's cased one has another vocabulary; this is the uncased)."""
    return _recipe("uniter_base", BERT_BASE, "bert-base-uncased")


def uniter_large() -> Recipe:
    """UNITER on BERT-large."""
    return _recipe("uniter_large", BERT_LARGE, "bert-large-uncased")
