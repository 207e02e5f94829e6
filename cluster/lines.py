"""Lines that one process appends and others follow, on a disk or on S3.

A disk has a file that grows. S3 has none: there the name is a folder of numbered segments. The appender writes its segment
anew, some seconds apart and from a thread of its own, until it is full and the next one begins; so a storage that does not
answer for a while holds up the record of a run, and not the run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from pipelines import storage
from pipelines.place import Place

SEGMENT = 2**18
"""Bytes after which a segment is left as it is and the next one begins."""

EVERY = 2.0
"""Seconds between two writings of a segment."""


class Lines:
    """The appender's end. Lines come out in the order in which they went in; `flush` waits until they are stored."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.begun = False
        self.segment: Place | None = None
        self.stored = b""  # what the open segment holds
        self.waiting = b""
        self.fault: Exception | None = None
        self.changed = threading.Condition()
        self.thread: threading.Thread | None = (
            None  # one for all: a process without memory may hang where it starts another
        )
        self.idle = True

    def append(self, lines: Iterable[bytes]) -> None:
        """Append lines, each without its end. Raises, here or later, what storage raised when its patience was at an end."""
        data = b"".join(line + b"\n" for line in lines)
        if self.place.local:
            self._append_to_file(data)
            return
        with self.changed:
            if self.fault:
                raise self.fault
            self.waiting += data
            if self.thread is None:
                self.thread = threading.Thread(target=self._write, daemon=True, name="lines")
                self.thread.start()
            elif self.idle:
                self.changed.notify_all()

    def flush(self) -> None:
        """Wait until all lines are stored."""
        with self.changed:
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.fault or (self.idle and not self.waiting))
            if self.fault:
                raise self.fault

    def _append_to_file(self, data: bytes) -> None:
        file = self.place.path
        if not self.begun:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.is_file() and file.read_bytes()[-1:] not in (b"", b"\n"):
                data = b"\n" + data  # a kill cut the last line short; the next one stands alone
            self.begun = True
        with file.open("ab") as out:
            out.write(data)

    def _write(self) -> None:
        """Store what waits, until storage fails."""
        while True:
            with self.changed:
                while not self.waiting:
                    self.idle = True
                    self.changed.notify_all()
                    self.changed.wait()
                self.idle = False
                data, self.waiting = self.waiting, b""
            try:
                self._store(data)
            except Exception as error:
                with self.changed:
                    self.fault = error
                    self.changed.notify_all()
                return
            with self.changed:
                self.changed.wait(EVERY)

    def _store(self, data: bytes) -> None:
        if self.segment is None or len(self.stored) >= SEGMENT:
            self.segment, self.stored = self._begin(data), data
            return
        self.stored += data
        self.segment.write(self.stored)

    def _begin(self, data: bytes) -> Place:
        number = 1 + max((int(name) for name in self.place.names()), default=-1)
        while not (self.place / f"{number:08d}").create(data):
            number += 1
        return self.place / f"{number:08d}"


class Follower:
    """A reader's end: each `read` gives the whole lines that have come since the one before."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.segment = ""
        self.at = 0

    def read(self) -> list[bytes]:
        if self.place.local:
            return self._take(self.place) if self.place.is_file() else []
        found: list[bytes] = []
        for name in self.place.names():
            if name < self.segment:
                continue
            if name > self.segment:
                self.segment, self.at = name, 0
            found += self._take(self.place / name)
        return found

    def _take(self, file: Place) -> list[bytes]:
        data = storage.read(file.uri, self.at, None)
        whole = data[: data.rfind(b"\n") + 1]
        self.at += len(whole)
        return whole.splitlines()


def read_lines(place: Place) -> list[bytes]:
    """All whole lines so far."""
    return Follower(place).read()
