"""VILA-1.5 (arXiv:2312.07533's successor, `NVlabs/VILA` scripts v1_5): SigLIP, 2 x 2 features as one, all trained in the end.

Three stages as in VILA and a fourth by preferences, whose data are not certain. Videos are eight frames.
"""

from dataclasses import replace

from mllm.annotators import ReferenceLogProbs
from mllm.connectors import PixelShuffle
from mllm.encoders import Encoder
from mllm.joins import Scales
from mllm.lm import CausalLM
from mllm.objectives import DPO
from mllm.recipe import Epochs, Full, Recipe, Source, Stage
from mllm.recipes.llava import HERMES_2_YI_34B, LLAMA_3_8B, VICUNA_13B_V15
from mllm.recipes.shapes import INTERNVIT_6B_V15, SHEARED_LLAMA_2_7B, SIGLIP_SO400M
from mllm.vlm import VLM
from pipelines.chat import Vicuna
from pipelines.corpora import Conversations, Interleaved, Pairs, Preferences, TextOnly
from pipelines.tiling import MultiScale, Resize

SIGLIP_384 = Encoder(
    arch=SIGLIP_SO400M,
    weights="google/siglip-so400m-patch14-384",
    layer=-2,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


def vila_15_3b() -> Recipe:
    """SigLIP-384, 196 tokens a picture, Sheared-LLaMA-2.7B."""
    align = Stage(
        name="align",
        mixture=(Source(corpus=Pairs(name="llava-cc3m-595k")),),
        tune={"connector": Full(lr=1e-3)},
        context=4096,
        tokens_per_step=500_000,  # about 2,048 captions
    )
    pretrain = replace(
        align,
        name="pretrain",
        mixture=(
            Source(corpus=Interleaved(name="mmc4-core", max_images=6)),
            Source(corpus=Pairs(name="coyo-25m")),
            Source(corpus=Conversations(name="sharegpt4v-pt")),
        ),
        tune={"connector": Full(lr=5e-5), "lm": Full(lr=5e-5)},
        tokens_per_step=1_000_000,  # about 512 documents
        max_tiles=32,
    )
    sft = replace(
        pretrain,
        name="sft",
        mixture=(
            Source(corpus=Conversations(name="vila-15-sft")),
            Source(corpus=TextOnly(name="flan-text-1m")),
        ),
        tune={"encoder": Full(lr=1e-4), "connector": Full(lr=1e-4), "lm": Full(lr=1e-4)},
        tokens_per_step=1_000_000,  # about 1,024 conversations
    )
    dpo = replace(
        sft,
        name="dpo",
        mixture=(Source(corpus=Preferences(name="vila-15-preferences")),),
        tune={"lm": Full(lr=5e-7)},
        tokens_per_step=700_000,  # about 1,024 pairs of answers
        duration=Epochs(count=3.0),
        objective=DPO(beta=0.1),
        annotators=(ReferenceLogProbs(),),  # the model as it was tuned on instructions
    )
    return Recipe(
        name="vila_15_3b",
        paper="arXiv:2312.07533",
        model=VLM(
            encoder=SIGLIP_384,
            connector=PixelShuffle(),
            lm=CausalLM(
                arch=SHEARED_LLAMA_2_7B,
                weights="princeton-nlp/Sheared-LLaMA-2.7B",
                chat=Vicuna(),
                bos="<s>",
                eos="</s>",
            ),
        ),
        tiling=Resize(size=384, mode="squash"),
        stages=(align, pretrain, sft, dpo),
    )


def vila_15_3b_s2() -> Recipe:
    """The same at scales 384 and 768, joined over channels."""
    small = vila_15_3b()
    model = replace(small.model, join=Scales(scales=(1, 2)))
    stages = tuple(replace(stage, max_tiles=5 * stage.max_tiles) for stage in small.stages)
    return replace(small, name="vila_15_3b_s2", model=model, tiling=MultiScale(size=384), stages=stages)


def vila_15_8b() -> Recipe:
    """The same with Llama-3-8B, and twice the documents a step."""
    small = vila_15_3b()
    align, pretrain, *rest = small.stages
    stages = (align, replace(pretrain, tokens_per_step=2_000_000), *rest)
    return replace(small, name="vila_15_8b", model=replace(small.model, lm=LLAMA_3_8B), stages=stages)


def vila_15_13b() -> Recipe:
    """The same with Vicuna-13B."""
    small = vila_15_3b()
    return replace(small, name="vila_15_13b", model=replace(small.model, lm=VICUNA_13B_V15))


def vila_15_40b() -> Recipe:
    """InternViT-6B at 448 pixels, 256 tokens a picture, and Yi-34B; the last stage slower, with decay."""
    small = vila_15_3b()
    align, pretrain, sft, dpo = small.stages
    slow = Full(lr=2e-5, weight_decay=0.05)
    encoder = Encoder(
        arch=INTERNVIT_6B_V15,
        weights="OpenGVLab/InternViT-6B-448px-V1-5",  # which of its versions is not certain
        layer=-2,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    return replace(
        small,
        name="vila_15_40b",
        model=replace(small.model, encoder=encoder, lm=HERMES_2_YI_34B),
        tiling=Resize(size=448, mode="squash"),
        stages=(
            align,
            pretrain,
            replace(sft, tune={"encoder": slow, "connector": slow, "lm": slow}, tokens_per_step=500_000),
            dpo,
        ),
    )
