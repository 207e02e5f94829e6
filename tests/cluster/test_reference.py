"""A stage of preferences is compared with the model that it begins with."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.checkpoint import Manifest, TrainState
from cluster.engines import alone, build_engine
from cluster.job import StageJob
from cluster.loading import read_model
from cluster.policy import Watch
from cluster.preview import write_preview
from cluster.reference import with_reference
from cluster.saver import save
from cluster.scoring import empty_pack
from cluster.site import Site
from mllm.annotators import ReferenceLogProbs
from mllm.objectives import DPO
from mllm.recipe import Full, LoRA, Recipe, Tuning, dump, load
from pipelines.corpora import Preferences
from pipelines.place import Place
from pipelines.windows import PackWindows
from tests.cluster.test_engine import engine_of, share

MANIFEST = Manifest(run="r", stage="s", fingerprint="f", order="o", step=0, world=1, final=True, versions={}, token=0)


def preferring(recipe: Recipe, tune: dict[str, Tuning]) -> Recipe:
    """The recipe with a last stage of preferences, of the example's."""
    last = recipe.stages[-1]
    stage = replace(
        last,
        name="dpo",
        mixture=(replace(last.mixture[0], corpus=Preferences(name="example-preferences"), weight=None),),
        tune=tune,
        objective=DPO(changed_weight=3.0),
        annotators=(ReferenceLogProbs(),),
    )
    return replace(recipe, stages=(replace(last, tune=tune), stage))


def job_of(recipe: Recipe, site: Site, previous: Place) -> StageJob:
    stage = recipe.stage("dpo")
    return StageJob(
        recipe=recipe,
        stage=stage,
        stream=site.stream(recipe, stage),
        held_out=site.held_out(recipe, stage),
        run=str(Path(site.runs) / "run"),
        token=-1,
        watch=Watch(),
        fingerprint="f",
        previous=str(previous),
        weights={},
        versions={},
    )


@pytest.mark.parametrize("tune", [{"lm": Full(lr=1e-2)}, {"lm": LoRA(lr=1e-2, rank=4, alpha=8)}], ids=["full", "lora"])
def test_it_begins_where_nothing_is_preferred_and_moves_away(
    small: Recipe, site: Site, tmp_path: Path, tune: dict[str, Tuning]
) -> None:
    """Before the first step policy and reference are the same model to the last bit, so each pair's loss is log 2."""
    recipe = preferring(small, tune)
    sft = recipe.stages[0]
    with alone():
        trained = engine_of(recipe, sft)
        trained.train_step(share(list(PackWindows(site.stream(recipe, sft)).packs(0)), 4, 0), 1.0)
        previous = save(Place(tmp_path), trained.state(), TrainState(), MANIFEST)
        job = with_reference(job_of(recipe, site, previous))
        packs = list(PackWindows(job.stream).packs(0))
        again = list(PackWindows(job.stream).packs(0))
        assert [pack.references.tobytes() for pack in again if pack.references is not None] == [
            pack.references.tobytes() for pack in packs if pack.references is not None
        ]
        assert any(pack.references is not None and pack.references[:, 1].any() for pack in packs)

        model = read_model(recipe, sft, previous)
        engine = build_engine(model, job.stage, 1, torch.device("cpu"))
        share_of = share([*packs, empty_pack(job.stream)], 4, 0)
        first = engine.train_step(share_of, 1.0)
        assert first.loss == pytest.approx(math.log(2), abs=1e-6)
        assert first.learned == sum(int((pack.branches == 1).sum()) for pack in share_of)
        assert first.grad_norm > 0
        for _ in range(3):
            later = engine.train_step(share_of, 1.0)
        assert later.loss < first.loss - 0.01


def test_it_is_exported_once_and_named_for_all_that_look_at_packs(small: Recipe, site: Site, tmp_path: Path) -> None:
    recipe = preferring(small, {"lm": Full(lr=1e-3)})
    with alone():
        previous = save(Place(tmp_path), engine_of(recipe, recipe.stages[0]).state(), TrainState(), MANIFEST)
    job = job_of(recipe, site, previous)
    with pytest.raises(ValueError, match="once a run has come to it"):
        next(iter(PackWindows(job.stream).packs(0)))
    named = with_reference(job)
    (reference,) = named.stream.annotators
    assert isinstance(reference, ReferenceLogProbs)
    file = Path(str(reference.checkpoint)) / "recipe.json"
    written = file.stat().st_mtime_ns
    assert with_reference(job) == named
    assert with_reference(named) is named
    assert file.stat().st_mtime_ns == written
    assert job.held_out is not None
    assert job.held_out.annotators == ()  # nothing of it is compared
    assert write_preview(job.stream, 1, tmp_path / "page.html").is_file()  # nor does looking at packs ask for one
    assert load(dump(recipe)) == recipe


def test_a_first_stage_has_nothing_that_it_could_be_compared_with(small: Recipe) -> None:
    recipe = preferring(small, {"lm": Full(lr=1e-3)})
    with pytest.raises(ValueError, match="stage 'dpo' is the first, and its reference would be what it begins with"):
        replace(recipe, stages=recipe.stages[1:])
    named = replace(recipe.stages[1], annotators=(ReferenceLogProbs(checkpoint="an-export"),))
    assert replace(recipe, stages=(named,)).stages == (named,)
