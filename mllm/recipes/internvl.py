"""InternVL-Chat 1.0 (arXiv:2312.14238), 1.2 and 1.5 (arXiv:2404.16821): InternViT-6B before ever larger language models.

1.0 asks it by QLLaMA, the later ones take 2 x 2 features as one, 1.5 of pictures in up to twelve tiles.

Differs from the release: a model has one share of branches that are left out, where 1.5's second stage has 0.4; and `<img>` and
`</img>` are two learned tokens of the model in place of words of the vocabulary.
"""

from dataclasses import replace

from mllm.connectors import PixelShuffle, QLLaMA
from mllm.encoders import Encoder
from mllm.joins import Tiles
from mllm.lm import CausalLM
from mllm.recipe import Cosine, Full, Recipe, Source, Stage
from mllm.recipes.llava import HERMES_2_YI_34B, VICUNA_13B_V15
from mllm.recipes.shapes import INTERNLM2_20B, INTERNVIT_6B, INTERNVIT_6B_V15
from mllm.vlm import VLM
from pipelines.chat import ChatML
from pipelines.corpora import Conversations, Pairs, TextOnly
from pipelines.tiling import DynamicTiles, Resize
from pipelines.types import Separators

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TAGS = Tiles(separators=Separators(picture=2))


def internvl_10_13b() -> Recipe:
    """InternViT-6B at 224 pixels, QLLaMA's 96 tokens, Vicuna-13B: the supervised stage of 1.0, on four million samples.

    The contrastive and the generative stage before it, of the encoder and QLLaMA alone, are not here: their weights are read.
    Rates and batches are not certain, nor that QLLaMA moves only after its two matrices.
    """
    align = Stage(
        name="align",
        mixture=(Source(corpus=Pairs(name="llava-lcs-558k")),),
        tune={"connector.project.*": Full(lr=1e-3)},
        context=2048,
        tokens_per_step=256 * 160,
    )
    sft = replace(
        align,
        name="sft",
        mixture=(Source(corpus=Conversations(name="internvl-10-sft-4m")),),
        tune={"connector": Full(lr=2e-5), "lm": Full(lr=2e-5)},
        tokens_per_step=128 * 400,
    )
    encoder = Encoder(
        arch=replace(INTERNVIT_6B, image=224), weights="OpenGVLab/InternViT-6B-224px", layer=-1, mean=MEAN, std=STD
    )
    return Recipe(
        name="internvl_10_13b",
        paper="arXiv:2312.14238",
        model=VLM(encoder=encoder, connector=QLLaMA(weights="internvl-14b-qllama"), lm=VICUNA_13B_V15),
        tiling=Resize(size=224, mode="squash"),
        stages=(align, sft),
    )


def internvl_12_40b() -> Recipe:
    """InternViT-6B without its last three layers at 448 pixels, 256 tokens a picture, Nous-Hermes-2-Yi-34B."""
    rate = Full(lr=1e-5, weight_decay=0.05)
    pretrain = Stage(
        name="pretrain",
        mixture=(Source(corpus=Pairs(name="internvl-12-pretrain-39m")),),
        tune={"encoder": rate, "connector": rate},
        context=2048,
        tokens_per_step=700_000,  # not certain
    )
    sft = replace(
        pretrain,
        name="sft",
        mixture=(
            Source(corpus=Conversations(name="internvl-12-sft-1.2m")),
            Source(corpus=TextOnly(name="sharegpt-40k")),
        ),
        tune={"encoder": rate, "connector": rate, "lm": rate},
        tokens_per_step=512 * 700,
    )
    return Recipe(
        name="internvl_12_40b",
        paper="InternVL blog, 2024-02-21",
        model=VLM(
            encoder=Encoder(
                arch=INTERNVIT_6B,
                weights="OpenGVLab/InternViT-6B-448px-V1-2",
                layer=-4,
                drop_path=0.4,
                mean=MEAN,
                std=STD,
            ),
            connector=PixelShuffle(),
            lm=HERMES_2_YI_34B,
            join=TAGS,
        ),
        tiling=Resize(size=448, mode="squash"),
        stages=(pretrain, sft),
    )


def internvl_15_26b() -> Recipe:
    """1 to 12 tiles and a thumbnail, 256 tokens each; InternLM2-Chat-20B."""
    pretrain = Stage(
        name="pretrain",
        mixture=(Source(corpus=Pairs(name="internvl-15-pretrain")),),
        tune={"encoder": Full(lr=1e-5, weight_decay=0.05), "connector": Full(lr=1e-5, weight_decay=0.05)},
        context=4096,
        max_tiles=15,
        tokens_per_step=2048 * 2048,
        schedule=Cosine(warmup=0.01),  # 100 steps
    )
    rate = Full(lr=2e-5, weight_decay=0.05)
    sft = replace(
        pretrain,
        name="sft",
        mixture=(
            Source(corpus=Conversations(name="internvl-15-sft")),
            Source(corpus=TextOnly(name="internvl-15-text")),
        ),
        tune={"encoder": rate, "connector": rate, "lm": rate},
        tokens_per_step=1024 * 2048,
        schedule=Cosine(warmup=0.03),
    )
    return Recipe(
        name="internvl_15_26b",
        paper="arXiv:2404.16821",
        model=VLM(
            encoder=Encoder(
                arch=INTERNVIT_6B_V15,
                weights="OpenGVLab/InternViT-6B-448px-V1-5",
                layer=-1,
                drop_path=0.2,
                mean=MEAN,
                std=STD,
            ),
            connector=PixelShuffle(),
            lm=CausalLM(
                arch=INTERNLM2_20B,
                weights="internlm/internlm2-chat-20b",
                chat=ChatML(),
                bos="<s>",
                eos="<|im_end|>",
            ),
            join=TAGS,
        ),
        tiling=DynamicTiles(size=448, max_tiles=12),
        stages=(pretrain, sft),
    )
