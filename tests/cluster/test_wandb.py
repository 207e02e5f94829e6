"""What W&B's own files say of a run that two drivers trained, without its servers. `make test-extras` runs it."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from cluster.journal import Journal, StageStarted
from cluster.metrics import RunFolder
from cluster.telemetry import Telemetry, WeightsAndBiases
from mllm.recipe import Recipe, dump
from tests.cluster.test_telemetry import step

pytestmark = pytest.mark.skipif(not find_spec("wandb"), reason="needs wandb: `make test-extras` has it")


BLOCK, HEADER = 2**15, 7
"""Of LevelDB's log format, which W&B's files have after a header of as many bytes: crc32, length, and which part of a record."""


def told(file: Path) -> Iterator[Any]:
    """The records of one of W&B's files."""
    from wandb.proto import wandb_internal_pb2  # pyright: ignore[reportMissingImports] -- an extra

    data, at, whole = file.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # too little of the block is left for another header
            at += BLOCK - at % BLOCK
            continue
        _, length, part = struct.unpack("<IHB", data[at : at + HEADER])
        whole += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if part in (1, 4):  # a whole one, or the last of its parts
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def driven(run: RunFolder, recipe: Recipe, steps: range) -> list[str]:
    """A driver that sees these steps of the first stage; what it says of its sink, which is nothing where all is well."""
    said: list[str] = []
    telemetry = Telemetry(run, recipe, [WeightsAndBiases(run.name, run.root / "wandb", recipe)], said.append)
    telemetry._look()
    for number in steps:
        run.write_step(recipe.stages[0].name, step(number))
    run.flush_steps()
    with telemetry:
        pass
    return said


def test_a_run_is_one_run_there_whoever_drives_it(
    tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = RunFolder(tmp_path / "night")
    begun = StageStarted(time=1.0, stage=recipe.stages[0].name, fingerprint="f", steps=10, parts=())
    Journal(run.root).append(begun)
    assert driven(run, recipe, range(1, 4)) == driven(run, recipe, range(4, 6)) == []
    records = [record for file in sorted(tmp_path.rglob("*.wandb")) for record in told(file)]
    runs = [record.run for record in records if record.HasField("run")]
    assert {(one.project, one.display_name) for one in runs} == {("mllm", "night")}
    assert len({one.run_id for one in runs}) == 1
    rows = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    loss = f"{recipe.stages[0].name}/loss"
    assert {row["step"]: row[loss] for row in rows if loss in row} == dict.fromkeys(range(1, 6), 2.0)
    config = {item.key: json.loads(item.value_json) for one in runs for item in one.config.update}
    assert config["name"] == json.loads(dump(recipe))["name"]
