"""Where ranks say what they are at, and learn what is wished of them: an actor on the driver's node, and who looks at it.

A rank says when it begins to wait for data, to step, to save or to evaluate, and waits for no answer; the actor notes when that
came by its own clock. From how long the phases of this run took it is known how long they may take (`cluster/policy.py`). A rank
that is overdue is examined on its own node -- the state of its process, the stacks of its threads -- and ended, so that Ray
starts the group again.
"""

from __future__ import annotations

import faulthandler
import os
import queue
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from cluster.policy import Watch, allowed, overdue
from cluster.standing import Asked, Phase, Pulse, Standing, Wish, end, examine, stack_file

TICK = 1.0
"""Seconds between two signs of life."""

LOOK = 1.0
"""Seconds between two looks of the watcher."""


def start_pulse() -> Any:
    """The actor, on this node. It must not die of a worker's death, nor take a CPU from one."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(Pulse).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()


class Beats:
    """A rank's side: says what it is at without waiting, and knows the last wish that came back.

    A thread says every second that the process runs; it stands still where the process is stopped, and not where the rank
    waits for data or for others. Another hands on what the rank says: a call of an actor takes half a millisecond, which is
    not a step's.
    """

    def __init__(self, pulse: Any, rank: int) -> None:
        import ray

        self.pulse = pulse
        self.rank = rank
        self.node = ray.get_runtime_context().get_node_id()
        self.pid = os.getpid()
        self.wish: Wish = ""
        self.asked: Asked | None = None
        self.stacks = stack_file(self.pid).open("w")
        faulthandler.register(signal.SIGUSR2, file=self.stacks, all_threads=True)
        self.over = threading.Event()
        self.said: queue.SimpleQueue[tuple[Phase, int] | None] = queue.SimpleQueue()
        self.messenger = threading.Thread(target=self._hand_on, daemon=True, name="beats")
        self.messenger.start()
        threading.Thread(target=self._tick, daemon=True, name="pulse").start()

    def __call__(self, phase: Phase, step: int) -> None:
        self.said.put((phase, step))

    def _hand_on(self) -> None:
        import ray.exceptions

        while (beat := self.said.get()) is not None:
            with suppress(ray.exceptions.RayError):  # a cluster in trouble, as for signs of life
                self.pulse.beat.remote(self.rank, *beat, self.node, self.pid)

    def _tick(self) -> None:
        import ray
        import ray.exceptions

        while not self.over.wait(TICK):
            try:
                self.wish, asked = ray.get(self.pulse.tick.remote(self.rank, self.pid), timeout=30)
            except (ray.exceptions.RayError, TimeoutError):
                continue  # the actor is being restarted, or the cluster is in trouble of its own
            self.asked = asked or self.asked

    def close(self) -> None:
        self.over.set()
        self.said.put(None)
        self.messenger.join()
        self.pulse.gone.remote(self.rank, self.pid)
        faulthandler.unregister(signal.SIGUSR2)
        self.stacks.close()
        stack_file(self.pid).unlink(missing_ok=True)


Hung = Callable[[Standing, str, bool], None]
"""Told of a rank that hangs: where it stands, what was found, and whether it is among those that are ended."""


class Watcher:
    """Looks at the pulse from a thread of its own; ends those who hang, and tells `hung` of every rank that was overdue.

    `trains` is called once, when the first step has been taken. An `error` that it met is kept for who began it: nobody watches
    from then on.
    """

    def __init__(self, pulse: Any, watch: Watch, hung: Hung, trains: Callable[[], object] = lambda: None) -> None:
        self.pulse = pulse
        self.watch = watch
        self.hung = hung
        self.trains: Callable[[], object] | None = trains
        self.over = threading.Event()
        self.error: Exception | None = None
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
                if self.trains and history.get("step"):
                    self.trains()
                    self.trains = None
                if late := overdue(self.watch, ranks, history):
                    self._end(late, history)
            except (ray.exceptions.RayError, ConnectionError, RuntimeError):
                continue  # the cluster is in trouble itself, which the controller will hear of
            except Exception as error:
                self.error = error
                return

    def _end(self, late: list[Standing], history: dict[Phase, list[float]]) -> None:
        found = [(rank, there(rank.node, examine, rank.pid)) for rank in late]
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
            there(rank.node, end, rank.pid)
        for rank, _ in found:  # the others are ended by Ray
            self.pulse.gone.remote(rank.rank, rank.pid)


def there(node: str, work: Callable[[int], Any], pid: int) -> Any:
    """Call `work(pid)` on the node where the process is."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    place = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.get(ray.remote(work).options(num_cpus=0, scheduling_strategy=place).remote(pid), timeout=30)
