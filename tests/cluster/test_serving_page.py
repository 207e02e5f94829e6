"""docs/serving.md says what holds: its commands are ones there are, its site is read, its request is answered by no error."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
import tyro

from cluster.commands import Command
from cluster.serving import wire
from cluster.site import load_site
from mllm.tasks import TaskName
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "serving.md").read_text()
LINES = [line.removeprefix("    ") for line in PAGE.splitlines() if re.match(r"    \S", line)]
COMMANDS = [shlex.split(line.partition(" #")[0]) for line in LINES if line.startswith("mllm ")]
NAMES = {"eval": "evaluate"}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_is_read(words: list[str]) -> None:
    told = tyro.cli(
        Command,  # type: ignore[arg-type]  # a union of types is no type to checkers; tyro takes it
        args=words[1:],
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    assert type(told).__name__.lower() == NAMES.get(words[1], words[1])


def test_the_site_is_read(tmp_path: Path) -> None:
    text = PAGE[PAGE.index("    # site.toml") :]
    (tmp_path / "site.toml").write_text("\n".join(line.removeprefix("    ") for line in text.splitlines()))
    serving = load_site(str(tmp_path / "site.toml")).serve
    assert (serving.host, serving.replicas, serving.gpus, serving.waiting) == ("0.0.0.0", 2, 1, 256)
    assert serving.limits.pixels == 25_000_000


def test_the_request_is_one() -> None:
    (body,) = re.findall(r"-d '(\{.*\})'", PAGE)
    asked = wire.read(body.encode())
    assert asked.model == "vila_7b"
    assert asked.sampling.max_tokens == json.loads(body)["max_tokens"]


def test_every_task_is_told() -> None:
    table = "".join(line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`(\w+)`", table)) == set(get_args(TaskName))
