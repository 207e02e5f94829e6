"""mPLUG-Owl (arXiv:2304.14178), Shikra (arXiv:2306.15195) and Kosmos-1 (arXiv:2302.14045): CLIP-L/224 before a Llama."""

from dataclasses import replace

from mllm.connectors import Abstractor, Linear, Perceiver
from mllm.encoders import Encoder
from mllm.joins import Tiles
from mllm.lm import CausalLM, Llama
from mllm.recipe import AdamW, Constant, Cosine, Epochs, Full, LoRA, Recipe, Source, Stage, Steps
from mllm.recipes.llava import VICUNA_7B_V15
from mllm.recipes.shapes import CLIP_L_224, VICUNA_7B
from mllm.vlm import VLM
from pipelines.chat import Vicuna
from pipelines.corpora import Conversations, Interleaved, Pairs, Regions, TextOnly
from pipelines.tiling import Resize
from pipelines.types import Separators

CLIP_224 = Encoder(arch=CLIP_L_224, weights="openai/clip-vit-large-patch14", layer=-2)


def mplug_owl_7b() -> Recipe:
    """The encoder and a six-layer abstractor on pairs, then the abstractor and additions to the language model."""
    pretrain = Stage(
        name="pretrain",
        mixture=(
            Source(corpus=Pairs(name="laion-400m")),
            Source(corpus=Pairs(name="coyo-700m")),
            Source(corpus=Pairs(name="cc-coco")),
        ),
        tune={"encoder": Full(lr=1e-4), "connector": Full(lr=1e-4)},  # not certain
        context=2048,
        tokens_per_step=2_100_000,
        max_tiles=32,
        duration=Steps(count=50_000),
        optimizer=AdamW(betas=(0.9, 0.98), eps=1e-6),
    )
    sft = replace(
        pretrain,
        name="sft",
        mixture=(
            Source(corpus=TextOnly(name="alpaca-vicuna-baize")),
            Source(corpus=Conversations(name="llava-instruct-158k")),
        ),
        tune={
            "connector": Full(lr=2e-5, weight_decay=1e-4),
            "lm": LoRA(lr=2e-5, weight_decay=1e-4, rank=8, alpha=32, layers=("q_proj", "v_proj")),
        },
        tokens_per_step=256 * 512,
        duration=Epochs(count=3.0),
        schedule=Cosine(warmup=0.01, floor=0.05),
    )
    lm = CausalLM(arch=VICUNA_7B, weights="huggyllama/llama-7b", chat=Vicuna(), bos="<s>", eos="</s>")
    return Recipe(
        name="mplug_owl_7b",
        paper="arXiv:2304.14178",
        model=VLM(
            encoder=replace(CLIP_224, layer=-1, cls="keep", normed=True),
            connector=Abstractor(),
            lm=lm,
        ),
        tiling=Resize(size=224),
        stages=(pretrain, sft),
    )


def shikra_7b() -> Recipe:
    """One matrix; boxes are digits in the text, and both stages train the language model too."""
    rate = Full(lr=2e-5)
    regions = Stage(
        name="regions",
        mixture=(
            Source(corpus=Regions(name="refcoco")),
            Source(corpus=Regions(name="visual-genome")),
            Source(corpus=Pairs(name="llava-cc3m-595k")),
        ),
        tune={"connector": rate, "lm": rate},
        context=4096,
        tokens_per_step=64 * 512,
        duration=Epochs(count=2.0),  # not certain
    )
    sft = replace(
        regions,
        name="sft",
        mixture=(
            Source(corpus=Conversations(name="llava-instruct-158k"), weight=0.5),
            Source(corpus=Regions(name="shikra-rd"), weight=0.5),
        ),
        duration=Epochs(count=3.0),
    )
    return Recipe(
        name="shikra_7b",
        paper="arXiv:2306.15195",
        model=VLM(encoder=CLIP_224, connector=Linear(), lm=replace(VICUNA_7B_V15, weights="lmsys/vicuna-7b-v1.1")),
        tiling=Resize(size=224, mode="squash"),
        stages=(regions, sft),
    )


KOSMOS = Llama(
    vocab_size=64_007, hidden_size=2048, layers=24, heads=32, kv_heads=32, intermediate_size=8192, context=2048
)


def kosmos_1() -> Recipe:
    """A language model from scratch on text, pairs and pages; of the encoder its last layer that is read learns with it.

    Differs from the paper: the decoder is a Llama in place of Magneto with xPos, and so has a gated feed-forward; shares and
    learning rates are not certain.
    """
    rate = Full(lr=2e-4, weight_decay=0.01)
    pretrain = Stage(
        name="pretrain",
        mixture=(
            Source(corpus=TextOnly(name="pile-cc"), weight=0.5),
            Source(corpus=Pairs(name="laion-coyo"), weight=0.4),
            Source(corpus=Interleaved(name="kosmos-pages", max_images=5), weight=0.1),
        ),
        tune={"encoder.*.layers.22.*": rate, "connector": rate, "lm": rate},
        context=2048,
        tokens_per_step=1_200_000,
        duration=Steps(count=300_000),
        optimizer=AdamW(betas=(0.9, 0.98), eps=1e-6),
        schedule=Constant(warmup=0.001),  # 375 steps; how it falls is not certain
    )
    language = replace(
        pretrain,
        name="instruct",
        mixture=(Source(corpus=TextOnly(name="flan-unnatural")),),
        tune={"lm": Full(lr=2e-5, weight_decay=0.01)},
        tokens_per_step=256 * 1024,
        duration=Steps(count=10_000),
    )
    return Recipe(
        name="kosmos_1",
        paper="arXiv:2302.14045",
        model=VLM(
            encoder=CLIP_224,
            connector=Perceiver(),
            lm=CausalLM(arch=KOSMOS, tokenizer="kosmos-tokenizer", chat=Vicuna(), bos="<s>", eos="</s>"),
            join=Tiles(separators=Separators(picture=2)),
        ),
        tiling=Resize(size=224),
        stages=(pretrain, language),
    )
