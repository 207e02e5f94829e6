"""Every fusion over two sharded ranks: a step ends whatever they hold, and with whole weights it is the same step."""

from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from benchmarks.common import on_ranks
from cluster.recompute import named
from cluster.site import load_site
from mllm.connectors import SVA
from mllm.encoders import Encoder, Encoders, Eva02
from mllm.fusion import (
    CrossAttention,
    Fusion,
    InLMSampler,
    PreLMAdapter,
    PromptAdapter,
    RoutedExperts,
    SideAttention,
)
from mllm.recipe import DDP, FSDP, Full, Parallel, Recipe
from mllm.vlm import VLM
from pipelines.types import Pack
from pipelines.windows import Stream
from tests.cluster.test_engine import engine_of
from tests.cluster.test_no_hang import packs_of_kinds
from tests.conftest import ROOT

FUSIONS: tuple[Fusion, ...] = (
    CrossAttention(every=2, heads=2, head_size=16),
    PreLMAdapter(hidden=16),
    RoutedExperts(),
    PromptAdapter(prompts=36, first=1),
    InLMSampler(count=1, every=1),
    SideAttention(hidden=16, heads=2, experts=RoutedExperts()),
)
SMALL = Encoder(arch=Eva02(hidden_size=16, layers=2, heads=2, intermediate_size=24, patch=16, image=96), layer=-1)
WAYS: tuple[Parallel, ...] = (FSDP(dtype="float32", recompute="full"), DDP(dtype="float32", recompute="none"))
PAIRS = (("pictures", "text"), ("empty", "mixed"), ("mixed", "pictures"), ("text", "empty"))


def steps(cases: list[tuple[Recipe, Stream]]) -> list[list[tuple[float, float, int]]]:
    """Of each recipe, trained in both ways: loss and gradient norm of each step, and how many weights had a gradient that
    should have none, or had none that should."""
    found = []
    for recipe, stream in cases:
        packs = packs_of_kinds(stream)
        for parallel in WAYS:
            tune = {"connector": Full(lr=1e-3), "fusion": Full(lr=1e-2)}
            found.append(_steps(recipe, parallel, tune, packs))
    return found


def _steps(recipe: Recipe, parallel: Parallel, tune: Any, packs: dict[str, Pack]) -> list[tuple[float, float, int]]:
    engine: Any = engine_of(recipe, replace(recipe.stage("pretrain"), tune=tune, parallel=parallel))
    parameters = named(engine.module.model)
    parts = engine.module.model.parts()
    tuned = {name for name, p in parameters.items() if any(p is q for part in tune for q in parts[part])}
    found = []
    for kinds in PAIRS:
        wrong = -1

        def look(_: float, __: float) -> bool:
            nonlocal wrong
            wrong = len({name for name, p in parameters.items() if p.grad is not None} ^ tuned)
            return True

        report = engine.train_step([packs[kinds[dist.get_rank() % 2]]], 1.0, look)
        found.append((report.loss, report.grad_norm, wrong))
    return found


def _with(model: VLM, fusion: Fusion) -> VLM:
    """The model with `fusion`, and a second tower where it looks at one."""
    if not isinstance(fusion, InLMSampler | SideAttention):
        return replace(model, fusion=fusion)
    assert isinstance(model.encoder, Encoder)
    towers = Encoders(towers=(model.encoder, SMALL), sizes=(96, 96))
    sampled = SVA(windows=(1, 2), side=4, hidden_size=16, layers=1, heads=2)
    return replace(
        model,
        encoder=towers,
        connector=sampled if isinstance(fusion, InLMSampler) else model.connector,
        fusion=fusion,
    )


def test_a_step_ends_and_is_the_same_however_weights_lie(small: Recipe) -> None:
    site = load_site(str(ROOT / "examples" / "site.toml"))
    recipes = [replace(small, model=_with(small.vlm, fusion)) for fusion in FUSIONS]
    cases = [(recipe, site.stream(recipe, recipe.stage("pretrain"))) for recipe in recipes]
    one, other = on_ranks(2, steps, cases)
    assert one == other
    for sharded, whole in zip(one[::2], one[1::2], strict=True):
        for (loss, norm, wrong), (loss_whole, norm_whole, wrong_whole) in zip(sharded, whole, strict=True):
            assert wrong == wrong_whole == 0
            assert 0 < loss < 9
            assert loss == pytest.approx(loss_whole, rel=1e-4)
            assert norm == pytest.approx(norm_whole, rel=1e-3)
