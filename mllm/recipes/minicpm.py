"""MiniCPM-V 2.0 and MiniCPM-Llama3-V 2.5 (arXiv:2408.01800), LLaVA-UHD (arXiv:2403.11703): slices of the picture's own shape.

Each slice and the overview become as many tokens by one layer of attention. MiniCPM-V's three pre-training stages train, with
the language model frozen, the connector, the encoder, then both on slices; their rates and sizes are not certain, and one tiling
serves all stages here, where the report's first looks at 224 and its second at 448 pixels. The last stage prefers
corrected answers (RLHF-V, arXiv:2312.00849) or those that a model judged better (RLAIF-V, arXiv:2405.17220); its batch and what
it trains are not certain.
"""

from dataclasses import replace

from mllm.annotators import ReferenceLogProbs
from mllm.connectors import CrossPool
from mllm.encoders import Encoder
from mllm.joins import Slices
from mllm.lm import CausalLM, Llama
from mllm.objectives import DPO
from mllm.recipe import Cosine, Epochs, Full, Recipe, Source, Stage
from mllm.recipes.llava import CLIP_336, LLAMA_3_8B, VICUNA_13B_V15
from mllm.recipes.shapes import SIGLIP_SO400M
from mllm.vlm import VLM
from pipelines import tiling
from pipelines.chat import Vicuna
from pipelines.corpora import Conversations, Pairs, Preferences, TextOnly
from pipelines.types import Separators

MINICPM_2B = Llama(  # in Llama's form: its constant factors multiplied into weights, the head therefore its own
    vocab_size=122_753, hidden_size=2304, layers=40, heads=36, kv_heads=36, intermediate_size=5760
)


def minicpm_v_20() -> Recipe:
    """SigLIP, up to nine slices of about 448 x 448 pixels, 64 tokens each, MiniCPM-2.4B."""
    connect = Stage(
        name="connect",
        mixture=(Source(corpus=Pairs(name="minicpm-captions")),),
        tune={"connector": Full(lr=1e-4)},  # not certain, nor those below
        context=2048,
        tokens_per_step=500_000,
        max_tiles=20_480,  # patches
    )
    see = replace(connect, name="see", tune={"encoder": Full(lr=1e-4)})
    slices = replace(
        connect,
        name="slices",
        mixture=(Source(corpus=Pairs(name="minicpm-captions")), Source(corpus=Pairs(name="minicpm-ocr"))),
        tune={"encoder": Full(lr=5e-5), "connector": Full(lr=5e-5)},
    )
    rate = Full(lr=1e-5)
    short = replace(
        slices,
        name="sft-short",
        mixture=(Source(corpus=Conversations(name="minicpm-sft-short")),),
        tune={"encoder": rate, "connector": rate, "lm": rate},
    )
    long = replace(
        short,
        name="sft-long",
        mixture=(Source(corpus=Conversations(name="minicpm-sft-long")), Source(corpus=TextOnly(name="minicpm-text"))),
    )
    prefer = replace(
        long,
        name="dpo",
        mixture=(Source(corpus=Preferences(name="rlhf-v")),),
        tune={part: Full(lr=5e-7, weight_decay=0.01) for part in ("encoder", "connector", "lm")},
        context=4096,  # for both answers, each with its slices
        tokens_per_step=65_536,  # about 32 pairs of answers
        max_tiles=40_960,
        duration=Epochs(count=1.0),
        objective=DPO(beta=0.1, changed_weight=3.0),  # the code's; the paper has 5
        schedule=Cosine(warmup=0.05),
        annotators=(ReferenceLogProbs(),),
    )
    return Recipe(
        name="minicpm_v_20",
        paper="arXiv:2408.01800",
        model=VLM(
            encoder=Encoder(
                arch=SIGLIP_SO400M,
                weights="google/siglip-so400m-patch14-384",
                layer=-2,
                normed=True,
                mean=(0.5, 0.5, 0.5),
                std=(0.5, 0.5, 0.5),
            ),
            connector=CrossPool(queries=64),
            lm=CausalLM(
                arch=MINICPM_2B,
                weights="openbmb/MiniCPM-2B-sft-bf16-llama-format",
                chat=Vicuna(),
                bos="<s>",
                eos="</s>",
            ),
            join=Slices(separators=Separators(slice=2, group=2, row=1)),
        ),
        tiling=tiling.Slices(size=448, patch=14, max_tiles=9),
        stages=(connect, see, slices, short, long, prefer),
    )


def minicpm_llama3_v_25() -> Recipe:
    """The same with Llama-3-8B-Instruct and 96 tokens a slice; its answers were preferred as wholes."""
    small = minicpm_v_20()
    *before, prefer = small.stages
    prefer = replace(prefer, mixture=(Source(corpus=Preferences(name="rlaif-v")),), objective=DPO(beta=0.1))
    model = replace(small.model, connector=CrossPool(queries=96), lm=LLAMA_3_8B)
    return replace(small, name="minicpm_llama3_v_25", model=model, stages=(*before, prefer))


def llava_uhd_13b() -> Recipe:
    """CLIP-L/336, up to six slices, 144 tokens each (64 in the paper), a comma between columns and a newline between rows."""
    align = Stage(
        name="align",
        mixture=(Source(corpus=Pairs(name="llava-lcs-558k")),),
        tune={"connector": Full(lr=1e-3)},
        context=2048,
        tokens_per_step=256 * 700,
        max_tiles=10_240,  # patches
    )
    sft = replace(
        align,
        name="sft",
        mixture=(Source(corpus=Conversations(name="llava-mix-665k")), Source(corpus=TextOnly(name="sharegpt-40k"))),
        tune={"connector": Full(lr=2e-5), "lm": Full(lr=2e-5)},
        tokens_per_step=128 * 1100,
    )
    return Recipe(
        name="llava_uhd_13b",
        paper="arXiv:2403.11703",
        model=VLM(
            encoder=CLIP_336,
            connector=CrossPool(queries=144),
            lm=VICUNA_13B_V15,
            join=Slices(separators=Separators(column=1, row=1)),
        ),
        tiling=tiling.Slices(size=336, patch=14, max_tiles=6, rounding="floor"),
        stages=(align, sft),
    )
