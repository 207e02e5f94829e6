"""The run's truth: small events on its storage, replayed by a pure function.

    runs/NAME/journal/000003-stage_finished.json

`RunState.replay(events)` is all that `train`, `status` and `report` know of a run, so they agree.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, TypeAdapter

from mllm.tune import PartReport
from pipelines.types import spec


@spec
class RunStarted:
    """`mllm train` took the run up, for the first time or again. `time` is seconds since 1970."""

    kind: Literal["run_started"] = "run_started"
    time: float
    recipe: str
    workers: int
    versions: dict[str, str]


@spec
class StageStarted:
    """`steps` is the planned number, or None where only the data can tell."""

    kind: Literal["stage_started"] = "stage_started"
    time: float
    stage: str
    fingerprint: str
    steps: int | None
    parts: tuple[PartReport, ...]


@spec
class StageFinished:
    """`checkpoint` is the folder of the stage's last checkpoint, relative to the run."""

    kind: Literal["stage_finished"] = "stage_finished"
    time: float
    stage: str
    fingerprint: str
    checkpoint: str


@spec
class RunFinished:
    """All stages are done; report and export are written."""

    kind: Literal["run_finished"] = "run_finished"
    time: float


@spec
class RunFailed:
    """The run stopped with an error, in words."""

    kind: Literal["run_failed"] = "run_failed"
    time: float
    stage: str | None
    error: str


Event = Annotated[RunStarted | StageStarted | StageFinished | RunFinished | RunFailed, Field(discriminator="kind")]


@cache
def _adapter() -> TypeAdapter[Event]:
    return TypeAdapter(Event)


@spec
class RunState:
    """What the events add up to."""

    finished_stages: tuple[StageFinished, ...] = ()
    started_stages: tuple[StageStarted, ...] = ()
    starts: tuple[RunStarted, ...] = ()
    stage: str | None = None
    finished: bool = False
    failure: str | None = None

    @classmethod
    def replay(cls, events: Iterable[Event]) -> Self:
        """Fold the events, in order, into the state of the run."""
        finished: dict[str, StageFinished] = {}
        started: dict[str, StageStarted] = {}
        starts: list[RunStarted] = []
        stage: str | None = None
        done = False
        failure: str | None = None
        for event in events:
            match event:
                case RunStarted():
                    starts.append(event)
                    done, failure = False, None
                case StageStarted():
                    started[event.stage] = event
                    stage = event.stage
                case StageFinished():
                    finished[event.stage] = event
                    stage = None
                case RunFinished():
                    done, stage = True, None
                case RunFailed():
                    failure = event.error
        return cls(
            finished_stages=tuple(finished.values()),
            started_stages=tuple(started.values()),
            starts=tuple(starts),
            stage=stage,
            finished=done,
            failure=failure,
        )

    def finished_stage(self, fingerprint: str) -> StageFinished | None:
        return next((event for event in self.finished_stages if event.fingerprint == fingerprint), None)


class Journal:
    """Events of one run, in a folder."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "journal"

    def append(self, event: Event) -> None:
        """Write `event` under the next number; whole, or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        number = len(list(self.folder.glob("*.json")))
        write_atomically(self.folder / f"{number:06d}-{event.kind}.json", _adapter().dump_json(event, indent=2))

    def events(self) -> list[Event]:
        return [_adapter().validate_json(file.read_bytes()) for file in sorted(self.folder.glob("*.json"))]

    def state(self) -> RunState:
        return RunState.replay(self.events())


def write_atomically(file: Path, data: bytes) -> None:
    """Readers see the old content or the new, never half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    scratch.write_bytes(data)
    scratch.replace(file)
