"""Whatever ranks hold -- pictures, text, both, nothing, each something else -- a step ends, on every engine.

A rank that skipped a module would skip its collectives, and the others would wait for it. So every rank's step makes a gradient
for each weight that the stage trains, if only of zeros, and for none that it does not.
"""

from dataclasses import replace
from itertools import combinations_with_replacement
from typing import Any

import pytest
import torch.distributed as dist

from benchmarks.common import on_ranks
from cluster.recompute import named
from mllm.recipe import DDP, FSDP, Full, Parallel, Recipe, Stage, Tuning, ZeRO
from pipelines.types import Pack
from pipelines.windows import PackWindows, Stream
from tests.cluster.test_engine import engine_of

FROZEN: dict[str, Tuning] = {"connector": Full(lr=1e-3), "lm": Full(lr=1e-3)}
TRAINED: dict[str, Tuning] = {**FROZEN, "encoder": Full(lr=1e-4)}
TOWER_ALONE: dict[str, Tuning] = {"encoder": Full(lr=1e-4)}
KINDS = ("pictures", "text", "mixed", "empty")
PAIRS = [pair[:: 1 - 2 * (n % 2)] for n, pair in enumerate(combinations_with_replacement(KINDS, 2))]
"""What two ranks can hold, the one now first and now last: ranks are alike but for their number."""


def packs_of_kinds(stream: Stream) -> dict[str, Pack]:
    """A pack of each kind, cut out of real ones."""
    windows = PackWindows(stream)
    samples, _ = windows.samples(windows.rows(0))
    shown = [s for s in samples if s.tiles and len(s.input_ids) < 120][:2]
    told = [s for s in samples if not s.tiles][:2]

    def pack(chosen: list[Any]) -> Pack:
        return Pack.of_samples(chosen, windows.pixels(chosen))

    return {"pictures": pack(shown), "text": pack(told), "mixed": pack([*told, *shown]), "empty": pack([])}


def steps(
    recipe: Recipe, stage: Stage, tunes: list[dict[str, Tuning]], stream: Stream
) -> list[list[tuple[float, int]]]:
    """Of each tuning: the loss of a step for each pair of kinds that two ranks can hold, and how many weights had a
    gradient that should have none, or had none that should."""
    packs = packs_of_kinds(stream)
    return [_steps(recipe, replace(stage, tune=tune), packs) for tune in tunes]


def _steps(recipe: Recipe, stage: Stage, packs: dict[str, Pack]) -> list[tuple[float, int]]:
    engine: Any = engine_of(recipe, stage)
    model = engine.module.model
    parameters = named(model)
    tuned = {name for name, p in parameters.items() if any(p is q for part in stage.tune for q in model.parts()[part])}
    arrived: set[str] = set()
    if isinstance(stage.parallel, ZeRO):  # which keeps gradients where nobody finds them
        for name, parameter in parameters.items():
            if name in tuned:
                parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.add(name))
    found = []
    for kinds in PAIRS:
        wrong = -1
        arrived.clear()

        def look(_: float, __: float) -> bool:
            nonlocal wrong
            with_gradient = arrived or {name for name, p in parameters.items() if p.grad is not None}
            wrong = len(with_gradient ^ tuned)
            return True

        mine = packs[kinds[dist.get_rank() % 2]]
        found.append((engine.train_step([mine], 1.0, look).loss, wrong))
    return found


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
def test_a_step_ends_whatever_ranks_hold_and_whatever_is_trained(
    small: Recipe, stream: Stream, parallel: Parallel
) -> None:
    stage = replace(small.stage("pretrain"), parallel=parallel)
    one, other = on_ranks(2, steps, small, stage, [FROZEN, TRAINED, TOWER_ALONE], stream)
    assert one == other
    for found in one:
        for (loss, wrong), kinds in zip(found, PAIRS, strict=True):
            assert wrong == 0, kinds
            assert loss == 0 if set(kinds) == {"empty"} else 0 < loss < 9
