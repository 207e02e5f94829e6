"""MAE (arXiv:2111.06377) and BEiT (arXiv:2106.08254): pictures alone, by what is masked in them.

MAE: 4,096 pictures a step, 800 epochs, 40 of them warm-up, rate 1.5e-4 for each 256 pictures, decay 0.05, 75 % masked, normalised
pixels. BEiT on ImageNet-1k: 2,048 pictures, 800 epochs, 10 of them warm-up, rate 1.5e-3, decay 0.05, 75 of 196 patches in blocks.
Deviations: pictures are the middle square, no random crops; BEiT's codes are those of Chameleon's VQ encoder (8,192 as well),
since `transformers` has not DALL-E's dVAE.
"""

from mllm.dual import Layers
from mllm.masked import MAE, BEiT, Codebook, MaskedImage
from mllm.objectives import MaskedCodes, MaskedPixels
from mllm.recipe import AdamW, Cosine, Epochs, Recipe, Source, Stage
from mllm.recipes.shared import decayed
from pipelines.corpora import Labelled
from pipelines.tiling import Resize

B16 = Layers(hidden_size=768, layers=12, heads=12, intermediate_size=3072)
L16 = Layers(hidden_size=1024, layers=24, heads=16, intermediate_size=4096)
LIGHT = Layers(hidden_size=512, layers=8, heads=16, intermediate_size=2048)


def _recipe(name: str, paper: str, model: MaskedImage, stage: Stage) -> Recipe:
    return Recipe(name=name, paper=paper, model=model, tiling=Resize(size=model.arch.image), stages=(stage,))


def _mae(name: str, encoder: Layers) -> Recipe:
    stage = Stage(
        name="pretrain",
        mixture=(Source(corpus=Labelled(name="imagenet-1k")),),
        tune=decayed(("encoder", "decoder"), 1.5e-4 * 4096 / 256, 0.05),
        context=64 * 196 + 1,
        max_tiles=64,
        tokens_per_step=64 * (64 * 196 + 1),
        duration=Epochs(count=800),
        objective=MaskedPixels(),
        optimizer=AdamW(betas=(0.9, 0.95)),
        schedule=Cosine(warmup=40 / 800),
    )
    return _recipe(name, "arXiv:2111.06377", MaskedImage(arch=MAE(encoder=encoder, decoder=LIGHT)), stage)


def mae_b16() -> Recipe:
    """MAE with a ViT-B/16 encoder."""
    return _mae("mae_b16", B16)


def mae_l16() -> Recipe:
    """MAE with a ViT-L/16 encoder."""
    return _mae("mae_l16", L16)


def beit_b16() -> Recipe:
    """BEiT ViT-B/16 on ImageNet-1k."""
    stage = Stage(
        name="pretrain",
        mixture=(Source(corpus=Labelled(name="imagenet-1k")),),
        tune=decayed(("encoder",), 1.5e-3, 0.05, ("net.*.bias", "net.*norm*.weight")),
        context=64 * 196 + 1,
        max_tiles=64,
        tokens_per_step=32 * (64 * 196 + 1),
        duration=Epochs(count=800),
        objective=MaskedCodes(),
        optimizer=AdamW(betas=(0.9, 0.999), clip=3.0),
        schedule=Cosine(warmup=10 / 800),
    )
    arch = BEiT(encoder=B16, codebook=Codebook(weights="chameleon-vqgan"), drop_path=0.1)
    model = MaskedImage(arch=arch, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return _recipe("beit_b16", "arXiv:2106.08254", model, stage)
