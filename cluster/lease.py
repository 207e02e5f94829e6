"""The right to write a run: one controller has it at a time, also where two were started on two machines.

    runs/NAME/lease.json      who has it, with a number that grows as long as he lives

Its holder counts the file's `beat` up. Who wants the lease watches the file by a clock of its own and takes it once nothing has
changed for `silence` seconds, so clocks of two machines are never compared and a clock that jumps changes nothing. Where the
holder was a process of the same machine and is gone, nobody waits.

The file is a courtesy; what makes it safe is the journal. Taking the lease is an event, the event's number is the *token*, and
who holds an older one can append nothing more. Checkpoints bear the token in their name.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter

from cluster.journal import Fenced, Journal, LeaseTaken
from pipelines.place import Place
from pipelines.storage import StorageError
from pipelines.types import spec

SILENCE = 15.0
"""Seconds without a beat after which a holder counts as gone."""


class Held(RuntimeError):
    """The run has a living controller."""


@spec
class Holder:
    """Who has the lease: a process (`born` tells it from a later one of the same number), or nobody once it is `released`."""

    token: int
    host: str
    pid: int
    born: int
    beat: int = 0
    released: bool = False

    @property
    def words(self) -> str:
        return f"process {self.pid} on {self.host}"

    def gone(self) -> bool:
        """Whether the holder is certainly no more: it said so, or was a process of this machine that has ended."""
        if self.released:
            return True
        return self.host == machine() and _born(self.pid) != self.born


@cache
def _adapter() -> TypeAdapter[Holder]:
    return TypeAdapter(Holder)


@cache
def machine() -> str:
    """This machine since its last start, as no other is called; containers that cannot see each other's processes are two."""
    try:
        boot, space = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # no Linux: the name must do
        return socket.gethostname()
    return f"{socket.gethostname()}-{boot[:8]}-{space}"


def _born(pid: int) -> int | None:
    """When a process began, in ticks since the machine did, which no clock changes; None when it is no more."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc").is_dir():
            return None
        return 0 if _answers(pid) else None  # no Linux: its number must do
    return None if words[0] in "ZX" else int(words[19])


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Lease:
    """A taken lease: it is kept up from a thread of its own until it is released.

    `journal` appends under its token. `lost` is set when another has taken the run over. What else the thread that keeps it met
    is `error`: from then on the lease falls silent, and its holder must stop.
    """

    def __init__(self, run: Place, silence: float = SILENCE, waiting: Callable[[str], None] = lambda _: None) -> None:
        """Wait for the last holder to be gone, and take the lease. Raises Held as soon as the holder is seen alive."""
        self.file = run / "lease.json"
        self.silence = silence
        self.lost = threading.Event()
        self.error: Exception | None = None
        self.over = threading.Event()
        _await_silence(run, silence, waiting)
        me = Holder(token=-1, host=machine(), pid=os.getpid(), born=_born(os.getpid()) or 0)
        self.journal = Journal(run)
        token = self.journal.append(LeaseTaken(time=time.time(), owner=me.words))
        self.journal.token = token
        self.holder = Holder(token=token, host=me.host, pid=me.pid, born=me.born)
        self._write(self.holder)
        self.keeper = threading.Thread(target=self._keep, daemon=True, name="lease")
        self.keeper.start()

    @property
    def token(self) -> int:
        return self.holder.token

    def release(self) -> None:
        """Give the lease back, so that the next controller need not wait."""
        self.over.set()
        self.keeper.join(timeout=5)
        if not self.lost.is_set():
            self._write(self._at(self.holder.beat + 1, released=True))

    def _keep(self) -> None:
        journal = Journal(self.file.parent, self.token)
        while not self.over.wait(self.silence / 5):
            try:
                journal.events()
                journal.check()
                self.holder = self._at(self.holder.beat + 1)
                self._write(self.holder)
            except Fenced:
                self.lost.set()
                return
            except StorageError:
                continue  # an outage silences all controllers alike; who is fenced learns it when storage is back
            except Exception as error:
                self.error = error
                return

    def _at(self, beat: int, released: bool = False) -> Holder:
        h = self.holder
        return Holder(token=h.token, host=h.host, pid=h.pid, born=h.born, beat=beat, released=released)

    def _write(self, holder: Holder) -> None:
        self.file.write(_adapter().dump_json(holder))


def holder_of(run: Place) -> Holder | None:
    """Who has, or last had, the run's lease."""
    try:
        return _adapter().validate_json((run / "lease.json").read_bytes())
    except FileNotFoundError:
        return None


def _await_silence(run: Place, silence: float, waiting: Callable[[str], None]) -> None:
    first = holder_of(run)
    if first is None or first.gone():
        return
    waiting(f"run {run.name} was last driven by {first.words}; waiting {silence:.0f} s to see whether it still is")
    started = time.monotonic()
    while time.monotonic() - started < silence:
        time.sleep(min(0.25, silence / 10))
        now = holder_of(run)
        if now is None or now.gone():
            return
        if now != first:
            raise Held(
                f"run {run.name!r} is being driven by {now.words}: two controllers never write one run; stop that one "
                f"(kill {now.pid}), or train under another --run"
            )
