"""LLaVA-NeXT-Interleave (arXiv:2407.07895): several pictures, videos and views of a scene as pictures between words.

SigLIP-384, a two-layer MLP and Qwen1.5: 729 tokens a picture. Goes on from a model of single pictures, which is the second stage
here. Differs from the release: single pictures are not cut into tiles, since one layout serves all stages; how often pictures
stand in front of the words in place of between them is not told, so rows stay as they come; rates and batches are not certain.
"""

from dataclasses import replace

from mllm.connectors import MLP
from mllm.lm import CausalLM
from mllm.recipe import Full, Recipe, Source, Stage
from mllm.recipes.llava import QWEN
from mllm.recipes.shapes import QWEN15_0_5B, QWEN15_7B, QWEN15_14B
from mllm.recipes.vila15 import SIGLIP_384
from mllm.vlm import VLM
from pipelines.corpora import Conversations, Pairs, TextOnly
from pipelines.tiling import Resize


def llava_next_interleave_7b() -> Recipe:
    """Qwen1.5-7B: align, one picture, then many."""
    align = Stage(
        name="align",
        mixture=(Source(corpus=Pairs(name="llava-lcs-558k")),),
        tune={"connector": Full(lr=1e-3)},
        context=4096,
        tokens_per_step=200_000,  # about 256 captions
    )
    tune = {"encoder": Full(lr=2e-6), "connector": Full(lr=1e-5), "lm": Full(lr=1e-5)}
    single = replace(
        align,
        name="single",
        mixture=(Source(corpus=Conversations(name="llava-next-760k")), Source(corpus=TextOnly(name="sharegpt-40k"))),
        tune=tune,
        context=8192,
        tokens_per_step=130_000,  # about 128 conversations
    )
    interleave = replace(
        single,
        name="interleave",
        mixture=(Source(corpus=Conversations(name="m4-instruct-1.2m")),),
        context=16_384,
        max_tiles=24,
        tokens_per_step=500_000,  # about 128 conversations
    )
    return Recipe(
        name="llava_next_interleave_7b",
        paper="arXiv:2407.07895",
        model=VLM(
            encoder=SIGLIP_384,
            connector=MLP(depth=2),
            lm=CausalLM(arch=QWEN15_7B, weights="Qwen/Qwen1.5-7B-Chat", chat=QWEN, eos="<|im_end|>"),
        ),
        tiling=Resize(size=384, mode="squash"),
        stages=(align, single, interleave),
    )


def llava_next_interleave_0_5b() -> Recipe:
    """The same with Qwen1.5-0.5B."""
    small = llava_next_interleave_7b()
    lm = replace(small.vlm.lm, arch=QWEN15_0_5B, weights="Qwen/Qwen1.5-0.5B-Chat")
    return replace(small, name="llava_next_interleave_0_5b", model=replace(small.vlm, lm=lm))


def llava_next_interleave_14b() -> Recipe:
    """The same with Qwen1.5-14B."""
    small = llava_next_interleave_7b()
    lm = replace(small.vlm.lm, arch=QWEN15_14B, weights="Qwen/Qwen1.5-14B-Chat")
    return replace(small, name="llava_next_interleave_14b", model=replace(small.vlm, lm=lm))
