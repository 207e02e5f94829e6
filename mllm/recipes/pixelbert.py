"""Pixel-BERT (arXiv:2004.00849): BERT over words and the cells of a whole ResNet, of which a hundred are drawn in each step.

COCO and Visual Genome; masked words and matching; 4,096 pairs a step, 40 epochs. These numbers are not certain. Deviations:
pictures are squeezed to 832 x 832 where the paper keeps their aspect, 800 by up to 1,333; the tower has AdamW too, at the
transformer's rate 1e-4, where the paper has SGD at 1e-2; rates fall straight where the paper's fall twice by ten; batch
statistics stay as they were loaded; dropout is BERT's, of which the paper says nothing. The ResNeXt-152 (32 x 8d)
begins from nothing, since `transformers` has no weights of it.
"""

from dataclasses import replace

from mllm.convnets import ResNet, ResNeXt
from mllm.crossmodal import CrossModal, PixelBERT
from mllm.objectives import MaskedTokens, Matching, Sum, Term
from mllm.recipe import Epochs, Linear, Recipe, Source, Stage
from mllm.recipes.shared import decayed
from mllm.recipes.uniter import BERT_BASE, PARTS
from pipelines.corpora import Pairs
from pipelines.tiling import Resize

A_PAIR = 100 + 15


def pixel_bert_r50() -> Recipe:
    """Pixel-BERT with ResNet-50."""
    arch = PixelBERT(shape=BERT_BASE, tower=ResNet(), tower_weights="microsoft/resnet-50", image=832)
    stage = Stage(
        name="pretrain",
        mixture=tuple(Source(corpus=Pairs(name=name)) for name in ("coco-captions", "visual-genome")),
        tune=decayed((*PARTS, "tower"), 1e-4, 5e-4, ("*.bias", "*LayerNorm.weight", "*norm*.weight")),
        context=16 * A_PAIR,
        max_tiles=16,
        tokens_per_step=4096 * A_PAIR,
        duration=Epochs(count=40),
        objective=Sum(terms=(Term(objective=MaskedTokens()), Term(objective=Matching()))),
        schedule=Linear(warmup=0.05),
    )
    model = CrossModal(arch=arch, weights="bert-base-uncased", dropout=0.1, attention_dropout=0.1)
    return Recipe(
        name="pixel_bert_r50",
        paper="arXiv:2004.00849",
        model=model,
        tiling=Resize(size=832, mode="squash"),
        stages=(stage,),
    )


def pixel_bert_x152() -> Recipe:
    """Pixel-BERT with ResNeXt-152."""
    small = pixel_bert_r50()
    assert isinstance(small.model, CrossModal) and isinstance(small.model.arch, PixelBERT)  # noqa: PT018 -- as written above
    arch = replace(small.model.arch, tower=ResNeXt(), tower_weights=None)
    return replace(small, name="pixel_bert_x152", model=replace(small.model, arch=arch))
