"""ViLT (arXiv:2102.03334): patches and words in one ViT-B/32, trained on matching, masked words and word-patch alignment.

4,096 pairs a step, rate 1e-4 with a tenth of warm-up and a straight way down, decay 0.01, 100,000 steps; half of the pairs are
torn, 15 % of words masked whole, alignment 0.1. Deviations: pictures are squeezed to 384 x 384 where ViLT keeps their aspect; it
begins from nothing where ViLT begins from a ViT-B/32 of ImageNet-21k; dropout (0.1 in the released code) is not between the two
matrices of a feed-forward.
"""

from mllm.dual import Layers
from mllm.objectives import MaskedTokens, Matching, Sum, Term
from mllm.recipe import AdamW, Linear, Recipe, Source, Stage, Steps
from mllm.recipes.shared import decayed
from mllm.streams import SingleStream, ViLT
from pipelines.corpora import Pairs
from pipelines.tiling import Resize


def vilt_b32() -> Recipe:
    """ViLT-B/32 on COCO, Visual Genome, SBU and GCC."""
    a_pair = 144 + 15
    stage = Stage(
        name="pretrain",
        mixture=tuple(Source(corpus=Pairs(name=name)) for name in ("coco-captions", "visual-genome", "sbu", "cc3m")),
        tune=decayed(
            ("text", "vision", "layers", "head"), 1e-4, 0.01, ("*.bias", "*norm*.weight", "*LayerNorm.weight")
        ),
        context=32 * a_pair,
        max_tiles=32,
        tokens_per_step=4096 * a_pair,
        duration=Steps(count=100_000),
        objective=Sum(terms=(Term(objective=Matching(alignment=0.1)), Term(objective=MaskedTokens(whole_words=True)))),
        optimizer=AdamW(betas=(0.9, 0.98)),
        schedule=Linear(warmup=0.1),
    )
    arch = ViLT(shape=Layers(hidden_size=768, layers=12, heads=12, intermediate_size=3072))
    model = SingleStream(arch=arch, dropout=0.1, tokenizer="bert-base-uncased")
    return Recipe(
        name="vilt_b32",
        paper="arXiv:2102.03334",
        model=model,
        tiling=Resize(size=384, mode="squash"),
        stages=(stage,),
    )
