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
    again = FSDP(dtype="bfloat16", recompute="full")
    stages = tuple(replace(stage, parallel=again) for stage in recipe.stages[-2:])  # a reference is the stage before
    made = plan(replace(recipe, stages=stages), Site(), (1, 2)).stages[-1]
    assert made.unknown == ""
    assert made.flops is not None
    assert made.flops > 0
    assert made.counted is not None
    assert made.memory.keys() == {1, 2}
    assert made.memory[2] < made.memory[1]
