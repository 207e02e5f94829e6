"""Every recipe, small: two steps of each of its stages by the real workers' loop, on two ranks that hold unlike packs.

Stages whose like another recipe has had are left out (`tests/structures.py`). Those of one recipe go on from each other as they
do in a run: a checkpoint is written and read between them, adapters are merged, a reference is exported.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import loading
from cluster.checkpoint import read_manifest
from cluster.engines import still
from cluster.job import StageJob
from cluster.lease import Lease
from cluster.metrics import RunFolder
from cluster.reference import with_reference
from cluster.scoring import empty_pack
from cluster.shards import INDEX, parse_index
from cluster.site import Site
from mllm.annotators import ReferenceLogProbs
from mllm.model import Model
from mllm.objectives import TwoVocabularies
from mllm.recipe import Recipe, Stage, fingerprint
from mllm.recipes import RECIPES
from mllm.tune import Group, apply_tuning
from pipelines.place import Place
from pipelines.stream import hands_of
from pipelines.types import NOT_LEARNED, Batch, Pack, Sample
from pipelines.windows import PackWindows, Stream
from tests.mllm import test_families, test_fused_systems, test_lwm, test_systems
from tests.ranks import Groups, Ranks, dealt
from tests.structures import new_stages, small

STAGES = new_stages()

ELSEWHERE = {"vila_smoke", "vila_real", "vila_7b", "vila_13b", "fromage", *test_lwm.NAMES}
"""Whose sizes stand in tests of their own, and those that are no system of anybody's."""


def test_every_recipe_has_its_golden_size() -> None:
    told = (test_systems.SIZES, test_fused_systems.SIZES, test_families.SIZES)
    assert {name for sizes in told for name in sizes} | ELSEWHERE == set(RECIPES)


def chosen(recipe: Recipe, names: list[str]) -> list[Stage]:
    """The stages of these names, and before one that compares with a reference the stage that is it."""
    wanted = set(names)
    for name in names:
        before = recipe.before(recipe.stage(name))
        if before and any(isinstance(one, ReferenceLogProbs) for one in recipe.stage(name).annotators):
            wanted.add(before.name)
    return [stage for stage in recipe.stages if stage.name in wanted]


def job_of(recipe: Recipe, stage: Stage, site: Site, run: RunFolder, token: int, previous: Place | None) -> StageJob:
    """What a controller gives the workers of a stage, which begins anew where no stage before it was trained."""
    job = StageJob(
        recipe=recipe,
        stage=stage,
        stream=site.stream(recipe, stage),
        held_out=None,
        run=str(run.root),
        token=token,
        watch=site.watch,
        fingerprint=fingerprint(recipe, stage, ""),
        previous=str(previous) if previous else None,
        weights=site.weights,
        versions={},
    )
    return with_reference(job) if previous else job


def learned(group: tuple[Sample, ...]) -> bool:
    """Whether a pack of these teaches anything: words, classes or pictures."""
    return any(sample.tiles or (sample.labels != NOT_LEARNED).any() for sample in group)


def unlike(stream: Stream) -> list[Groups]:
    """Packs for two steps, of real rows. In the first rank 0 has one without pictures -- a text, or nothing where no row is
    without -- and rank 1 one with pictures; in the second rank 0 has pictures and rank 1 nothing, since the stream ends.
    """
    make = PackWindows(stream)
    plan = make.plan(0, make.rows(0))
    shown = sorted(filter(learned, plan.groups), key=lambda group: -sum(sample.tiles for sample in group))
    told = [sample for group in plan.groups for sample in group if not sample.tiles and learned((sample,))]
    return [[tuple(told[:1]), shown[0]], [(shown[1:] or shown)[0]]]


def begun(job: StageJob) -> Model:
    """The model that the stage begins with."""
    if job.previous:
        assert job.before
        return loading.read_model(job.recipe, job.before, Place(job.previous))
    torch.manual_seed(job.recipe.seed)
    return job.recipe.model_of(job.stage).build(job.place)


def look_at_steps(job: StageJob) -> None:
    """The record has two steps of two ranks, each of which was taken and taught something."""
    first, second = job.folder.steps(job.stage.name)
    for record in (first, second):
        assert record.taken
        assert record.world == 2
        assert record.learned > 0
        assert math.isfinite(record.loss)
        assert record.grad_norm > 0
        whole = record.loss * record.learned
        if isinstance(job.stage.objective, TwoVocabularies):
            whole *= 2  # half of it is that of codes, which no pack here has
        if all(source.loss_weight == 1 for source in job.stage.mixture):  # else documents count unlike their tokens
            assert sum(one.loss * one.tokens for one in record.sources) == pytest.approx(whole, rel=1e-3)
    assert (first.progress, second.progress) == (0.5, 1.0)
    assert job.journal.state().faults == ()


def look_at_weights(job: StageJob, last: Place, before: dict[str, torch.Tensor], groups: list[Group]) -> None:
    """Every weight that the stage trains had a gradient, and no other; nearly all of them moved, some of each part; no other."""
    assert read_manifest(last).final
    after = loading.read_model(job.recipe, job.stage, last, merge=False)
    wanted = {name for group in groups for name in group.names}
    stored = parse_index((last / INDEX).read_bytes()).tensors
    moments = [name.removeprefix("optimizer.state.") for name in stored if name.startswith("optimizer.state.")]
    assert {name.rpartition(".")[0] for name in moments} == wanted
    moved = {
        name  # an adapter was not there before; what it is added to has another name now
        for name, now in after.named_parameters()
        if (was := before.get(name.replace(".base_layer.", "."))) is None or not torch.equal(now, was)
    }
    assert moved <= wanted
    assert len(moved) > 0.7 * len(wanted)  # what no number of a toy's few rows reaches stays
    assert [group.part for group in groups if not moved & set(group.names)] == []


def look_at_packs(job: StageJob, model: Model, empty: Pack, full: Pack) -> None:
    """A pack of nothing reaches every weight that is trained and no other, and counts for nothing; a full one can be scored."""
    objective: Any = job.stage.objective
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    output = objective(model, Batch.of(empty))
    output.sum.backward()
    assert float(output.weight) == 0
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained
    with still(model):
        scored = objective(model, Batch.of(full))
    assert torch.isfinite(scored.sum)
    assert float(scored.weight) > 0


def trained(job: StageJob, ranks: Ranks) -> Place:
    """The last checkpoint of the stage, trained on both ranks, once all that it left was looked at."""
    tables = dealt(job.stream, unlike(job.stream))
    model = begun(job)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    groups = apply_tuning(model, job.stage.tune)
    ranks.train(job, tables)
    look_at_steps(job)
    last = job.resume_from()
    assert last
    look_at_weights(job, last, before, groups)
    (full,) = next(hands_of(tables[1])).packs
    look_at_packs(job, model, empty_pack(job.stream), full)
    return last


@pytest.mark.parametrize("name", STAGES)
def test_two_ranks_train_what_each_stage_says_whatever_they_hold(
    name: str, ranks: Ranks, site: Site, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    recipe = replace(small(name), held_out=())
    run = RunFolder(tmp_path / name)
    lease = Lease(run.root)
    left: dict[str, Place] = {}
    try:
        for stage in chosen(recipe, STAGES[name]):
            with subtests.test(stage=stage.name):
                earlier = recipe.before(stage)
                previous = left.get(earlier.name) if earlier else None
                left[stage.name] = trained(job_of(recipe, stage, site, run, lease.token, previous), ranks)
    finally:
        lease.release()
    assert set(left) >= set(STAGES[name]), "each stage left a checkpoint"
