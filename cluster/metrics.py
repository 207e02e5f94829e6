"""What a run writes down as it goes: a line for every step, a file for every evaluation.

    runs/NAME/steps/align.jsonl              StepRecord
    runs/NAME/evaluations/align-before.json  Evaluation

After a kill the steps since the last checkpoint are trained again and their lines written again; readers keep the last.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from cluster.journal import write_atomically
from mllm.evaluate import Answer, ProbeScore, SourceScore
from pipelines.types import spec


@spec
class SourceLoss:
    """Training result of one source within a step: mean loss a learned token, share predicted right, learned tokens."""

    source: str
    loss: float
    accuracy: float
    tokens: int


@spec
class PackRecord:
    """Which pack was trained: its window and number, and the CRC of its content."""

    window: int
    pack: int
    digest: int


@spec
class StepRecord:
    """One optimiser step, over all ranks. Times are seconds of the slowest rank; `time` is seconds since 1970.

    `tokens` counts all positions, `learned` those with loss; `fill` is tokens by what the packs could hold; `imbalance` is the
    greatest rank's tokens by the mean; `dropped` names rows and reasons as `Rejected.label` does. `taken` is False
    where loss or gradient were no numbers and the weights stayed as they were.
    `flops` are those that the mathematics of the packs needs and `hardware_flops` those that were computed; `peak` is the
    FLOP/s that one rank's device could reach. All three are 0 where nobody knew.
    """

    step: int
    progress: float
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    learned: int
    images: int
    rows: int
    fill: float
    imbalance: float
    seconds: float
    data_wait: float
    world: int
    time: float
    sources: tuple[SourceLoss, ...]
    packs: tuple[PackRecord, ...]
    dropped: tuple[str, ...] = ()
    reasons: dict[str, int] = field(default_factory=dict)
    taken: bool = True
    flops: float = 0.0
    hardware_flops: float = 0.0
    peak: float = 0.0

    __pydantic_config__ = ConfigDict(ser_json_inf_nan="constants")  # a loss may be no number, and must be read again

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation (PaLM, arXiv:2204.02311, B); None where it is not known."""
        return utilisation([self])


def utilisation(steps: Iterable[StepRecord]) -> float | None:
    """Model FLOPs by what the devices could have computed in the steps' time; None where no step knows."""
    known = [step for step in steps if step.flops and step.peak and step.seconds]
    if not known:
        return None
    return sum(step.flops for step in known) / sum(step.seconds * step.world * step.peak for step in known)


@spec
class Evaluation:
    """Held-out results at one border of the curriculum. `probe` and `answers` may be empty."""

    stage: str
    when: Literal["before", "after"]
    scores: tuple[SourceScore, ...]
    probe: tuple[ProbeScore, ...] = ()
    answers: tuple[Answer, ...] = ()


@cache
def _step_adapter() -> TypeAdapter[StepRecord]:
    return TypeAdapter(StepRecord)


@cache
def _evaluation_adapter() -> TypeAdapter[Evaluation]:
    return TypeAdapter(Evaluation)


def parse_step(line: bytes) -> StepRecord | None:
    """A line of a steps file; None when it is not whole."""
    try:
        return _step_adapter().validate_json(line)
    except ValidationError:
        return None


class RunFolder:
    """The files of a run, by name. `root` is the folder `runs/NAME`."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def checkpoints(self, stage: str) -> Path:
        return self.root / "checkpoints" / stage

    def steps_file(self, stage: str) -> Path:
        return self.root / "steps" / f"{stage}.jsonl"

    def mend_steps(self, stage: str) -> None:
        """End a line that a kill cut short, so that the next one stands alone. Call it before writing goes on."""
        file = self.steps_file(stage)
        if file.is_file() and not file.read_bytes().endswith(b"\n"):
            with file.open("ab") as out:
                out.write(b"\n")

    def write_step(self, stage: str, record: StepRecord) -> None:
        file = self.steps_file(stage)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as out:
            out.write(_step_adapter().dump_json(record) + b"\n")

    def steps(self, stage: str) -> list[StepRecord]:
        """Steps of a stage, each once, in order. A line that a kill cut short is passed over."""
        file = self.steps_file(stage)
        records: dict[int, StepRecord] = {}
        for line in file.read_bytes().splitlines() if file.is_file() else []:
            record = parse_step(line)
            if record:
                records[record.step] = record
        return [records[step] for step in sorted(records)]

    def write_evaluation(self, evaluation: Evaluation) -> None:
        file = self.root / "evaluations" / f"{evaluation.stage}-{evaluation.when}.json"
        write_atomically(file, _evaluation_adapter().dump_json(evaluation, indent=1))

    def evaluation(self, stage: str, when: Literal["before", "after"]) -> Evaluation | None:
        file = self.root / "evaluations" / f"{stage}-{when}.json"
        return _evaluation_adapter().validate_json(file.read_bytes()) if file.is_file() else None
