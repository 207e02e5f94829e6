"""One run whose stages train each in another way: engines, adapters, averages and optimisers follow upon each other."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from cluster import loading
from cluster.evaluating import evaluate_run
from cluster.journal import Journal
from cluster.run import train, trained_model
from cluster.site import load_site
from mllm.recipe import DDP, FSDP, Full, LoRA, Muon, Recipe, Stage, Steps, ZeRO
from pipelines.place import Place
from tests.conftest import ROOT


@pytest.fixture
def ways(small: Recipe) -> Recipe:
    """ZeRO-3, then adapters over shared packs, then averaged copies stepped by Muon."""
    align, pretrain, sft = (replace(stage, duration=Steps(count=3), save_every=2) for stage in small.stages)
    shared = FSDP(dtype="float32", recompute="none", context=2)
    stages = (
        replace(align, parallel=ZeRO(stage=3, dtype="float32", recompute="none")),
        replace(pretrain, tune={"lm": LoRA(lr=1e-2, rank=4)}, parallel=shared),
        replace(
            sft,
            tune={"connector": Full(lr=1e-2)},
            ema=0.5,
            optimizer=Muon(),
            parallel=DDP(dtype="float32", recompute="none"),
        ),
    )
    return replace(small, name="ways", stages=stages, held_out=small.held_out[:1], shots=(0,))


def left(recipe: Recipe, stage: Stage, root: Place) -> dict[str, torch.Tensor]:
    """The weights that a stage left, adapters merged."""
    done = next(event for event in Journal(root).state().finished_stages if event.stage == stage.name)
    return loading.read_model(recipe, stage, Place(root / done.checkpoint)).state_dict()


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_cluster")
def test_each_stage_goes_on_from_what_the_last_has_made(ways: Recipe, tmp_path: Path) -> None:
    site = replace(load_site(str(ROOT / "examples" / "site.toml"), 2), runs=str(tmp_path))
    folder = train(ways, site, None, Console(file=io.StringIO(), width=140))
    align, pretrain, sft = (left(ways, stage, folder.root) for stage in ways.stages)
    for name in align:
        after_adapters, at_the_end = (
            not torch.equal(pretrain[name], align[name]),
            not torch.equal(sft[name], pretrain[name]),
        )
        assert after_adapters == ("_proj.weight" in name and name.startswith("lm.")), name
        assert at_the_end == name.startswith("connector."), name
    for (name, exported), ours in zip(trained_model(ways, folder).state_dict().items(), sft.values(), strict=True):
        assert torch.equal(exported, ours), name
    # Each stage's weights are there as other programs read them, adapters merged.
    for stage, weights in (("pretrain", pretrain), ("sft", sft)):
        parts = folder.parts(stage).path
        read = {name: tensor for file in parts.glob("*.safetensors") for name, tensor in load_file(file).items()}
        assert read.keys() == weights.keys()
        assert all(torch.equal(read[name], weights[name]) for name in weights)
    # What was scored while adapters and averages were apart is what the weights score by themselves.
    seen = io.StringIO()
    evaluate_run(site, "ways", Console(file=seen, width=140))
    told = folder.evaluation("sft", "after")
    assert told is not None
    assert f"loss {told.scores[0].loss:7.4f}" in seen.getvalue()
