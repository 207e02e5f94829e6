"""Mini-Gemini (arXiv:2403.18814): 576 features of CLIP look closer at a ConvNeXt's of the same picture."""

from dataclasses import replace

from mllm.connectors import PatchMining
from mllm.encoders import Encoder, Encoders
from mllm.recipe import Full, Recipe, Source, Stage
from mllm.recipes.llava import CLIP_336, VICUNA_7B_V15
from mllm.recipes.shapes import CONVNEXT_L
from mllm.vlm import VLM
from pipelines.corpora import Conversations, Pairs, TextOnly
from pipelines.tiling import Pad


def mini_gemini_7b() -> Recipe:
    """CLIP-L/336 and CLIP-ConvNeXt-L at 768 pixels, Vicuna-7B. The side of the fine grid, 96, is not certain."""
    align = Stage(
        name="align",
        mixture=(Source(corpus=Pairs(name="mini-gemini-1.2m")),),
        tune={"connector": Full(lr=1e-3)},
        context=2048,
        tokens_per_step=160_000,  # about 256 captions
    )
    sft = replace(
        align,
        name="sft",
        mixture=(Source(corpus=Conversations(name="mini-gemini-1.5m")), Source(corpus=TextOnly(name="sharegpt-40k"))),
        tune={"connector": Full(lr=2e-5), "lm": Full(lr=2e-5)},
        tokens_per_step=130_000,  # about 128 conversations
    )
    fine = Encoder(
        arch=replace(CONVNEXT_L, grid=96),
        weights="laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup",
        layer=-1,
    )
    return Recipe(
        name="mini_gemini_7b",
        paper="arXiv:2403.18814",
        model=VLM(
            encoder=Encoders(towers=(CLIP_336, fine), sizes=(336, 768)), connector=PatchMining(), lm=VICUNA_7B_V15
        ),
        tiling=Pad(size=768),
        stages=(align, sft),
    )
