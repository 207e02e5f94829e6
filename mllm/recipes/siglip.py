"""SigLIP (arXiv:2303.15343): the towers of CLIP, each pair judged by itself.

32,768 pairs a step, learned temperature from 10 and bias from -10 (3.2), weight decay 1e-4 and beta2 0.95 (3.3). Deviations:
WebLI is not public, LAION-2B stands for it; AdamW where the paper has ScalingViT's Adafactor.
"""

from mllm.dual import DualTower, Layers, SigLIP
from mllm.objectives import Contrastive
from mllm.recipe import AdamW, Cosine, Epochs, Recipe, Source, Stage
from mllm.recipes.shared import decayed
from pipelines.corpora import Pairs
from pipelines.tiling import Resize

HALF = (0.5, 0.5, 0.5)

B16 = Layers(hidden_size=768, layers=12, heads=12, intermediate_size=3072)
SO400M = Layers(hidden_size=1152, layers=27, heads=16, intermediate_size=4304)


def _recipe(name: str, arch: SigLIP) -> Recipe:
    a_pair = (arch.image // arch.patch) ** 2 + 15
    stage = Stage(
        name="contrast",
        mixture=(Source(corpus=Pairs(name="laion-2b-en")),),
        tune=decayed(("vision", "text", "head"), 1e-3, 1e-4),  # not certain: the rate
        context=64 * a_pair,
        max_tiles=64,
        tokens_per_step=32_768 * a_pair,
        duration=Epochs(count=5),  # not certain: nine billion pairs seen
        objective=Contrastive(loss="sigmoid"),
        optimizer=AdamW(betas=(0.9, 0.95)),
        schedule=Cosine(warmup=0.02),  # not certain
    )
    model = DualTower(arch=arch, tokenizer="google/siglip-base-patch16-224", eos="</s>", mean=HALF, std=HALF)
    return Recipe(
        name=name,
        paper="arXiv:2303.15343",
        model=model,
        tiling=Resize(size=arch.image, mode="squash"),
        stages=(stage,),
    )


def siglip_b16() -> Recipe:
    """SigLIP ViT-B/16 at 224 pixels."""
    return _recipe("siglip_b16", SigLIP(vision=B16, text=B16, patch=16))


def siglip_so400m() -> Recipe:
    """SigLIP SO400M/14 at 384 pixels: 729 patches 1152 wide, the tower of VILA-1.5 and MiniCPM-V."""
    return _recipe("siglip_so400m", SigLIP(vision=SO400M, text=SO400M, patch=14, image=384))
