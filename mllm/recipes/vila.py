"""VILA (arXiv:2312.07533): align the connector, pre-train on interleaved pages, tune on instructions.

Learning rates, contexts and batch sizes are those of the paper's own scripts: 256 captions, 1,024 documents and 128
conversations a step; warm-up 3 %, cosine, no decay. The visual encoder stays frozen throughout.
"""

from dataclasses import replace

from mllm.connectors import MLP
from mllm.encoders import ClipVision, Encoder
from mllm.lm import CausalLM, Llama
from mllm.recipe import Full, Recipe, Source, Stage
from mllm.vlm import VLM
from pipelines.chat import Vicuna
from pipelines.corpora import Conversations, Interleaved, Pairs, TextOnly
from pipelines.tiling import Pad

CLIP_L_336 = ClipVision(hidden_size=1024, layers=24, heads=16, intermediate_size=4096, patch=14, image=336)
VICUNA_7B = Llama(vocab_size=32_000, hidden_size=4096, layers=32, heads=32, kv_heads=32, intermediate_size=11_008)
VICUNA_13B = Llama(vocab_size=32_000, hidden_size=5120, layers=40, heads=40, kv_heads=40, intermediate_size=13_824)


def vila_7b() -> Recipe:
    """CLIP-L/336, a two-layer MLP and Vicuna-7B."""
    align = Stage(
        name="align",
        mixture=(Source(corpus=Pairs(name="llava-cc3m-595k")),),
        tune={"connector": Full(lr=1e-3)},
        context=2048,
        tokens_per_step=160_000,  # about 256 captions
    )
    pretrain = Stage(
        name="pretrain",
        mixture=(
            Source(corpus=Interleaved(name="mmc4-core", max_images=6)),
            Source(corpus=Pairs(name="coyo-25m")),
        ),
        # The language model must move here: frozen, it stays good at zero-shot but learns nothing in context.
        tune={"connector": Full(lr=5e-5), "lm": Full(lr=5e-5)},
        context=4096,
        tokens_per_step=2_000_000,  # about 1,024 documents
    )
    sft = Stage(
        name="sft",
        mixture=(
            Source(corpus=Conversations(name="vflan-images")),
            Source(corpus=Conversations(name="sharegpt4v")),
            Source(corpus=TextOnly(name="flan-text-1m")),  # text alone, so that text skill survives
        ),
        tune={"connector": Full(lr=2e-5), "lm": Full(lr=2e-5)},
        context=4096,
        tokens_per_step=130_000,  # about 128 conversations
    )
    return Recipe(
        name="vila_7b",
        paper="arXiv:2312.07533",
        model=VLM(
            encoder=Encoder(arch=CLIP_L_336, weights="openai/clip-vit-large-patch14-336", layer=-2),
            connector=MLP(depth=2),
            lm=CausalLM(arch=VICUNA_7B, weights="lmsys/vicuna-7b-v1.5", chat=Vicuna(), bos="<s>", eos="</s>"),
        ),
        tiling=Pad(size=336),
        stages=(align, pretrain, sft),
    )


def vila_13b() -> Recipe:
    """The same with Vicuna-13B."""
    small = vila_7b()
    lm = replace(small.vlm.lm, arch=VICUNA_13B, weights="lmsys/vicuna-13b-v1.5")
    return replace(small, name="vila_13b", model=replace(small.vlm, lm=lm))
