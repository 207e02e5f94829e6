"""CoCa (arXiv:2205.01917): one pass gives the contrast of pictures and texts, and the caption.

65,536 pairs a step, 500,000 steps, the caption's loss twice the contrast's, decay 0.01, a fiftieth of warm-up and a straight
way down. Text towers as in table 1. Deviations: JFT-3B and ALIGN are not public, LAION-2B stands for them; AdamW at 8e-4 where
the paper has Adafactor; the second phase at 576 pixels is left away. Not certain: batch, steps, rate and weights of the losses
are remembered.
"""

from mllm.aligned import Aligned, CoCa
from mllm.dual import Layers
from mllm.encoders import Encoder, ViT
from mllm.objectives import Captioning, Contrastive, Sum, Term
from mllm.recipe import AdamW, Linear, Recipe, Source, Stage, Steps
from mllm.recipes.shared import decayed
from pipelines.corpora import Pairs
from pipelines.tiling import Resize


def _coca(name: str, vision: ViT, text: Layers) -> Recipe:
    a_pair = 257 + 20
    stage = Stage(
        name="pretrain",
        mixture=(Source(corpus=Pairs(name="laion-2b-en")),),
        tune=decayed(("vision", "text", "head"), 8e-4, 0.01, ("*.bias", "*norm*.weight", "*temperature")),
        context=64 * a_pair,
        max_tiles=64,
        tokens_per_step=65_536 * a_pair,
        duration=Steps(count=500_000),
        objective=Sum(terms=(Term(objective=Contrastive()), Term(objective=Captioning(), weight=2.0))),
        optimizer=AdamW(betas=(0.9, 0.999)),
        schedule=Linear(warmup=0.02),
    )
    model = Aligned(
        encoder=Encoder(arch=vision, layer=-1, cls="keep", normed=True),
        arch=CoCa(text=text, fusion=12),
        tokenizer="coca-64k",
        bos="<s>",
        eos="</s>",
    )
    return Recipe(name=name, paper="arXiv:2205.01917", model=model, tiling=Resize(size=288), stages=(stage,))


def coca_base() -> Recipe:
    """CoCa-Base: 86 million weights see, 297 million read and write."""
    vision = ViT(hidden_size=768, layers=12, heads=12, intermediate_size=3072, patch=18, image=288)
    return _coca("coca_base", vision, Layers(hidden_size=768, layers=12, heads=12, intermediate_size=3072))


def coca_large() -> Recipe:
    """CoCa-Large: 303 million weights see, 484 million read and write."""
    vision = ViT(hidden_size=1024, layers=24, heads=16, intermediate_size=4096, patch=18, image=288)
    return _coca("coca_large", vision, Layers(hidden_size=1024, layers=12, heads=16, intermediate_size=4096))
