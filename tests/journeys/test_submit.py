"""A run submitted to a cluster of two nodes that asks for a token: followed, stopped, submitted again, and done."""

from __future__ import annotations

import gzip
import json
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from cluster.gauges import PHASE, TOKENS
from cluster.grafana import ALERTS, queries, write
from cluster.jobs import packed
from cluster.journal import Journal
from cluster.metrics import RunFolder
from cluster.phases import PHASES
from cluster.site import load_site
from mllm.recipe import load
from mllm.recipes import by_name
from pipelines.storage import Storage
from tests.conftest import ROOT
from tests.heads import HERE, environment, example_site, head, node
from tests.prometheus import ABSENT, PROMETHEUS, Prometheus, scraping
from tests.s3 import BUCKET, Server, free_port

pytestmark = pytest.mark.timeout(900)  # the first test to ask for it waits for the whole journey

HELD_OUT = json.dumps([{"kind": "pairs", "name": "example-pairs-heldout"}])
STEPS = 60

CHANGES = [
    word
    for change in (
        f"held_out={HELD_OUT}",
        "shots=[0]",
        "stages.align.context=256",
        "stages.align.tokens_per_step=1024",
        "stages.align.max_tiles=6",
        "stages.align.window=24",
        "stages.align.save_every=10",
        f"stages.align.duration.count={STEPS}",
    )
    for word in ("-s", change)
]


def mllm(*words: str, timeout: float = 800) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.cli", *words]
    return subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def good(*words: str) -> str:
    """What a command says that ends well."""
    told = mllm(*words)
    assert told.returncode == 0, told.stdout + told.stderr
    return told.stdout


@dataclass(frozen=True)
class Cluster:
    """A running cluster of two nodes: a site file that has its job server, its head's address, its token, Ray's own folder."""

    site: Path
    address: str
    token: Path
    session: Path

    @property
    def folder(self) -> RunFolder:
        """Of the run `one`."""
        return RunFolder(self.site.parent / "runs" / "one")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
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
        yield Cluster(example_site(folder, keys), address, token, Path(session))


@pytest.fixture(scope="module")
def site(cluster: Cluster) -> Path:
    return cluster.site


@pytest.fixture(scope="module")
def monitor(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus | None]:
    """Prometheus, where there is one."""
    if PROMETHEUS is None:
        yield None
        return
    folder = tmp_path_factory.mktemp("prometheus")
    _, rules = write(folder)
    with scraping(cluster.session / "prom_metrics_service_discovery.json", folder, rules) as server:
        yield server


@dataclass(frozen=True)
class Journey:
    """What commands said: a run that was submitted, looked into, stopped, and submitted again to its end."""

    first: str
    twice: subprocess.CompletedProcess[str]
    profiled: str
    stopped: str
    done: int
    halted: str
    again: subprocess.CompletedProcess[str]
    second: str
    followed: str


@pytest.fixture(scope="module")
def journey(cluster: Cluster, monitor: Prometheus | None) -> Journey:  # noqa: ARG001 -- it looks on
    site = str(cluster.site)
    recipe = cluster.site.with_name("one.json")
    text = json.loads(good("recipes", "vila_smoke", "--json"))
    text["stages"] = text["stages"][:1]
    recipe.write_text(json.dumps(text))
    assert load(recipe.read_bytes()).model == by_name("vila_smoke").model
    words = ("submit", str(recipe), "--run", "one", "--site", site, *CHANGES)
    first = good(*words)
    folder = cluster.folder
    wait(
        lambda: folder.recipe.is_file() and len(folder.steps("align")) > 2,
        300,
        lambda: mllm("logs", "one", "--site", site).stdout,
    )
    twice = mllm(*words)
    profiled = good("profile", "one", "--rank", "0", "--steps", "2", "--site", site)
    stopped = good("stop", "one", "--site", site)
    done = len(folder.steps("align"))
    state = Journal(folder.root).state()
    assert state.stopped
    assert not state.finished
    halted = good("status", "one", "--site", site)
    again = mllm("stop", "one", "--site", site)
    second = good(*words)
    followed = good("logs", "one", "--site", site, "--follow")
    return Journey(first, twice, profiled, stopped, done, halted, again, second, followed)


def test_a_submitted_run_is_followed_stopped_and_goes_on_to_its_end(cluster: Cluster, journey: Journey) -> None:
    assert "\nrun one is job one-1\n" in journey.first
    assert f"mllm logs one --site {cluster.site} --follow" in journey.first
    assert re.search(r"dashboard +http://127.0.0.1:\d+/#/jobs/one-1\n", journey.first)
    assert journey.twice.returncode == 2
    assert journey.twice.stderr.startswith("error: run 'one' is being trained by job one-1; follow it")
    assert "job one-1 has stopped" in journey.stopped
    assert "job one-1: stopped" in journey.halted
    assert journey.again.returncode == 2
    assert "is not being trained" in journey.again.stderr
    assert "\nrun one is job one-2: it goes on\n" in journey.second
    assert "report" in journey.followed
    assert "Traceback" not in journey.followed

    folder = cluster.folder
    assert 2 < journey.done < STEPS
    assert Journal(folder.root).state().finished
    assert [record.step for record in folder.steps("align")] == list(range(1, STEPS + 1))
    assert folder.report.is_file()
    assert "job one-2: succeeded" in good("status", "one", "--site", str(cluster.site))
    nothing_is_done_twice = [event for event in Journal(folder.root).events() if event.kind == "group_started"]
    assert nothing_is_done_twice[-1].step == journey.done


def test_a_run_that_goes_is_looked_into_and_goes_on(cluster: Cluster, journey: Journey) -> None:
    """The trace is of the rank's own steps and the stacks are of its threads; nobody began again for it."""
    trace, stacks = (Path(line.split()[1]) for line in journey.profiled.splitlines())
    assert trace.resolve().parent == (cluster.folder.root / "profile").path
    with gzip.open(ROOT / trace) as file:
        events = json.load(file)["traceEvents"]
    names = Counter(event.get("name") for event in events)
    assert names["aten::mm"] > 10
    words = (ROOT / stacks).read_text()
    assert "MainThread" in words or "Thread" in words
    assert re.search(r"worker\.py|_train|train", words), words
    groups = Journal(cluster.folder.root).state().groups
    assert len(groups) == 2, "one for each of its two jobs"
    gone = mllm("profile", "one", "--site", str(cluster.site))
    assert gone.returncode == 2
    assert "is not being trained, so there is nothing to look into" in gone.stderr


@pytest.mark.skipif(PROMETHEUS is None, reason=ABSENT)
@pytest.mark.usefixtures("journey")
def test_prometheus_has_data_for_every_panel_and_takes_the_rules(monitor: Prometheus) -> None:
    """Of a run on CPUs; no panel asks for what only GPUs tell."""
    assert len(monitor.targets()) >= 2, "both nodes are scraped, by Ray's own list of them"
    empty = [query for query in queries() if not monitor.series(query)]
    assert empty == []
    rate = monitor.series(f"rate({TOKENS.exported}_total[30s])")
    assert max(float(value) for one in rate for _, value in one["values"]) > 0
    phases = {one["metric"]["phase"] for one in monitor.series(PHASE.exported)}
    assert phases == set(PHASES)
    for alert in ALERTS:
        monitor.series(alert.when)  # which raises where Prometheus cannot read it


def test_the_cluster_s_nodes_are_asked_and_what_would_stop_a_run_is_told_at_once(
    cluster: Cluster, tmp_path: Path, s3: Server
) -> None:
    """Through the job server a sound site; at the head's address one of wrong keys, a corpus that is gone, too many trainers."""
    site = cluster.site
    asked = mllm("doctor", "vila_smoke", "--site", str(site), "--json")
    assert asked.returncode == 0, asked.stdout + asked.stderr
    found = {one["what"]: one for one in json.loads(asked.stdout)["findings"]}
    assert found["cluster"]["found"] == "2 nodes, 3 CPUs, 0 GPUs"
    assert found["CPUs"]["found"] == "1 trainer x 1 + 1 preprocessor x 1 = 2 CPUs of the cluster's 3"
    assert "the same on all 2: python 3." in found["versions"]["found"]
    for folder in ("runs", "cache"):
        assert re.search(r"created, read and removed from every node; writes [\d,]+", found[folder]["found"])
    assert "read from every node: example-pairs" in found["corpora"]["found"]
    assert re.search(r"[\d.]+ GB/s: 32 MiB added together by 2 processes on 2 nodes \(gloo\)", found["links"]["found"])
    assert found["metrics"]["found"].startswith("every node answers")
    assert not any((site.parent / "runs").glob(".doctor-*")), "nothing is left behind"

    wrong = replace(s3.storage, secret="not-the-secret")
    keys = f'ray_address = "{cluster.address}"\nray_token_file = "{cluster.token}"\n'
    bad = example_site(tmp_path, keys)
    words = re.sub(r"(?m)^runs = .*$", f'runs = "s3://{BUCKET}/runs"', bad.read_text())
    words = re.sub(r"(?m)^workers = .*$", "workers = 9", words)
    words = re.sub(r"(?m)^example-pages = .*$", f'example-pages = "{tmp_path}/gone.jsonl"', words)
    words = words.replace("[corpora]", f"[storage]\n{toml(wrong)}\n[corpora]")
    bad.write_text(words)
    stopped = mllm("train", "vila_smoke", "--site", str(bad))
    assert stopped.returncode == 2, stopped.stdout + stopped.stderr
    assert stopped.stderr.startswith("error: the run cannot begin, 3 things stand in its way"), stopped.stderr
    assert (
        "CPUs: 9 trainers x 1 + 1 preprocessor x 1 = 10 CPUs of the cluster's 3; take fewer workers" in stopped.stderr
    )
    assert re.search(
        r"runs: s3://corpus/runs from every node: PermissionError: .*; let nodes write there", stopped.stderr
    )
    assert re.search(rf"corpus example-pages: .*{tmp_path}/gone.jsonl.*; mend", stopped.stderr)
    assert not (site.parent / "runs" / "vila_smoke").exists()


def toml(storage: Storage) -> str:
    return "\n".join(
        f"{name} = {json.dumps(getattr(storage, name))}" for name in ("endpoint", "region", "key", "secret")
    )


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


def wait(there: Callable[[], bool], seconds: float, told: Callable[[], str]) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, told()
        time.sleep(0.5)
