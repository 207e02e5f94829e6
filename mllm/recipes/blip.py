"""What was built on BLIP-2's Q-Former: MiniGPT-4 (arXiv:2304.10592), InstructBLIP (arXiv:2305.06500), BLIVA (arXiv:2308.09936).

EVA-CLIP g/14 at 224 pixels with CLS, 257 features. The Q-Former's weights are BLIP-2's own; InstructBLIP's, which reads the
instruction, begins from an export of `blip2_stage1`. Differs from the papers: BLIVA's first stage has the Q-Former's tokens in
the sequence, and its Q-Former does not read the instruction; no Q-Former has dropout, where InstructBLIP's and BLIVA's have.
"""

from dataclasses import replace

from mllm.connectors import Branches, InstructedQFormer, Linear, QFormer
from mllm.encoders import Encoder
from mllm.instructed import Instructions
from mllm.lm import CausalLM
from mllm.recipe import AdamW, Cosine, Epochs, Full, Recipe, Source, Stage, Steps
from mllm.recipes.llava import VICUNA_7B_V15
from mllm.recipes.shapes import EVA_G
from mllm.vlm import VLM
from pipelines.corpora import Conversations, Pairs
from pipelines.order import BySize
from pipelines.tiling import Resize

BLIP2 = "Salesforce/blip2-opt-2.7b"
STAGE1 = "blip2-stage1"
"""What `blip2_stage1` was exported to."""

BERT = "bert-base-uncased-blip"
"""BERT's tokenizer with [DEC] and [ENC] behind its words."""

EVA_224 = Encoder(arch=EVA_G, weights="eva-clip-g-39", layer=-1, cls="keep", normed=True)
VICUNA_V0 = replace(VICUNA_7B_V15, weights="vicuna-7b-v0")
VICUNA_V11 = replace(VICUNA_7B_V15, weights="lmsys/vicuna-7b-v1.1")


def _model(connector: QFormer | InstructedQFormer | Branches, lm: CausalLM) -> VLM:
    return VLM(encoder=EVA_224, connector=connector, lm=lm)


def minigpt4_7b() -> Recipe:
    """Only one matrix is trained, behind a frozen Q-Former: on noisy pairs, then on 3,500 careful descriptions."""
    align = Stage(
        name="align",
        mixture=(
            Source(corpus=Pairs(name="laion-115m"), weight=115.0),
            Source(corpus=Pairs(name="cc-sbu-14m"), weight=14.0),
        ),
        tune={"connector.project.*": Full(lr=1e-4, weight_decay=0.05)},
        context=1024,
        tokens_per_step=20_480,  # 256 captions
        max_tiles=32,
        duration=Steps(count=20_000),
        schedule=Cosine(warmup=0.25, floor=0.8),
    )
    sft = replace(
        align,
        name="sft",
        mixture=(Source(corpus=Conversations(name="cc-sbu-align")),),
        tune={"connector.project.*": Full(lr=3e-5, weight_decay=0.05)},
        tokens_per_step=2048,  # 12 conversations of up to 160 tokens
        duration=Steps(count=1000),
        schedule=Cosine(warmup=0.2, floor=0.33),
    )
    return Recipe(
        name="minigpt4_7b",
        paper="arXiv:2304.10592",
        model=_model(QFormer(weights=BLIP2), VICUNA_V0),
        tiling=Resize(size=224, mode="squash"),
        stages=(align, sft),
    )


def instructblip_7b() -> Recipe:
    """A Q-Former that reads the instruction, on 26 data sets, each drawn by the root of its size. Batches are not certain."""
    sft = Stage(
        name="sft",
        mixture=tuple(
            Source(corpus=Conversations(name=f"instructblip-{name}"))
            for name in ("caption", "vqa", "ocr-vqa", "dialog", "llava-150k")
        ),
        tune={"connector": Full(lr=1e-5, weight_decay=0.05)},
        context=2048,
        tokens_per_step=20_480,  # 128 conversations
        max_tiles=64,
        duration=Steps(count=60_000),
        schedule=Cosine(warmup=0.017),
        sampling=BySize(power=0.5),
        annotators=(Instructions(tokenizer=BERT, of=VICUNA_V11.text_codec, chat=VICUNA_V11.chat),),
    )
    return Recipe(
        name="instructblip_7b",
        paper="arXiv:2305.06500",
        model=_model(InstructedQFormer(former=QFormer(weights=STAGE1)), VICUNA_V11),
        tiling=Resize(size=224, mode="squash"),
        stages=(sft,),
    )


def bliva_7b() -> Recipe:
    """The Q-Former's 32 tokens and then all 257 features through a matrix: 289."""
    align = Stage(
        name="align",
        mixture=(Source(corpus=Pairs(name="llava-lcs-558k")),),
        tune={"connector.parts.1.*": Full(lr=1e-5, weight_decay=0.05)},
        context=2048,
        tokens_per_step=22_000,  # 64 captions
        max_tiles=16,
        duration=Epochs(count=3.0),
        schedule=Cosine(warmup=0.038),
    )
    sft = replace(
        align,
        name="sft",
        mixture=tuple(
            Source(corpus=Conversations(name=f"bliva-{name}")) for name in ("caption", "vqa", "ocr-vqa", "llava-150k")
        ),
        tune={"connector": Full(lr=1e-5, weight_decay=0.05)},
        duration=Steps(count=200_000),
        schedule=Cosine(warmup=0.005),
        sampling=BySize(power=0.5),
        optimizer=AdamW(betas=(0.9, 0.999)),
    )
    return Recipe(
        name="bliva_7b",
        paper="arXiv:2308.09936",
        model=_model(Branches(parts=(QFormer(weights=BLIP2), Linear())), VICUNA_V11),
        tiling=Resize(size=224, mode="squash"),
        stages=(align, sft),
    )
