"""What a machine cannot do is said before a worker starts, with what is missing and the nearest choice."""

from dataclasses import replace
from typing import Any

import pytest

from cluster.controller import Controller, RunError
from cluster.plan import plan
from cluster.preflight import Machine, refusals, this_machine
from cluster.site import Site
from mllm.recipe import DDP, FSDP, AdamW, Muon, Recipe, RecipeError, ZeRO, override
from ops.attention import available

BARE = Machine(gpu=None, packages=frozenset(), compiler=False, attention=available())
H100 = replace(BARE, gpu=(9, 0), packages=frozenset({"deepspeed", "torchao"}), compiler=True)


def with_stage(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with one stage changed."""
    first, *rest = recipe.stages
    return replace(recipe, stages=(replace(first, **changes), *rest))


@pytest.mark.parametrize(
    ("changes", "machine", "world", "words"),
    [
        ({"parallel": ZeRO()}, BARE, 2, "DeepSpeed is not installed; pip install 'mllm[zero]', or take FSDP"),
        ({"parallel": FSDP(float8=True)}, BARE, 2, "capability 8.9, and there is none; take bfloat16"),
        ({"parallel": FSDP(float8=True)}, replace(H100, gpu=(8, 0)), 2, "and this one has 8.0; take bfloat16"),
        ({"parallel": FSDP(float8=True)}, replace(H100, packages=frozenset()), 2, "torchao is not installed"),
        ({"parallel": DDP()}, replace(H100, gpu=(7, 0)), 2, "this one has 7.0; take dtype float32"),
        ({"parallel": DDP(compile=True)}, BARE, 2, "no C++ compiler; install g++"),
        ({"parallel": FSDP(shard=4)}, BARE, 6, "6 ranks cannot be groups of shard=4"),
        ({"parallel": FSDP(context=4)}, BARE, 6, "6 workers are no groups of context=4; take a multiple"),
        ({"optimizer": AdamW(bits=8)}, BARE, 1, "pip install 'mllm[float8]', or take 32"),
        ({"attention": "flash3"}, BARE, 1, "attention by flash3, which needs a GPU; sdpa is the best here"),
    ],
)
def test_what_is_missing_is_named(
    recipe: Recipe, changes: dict[str, Any], machine: Machine, world: int, words: str
) -> None:
    (why,) = refusals(with_stage(recipe, **changes), world, machine)
    assert why.startswith("stage 'align' ")
    assert words in why


def test_what_a_machine_has_is_not_refused(recipe: Recipe) -> None:
    assert refusals(recipe, 3, this_machine()) == ()
    for parallel in (FSDP(float8=True, context=2, compile=True), ZeRO(stage=2), FSDP(shard=2)):
        assert refusals(with_stage(recipe, parallel=parallel), 4, H100) == ()


def test_plan_says_it_and_a_run_does_not_begin(recipe: Recipe, site: Site) -> None:
    asked = with_stage(recipe, attention="flash3")
    assert ["flash3" in why for why in plan(asked, site, (1, 2)).refused] == [True]
    assert plan(recipe, site, (1, 2)).refused == ()
    with pytest.raises(RunError, match="attention by flash3, which needs a GPU; sdpa is the best here"):
        Controller(asked, site, "never").prepare()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            'stages.align.parallel={"kind":"fsdp","context":3,"context_by":"ulysses"}',
            "which do not divide them; take ring",
        ),
        ("stages.align.attention=flash9", "flash9"),
    ],
)
def test_what_no_machine_can_do_is_no_recipe(recipe: Recipe, change: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        override(recipe, [change])


def test_zero_is_not_asked_for_what_it_cannot(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match="ema averages shards that ZeRO keeps to itself"):
        with_stage(recipe, parallel=ZeRO(), ema=0.9)
    with pytest.raises(ValueError, match="take FSDP or DDP for muon"):
        with_stage(recipe, parallel=ZeRO(), optimizer=Muon())


def test_a_head_without_gpus_leaves_to_the_workers_what_only_theirs_can_say(recipe: Recipe, site: Site) -> None:
    head = replace(site, gpus=True)
    for changes in ({"attention": "flash3"}, {"parallel": FSDP(float8=True)}):
        asked = with_stage(recipe, **changes)
        assert refusals(asked, 1, replace(H100, gpu=None, unseen=True, attention=dict.fromkeys(available(), ""))) == ()
    Controller(with_stage(recipe, attention="flash3"), head, "never").prepare()
    with pytest.raises(RunError, match="needs a GPU"):
        Controller(with_stage(recipe, attention="flash3"), replace(site, gpus=False), "never").prepare()
