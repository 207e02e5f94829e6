"""What ranks are at, as an actor keeps it and as one sees it on a process itself.

Ray starts processes of their own for what is here, on any node and in a hurry: it imports nothing that takes long.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict, deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Phase = Literal["start", "data", "step", "save", "evaluate"]
"""What a rank is at."""

Wish = Literal["", "save", "save_and_stop", "save_and_leave"]

HISTORY = 1024
"""Phases of each kind that are remembered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What a rank is at and for how many seconds, as it last said; `silent` are the seconds since its last sign of life."""

    rank: int
    phase: Phase
    step: int
    seconds: float
    silent: float
    node: str
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """That a rank trace its next `steps` steps; `number` is the question's."""

    number: int
    steps: int


class Pulse:
    """The actor. Times are of this process's own steady clock."""

    def __init__(self) -> None:
        self.now: dict[int, tuple[Phase, int, float, str, int]] = {}
        self.alive: dict[int, float] = {}
        self.history: dict[Phase, deque[float]] = defaultdict(lambda: deque(maxlen=HISTORY))
        self.wish: Wish = ""
        self.asked: dict[int, Asked] = {}

    def beat(self, rank: int, phase: Phase, step: int, node: str, pid: int) -> Wish:
        """A rank begins a phase; what is wished of the run comes back."""
        moment = time.monotonic()
        before = self.now.get(rank)
        if before and before[4] == pid:
            self.history[before[0]].append(moment - before[2])
        self.now[rank] = phase, step, moment, node, pid
        self.alive[rank] = moment
        return self.wish

    def tick(self, rank: int, pid: int) -> tuple[Wish, Asked | None]:
        """A rank's process runs, whatever it is at. It gets what is wished of the run, and once what it alone is asked for."""
        if rank not in self.now or self.now[rank][4] != pid:
            return self.wish, None
        self.alive[rank] = time.monotonic()
        return self.wish, self.asked.pop(rank, None)

    def profile(self, rank: int, asked: Asked) -> None:
        """Ask a rank to trace steps."""
        self.asked[rank] = asked

    def gone(self, rank: int, pid: int) -> None:
        """A rank has ended, well or not."""
        if rank in self.now and self.now[rank][4] == pid:
            del self.now[rank]

    def disband(self) -> None:
        """The group has failed: what its ranks were at is past. Raylets tell of a death sooner than silence does."""
        self.now.clear()

    def ask(self, wish: Wish) -> None:
        """Wish something of the run; nothing takes the place of that it stop."""
        if self.wish == "save_and_stop":
            return
        self.wish = wish

    def look(self) -> tuple[list[Standing], dict[Phase, list[float]]]:
        moment = time.monotonic()
        ranks = [
            Standing(
                rank=rank,
                phase=phase,
                step=step,
                seconds=moment - since,
                silent=moment - self.alive[rank],
                node=node,
                pid=pid,
            )
            for rank, (phase, step, since, node, pid) in sorted(self.now.items())
        ]
        return ranks, {phase: list(seconds) for phase, seconds in self.history.items()}


def stack_file(pid: int) -> Path:
    """Where a worker's threads write their stacks when it is sent SIGUSR2."""
    return Path(tempfile.gettempdir()) / f"mllm-stacks-{pid}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was found of a process: its state in the system's words (`stopped`, `sleeping`), and its stacks if it gave any."""

    pid: int
    state: str
    stacks: str

    @property
    def waits(self) -> bool:
        """Whether the training thread stands in a collective: it waits for another rank."""
        return any(word in self.stacks for word in ("distributed_c10d.py", "_functional_collectives.py", "in wait"))


def examine(pid: int) -> Finding:
    """Look at a process of this machine."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        state = next(line.split("(")[1].rstrip(")") for line in lines if line.startswith("State:"))
    except (OSError, StopIteration, IndexError):
        return Finding(pid=pid, state="gone", stacks="")
    file = stack_file(pid)
    if state.startswith(("stopped", "tracing", "zombie")) or not file.is_file():
        return Finding(pid=pid, state=state, stacks="")
    before = file.stat().st_size
    os.kill(pid, signal.SIGUSR2)
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline and file.stat().st_size == before:
        time.sleep(0.05)
    time.sleep(0.1)  # the last lines of the last thread
    return Finding(pid=pid, state=state, stacks=file.read_text()[before:])


def stacks(pid: int) -> str:
    """Where the threads of a process of this machine stand: by py-spy, or, where that may not look, by Python's own word."""
    found = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    why = "py-spy is not installed"
    if found:
        try:
            told = subprocess.run([found, "dump", "--pid", str(pid)], capture_output=True, text=True, timeout=20)
        except subprocess.TimeoutExpired:
            why = "py-spy took longer than 20 s"
        else:
            if told.returncode == 0:
                return told.stdout
            why = told.stderr.strip()
    return f"{why}\nso here is what the process says of itself (faulthandler):\n\n{examine(pid).stacks}"


def end(pid: int) -> None:
    """End a process of this machine at once; nothing happens if it has ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
