"""Flamingo (arXiv:2204.14198), OpenFlamingo (arXiv:2308.01390), its trainable form, and Otter (arXiv:2305.03726) on top of it.

A perceiver resampler of 64 latents an image and gated cross-attention between the layers of a frozen language model; OpenFlamingo
has CLIP-L/224 and MPT or RedPajama-INCITE. Differs from the papers: an image's place holds a learned mark in place of a new
word, pages end with the tokenizer's own end and have no <|endofchunk|>, the resampler's latents go through one more matrix,
MPT-1B has no norms of queries and keys, and Otter's embeddings stay frozen.

Flamingo's own parts were never published: an NFNet-F6 without its last convolution, and Chinchillas in GPT-NeoX's form, with
LayerNorm and rotary positions for RMSNorm and relative ones. Its batches, shares and steps are not certain; the gated layers have
GELU. Of a video 8 frames are read together, one a second; of a longer one as many from all of it.

Idefics (arXiv:2306.16527) is the Flamingo that transformers has, read from its folders and written as they are: gated layers in
the form of LLaMA's own, norms of queries and keys, and <fake_token_around_image> around each picture, which is never guessed.
"""

from dataclasses import replace

from mllm.archs import MPT, GPTNeoX
from mllm.connectors import Perceiver
from mllm.encoders import Encoder, NFNet
from mllm.fusion import CrossAttention
from mllm.lm import CausalLM
from mllm.recipe import AdamW, Constant, Cosine, Epochs, Full, Linear, Recipe, Source, Stage, Steps, Tokens
from mllm.recipes.shapes import CLIP_H_224, CLIP_L_224, LLAMA_7B
from mllm.vlm import VLM
from pipelines.chat import Vicuna
from pipelines.corpora import Conversations, Interleaved, Obelics, Pairs, TextOnly, Videos
from pipelines.tiling import Resize
from pipelines.types import Frames

MPT_7B = MPT(hidden_size=4096, layers=32, heads=32)
MPT_1B = MPT(vocab_size=50_368, hidden_size=2048, layers=24, heads=16)
REDPAJAMA_3B = GPTNeoX(hidden_size=2560, layers=32, heads=32, intermediate_size=10_240)


def _neox(arch: MPT | GPTNeoX, weights: str) -> CausalLM:
    """With GPT-NeoX's tokenizer, which MPT has too."""
    return CausalLM(arch=arch, weights=weights, chat=Vicuna(), bos=None, eos="<|endoftext|>")


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
            lm=_neox(MPT_7B, "anas-awadalla/mpt-7b"),
            fusion=CrossAttention(every=4, everywhere=True),
        ),
        tiling=Resize(size=224),
        stages=(pretrain,),
    )


def openflamingo_3b() -> Recipe:
    """MPT-1B with gated layers before every one of its own."""
    base = openflamingo_9b()
    model = replace(
        base.model, lm=_neox(MPT_1B, "anas-awadalla/mpt-1b-redpajama-200b"), fusion=CrossAttention(everywhere=True)
    )
    return replace(base, name="openflamingo_3b", model=model)


def openflamingo_4b() -> Recipe:
    """RedPajama-INCITE-3B with gated layers before every second of its own."""
    base = openflamingo_9b()
    lm = _neox(REDPAJAMA_3B, "togethercomputer/RedPajama-INCITE-Base-3B-v1")
    return replace(
        base,
        name="openflamingo_4b",
        model=replace(base.model, lm=lm, fusion=CrossAttention(every=2, everywhere=True)),
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


def _chinchilla(width: int, layers: int) -> GPTNeoX:
    """Heads of 128, a fourfold feed-forward, 32,000 words."""
    return GPTNeoX(
        vocab_size=32_000,
        hidden_size=width,
        layers=layers,
        heads=width // 128,
        intermediate_size=4 * width,
        bias=False,
    )


def _flamingo(name: str, arch: GPTNeoX, every: int) -> Recipe:
    rate = Full(lr=1e-4, weight_decay=0.1)
    pretrain = Stage(
        name="pretrain",
        mixture=(  # shares of rows are not certain; how much each counts is the paper's
            Source(corpus=Interleaved(name="m3w-43m", max_images=5), weight=1.0),
            Source(corpus=Pairs(name="align-1.8b"), weight=1.0, loss_weight=0.2),
            Source(corpus=Pairs(name="ltip-312m"), weight=1.0, loss_weight=0.2),
            Source(corpus=Videos(name="vtp-27m", frames=Frames(count=8, fps=1.0)), weight=1.0, loss_weight=0.03),
        ),
        tune={"connector": rate, "fusion": rate},
        context=2048,
        tokens_per_step=262_144,
        max_tiles=64,
        duration=Steps(count=500_000),
        schedule=Constant(warmup=0.01),  # 5,000 steps
    )
    return Recipe(
        name=name,
        paper="arXiv:2204.14198",
        model=VLM(
            encoder=Encoder(arch=NFNet(), weights="flamingo-nfnet-f6", layer=-1),
            connector=Perceiver(heads=16, head_size=96, frames=8),
            lm=_neox(arch, f"chinchilla-{name}"),
            fusion=CrossAttention(every=every, heads=arch.heads, head_size=128, everywhere=True, visual_width=1536),
        ),
        tiling=Resize(size=320),
        stages=(pretrain,),
    )


def flamingo_3b() -> Recipe:
    """Chinchilla 1.4B with gated layers before every one of its own."""
    return _flamingo("flamingo_3b", _chinchilla(2048, 24), 1)


def flamingo_9b() -> Recipe:
    """Chinchilla 7B with gated layers before every fourth."""
    return _flamingo("flamingo_9b", _chinchilla(4096, 32), 4)


def flamingo_80b() -> Recipe:
    """Chinchilla 70B with gated layers before every seventh."""
    return _flamingo("flamingo_80b", _chinchilla(8192, 80), 7)


def idefics_9b() -> Recipe:
    """CLIP-H, LLaMA-7B and gated layers before every fourth of its own; pages of OBELICS above all."""
    rate = Full(lr=1e-5, weight_decay=0.1)
    pretrain = Stage(
        name="pretrain",
        mixture=(  # shares of tokens as its card has them, as remembered
            Source(corpus=Obelics(name="obelics"), weight=0.7385),
            Source(corpus=Pairs(name="laion-2b-en"), weight=0.1718),
            Source(corpus=TextOnly(name="wikipedia"), weight=0.0615),
            Source(corpus=Pairs(name="pmd"), weight=0.0282),
        ),
        tune={"connector": rate, "fusion": rate},
        context=1024,
        tokens_per_step=1280 * 1024,  # not certain
        max_tiles=32,
        duration=Steps(count=200_000),  # not certain
        optimizer=AdamW(betas=(0.9, 0.999)),
        schedule=Linear(warmup=0.01, floor=0.6),  # 2,000 steps; not certain
    )
    return Recipe(
        name="idefics_9b",
        paper="arXiv:2306.16527",
        model=VLM(
            encoder=Encoder(arch=CLIP_H_224, weights="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", layer=-1, cls="keep"),
            connector=Perceiver(heads=16, head_size=96, activation="relu", qk_norm=True, projected=False),
            lm=CausalLM(arch=LLAMA_7B, weights="huggyllama/llama-7b", chat=Vicuna(), bos="<s>", eos="</s>"),
            fusion=CrossAttention(
                every=4, first=0, heads=32, head_size=128, everywhere=True, block="idefics", qk_norm=True, around=True
            ),
        ),
        tiling=Resize(size=224, mode="squash"),
        stages=(pretrain,),
    )
