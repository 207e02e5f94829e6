"""VILA's three stages with real weights small enough for a laptop: MobileNetV2 and SmolLM2-135M, 30 steps a stage."""

from dataclasses import replace

from mllm.encoders import Encoder, MobileNetV2
from mllm.lm import CausalLM, Llama
from mllm.recipe import Full, Recipe, Steps
from mllm.recipes.smoke import vila_smoke
from pipelines.chat import ChatML
from pipelines.corpora import Conversations, Pairs
from pipelines.tiling import Pad

SMOLLM2_135M = Llama(
    vocab_size=49_152,
    hidden_size=576,
    layers=30,
    heads=9,
    kv_heads=3,
    intermediate_size=1536,
    context=8192,
    rope_theta=100_000.0,
    tied=True,
)


def vila_real() -> Recipe:
    """Real weights through the same stages; `make real` prepares them."""
    smoke = vila_smoke()
    rates = {
        "align": {"connector": Full(lr=1e-3)},
        "pretrain": {"connector": Full(lr=1e-4), "lm": Full(lr=5e-5)},
        "sft": {"connector": Full(lr=5e-5), "lm": Full(lr=5e-5)},
    }
    return replace(
        smoke,
        name="vila_real",
        model=replace(
            smoke.model,
            encoder=Encoder(
                arch=MobileNetV2(),
                weights="mobilenet-v2",
                layer=-1,
                mean=(0.485, 0.456, 0.406),
                std=(0.229, 0.224, 0.225),
            ),
            lm=CausalLM(arch=SMOLLM2_135M, weights="smollm2-135m", chat=ChatML(), bos=None, eos="<|im_end|>"),
        ),
        tiling=Pad(size=160),
        stages=tuple(
            replace(
                stage,
                tune=rates[stage.name],
                context=256,
                tokens_per_step=512,
                max_tiles=8,
                duration=Steps(count=30),
                save_every=15,
            )
            for stage in smoke.stages
        ),
        held_out=(Pairs(name="example-pairs-heldout"), Conversations(name="example-instructions-heldout")),
        shots=(0,),  # four examples a question would take longer than the training on two cores
    )
