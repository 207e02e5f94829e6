"""Keeps a run's driver alive: `mllm train` is two processes, one that drives the run and this one, which does nothing else.

A driver that is killed (by the system for its memory, by a person, by a fault of a library) or that loses its cluster is started
again, and finds in the journal what was done. One that ends by itself, well or with an error that trying again does not mend,
ends this process with the same code. The driver dies with this process, so nothing is left behind.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

DRIVER = "MLLM_DRIVER"
"""Set in the environment of the driver: how often it was started before."""

LOST = 75
"""Exit code of a driver whose cluster is gone."""

NOWHERE = 76
"""Exit code of a driver that found no cluster."""

ENDS = (0, 2, 70, 130, 143)
"""Exit codes of a driver that ended by itself: well, by a mistake of the user's or the program's, by being asked to. Ray's own
code ends the process with others where its cluster is gone."""

HASTY = 5
"""Drivers in a row that may die within `SOON` seconds before this is called hopeless."""

SOON = 30.0

PAUSE = 60.0
"""Seconds between two drivers at most."""


def is_driver() -> bool:
    return DRIVER in os.environ


def is_first() -> bool:
    """Whether this driver was not started in place of one that was lost."""
    return os.environ.get(DRIVER) == "0"


def supervise(words: Sequence[str]) -> int:
    """Run `mllm WORDS` as a driver, again and again until it ends by itself, and return its exit code."""
    asked: list[int] = []
    drivers: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _: object) -> None:
        asked.append(number)
        if drivers:
            drivers[-1].send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return _drivers(words, asked, drivers)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _drivers(words: Sequence[str], asked: Sequence[int], drivers: list[subprocess.Popen[bytes]]) -> int:
    """One driver after the other; the last of `drivers` is the one that runs."""
    hasty = waits = 0
    for start in range(sys.maxsize):
        began = time.monotonic()
        command = [sys.executable, "-m", "cluster.cli", *words]
        # A group of its own: a terminal's Ctrl-C reaches the driver once, from here, and not twice.
        drivers[:] = [subprocess.Popen(command, env={**os.environ, DRIVER: str(start)}, process_group=0)]
        code = drivers[0].wait()
        lived = time.monotonic() - began
        if code == NOWHERE and start == 0:
            return 2
        if code in ENDS:
            return code
        if asked or code == -signal.SIGALRM:  # that was asked to stop, and hung
            return 128 + (asked[0] if asked else signal.SIGTERM)
        hasty = hasty + 1 if lived < SOON and code not in (LOST, NOWHERE) else 0
        if hasty > HASTY:
            print(
                f"error: the driver died {hasty} times within {SOON:.0f} s of its start; see the logs", file=sys.stderr
            )
            return 1
        how = "lost its cluster" if code > 0 else f"was ended by {signal.Signals(-code).name}"
        waits = waits + 1 if code == NOWHERE else 0
        pause = min(PAUSE, 2.0 ** max(hasty, min(waits, 6)) - 1)
        if code != NOWHERE:
            print(f"the driver {how}; another one goes on with the run", flush=True)
        _sleep(pause, asked)
        if asked:
            return 128 + asked[0]
    raise AssertionError("a driver ends by itself before that")


def _sleep(seconds: float, asked: Sequence[int]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not asked:
        time.sleep(0.1)


def die_with_parent() -> None:
    """Have the system end this process when the one that started it ends, however it does. Linux only; elsewhere nothing."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it was asked for
        os.kill(os.getpid(), signal.SIGKILL)
