"""A run through faults, beside the same run without any: what was lost, repeated or changed, and how long it took."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from shutil import rmtree
from statistics import median

from cluster.controller import RESIZE
from cluster.journal import Journal
from cluster.lines import read_lines
from cluster.metrics import RunFolder, StepRecord, parse_step
from tests.faults.catalogue import Death, Fault, drain_node, kill_worker, lose_node, new_cluster, replace_node
from tests.faults.rig import Rig

SOON, LATE = 2, 5
"""A fault comes so many steps after the last one was overcome."""


SELDOM = 1.0
"""Seconds between two looks at what the run has written: to look costs a core that recovering wants too."""


@dataclass(frozen=True)
class Overcome:
    """One fault in one stage, after `step`. `seconds` from its beginning to the end of the next optimiser step of those who began
    again, or the longest time between two steps where nobody had to; `redone` steps were done twice. `noticed` is how long it
    took until the journal told of it, where it did; `left` until the command had ended, where the fault ends it.
    """

    what: str
    stage: str
    step: int
    seconds: float
    redone: int
    noticed: float | None
    left: float | None = None


def go_through(rig: Rig, stage: str, faults: Sequence[Fault], rng: random.Random) -> list[Overcome]:
    """Let each fault happen to the stage that is being trained, at random steps."""
    found = []
    for fault in faults:
        at = last(rig, stage) + rng.randint(SOON, LATE)
        most = rig.planned(stage)
        assert most is None or at < most, f"{stage} has {most} steps, too few for {fault.what}: give more --steps"
        rig.wait_for_step(stage, at, 900)
        found.append(overcome(rig, stage, fault, rng))
        print(json.dumps(found[-1].__dict__), flush=True)
    return found


def overcome(rig: Rig, stage: str, fault: Fault, rng: random.Random) -> Overcome:
    """Let a fault happen, and wait until the run has got further than it was."""
    before, lines = last(rig, stage), len(read_lines(rig.results.steps_file(stage)))
    began = time.time()
    fault.act(rig, rng, stage)
    left = None
    if fault.ends is not None:
        code = rig.exit_code(120)
        assert code == fault.ends, f"the command ended with {code}:\n{rig.told()}"
        left = time.time() - began
        rig.train(*rig.words, again=True)
    since = began
    if fault.restarts:
        rig.wait_for(lambda: rig.groups()[-1].time > began, 300, SELDOM)
        assert rig.groups()[-1].stage == stage, f"{fault.what}: nobody began again before {stage} was done"
        since = rig.groups()[-1].time
    rig.wait_for(lambda: _further(rig, stage, lines, before, since) is not None, 300, SELDOM)
    further = _further(rig, stage, lines, before, since)
    assert further
    known, new = further
    written = _written(rig, stage)[lines:]
    if fault.restarts:
        again = [record for record in written if record.time > since]
        seconds, redone = again[0].time - began, sum(record.step <= known for record in again)
    else:
        moments = [began, *(record.time for record in written if began < record.time <= new.time)]
        seconds, redone = max(later - earlier for earlier, later in pairwise(moments)), 0
    noticed = min(
        (one.time - began for one in Journal(rig.results.root).state().faults if one.time > began), default=None
    )
    fault.after(rig)
    return Overcome(fault.what, stage, known, seconds, redone, noticed, left)


def _written(rig: Rig, stage: str) -> list[StepRecord]:
    """Every line of the steps, those that were written twice too."""
    return [record for line in read_lines(rig.results.steps_file(stage)) if (record := parse_step(line))]


def _further(rig: Rig, stage: str, lines: int, before: int, since: float) -> tuple[int, StepRecord] | None:
    """The last step until the moment `since`, and the first new one after it; what is on S3 came there some seconds late."""
    written = _written(rig, stage)[lines:]
    known = max([before, *(record.step for record in written if record.time <= since)])
    new = next((record for record in written if record.time > since and record.step > known), None)
    return (known, new) if new else None


SHRINKS, GROWS = "2 -> 1 workers, a node lost", "1 -> 3 workers, two nodes join"


@dataclass(frozen=True)
class Resized:
    """What came of the runs whose nodes go and come, and the seconds that plain Ray Train took for the same."""

    overcome: list[Overcome]
    plain: dict[str, float]


def resize(rig: Rig, name: str, rng: random.Random, measured: Callable[[], object]) -> Resized:
    """Another run, of one to three workers, whose nodes go and come: 2 -> 1 -> 3, each in another stage.

    `measured` is called when nothing more is timed.
    """

    def lose() -> None:
        rig.kill_node(rng.choice(rig.training_nodes()))

    def join() -> None:
        for _ in range(2):
            rig.add_node(SMALL)

    _two_small_nodes(rig)
    with Plain(rig, "elastic", (1, 3)) as plain:
        beside = {SHRINKS: plain.restarted(lose, 1), GROWS: plain.restarted(join, 3)}
    print(json.dumps(beside), flush=True)
    _two_small_nodes(rig)
    rig.words = ("--workers", "1", "3", "--run", name)
    rig.train(*rig.words)
    found = [_resized(rig, "align", SHRINKS, 1, lose, rng), _resized(rig, "pretrain", GROWS, 3, join, rng)]
    print(*(json.dumps(one.__dict__) for one in found), sep="\n", flush=True)
    measured()
    rig.wait_for_end(1500)
    return Resized(found, beside)


SMALL = 1
"""CPUs of a node that holds a trainer and nothing beside it: what makes packs must find its place all the same."""


def _two_small_nodes(rig: Rig) -> None:
    for node in list(rig.nodes):
        rig.kill_node(node)
    for _ in range(2):
        rig.add_node(SMALL)


def _resized(rig: Rig, stage: str, what: str, world: int, act: Callable[[], object], rng: random.Random) -> Overcome:
    rig.wait_for_step(stage, rng.randint(8, 12), 300)
    rig.wait_for(lambda: rig.steps(stage)[-1].world != world)
    before, lines, began = last(rig, stage), len(read_lines(rig.results.steps_file(stage))), time.time()
    act()

    def new() -> tuple[list[StepRecord], int, StepRecord | None]:
        """What was written since, the last step of a group of another size, and the first after it of the new group."""
        written = _written(rig, stage)[lines:]
        known = max([before, *(r.step for r in written if r.world != world)])
        return written, known, next((r for r in written if r.world == world and r.step > known), None)

    rig.wait_for(lambda: new()[2] is not None, 300, SELDOM)
    written, known, further = new()
    assert further
    redone = sum(r.step <= known for r in written if r.world == world)
    return Overcome(what, stage, known, further.time - began, redone, None)


RESTARTS = 2
"""Plain restarts whose median is taken: the first finds processes that Ray has kept, and is quicker."""


@dataclass(frozen=True)
class Line:
    """A step of a plain run, as it wrote it down."""

    time: float
    pid: int
    world: int


class Plain:
    """Ray Train by itself on the rig's cluster, as long as it is entered: the same model and workers, none of this project."""

    def __init__(self, rig: Rig, name: str, workers: tuple[int, int] = (2, 2)) -> None:
        self.rig = rig
        self.file = rig.folder / f"plain-{name}.txt"
        numbers = [str(number) for number in (*workers, RESIZE)]
        self.words = [rig.cluster.address, rig.recipe, str(self.file), *numbers]

    def __enter__(self) -> Plain:
        self.start()
        self.rig.wait_for(lambda: len(self.lines()) > AGREED)
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.kill()
        self.driver.wait()

    def start(self) -> None:
        """Give the command."""
        command = [sys.executable, "-m", "tests.faults.plain", *self.words]
        with self.rig.log.open("ab") as out:
            self.driver = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        self.rig.run = self.driver

    def anew(self) -> None:
        """Give the command as the first time: nothing is there of what it kept."""
        self.driver.kill()
        self.driver.wait()
        rmtree(self.file.parent / "plain" / self.file.stem)
        self.__enter__()

    def lines(self) -> list[Line]:
        texts = self.file.read_text().splitlines() if self.file.is_file() else []
        parts = [text.split() for text in texts]
        return [Line(float(when), int(pid), int(world)) for when, _, pid, world in parts]

    def restarted(self, act: Callable[[], object], world: int | None = None) -> float:
        """Seconds from the beginning of `act` to the first step of other processes, `world` of them if that is told."""
        done = len(self.lines())
        self.rig.wait_for(lambda: len(self.lines()) > done + AGREED)
        pid, began = self.lines()[-1].pid, time.time()
        act()

        def found() -> list[Line]:
            return [
                line for line in self.lines() if line.time > began and line.pid != pid and world in (None, line.world)
            ]

        self.rig.wait_for(lambda: bool(found()), 300, SELDOM)
        return found()[0].time - began


AGREED = 8
"""Steps that a plain run takes between two deaths; every fifth it saves."""


def plain_restarts(rig: Rig, rng: random.Random, times: int) -> dict[Death, float]:
    """Median seconds that Ray Train by itself needs after each kind of death, of so many `times`; nothing of none."""
    found: dict[Death, float] = {}
    if not times:
        return found
    with Plain(rig, "two") as plain:

        def again(end: Callable[[], object]) -> Callable[[], None]:
            def ended() -> None:
                end()
                plain.driver.wait(120)
                plain.start()

            return ended

        def new_head() -> None:
            new_cluster(rig, rng, "")
            plain.driver.kill()

        deaths: dict[Death, tuple[Callable[[], object], Callable[[Rig], object]]] = {
            "worker": (lambda: kill_worker(rig, rng, ""), lambda _: None),
            "node": (lambda: lose_node(rig, rng, ""), replace_node),
            "drain": (lambda: drain_node(rig, rng, ""), replace_node),
            "driver": (again(lambda: plain.driver.kill()), lambda _: None),
            "SIGTERM": (again(lambda: plain.driver.terminate()), lambda _: None),
            "head": (again(new_head), lambda _: None),
        }
        for death, (act, after) in deaths.items():
            seconds = []
            for _ in range(times):
                try:
                    seconds.append(plain.restarted(act))
                except AssertionError as error:
                    # Its controller writes its notes of checkpoints in place, and reads none that it has not finished.
                    print(f"plain Ray Train did not come back after: {death}. It begins anew.\n{error}", flush=True)
                    plain.anew()
                after(rig)
            if seconds:
                found[death] = median(seconds)
            print(f"plain restart, {death}: {', '.join(f'{one:.1f}' for one in seconds)} s", flush=True)
    return found


def last(rig: Rig, stage: str) -> int:
    """The last step written down."""
    steps = rig.steps(stage)
    return steps[-1].step if steps else 0


def differences(broken: Sequence[StepRecord], whole: Sequence[StepRecord], within: float = 1e-4) -> list[str]:
    """In what a stage that went through faults differs from one that did not: steps, packs, rates, losses."""
    found = []
    if [r.step for r in broken] != [r.step for r in whole]:
        found.append(f"steps {len(broken)} of {len(whole)}")
    pairs = list(zip(broken, whole, strict=False))
    for what in ("packs", "lr"):
        other = [a.step for a, b in pairs if getattr(a, what) != getattr(b, what)]
        if other:
            found.append(f"{len(other)} steps have other {what}, the first is step {other[0]}")
    apart = [
        (a.step, abs(a.loss - b.loss) / abs(b.loss)) for a, b in pairs if abs(a.loss - b.loss) > within * abs(b.loss)
    ]
    if apart:
        most = max(share for _, share in apart)
        found.append(
            f"losses of {len(apart)} of {len(pairs)} steps differ, from step {apart[0][0]} on, by up to {most:.2g} of them"
        )
    return found


def rows_lost_and_repeated(broken: RunFolder, whole: RunFolder, stage: str) -> tuple[int, int]:
    """Packs that the committed weights have not seen, or have seen more than once, by the digests of what was trained."""
    seen = [pack for record in broken.steps(stage) for pack in record.packs]
    meant = [pack for record in whole.steps(stage) for pack in record.packs]
    return len(set(meant) - set(seen)), len(seen) - len(set(seen))
