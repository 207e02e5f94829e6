"""LWM (arXiv:2402.08268): a Llama-2-7B whose context grows to a million positions, and then sees pictures as codes.

Five stages of books, each of longer ones and with a greater rotary base (3.1); chats of that length; then, with a second
vocabulary of a VQGAN's codes, pictures, videos, and chats about both (4). Packs hold many examples, none of which sees another;
words and codes count half each however many there are. Ranks share a pack by ring attention where it is longer than 32,768.

What is certain: the bases from 128K on, the codes and their marks, the objective. Tokens, batches, rates, the chats' mixture and
the length of pictures' packs are not. Differs from the release: a frame of a video ends as a lone picture does (8193), `<vision>`
and `</vision>` are not written, the order of a picture and its text is the data's, and examples count by their tokens.
"""

from dataclasses import replace

from mllm.annotators import DiscreteCodes
from mllm.connectors import Linear
from mllm.encoders import Blind, Encoder
from mllm.fusion import UnifiedVocabulary
from mllm.lm import CausalLM
from mllm.objectives import TwoVocabularies
from mllm.recipe import FSDP, AdamW, Constant, Cosine, Epochs, Full, Recipe, Source, Stage, Tokens
from mllm.recipes.shapes import VICUNA_7B
from mllm.vlm import VLM
from pipelines.chat import Vicuna
from pipelines.corpora import Conversations, Pairs, TextOnly, Videos
from pipelines.tiling import Resize

K = 1024
LLAMA2_7B = replace(VICUNA_7B, context=K * K)
SHARED = 32 * K
"""Positions that one rank holds of a longer pack."""

CODES = DiscreteCodes(weights="lwm-vqgan", size=256, first=LLAMA2_7B.vocab_size, after=(LLAMA2_7B.vocab_size + 8193,))


def _long(name: str, context: int, theta: float, tokens: float) -> Stage:
    """Books that are about as long as a pack."""
    return Stage(
        name=name,
        mixture=(Source(corpus=TextOnly(name=f"books3-{name}")),),
        tune={"lm": Full(lr=4e-5)},
        context=context,
        tokens_per_step=4 * K * K,
        duration=Tokens(count=int(tokens)),
        optimizer=AdamW(betas=(0.9, 0.95)),
        schedule=Constant(warmup=0.01),
        parallel=FSDP(context=max(1, context // SHARED)),
        rope_theta=theta,
    )


TEXT = (
    _long("32k", 32 * K, 1e6, 4.8e9),
    _long("128k", 128 * K, 1e7, 12e9),
    _long("256k", 256 * K, 1e7, 12e9),
    _long("512k", 512 * K, 2.5e7, 3e9),
    _long("1m", K * K, 5e7, 1.8e9),
)


def lwm_text_7b() -> Recipe:
    """Text alone, 32K to 1M; a tower that sees nothing stands where others have an encoder."""
    return Recipe(
        name="lwm_text_7b",
        paper="arXiv:2402.08268",
        model=VLM(
            encoder=Encoder(arch=Blind(), layer=-1),
            connector=Linear(),
            lm=CausalLM(arch=LLAMA2_7B, weights="meta-llama/Llama-2-7b-hf", chat=Vicuna(), bos="<s>", eos="</s>"),
        ),
        tiling=Resize(size=256),
        stages=TEXT,
    )


def lwm_text_chat_7b() -> Recipe:
    """Chats, seven parts of UltraChat to three of questions about long books, from the million-position model on."""
    base = lwm_text_7b()
    chat = replace(
        TEXT[-1],
        name="chat",
        mixture=(
            Source(corpus=Conversations(name="ultrachat"), weight=0.7),
            Source(corpus=Conversations(name="books3-questions"), weight=0.3),
        ),
        duration=Epochs(),
        rope_theta=None,
    )
    return replace(base, name="lwm_text_chat_7b", stages=(*TEXT, chat))


def lwm_7b() -> Recipe:
    """After the text: pictures in documents of 1K positions, videos in 8K, then chats of 32K, 128K and 1M."""
    base = lwm_text_7b()
    rate = Full(lr=8e-5, weight_decay=0.1)
    pictures = Stage(
        name="images-1k",
        mixture=(
            Source(corpus=Pairs(name="laion-coyo-1b"), weight=0.84),
            Source(corpus=TextOnly(name="openllama-text"), weight=0.16),
        ),
        tune={"lm": rate, "fusion": rate},
        context=8 * K,
        tokens_per_step=8 * K * K,
        duration=Tokens(count=363_000_000_000),
        objective=TwoVocabularies(),
        optimizer=AdamW(betas=(0.9, 0.95)),
        schedule=Cosine(warmup=0.01, floor=0.1),
        annotators=(CODES,),
    )
    videos = replace(
        pictures,
        name="video-8k",
        mixture=(
            Source(corpus=Videos(name="webvid-internvid-13m"), weight=0.42),
            Source(corpus=Pairs(name="laion-coyo-1b"), weight=0.42),
            Source(corpus=TextOnly(name="openllama-text"), weight=0.16),
        ),
        duration=Tokens(count=107_000_000_000),
    )

    def chat(name: str, context: int, tokens: float) -> Stage:
        return replace(
            videos,
            name=name,
            mixture=(
                Source(corpus=Pairs(name="laion-coyo-1b"), weight=0.2),
                Source(corpus=Videos(name="webvid-internvid-13m"), weight=0.2),
                Source(corpus=Conversations(name="sharegpt4v"), weight=0.22),
                Source(corpus=Conversations(name="valley-video-chatgpt"), weight=0.22),
                Source(corpus=TextOnly(name="openllama-text"), weight=0.16),
            ),
            context=context,
            duration=Tokens(count=int(tokens)),
            parallel=FSDP(context=max(1, context // SHARED)),
        )

    chats = (chat("chat-32k", 32 * K, 10e9), chat("chat-128k", 128 * K, 3.5e9), chat("chat-1m", K * K, 0.4e9))
    return replace(
        base,
        name="lwm_7b",
        model=replace(base.model, fusion=UnifiedVocabulary()),
        stages=(*TEXT, pictures, videos, *chats),
    )
