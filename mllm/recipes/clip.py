"""CLIP (arXiv:2103.00020) and OpenCLIP (arXiv:2212.07143): two towers and the contrast of all pairs of a step.

32,768 pairs a step for 32 epochs of 400 million pairs (OpenCLIP H/14: 79,104 of LAION-2B's), AdamW with weight decay 0.2 on all
but gains and biases, warm-up 2,000 steps, cosine to zero. Deviations: CLIP's own pairs were never published, LAION-400M stands
for them; pictures are cut to their middle square where CLIP takes a random one; the scale has no gradient beyond 100, where
CLIP clips its value.
"""

from mllm.dual import CLIP, DualTower, Layers
from mllm.objectives import Contrastive
from mllm.recipe import AdamW, Cosine, Epochs, Recipe, Source, Stage
from mllm.recipes.shared import decayed
from pipelines.corpora import Pairs
from pipelines.tiling import Resize

TEXT = 15
"""Tokens of a caption, about; the towers see no other lengths than those that packs of pictures and captions have."""

B32 = CLIP(
    vision=Layers(hidden_size=768, layers=12, heads=12, intermediate_size=3072),
    text=Layers(hidden_size=512, layers=12, heads=8, intermediate_size=2048),
    projection=512,
    patch=32,
)
B16 = CLIP(vision=B32.vision, text=B32.text, projection=512, patch=16)
L14 = CLIP(
    vision=Layers(hidden_size=1024, layers=24, heads=16, intermediate_size=4096),
    text=Layers(hidden_size=768, layers=12, heads=12, intermediate_size=3072),
    projection=768,
    patch=14,
)
H14 = CLIP(
    vision=Layers(hidden_size=1280, layers=32, heads=16, intermediate_size=5120),
    text=Layers(hidden_size=1024, layers=24, heads=16, intermediate_size=4096),
    projection=1024,
    patch=14,
    activation="gelu",
)


def _recipe(
    name: str,
    arch: CLIP,
    lr: float,
    corpus: str,
    pairs: int,
    epochs: float,
    of: int,
    paper: str = "arXiv:2103.00020",
) -> Recipe:
    a_pair = (arch.image // arch.patch) ** 2 + TEXT
    stage = Stage(
        name="contrast",
        mixture=(Source(corpus=Pairs(name=corpus)),),
        tune=decayed(("vision", "text", "head"), lr, 0.2, ("*.bias", "*norm*.weight", "*logit_scale")),
        context=128 * a_pair,
        max_tiles=128,
        tokens_per_step=pairs * a_pair,
        duration=Epochs(count=epochs),
        objective=Contrastive(),
        optimizer=AdamW(betas=(0.9, 0.98), eps=1e-6),
        schedule=Cosine(warmup=2000 / (epochs * of / pairs)),
    )
    model = DualTower(arch=arch, tokenizer="openai/clip-vit-base-patch32", bos="<|startoftext|>", eos="<|endoftext|>")
    return Recipe(name=name, paper=paper, model=model, tiling=Resize(size=arch.image), stages=(stage,))


def clip_b32() -> Recipe:
    """CLIP ViT-B/32: two towers from scratch, 151 million weights."""
    return _recipe("clip_b32", B32, 5e-4, "laion-400m", 32_768, 32, 400_000_000)


def clip_b16() -> Recipe:
    """CLIP ViT-B/16."""
    return _recipe("clip_b16", B16, 5e-4, "laion-400m", 32_768, 32, 400_000_000)


def clip_l14() -> Recipe:
    """CLIP ViT-L/14."""
    return _recipe("clip_l14", L14, 4e-4, "laion-400m", 32_768, 32, 400_000_000)


def openclip_h14() -> Recipe:
    """OpenCLIP ViT-H/14 on LAION-2B, 986 million weights."""
    # not certain: rate, batch and 16 epochs (32 billion samples) are those of the model card as remembered
    return _recipe("openclip_h14", H14, 5e-4, "laion-2b-en", 79_104, 16, 2_000_000_000, "arXiv:2212.07143")
