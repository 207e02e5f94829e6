"""Seconds of `FSDPEngine.train_step` on one worker, beside a plain torch loop over the same packs.

The limit is what a person writes without an engine: the same model class from the same seed, the same objective, backward for
each pack, gradients divided by the learned tokens, clipped, AdamW. Fair because both live in one process with the same threads
and take turns step by step; the losses of the last step tell whether they did the same work. With one rank, all that the engine
adds is overhead: FSDP's hooks, the sums by source, two all-reduces.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import Section, alone, cores, in_child, ratios, scratch
from cluster.engines import build_engine
from cluster.site import EXAMPLE, load_site
from mllm.recipe import Recipe, Stage
from mllm.recipes import by_name
from mllm.tune import apply_tuning
from mllm.vlm import VisionLanguageModel
from pipelines.types import Batch, Pack
from pipelines.windows import PackWindows

WARM_UP = 3


class Plain:
    """The loop without an engine."""

    def __init__(self, model: VisionLanguageModel, stage: Stage) -> None:
        self.model, self.stage = model.train(), stage
        groups = apply_tuning(model, stage.tune)
        self.parameters = [p for group in groups for p in group.parameters]
        options = [{"params": g.parameters, "lr": g.lr, "weight_decay": g.weight_decay} for g in groups]
        self.optimizer = torch.optim.AdamW(options, betas=stage.optimizer.betas, eps=stage.optimizer.eps)

    def step(self, packs: Sequence[Pack]) -> float:
        loss, weight = 0.0, 0.0
        for pack in packs:
            output = self.stage.objective(self.model, Batch.of(pack))
            output.sum.backward()
            loss += output.sum.item()
            weight += output.weight.item()
        trained = [p for p in self.parameters if p.grad is not None]
        for parameter in trained:
            assert parameter.grad is not None
            parameter.grad.div_(weight)
        nn.utils.clip_grad_norm_(trained, self.stage.optimizer.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss / weight


def model_of(recipe: Recipe) -> VisionLanguageModel:
    torch.manual_seed(0)
    return recipe.model.build()


def compare(name: str, steps: int, cache: str) -> tuple[list[float], list[float], float, float, int]:
    """Seconds of each step with the engine and without, and the last losses."""
    torch.set_num_threads(cores())
    recipe = by_name("vila_smoke")
    stage = recipe.stage(name)
    windows = PackWindows(replace(load_site(str(EXAMPLE)), cache=cache).stream(recipe, stage))
    packs: list[Pack] = []
    need = steps * stage.packs_per_step
    for k in range(1000):
        packs += windows.packs(k)
        if len(packs) >= need:
            break
    with alone():
        engine = build_engine(model_of(recipe), stage, len(stage.mixture), torch.device("cpu"))
        plain = Plain(model_of(recipe), stage)
        times: tuple[list[float], list[float]] = ([], [])
        losses = [0.0, 0.0]
        for step in range(steps):
            mine = packs[step * stage.packs_per_step : (step + 1) * stage.packs_per_step]
            turns = [0, 1] if step % 2 else [1, 0]
            for turn in turns:
                started = time.perf_counter()
                losses[turn] = plain.step(mine) if turn else engine.train_step(mine, 1.0).loss
                times[turn].append(time.perf_counter() - started)
    return times[0][WARM_UP:], times[1][WARM_UP:], losses[0], losses[1], stage.packs_per_step


def measure(section: Section, quick: bool) -> None:
    steps = WARM_UP + (3 if quick else 20)
    for name in ("align", "pretrain"):
        with scratch() as cache:
            ours, plain, loss, wanted, packs = in_child(compare, name, steps, str(Path(cache)))
        section.add(f"{name}: plain torch", "s", plain, f"{packs} packs a step; the limit")
        section.add(f"{name}: FSDPEngine", "s", ours)
        section.add(f"{name}: engine / plain", "ratio", ratios(ours, plain))
        section.add(
            f"{name}: loss difference", "nats", [abs(loss - wanted)], f"after {steps} steps, at loss {loss:.3f}"
        )
    section.facts.append(
        f"vila_smoke's own stages and packs, float32, {cores()} threads, {WARM_UP} steps of warm-up left out"
    )
