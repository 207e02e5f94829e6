"""Every structure is planned to the last number: FLOPs, and memory on one rank and on two, its activations computed again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.plan import plan
from cluster.site import Site
from mllm.recipe import FSDP
from tests.structures import learners, small


@pytest.mark.parametrize("name", learners())
def test_nothing_of_a_plan_is_missing(name: str) -> None:
    recipe = small(name)
    stages = [replace(stage, parallel=FSDP(dtype="bfloat16", recompute="full")) for stage in recipe.stages]
    for stage in plan(replace(recipe, stages=tuple(stages)), Site(), (1, 2)).stages:
        assert stage.unknown == ""
        assert stage.flops is not None
        assert stage.flops > 0
        assert stage.counted is not None
        assert stage.memory.keys() == {1, 2}
        assert stage.memory[2] < stage.memory[1]
