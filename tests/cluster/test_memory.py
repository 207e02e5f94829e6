"""The memory that a plan tells is the memory that a run takes, as torch's profiler sees the allocator."""

import gc
from bisect import bisect_right
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.common import on_ranks
from cluster.engines import alone, build_engine
from cluster.fullest import fullest
from cluster.memory import memory
from mllm.encoders import ClipVision
from mllm.recipe import DDP, FSDP, Full, Parallel, Recipe, Stage, ZeRO
from mllm.recipes import by_name
from mllm.tiny import tiny

KEPT, AGAIN = FSDP(dtype="float32", recompute="none"), FSDP(dtype="float32", recompute="full")


STEPS = ("second", "third", "fourth")


def measured(recipe: Recipe, stages: list[Stage], packs: int) -> list[int]:
    """Of each stage the peak bytes of a fresh engine's steps after its first, by the allocator's own events.

    The least of three steps, and then of all ranks: what a busy machine has not sent yet lies with one of them.
    """
    return [_measured(recipe, stage, packs) for stage in stages]


def least(of_ranks: list[list[int]]) -> list[int]:
    return [min(bytes_) for bytes_ in zip(*of_ranks, strict=True)]


def _measured(recipe: Recipe, stage: Stage, packs: int) -> int:
    gc.collect()
    pack = fullest(recipe, stage)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        engine = build_engine(recipe.model.build(), stage, 1, torch.device("cpu"))
        engine.train_step([pack] * packs, 1.0)  # weights that were spread, whole on rank 0, have gone by then
        for step in STEPS:
            with torch.profiler.record_function(step):
                engine.train_step([pack] * packs, 1.0)
    results: Any = profile.profiler
    events = results.kineto_results.events()
    begins = [next(event.start_ns() for event in events if event.name() == step) for step in STEPS]
    now = 0
    peaks = [0] * len(STEPS)
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda event: event.start_ns()):
        now += event.nbytes()
        step = bisect_right(begins, event.start_ns()) - 1
        if step >= 0:
            peaks[step] = max(peaks[step], now)
    return min(peaks)


def deep(layer: int) -> Recipe:
    """The smoke model with more layers, so that activations outweigh all else; features are read behind `layer`."""
    recipe = by_name("vila_smoke")
    arch = recipe.vlm.tower.arch
    assert isinstance(arch, ClipVision)
    encoder = replace(recipe.vlm.tower, arch=replace(arch, layers=9), layer=layer)
    lm = replace(recipe.vlm.lm, arch=replace(recipe.vlm.lm.arch, layers=8))
    return replace(
        recipe,
        model=replace(recipe.vlm, encoder=encoder, lm=lm),
        stages=tuple(replace(stage, context=512, tokens_per_step=1024, parallel=KEPT) for stage in recipe.stages),
    )


CASES = {
    1: (("align", KEPT), ("pretrain", AGAIN), ("sft", KEPT)),
    2: (("align", AGAIN), ("pretrain", KEPT), ("sft", AGAIN), ("sft", DDP(dtype="float32", recompute="none"))),
}


@pytest.mark.parametrize("world", [1, 2])
def test_what_is_foretold_is_what_a_run_takes(world: int) -> None:
    recipe = by_name("vila_smoke")
    context = 512 * world  # so that activations outweigh what ranks have under way to each other
    long = {"context": context, "tokens_per_step": 2 * context}
    stages = [replace(recipe.stage(name), parallel=parallel, **long) for name, parallel in CASES[world]]
    foretold = [memory(recipe, stage, (world,))[world] for stage in stages]
    assert foretold == [
        pytest.approx(bytes_, rel=0.15) for bytes_ in least(on_ranks(world, measured, recipe, stages, 2))
    ]


@pytest.mark.parametrize("layer", [-2, -4])
def test_layers_that_are_not_built_are_counted_too(layer: int) -> None:
    recipe = deep(layer)
    whole = {"encoder": Full(lr=1e-4), "connector": Full(lr=1e-4), "lm": Full(lr=1e-4)}
    stages = [recipe.stage("align"), replace(recipe.stage("sft"), tune=whole, parallel=FSDP())]
    foretold = [memory(recipe, stage, (2,))[2] for stage in stages]
    assert foretold == [pytest.approx(bytes_, rel=0.15) for bytes_ in least(on_ranks(2, measured, recipe, stages, 1))]


@pytest.mark.parametrize(
    ("name", "stage_name"),
    [
        *(
            (name, None)
            for name in ("clip_b32", "vit_b16", "mae_b16", "vilt_b32", "coca_base", "uniter_base", "lxmert")
        ),
        *((name, None) for name in ("albef", "blip_base", "blip2_stage1", "beit_b16")),
        *(("vlmo_base", name) for name in ("image", "text", "pairs")),
        *(("fromage", None), ("llava_next_video_7b_dpo", "dpo")),
    ],
)
def test_other_kinds_and_objectives_are_foretold_too(name: str, stage_name: str | None) -> None:
    """What is masked, and who stands beside whom, is counted as rows say it: their seeds are known where nothing else is.

    Who is a hard negative nobody knows before, only how many there are and how long their texts.
    """
    recipe = tiny(by_name(name))
    first = recipe.stage(stage_name) if stage_name else recipe.stages[0]
    wide = {"context": 4 * first.context, "max_tiles": 4 * first.max_tiles, "tokens_per_step": 8 * first.context}
    stage = replace(first, parallel=KEPT, **wide)
    recipe = replace(recipe, stages=tuple(stage if one is first else one for one in recipe.stages))
    with alone():
        (bytes_,) = measured(recipe, [stage], 2)
    assert memory(recipe, stage, (1,))[1] == pytest.approx(bytes_, rel=0.15)


def many_pairs(name: str, packs: int) -> tuple[Recipe, Stage]:
    """A recipe and its first stage, in whose steps so many packs are compared that little else takes memory."""
    recipe = tiny(by_name(name))
    context = 4 * recipe.stages[0].context
    stage = replace(recipe.stages[0], parallel=KEPT, context=context, max_tiles=64, tokens_per_step=packs * context)
    return replace(recipe, stages=(stage,)), stage


@pytest.mark.parametrize(("name", "packs"), [("clip_b32", 24), ("siglip_b16", 24), ("fromage", 24)])
def test_what_many_packs_of_a_step_hold_together_is_foretold(name: str, packs: int) -> None:
    recipe, stage = many_pairs(name, packs)
    with alone():
        (bytes_,) = measured(recipe, [stage], packs)
    foretold = memory(recipe, stage, (1,))[1]
    assert foretold == pytest.approx(bytes_, rel=0.15)
    few = replace(stage, tokens_per_step=2 * stage.context)
    assert memory(recipe, few, (1,))[1] != pytest.approx(bytes_, rel=0.15), "two packs alone would not tell it"


def test_ranks_compare_their_own_pairs_with_those_of_all() -> None:
    """Of as many ranks as pass the packs on between them, though another number was simulated."""
    recipe, stage = many_pairs("clip_b32", 24)
    foretold = memory(recipe, stage, (1, 2, 24))
    (bytes_,) = least(on_ranks(2, measured, recipe, [stage], 12))
    assert foretold[2] == pytest.approx(bytes_, rel=0.15)
    assert foretold[1] > 1.5 * foretold[2] > 1.5 * foretold[24]


def test_a_plan_s_worlds_hold_together() -> None:
    recipe = by_name("vila_smoke")
    stage = replace(recipe.stage("sft"), parallel=AGAIN)

    def of(parallel: Parallel) -> dict[int, int]:
        return memory(recipe, replace(stage, parallel=parallel), (1, 4, 8, 16))

    full = of(AGAIN)
    assert full[1] > full[4] > full[8] > full[16]
    groups = of(replace(AGAIN, shard=4))
    assert set(groups) == {4, 8, 16}  # one rank is no group of four
    assert groups[16] > full[16]
    ahead = of(replace(AGAIN, prefetch=3))
    assert ahead[1] == full[1]  # which gathers nothing
    assert all(ahead[world] > full[world] for world in (4, 8, 16))
    zero = {stage: of(ZeRO(stage=stage, dtype="float32")) for stage in (1, 2, 3)}
    assert all(zero[1][world] > zero[2][world] > zero[3][world] for world in (4, 8, 16))
    away = of(replace(AGAIN, offload=True))
    assert all(away[world] < full[world] for world in full)


def other_group(recipe: Recipe) -> tuple[dict[int, int], int]:
    """A plan made inside a process group, and the group's size afterwards."""
    found = memory(recipe, recipe.stage("align"), (2,))
    return found, dist.get_world_size()


def test_a_plan_neither_needs_nor_leaves_a_process_group() -> None:
    recipe = by_name("vila_smoke")
    outside = memory(recipe, recipe.stage("align"), (2,))
    assert not dist.is_initialized()
    assert on_ranks(1, other_group, recipe) == [(outside, 1)]
