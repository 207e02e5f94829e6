"""A run submitted to a cluster of two nodes that asks for a token: followed, stopped, submitted again, and done."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.jobs import packed
from cluster.journal import Journal
from cluster.metrics import RunFolder
from cluster.site import load_site
from mllm.recipe import load
from mllm.recipes import by_name
from tests.conftest import ROOT
from tests.heads import HERE, environment, example_site, head, node
from tests.s3 import free_port

HELD_OUT = json.dumps([{"kind": "pairs", "name": "example-pairs-heldout"}])
STEPS = 30

CHANGES = [
    word
    for change in (
        f"held_out={HELD_OUT}",
        "shots=[0]",
        "stages.align.context=256",
        "stages.align.tokens_per_step=1024",
        "stages.align.max_tiles=6",
        "stages.align.window=24",
        f"stages.align.duration.count={STEPS}",
    )
    for word in ("-s", change)
]


def mllm(*words: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.cli", *words]
    return subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A site file whose job server is that of a running cluster."""
    folder = tmp_path_factory.mktemp("submit")
    token = folder / "token"
    token.write_text(secrets.token_hex(32) + "\n")
    port = free_port()
    keys = f'jobs = "http://{HERE}:{port}"\nray_token_file = "{token}"\n'
    with (
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as session,
        head(token, session, cpus=1, dashboard=port) as address,
        node(token, address, cpus=2),
    ):
        yield example_site(folder, keys)


def test_a_submitted_run_is_followed_stopped_and_goes_on_to_its_end(site: Path) -> None:
    recipe = site.with_name("one.json")
    one = by_name("vila_smoke")
    recipe.write_text(mllm("recipes", "vila_smoke", "--json").stdout)
    text = json.loads(recipe.read_text())
    text["stages"] = text["stages"][:1]
    recipe.write_text(json.dumps(text))
    assert load(recipe.read_bytes()).model == one.model

    words = ("submit", str(recipe), "--run", "one", "--site", str(site), *CHANGES)
    first = mllm(*words)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("run one is job one-1\n"), first.stdout
    assert f"mllm logs one --site {site} --follow" in first.stdout
    assert re.search(r"dashboard +http://127.0.0.1:\d+/#/jobs/one-1\n", first.stdout)

    folder = RunFolder(site.parent / "runs" / "one")
    wait(
        lambda: folder.recipe.is_file() and len(folder.steps("align")) > 2,
        120,
        mllm("logs", "one", "--site", str(site)),
    )
    twice = mllm(*words)
    assert twice.returncode == 2
    assert twice.stderr.startswith("error: run 'one' is being trained by job one-1; follow it"), twice.stderr

    stopped = mllm("stop", "one", "--site", str(site))
    assert stopped.returncode == 0, stopped.stderr
    assert "job one-1 has stopped" in stopped.stdout
    state = Journal(folder.root).state()
    assert state.stopped
    assert not state.finished
    done = len(folder.steps("align"))
    assert 2 < done < STEPS
    assert "job one-1: stopped" in mllm("status", "one", "--site", str(site)).stdout
    again = mllm("stop", "one", "--site", str(site))
    assert again.returncode == 2
    assert "is not being trained" in again.stderr

    second = mllm(*words)
    assert second.stdout.startswith("run one is job one-2: it goes on\n"), second.stdout + second.stderr
    seen = mllm("logs", "one", "--site", str(site), "--follow")
    assert seen.returncode == 0, seen.stderr
    assert "report" in seen.stdout
    assert "Traceback" not in seen.stdout
    assert Journal(folder.root).state().finished
    steps = folder.steps("align")
    assert [record.step for record in steps] == list(range(1, STEPS + 1))
    assert folder.report.is_file()
    assert "job one-2: succeeded" in mllm("status", "one", "--site", str(site)).stdout
    nothing_is_done_twice = [event for event in Journal(folder.root).events() if event.kind == "group_started"]
    assert nothing_is_done_twice[-1].step == done


def test_no_token_and_no_key_travels(site: Path) -> None:
    here = load_site(str(site))
    here = replace(here, storage=replace(here.storage, key="AKIAPLANTED", secret="planted-secret"))
    with packed(by_name("vila_smoke"), here) as package:
        for file in package.rglob("*"):
            if file.is_file():
                text = file.read_bytes()
                assert b"planted-secret" not in text
                assert b"AKIAPLANTED" not in text
                assert (site.parent / "token").read_bytes().strip() not in text
        sent = load_site(str(package / "site.json"))
    assert sent.runs == here.runs
    assert sent.corpora == here.corpora
    assert (sent.ray_address, sent.jobs, sent.ray_token_file) == ("auto", None, None)


def test_an_address_without_a_server_and_a_wrong_token_are_told_in_a_line(site: Path, tmp_path: Path) -> None:
    nowhere = example_site(tmp_path, f'jobs = "http://{HERE}:{free_port()}"\n')
    left = mllm("submit", "vila_smoke", "--site", str(nowhere))
    assert left.returncode == 2
    assert re.match(r"error: the job server at http://127.0.0.1:\d+ does not answer", left.stderr), left.stderr
    assert "Traceback" not in left.stderr

    (tmp_path / "wrong").write_text(secrets.token_hex(32))
    address = load_site(str(site)).jobs
    wrong = example_site(tmp_path, f'jobs = "{address}"\nray_token_file = "{tmp_path / "wrong"}"\n')
    left = mllm("submit", "vila_smoke", "--site", str(wrong))
    assert left.returncode == 2
    assert left.stderr.startswith(f"error: the job server at {address} refuses this command"), left.stderr
    assert "ray get-auth-token" in left.stderr

    left = mllm("logs", "nothing", "--site", str(site))
    assert left.returncode == 2
    assert "knows no job of it" in left.stderr


def wait(there, seconds: float, told: subprocess.CompletedProcess[str]) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, told.stdout + told.stderr
        time.sleep(0.5)
