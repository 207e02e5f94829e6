"""A process that is asked to stop does, and ends in time, whatever of it hangs."""

from __future__ import annotations

import faulthandler
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path

AFTER = 30.0
"""Seconds beyond its notice that a driver has to take leave of its cluster and storage."""

TOLD = 5.0
"""Seconds before its end at which a process that still is there writes down where its threads stand."""

FILE = "stopping.txt"


class Stopped(RuntimeError):
    """The command was asked to stop, and did; a run can go on."""


@contextmanager
def asked_to_stop() -> Iterator[None]:
    """SIGTERM raises Stopped in the main thread, as Ctrl-C raises KeyboardInterrupt. While workers train the controller has both.

    For a process in which Ray has begun, which would have SIGTERM end it as a fault does.
    """

    def stop(number: int, _: object) -> None:
        raise Stopped(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_within(seconds: float, logs: Path) -> None:
    """Have the system end this process after `seconds`, by SIGALRM; a little before, the stacks of all threads go into `logs`.

    Neither needs Python: a library that never returns, or an interpreter that is being torn down, cannot hold it up.
    """
    logs.mkdir(parents=True, exist_ok=True)
    file = (logs / FILE).open("w")  # which stays open: the watchdog writes to its descriptor
    faulthandler.dump_traceback_later(max(0.1, seconds - TOLD), file=file)
    _kept.append(file)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(ceil(seconds))


_kept: list[object] = []
