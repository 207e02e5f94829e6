"""Every recipe, small: two steps of each of its stages by the engine that trains them.

Recipes whose small models differ in numbers alone, and stages that train the same parts of it by the same objective, are one case
here, which the first of them stands for: the layers of a Vicuna of 7B and of one of 13B are the same.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.engines import alone, build_engine
from cluster.site import load_site
from mllm.annotators import ReferenceLogProbs
from mllm.export import export
from mllm.model import Model
from mllm.objectives import Objective, OneOf, Sum
from mllm.recipe import Recipe, Stage, dump
from mllm.recipes import RECIPES, by_name
from mllm.tiny import tiny
from mllm.tune import apply_tuning
from pipelines.types import Batch, Pack
from pipelines.windows import PackWindows
from tests.conftest import ROOT
from tests.mllm import test_families, test_fused_systems, test_lwm, test_systems

SITE = load_site(str(ROOT / "examples" / "site.toml"))
CPU = torch.device("cpu")

READING = {"chat", "bos", "eos", "mean", "std", "name", "tokenizer", "cls", "normed", "interpolate", "activation"}
"""Words on how a model is read and spoken to, which change no part of it."""


def structure(value: Any) -> Any:
    """What a value says without its numbers."""
    if isinstance(value, dict):
        return {key: structure(item) for key, item in value.items() if key not in READING}
    if isinstance(value, list):
        return [structure(item) for item in value]
    return None if isinstance(value, int | float) and not isinstance(value, bool) else value


@cache
def small(name: str) -> Recipe:
    return tiny(by_name(name))


@cache
def words(name: str) -> dict[str, Any]:
    return json.loads(dump(small(name)))


def stages() -> Iterator[tuple[str, str, str]]:
    """Recipe, stage and what is the same in others."""
    for name in RECIPES:
        model = structure(words(name)["model"])
        for stage in words(name)["stages"]:
            how = sorted((key, one["kind"]) for key, one in stage["tune"].items())
            annotators = [one["kind"] for one in stage["annotators"]]
            same = [model, structure(stage["objective"]), how, stage["optimizer"]["kind"], annotators]
            yield name, stage["name"], json.dumps(same)


STAGES = list({same: (name, stage) for name, stage, same in reversed([*stages()])}.values())[::-1]

ELSEWHERE = {"vila_smoke", "vila_real", "vila_7b", "vila_13b", "fromage", *test_lwm.NAMES}
"""Whose sizes stand in tests of their own, and those that are no system of anybody's."""


def test_every_recipe_has_its_golden_size() -> None:
    told = (test_systems.SIZES, test_fused_systems.SIZES, test_families.SIZES)
    assert {name for sizes in told for name in sizes} | ELSEWHERE == set(RECIPES)


def packs_of(name: str, stage: Stage) -> list[Pack]:
    """Two packs of a stage's data that carry loss, those with most pictures of a few."""
    found = islice(PackWindows(SITE.stream(small(name), stage)).packs(0), 6)
    packs = [pack for pack in sorted(found, key=lambda pack: -len(pack.tiles)) if pack.learned or len(pack.tiles)]
    return packs[:2]


def whole(objective: Objective) -> Objective:
    """All of what a step has one of."""
    return Sum(terms=objective.terms) if isinstance(objective, OneOf) else objective


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_two_steps_reach_what_the_stage_trains_and_nothing_else(name: str, stage: str, tmp_path: Path) -> None:
    """Every trained weight has a gradient in every step, and on a pack of nothing too; no other weight has one or moves."""
    recipe = small(name)
    trained = replace(recipe.stage(stage), objective=whole(recipe.stage(stage).objective))
    torch.manual_seed(0)
    model: Model = recipe.model_of(trained).build()
    references = [one for one in trained.annotators if isinstance(one, ReferenceLogProbs)]
    if references:
        folder = export(recipe, model, str(ROOT / "examples" / "tokenizer"), tmp_path / "export")
        trained = replace(trained, annotators=(replace(references[0], checkpoint=str(folder)),))
    packs = packs_of(name, trained)
    wanted = {name for group in apply_tuning(recipe.model.meta(), trained.tune) for name in group.names}
    before = {id(p): p.detach().clone() for p in model.parameters()}  # adapters give them other names
    with alone():
        engine: Any = build_engine(model, trained, len(trained.mixture), CPU)
        reports = [engine.train_step(packs, 1.0) for _ in range(2)]
    for report in reports:
        assert report.taken
        assert report.learned > 0
        assert math.isfinite(report.loss)
    named = dict(model.named_parameters())
    names = {id(p): name for name, p in named.items()}
    assert {names[id(p)] for optimizer in engine.optimizers for p in optimizer.state} == wanted
    moved = {name for name, p in named.items() if id(p) not in before or not torch.equal(p, before[id(p)])}
    assert moved <= wanted
    assert len(moved) > 0.7 * len(wanted)  # what no number of a toy's few rows reaches stays
    empty = Pack.empty(recipe.model.layout(recipe.tiling_of(trained)).shape)
    for annotator in trained.annotators:
        empty = annotator.empty(empty) if isinstance(annotator, ReferenceLogProbs) else empty
    objective: Any = trained.objective
    output = objective(model, Batch.of(empty))
    output.sum.backward()
    assert float(output.weight) == 0
    assert {name for name, p in named.items() if p.grad is not None} == wanted
