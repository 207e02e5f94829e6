"""Seconds from the command `mllm train vila_smoke --workers 2` to the first step's line on disk.

The limit is what Python, torch and Ray take before anybody's own code runs: a script that imports both, starts a local Ray and
two actors that import torch, and calls them once. Fair because both are commands timed from outside, on the same machine, one
after the other, each with a Ray of its own; the run's folder and cache are new each time. Not in the limit, and so in the
ratio: transformers' import, the model, the preprocessing actors, the process group, and the step itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.common import Section, ratios, scratch
from cluster.local import QUIET
from cluster.site import EXAMPLE, Site, load_site

FLOOR = """
import logging, ray, torch
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)

@ray.remote
class Actor:
    def __init__(self):
        import torch
        self.ones = torch.ones(2)
    def sum(self):
        return float(self.ones.sum())

actors = [Actor.remote() for _ in range(2)]
assert sum(ray.get([actor.sum.remote() for actor in actors])) == 4
print("up", flush=True)
ray.shutdown()
"""
PATIENCE = 180.0


def write_site(site: Site, file: Path) -> None:
    def table(name: str, entries: dict[str, str] | dict[str, str | list[str]]) -> list[str]:
        return [f"[{name}]", *(f'"{key}" = {value!r}' for key, value in entries.items())]

    lines = [f"runs = {site.runs!r}", f"cache = {site.cache!r}", "preprocessors = 1"]
    file.write_text("\n".join([*lines, *table("corpora", site.corpora), *table("weights", site.weights)]) + "\n")


def seconds_to_first_step(folder: Path) -> float:
    site = folder / "site.toml"
    write_site(replace(load_site(str(EXAMPLE)), runs=str(folder / "runs"), cache=str(folder / "cache")), site)
    command = [str(Path(sys.executable).parent / "mllm"), "train", "vila_smoke", "--workers", "2", "--site", str(site)]
    command += ["--run", "bench", "-s", "held_out=[]", "stages.align.duration.count=3"]
    steps = folder / "runs" / "bench" / "steps"
    log = folder / "output.txt"
    with log.open("wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while not any(b"\n" in line.read_bytes() for line in steps.glob("align-*.jsonl")):
                if process.poll() is not None or time.perf_counter() - started > PATIENCE:
                    raise RuntimeError(f"no first step (exit code {process.poll()}):\n{log.read_text()[-2000:]}")
                time.sleep(0.02)
            return time.perf_counter() - started
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C, and the command's own session is ended if that does not."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def seconds_of_floor() -> float:
    environment = {**QUIET, **os.environ}
    command = [sys.executable, "-c", FLOOR]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != b"up":
            raise RuntimeError("the limit's own Ray did not start")
        return time.perf_counter() - started
    finally:
        process.wait()


def measure(section: Section, quick: bool) -> None:
    floors: list[float] = []
    ours: list[float] = []
    for _ in range(1 if quick else 2):
        floors.append(seconds_of_floor())
        with scratch() as folder:
            ours.append(seconds_to_first_step(folder))
    section.add("torch and Ray with two actors", "s", floors, "the limit")
    section.add("mllm train to its first step", "s", ours, "2 workers, 1 preprocessor, nothing held out")
    section.add("train / limit", "ratio", ratios(ours, floors))
