"""What torchao adds: AdamW with moments in eight bits, and products in eight bits. `make test-extras` runs it."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from benchmarks.common import on_ranks
from cluster.preflight import refusals, this_machine
from mllm.recipe import FSDP, AdamW, Recipe, Stage
from pipelines.windows import PackWindows, Stream
from tests.cluster.test_engine import engine_of, share, trained_with

pytestmark = pytest.mark.skipif(not find_spec("torchao"), reason="needs torchao: `make test-extras` has it")


def trained(recipe: Recipe, stages: list[Stage], stream: Stream, folder: str) -> list[tuple[list[float], set[Any]]]:
    """Of each stage losses, across a checkpoint, and the types in which the first moments' numbers lie."""
    with torch.compiler.set_stance("force_eager"):  # torchao compiles a step for each shape, which takes minutes
        return [
            (trained_with(recipe, stage, stream, 4, f"{folder}/{number}"), moments(recipe, stage, stream))
            for number, stage in enumerate(stages)
        ]


def moments(recipe: Recipe, stage: Stage, stream: Stream) -> set[Any]:
    engine: Any = engine_of(recipe, stage)
    engine.train_step(share(list(PackWindows(stream).packs(0)), 4, 0), 1.0)
    first = [state["exp_avg"] for optimizer in engine.optimizers for state in optimizer.state.values()]
    shards = [moment.to_local() if isinstance(moment, DTensor) else moment for moment in first]
    return {getattr(shard, "codes", shard).dtype for shard in shards}


@pytest.mark.parametrize("world", [1, 2])
def test_moments_in_eight_bits_train_like_those_in_thirty_two(
    small: Recipe, stream: Stream, tmp_path: Path, world: int
) -> None:
    stage = small.stage("pretrain")
    stages = [stage, replace(stage, optimizer=AdamW(bits=8))]
    for (wanted, whole), (losses, short) in on_ranks(world, trained, small, stages, stream, str(tmp_path)):
        assert losses == pytest.approx(wanted, rel=1e-2)
        assert losses != wanted
        assert whole == {torch.float32}
        assert torch.uint8 in short  # small tensors keep thirty-two bits


def test_products_in_eight_bits_are_refused_without_a_gpu_that_has_them(recipe: Recipe) -> None:
    eight = replace(recipe, stages=(replace(recipe.stages[0], parallel=FSDP(float8=True)),))
    (why,) = refusals(eight, 1, replace(this_machine(), gpu=None))
    assert "asks for float8, which needs a GPU of compute capability 8.9, and there is none; take bfloat16" in why


def converted(recipe: Recipe, stage: Stage) -> dict[str, str]:
    """Linear layers by name, and the class of each."""
    engine: Any = engine_of(recipe, stage)
    modules = engine.module.model.named_modules()
    return {name: type(module).__name__ for name, module in modules if isinstance(module, nn.Linear)}


def test_only_the_language_model_s_layers_multiply_in_eight_bits(small: Recipe) -> None:
    stage = replace(small.stage("pretrain"), parallel=FSDP(dtype="float32", recompute="none", float8=True))
    (kinds,) = on_ranks(1, converted, small, stage)
    eight = {name for name, kind in kinds.items() if kind == "Float8Linear"}
    assert eight == {name for name in kinds if name.startswith("lm.model.model.layers.")}
    assert set(kinds.values()) == {"Float8Linear", "Linear"}
