"""LLaMA-Adapter (arXiv:2303.16199; V2, arXiv:2304.15010): prompts in the upper layers of a frozen LLaMA-7B, gates from zero.

CLIP-L/224 with its CLS, 257 features, become ten visual tokens that are added to the ten prompts of each of the last 31 layers.
Differs from the paper's code: its eight blocks over [queries; features] are a perceiver's here, a picture's place holds a learned
mark, and the biases and scales that V2 adds to every linear layer are not there; its second stage trains the norms alone.
"""

from dataclasses import replace

from mllm.connectors import Perceiver
from mllm.encoders import Encoder
from mllm.fusion import PromptAdapter
from mllm.lm import CausalLM
from mllm.recipe import AdamW, Cosine, Epochs, Full, Recipe, Source, Stage
from mllm.recipes.shapes import CLIP_L_224, LLAMA_7B
from mllm.vlm import VLM
from pipelines.chat import Vicuna
from pipelines.corpora import Conversations, Pairs, TextOnly
from pipelines.tiling import Resize


def llama_adapter_7b() -> Recipe:
    """What sees pictures on pairs, then the norms on instructions. Rates are those of 256 samples a step."""
    sees = Full(lr=1e-4, weight_decay=0.05)
    pairs = Stage(
        name="pairs",
        mixture=(Source(corpus=Pairs(name="coco-captions")), Source(corpus=Pairs(name="laion-400m"))),  # not certain
        tune={"connector": sees, "fusion": sees},
        context=512,
        tokens_per_step=16_384,  # 256 captions
        max_tiles=16,
        duration=Epochs(count=3.0),  # 150 epochs of a fiftieth
        optimizer=AdamW(betas=(0.9, 0.95)),
        schedule=Cosine(warmup=0.033),
    )
    instruct = replace(
        pairs,
        name="instruct",
        mixture=(
            Source(corpus=TextOnly(name="alpaca")),
            Source(corpus=Conversations(name="llava-instruct-158k")),
        ),
        tune={"lm.*norm*": Full(lr=1e-3, weight_decay=0.02)},
        tokens_per_step=65_536,
        duration=Epochs(count=4.0),
        schedule=Cosine(warmup=0.25),
    )
    return Recipe(
        name="llama_adapter_7b",
        paper="arXiv:2303.16199",
        model=VLM(
            encoder=Encoder(
                arch=CLIP_L_224, weights="openai/clip-vit-large-patch14", layer=-1, cls="keep", normed=True
            ),
            connector=Perceiver(queries=10, depth=8, heads=16, head_size=64),
            lm=CausalLM(arch=LLAMA_7B, weights="huggyllama/llama-7b", chat=Vicuna(), bos="<s>", eos="</s>"),
            fusion=PromptAdapter(prompts=10, first=1),
        ),
        tiling=Resize(size=224),
        stages=(pairs, instruct),
    )
