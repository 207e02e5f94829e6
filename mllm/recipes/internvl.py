"""InternVL-Chat 1.2 and 1.5 (arXiv:2404.16821): InternViT-6B, 2 x 2 features as one, pictures in up to twelve tiles.

Differs from the release: a model has one share of branches that are left out, where 1.5's second stage has 0.4; and `<img>` and
`</img>` are two learned tokens of the model in place of words of the vocabulary.
"""

from dataclasses import replace

from mllm.connectors import PixelShuffle
from mllm.encoders import Encoder
from mllm.joins import Tiles
from mllm.lm import CausalLM
from mllm.recipe import Cosine, Full, Recipe, Source, Stage
from mllm.recipes.llava import HERMES_2_YI_34B
from mllm.recipes.shapes import INTERNLM2_20B, INTERNVIT_6B, INTERNVIT_6B_V15
from mllm.vlm import VLM
from pipelines.chat import ChatML
from pipelines.corpora import Conversations, Pairs, TextOnly
from pipelines.tiling import DynamicTiles, Resize
from pipelines.types import Separators

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TAGS = Tiles(separators=Separators(picture=2))


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
