"""A run that never was: honest records, written through the same dataclasses that a real one writes."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path

from PIL import Image

from cluster.journal import Event, Journal, RunFailed, RunFinished, RunStarted, RunState, StageFinished, StageStarted
from cluster.metrics import Evaluation, PackRecord, RunFolder, SourceLoss, StepRecord
from mllm.evaluate import Answer, ProbeScore, SourceScore
from mllm.parts import PartReport
from mllm.recipe import Recipe, dump

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


def evaluation(stage: str, when: str, loss: float, written: str = "a <b>dog</b>") -> Evaluation:
    """Pairs at `loss`; pages get worse by as much as pairs get better than 7."""
    buffer = io.BytesIO()
    Image.new("RGB", (96, 96), (200, 120, 40)).save(buffer, "PNG")
    return Evaluation(
        stage=stage,
        when="before" if when == "before" else "after",
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
                image=base64.b64encode(buffer.getvalue()).decode(),
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
