"""Where ranks say what they are at, and learn what is wished of them: an actor on the driver's node, and who looks at it.

A rank says when it begins to wait for data, to step, to save or to evaluate, and waits for no answer; the actor notes when that
came by its own clock. From how long the phases of this run took it is known how long they may take (`cluster/policy.py`). A rank
that is overdue is examined on its own node -- the state of its process, the stacks of its threads -- and ended, so that Ray
starts the group again.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from cluster.policy import Phase, Standing, Watch, allowed, overdue
from pipelines.types import spec

Wish = Literal["", "save", "save_and_stop"]

HISTORY = 1024
"""Phases of each kind that are remembered."""

TICK = 1.0
"""Seconds between two signs of life."""

LOOK = 1.0
"""Seconds between two looks of the watcher."""


class Pulse:
    """The actor. Times are of this process's own steady clock."""

    def __init__(self) -> None:
        self.now: dict[int, tuple[Phase, int, float, str, int]] = {}
        self.alive: dict[int, float] = {}
        self.history: dict[Phase, deque[float]] = defaultdict(lambda: deque(maxlen=HISTORY))
        self.wish: Wish = ""

    def beat(self, rank: int, phase: Phase, step: int, node: str, pid: int) -> Wish:
        """A rank begins a phase; what is wished of the run comes back."""
        moment = time.monotonic()
        before = self.now.get(rank)
        if before and before[4] == pid:
            self.history[before[0]].append(moment - before[2])
        self.now[rank] = phase, step, moment, node, pid
        self.alive[rank] = moment
        return self.wish

    def tick(self, rank: int, pid: int) -> Wish:
        """A rank's process runs, whatever it is at."""
        if rank in self.now and self.now[rank][4] == pid:
            self.alive[rank] = time.monotonic()
        return self.wish

    def gone(self, rank: int, pid: int) -> None:
        """A rank has ended, well or not."""
        if rank in self.now and self.now[rank][4] == pid:
            del self.now[rank]

    def ask(self, wish: Wish) -> None:
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


def start_pulse() -> Any:
    """The actor, on this node. It must not die of a worker's death, nor take a CPU from one."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(Pulse).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()


class Beats:
    """A rank's side: says what it is at without waiting, and knows the last wish that came back.

    A thread says every second that the process runs; it stands still where the process is stopped, and not where the rank
    waits for data or for others.
    """

    def __init__(self, pulse: Any, rank: int) -> None:
        import ray

        self.pulse = pulse
        self.rank = rank
        self.node = ray.get_runtime_context().get_node_id()
        self.pid = os.getpid()
        self.wish: Wish = ""
        self.stacks = stack_file(self.pid).open("w")
        faulthandler.register(signal.SIGUSR2, file=self.stacks, all_threads=True)
        self.over = threading.Event()
        threading.Thread(target=self._tick, daemon=True, name="pulse").start()

    def __call__(self, phase: Phase, step: int) -> None:
        self.pulse.beat.remote(self.rank, phase, step, self.node, self.pid)

    def _tick(self) -> None:
        import ray
        import ray.exceptions

        while not self.over.wait(TICK):
            try:
                self.wish = ray.get(self.pulse.tick.remote(self.rank, self.pid), timeout=30)
            except (ray.exceptions.RayError, TimeoutError):
                continue  # the actor is being restarted, or the cluster is in trouble of its own

    def close(self) -> None:
        self.over.set()
        self.pulse.gone.remote(self.rank, self.pid)
        faulthandler.unregister(signal.SIGUSR2)
        self.stacks.close()
        stack_file(self.pid).unlink(missing_ok=True)


def stack_file(pid: int) -> Path:
    """Where a worker's threads write their stacks when it is sent SIGUSR2."""
    return Path(tempfile.gettempdir()) / f"mllm-stacks-{pid}"


@spec
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


def end(pid: int) -> None:
    """End a process of this machine at once; nothing happens if it has ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


Hung = Callable[[Standing, str, bool], None]
"""Told of a rank that hangs: where it stands, what was found, and whether it is among those that are ended."""


class Watcher:
    """Looks at the pulse from a thread of its own; ends those who hang, and tells `hung` of every rank that was overdue."""

    def __init__(self, pulse: Any, watch: Watch, hung: Hung) -> None:
        self.pulse = pulse
        self.watch = watch
        self.hung = hung
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True, name="watcher")

    def __enter__(self) -> Watcher:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join(timeout=5)

    def _look(self) -> None:
        import ray
        import ray.exceptions

        while not self.over.wait(LOOK):
            try:
                ranks, history = ray.get(self.pulse.look.remote(), timeout=10)
                if late := overdue(self.watch, ranks, history):
                    self._end(late, history)
            except (ray.exceptions.RayError, ConnectionError, RuntimeError):
                continue  # the cluster is in trouble itself, which the controller will hear of

    def _end(self, late: list[Standing], history: dict[Phase, list[float]]) -> None:
        found = [(rank, _there(rank.node, examine, rank.pid)) for rank in late]
        for rank, finding in found:
            if finding.state == "gone":  # it died, of which Ray hears by itself
                self.pulse.gone.remote(rank.rank, rank.pid)
        found = [(rank, finding) for rank, finding in found if finding.state != "gone"]
        if not found:
            return
        guilty = [rank for rank, finding in found if not finding.waits] or [found[0][0]]
        for rank, finding in found:
            limit = allowed(self.watch, rank.phase, history.get(rank.phase, ()))
            words = (
                f"rank {rank.rank} (process {rank.pid}) has been at its {rank.phase} after step {rank.step} for "
                f"{rank.seconds:.1f} s ({limit:.1f} s are allowed) and gave its last sign of life {rank.silent:.1f} s ago; the "
                f"process is {finding.state}" + (", waiting for other ranks" if finding.waits else "")
            )
            self.hung(rank, words + (f"\n{finding.stacks}" if finding.stacks else ""), rank in guilty)
        for rank in guilty:
            _there(rank.node, end, rank.pid)
        for rank, _ in found:  # the others are ended by Ray
            self.pulse.gone.remote(rank.rank, rank.pid)


def _there(node: str, work: Callable[[int], Any], pid: int) -> Any:
    """Call `work(pid)` on the node where the process is."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.get(ray.remote(work).options(num_cpus=0, scheduling_strategy=there).remote(pid), timeout=30)
