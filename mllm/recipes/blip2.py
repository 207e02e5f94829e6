"""BLIP-2 (arXiv:2301.12597): a Q-Former between a frozen EVA-CLIP g/14 and a frozen language model, in two stages.

The first has no language model, so it is a recipe of its own; what `mllm export` makes of it is what the second calls
`blip2-stage1`. AdamW with betas (0.9, 0.98), decay 0.05, rate 1e-4 down to 1e-5 by half a cosine; 250,000 steps of 1,680 pairs
after 5,000 of warm-up, then 80,000 of 1,920 (OPT) or 1,520 (Flan-T5) after 2,000. Deviations: T5's encoder gets pictures alone
and its decoder the whole caption, where the paper cuts captions in two; the beginning mark stands before the picture; the
second stage has no dropout, where the Q-Former keeps BERT's there too.
"""

from dataclasses import replace

from mllm.aligned import Aligned, QFormerPairs
from mllm.archs import OPT, T5
from mllm.connectors import QFormer
from mllm.lm import CausalLM
from mllm.objectives import Captioning, HardMatching, MomentumContrast, Sum, Term
from mllm.recipe import AdamW, Cosine, Full, Recipe, Source, Stage, Steps
from mllm.recipes.blip import BERT, EVA_224, STAGE1
from mllm.vlm import VLM
from pipelines.corpora import Pairs
from pipelines.tiling import Resize

TEXT = 15
"""Tokens of a caption, about."""

MIXTURE = tuple(
    Source(corpus=Pairs(name=name)) for name in ("coco-captions", "visual-genome", "cc3m", "cc12m", "sbu", "laion-115m")
)


def blip2_stage1() -> Recipe:
    """Queries learn to see what texts tell of: contrast, hard matching and captions, by three masks in one transformer."""
    rate = 1e-4
    a_pair = 257 + TEXT
    stage = Stage(
        name="represent",
        mixture=MIXTURE,
        tune={
            "text": Full(lr=rate, weight_decay=0.05),
            "head": Full(lr=rate, weight_decay=0.05),
            "net.*.bias": Full(lr=rate),
            "net.*[nN]orm*.weight": Full(lr=rate),
            "encoder.*post_layernorm.*": Full(lr=rate),
            "*temperature": Full(lr=rate),
        },
        context=105 * a_pair,
        max_tiles=105,
        tokens_per_step=1680 * a_pair,
        duration=Steps(count=250_000),
        objective=Sum(
            terms=(
                Term(objective=MomentumContrast(smoothing=0.1)),
                Term(objective=HardMatching()),
                Term(objective=Captioning(smoothing=0.1)),
            )
        ),
        optimizer=AdamW(betas=(0.9, 0.98)),
        schedule=Cosine(warmup=0.02, floor=0.1),
    )
    arch = QFormerPairs(dropout=0.1, attention_dropout=0.1)
    model = Aligned(encoder=EVA_224, arch=arch, begins="bert-base-uncased", tokenizer=BERT)
    return Recipe(name="blip2_stage1", paper="arXiv:2301.12597", model=model, tiling=Resize(size=224), stages=(stage,))


def _stage2(name: str, lm: CausalLM, pairs: int) -> Recipe:
    a_pair = 32 + TEXT
    stage = Stage(
        name="generate",
        mixture=MIXTURE,
        tune={
            "connector": Full(lr=1e-4, weight_decay=0.05),
            "connector.*.bias": Full(lr=1e-4),
            "connector.*[nN]orm*.weight": Full(lr=1e-4),
            "encoder.*post_layernorm.*": Full(lr=1e-4),
        },
        context=40 * a_pair,
        max_tiles=40,
        tokens_per_step=pairs * a_pair,
        duration=Steps(count=80_000),
        optimizer=AdamW(betas=(0.9, 0.98)),
        schedule=Cosine(warmup=0.025, floor=0.1),
    )
    model = VLM(encoder=EVA_224, connector=QFormer(weights=STAGE1), lm=lm)
    return Recipe(name=name, paper="arXiv:2301.12597", model=model, tiling=Resize(size=224), stages=(stage,))


OPT_2_7B = CausalLM(
    arch=OPT(hidden_size=2560, layers=32, heads=32, intermediate_size=10_240),
    weights="facebook/opt-2.7b",
    bos="</s>",
    eos="</s>",
)
OPT_6_7B = replace(
    OPT_2_7B, arch=OPT(hidden_size=4096, layers=32, heads=32, intermediate_size=16_384), weights="facebook/opt-6.7b"
)
FLAN_T5_XL = CausalLM(
    arch=T5(hidden_size=2048, layers=24, heads=32, intermediate_size=5120),
    weights="google/flan-t5-xl",
    bos=None,
    eos="</s>",
)


def blip2_opt_2_7b() -> Recipe:
    """The second stage with OPT-2.7B: 3.7 billion weights, of which 107 million are trained."""
    return _stage2("blip2_opt_2_7b", OPT_2_7B, 1920)


def blip2_opt_6_7b() -> Recipe:
    """The second stage with OPT-6.7B."""
    return _stage2("blip2_opt_6_7b", OPT_6_7B, 1920)


def blip2_flan_t5_xl() -> Recipe:
    """The second stage with Flan-T5-XL, whose encoder reads the queries."""
    return _stage2("blip2_flan_t5_xl", FLAN_T5_XL, 1520)
