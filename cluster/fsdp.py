"""FSDP2 as an engine: full shards, hybrid shards, copies (DDP), and ranks that share packs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from cluster.engines import Guard, StepReport, Trained, finite, local, still
from cluster.mesh import context_of, mesh_shape
from cluster.optimizers import build_optimizers, set_rate
from cluster.phases import PhaseClock
from cluster.recompute import named, recompute
from mllm.model import Model
from mllm.objectives import Gathered, LossOutput
from mllm.recipe import DDP, FSDP, Dtype, Parallel, Stage
from mllm.tune import apply_tuning, describe
from mllm.vlm import VisionLanguageModel
from ops.context import Context
from pipelines.types import Batch, Pack


class FSDPEngine:
    """Data parallelism by torch's FSDP2: one copy over all ranks, one in each group of ranks, or one on each (DDP).

    On CPU with gloo, on GPU with NCCL, the same code. One rank that computes in float32 and offloads nothing has nobody to
    share with and nothing to cast: it trains the plain module, in the same steps and with the same checkpoints.

    Gradients of a step's packs are summed, divided once by the step's global weight, clipped, applied: the result depends on
    the packs alone, not on how many ranks or accumulation steps they were spread over.
    """

    def __init__(self, model: Model, stage: Stage, parallel: FSDP | DDP, sources: int, device: torch.device) -> None:
        self.device = device
        self.stage = stage
        self.sources = sources
        self.world = dist.get_world_size()
        groups = apply_tuning(model, stage.tune)
        self.parts = describe(model, stage.tune)
        model.attend_by(stage.attention)
        model.train()
        matrices = {name for name, p in named(model).items() if p.ndim == 2 and _inside(p, model.units())}
        self.whole = model.state_dict() if self.world > 1 and dist.get_rank() == 0 else {}
        self.context = context_group(parallel, self.world)
        shape = mesh_shape(parallel, self.world)
        self.copies = self.world // shape[-1]
        # Of several passes through a layer some may reach weights that others do not, and FSDP2 adds up what copies have yet to
        # tell each other by its place in a flat tensor.
        self.at_the_end = isinstance(model, VisionLanguageModel)
        self._offloads = isinstance(parallel, FSDP) and parallel.offload and self.device.type != "cpu"
        self.module = Trained(model, stage.objective)
        self.clock = PhaseClock(device)
        self.clock.follow(model)
        _prepare(model, parallel)
        alone = self.world == 1 and parallel.dtype == "float32" and not self._offloads
        self.sharded = None if alone else self._shard(model, shape, parallel.dtype)
        if self.sharded and isinstance(parallel, FSDP) and parallel.prefetch > 1:
            _prefetch(model.units(), parallel.prefetch)
        if self.sharded and not parallel.compile:  # a compiled unit has its hooks compiled with it
            for unit in (*model.units(), self.module):
                self.clock.follow_collectives(unit)
        if alone and device.type != "cpu":
            self.module.to(device)
        parameters = named(model)
        self.optimizers = build_optimizers(groups, parameters, matrices, stage.optimizer)
        self.averaged = [name for group in groups for name in group.names] if stage.ema else []
        self.averages: dict[str, Tensor] = {}

    def spread(self) -> None:
        """Give every rank its shards of the weights that rank 0 brought, and its buffers: nobody else need have read any."""
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, cpu_offload=self._offloads)
        set_model_state_dict(self.module.model, self.whole, options=options)
        self.whole = {}
        for buffer in self.module.buffers():
            dist.broadcast(buffer, 0)

    def _shard(self, model: Model, shape: tuple[int, ...], dtype: Dtype) -> FSDPModule:
        computed = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        how: dict[str, Any] = {
            "mesh": init_device_mesh(self.device.type, shape, mesh_dim_names=("copy", "shard")[-len(shape) :]),
            "mp_policy": MixedPrecisionPolicy(computed, reduce_dtype=torch.float32, cast_forward_inputs=False),
            "offload_policy": CPUOffloadPolicy() if self._offloads else OffloadPolicy(),
        }
        for unit in model.units():
            fully_shard(unit, **how)
        return fully_shard(self.module, **how, reshard_after_forward=False)

    def train_step(self, packs: Sequence[Pack], lr_factor: float, guard: Guard = finite) -> StepReport:
        """One optimiser step over `packs`, of which every rank brings equally many; empty ones count for nothing."""
        started = time.perf_counter()
        self.clock.start()
        self._begin_averages()
        sums = torch.zeros(3 + 3 * self.sources, dtype=torch.float64, device=self.device)
        totals, square, by_source = sums[:2], sums[2], sums[3:].view(-1, 3)
        told = self._told(packs)
        for number, (batch, last) in enumerate(self._batches(packs)):
            if self.sharded:
                self.sharded.set_requires_all_reduce(last or not self.at_the_end)
            output: LossOutput = self.module(batch, told=told[number]) if told else self.module(batch)
            output.sum.backward()
            self.clock.backward_done()
            totals += torch.stack([output.sum.detach(), output.weight]).double()
            by_source.index_add_(0, batch.sources, output.documents.double())
        steps = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        gradients = [local(p.grad) for group in steps for p in group["params"] if p.grad is not None]
        square += nn.utils.get_total_norm(gradients).to(sums).square() / self.copies  # shards' add up to the whole's
        if self.world > 1:
            with self.clock.waiting():
                dist.all_reduce(sums)
        sums = sums.cpu()
        self.clock.settle()
        loss_sum, weight, squared = sums[:3].tolist()
        scale = self.world / max(weight, 1.0)  # FSDP has averaged over ranks; the loss is a sum over them
        grad_norm = scale * math.sqrt(squared)
        loss = loss_sum / max(weight, 1.0)
        taken = guard(loss, grad_norm)
        for group in steps:
            set_rate(group, group["peak"] * lr_factor)
        if taken:
            clip = min(1.0, self.stage.optimizer.clip / (grad_norm + 1e-6))
            torch._foreach_mul_(gradients, scale * clip)  # pyright: ignore[reportPrivateImportUsage] -- as optimisers do
        for optimizer in self.optimizers:
            if taken:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if taken and self.averaged:
            now = named(self.module.model)
            for name, average in self.averages.items():
                local(average).lerp_(local(now[name]), 1 - (self.stage.ema or 0))
        if taken:
            self._settle(told)
        return StepReport(
            loss=loss,
            grad_norm=grad_norm,
            learned=int(weight),
            sources=sums[3:].view(-1, 3),
            seconds=time.perf_counter() - started,
            phases=self.clock.stop(),
            taken=taken,
        )

    @torch.no_grad()
    def _told(self, packs: Sequence[Pack]) -> list[Any]:
        """What each pack is told of the whole step, where the objective must see all of it first; else nothing."""
        objective = self.stage.objective
        if not isinstance(objective, Gathered):
            return []
        collected = [self.module(batch, collect=True) for batch, _ in self._batches(packs)]
        return objective.whole(collected, dist.group.WORLD if self.world > 1 else None)

    @torch.no_grad()
    def _settle(self, told: Sequence[Any]) -> None:
        """Let objective and model remember what they must of a step that was taken."""
        objective: Any = self.stage.objective  # a recipe makes sure that the model is of a kind that can learn it
        if told:
            objective.settle(self.module.model, told)
        self.module.model.stepped()

    def _begin_averages(self) -> None:
        """Averages begin at the weights that are there before the first step, wherever they have come from."""
        if self.averaged and not self.averages:
            self._reshard()
            now = named(self.module.model)
            self.averages = {name: now[name].detach().clone() for name in self.averaged}

    @torch.no_grad()
    def finish(self) -> None:
        """Put the averages, if any are kept, in the weights' place."""
        self._reshard()
        now = named(self.module.model)
        for name, average in self.averages.items():
            local(now[name]).copy_(local(average))

    def _reshard(self) -> None:
        """Let weights be shards again: a forward pass without backward leaves some whole."""
        if self.sharded:
            self.sharded.reshard()

    def _batches(self, packs: Sequence[Pack]) -> Iterator[tuple[Batch, bool]]:
        """Batches to train on, and whether each is the last. Ranks that share packs take each other's in turn."""
        if self.context is None:
            for number, pack in enumerate(packs):
                yield Batch.of(pack, self.device), number == len(packs) - 1
            return
        all_packs: list[list[Pack]] = [[] for _ in range(self.context.size)]
        with self.clock.waiting():
            dist.all_gather_object(all_packs, list(packs), group=self.context.group)
        turns = [group[number] for number in range(len(packs)) for group in all_packs]
        # Where packs are fewer than ranks most turns are empty, on all ranks alike: no rank need go through those.
        filled = torch.tensor([len(pack.input_ids) > 0 for pack in turns], dtype=torch.int32, device=self.device)
        with self.clock.waiting():
            dist.all_reduce(filled, op=dist.ReduceOp.MAX)
        taken = filled.nonzero().squeeze(1).tolist() or [0]
        for number in taken:
            yield Batch.of(turns[number], self.device).shared(self.context), number == taken[-1]

    def score(self, batch: Batch) -> LossOutput:
        """Loss of a batch without training. Every rank must call it equally often."""
        with still(self.module):
            return self._score(batch)

    def _score(self, batch: Batch) -> LossOutput:
        if self.context is None:
            return self.module(batch)
        batches: list[Batch] = [batch] * self.context.size
        dist.all_gather_object(batches, batch.to("cpu"), group=self.context.group)
        outputs: list[LossOutput] = [self.module(each.to(self.device).shared(self.context)) for each in batches]
        for output in outputs:
            for part in (output.sum, output.weight, output.documents):
                dist.all_reduce(part, group=self.context.group)
        return outputs[self.context.rank]

    def next_logits(self, batch: Batch) -> Tensor:
        """Logits of the token after each document, float (S, C). Every rank must call it equally often."""
        with still(self.module):
            return self.module(batch, next_logits=True)

    def state(self) -> dict[str, Any]:
        """Model, optimiser and averages as DCP saves them: the model's names, sharded tensors, for any world size."""
        model, optimizer = get_state_dict(self.module.model, self.optimizers)  # both at once: names are what takes time
        state = {"model": model, "optimizer": optimizer}
        self._begin_averages()
        return {**state, "averages": self.averages} if self.averaged else state

    def load_state(self, state: dict[str, Any]) -> None:
        self.load_model_state(state["model"])
        set_optimizer_state_dict(self.module.model, self.optimizers, state["optimizer"])
        self.averages = state.get("averages", {})

    def model_state(self) -> dict[str, Any]:
        return get_model_state_dict(self.module.model)

    def load_model_state(self, state: dict[str, Any]) -> None:
        set_model_state_dict(self.module.model, state, options=StateDictOptions(strict=True))


def context_group(parallel: Parallel, world: int) -> Context | None:
    """This rank's group of neighbours that share packs; None where each rank has its own. Raises ValueError."""
    size = context_of(parallel)
    if world % size:
        raise ValueError(f"{world} ranks cannot be groups of context={size}; take a divisor, or 1 for whole packs")
    if size == 1 or not isinstance(parallel, FSDP):
        return None
    group, _ = dist.new_subgroups_by_enumeration([list(range(n, n + size)) for n in range(0, world, size)])
    assert isinstance(group, dist.ProcessGroup)
    return Context(group, parallel.context_by)


def _inside(parameter: nn.Parameter, units: Sequence[nn.Module]) -> bool:
    return any(parameter is other for unit in units for other in unit.parameters())


def _prepare(model: Model, parallel: FSDP | DDP) -> None:
    """Layers as the stage wants them, on however many ranks: in eight bits, computed again, compiled."""
    if isinstance(parallel, FSDP) and parallel.float8:
        _to_float8(model)
    for unit in model.units() if parallel.recompute != "none" else ():
        recompute(model, unit, parallel.recompute)
    for unit in model.units() if parallel.compile else ():
        unit.compile()


def _prefetch(units: Sequence[Any], ahead: int) -> None:
    """Let each sharded unit, when it has been gathered, have those gathered that compute next; torch looks one ahead."""
    begin = next((n for n, unit in enumerate(units) if any(p.requires_grad for p in unit.parameters())), len(units))
    for number, unit in enumerate(units):
        unit.set_modules_to_forward_prefetch(list(units[number + 1 : number + 1 + ahead]))
        # Backward stops at the first unit that is trained: what was gathered below it would lie there unused.
        unit.set_modules_to_backward_prefetch(list(units[max(begin, number - ahead) : max(begin, number)][::-1]))


def _to_float8(model: Model) -> None:
    """Let layers (a language model's alone, where there is one) multiply in eight bits, if sides are multiples of 16."""
    from torchao.float8 import convert_to_float8_training  # pyright: ignore[reportMissingImports] -- an extra

    def fits(module: nn.Module, _: str) -> bool:
        return isinstance(module, nn.Linear) and not (module.in_features % 16 or module.out_features % 16)

    units = model.lm.units() if isinstance(model, VisionLanguageModel) else model.units()
    for layer in units:
        convert_to_float8_training(layer, module_filter_fn=fits)
