"""What every benchmark shares: rows with median and range, the machine's description, temporary folders, processes, bytes."""

from __future__ import annotations

import gc
import multiprocessing
import os
import platform
import queue
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.queues import Queue
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
CACHE = HERE / ".cache"

HEAD = ("what", "median", "unit", "range", "n", "goal", "met", "note")

PRELOAD = ["cluster.fsdp", "pipelines.windows", "transformers.models.clip.modeling_clip", "transformers.models.llama"]
"""What ranks import, imported once for all of them."""

DEADLINE = 120.0
"""Seconds within which ranks must be done: they wait for each other for ever if one of them skips a collective."""


@dataclass
class Row:
    """One line of a table: all repetitions of one number, none where it could not be had (the note says why).

    A goal is for the median.
    """

    name: str
    unit: str
    values: list[float]
    note: str = ""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def median(self) -> float:
        return median(self.values) if self.values else float("nan")

    @property
    def met(self) -> bool:
        """Whether the goal, if there is one, is reached; what could not be measured reaches none."""
        above = self.at_least is None or self.median >= self.at_least
        return above and (self.at_most is None or self.median <= self.at_most)

    def cells(self) -> list[str]:
        spread = f"{number(min(self.values))} to {number(max(self.values))}" if len(self.values) > 1 else ""
        goals = [f">= {self.at_least:g}"] if self.at_least is not None else []
        goals += [f"<= {self.at_most:g}"] if self.at_most is not None else []
        met = ("yes" if self.met else "no") if goals and self.values else ""
        middle = number(self.median) if self.values else "none"
        return [self.name, middle, self.unit, spread, str(len(self.values)), " and ".join(goals), met, self.note]


@dataclass
class Section:
    """One benchmark's result. `about` is its module's docstring."""

    name: str
    about: str
    rows: list[Row] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(
        self,
        name: str,
        unit: str,
        values: Sequence[float],
        note: str = "",
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        self.rows.append(Row(name, unit, list(values), note, at_least, at_most))


def table(section: dict[str, Any]) -> list[str]:
    """A section, as saved, in Markdown."""
    lines = [f"## {section['name']}", "", section["about"], "", *(f"- {line}" for line in section["header"])]
    lines += [f"- {fact}" for fact in section["facts"]] + ["", _cells(HEAD), _cells(["---"] * len(HEAD))]
    return lines + [_cells(Row(**row).cells()) for row in section["rows"]] + [""]


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def number(value: float) -> str:
    """Three significant digits, never in powers of ten unless the number is tiny."""
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Ratio of neighbouring repetitions: each pair was measured one right after the other."""
    return [a / b for a, b in zip(over, under, strict=True)]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def machine() -> tuple[str, list[str]]:
    """A short name for the machine and the lines of a header. Neither names the host."""
    import torch

    device = torch.cuda.get_device_name(0).replace(" ", "-").lower() if torch.cuda.is_available() else "cpu"
    lines = [
        f"{cores()} cores, {_first('/proc/cpuinfo', 'model name')}, {_memory()}",
        f"python {platform.python_version()}, torch {torch.__version__}, ray {version('ray')}",
        f"{datetime.now(UTC):%Y-%m-%d}, load average at the start {os.getloadavg()[0]:.2f}",
    ]
    return f"{cores()}-cores-{device}", lines


def _first(file: str, key: str) -> str:
    path = Path(file)
    for line in path.read_text().splitlines() if path.is_file() else []:
        if line.startswith(key):
            return line.split(":", 1)[1].strip()
    return f"unknown {key}"


def _memory() -> str:
    words = _first("/proc/meminfo", "MemTotal").split()
    return f"{int(words[0]) / 2**20:.0f} GiB" if words[0].isdigit() else "unknown memory"


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder on the disk that runs are written to, gone afterwards."""
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` in a fresh process, so that no benchmark inherits another's threads or memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@contextmanager
def alone(backend: str = "gloo") -> Iterator[None]:
    """A process group of this process only: what the engine runs in with one worker."""
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` on each of `world` ranks of a gloo group, one thread each; their results in rank order.

    Raises RuntimeError with the first rank's traceback, or naming the ranks that are not done after `DEADLINE` seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)  # imports are most of a fresh process's first seconds
    results: Queue[tuple[int, Any, str]] = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        started = [
            context.Process(target=_rank, args=(rank, world, f"{folder}/meet", results, function, arguments))
            for rank in range(world)
        ]
        for process in started:
            process.start()
        try:
            values = _collect(results, world)
            for process in started:
                process.join(timeout=30)
        finally:
            for process in started:
                process.kill()
                process.join()
    return [values[rank] for rank in range(world)]


def _collect(results: Queue[tuple[int, Any, str]], world: int) -> dict[int, Any]:
    values: dict[int, Any] = {}
    ends = time.monotonic() + DEADLINE
    while len(values) < world:
        try:
            rank, value, error = results.get(timeout=max(0.0, ends - time.monotonic()))
        except queue.Empty:
            late = sorted(set(range(world)) - set(values))
            raise RuntimeError(f"ranks {late} of {world} have not come to an end in {DEADLINE:.0f} s") from None
        if error:
            raise RuntimeError(f"rank {rank}:\n{error}")
        values[rank] = value
    return values


def _rank(
    rank: int, world: int, meet: str, results: Queue[Any], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world)
    try:
        results.put((rank, function(*arguments), ""))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        dist.destroy_process_group()


def peak_bytes(act: Callable[[], Any]) -> int:
    """The most that torch's CPU allocator holds during `act()`, above what it holds before: by its own events."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        act()
    results: Any = seen.profiler
    now = peak = 0
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
