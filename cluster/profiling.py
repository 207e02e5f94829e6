"""A look into a run that goes, without ending it: `mllm profile RUN --rank 0 --steps 5`.

    runs/NAME/profile/0001-asked.json           who asks writes this
    runs/NAME/profile/0001-rank0-stacks.txt     where the rank's threads stand, by py-spy; the driver has its node look
    runs/NAME/profile/0001-rank0.json.gz        the steps' trace by torch's profiler, in Chrome's format; the rank writes it
    runs/NAME/profile/0001-failed.txt           why there is none

All goes through the run's storage, so that who asks need not reach the cluster. The driver looks there now and then and tells the
`Pulse`; the rank hears of it with its next sign of life, traces the steps that follow, and writes beside training.
"""

from __future__ import annotations

import re
import tempfile
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from cluster.metrics import RunFolder
from cluster.standing import Asked, Standing, stacks
from pipelines.place import Place
from pipelines.storage import StorageError
from pipelines.types import spec

if TYPE_CHECKING:
    from cluster.pulse import Beats

LOOK = 2.0
"""Seconds between two looks of the driver into the folder."""

FRESH = 300.0
"""Seconds after which nobody waits for an answer any more."""


@spec
class Question:
    """What is asked for: `steps` steps of a rank. `time` is seconds since 1970."""

    time: float
    rank: int
    steps: int


@spec
class Answer:
    """Where the answer lies."""

    trace: Place
    stacks: Place


class NoProfile(RuntimeError):
    """There will be no profile, in words for a person."""


@cache
def _adapter() -> TypeAdapter[Question]:
    return TypeAdapter(Question)


def folder_of(run: RunFolder) -> Place:
    return run.root / "profile"


def answer_of(run: RunFolder, number: int, rank: int) -> Answer:
    """Where the answer to question `number` is written."""
    name = f"{number:04d}-rank{rank}"
    return Answer(trace=folder_of(run) / f"{name}.json.gz", stacks=folder_of(run) / f"{name}-stacks.txt")


def ask(run: RunFolder, rank: int, steps: int) -> int:
    """Write the question down and return its number."""
    folder = folder_of(run)
    question = _adapter().dump_json(Question(time=time.time(), rank=rank, steps=steps))
    number = 1 + max((_number(name) for name in folder.names()), default=0)
    while not (folder / f"{number:04d}-asked.json").create(question):
        number += 1
    return number


def wait(run: RunFolder, number: int, rank: int, seconds: float) -> Answer:
    """Wait until question `number` is answered. Raises NoProfile where it cannot be, or is not within `seconds`."""
    answer, failed = answer_of(run, number, rank), folder_of(run) / f"{number:04d}-failed.txt"
    end = time.monotonic() + seconds
    while not (answer.trace.is_file() and answer.stacks.is_file()):
        if failed.is_file():
            raise NoProfile(failed.read_bytes().decode())
        if time.monotonic() > end:
            raise NoProfile(
                f"run {run.name!r} has not answered within {seconds:.0f} s; mllm status {run.name} tells whether it is being "
                "trained and how long its steps take: ask for fewer, or wait longer (--wait)"
            )
        time.sleep(0.5)
    return answer


class Profiles:
    """The driver's side: looks for questions as long as it is entered, and hands each to the rank that it is about."""

    def __init__(self, run: RunFolder, pulse: Any) -> None:
        self.run = run
        self.pulse = pulse
        self.seen: set[int] = set()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True, name="profiles")

    def __enter__(self) -> Profiles:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join(timeout=5)

    def _follow(self) -> None:
        while not self.over.wait(LOOK):
            try:
                self._look()
            except StorageError:  # the next look may find it answering
                continue
            except Exception as error:  # a run does not end for want of a profile
                with suppress(Exception):
                    self._fail(max(self.seen), f"{type(error).__name__}: {error}")

    def _look(self) -> None:
        names = folder_of(self.run).names()
        answered = {_number(name) for name in names if not name.endswith("-asked.json")}
        for name in names:
            number = _number(name)
            if not name.endswith("-asked.json") or number in self.seen | answered:
                continue
            self.seen.add(number)
            try:
                question = _adapter().validate_json((folder_of(self.run) / name).read_bytes())
            except ValidationError as error:
                self._fail(number, f"{name} is no question: {error}")
                continue
            if time.time() - question.time < FRESH:
                self._hand_on(number, question)

    def _hand_on(self, number: int, question: Question) -> None:
        import ray

        ranks, _ = ray.get(self.pulse.look.remote(), timeout=10)
        standing = next((one for one in ranks if one.rank == question.rank), None)
        if standing is None:
            there = ", ".join(str(one.rank) for one in ranks) or "none: no worker trains just now"
            self._fail(number, f"run {self.run.name!r} has no rank {question.rank}; there are: {there}")
            return
        asked = Asked(number=number, steps=question.steps)
        ray.get(self.pulse.profile.remote(question.rank, asked), timeout=10)
        answer_of(self.run, number, question.rank).stacks.write(stacks_of(standing).encode())

    def _fail(self, number: int, words: str) -> None:
        (folder_of(self.run) / f"{number:04d}-failed.txt").write(words.encode())


def stacks_of(rank: Standing) -> str:
    """Where the threads of a rank stand, as its own node sees them."""
    from cluster.pulse import there

    return there(rank.node, stacks, rank.pid)


class Profiler:
    """A rank's side, entered around every step: does nothing until it is asked, and then traces the steps asked for."""

    def __init__(self, beats: Beats, run: RunFolder) -> None:
        self.beats = beats
        self.run = run
        self.profile: Any = None
        self.asked: Asked | None = None
        self.left = 0

    def __enter__(self) -> None:
        asked = self.beats.asked
        if self.profile is not None or asked is None:
            return
        import torch
        from torch.profiler import ProfilerActivity, profile

        self.asked, self.left, self.beats.asked = asked, asked.steps, None
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
        self.profile = profile(activities=activities, record_shapes=True)
        self.profile.__enter__()

    def __exit__(self, *_: object) -> None:
        if self.profile is None:
            return
        self.left -= 1
        if self.left <= 0:
            self.close()

    def close(self) -> None:
        """Write what has been traced so far; from a thread of its own, since the other ranks would wait."""
        if self.profile is None or self.asked is None:
            return
        profile, asked, self.profile = self.profile, self.asked, None
        profile.__exit__(None, None, None)
        threading.Thread(target=_write, args=(profile, self.run, asked, self.beats.rank), name="profile").start()


def _write(profile: Any, run: RunFolder, asked: Asked, rank: int) -> None:
    with tempfile.TemporaryDirectory(prefix="mllm-profile-") as scratch:
        file = Path(scratch) / "trace.json.gz"
        try:
            profile.export_chrome_trace(str(file))
            answer_of(run, asked.number, rank).trace.write(file.read_bytes())
        except Exception as error:  # the run goes on, and who asked is told
            with suppress(OSError):
                words = f"rank {rank} could not write its trace: {type(error).__name__}: {error}"
                (folder_of(run) / f"{asked.number:04d}-failed.txt").write(words.encode())


def _number(name: str) -> int:
    found = re.match(r"(\d+)-", name)
    return int(found[1]) if found else 0
