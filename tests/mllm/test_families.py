"""Recipes of models that are not vision-language models: as large as the papers', and whole at toy size.

A toy is the recipe with its own objective and tuning, a model of the same structure and the example corpora in the place of its
own; it takes two steps by the real engine.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.engines import alone, build_engine
from cluster.plan import plan
from cluster.site import Site
from mllm.recipe import FSDP, Recipe, Source, Stage, Steps, dump, load
from mllm.recipes import by_name
from mllm.tune import apply_tuning
from pipelines.corpora import Labelled, Pairs
from pipelines.types import Batch, Pack
from pipelines.windows import PackWindows
from tests.conftest import CORPUS

PICTURES = CORPUS / "instruct" / "images"
LABELLED = Labelled(name="toy-classes", images=str(PICTURES))

SIZES = {
    "clip_b32": 151_277_313,
    "clip_b16": 149_620_737,
    "clip_l14": 427_616_513,
    "openclip_h14": 986_109_441,
    "siglip_b16": 203_155_970,
    "siglip_so400m": 877_960_498,
    "lenet5": 61_706,
    "alexnet": 60_965_224,
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "vit_b16": 86_567_656,
    "vit_l16": 304_326_632,
    "mae_b16": 111_907_840,
    "mae_l16": 329_541_888,
    "vilt_b32": 112_219_196,
    "beit_b16": 91_965_776 + 29_423_616,  # the second is the frozen tokenizer's
}
"""Weights of each, as its model card or `transformers`' own class has them."""


@pytest.mark.parametrize("name", SIZES)
def test_it_is_as_large_as_the_original_and_round_trips(name: str, site: Site) -> None:
    recipe = by_name(name)
    assert recipe.name == name
    assert load(dump(recipe)) == recipe
    assert sum(p.numel() for p in recipe.model.meta().parameters()) == SIZES[name]
    planned = plan(recipe, site, (1, 8))
    assert planned.stages[0].unknown
    assert planned.stages[0].memory == {}
    assert sum(part.trained + part.frozen for part in planned.stages[0].parts) == SIZES[name]


@pytest.fixture
def everything(site: Site, tmp_path: Path) -> Site:
    """The example site with a few of its pictures that have a class."""
    files = sorted(PICTURES.glob("*.jpg"))[:40]
    rows = [f"{file.name},{number % 10}" for number, file in enumerate(files)]
    (tmp_path / "classes.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    return replace(site, corpora=site.corpora | {"toy-classes": str(tmp_path / "classes.csv")})


def toy(recipe: Recipe) -> Recipe:
    """The recipe at toy size on the example corpora."""
    model, tiling = recipe.model.tiny(), recipe.tiling
    tiling = replace(tiling, size=model.side)
    layout = model.layout(tiling)
    context = 6 * (layout.tokens_per_tile + 24)
    stages = tuple(
        replace(
            stage,
            mixture=(Source(corpus=LABELLED if _labelled(stage) else Pairs(name="example-pairs")),),
            context=context,
            tokens_per_step=3 * context,
            max_tiles=6,
            window=32,
            chunk=8,
            duration=Steps(count=2),
            parallel=FSDP(dtype="float32", recompute="none"),
        )
        for stage in recipe.stages
    )
    return replace(recipe, model=model, tiling=tiling, stages=stages)


def _labelled(stage: Stage) -> bool:
    return isinstance(stage.mixture[0].corpus, Labelled)


@pytest.mark.parametrize("name", SIZES)
def test_at_toy_size_it_learns_what_its_stage_says(name: str, everything: Site) -> None:
    recipe = toy(by_name(name))
    assert load(dump(recipe)) == recipe
    for stage in recipe.stages:
        windows = PackWindows(everything.stream(recipe, stage))
        packs = [*windows.packs(0)][:3]
        torch.manual_seed(0)
        model = recipe.model.build()
        tuned = recipe.model.build()
        wanted = {n for group in apply_tuning(tuned, stage.tune) for n in group.names}
        assert wanted
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        with alone():
            engine = build_engine(model, stage, 1, torch.device("cpu"))
            report = engine.train_step(packs, 1.0)
            assert report.taken
            assert report.learned > 0
            assert report.loss == pytest.approx(float(report.sources[:, 0].sum()) / report.learned, rel=1e-4)
            moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
            assert moved <= wanted
            assert len(moved) > 0.9 * len(wanted)  # what no number of a toy's few pictures reaches stays
            again = engine.score(Batch.of(packs[0]))
            assert torch.isfinite(again.sum)


@pytest.mark.parametrize("name", SIZES)
def test_a_pack_of_nothing_reaches_every_trained_weight(name: str) -> None:
    recipe = toy(by_name(name))
    stage = recipe.stages[0]
    model = recipe.model.build()
    apply_tuning(model, stage.tune)

    objective: Any = stage.objective
    output = objective(model, Batch.of(Pack.empty(recipe.tiling.shape)))
    output.sum.backward()
    assert float(output.weight) == 0
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
