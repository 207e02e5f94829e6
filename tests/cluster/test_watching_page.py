"""docs/watching.md says what holds: its site is read, its metrics are those exported."""

from __future__ import annotations

import re
from pathlib import Path

from cluster import gauges
from cluster.site import load_site
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "watching.md").read_text()
LINES = [line.removeprefix("    ") for line in PAGE.splitlines() if re.match(r"    \S", line)]


def test_the_site_is_read(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text("\n".join(line for line in LINES if not line.startswith("mllm ")))
    site = load_site(str(tmp_path / "site.toml"))
    assert site.jobs == "http://head:8265"
    assert site.sinks == ("tensorboard", "wandb")


def test_every_metric_is_told_and_no_other() -> None:
    table = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    told = {f"ray_mllm_{name}" for cell in table for name in re.findall(r"`(\w+)`", cell)}
    every = (*gauges.OF_RUN, *gauges.OF_RANKS)
    assert told == {f"{metric.exported}{'_total' if metric.counter else ''}" for metric in every}
