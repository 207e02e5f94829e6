"""Engines: one optimiser step over the packs of a step, on all ranks. The only place that divides a loss."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mllm.objectives import LossOutput, Objective
from mllm.recipe import DDP, FSDP, Recompute, Stage, ZeRO
from mllm.tune import Group, PartReport, apply_tuning, describe
from mllm.vlm import VisionLanguageModel
from pipelines.types import Batch, Pack

WRAPPED = "_checkpoint_wrapped_module."
"""What recomputation puts into parameters' names."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """Result of a step over all ranks. `sources` float64 (sources, 3): loss sum, learned tokens, right tokens."""

    loss: float
    grad_norm: float
    learned: int
    sources: Tensor
    seconds: float


class Engine(Protocol):
    """What the training loop asks of a parallel strategy."""

    parts: list[PartReport]
    device: torch.device

    def train_step(self, packs: Sequence[Pack], lr_factor: float) -> StepReport: ...

    def score(self, batch: Batch) -> LossOutput: ...

    def next_logits(self, batch: Batch) -> Tensor: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...

    def model_state(self) -> dict[str, Any]: ...

    def load_model_state(self, state: dict[str, Any]) -> None: ...


class Trained(nn.Module):
    """Model and objective as one module, so that sharded parameters -- the head above all -- are whole wherever they are used."""

    def __init__(self, model: VisionLanguageModel, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch, next_logits: bool = False) -> Any:
        if not next_logits:
            return self.objective(self.model, batch)
        last = self.model(batch)[batch.cu_seqlens[1:].long() - 1]
        return last @ self.model.lm.head.to(last.dtype).T


class FSDPEngine:
    """Data parallelism by torch's FSDP2: one copy over all ranks, one in each group of ranks, or one on each (DDP).

    On CPU with gloo, on GPU with NCCL, the same code.

    Gradients of a step's packs are summed, divided once by the step's global weight, clipped, applied: the result depends on
    the packs alone, not on how many ranks or accumulation steps they were spread over.
    """

    def __init__(
        self, model: VisionLanguageModel, stage: Stage, parallel: FSDP | DDP, sources: int, device: torch.device
    ) -> None:
        self.device = device
        self.stage = stage
        self.sources = sources
        self.world = dist.get_world_size()
        groups = apply_tuning(model, stage.tune)
        self.parts = describe(model, stage.tune)
        model = model.to(device)
        model.train()
        self._shard(model, parallel)
        self.module = Trained(model, stage.objective)
        self.sharded: FSDPModule = fully_shard(
            self.module,
            mesh=self.mesh,
            mp_policy=self.precision,
            offload_policy=self.place,
            reshard_after_forward=False,
        )
        self.optimizer = self._optimizer(groups, model, stage)

    def _shard(self, model: VisionLanguageModel, parallel: FSDP | DDP) -> None:
        shape = mesh_shape(parallel, self.world)
        self.mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("copy", "shard")[-len(shape) :])
        dtype = torch.bfloat16 if parallel.dtype == "bfloat16" else torch.float32
        self.precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        offload = isinstance(parallel, FSDP) and parallel.offload
        self.place = CPUOffloadPolicy() if offload and self.device.type != "cpu" else OffloadPolicy()
        if parallel.recompute != "none":
            for unit in model.units():
                _recompute(model, unit, parallel.recompute)
        for unit in model.units():
            if parallel.compile:
                unit.compile()
            fully_shard(unit, mesh=self.mesh, mp_policy=self.precision, offload_policy=self.place)

    def _optimizer(self, groups: list[Group], model: VisionLanguageModel, stage: Stage) -> torch.optim.AdamW:
        """Parameters are looked up again by name: sharding has replaced them by their shards."""
        now = {name.replace(WRAPPED, ""): parameter for name, parameter in model.named_parameters()}
        options = [
            {"params": [now[n] for n in g.names], "lr": g.lr, "peak": g.lr, "weight_decay": g.weight_decay}
            for g in groups
        ]
        return torch.optim.AdamW(options, betas=stage.optimizer.betas, eps=stage.optimizer.eps)

    def train_step(self, packs: Sequence[Pack], lr_factor: float) -> StepReport:
        """One optimiser step over `packs`, of which every rank brings equally many; empty ones count for nothing."""
        started = time.perf_counter()
        sums = torch.zeros(self.sources, 3, dtype=torch.float64, device=self.device)
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for number, pack in enumerate(packs):
            self.sharded.set_requires_gradient_sync(number == len(packs) - 1)
            batch = Batch.of(pack, self.device)
            output: LossOutput = self.module(batch)
            output.sum.backward()
            totals += torch.stack([output.sum.detach(), output.weight]).double()
            sums.index_add_(0, batch.sources, output.documents.double())
        dist.all_reduce(totals)
        dist.all_reduce(sums)
        loss_sum, weight = totals.tolist()
        scale = self.world / max(weight, 1.0)  # FSDP has averaged over ranks; the loss is a sum over them
        trained = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        for parameter in trained:
            parameter.grad.mul_(scale)
        norm = nn.utils.clip_grad_norm_(trained, self.stage.optimizer.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * lr_factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepReport(
            loss=loss_sum / max(weight, 1.0),
            grad_norm=float(norm.full_tensor() if isinstance(norm, DTensor) else norm),
            learned=int(weight),
            sources=sums.cpu(),
            seconds=time.perf_counter() - started,
        )

    @torch.no_grad()
    def score(self, batch: Batch) -> LossOutput:
        """Loss of a batch without training. Every rank must call it equally often."""
        return self.module(batch)

    @torch.no_grad()
    def next_logits(self, batch: Batch) -> Tensor:
        """Logits of the token after each document, float (S, C). Every rank must call it equally often."""
        return self.module(batch, next_logits=True)

    def state(self) -> dict[str, Any]:
        """Model and optimiser as DCP saves them: names as in the model, sharded tensors, loadable by any world size."""
        return {"model": self.model_state(), "optimizer": get_optimizer_state_dict(self.module.model, self.optimizer)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.load_model_state(state["model"])
        set_optimizer_state_dict(self.module.model, self.optimizer, state["optimizer"])

    def model_state(self) -> dict[str, Any]:
        return get_model_state_dict(self.module.model)

    def load_model_state(self, state: dict[str, Any]) -> None:
        set_model_state_dict(self.module.model, state, options=StateDictOptions(strict=True))


def mesh_shape(parallel: FSDP | DDP, world: int) -> tuple[int, ...]:
    """Ranks as (copies, ranks that share a copy); as one number where there is one copy. Raises ValueError."""
    if isinstance(parallel, DDP):
        return world, 1
    shard = parallel.shard
    if shard is None:
        return (world,)
    if world % shard:
        raise ValueError(f"{world} ranks cannot be groups of shard={shard}; take a divisor, or None for one copy")
    return world // shard, shard


KEPT = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
"""What selective recomputing keeps: products of matrices cost most to compute again."""

ATTENTION = ("scaled_dot_product", "flash_attn", "flex_attention", "varlen_attn")


def _keeps(_: object, op: Any, *__: object, **___: object) -> CheckpointPolicy:
    kept = op in KEPT or any(word in str(op) for word in ATTENTION)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _recompute(model: nn.Module, unit: nn.Module, how: Recompute) -> None:
    """Wrap `unit` in place so that its activations, or some, are computed again in the backward pass."""
    more: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, _keeps)}
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is unit and not isinstance(parent, CheckpointWrapper):
                setattr(
                    parent,
                    name,
                    checkpoint_wrapper(
                        unit, checkpoint_fn=checkpoint, use_reentrant=False, **(more if how == "selective" else {})
                    ),
                )
                return


def build_engine(model: VisionLanguageModel, stage: Stage, sources: int, device: torch.device) -> Engine:
    """The engine that the stage asks for."""
    match stage.parallel:
        case FSDP() | DDP() as parallel:
            return FSDPEngine(model, stage, parallel, sources, device)
        case ZeRO() as parallel:
            from cluster.zero import ZeroEngine  # DeepSpeed is an extra

            return ZeroEngine(model, stage, parallel, sources, device)
