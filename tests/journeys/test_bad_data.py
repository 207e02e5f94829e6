"""A run over a corpus with bad rows: few are dropped and counted, many stop it with the shard's name."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest
from rich.console import Console

from cluster import quarantine
from cluster.controller import RunError
from cluster.journal import Journal, RunFinished, StageFinished
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
    table = pyarrow.parquet.read_table(folder.root / "quarantine.parquet").to_pylist()
    assert {f"{row['corpus']}/{row['shard']} row {row['row']}" for row in table} == {
        d.partition(":")[0] for d in dropped
    }
    text = (tmp_path / "talk.json").read_bytes()
    assert all(
        hashlib.sha256(item).hexdigest() == row["sha"] for row in table for item in [item_bytes(text, row["row"])]
    )
    told = io.StringIO()
    assert quarantine.show(folder, Console(file=told, width=160), every=False) == 1
    assert f"{len(table)} rows dropped" in told.getvalue()
    assert "image is missing" in told.getvalue()

    # Killed before it noted its end, and its data changed meanwhile: the run says what changed instead of going on.
    journal = Journal(folder.root)
    for number, event in reversed(list(enumerate(journal.events()))):
        if isinstance(event, StageFinished | RunFinished):
            (journal.folder / f"{number:06d}.json").remove()
    (tmp_path / "talk.json").write_bytes(text.replace(b"gone.jpg", b"lost.jpg"))
    with pytest.raises(
        RunError, match=r"'sft' began with other data: example-instructions/talk\.json has other contents"
    ):
        trained_on(tmp_path / "talk.json", site, recipe)


def item_bytes(text: bytes, row: int) -> bytes:
    """The row as it lies in the file: the item, and what separates it from the next."""
    decoder, place = json.JSONDecoder(), 1
    words = text.decode()
    for _ in range(row):
        place = decoder.raw_decode(words, place)[1]
        place += len(words[place:]) - len(words[place:].lstrip(", \n"))
    end = decoder.raw_decode(words, place)[1]
    following = end + len(words[end:]) - len(words[end:].lstrip(", \n"))
    return words[place:following].encode()


@pytest.mark.usefixtures("ray_cluster")
def test_a_shard_of_bad_rows_stops_the_run_and_is_named(site: Site, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"stage 'sft': shard example-instructions/talk\.json: \d+ of \d+ rows were dropped"
    ):
        trained_on(spoilt(tmp_path, 2), site, recipe)
    page = (Path(site.runs) / "spoilt" / "report.html").read_text()
    assert "rows were dropped, more than the 10%" in page
    assert len(quarantine.rows(RunFolder(Path(site.runs) / "spoilt"))) > 2
