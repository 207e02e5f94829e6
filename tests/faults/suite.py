"""A run through faults, beside the same run without any: what was lost, repeated or changed, and how long it took."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from cluster.lines import read_lines
from cluster.metrics import RunFolder, StepRecord, parse_step
from tests.faults.catalogue import Fault
from tests.faults.rig import Rig

SOON, LATE = 2, 5
"""A fault comes so many steps after the last one was overcome."""


@dataclass(frozen=True)
class Overcome:
    """One fault in one stage. `seconds` from the fault to the first step that was new; `redone` steps trained twice."""

    what: str
    stage: str
    step: int
    seconds: float
    redone: int
    failed: str = ""


def go_through(rig: Rig, stage: str, faults: Sequence[Fault], rng: random.Random) -> list[Overcome]:
    """Let each fault happen to the stage that is being trained, at random steps."""
    found = []
    for fault in faults:
        rig.wait_for_step(stage, last(rig, stage) + rng.randint(SOON, LATE), 240)
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
    rig.wait_for(lambda: last(rig, stage) > before + 1, 300)
    written = [r for line in read_lines(rig.results.steps_file(stage)) if (r := parse_step(line))][lines:]
    moments = [began, *(record.time for record in written if record.time > began)]
    longest = max((b - a for a, b in pairwise(moments)), default=0.0)
    redone = sum(record.step <= before for record in written)
    fault.after(rig)
    return Overcome(fault.what, stage, before, longest, redone)


def last(rig: Rig, stage: str) -> int:
    """The last step written down."""
    steps = rig.steps(stage)
    return steps[-1].step if steps else 0


def differences(broken: Sequence[StepRecord], whole: Sequence[StepRecord], within: float = 1e-4) -> list[str]:
    """In what a stage that went through faults differs from one that did not: steps, packs, rates, losses."""
    found = []
    if [r.step for r in broken] != [r.step for r in whole]:
        found.append(f"steps {len(broken)} of {len(whole)}")
    for one, other in zip(broken, whole, strict=False):
        if one.packs != other.packs:
            found.append(f"step {one.step}: other packs")
        if one.lr != other.lr:
            found.append(f"step {one.step}: lr {one.lr} instead of {other.lr}")
        if abs(one.loss - other.loss) > within * abs(other.loss):
            found.append(f"step {one.step}: loss {one.loss} instead of {other.loss}")
    return found


def rows_lost_and_repeated(broken: RunFolder, whole: RunFolder, stage: str) -> tuple[int, int]:
    """Packs that the committed weights have not seen, or have seen more than once, by the digests of what was trained."""
    seen = [pack for record in broken.steps(stage) for pack in record.packs]
    meant = [pack for record in whole.steps(stage) for pack in record.packs]
    return len(set(meant) - set(seen)), len(seen) - len(set(seen))
