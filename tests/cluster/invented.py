"""A run that never was: honest records, written through the same dataclasses that a real one writes."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path

from PIL import Image

from cluster import quarantine
from cluster.journal import (
    Decision,
    Event,
    Fault,
    GroupStarted,
    Journal,
    RunFailed,
    RunFinished,
    RunStarted,
    RunState,
    StageFinished,
    StageStarted,
)
from cluster.metrics import Evaluation, PackRecord, RunFolder, SourceLoss, StepRecord, When
from cluster.phases import Phases
from mllm.evaluate import Answer, ProbeScore, SourceScore
from mllm.parts import PartReport
from mllm.recipe import Recipe, dump
from pipelines.types import Reason, Rejected, RowId

NOON = 1_800_000_000.0


def step(number: int, of: int, time: float = NOON) -> StepRecord:
    """Step `number` of `of`: the loss falls, one row in ten steps is dropped."""
    loss = 4 + 3 * math.exp(-3 * number / of) + 0.1 * math.sin(number)
    bad = number % 10 == 0
    return StepRecord(
        step=number,
        progress=number / of,
        loss=loss,
        grad_norm=1 + 2 / number,
        lr=1e-3 * (1 - number / of),
        tokens=2000,
        learned=900,
        images=12,
        rows=20,
        fill=0.97,
        imbalance=1.02,
        seconds=0.5,
        data_wait=0.02,
        world=2,
        time=time + number,
        sources=(
            SourceLoss(source="example-pages", loss=loss + 0.5, accuracy=0.1, tokens=500),
            SourceLoss(source="example-pairs", loss=loss - 0.5, accuracy=0.2, tokens=400),
        ),
        packs=(PackRecord(window=number, pack=0, digest=number),),
        dropped=(f"example-pairs/00000.tar row {number}: image file is truncated (ends at <byte> 512)",) if bad else (),
        reasons={"image file is truncated": 1} if bad else {},
        usual=Phases(data=0.02, vision=0.1, lm=0.3, communication=0.08),
        slowest=(number % 3 // 2, Phases(data=0.01, vision=0.12, lm=0.35, communication=0.02)),
    )


def stage_started(stage: str, steps: int | None) -> StageStarted:
    parts = (
        PartReport(part="encoder", trained=0, frozen=896_768, lr=None),
        PartReport(part="connector", trained=61_824, frozen=0, lr=5e-3),
        PartReport(part="lm", trained=0, frozen=2_410_176, lr=None),
    )
    return StageStarted(time=NOON, stage=stage, fingerprint=stage, steps=steps, parts=parts)


def stage_finished(stage: str) -> StageFinished:
    return StageFinished(time=NOON + 90, stage=stage, fingerprint=stage, checkpoint=f"checkpoints/{stage}/step-000040")


def evaluation(
    stage: str, when: When, loss: float, written: str = "a <b>dog</b>", step: int | None = None
) -> Evaluation:
    """Pairs at `loss`; pages get worse by as much as pairs get better than 7. Those `during` a stage have no pictures."""
    buffer = io.BytesIO()
    Image.new("RGB", (96, 96), (200, 120, 40)).save(buffer, "PNG")
    return Evaluation(
        stage=stage,
        when=when,
        step=step,
        scores=(
            SourceScore(source="pairs-heldout", loss=loss, accuracy=0.5 - loss / 20, tokens=900),
            SourceScore(source="pages-heldout", loss=14 - loss, accuracy=0.1, tokens=8000),
        ),
        probe=(
            ProbeScore(shots=0, accuracy=0.25, questions=24, choices=4),
            ProbeScore(shots=4, accuracy=0.5, questions=24, choices=4),
        ),
        answers=(
            Answer(
                source="pairs-heldout",
                row="pairs-heldout/00000.tar row 0",
                image="" if when == "during" else base64.b64encode(buffer.getvalue()).decode(),
                prompt="",
                expected="an orange square",
                written=written,
            ),
        ),
    )


def invented_run(root: Path, recipe: Recipe, ending: str, steps: int = 40) -> tuple[RunFolder, RunState]:
    """`recipe` through `align` and half of `pretrain`; `ending` is `running`, `failed` or `finished` (all stages done)."""
    run, journal = RunFolder(root), Journal(root)
    root.mkdir(parents=True)
    run.recipe.write(dump(recipe).encode())
    events: list[Event] = [RunStarted(time=NOON, recipe=recipe.name, workers=(2, 2), versions={"torch": "2.13.0"})]
    run.write_evaluation(evaluation("align", "before", 7.0))
    for number, stage in enumerate(recipe.stages if ending == "finished" else recipe.stages[:2]):
        whole = ending == "finished" or number == 0
        events.append(stage_started(stage.name, steps))
        for done in range(1, (steps if whole else steps // 2) + 1):
            run.write_step(stage.name, step(done, steps, NOON + 100 * number))
        if number:
            run.write_evaluation(evaluation(stage.name, "before", 7.0 - number))
        if whole:
            run.write_evaluation(evaluation(stage.name, "after", 6.0 - number, "orange"))
            events.append(stage_finished(stage.name))
    if ending == "failed":
        events.append(
            RunFailed(time=NOON + 200, stage="pretrain", error="stage 'pretrain': shard <a.tar> is gone\nno retry")
        )
    if ending == "finished":
        events.append(RunFinished(time=NOON + 400))
    for event in events:
        journal.append(event)
    return run, journal.state()


SCRIPT = "<script>document.title = 'taken over'</script>"
"""What a hostile corpus might have a page run."""


def troubled(run: RunFolder, after: float = NOON) -> RunState:
    """The same run with what goes wrong: workers that come and go, faults and decisions, rows whose words are a script."""
    journal = Journal(run.root)
    for event in (
        GroupStarted(time=after, stage="align", fingerprint="align", world=2, step=0),
        Fault(time=after + 12, what="hang", stage="align", step=11, rank=1, detail=f"rank 1 is stopped {SCRIPT}"),
        Decision(time=after + 13, what="restart", stage="align", why="rank 1 is ended, and the group begins again"),
        GroupStarted(time=after + 20, stage="align", fingerprint="align", world=1, step=10),
        Fault(time=after + 24, what="not_finite", stage="align", step=14, detail="loss nan, gradient norm nan"),
        Decision(time=after + 24, what="replay", stage="align", why="the same packs tell data from machine"),
        Decision(time=after + 25, what="take", stage="align", why="the second time it came out well"),
        GroupStarted(time=after + 30, stage="align", fingerprint="align", world=4, step=20),
        Fault(time=after + 80, what="preemption", stage="align", step=30, detail="the node of rank 3 is taken away"),
        Decision(time=after + 81, what="save_and_leave", stage="align", why="saved now, nothing is done twice"),
        GroupStarted(time=after + 85, stage="align", fingerprint="align", world=3, step=31),
        GroupStarted(time=after + 101, stage="pretrain", fingerprint="pretrain", world=3, step=0),
    ):
        journal.append(event)
    rows = [
        Rejected(
            row=RowId(corpus="example-pairs", shard="00000.tar", row=row, epoch=0),
            reason=Reason.TRUNCATED_IMAGE,
            detail=f"ends at byte 512 {SCRIPT}" if row == 10 else "ends at <byte> 512",
        )
        for row in (10, 20, 30, 40)
    ]
    quarantine.append(run, "align", rows)
    return journal.state()
