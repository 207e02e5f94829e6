"""OpenFlamingo (arXiv:2308.01390), the trainable form of Flamingo (arXiv:2204.14198), and Otter (arXiv:2305.03726) on top of it.

CLIP-L/224, a perceiver resampler of 64 latents an image and gated cross-attention before every fourth layer of a frozen LLaMA-7B
(the first release's; later ones have MPT, whose ALiBi no decoder here has). Differs from the papers: an image's place holds a
learned mark in place of a new word, pages end with the tokenizer's own end and have no <|endofchunk|>, the resampler's latents
go through one more matrix, and Otter's embeddings stay frozen. Flamingo itself is not here: its NFNet-F6 and Chinchilla are
nobody's, and its batch sizes and schedule come from memory.
"""

from dataclasses import replace

from mllm.connectors import Perceiver
from mllm.encoders import Encoder
from mllm.fusion import CrossAttention
from mllm.lm import CausalLM, Llama
from mllm.recipe import AdamW, Constant, Cosine, Epochs, Full, Recipe, Source, Stage, Tokens
from mllm.recipes.shapes import CLIP_L_224
from mllm.vlm import VLM
from pipelines.chat import Vicuna
from pipelines.corpora import Conversations, Interleaved, Pairs
from pipelines.tiling import Resize

LLAMA_7B = Llama(
    vocab_size=32_000,
    hidden_size=4096,
    layers=32,
    heads=32,
    kv_heads=32,
    intermediate_size=11_008,
    context=2048,
    norm_eps=1e-6,
)


def openflamingo_9b() -> Recipe:
    """Pages of MMC4 at full weight and LAION's pairs at a fifth; the resampler and the gated layers are trained."""
    rate = Full(lr=1e-4, weight_decay=0.1)
    pretrain = Stage(
        name="pretrain",
        mixture=(
            Source(corpus=Interleaved(name="mmc4", max_images=6, min_similarity=0.24), weight=1.0),
            Source(corpus=Pairs(name="laion-2b"), weight=2.0, loss_weight=0.2),  # weight: not certain
        ),
        tune={"connector": rate, "fusion": rate},
        context=2048,
        tokens_per_step=65_536,  # 256 pages of up to 256 tokens; not certain
        max_tiles=64,
        duration=Tokens(count=15_000_000_000),  # not certain
        optimizer=AdamW(betas=(0.9, 0.999)),
        schedule=Constant(warmup=0.008),  # 1,875 steps
    )
    return Recipe(
        name="openflamingo_9b",
        paper="arXiv:2308.01390",
        model=VLM(
            encoder=Encoder(arch=CLIP_L_224, weights="openai/clip-vit-large-patch14", layer=-1),
            connector=Perceiver(),
            lm=CausalLM(arch=LLAMA_7B, weights="huggyllama/llama-7b", chat=Vicuna(), bos="<s>", eos="</s>"),
            fusion=CrossAttention(every=4, everywhere=True),
        ),
        tiling=Resize(size=224),
        stages=(pretrain,),
    )


def otter_9b() -> Recipe:
    """Instructions with examples in their context, from OpenFlamingo's weights: the stage that follows its own."""
    base = openflamingo_9b()
    rate = Full(lr=2e-5)
    sft = replace(
        base.stages[0],
        name="sft",
        mixture=(Source(corpus=Conversations(name="mimic-it")),),
        tune={"connector": rate, "fusion": rate},
        tokens_per_step=16_384,  # 8 examples
        duration=Epochs(count=3.0),
        schedule=Cosine(warmup=0.01),  # not certain
    )
    return replace(base, name="otter_9b", paper="arXiv:2305.03726", stages=(*base.stages, sft))
