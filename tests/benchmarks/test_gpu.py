"""The benchmark of GPUs runs anywhere at toy size, end to end, and its committed table lists what it measures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common import HERE
from benchmarks.gpu.device import HALF, without_liger
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.sizes import FULL
from ops.attention import available
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a toy run has written."""
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "benchmarks.gpu", "--toy", "--out", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_row_that_this_machine_can_fill_has_a_number(saved: Path) -> None:
    (file,) = saved.glob("gpu-*-toy.json")
    sections = json.loads(file.read_text())
    assert list(sections) == list(SECTIONS)
    empty = [
        (row["name"], row["note"]) for section in sections.values() for row in section["rows"] if not row["values"]
    ]
    reasons = {by: why for by, why in {**available(), "liger": without_liger(HALF)}.items() if why}
    assert [(name, why) for name, why in empty if why != reasons.get(name.split(",")[0].split(":")[0])] == []
    assert len(empty) < sum(len(section["rows"]) for section in sections.values())
    shown = file.with_suffix(".md").read_text()
    assert all(f"| {row['name']} | " in shown for section in sections.values() for row in section["rows"])


def test_the_table_that_nobody_has_filled_lists_every_row_and_no_number() -> None:
    lines = (HERE / "results" / "gpu.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    measured = [row for row in rows if row[0] not in ("what", "---")]
    listed = [row.name for section in SECTIONS.values() for case in section.cases(FULL) for row in case.rows]
    assert [row[0] for row in measured] == listed
    assert {(row[1], row[4], row[-1]) for row in measured} == {("none", "0", "not measured")}
