"""LLaVA (arXiv:2304.08485), LLaVA-1.5 (arXiv:2310.03744) and LLaVA-NeXT with its video forms: align, then instruct, then prefer.

Learning rates, contexts and batches are those of the released scripts; batches are given in tokens: so many samples times
their usual length.
"""

from dataclasses import replace

from mllm.annotators import ReferenceLogProbs
from mllm.connectors import MLP, Linear, Pool
from mllm.encoders import Encoder
from mllm.joins import Unpad
from mllm.lm import CausalLM
from mllm.objectives import DPO
from mllm.recipe import Epochs, Full, LoRA, Recipe, Source, Stage
from mllm.recipe import Linear as Straight
from mllm.recipes.shapes import (
    CLIP_L_224,
    CLIP_L_336,
    LLAMA3_8B,
    MISTRAL_7B,
    QWEN15_72B,
    QWEN15_110B,
    VICUNA_7B,
    VICUNA_13B,
    YI_34B,
)
from mllm.vlm import VLM
from pipelines.chat import ChatML, Llama3, Mistral, Vicuna
from pipelines.corpora import Conversations, Pairs, Preferences, TextOnly
from pipelines.tiling import AnyRes, Pad, Resize

CLIP_336 = Encoder(arch=CLIP_L_336, weights="openai/clip-vit-large-patch14-336", layer=-2)
VICUNA_7B_V15 = CausalLM(arch=VICUNA_7B, weights="lmsys/vicuna-7b-v1.5", chat=Vicuna(), bos="<s>", eos="</s>")
VICUNA_13B_V15 = CausalLM(arch=VICUNA_13B, weights="lmsys/vicuna-13b-v1.5", chat=Vicuna(), bos="<s>", eos="</s>")
HERMES_2_YI_34B = CausalLM(
    arch=YI_34B, weights="NousResearch/Nous-Hermes-2-Yi-34B", chat=ChatML(), bos=None, eos="<|im_end|>"
)
LLAMA_3_8B = CausalLM(
    arch=LLAMA3_8B,
    weights="meta-llama/Meta-Llama-3-8B-Instruct",
    chat=Llama3(),
    bos="<|begin_of_text|>",
    eos="<|eot_id|>",
)
MISTRAL_7B_V02 = CausalLM(
    arch=MISTRAL_7B, weights="mistralai/Mistral-7B-Instruct-v0.2", chat=Mistral(), bos="<s>", eos="</s>"
)
QWEN = ChatML(system="You are a helpful assistant.")
QWEN_15_72B = CausalLM(arch=QWEN15_72B, weights="Qwen/Qwen1.5-72B-Chat", chat=QWEN, eos="<|im_end|>")
QWEN_15_110B = CausalLM(arch=QWEN15_110B, weights="Qwen/Qwen1.5-110B-Chat", chat=QWEN, eos="<|im_end|>")


def llava_7b() -> Recipe:
    """CLIP-L/224, one matrix and Vicuna-7B. The paper's second stage has batches of 32, the shipped script of 128."""
    align = Stage(
        name="align",
        mixture=(Source(corpus=Pairs(name="llava-cc3m-595k")),),
        tune={"connector": Full(lr=2e-3)},
        context=2048,
        tokens_per_step=40_000,  # about 128 captions
    )
    sft = replace(
        align,
        name="sft",
        mixture=(Source(corpus=Conversations(name="llava-instruct-158k")),),
        tune={"connector": Full(lr=2e-5), "lm": Full(lr=2e-5)},
        tokens_per_step=80_000,  # about 128 conversations; three passes
    )
    lm = replace(VICUNA_7B_V15, weights="lmsys/vicuna-7b-v1.3")
    return Recipe(
        name="llava_7b",
        paper="arXiv:2304.08485",
        model=VLM(
            encoder=Encoder(arch=CLIP_L_224, weights="openai/clip-vit-large-patch14", layer=-2),
            connector=Linear(),
            lm=lm,
        ),
        tiling=Resize(size=224),
        stages=(align, replace(sft, duration=replace(sft.duration, count=3.0))),  # type: ignore[arg-type]  # epochs
    )


def llava_15_7b() -> Recipe:
    """LLaVA-1.5: CLIP-L/336 padded to a square, a two-layer MLP, Vicuna-1.5; text alone is part of the 665 thousand."""
    align = Stage(
        name="align",
        mixture=(Source(corpus=Pairs(name="llava-lcs-558k")),),
        tune={"connector": Full(lr=1e-3)},
        context=2048,
        tokens_per_step=160_000,  # about 256 captions
    )
    sft = replace(
        align,
        name="sft",
        mixture=(Source(corpus=Conversations(name="llava-mix-665k")), Source(corpus=TextOnly(name="sharegpt-40k"))),
        tune={"connector": Full(lr=2e-5), "lm": Full(lr=2e-5)},
        tokens_per_step=130_000,  # about 128 conversations
    )
    return Recipe(
        name="llava_15_7b",
        paper="arXiv:2310.03744",
        model=VLM(encoder=CLIP_336, connector=MLP(depth=2), lm=VICUNA_7B_V15),
        tiling=Pad(size=336),
        stages=(align, sft),
    )


def llava_15_13b() -> Recipe:
    """The same with Vicuna-13B."""
    small = llava_15_7b()
    return replace(small, name="llava_15_13b", model=replace(small.model, lm=VICUNA_13B_V15))


def llava_15_7b_lora() -> Recipe:
    """LLaVA-1.5 whose second stage trains additions of rank 128 to the language model (`finetune_lora.sh`)."""
    whole = llava_15_7b()
    align, sft = whole.stages
    lora = replace(sft, tune={"connector": Full(lr=2e-5), "lm": LoRA(lr=2e-4, rank=128, alpha=256)})
    return replace(whole, name="llava_15_7b_lora", stages=(align, lora))


def llava_next_7b() -> Recipe:
    """LLaVA-NeXT (1.6): tiles of the canvas that suits the picture, without its padding; all is trained, vision slowly."""
    base = llava_15_7b()
    align, sft = base.stages
    align = replace(align, context=4096, tokens_per_step=160_000, max_tiles=10)
    sft = replace(
        sft,
        mixture=(Source(corpus=Conversations(name="llava-next-760k")), Source(corpus=TextOnly(name="sharegpt-40k"))),
        tune={"encoder": Full(lr=2e-6), "connector": Full(lr=2e-5), "lm": Full(lr=2e-5)},  # 2e-5 is not certain
        context=4096,
        max_tiles=20,
        tokens_per_step=330_000,  # about 128 conversations
        grouping="modality",
    )
    return replace(
        base,
        name="llava_next_7b",
        paper="LLaVA-NeXT blog, 2024-01-30",
        model=replace(base.model, join=Unpad()),
        tiling=AnyRes(size=336),
        stages=(align, sft),
    )


def llava_next_13b() -> Recipe:
    """The same with Vicuna-13B."""
    small = llava_next_7b()
    return replace(small, name="llava_next_13b", model=replace(small.model, lm=VICUNA_13B_V15))


def llava_next_34b() -> Recipe:
    """The same with Yi-34B, the language model at half the rate."""
    small = llava_next_7b()
    align, sft = small.stages
    tune = {"encoder": Full(lr=2e-6), "connector": Full(lr=1e-5), "lm": Full(lr=1e-5)}
    stages = (align, replace(sft, tune=tune))
    return replace(small, name="llava_next_34b", model=replace(small.model, lm=HERMES_2_YI_34B), stages=stages)


def llava_next_llama3_8b() -> Recipe:
    """The same with Llama-3-8B (May 2024)."""
    small = llava_next_7b()
    model = replace(small.model, lm=LLAMA_3_8B)
    return replace(small, name="llava_next_llama3_8b", paper="LLaVA-NeXT blog, 2024-05-10", model=model)


def llava_next_mistral_7b() -> Recipe:
    """The same with Mistral-7B-Instruct v0.2, whose turns stand in [INST] and [/INST]."""
    small = llava_next_7b()
    return replace(small, name="llava_next_mistral_7b", model=replace(small.model, lm=MISTRAL_7B_V02))


def llava_next_qwen_72b() -> Recipe:
    """The same with Qwen1.5-72B (May 2024), the language model at half the rate."""
    small = llava_next_34b()
    model = replace(small.model, lm=QWEN_15_72B)
    return replace(small, name="llava_next_qwen_72b", paper="LLaVA-NeXT blog, 2024-05-10", model=model)


def llava_next_qwen_110b() -> Recipe:
    """The same with Qwen1.5-110B."""
    small = llava_next_qwen_72b()
    return replace(small, name="llava_next_qwen_110b", model=replace(small.model, lm=QWEN_15_110B))


def llava_next_video_7b() -> Recipe:
    """LLaVA-NeXT-Video: a third stage on pictures and videos, each tile's 24 x 24 features pooled to 12 x 12 before the MLP.

    Differs from the release: one layout serves all stages, so that pictures are pooled too and keep their padding, and frames
    are tiles one after the other. Its rates are not published: those of LLaVA-NeXT.
    """
    base = llava_next_7b()
    align, sft = base.stages
    video = replace(
        sft,
        name="video",
        mixture=(
            Source(corpus=Conversations(name="llava-video-100k")),
            Source(corpus=Conversations(name="llava-next-760k")),
        ),
    )
    return replace(
        base,
        name="llava_next_video_7b",
        paper="LLaVA-NeXT blog, 2024-04-30",
        model=replace(base.model, connector=Pool(stride=2, before=True), join=llava_15_7b().vlm.join),
        tiling=Pad(size=336),
        stages=(align, sft, video),
    )


def llava_next_video_7b_dpo() -> Recipe:
    """LLaVA-NeXT-Video-DPO: a fourth stage on 17 thousand pairs of answers about videos, compared with the model of the third.

    All is trained, as in the released script, which begins from another model (LongVA-7B). How many GPUs it had, and so its
    batch, is not certain.
    """
    base = llava_next_video_7b()
    rate = Full(lr=5e-7)
    dpo = replace(
        base.stage("video"),
        name="dpo",
        mixture=(Source(corpus=Preferences(name="llava-video-dpo-17k")),),
        tune={"encoder": rate, "connector": rate, "lm": rate},
        tokens_per_step=330_000,  # about 128 pairs of answers to eight frames each
        max_tiles=32,
        duration=Epochs(count=3.0),
        objective=DPO(beta=0.1),
        schedule=Straight(warmup=0.1),
        annotators=(ReferenceLogProbs(),),
    )
    return replace(base, name="llava_next_video_7b_dpo", stages=(*base.stages, dpo))
