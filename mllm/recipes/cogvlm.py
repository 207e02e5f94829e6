"""CogVLM (arXiv:2311.03079) and CogVLM2 (arXiv:2408.16500): visual experts in every layer of a language model.

EVA2-CLIP-E, a SwiGLU between two learned marks, and weights of their own for image positions, copies of the language model's at
first. Differs from the papers: one size of pictures for all stages (CogVLM's first have 224 pixels), and learning rates, which
the sources at hand do not tell.
"""

from dataclasses import replace

from mllm.connectors import ConvGLU
from mllm.encoders import Encoder
from mllm.fusion import RoutedExperts
from mllm.lm import CausalLM
from mllm.recipe import AdamW, Full, Recipe, Source, Stage, Steps
from mllm.recipes.shapes import EVA_E, LLAMA3_8B, VICUNA_7B
from mllm.vlm import VLM
from pipelines.chat import Llama3, Vicuna
from pipelines.corpora import Conversations, Pairs, Regions
from pipelines.tiling import Resize

EVA_ANY_SIZE = Encoder(arch=EVA_E, weights="eva2-clip-e", layer=-1, interpolate=True)


def cogvlm_17b() -> Recipe:
    """Vicuna-7B, pictures of 490 pixels: 1,225 features and two marks."""
    pairs = Stage(
        name="pairs",
        mixture=(Source(corpus=Pairs(name="laion-2b")), Source(corpus=Pairs(name="coyo-700m"))),
        tune={"connector": Full(lr=1e-4, weight_decay=0.05), "fusion": Full(lr=1e-4, weight_decay=0.05)},  # not certain
        context=4096,
        tokens_per_step=8192 * 1280,
        max_tiles=3,
        duration=Steps(count=120_000),
        optimizer=AdamW(betas=(0.9, 0.95)),
    )
    grounding = replace(
        pairs,
        name="grounding",
        mixture=(*pairs.mixture, Source(corpus=Regions(name="visual-grounding-40m"))),
        tune={"connector": Full(lr=1e-5, weight_decay=0.05), "fusion": Full(lr=1e-5, weight_decay=0.05)},  # not certain
        tokens_per_step=1024 * 1280,
        duration=Steps(count=60_000),
    )
    sft = replace(
        grounding,
        name="sft",
        mixture=(
            Source(corpus=Conversations(name="llava-instruct-158k")),
            Source(corpus=Conversations(name="vqa-instructions")),
        ),
        tune={
            "encoder": Full(lr=1e-6),
            **{part: Full(lr=1e-5, weight_decay=0.05) for part in ("connector", "fusion", "lm")},  # not certain
        },
        tokens_per_step=640 * 1536,
        duration=Steps(count=8000),  # not certain
    )
    return Recipe(
        name="cogvlm_17b",
        paper="arXiv:2311.03079",
        model=VLM(
            encoder=EVA_ANY_SIZE,
            connector=ConvGLU(stride=1, intermediate_size=VICUNA_7B.intermediate_size),
            lm=CausalLM(arch=VICUNA_7B, weights="lmsys/vicuna-7b-v1.5", chat=Vicuna(), bos="<s>", eos="</s>"),
            fusion=RoutedExperts(),
        ),
        tiling=Resize(size=490, mode="squash"),
        stages=(pairs, grounding, sft),
    )


def cogvlm2_19b() -> Recipe:
    """Llama-3-8B, pictures of 1,344 pixels: 9,216 features, a quarter of them after the convolution, and two marks."""
    base = cogvlm_17b()
    model = replace(
        base.model,
        connector=ConvGLU(stride=2, intermediate_size=LLAMA3_8B.intermediate_size),
        lm=CausalLM(
            arch=LLAMA3_8B,
            weights="meta-llama/Meta-Llama-3-8B-Instruct",
            chat=Llama3(),
            bos="<|begin_of_text|>",
            eos="<|end_of_text|>",
        ),
    )
    stages = tuple(replace(stage, context=8192, tokens_per_step=2 * stage.tokens_per_step) for stage in base.stages)
    return replace(
        base,
        name="cogvlm2_19b",
        paper="arXiv:2408.16500",
        model=model,
        tiling=Resize(size=1344, mode="squash"),
        stages=stages,
    )
