"""EVA-CLIP (arXiv:2303.15389): CLIP whose vision tower begins from EVA's masked pictures; the contrast of all pairs of a step.

Rates of their own for both towers, less for each layer before the last (0.85 and 0.75), decay 0.05, warm-up 2,000 steps.
Deviations: AdamW where EVA-CLIP has LAMB; all patches are seen where it leaves out half; the text tower begins from nothing
where it begins from OpenCLIP's; pictures are the middle square.
"""

from mllm.dual import DualTower, EvaCLIP, Layers
from mllm.encoders import Eva02, EvaClip
from mllm.objectives import Contrastive
from mllm.recipe import AdamW, Cosine, Epochs, Full, Recipe, Source, Stage
from pipelines.corpora import Pairs
from pipelines.tiling import Resize

TEXT = Layers(hidden_size=768, layers=12, heads=12, intermediate_size=3072)
G14 = EvaClip(hidden_size=1408, layers=40, heads=16, intermediate_size=6144)
L14 = Eva02(hidden_size=1024, layers=24, heads=16, intermediate_size=2730, image=224, grid=16)


def _recipe(name: str, arch: EvaCLIP, lr: float, text_lr: float, corpus: str, pairs: int, seen: int, of: int) -> Recipe:
    a_pair = (arch.image // arch.patch) ** 2 + 15
    vision = Full(lr=lr, layer_decay=0.85)
    text = Full(lr=text_lr, layer_decay=0.75)
    stage = Stage(
        name="contrast",
        mixture=(Source(corpus=Pairs(name=corpus)),),
        tune={
            "vision": Full(lr=lr, layer_decay=0.85, weight_decay=0.05),
            "text": Full(lr=text_lr, layer_decay=0.75, weight_decay=0.05),
            "head": Full(lr=text_lr, weight_decay=0.05),
            "towers.vision_model.*layers.*bias": vision,
            "towers.vision_model.*layers.*norm*.weight": vision,
            "towers.text_model.*layers.*bias": text,
            "towers.text_model.*layers.*norm*.weight": text,
            "towers.logit_scal[e]": Full(lr=text_lr),
        },
        context=64 * a_pair,
        max_tiles=64,
        tokens_per_step=pairs * a_pair,
        duration=Epochs(count=seen / of),
        objective=Contrastive(),
        optimizer=AdamW(betas=(0.9, 0.98), eps=1e-6),
        schedule=Cosine(warmup=2000 / (seen / pairs)),
    )
    model = DualTower(arch=arch, tokenizer="openai/clip-vit-base-patch32", bos="<|startoftext|>", eos="<|endoftext|>")
    return Recipe(name=name, paper="arXiv:2303.15389", model=model, tiling=Resize(size=arch.image), stages=(stage,))


def eva_clip_g14() -> Recipe:
    """EVA-CLIP g/14: all 40 layers of EVA, 1.1 billion weights, 11 billion pairs of LAION-400M."""
    # not certain: both rates and the batch, as the model card is remembered
    arch = EvaCLIP(vision=G14, text=TEXT, projection=1024, begins="eva-g14")
    return _recipe("eva_clip_g14", arch, 2e-4, 2e-5, "laion-400m", 40_960, 11_000_000_000, 400_000_000)


def eva02_clip_l14() -> Recipe:
    """EVA-02-CLIP L/14: 428 million weights, 4 billion pairs of Merged-2B."""
    # not certain: both rates and the batch, as the model card is remembered
    arch = EvaCLIP(vision=L14, text=TEXT, projection=768, begins="eva02-l14")
    return _recipe("eva02_clip_l14", arch, 4e-4, 4e-5, "merged-2b", 131_072, 4_000_000_000, 2_000_000_000)
