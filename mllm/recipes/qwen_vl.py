"""Qwen-VL (arXiv:2308.12966): OpenCLIP's bigG, one layer of attention from 256 queries, Qwen-7B, three stages.

Boxes are words of the text, whole thousandths between `<box>` and `</box>` behind the phrase between `<ref>` and `</ref>`; a
picture stands between two learned marks. The first stage sees pictures of 224 pixels, the others of 448, by stretched positions.
Differs from the paper: the encoder keeps CLIP's CLS while it computes; same-task samples are packed with all others;
`Picture 1:` before one is the data's to write. Batches and rates of the second and third stage are not certain.
"""

from dataclasses import replace

from mllm.archs import Qwen2
from mllm.connectors import CrossPool
from mllm.encoders import Encoder
from mllm.joins import Tiles
from mllm.lm import CausalLM
from mllm.recipe import AdamW, Cosine, Full, Recipe, Source, Stage, Steps
from mllm.recipes.shapes import OPENCLIP_BIGG
from mllm.vlm import VLM
from pipelines.chat import ChatML
from pipelines.corpora import Conversations, Pairs, Regions, TextOnly, Thousandths
from pipelines.tiling import Resize
from pipelines.types import Separators

QWEN_7B = Qwen2(  # the first Qwen has the same layers under other names
    vocab_size=151_936,
    hidden_size=4096,
    layers=32,
    heads=32,
    kv_heads=32,
    intermediate_size=11_008,
    context=2048,
    rope_theta=10_000.0,
)
A_PAIR = 300
"""Positions of a picture and its caption, about."""


def qwen_vl_7b() -> Recipe:
    """Pairs with a frozen language model; seven tasks and text with everything trained; instructions with a frozen encoder."""

    def rates(lr: float, *parts: str) -> dict[str, Full]:
        deep = {"encoder": Full(lr=lr, weight_decay=0.05, layer_decay=0.95)}
        plain = {part: Full(lr=lr, weight_decay=0.05) for part in parts}
        return (deep if "encoder" in parts else {}) | {part: how for part, how in plain.items() if part != "encoder"}

    pairs = Stage(
        name="pairs",
        mixture=(Source(corpus=Pairs(name="qwen-vl-pairs-1.4b")),),
        tune={**rates(2e-4, "encoder", "connector")},
        context=2048,
        max_tiles=8,
        tiling=Resize(size=224, mode="squash"),
        tokens_per_step=30_720 * A_PAIR,
        duration=Steps(count=50_000),
        optimizer=AdamW(betas=(0.9, 0.98), eps=1e-6),
        schedule=Cosine(warmup=0.01, floor=0.005),  # 500 steps, down to 1e-6
    )
    tasks = replace(
        pairs,
        name="tasks",
        mixture=(
            Source(corpus=Pairs(name="qwen-vl-captions-20m")),
            Source(corpus=Conversations(name="qwen-vl-vqa-4m")),
            Source(corpus=Regions(name="qwen-vl-grounding-4m", boxes=Thousandths())),
            Source(corpus=Regions(name="qwen-vl-grounded-captions-9m", boxes=Thousandths())),
            Source(corpus=Pairs(name="qwen-vl-ocr-25m")),
            Source(corpus=TextOnly(name="qwen-text-8m")),
        ),
        tune={**rates(5e-5, "encoder", "connector", "lm")},
        tiling=Resize(size=448, mode="squash"),
        tokens_per_step=4096 * 2048,
        duration=Steps(count=19_000),
        schedule=Cosine(warmup=0.021, floor=0.2),
    )
    sft = replace(
        tasks,
        name="sft",
        mixture=(
            Source(corpus=Conversations(name="qwen-vl-chat-350k")),
            Source(corpus=TextOnly(name="qwen-chat-text")),
        ),
        tune={**rates(1e-5, "connector", "lm")},
        tiling=None,
        tokens_per_step=128 * 2048,
        duration=Steps(count=8000),
        schedule=Cosine(warmup=0.375, floor=0.1),
    )
    return Recipe(
        name="qwen_vl_7b",
        paper="arXiv:2308.12966",
        model=VLM(
            encoder=Encoder(
                arch=OPENCLIP_BIGG,
                weights="laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
                layer=-1,
                interpolate=True,
            ),
            connector=CrossPool(queries=256),
            lm=CausalLM(arch=QWEN_7B, weights="qwen-7b-as-qwen2", chat=ChatML(), eos="<|endoftext|>"),
            join=Tiles(separators=Separators(picture=2)),
        ),
        tiling=Resize(size=448, mode="squash"),
        stages=(pairs, tasks, sft),
    )
