"""Cambrian-1 (arXiv:2406.16860): four towers, a spatial vision aggregator, and samplers inside the language model.

SigLIP, CLIP, DINOv2 and a ConvNeXt at 1,024 pixels; 24 x 24 queries and 24 newlines are 600 tokens. Numbers are those of the
released scripts. Differs from them: towers of 27 x 27 features are resized behind their matrices, not before; padding is seen as
any other part of a picture, where theirs is masked; Llama 3's own words around turns, and the system prompts that Cambrian-7M
puts before short answers, are not here.
"""

from dataclasses import replace

from mllm.connectors import SVA
from mllm.encoders import Encoder, Encoders
from mllm.fusion import InLMSampler
from mllm.lm import CausalLM
from mllm.recipe import Cosine, Full, Recipe, Source, Stage
from mllm.recipes.internvl import MEAN, STD
from mllm.recipes.llava import CLIP_336, HERMES_2_YI_34B, LLAMA_3_8B, VICUNA_13B_V15
from mllm.recipes.shapes import CONVNEXT_XXL, DINOV2_GIANT, SIGLIP_SO400M
from mllm.vlm import VLM
from pipelines.corpora import Conversations, Pairs, TextOnly
from pipelines.tiling import Pad

HALF = (0.5, 0.5, 0.5)
TOWERS = Encoders(
    towers=(
        Encoder(
            arch=SIGLIP_SO400M,
            weights="google/siglip-so400m-patch14-384",
            layer=-1,
            normed=True,
            mean=HALF,
            std=HALF,
        ),
        CLIP_336,
        Encoder(
            arch=DINOV2_GIANT,
            weights="facebook/dinov2-giant",
            layer=-1,
            normed=True,
            interpolate=True,
            mean=MEAN,
            std=STD,
        ),
        Encoder(
            arch=replace(CONVNEXT_XXL, grid=96),
            weights="laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup",
            layer=-1,
        ),
    ),
    sizes=(384, 336, 378, 1024),
)


def _recipe(name: str, lm: CausalLM, samplers: InLMSampler, batch: int, sft: float) -> Recipe:
    align = Stage(
        name="align",
        mixture=(Source(corpus=Pairs(name="cambrian-alignment-2.5m")),),
        tune={
            "connector": Full(lr=1e-3),
            "connector.layers.*": Full(lr=1e-4),  # the aggregator's own layers
            "fusion": Full(lr=1e-4),
        },
        context=2048,
        tokens_per_step=batch * 700,
        max_tiles=3,
        schedule=Cosine(warmup=0.06),
    )
    rate = Full(lr=sft)
    instruct = replace(
        align,
        name="sft",
        mixture=(Source(corpus=Conversations(name="cambrian-7m")), Source(corpus=TextOnly(name="cambrian-7m-text"))),
        tune={"connector": rate, "fusion": rate, "lm": rate},
        tokens_per_step=batch * 900,
        schedule=Cosine(warmup=0.03),
    )
    return Recipe(
        name=name,
        paper="arXiv:2406.16860",
        model=VLM(encoder=TOWERS, connector=SVA(), lm=lm, fusion=samplers),
        tiling=Pad(size=1024),
        stages=(align, instruct),
    )


def cambrian_1_8b() -> Recipe:
    """Llama-3-8B, ten samplers, after every third layer from the first on."""
    return _recipe("cambrian_1_8b", LLAMA_3_8B, InLMSampler(count=10, every=3), 512, 4e-5)


def cambrian_1_13b() -> Recipe:
    """Vicuna-13B, ten samplers, after every fourth layer."""
    return _recipe("cambrian_1_13b", VICUNA_13B_V15, InLMSampler(count=10, every=4), 512, 4e-5)


def cambrian_1_34b() -> Recipe:
    """Hermes-2-Yi-34B, nine samplers, after every seventh layer."""
    return _recipe("cambrian_1_34b", HERMES_2_YI_34B, InLMSampler(count=9, every=7), 1024, 2e-5)
