"""DeepSpeed's ZeRO as an engine: the same steps and the same checkpoints as FSDP's, by another library.

DeepSpeed is imported when the engine is built, since it is an extra: `pip install mllm[zero]`.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from cluster.engines import Guard, StepReport, Trained, finite, still
from cluster.phases import PhaseClock
from cluster.recompute import WRAPPED, recompute
from mllm.objectives import LossOutput
from mllm.recipe import Stage, ZeRO
from mllm.tune import apply_tuning, describe
from mllm.vlm import VisionLanguageModel
from pipelines.types import Batch, Pack

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each weight."""

BUCKET = 50_000_000
"""Gradients that are reduced together, at most: 200 MB in float32."""

WHOLE_BELOW = 10
"""Stage 3 shares out only weights of more numbers than so many hidden widths: norms and biases are not worth a gather."""


class Untangled(Trained):
    """`Trained` that returns tensors side by side: ZeRO-3 hooks itself to tensors, which it finds in tuples alone."""

    def forward(self, batch: Batch, next_logits: bool = False, collect: bool = False, told: Any = None) -> Any:
        output = super().forward(batch, next_logits, collect, told)
        return output if next_logits else (output.sum, output.weight, output.documents)


class ZeroEngine:
    """Data parallelism by DeepSpeed: ranks share optimiser states (stage 1), gradients too (2), weights too (3).

    Steps and checkpoints are those of `FSDPEngine`: gradients are summed over packs and divided once by the step's global
    weight, and a checkpoint of either engine is read by the other, by any stage and on any number of ranks.
    """

    def __init__(
        self, model: VisionLanguageModel, stage: Stage, parallel: ZeRO, sources: int, device: torch.device
    ) -> None:
        self.deepspeed = _deepspeed(stage.name, device)
        self.device = device
        self.stage = stage
        self.level = parallel.stage
        self.sources = sources
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        # Copies for checkpoints lie in the host's memory: the accelerator's may be full.
        self.mesh = init_device_mesh("cpu", (self.world,))
        self.groups = apply_tuning(model, stage.tune)
        self.trained = [name for group in self.groups for name in group.names]
        self.parts = describe(model, stage.tune)
        model.lm.backend = stage.attention
        model.train()
        if self.world > 1:
            _spread(model, device)
        # DeepSpeed keeps these very objects and changes what they hold.
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        weights: dict[str, Any] = {name: self._mine(p) for name, p in self.parameters.items()}
        self.frozen = {name: weights[name] for name, p in self.parameters.items() if not p.requires_grad}
        persistent = [name for name in model.state_dict() if name not in self.parameters]
        if parallel.recompute != "none":
            for unit in model.units():
                recompute(model, unit, parallel.recompute)
        self.asked: Callable[[], bool] | None = None
        adam = torch.optim.AdamW(
            [{"params": g.parameters, "lr": g.lr, "peak": g.lr, "weight_decay": g.weight_decay} for g in self.groups],
            betas=stage.optimizer.betas,
            eps=stage.optimizer.eps,
        )
        self.step = adam.step
        adam.step = self._step  # DeepSpeed knows the gradient's norm only on its way there, and takes no subclass
        self.options = [{k: v for k, v in group.items() if k != "params"} for group in adam.param_groups]
        self.module = Untangled(model, stage.objective)
        self.clock = PhaseClock(device)  # DeepSpeed's own collectives count as the part that they fall into
        self.clock.follow(model)
        self.engine: Any = self.deepspeed.initialize(
            args=SimpleNamespace(device_rank=device.index or 0),
            model=self.module,
            optimizer=adam,
            config=self._config(model, parallel),
            dist_init_required=False,
        )[0]
        self.optimizer: Any = self.engine.optimizer
        if self.level == 3:
            # The objective multiplies by the head outside of the head's own forward.
            self.deepspeed.zero.register_external_parameter(self.module, model.lm.head)
        buffers = {name.replace(WRAPPED, ""): buffer for name, buffer in model.named_buffers()}
        self.buffers = {name: buffers[name] for name in persistent}
        self._begin_moments()
        if parallel.dtype != "float32":  # masters were copied from weights that had been rounded
            self.load_model_state({**weights, **self.buffers})

    def _config(self, model: VisionLanguageModel, parallel: ZeRO) -> dict[str, Any]:
        trained = sum(p.numel() for p in self.parameters.values() if p.requires_grad)
        zero: dict[str, Any] = {
            "stage": parallel.stage,
            "reduce_bucket_size": min(BUCKET, trained),
            "stage3_param_persistence_threshold": WHOLE_BELOW * model.lm.width,
            # Stage 3's own linear layers let go of gathered weights until backward, as computing again does by itself; they
            # add biases in place, to products that selective recomputing has kept, and would add them twice.
            "memory_efficient_linear": parallel.recompute == "none",
        }
        if parallel.offload and self.device.type != "cpu":
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
            if parallel.stage == 3:
                zero["offload_param"] = {"device": "cpu", "pin_memory": True}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # boundaries are told step by step
            "gradient_clipping": self.stage.optimizer.clip,
            "bf16": {"enabled": parallel.dtype == "bfloat16"},
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
        }

    def train_step(self, packs: Sequence[Pack], lr_factor: float, guard: Guard = finite) -> StepReport:
        """One optimiser step over `packs`, of which every rank brings equally many; empty ones count for nothing."""
        started = time.perf_counter()
        self.clock.start()
        sums = torch.zeros(self.sources, 3, dtype=torch.float64, device=self.device)
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        for number, pack in enumerate(packs):
            self.engine.set_gradient_accumulation_boundary(number == len(packs) - 1)
            batch = Batch.of(pack, self.device)
            output = self._loss(batch)
            self._backward(output.sum)
            self.clock.backward_done()
            totals += torch.stack([output.sum.detach(), output.weight]).double()
            sums.index_add_(0, batch.sources, output.documents.double())
        with self.clock.waiting():
            dist.all_reduce(totals)
            dist.all_reduce(sums)
        loss_sum, weight = totals.tolist()
        self.clock.settle()
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * lr_factor
        loss = loss_sum / max(weight, 1.0)
        answers: list[bool] = []
        self.asked = lambda: _once(answers, lambda: guard(loss, float(self.optimizer._global_grad_norm)))
        # DeepSpeed has averaged over ranks; the loss is a sum over them.
        with self._divided(max(weight, 1.0) / self.world):
            self.engine.step()
        self.asked = None
        return StepReport(
            loss=loss,
            grad_norm=float(self.engine.get_global_grad_norm()),
            learned=int(weight),
            sources=sums.cpu(),
            seconds=time.perf_counter() - started,
            phases=self.clock.stop(),
            taken=answers == [True],  # DeepSpeed itself leaves a step out whose norm is no number, and asks nobody
        )

    def _step(self, closure: Any = None) -> Any:
        return self.step(closure) if self.asked is None or self.asked() else None

    def finish(self) -> None:
        """Nothing to end: a stage with averages is not ZeRO's."""

    def _backward(self, loss: Tensor) -> None:
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        depth = len(FWD_MODULE_STACK)
        self.engine.backward(loss)
        del FWD_MODULE_STACK[depth:]  # computing again stops inside a module, which stage 3 would list for ever

    @contextmanager
    def _divided(self, by: float) -> Iterator[None]:
        """Within, a step divides its gradients by `by` before it measures and clips them.

        That is what DeepSpeed's loss scale does, and backward has not multiplied by it. Stage 1 in bfloat16 is another
        optimiser, without a scale, whose float32 gradients are at hand.
        """
        if not hasattr(self.optimizer, "loss_scale"):
            for gradients in self.optimizer.fp32_groups_gradients_flat:
                gradients.div_(by)
            yield
            return
        self.optimizer.loss_scale = by
        try:
            yield
        finally:
            self.optimizer.loss_scale = 1.0

    def _loss(self, batch: Batch) -> LossOutput:
        total, weight, documents = self.engine(batch)
        return LossOutput(sum=total, weight=weight, documents=documents)

    def score(self, batch: Batch) -> LossOutput:
        """Loss of a batch without training. Every rank must call it equally often."""
        with still(self.engine):
            return self._loss(batch)

    def next_logits(self, batch: Batch) -> Tensor:
        """Logits of the token after each document, float (S, C). Every rank must call it equally often."""
        with still(self.engine):
            return self.engine(batch, next_logits=True)

    def state(self) -> dict[str, Any]:
        """Model and optimiser as DCP saves them, in the layout of `FSDPEngine.state`."""
        step = self._flat_states()[0]["step"]
        states = {
            name: {"step": step.clone().cpu()} | {moment: self._mine(self._moment(name, moment)) for moment in MOMENTS}
            for name in self.trained
        }
        options = [
            {**option, "params": list(group.names)} for option, group in zip(self.options, self.groups, strict=True)
        ]
        return {"model": self.model_state(), "optimizer": {"state": states, "param_groups": options}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take what `state` gave, here or in another engine; learning rates are the recipe's."""
        self.load_model_state(state["model"])
        states = state["optimizer"]["state"]
        for name in self.trained:
            for moment in MOMENTS:
                self._set_moment(name, moment, self._whole(states[name][moment]))
        step = states[self.trained[0]]["step"]
        for flat in self._flat_states():
            flat["step"].copy_(step)

    def model_state(self) -> dict[str, Any]:
        """Weights in float32 by the model's names, each rank its rows, and buffers."""
        weights = {
            name: self.frozen[name] if name in self.frozen else self._mine(self._master(name))
            for name in self.parameters
        }
        return {**weights, **self.buffers}

    @torch.no_grad()
    def load_model_state(self, state: dict[str, Any]) -> None:
        """Take weights as `model_state` gives them. Raises ValueError when names are missing or too many."""
        expected = {*self.parameters, *self.buffers}
        if expected != state.keys():
            raise ValueError(
                f"the state lacks {sorted(expected - state.keys())} of the model's names and has beside them "
                f"{sorted(state.keys() - expected)}: it was saved from another model; load it into the model of its own recipe"
            )
        for name, parameter in self.parameters.items():
            whole = self._whole(state[name])
            with self._gathered(parameter):
                parameter.data.copy_(whole)
            if name in self.frozen:
                self.frozen[name] = self._mine(whole)
            else:
                self._set_master(name, whole)
        for name, buffer in self.buffers.items():
            buffer.copy_(state[name])

    def _gathered(self, parameter: nn.Parameter) -> Any:
        """Within, `parameter` is whole; what rank 0 writes is everybody's afterwards."""
        return self.deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)

    def _begin_moments(self) -> None:
        """Moments from the beginning, so that a checkpoint has a place to be read into before the first step."""
        for flat in self._flat_weights():
            state = self.optimizer.state[flat]
            state["step"] = torch.zeros((), dtype=torch.float32)
            for moment in MOMENTS:
                state[moment] = torch.zeros_like(flat, requires_grad=False)
        if self.level < 3:
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _flat_weights(self) -> list[Tensor]:
        """This rank's float32 weights, end to end, as the optimiser knows them."""
        if self.level == 3:
            return self.optimizer.fp32_partitioned_groups_flat
        return [flat for group in self.optimizer.param_groups for flat in group["params"]]

    def _flat_states(self) -> list[dict[str, Tensor]]:
        """The optimiser's states of this rank's weights."""
        return [self.optimizer.state[flat] for flat in self._flat_weights()]

    def _master(self, name: str) -> Tensor:
        return self.deepspeed.utils.safe_get_full_fp32_param(self.parameters[name])

    def _moment(self, name: str, moment: str) -> Tensor:
        return self.deepspeed.utils.safe_get_full_optimizer_state(self.parameters[name], moment)

    def _set_master(self, name: str, whole: Tensor) -> None:
        utils, parameter = self.deepspeed.utils, self.parameters[name]
        if self.level == 3:
            utils.safe_set_local_fp32_param(parameter, self._stretch(parameter, whole))
        else:
            utils.safe_set_full_fp32_param(parameter, whole)

    def _set_moment(self, name: str, moment: str, whole: Tensor) -> None:
        utils, parameter = self.deepspeed.utils, self.parameters[name]
        if self.level == 3:
            utils.safe_set_local_optimizer_state(parameter, self._stretch(parameter, whole), moment)
        else:
            utils.safe_set_full_optimizer_state(parameter, whole, moment)

    def _stretch(self, parameter: Any, whole: Tensor) -> Tensor:
        """What stage 3 keeps of `whole` here: equal stretches of its numbers, the last ones filled up with zeros.

        DeepSpeed's own setter of whole values forgets the filling.
        """
        length = parameter.ds_tensor.numel()
        filled = whole.new_zeros(length * self.world)
        filled[: whole.numel()] = whole.flatten()
        return filled.narrow(0, self.rank * length, length)

    def _mine(self, whole: Tensor) -> DTensor:
        """This rank's rows of `whole`, dealt as torch deals them, in the host's memory."""
        rows = -(-len(whole) // self.world)
        mine = whole.detach()[self.rank * rows : (self.rank + 1) * rows]
        kept = mine.to("cpu", torch.float32, copy=True).contiguous()
        return DTensor.from_local(
            kept, self.mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )

    def _whole(self, piece: DTensor) -> Tensor:
        """`_mine` undone, on the engine's device."""
        rows = -(-len(piece) // self.world)
        local = piece.to_local().to(self.device)
        filled = local.new_zeros(rows, *piece.shape[1:])
        filled[: len(local)] = local
        whole = local.new_empty(rows * self.world, *piece.shape[1:])
        dist.all_gather(list(whole.split(rows)), filled)
        return whole[: len(piece)]


def _once(answers: list[bool], ask: Callable[[], bool]) -> bool:
    """The first answer, for all who ask again: stage 3 steps group by group."""
    if not answers:
        answers.append(ask())
    return answers[0]


@torch.no_grad()
def _spread(model: nn.Module, device: torch.device) -> None:
    """Give every rank rank 0's weights: nobody else need have read any."""
    for tensor in [*model.parameters(), *model.buffers()]:
        moved = tensor.to(device)
        dist.broadcast(moved, 0)
        tensor.copy_(moved)


def _deepspeed(stage: str, device: torch.device) -> Any:
    """DeepSpeed, made ready for a process group that is there already. Raises ValueError when it is not installed."""
    if find_spec("deepspeed") is None:
        raise ValueError(
            f"stage {stage!r} has parallel=ZeRO(...) and deepspeed is not installed here: pip install mllm[zero]; "
            "the nearest choice without it is parallel=FSDP()"
        )
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # else it asks the machine, which may have more than is used
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # it insists, and takes the device that it is told
    import deepspeed
    import deepspeed.ops

    # It calls torch's collectives by names that torch is taking out of use.
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
    if device.type == "cpu":
        # A faster sum over ranks of one machine, which training never asks for, would be compiled for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
