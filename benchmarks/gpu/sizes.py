"""How large everything is that is measured: what people train, and toys of it."""

from __future__ import annotations

from dataclasses import dataclass

from mllm.encoders import ClipVision
from mllm.lm import Llama


@dataclass(frozen=True)
class Sizes:
    """How large everything is. `packs` of attention, `steps` of the engine and a `check` are in tokens.

    `heads` are how many of queries, how many of keys, and their width; `losses` tokens, width and vocabularies.
    """

    packs: tuple[int, ...]
    heads: tuple[int, int, int]
    losses: tuple[int, int, tuple[int, ...]]
    tower: ClipVision
    decoders: dict[str, Llama]
    tunings: dict[str, tuple[str, ...]]
    steps: tuple[int, ...]
    check: int
    repetitions: int


SIGLIP = ClipVision(
    hidden_size=1152,
    layers=27,
    heads=16,
    intermediate_size=4304,
    patch=14,
    image=378,  # 384, of which its 27 x 27 patches see no more
    activation="gelu_pytorch_tanh",
)

FULL = Sizes(
    packs=(4096, 8192, 16384, 32768),
    heads=(12, 2, 128),
    losses=(8192, 2048, (32_000, 152_064)),
    tower=SIGLIP,
    decoders={
        "1.5B": Llama(
            vocab_size=151_936,
            hidden_size=1536,
            layers=28,
            heads=12,
            kv_heads=2,
            intermediate_size=8960,
            context=32768,
            tied=True,
        ),
        "7B": Llama(
            vocab_size=152_064,
            hidden_size=3584,
            layers=28,
            heads=28,
            kv_heads=4,
            intermediate_size=18944,
            context=32768,
        ),
    },
    tunings={
        "connector alone": ("connector",),
        "tower frozen": ("connector", "lm"),
        "all trained": ("encoder", "connector", "lm"),
    },
    steps=(4096, 8192, 16384, 32768),
    check=1024,
    repetitions=5,
)

TOY = Sizes(
    packs=(128,),
    heads=(4, 2, 16),
    losses=(64, 32, (500,)),
    tower=ClipVision(hidden_size=32, layers=2, heads=2, intermediate_size=64, patch=14, image=28),
    decoders={
        "toy": Llama(
            vocab_size=300, hidden_size=64, layers=2, heads=4, kv_heads=2, intermediate_size=128, context=256, tied=True
        )
    },
    tunings={"tower frozen": ("connector", "lm"), "all trained": ("encoder", "connector", "lm")},
    steps=(128,),
    check=96,
    repetitions=2,
)
