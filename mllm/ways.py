"""How a stage trains, as values: how long, what of each part, by which optimiser and schedule, shared among ranks how."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from ops.context import ContextBy
from pipelines.types import spec

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


@spec
class Epochs:
    """So many passes over the mixture's rows."""

    kind: Literal["epochs"] = "epochs"
    count: Annotated[float, Field(gt=0)] = 1.0


@spec
class Steps:
    """So many optimiser steps."""

    kind: Literal["steps"] = "steps"
    count: Positive


@spec
class Tokens:
    """So many tokens, visual ones included."""

    kind: Literal["tokens"] = "tokens"
    count: Positive


Duration = Annotated[Epochs | Steps | Tokens, Field(discriminator="kind")]


@spec
class Full:
    """Train every weight of a part.

    `layer_decay` multiplies the rate once for each layer between a weight's and the last (BEiT, arXiv:2106.08254, app. H).
    `first_row` trains an embedding's or head's rows from that one on and leaves those before as they are: new words only.
    """

    kind: Literal["full"] = "full"
    lr: Rate
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    first_row: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        if self.first_row and self.weight_decay:
            raise ValueError(
                f"first_row={self.first_row} leaves rows before it as they are, and weight_decay={self.weight_decay} would "
                "shrink them; set weight_decay to 0"
            )


@spec
class LoRA:
    """Train low-rank additions to the matrices of a part's linear layers (arXiv:2106.09685), which stay as they are.

    They are merged into the weights when the stage's result is used: by the next stage, an export, an evaluation elsewhere.
    `dora` trains each row's length as well (arXiv:2402.09353). `layers` are the last names of those meant, such as q_proj and
    v_proj; all of the part's, if there are none, but for a language model's head.
    """

    kind: Literal["lora"] = "lora"
    lr: Rate
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    rank: Positive = 64
    alpha: Positive = 128
    dora: bool = False
    layers: tuple[str, ...] = ()


@spec
class Frozen:
    """Leave a part as it is that lies within another."""

    kind: Literal["frozen"] = "frozen"


def _kind(tuning: Any) -> str:
    """A tuning without a kind is `Full`: `{"lr": 1e-5}` says enough."""
    return tuning.get("kind", "full") if isinstance(tuning, dict) else getattr(tuning, "kind", "full")


Tuning = Annotated[
    Annotated[Full, Tag("full")] | Annotated[LoRA, Tag("lora")] | Annotated[Frozen, Tag("frozen")], Discriminator(_kind)
]


@spec
class AdamW:
    """AdamW (arXiv:1711.05101) with VILA's defaults; gradients clipped to norm `clip`.

    With `bits` 8 its moments are kept in blocks of eight-bit numbers (arXiv:2110.02861), a quarter of their memory.
    """

    kind: Literal["adamw"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: Rate = 1.0
    bits: Literal[8, 32] = 32


@spec
class Muon:
    """Muon (Jordan et al., 2024) for the matrices within layers, AdamW for everything else.

    A matrix of A x B moves by 0.2 * sqrt(max(A, B)) times its rate, about as far as with AdamW, so that one rate serves
    both (Moonlight, arXiv:2502.16982, 2.2).
    """

    kind: Literal["muon"] = "muon"
    momentum: Share = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: Rate = 1.0


Optimizer = Annotated[AdamW | Muon, Field(discriminator="kind")]


@spec
class Cosine:
    """Linear warm-up over the first `warmup` of the stage, then half a cosine down to `floor` of the peak."""

    kind: Literal["cosine"] = "cosine"
    warmup: Share = 0.03
    floor: Share = 0.0


@spec
class Linear:
    """Linear warm-up over the first `warmup` of the stage, then straight down to `floor` of the peak at its end."""

    kind: Literal["linear"] = "linear"
    warmup: Share = 0.03
    floor: Share = 0.0


@spec
class Constant:
    """Linear warm-up over the first `warmup` of the stage, then the peak."""

    kind: Literal["constant"] = "constant"
    warmup: Share = 0.03


@spec
class WSD:
    """Warm-up, stable, decay (MiniCPM, arXiv:2404.06395, 4): the peak until the last `decay` of the stage.

    There it halves `halvings` times, to 2 ** -halvings, an exponential fall.
    """

    kind: Literal["wsd"] = "wsd"
    warmup: Share = 0.01
    decay: Annotated[float, Field(gt=0, le=1)] = 0.1
    halvings: Annotated[float, Field(gt=0)] = 5.0

    def __post_init__(self) -> None:
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup={self.warmup} and decay={self.decay} are more than the whole stage; lower one")


Schedule = Annotated[Cosine | Linear | Constant | WSD, Field(discriminator="kind")]


Dtype = Literal["bfloat16", "float32"]

Recompute = Literal["none", "selective", "full"]
"""Activations inside a unit: kept; all but the products of matrices and attention computed again; all computed again."""


@spec
class FSDP:
    """Fully sharded data parallelism (FSDP2). Master weights and reductions are float32; `dtype` is what layers compute in.

    `shard` is how many ranks hold one copy between them: None for all, fewer for hybrid sharding (best: the GPUs of a node),
    where each group has a copy. `recompute` trades time for the memory of activations. `offload` keeps weights and
    optimiser states in the host's memory. `compile` compiles each unit by itself (regional compilation). `float8` multiplies
    the language model's matrices in eight bits, each scaled by its greatest number (arXiv:2209.05433). `context` is how
    many neighbouring ranks share each pack's positions between them, for packs whose activations one rank cannot hold.
    `prefetch` is how many units are gathered ahead of the one that computes: more hide slower networks and take more memory.
    """

    kind: Literal["fsdp"] = "fsdp"
    dtype: Dtype = "bfloat16"
    recompute: Recompute = "full"
    shard: Positive | None = None
    offload: bool = False
    compile: bool = False
    float8: bool = False
    context: Positive = 1
    context_by: ContextBy = "ring"
    prefetch: Positive = 1


@spec
class DDP:
    """Every rank holds all weights and optimiser states; gradients are summed over ranks. Otherwise as `FSDP`."""

    kind: Literal["ddp"] = "ddp"
    dtype: Dtype = "bfloat16"
    recompute: Recompute = "full"
    compile: bool = False


@spec
class ZeRO:
    """DeepSpeed's ZeRO (arXiv:1910.02054): ranks share optimiser states (`stage` 1), gradients too (2), weights too (3).

    `offload` keeps optimiser states, and with stage 3 the weights, in the host's memory. Otherwise as `FSDP`.
    """

    kind: Literal["zero"] = "zero"
    stage: Literal[1, 2, 3] = 3
    dtype: Dtype = "bfloat16"
    recompute: Recompute = "full"
    offload: bool = False


Parallel = Annotated[FSDP | DDP | ZeRO, Field(discriminator="kind")]
