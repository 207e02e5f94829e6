"""A run over a corpus with bad rows: few are dropped and counted, many stop it with the shard's name."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from cluster.controller import RunError
from cluster.metrics import RunFolder
from cluster.run import show_status, train
from cluster.site import Site
from mllm.recipe import Recipe
from tests.conftest import CORPUS


def spoilt(folder: Path, every: int) -> Path:
    """Instructions in which every `every`-th item's picture is missing."""
    shutil.copytree(CORPUS / "instruct" / "images", folder / "images")
    items = json.loads((CORPUS / "instruct/llava_instruct.json").read_text())
    for item in items[::every]:
        item["image"] = "images/gone.jpg"
        item["conversations"] = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "gone"}]
    (folder / "talk.json").write_text(json.dumps(items))
    return folder / "talk.json"


def trained_on(file: Path, site: Site, recipe: Recipe) -> tuple[RunFolder, Site]:
    """The sft stage alone, over the file's instructions."""
    sft = recipe.stage("sft")
    alone = replace(recipe, name="spoilt", stages=(replace(sft, mixture=sft.mixture[:1]),), held_out=())
    there = replace(site, corpora={**site.corpora, "example-instructions": str(file)})
    return train(alone, there, None, Console(file=io.StringIO())), there


@pytest.mark.usefixtures("ray_cluster")
def test_a_few_bad_rows_are_dropped_and_counted(site: Site, recipe: Recipe, tmp_path: Path) -> None:
    folder, there = trained_on(spoilt(tmp_path, 20), site, recipe)
    dropped = [label for record in folder.steps("sft") for label in record.dropped]
    assert dropped
    assert all(label.startswith("example-instructions/talk.json row ") for label in dropped)
    assert all(label.endswith("image is missing (images/gone.jpg)") for label in dropped)
    seen = io.StringIO()
    show_status(there, "spoilt", Console(file=seen, width=120))
    assert f"{len(dropped):,} rows dropped" in seen.getvalue()
    assert "image is missing" in folder.report.read_text()


@pytest.mark.usefixtures("ray_cluster")
def test_a_shard_of_bad_rows_stops_the_run_and_is_named(site: Site, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"stage 'sft': shard example-instructions/talk\.json: \d+ of \d+ rows were dropped"
    ):
        trained_on(spoilt(tmp_path, 2), site, recipe)
    page = (Path(site.runs) / "spoilt" / "report.html").read_text()
    assert "rows were dropped, more than the 10%" in page
