"""The run's truth: small events on its storage, replayed by a pure function.

    runs/NAME/journal/000003.json           one event, written once and never changed
    runs/NAME/journal/chapter-000512.json   the first 512 events in one piece, for who comes later
    runs/NAME/journal/page-000544.json      the events since that chapter in one piece, for the same reason

`RunState.replay(events)` is all that `train`, `status` and `report` know of a run, so they agree.

An event's name is its number, and a file that is there is not written again: of two who append at once one takes the number and
the other reads what came before it. This is what makes the lease (`cluster/lease.py`) safe. Taking it is an event too, whose
number is its *token*; who appends under an older token than the newest in the journal is told so and appends nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from os import PathLike
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, TypeAdapter

from mllm.parts import PartReport
from pipelines import storage
from pipelines.place import Place
from pipelines.value import spec

CHAPTER = 512
"""Events after which they are also written down in one piece."""

PAGE = 32
"""Events after which those since the last chapter are: who comes later then reads few events one by one."""


class Fenced(RuntimeError):
    """Another controller has taken the run over; this one must do nothing more."""


class OldRun(ValueError):
    """The run's files are of an older format, which this version does not go on with."""


@spec
class LeaseTaken:
    """From here on `owner`, and nobody else, writes the run. The event's number is the token."""

    kind: Literal["lease_taken"] = "lease_taken"
    time: float
    owner: str


@spec
class RunStarted:
    """`mllm train` took the run up, for the first time or again. `time` is seconds since 1970, `workers` the fewest and most."""

    kind: Literal["run_started"] = "run_started"
    time: float
    recipe: str
    workers: tuple[int, int]
    versions: dict[str, str]

    @property
    def crew(self) -> str:
        """`2 workers`, or `2 to 8 workers`."""
        fewest, most = self.workers
        return f"{most} worker{'s' if most > 1 else ''}" if fewest == most else f"{fewest} to {most} workers"


@spec
class StageStarted:
    """`steps` is the planned number, or None where only the data can tell. `parts` is told here by a driver that has a model at
    hand, and else by `PartsDescribed`.
    """

    kind: Literal["stage_started"] = "stage_started"
    time: float
    stage: str
    fingerprint: str
    steps: int | None
    parts: tuple[PartReport, ...] = ()


@spec
class PartsDescribed:
    """What the stage trains, part by part: told by the first of its groups, which has built the model."""

    kind: Literal["parts_described"] = "parts_described"
    time: float
    stage: str
    fingerprint: str
    parts: tuple[PartReport, ...]


@spec
class GroupStarted:
    """A group of `world` workers began to train the stage after `step` steps. `passed_over` are checkpoints that were no good."""

    kind: Literal["group_started"] = "group_started"
    time: float
    stage: str
    fingerprint: str
    world: int
    step: int
    passed_over: tuple[str, ...] = ()


FaultKind = Literal[
    "workers", "hang", "preemption", "not_finite", "spike", "checkpoint", "controller", "slow", "straggler", "beside"
]
FAULT_KINDS: tuple[FaultKind, ...] = get_args(FaultKind)


@spec
class Fault:
    """Something went wrong: what, when and as far as it is known on which `rank`, with which `rows` in flight."""

    kind: Literal["fault"] = "fault"
    time: float
    what: FaultKind
    stage: str
    step: int
    detail: str
    rank: int | None = None
    rows: tuple[str, ...] = ()


@spec
class Decision:
    """What is done about it, by which policy, and why. Written down before it is done; doing it twice does no harm."""

    kind: Literal["decision"] = "decision"
    time: float
    what: Literal[
        "restart",
        "give_up",
        "replay",
        "take",
        "skip",
        "roll_back",
        "stop",
        "save_and_stop",
        "save_and_leave",
        "go_on",
    ]
    stage: str
    why: str


@spec
class GateJudged:
    """A stage's entry was asked for: `value` is what its gate looked at."""

    kind: Literal["gate_judged"] = "gate_judged"
    time: float
    stage: str
    gate: str
    value: float
    open: bool


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
class RunStopped:
    """The run was asked to stop (`why`), and can go on."""

    kind: Literal["run_stopped"] = "run_stopped"
    time: float
    stage: str | None
    why: str


@spec
class RunFailed:
    """The run stopped with an error, in words."""

    kind: Literal["run_failed"] = "run_failed"
    time: float
    stage: str | None
    error: str


Event = Annotated[
    LeaseTaken
    | RunStarted
    | StageStarted
    | PartsDescribed
    | GroupStarted
    | Fault
    | Decision
    | GateJudged
    | StageFinished
    | RunFinished
    | RunStopped
    | RunFailed,
    Field(discriminator="kind"),
]


@cache
def _adapter() -> TypeAdapter[Event]:
    return TypeAdapter(Event)


@cache
def _chapters() -> TypeAdapter[list[Event]]:
    return TypeAdapter(list[Event])


def dump_event(event: Event) -> bytes:
    return _adapter().dump_json(event, indent=1)


def dump_chapter(events: list[Event]) -> bytes:
    return _chapters().dump_json(events)


_NAME = re.compile(r"(chapter-|page-)?\d{6,}\.json")


def _event(number: int) -> str:
    return f"{number:06d}.json"


def _number(name: str) -> int:
    """The number of an event, or how many there were when a chapter or page was written."""
    return int(name.rpartition("-")[2].removesuffix(".json"))


def _begin(count: int) -> int:
    """The first event of a page that was written after `count` events."""
    return count // CHAPTER * CHAPTER


def gather(events: list[Event]) -> tuple[str, bytes] | None:
    """Name and content of the chapter or page that is due after `events`, if one is.

    It says nothing that the events do not, so it does no harm where it is missing, or written twice.
    """
    count = len(events)
    if count % CHAPTER == 0:
        return f"chapter-{count:06d}.json", dump_chapter(events)
    if count % PAGE == 0:
        return f"page-{count:06d}.json", dump_chapter(events[_begin(count) :])
    return None


@spec
class RunState:
    """What the events add up to. Of a stage that was changed and begun anew only what came after that counts."""

    finished_stages: tuple[StageFinished, ...] = ()
    started_stages: tuple[StageStarted, ...] = ()
    starts: tuple[RunStarted, ...] = ()
    groups: tuple[GroupStarted, ...] = ()
    faults: tuple[Fault, ...] = ()
    decisions: tuple[Decision, ...] = ()
    gates: tuple[GateJudged, ...] = ()
    stage: str | None = None
    finished: bool = False
    failure: str | None = None
    stopped: str | None = None
    token: int = -1

    @classmethod
    def replay(cls, events: Iterable[Event]) -> Self:
        """Fold the events, in order, into the state of the run."""
        finished: dict[str, StageFinished] = {}
        started: dict[str, StageStarted] = {}
        starts: list[RunStarted] = []
        groups: list[GroupStarted] = []
        faults: list[Fault] = []
        decisions: list[Decision] = []
        gates: list[GateJudged] = []
        stage: str | None = None
        done = False
        failure: str | None = None
        stopped: str | None = None
        token = -1
        for number, event in enumerate(events):
            match event:
                case LeaseTaken():
                    token = number
                case RunStarted():
                    starts.append(event)
                    done, failure, stopped = False, None, None
                case StageStarted():
                    before = started.pop(event.stage, event)
                    if before.fingerprint != event.fingerprint:
                        finished.pop(event.stage, None)
                    started[event.stage] = event
                    stage = event.stage
                case GroupStarted():
                    groups.append(event)
                case Fault():
                    faults.append(event)
                case Decision():
                    decisions.append(event)
                case GateJudged():
                    gates.append(event)
                case StageFinished():
                    finished[event.stage] = event
                    stage = None
                case RunFinished():
                    done, stage = True, None
                case RunStopped():
                    stopped = event.why
                case RunFailed():
                    failure = event.error
        return cls(
            finished_stages=tuple(finished.values()),
            started_stages=tuple(started.values()),
            starts=tuple(starts),
            groups=tuple(groups),
            faults=tuple(faults),
            decisions=tuple(decisions),
            gates=tuple(gates),
            stage=stage,
            finished=done,
            failure=failure,
            stopped=stopped,
            token=token,
        )

    def finished_stage(self, fingerprint: str) -> StageFinished | None:
        return next((event for event in self.finished_stages if event.fingerprint == fingerprint), None)

    def groups_of(self, fingerprint: str) -> list[GroupStarted]:
        return [group for group in self.groups if group.fingerprint == fingerprint]


class Journal:
    """Events of one run. Whoever appends says under which `token`; a reader needs none."""

    def __init__(self, run: Place | PathLike[str] | str, token: int | None = None) -> None:
        self.folder = (run if isinstance(run, Place) else Place(run)) / "journal"
        self.token = token
        self.known: list[Event] = []

    def append(self, event: Event) -> int:
        """Write `event` under the next number, whole or not at all, and return the number.

        Raises Fenced when another controller has taken the run over since this one's token.
        """
        data = dump_event(event)
        while True:
            self.events()
            self.check()
            number = len(self.known)
            if (self.folder / _event(number)).create(data):
                break
        self.known.append(event)
        if gathered := gather(self.known):
            name, piece = gathered
            (self.folder / name).write(piece)
        return number

    def guard(self) -> None:
        """Read what is new, and raise Fenced when another controller has taken the run over."""
        self.events()
        self.check()

    def check(self) -> None:
        """Raises Fenced when what is known of the journal holds a newer token than this one's."""
        if self.token is None:
            return
        newest = max((n for n, event in enumerate(self.known) if isinstance(event, LeaseTaken)), default=-1)
        if newest > self.token:
            other = self.known[newest]
            assert isinstance(other, LeaseTaken)
            raise Fenced(
                f"run {self.folder.parent.name!r} was taken over by {other.owner}; this controller stops, and what it had not "
                "yet written is that one's to do"
            )

    def events(self) -> list[Event]:
        """All events so far. Raises OldRun for a journal of another format."""
        if not self.known:
            self._take(self.folder.names(prefix="chapter-"))
        names = self.folder.names(after=_event(len(self.known) - 1) if self.known else "")
        if old := [name for name in names if not _NAME.fullmatch(name)]:
            raise OldRun(
                f"{self.folder / old[0]} was written by an older version, whose runs this one does not go on with; end the run "
                "with the version that began it, or begin another one under --run"
            )
        self._take([name for name in names if name.startswith("chapter-")])
        here = len(self.known)
        pages = [name for name in names if name.startswith("page-") and _begin(_number(name)) <= here < _number(name)]
        page = pages[-1:]
        first = max([here, *map(_number, page)])
        fresh = page + [name for name in names if name[0].isdigit() and _number(name) >= first]
        found = storage.read_many([((self.folder / name).uri, None, None) for name in fresh])
        for name, data in zip(fresh, found, strict=True):
            assert data is not None  # nothing is ever removed
            if name in page:
                self.known[_begin(_number(name)) :] = _chapters().validate_json(data)
            else:
                self.known.append(_adapter().validate_json(data))
        return list(self.known)

    def _take(self, chapters: list[str]) -> None:
        """Read the last of `chapters` where it tells more than is known."""
        if chapters and _number(chapters[-1]) > len(self.known):
            self.known = _chapters().validate_json((self.folder / chapters[-1]).read_bytes())

    def state(self) -> RunState:
        return RunState.replay(self.events())
