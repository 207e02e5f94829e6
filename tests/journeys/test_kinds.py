"""Recipes of several kinds of models, at toy size, by the real workers: from the corpora to an export that is read back."""

import io
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from cluster.journal import Journal
from cluster.run import train, trained_model
from cluster.site import Site, load_site
from mllm.export import read_back
from mllm.recipes import by_name
from mllm.tiny import tiny
from tests.conftest import ROOT


@pytest.fixture
def two(site: Site) -> Site:
    return replace(load_site(str(ROOT / "examples" / "site.toml"), 2), runs=site.runs)


@pytest.mark.timeout(240)
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("name", ["clip_b32", "mae_b16"])
def test_two_workers_train_each_stage_and_export_what_they_trained(name: str, two: Site) -> None:
    recipe = tiny(by_name(name))
    seen = io.StringIO()
    folder = train(recipe, two, None, Console(file=seen, width=140))
    assert Journal(folder.root).state().finished, seen.getvalue()
    for stage in recipe.stages:
        steps = folder.steps(stage.name)
        assert [record.step for record in steps] == [1, 2]
        assert all(record.world == 2 and record.taken and math.isfinite(record.loss) for record in steps)
        assert all(0 < record.flops <= record.hardware_flops and record.mfu for record in steps)
        assert f"{stage.name}" in folder.report.read_text()
    ours, theirs = trained_model(recipe, folder).state_dict(), read_back(folder.export.path).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[part], theirs[part]) for part in ours)
