"""CROME (arXiv:2408.06610): a Q-Former and a matrix beside it, and a gated adapter before a frozen Vicuna or Flan-T5.

EVA-CLIP g/14 at 224 pixels, the last layer but one. The Q-Former's 32 tokens take the adapter's text branch and the 257 features
of the matrix its visual one. Differs from the paper: the Q-Former does not read the instruction, pictures are not cropped and
flipped at random, and the adapter's width is not told; 256 gives the 5 million parameters that are.
"""

from dataclasses import replace

from mllm.connectors import Branches, Linear, QFormer
from mllm.encoders import Encoder
from mllm.fusion import PreLMAdapter
from mllm.lm import CausalLM
from mllm.recipe import Cosine, Epochs, Full, Recipe, Source, Stage, Steps
from mllm.recipes.llava import VICUNA_7B_V15
from mllm.recipes.shapes import EVA_G, FLAN_T5_XXL, VICUNA_13B
from mllm.vlm import VLM
from pipelines.chat import Plain
from pipelines.corpora import Conversations, Pairs
from pipelines.order import BySize
from pipelines.tiling import Resize


def crome_7b() -> Recipe:
    """Projections and adapter on pairs; the Q-Former too on instructions; the adapter alone, 5 million parameters, for a task."""
    rate = Full(lr=1e-5, weight_decay=0.05)
    warm = Cosine(warmup=0.01)  # 1,000 steps
    pretrain = Stage(
        name="pretrain",
        mixture=(Source(corpus=Pairs(name="llava-lcs-558k")),),
        tune={"connector.parts.0.project.*": rate, "connector.parts.1.*": rate, "fusion": rate},
        context=2048,
        tokens_per_step=10_240,  # 32 captions
        max_tiles=16,
        duration=Epochs(count=5.0),
        schedule=warm,
    )
    instruct = replace(
        pretrain,
        name="instruct",
        mixture=(
            Source(corpus=Conversations(name="llava-mix-665k")),
            Source(corpus=Conversations(name="lvis-instruct4v")),
            Source(corpus=Conversations(name="lamm")),
            Source(corpus=Pairs(name="flickr30k")),
            Source(corpus=Pairs(name="sharegpt4v")),
        ),
        tune={"connector": rate, "fusion": rate},
        tokens_per_step=8192,  # 16 conversations
        duration=Steps(count=2_000_000),
        schedule=Cosine(warmup=0.0005),
        sampling=BySize(power=0.5),
    )
    task = replace(
        instruct,
        name="task",
        mixture=(Source(corpus=Conversations(name="science-qa")),),
        tune={"fusion": rate},
        duration=Epochs(count=1.0),  # not certain
        schedule=warm,
        sampling=None,
    )
    return Recipe(
        name="crome_7b",
        paper="arXiv:2408.06610",
        model=VLM(
            encoder=Encoder(arch=EVA_G, weights="eva-clip-g-39", layer=-2, cls="keep"),
            connector=Branches(parts=(QFormer(weights="Salesforce/instructblip-vicuna-7b"), Linear())),
            lm=VICUNA_7B_V15,
            fusion=PreLMAdapter(hidden=256, text="queries", queries=32),
        ),
        tiling=Resize(size=224, mode="squash"),
        stages=(pretrain, instruct, task),
    )


def crome_13b() -> Recipe:
    """The same before Vicuna-13B."""
    small = crome_7b()
    lm = replace(small.vlm.lm, arch=VICUNA_13B, weights="lmsys/vicuna-13b-v1.5")
    return replace(small, name="crome_13b", model=replace(small.vlm, lm=lm))


def crome_flan_t5_xxl() -> Recipe:
    """The same before Flan-T5-XXL: its encoder reads what was asked, its decoder writes the answer."""
    small = crome_7b()
    lm = CausalLM(arch=FLAN_T5_XXL, weights="google/flan-t5-xxl", chat=Plain(), eos="</s>")
    return replace(small, name="crome_flan_t5_xxl", model=replace(small.vlm, lm=lm))
