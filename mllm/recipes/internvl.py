"""InternVL-Chat 1.0 (arXiv:2312.14238), 1.2 and 1.5 (arXiv:2404.16821): InternViT-6B before ever larger language models.

1.0 asks it by QLLaMA, the later ones take 2 x 2 features as one, 1.5 of pictures in up to twelve tiles. The two stages before any
language model are recipes of their own: `internvl_c` contrasts InternViT with a LLaMA, `internvl_g` gives that LLaMA queries, and
what they are exported to is what the next one calls `internvl-c` and `internvl-g`.

Differs from the release: a model has one share of branches that are left out, where 1.5's second stage has 0.4; and `<img>` and
`</img>` are two learned tokens of the model in place of words of the vocabulary. Of 1.0 the rates, batches and steps are those
remembered, and its pairs were never published.
"""

from dataclasses import replace

from mllm.aligned import Aligned, QLLaMAPairs
from mllm.connectors import PixelShuffle, QLLaMA
from mllm.encoders import Encoder
from mllm.joins import Tiles
from mllm.lm import CausalLM
from mllm.objectives import Captioning, Contrastive, HardMatching, MomentumContrast, Sum, Term
from mllm.recipe import AdamW, Cosine, Full, Recipe, Source, Stage, Steps, Tuning
from mllm.recipes.llava import HERMES_2_YI_34B, VICUNA_13B_V15
from mllm.recipes.shapes import INTERNLM2_20B, INTERNVIT_6B, INTERNVIT_6B_V15
from mllm.vlm import VLM
from pipelines.chat import ChatML
from pipelines.corpora import Conversations, Pairs, TextOnly
from pipelines.tiling import DynamicTiles, Resize
from pipelines.types import Separators

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TAGS = Tiles(separators=Separators(picture=2))


PAIRS = Pairs(name="internvl-pairs-5b")
TEXT = 30
"""Tokens of a caption, about."""
A_PAIR = 257 + TEXT


def _pairs(asks: bool) -> Aligned:
    """InternViT-6B at 224 pixels with a LLaMA of 7B, whose words are those of a multilingual vocabulary."""
    tower = Encoder(arch=replace(INTERNVIT_6B, image=224), layer=-1, cls="keep", mean=MEAN, std=STD)
    llama = "llama-7b-multilingual"
    return Aligned(
        encoder=tower,
        arch=QLLaMAPairs(asks=asks),
        weights="internvl-c" if asks else None,
        begins=None if asks else llama,
        tokenizer=llama,
        bos="<s>",
        eos="</s>",
    )


def internvl_c() -> Recipe:
    """The contrastive stage: InternViT-6B from nothing and a LLaMA, both trained, 164 thousand pairs a step."""
    stage = Stage(
        name="contrast",
        mixture=(Source(corpus=PAIRS),),
        tune={
            "vision": Full(lr=1e-3, weight_decay=0.1),
            "text": Full(lr=1e-4, weight_decay=0.1),
            "head": Full(lr=1e-3, weight_decay=0.1),
            "*temperature": Full(lr=1e-3),
        },
        context=64 * A_PAIR,
        max_tiles=64,
        tokens_per_step=163_840 * A_PAIR,
        duration=Steps(count=175_000),
        objective=Contrastive(),
        optimizer=AdamW(betas=(0.9, 0.95)),
        schedule=Cosine(warmup=0.03),
    )
    return Recipe(
        name="internvl_c",
        paper="arXiv:2312.14238",
        model=_pairs(asks=False),
        tiling=Resize(size=224, mode="squash"),
        stages=(stage,),
    )


def internvl_g() -> Recipe:
    """The generative stage: 96 queries and their cross-attention learn BLIP-2's three tasks; all that was there is frozen."""
    rate = 5e-5
    tune: dict[str, Tuning] = {
        "net.*.queries": Full(lr=rate, weight_decay=0.05),
        "net.middle.layers.*.look.*": Full(lr=rate, weight_decay=0.05),
        "head": Full(lr=rate, weight_decay=0.05),
        "*temperature": Full(lr=rate),
    }
    stage = Stage(
        name="generate",
        mixture=(Source(corpus=Pairs(name="internvl-pairs-1b")),),
        tune=tune,
        context=64 * A_PAIR,
        max_tiles=64,
        tokens_per_step=20_480 * A_PAIR,
        duration=Steps(count=80_000),
        objective=Sum(
            terms=(
                Term(objective=MomentumContrast()),
                Term(objective=HardMatching()),
                Term(objective=Captioning()),
            )
        ),
        optimizer=AdamW(betas=(0.9, 0.98)),
        schedule=Cosine(warmup=0.025),  # 2,000 steps
    )
    return Recipe(
        name="internvl_g",
        paper="arXiv:2312.14238",
        model=_pairs(asks=True),
        tiling=Resize(size=224, mode="squash"),
        stages=(stage,),
    )


def internvl_10_13b() -> Recipe:
    """InternViT-6B at 224 pixels, QLLaMA's 96 tokens, Vicuna-13B: the supervised stage of 1.0, on four million samples.

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
        model=VLM(encoder=encoder, connector=QLLaMA(weights="internvl-g"), lm=VICUNA_13B_V15),
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
