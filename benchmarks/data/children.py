"""A loader in a process of its own, and the memory of its whole process tree while it runs.

Memory is proportional set size, so what processes share counts once; Ray's object store counts as far as it is used. It is
sampled once a second by this process, which does nothing else, in the same way for every loader.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.data.corpus import ROOT
from benchmarks.data.work import STARTED

EVERY = 1.0
"""Seconds between two samples of memory."""


class Failed(Exception):
    """A child did not do its work; the message is the last that it said."""


@dataclass(frozen=True)
class Outcome:
    """What a child printed, and its tree's bytes of memory, second by second."""

    report: dict[str, Any]
    memory: tuple[int, ...]

    @property
    def peak(self) -> float:
        return max(self.memory, default=0) / 1e9


def run(python: Path | str, arguments: Sequence[str], folder: Path, limit: float = 900) -> Outcome:
    """`python -m arguments...` with its caches in `folder`; its last line is its report. Raises Failed."""
    caches = folder / "cache"
    caches.mkdir(exist_ok=True)
    environment = {
        **os.environ,
        STARTED: str(time.monotonic()),
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HOME": str(caches / "hf"),
        "HF_HUB_OFFLINE": "1",
        "LITDATA_CACHE_DIR": str(caches / "lit"),
        "DATA_OPTIMIZER_CACHE_FOLDER": str(caches / "lit-optimize"),
        "DATA_OPTIMIZER_DATA_CACHE_FOLDER": str(caches / "lit-data"),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with (caches / f"{arguments[0]}.{arguments[1]}.log").open("w+b") as log:
        child = subprocess.Popen(
            [str(python), "-m", *arguments],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        memory, tree = watched(child, time.monotonic() + limit)
        said = child.communicate()[0].strip().splitlines()
        end(tree)
        log.seek(0)
        errors = log.read().decode(errors="replace").strip().splitlines()
    try:
        return Outcome(json.loads(said[-1]), memory)
    except (IndexError, ValueError) as error:
        raise Failed(errors[-1] if errors else f"exit status {child.returncode}, no word") from error


def watched(child: subprocess.Popen[str], until: float) -> tuple[tuple[int, ...], list[psutil.Process]]:
    """Memory of the child's tree until it ends or is ended, and who was in the tree."""
    root, memory, tree = psutil.Process(child.pid), [], []
    while child.poll() is None:
        if time.monotonic() > until:
            child.send_signal(signal.SIGKILL)
        with contextlib.suppress(psutil.Error):
            tree = root.children(recursive=True)
            memory.append(sum(map(proportional, [root, *tree])))
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(EVERY)
    return tuple(memory), tree


def proportional(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except (psutil.Error, OSError):
        return 0


def end(tree: Sequence[psutil.Process]) -> None:
    """A loader's workers that outlived it: they were told nothing when it left."""
    for process in tree:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(list(tree), timeout=10)
