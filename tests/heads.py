"""A real Ray cluster on this machine for tests that join one: `ray start`, with a token, ended with all its processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.s3 import free_port

HERE = "127.0.0.1"


def environment() -> dict[str, str]:
    """This process's environment without what it tells Ray."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


@contextmanager
def head(token: Path, session: str, cpus: int = 1, dashboard: int | None = None) -> Iterator[str]:
    """A head that asks for the token, and its address. With `dashboard` it serves that, and jobs, at this port."""
    port = free_port()
    words = ["--head", f"--port={port}", f"--temp-dir={session}", f"--ray-client-server-port={free_port()}"]
    served = [] if dashboard is None else ["--dashboard-host", HERE, f"--dashboard-port={dashboard}"]
    words += [f"--include-dashboard={'false' if dashboard is None else 'true'}", *served]
    with _node(token, words, cpus, "head"):
        yield f"{HERE}:{port}"


@contextmanager
def node(token: Path, address: str, cpus: int = 1) -> Iterator[None]:
    """Another node of the cluster at `address`, with a folder of its own as another machine has: nodes that share one take the
    packages of jobs away from each other.
    """
    with (
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as session,
        _node(token, [f"--address={address}", f"--temp-dir={session}"], cpus, "node"),
    ):
        yield


@contextmanager
def _node(token: Path, words: list[str], cpus: int, name: str) -> Iterator[None]:
    ray = Path(sys.executable).with_name("ray")
    command = [
        str(ray), "start", "--block", f"--num-cpus={cpus}", f"--node-ip-address={HERE}", "--object-store-memory=100000000",
        f"--dashboard-agent-listen-port={free_port()}", f"--metrics-export-port={free_port()}", *words,
    ]  # fmt: skip
    settings = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_metrics_report_interval_ms": "1000",  # by default ten times as long, which is longer than some runs here
        "PATH": f"{ray.parent}:{os.environ['PATH']}",  # jobs say `python`
    }
    log = token.with_name(f"{name}.log")
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=environment() | settings, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        end = time.monotonic() + 120
        while b"Ray runtime started" not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # asked kindly, it takes its time
        process.wait()


def example_site(folder: Path, keys: str) -> Path:
    """The example site as a file in `folder`, with its addresses made absolute and `keys` at its head."""
    example = Path(__file__).resolve().parents[1] / "examples" / "site.toml"
    words = "".join(line for line in example.read_text().splitlines(keepends=True) if not line.startswith("runs ="))
    words = words.replace('"../', f'"{example.parent.parent}/')
    for name in ("corpus/", "tokenizer"):
        words = words.replace(f'"{name}', f'"{example.parent}/{name}')
    site = folder / "site.toml"
    site.write_text(f'runs = "{folder / "runs"}"\n' + keys + words)
    return site
