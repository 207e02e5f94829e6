"""Engines: one optimiser step over the packs of a step, on all ranks. The only place that divides a loss.

Two there are: `cluster/fsdp.py` on torch's own sharding, `cluster/zero.py` on DeepSpeed's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cluster.phases import Phases
from mllm.model import Model
from mllm.objectives import Gathered, LossOutput, Objective
from mllm.parts import PartReport
from mllm.recipe import DDP, FSDP, Stage, ZeRO
from mllm.vlm import VisionLanguageModel
from pipelines.types import Batch, Pack


@dataclass(frozen=True, slots=True)
class StepReport:
    """Result of a step over all ranks. `sources` float64 (sources, 3): loss sum, learned tokens, right tokens.

    `taken` is False where a guard left the weights as they were. `phases` are this rank's, without the wait for data.
    """

    loss: float
    grad_norm: float
    learned: int
    sources: Tensor
    seconds: float
    phases: Phases
    taken: bool = True


Guard = Callable[[float, float], bool]
"""Whether to take the step of this loss and this gradient norm; asked on every rank, and must answer alike."""


def finite(loss: float, grad_norm: float) -> bool:
    """The guard that is there if no other is: a step of no number would leave no number in any weight."""
    return math.isfinite(loss) and math.isfinite(grad_norm)


class Engine(Protocol):
    """What the training loop asks of a parallel strategy."""

    parts: list[PartReport]
    device: torch.device

    def train_step(self, packs: Sequence[Pack], lr_factor: float, guard: Guard = finite) -> StepReport: ...

    def finish(self) -> None:
        """End the stage: where averages of weights are kept they become the weights."""
        ...

    def score(self, batch: Batch) -> LossOutput: ...

    def next_logits(self, batch: Batch) -> Tensor: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...

    def model_state(self) -> dict[str, Any]: ...

    def load_model_state(self, state: dict[str, Any]) -> None: ...


class Trained(nn.Module):
    """Model and objective as one module, so that sharded parameters -- the head above all -- are whole wherever they are used."""

    def __init__(self, model: Model, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch, next_logits: bool = False, collect: bool = False, told: Any = None) -> Any:
        """The loss; or the next tokens' logits; or what a `Gathered` objective collects, and its loss once it is `told`."""
        if next_logits:
            return self.model.next_logits(batch)
        objective: Any = self.objective  # a recipe makes sure that the model is of a kind that can learn it
        if isinstance(self.objective, Gathered):
            if collect:
                return objective.collect(self.model, batch)
            if told is not None:
                return objective.again(self.model, batch, told)
        return objective(self.model, batch)


@contextmanager
def still(module: nn.Module) -> Iterator[None]:
    """`module` without what only training does, such as leaving branches out, and without gradient."""
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train()


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, as plain numbers without gradient."""
    with torch.no_grad():  # which makes a shard of a DTensor cheap
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def build_engine(model: Model, stage: Stage, sources: int, device: torch.device, restored: bool = False) -> Engine:
    """The engine that the stage asks for. Its weights are those that rank 0 brings, whatever the others bring.

    One that is to be `restored` from a checkpoint has none before that: nobody need bring any, and none are sent around.
    """
    match stage.parallel:
        case FSDP() | DDP() as parallel:
            from cluster.fsdp import FSDPEngine

            engine = FSDPEngine(model, stage, parallel, sources, device)
            if restored:
                engine.whole = {}
            elif engine.world > 1:
                engine.spread()
            return engine
        case ZeRO() as parallel:
            from cluster.zero import ZeroEngine  # DeepSpeed is an extra

            assert isinstance(model, VisionLanguageModel)  # as a recipe makes sure

            return ZeroEngine(model, stage, parallel, sources, device)


@contextmanager
def alone() -> Iterator[None]:
    """A process group of this process only, so that the sharded engine runs here as it does on a cluster."""
    with TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
