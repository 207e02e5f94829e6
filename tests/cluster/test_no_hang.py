"""Whatever ranks hold -- pictures, text, both, nothing, each something else -- a step ends, on every engine.

A rank that skipped a module would skip its collectives, and the others would wait for it. So every rank's step makes a gradient
for each weight that the stage trains, if only of zeros, and for none that it does not.
"""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn

from cluster.engines import WRAPPED
from mllm.recipe import DDP, FSDP, Full, Parallel, Recipe, Stage, Tuning, ZeRO
from pipelines.types import Pack
from pipelines.windows import PackWindows, Stream
from tests.cluster.processes import on_ranks
from tests.cluster.test_engine import engine_of

FROZEN: dict[str, Tuning] = {"connector": Full(lr=1e-3), "lm": Full(lr=1e-3)}
TRAINED: dict[str, Tuning] = {**FROZEN, "encoder": Full(lr=1e-4)}
TOWER_ALONE: dict[str, Tuning] = {"encoder": Full(lr=1e-4)}
KINDS = ("pictures", "text", "mixed", "empty")


def packs_of_kinds(stream: Stream) -> dict[str, Pack]:
    """A pack of each kind, cut out of real ones."""
    windows = PackWindows(stream)
    samples, _ = windows.samples(windows.rows(0))
    shown = [s for s in samples if s.tiles and len(s.input_ids) < 120][:2]
    told = [s for s in samples if not s.tiles][:2]

    def pack(chosen: list[Any]) -> Pack:
        return Pack.of_samples(chosen, windows.pixels(chosen))

    return {"pictures": pack(shown), "text": pack(told), "mixed": pack([*told, *shown]), "empty": pack([])}


def has_gradient(parameter: nn.Parameter) -> bool:
    if not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping"):
        return parameter.grad is not None
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter) is not None


def steps(recipe: Recipe, stage: Stage, stream: Stream) -> list[tuple[float, int]]:
    """Loss of a step for each way in which two ranks can hold two kinds, and how many weights had gradients that should not,
    or had none that should."""
    packs = packs_of_kinds(stream)
    engine: Any = engine_of(recipe, stage)
    model = engine.module.model
    parameters = {name.replace(WRAPPED, ""): p for name, p in model.named_parameters()}
    tuned = {id(p) for part in stage.tune for p in model.parts()[part]}
    found = []
    for kinds in product(KINDS, repeat=2):
        wrong = 0

        def look(_: float, __: float) -> bool:
            nonlocal wrong
            wrong = sum(has_gradient(p) != (id(p) in tuned) for p in parameters.values())
            return True

        mine = packs[kinds[dist.get_rank() % 2]]
        found.append((engine.train_step([mine, packs["empty"]], 1.0, look).loss, wrong))
    return found


@pytest.mark.parametrize("tune", [FROZEN, TRAINED, TOWER_ALONE], ids=["tower-frozen", "tower-trained", "tower-alone"])
@pytest.mark.parametrize(
    "parallel",
    [
        DDP(dtype="float32", recompute="none"),
        FSDP(dtype="float32", recompute="selective"),
        FSDP(dtype="float32", recompute="full", context=2),
        FSDP(dtype="float32", recompute="none", context=2, context_by="ulysses"),
        ZeRO(stage=3, dtype="float32", recompute="full"),
        ZeRO(stage=1, dtype="float32", recompute="none"),
    ],
    ids=["ddp", "fsdp", "ring", "ulysses", "zero3", "zero1"],
)
def test_a_step_ends_whatever_ranks_hold(
    recipe: Recipe, site: Any, parallel: Parallel, tune: dict[str, Tuning]
) -> None:
    stage = replace(recipe.stage("sft"), parallel=parallel, tune=tune)
    one, other = on_ranks(2, steps, recipe, stage, site.stream(recipe, stage))
    assert one == other
    for (loss, wrong), kinds in zip(one, product(KINDS, repeat=2), strict=True):
        assert wrong == 0
        assert loss == 0 if set(kinds) == {"empty"} else 1 < loss < 12
