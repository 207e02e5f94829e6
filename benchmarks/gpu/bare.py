"""The training step that a person writes without an engine."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.gpu.device import COMPUTED, DEVICE
from benchmarks.gpu.training import model_of
from cluster.recompute import recompute
from mllm.objectives import NextToken
from mllm.recipe import Recipe
from mllm.tune import apply_tuning
from pipelines.types import Batch, Pack


class Bare:
    """The loop without an engine: weights in the compute type, master weights in float32."""

    def __init__(self, recipe: Recipe) -> None:
        self.stage = recipe.stages[0]
        self.model = model_of(recipe).train()
        groups = apply_tuning(self.model, self.stage.tune)
        weights = [p for group in groups for p in group.parameters]
        self.pairs = [(p, p.detach().clone()) for p in weights]
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(COMPUTED)
        for unit in self.model.units():
            if self.stage.parallel.recompute != "none":
                recompute(self.model, unit, self.stage.parallel.recompute)
        self.optimizer = torch.optim.AdamW([master for _, master in self.pairs], lr=1e-5, fused=True)

    def step(self, pack: Pack) -> float:
        output = NextToken()(self.model, Batch.of(pack, DEVICE))
        output.sum.backward()
        for parameter, master in self.pairs:
            if parameter.grad is not None:
                master.grad = parameter.grad.float().div_(output.weight)
                parameter.grad = None
        nn.utils.clip_grad_norm_([master for _, master in self.pairs], self.stage.optimizer.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, master in self.pairs:
                parameter.copy_(master)
        return float(output.sum.detach() / output.weight)
