"""VILA's three stages on a laptop: everything from scratch, on the example corpus, in a few minutes on two cores."""

from dataclasses import replace

from mllm.connectors import MLP
from mllm.encoders import ClipVision, Encoder
from mllm.lm import CausalLM, Llama
from mllm.recipe import FSDP, AdamW, Cosine, Full, Recipe, Source, Stage, Steps
from mllm.vlm import VLM
from pipelines.chat import ChatML
from pipelines.corpora import Conversations, Interleaved, Pairs, TextOnly
from pipelines.tiling import Pad

LAPTOP = FSDP(dtype="float32", recompute="none")
BRISK = AdamW(betas=(0.9, 0.95))  # a hundred steps are too few for a memory of a thousand


def vila_smoke() -> Recipe:
    """A 3-million-parameter model trained from scratch on the example corpus.

    Its language model is random until pretrain, so align teaches the connector little but how to speak to it; the mechanics
    are those of the full size.
    """
    align = Stage(
        name="align",
        mixture=(Source(corpus=Pairs(name="example-pairs")),),
        tune={"connector": Full(lr=5e-3)},
        context=512,
        tokens_per_step=2048,
        duration=Steps(count=40),
        optimizer=BRISK,
        schedule=Cosine(warmup=0.1),
        parallel=LAPTOP,
        window=128,
        chunk=8,
        save_every=10,
    )
    pretrain = replace(
        align,
        name="pretrain",
        mixture=(
            Source(corpus=Interleaved(name="example-pages"), weight=0.4),
            Source(corpus=Pairs(name="example-pairs"), weight=0.6),
        ),
        tune={"connector": Full(lr=2e-3), "lm": Full(lr=4e-3)},
        duration=Steps(count=80),
        save_every=20,
    )
    sft = replace(
        pretrain,
        name="sft",
        mixture=(
            Source(corpus=Conversations(name="example-instructions"), weight=0.6),
            Source(corpus=TextOnly(name="example-text"), weight=0.4),  # text alone, so that text skill survives
        ),
        tune={"connector": Full(lr=3e-3), "lm": Full(lr=3e-3)},
        duration=Steps(count=64),
    )
    return Recipe(
        name="vila_smoke",
        model=VLM(
            encoder=Encoder(
                arch=ClipVision(hidden_size=128, layers=4, heads=4, intermediate_size=512, patch=16, image=96), layer=-2
            ),
            connector=MLP(depth=2),
            lm=CausalLM(
                arch=Llama(
                    vocab_size=2048,
                    hidden_size=192,
                    layers=4,
                    heads=4,
                    kv_heads=2,
                    intermediate_size=512,
                    context=2048,
                    init_std=0.06,
                ),
                tokenizer="example-bpe",
                chat=ChatML(),
                bos="<|endoftext|>",
                eos="<|im_end|>",
            ),
        ),
        tiling=Pad(size=96),
        stages=(align, pretrain, sft),
        held_out=(
            Pairs(name="example-pairs-heldout"),
            Interleaved(name="example-pages-heldout"),
            Conversations(name="example-instructions-heldout"),
            TextOnly(name="example-text-heldout"),
        ),
    )
