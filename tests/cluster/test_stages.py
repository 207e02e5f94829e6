"""Stages are found again by what decides their result; a change costs what depends on it, and no more."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.controller import Controller, RunError, Silent
from cluster.journal import Journal, RunStarted, StageFinished, StageStarted
from cluster.metrics import RunFolder
from cluster.site import Site
from mllm.care import Gate
from mllm.recipe import AdamW, LoRA, Recipe, RecipeError, dump, load, override


class Told(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def say(self, text: str) -> None:
        self.words.append(text)


def begun(recipe: Recipe, site: Site) -> None:
    """A run of the recipe whose first two stages are done, as its controller would have left it."""
    controller = Controller(recipe, site)
    folder, journal = controller.folder, Journal(controller.folder.root)
    folder.recipe.write(dump(recipe).encode())
    journal.append(RunStarted(time=0.0, recipe=recipe.name, workers=(1, 1), versions={}))
    for stage in ("align", "pretrain"):
        mark = controller.fingerprints[stage]
        journal.append(StageStarted(time=1.0, stage=stage, fingerprint=mark, steps=4, parts=()))
        journal.append(
            StageFinished(time=2.0, stage=stage, fingerprint=mark, checkpoint=f"checkpoints/{stage}/step-000004")
        )


def prepared(recipe: Recipe, site: Site) -> tuple[str, set[str]]:
    """What is said of the recipe when it goes on with the run, and which stages count as done."""
    told = Told()
    controller = Controller(recipe, site, None, told)
    state = controller.prepare()
    return " ".join(told.words), {name for name, mark in controller.fingerprints.items() if state.finished_stage(mark)}


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ("stages.sft.tune.lm.lr=5e-4", {"align", "pretrain"}),
        ("stages.pretrain.tune.lm.lr=5e-4", {"align"}),
        ("stages.pretrain.save_every=7", {"align", "pretrain"}),
        ('stages.pretrain.parallel={"kind": "ddp", "dtype": "float32"}', {"align", "pretrain"}),
        ('stages.sft.entry={"loss": 3.0}', {"align", "pretrain"}),
    ],
)
def test_a_change_costs_what_depends_on_it(recipe: Recipe, site: Site, change: str, kept: set[str]) -> None:
    begun(recipe, site)
    changed = override(recipe, [change])
    words, done = prepared(changed, site)
    assert done == kept
    if kept == {"align"}:
        assert "the recipe was changed" in words
        assert "align stays as it is, pretrain is trained again" in words


def test_a_stage_that_is_added_later_leaves_those_before_it(recipe: Recipe, site: Site) -> None:
    begun(recipe, site)
    more = replace(recipe, stages=(*recipe.stages, replace(recipe.stages[-1], name="polish")))
    assert prepared(more, site)[1] == {"align", "pretrain"}
    branch = replace(recipe, stages=(*recipe.stages[:2], replace(recipe.stages[2], after="align")))
    assert prepared(branch, site)[1] == {"align", "pretrain"}
    assert Controller(branch, site).fingerprints["sft"] != Controller(recipe, site).fingerprints["sft"]


def test_a_change_that_leaves_nothing_is_refused(recipe: Recipe, site: Site) -> None:
    begun(recipe, site)
    with pytest.raises(RunError, match=r'"seed": 0 and now "seed": 5.*--run'):
        prepared(replace(recipe, seed=5), site)


def test_files_of_a_changed_stage_are_its_own(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.name_stages({"align": "1f3a09c2aaaa"})
    before = run.checkpoints("align")
    run.name_stages({"align": "77777777bbbb"})
    assert before.name == "align-1f3a09c2"
    assert run.checkpoints("align").name == "align-77777777"


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ({"pretrain": {"after": "sft"}}, r"comes after 'sft', and the stages before it are \['align'\]"),
        ({"align": {"entry": Gate(tokens=5)}}, "is the first"),
        ({"sft": {"entry": Gate(loss=3.0, source="nowhere")}}, "looks at 'nowhere', and held out are"),
        ({"pretrain": {"carry_optimizer": True}}, "they do not train the same parts"),
        ({"sft": {"carry_optimizer": True, "tune": {"lm": LoRA(lr=1e-3)}}}, "they do not train the same parts"),
        ({"sft": {"carry_optimizer": True, "optimizer": AdamW(clip=0.5)}}, None),
    ],
)
def test_what_cannot_follow_upon_what_is_said(
    recipe: Recipe, stages: dict[str, dict[str, object]], words: str | None
) -> None:
    changed = tuple(replace(stage, **stages.get(stage.name, {})) for stage in recipe.stages)
    text = dump(recipe)
    if words is None:
        assert load(dump(replace(recipe, stages=changed))).stages == changed
        return
    with pytest.raises((ValueError, RecipeError), match=words):
        replace(recipe, stages=changed)
    assert json.loads(text)["stages"], "the recipe itself is whole"
