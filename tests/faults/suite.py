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
from statistics import median

from cluster.lines import read_lines
from cluster.metrics import RunFolder, StepRecord, parse_step
from tests.faults.catalogue import Fault
from tests.faults.rig import Rig

SOON, LATE = 2, 5
"""A fault comes so many steps after the last one was overcome."""


SELDOM = 1.0
"""Seconds between two looks at what the run has written: to look costs a core that recovering wants too."""


@dataclass(frozen=True)
class Overcome:
    """One fault in one stage, after `step`. `seconds` from its beginning to the end of the next optimiser step of those who began
    again, or the longest time between two steps where nobody had to; `redone` steps were done twice.
    """

    what: str
    stage: str
    step: int
    seconds: float
    redone: int


def go_through(rig: Rig, stage: str, faults: Sequence[Fault], rng: random.Random) -> list[Overcome]:
    """Let each fault happen to the stage that is being trained, at random steps."""
    found = []
    for fault in faults:
        rig.wait_for_step(stage, last(rig, stage) + rng.randint(SOON, LATE), 900)
        found.append(overcome(rig, stage, fault, rng))
        print(json.dumps(found[-1].__dict__), flush=True)
    return found


def overcome(rig: Rig, stage: str, fault: Fault, rng: random.Random) -> Overcome:
    """Let a fault happen, and wait until the run has got further than it was."""
    before, lines = last(rig, stage), len(read_lines(rig.results.steps_file(stage)))
    began = time.time()
    fault.act(rig, rng, stage)
    if fault.ends is not None:
        assert rig.run
        assert rig.run.wait(120) == fault.ends, rig.log.read_text()[-3000:]
        rig.train(*rig.words, again=True)
    since = began
    if fault.restarts:
        rig.wait_for(lambda: rig.groups()[-1].time > began, 300, SELDOM)
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
    fault.after(rig)
    return Overcome(fault.what, stage, known, seconds, redone)


def _written(rig: Rig, stage: str) -> list[StepRecord]:
    """Every line of the steps, those that were written twice too."""
    return [record for line in read_lines(rig.results.steps_file(stage)) if (record := parse_step(line))]


def _further(rig: Rig, stage: str, lines: int, before: int, since: float) -> tuple[int, StepRecord] | None:
    """The last step until the moment `since`, and the first new one after it; what is on S3 came there some seconds late."""
    written = _written(rig, stage)[lines:]
    known = max([before, *(record.step for record in written if record.time <= since)])
    new = next((record for record in written if record.time > since and record.step > known), None)
    return (known, new) if new else None


def resize(rig: Rig, name: str, rng: random.Random) -> list[Overcome]:
    """Another run, of one to three workers, whose nodes go and come: 2 -> 1 -> 3, each in another stage."""
    small = 1  # a trainer, and nothing beside it: what makes packs must find its place all the same
    for node in list(rig.nodes):
        rig.kill_node(node)
    for _ in range(2):
        rig.add_node(small)
    rig.words = ("--workers", "1", "3", "--run", name)
    rig.train(*rig.words)
    found = [
        _resized(
            rig, "align", "2 -> 1 workers, a node lost", 1, lambda: rig.kill_node(rng.choice(rig.training_nodes())), rng
        ),
        _resized(
            rig, "pretrain", "1 -> 3 workers, two nodes join", 3, lambda: [rig.add_node(small) for _ in range(2)], rng
        ),
    ]
    rig.wait_for_end()
    return found


def _resized(rig: Rig, stage: str, what: str, world: int, act: Callable[[], object], rng: random.Random) -> Overcome:
    rig.wait_for_step(stage, rng.randint(8, 12), 300)
    before, lines, began = last(rig, stage), len(read_lines(rig.results.steps_file(stage))), time.time()
    act()
    rig.wait_for(lambda: rig.steps(stage)[-1].world == world and rig.steps(stage)[-1].step > before, 300, SELDOM)
    written = _written(rig, stage)[lines:]
    known = max([before, *(r.step for r in written if r.world != world)])
    further = next(r.time for r in written if r.world == world and r.step > known)
    redone = sum(r.step <= known for r in written if r.world == world)
    return Overcome(what, stage, known, further - began, redone)


RESTARTS = 3
"""Plain restarts whose median is taken: the first finds processes that Ray has kept, and is quicker."""


def plain_restart(rig: Rig, rng: random.Random, data: bool, driver: bool = False) -> float:
    """Seconds from a death to the next step, of Ray Train by itself on the rig's cluster: of a worker, or of the `driver`, whose
    command is given again at once.
    """
    steps = rig.folder / f"plain-{data}-{driver}.txt"
    words = [rig.cluster.address, rig.recipe, str(steps), *(["data"] if data else [])]

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.faults.plain", *words]
        with rig.log.open("ab") as out:
            return subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)

    def moments() -> list[float]:
        return [float(line.split()[0]) for line in steps.read_text().splitlines()] if steps.is_file() else []

    rig.run = start()
    found: list[float] = []
    try:
        for _ in range(RESTARTS):
            done = len(moments())
            rig.wait_for(lambda done=done: len(moments()) > done + 8)
            if driver:
                rig.run.kill()
                rig.run.wait()
            else:
                rig.pick(rng, "RayTrainWorker").kill()
            began = time.time()
            if driver:
                rig.run = start()
            rig.wait_for(lambda began=began: moments()[-1] > began + SOON, pause=SELDOM)  # no new process is that quick
            found.append(next(moment for moment in moments() if moment > began + SOON) - began)
        return median(found)
    finally:
        rig.run.kill()
        rig.run.wait()


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
