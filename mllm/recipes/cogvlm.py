"""CogVLM (arXiv:2311.03079), CogVLM2 (arXiv:2408.16500), CogAgent (arXiv:2312.08914) and GLM-4V (arXiv:2406.12793).

EVA2-CLIP-E, a SwiGLU between two learned marks, and visual experts in every layer of a language model: weights of their own for
image positions, copies of the language model's at first; GLM-4V has none. CogVLM sees pictures of 224 pixels first and of 490 in
the second half of its second stage, which is a stage of its own here. Differs from the papers: CogVLM2 and GLM-4V have one size
for all stages, and learning rates, which the sources at hand do not tell.
"""

from dataclasses import replace

from mllm.archs import GLM
from mllm.connectors import ConvGLU
from mllm.encoders import Encoder, Encoders
from mllm.fusion import RoutedExperts, SideAttention, Splice
from mllm.lm import CausalLM
from mllm.recipe import AdamW, Full, Recipe, Source, Stage, Steps
from mllm.recipes.shapes import EVA02_L, EVA_E, LLAMA3_8B, VICUNA_7B
from mllm.vlm import VLM
from pipelines.chat import ChatML, Llama3, Vicuna
from pipelines.corpora import Conversations, Pairs, Regions
from pipelines.tiling import Resize

EVA_ANY_SIZE = Encoder(arch=EVA_E, weights="eva2-clip-e", layer=-1, interpolate=True)


def cogvlm_17b() -> Recipe:
    """Vicuna-7B, pictures of 224 pixels (256 features and two marks), then of 490 (1,225 and two)."""
    pairs = Stage(
        name="pairs",
        mixture=(Source(corpus=Pairs(name="laion-2b")), Source(corpus=Pairs(name="coyo-700m"))),
        tune={"connector": Full(lr=1e-4, weight_decay=0.05), "fusion": Full(lr=1e-4, weight_decay=0.05)},  # not certain
        context=4096,
        tokens_per_step=8192 * 320,
        max_tiles=15,
        tiling=Resize(size=224, mode="squash"),
        duration=Steps(count=120_000),
        optimizer=AdamW(betas=(0.9, 0.95)),
    )
    grounding = replace(
        pairs,
        name="grounding",
        mixture=(*pairs.mixture, Source(corpus=Regions(name="visual-grounding-40m"))),
        tune={"connector": Full(lr=1e-5, weight_decay=0.05), "fusion": Full(lr=1e-5, weight_decay=0.05)},  # not certain
        tokens_per_step=1024 * 320,
        tiling=None,
        duration=Steps(count=30_000),
    )
    larger = replace(
        grounding,
        name="larger",
        tokens_per_step=1024 * 1280,
        max_tiles=3,
        tiling=Resize(size=490, mode="squash"),
    )
    sft = replace(
        larger,
        name="sft",
        tiling=None,
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
        stages=(pairs, grounding, larger, sft),
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
    pairs, _, larger, sft = base.stages
    pairs = replace(pairs, tokens_per_step=8192 * 1280, max_tiles=3)
    grounding = replace(larger, name="grounding", duration=Steps(count=60_000))
    stages = tuple(
        replace(stage, tiling=None, context=8192, tokens_per_step=2 * stage.tokens_per_step)
        for stage in (pairs, grounding, sft)
    )
    return replace(
        base,
        name="cogvlm2_19b",
        paper="arXiv:2408.16500",
        model=model,
        tiling=Resize(size=1344, mode="squash"),
        stages=stages,
    )


def cogagent_18b() -> Recipe:
    """CogVLM at 224 pixels, and at 1,120 a small tower that every layer looks at: 258 positions and 6,400 features aside.

    Steps, batches and rates of the paper, 4.1, are not certain. The released code has one more table of learned positions
    behind each tower, which begins at zero and is left away here.
    """
    base = cogvlm_17b()
    rate = Full(lr=2e-5, weight_decay=0.05)
    aside = replace(
        base.stages[0],
        name="aside",
        mixture=(
            Source(corpus=Pairs(name="synthetic-text-80m")),
            Source(corpus=Pairs(name="natural-ocr-18m")),
            Source(corpus=Regions(name="visual-grounding-40m")),
            Source(corpus=Regions(name="ccs400k-gui")),
        ),
        tune={"fusion.side": rate},
        tiling=None,
        tokens_per_step=4608 * 512,
        max_tiles=8,
        duration=Steps(count=20_000),
    )
    experts = replace(aside, name="experts", tune={"fusion": rate}, duration=Steps(count=40_000))
    sft = replace(
        aside,
        name="sft",
        mixture=(
            Source(corpus=Conversations(name="gui-instructions")),
            Source(corpus=Conversations(name="vqa-instructions")),
        ),
        tune=dict.fromkeys(("encoder", "connector", "fusion", "lm"), rate),
        tokens_per_step=1024 * 512,
        duration=Steps(count=10_000),
    )
    large = Encoder(arch=replace(EVA02_L, image=1120), weights="eva02-clip-l-1120", layer=-2)
    model = replace(
        base.model,
        encoder=Encoders(towers=(EVA_ANY_SIZE, large), sizes=(224, 1120)),
        fusion=SideAttention(experts=RoutedExperts()),
    )
    return Recipe(
        name="cogagent_18b",
        paper="arXiv:2312.08914",
        model=model,
        tiling=Resize(size=1120, mode="squash"),
        stages=(aside, experts, sft),
    )


GLM4_9B = CausalLM(
    arch=GLM(
        vocab_size=151_552,
        hidden_size=4096,
        layers=40,
        heads=32,
        kv_heads=2,
        head_size=128,
        intermediate_size=13_696,
        context=8192,
    ),
    weights="THUDM/glm-4-9b-chat-hf",
    chat=ChatML(),  # GLM's own template is not among those here
    bos="[gMASK]",
    eos="<|endoftext|>",
)


def glm4v_9b() -> Recipe:
    """GLM-4-9B without experts, pictures of 1,120 pixels: 6,400 features, a quarter of them after the convolution, two marks.

    Trained as CogVLM2, by its report; what is known of that is not certain, nor is the encoder's freezing.
    """
    base = cogvlm2_19b()
    model = replace(
        base.model,
        connector=ConvGLU(stride=2, intermediate_size=13_696, widens=True, divisor=8.0),
        lm=GLM4_9B,
        fusion=Splice(),
    )
    pairs, grounding, sft = base.stages
    rate = Full(lr=1e-5, weight_decay=0.05)  # not certain
    whole = dict.fromkeys(("connector", "lm"), rate)
    stages = (
        replace(pairs, tune={"connector": Full(lr=1e-4, weight_decay=0.05)}),
        replace(grounding, tune=whole),
        replace(sft, tune={"encoder": Full(lr=1e-6), **whole}),
    )
    return replace(
        base,
        name="glm4v_9b",
        paper="arXiv:2406.12793",
        model=model,
        tiling=Resize(size=1120, mode="squash"),
        stages=stages,
    )
