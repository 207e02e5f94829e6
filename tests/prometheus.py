"""A real Prometheus on loopback that scrapes what Ray's nodes export."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.s3 import free_port

PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")

ABSENT = "no prometheus binary; apt-get install prometheus"


@dataclass(frozen=True)
class Prometheus:
    """A running server. Times are seconds since 1970."""

    address: str
    since: float

    def series(self, query: str) -> list[dict[str, Any]]:
        """All series that `query` gave at any moment since the server began: their labels under "metric", and "values"."""
        words = {"query": query, "start": self.since, "end": time.time(), "step": "1s"}
        with urllib.request.urlopen(
            f"{self.address}/api/v1/query_range?{urllib.parse.urlencode(words)}", timeout=30
        ) as told:
            return json.load(told)["data"]["result"]

    def targets(self) -> list[str]:
        """Addresses that were scraped well the last time."""
        with urllib.request.urlopen(f"{self.address}/api/v1/targets?state=active", timeout=30) as told:
            found = json.load(told)["data"]["activeTargets"]
        return [target["labels"]["instance"] for target in found if target["health"] == "up"]


@contextmanager
def scraping(discovery: Path, folder: Path, rules: Path) -> Iterator[Prometheus]:
    """Scrape the targets of Ray's own file of them, `discovery`, every second, and evaluate `rules`."""
    assert PROMETHEUS
    port = free_port()
    settings = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "scrape_configs": [
            {"job_name": "ray", "file_sd_configs": [{"files": [str(discovery)], "refresh_interval": "1s"}]}
        ],
        "rule_files": [str(rules)],
    }
    (folder / "prometheus.json").write_text(json.dumps(settings))  # which YAML is a superset of
    command = [
        PROMETHEUS, f"--config.file={folder / 'prometheus.json'}", f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    log = folder / "prometheus.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=folder)
    try:
        server = Prometheus(f"http://127.0.0.1:{port}", time.time())
        end = time.monotonic() + 30
        while not _ready(server.address):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield server
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def _ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/-/ready", timeout=5):
            return True
    except OSError:
        return False
