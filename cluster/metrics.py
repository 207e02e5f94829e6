"""What a run writes down as it goes: a line for every step, a file for every evaluation.

    runs/NAME/steps/align-1f3a09c2.jsonl              StepRecord
    runs/NAME/evaluations/align-1f3a09c2-before.json  Evaluation; -after, and -000200 during the stage
    runs/NAME/parts/align-1f3a09c2/                   the stage's weights as safetensors, a part of the model each

After a kill the steps since the last checkpoint are trained again and their lines written again; readers keep the last.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import field
from functools import cache
from os import PathLike
from pathlib import Path
from tempfile import gettempdir
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from cluster.lines import Follower, Lines
from cluster.phases import Phases
from mllm.evaluate import Answer, ProbeScore, SourceScore
from pipelines.place import Place
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
    `usual` is the median over ranks of each phase; `slowest` is the rank that computed longest, and its phases.
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
    usual: Phases = Phases()
    slowest: tuple[int, Phases] | None = None

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


When = Literal["before", "after", "during"]
"""When in a stage something was measured."""


@spec
class Evaluation:
    """Held-out results at one border of the curriculum, or `during` a stage after `step`. `probe` and `answers` may be empty."""

    stage: str
    when: When
    step: int | None = None
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


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection within: of a hundred thousand records that all are kept it takes three quarters of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class RunFolder:
    """The files of a run, by name. `root` is the folder `runs/NAME`, on a disk or on S3.

    What a stage leaves is kept under its name and fingerprint, `align-1f3a09c2`: a stage that was changed begins anew beside
    what it was. `stages.json` says which fingerprint each name means now. Steps, and evaluations during a stage, are read once,
    and then only what has come: who looks every few seconds keeps one `RunFolder`.
    """

    def __init__(self, root: Place | PathLike[str] | str) -> None:
        self.root = root if isinstance(root, Place) else Place(root)
        self.logs_of_steps: dict[str, Lines] = {}
        self.read_steps: dict[Place, tuple[Follower, dict[int, StepRecord]]] = {}
        self.read_evaluations: dict[Place, Evaluation] = {}

    @property
    def name(self) -> str:
        return self.root.name

    @property
    def recipe(self) -> Place:
        return self.root / "recipe.json"

    @property
    def report(self) -> Place:
        return self.root / "report.html"

    @property
    def export(self) -> Place:
        return self.root / "export"

    @property
    def logs(self) -> Path:
        """This machine's log files of the run: beside its other files, or on this machine's disk where those are on S3."""
        return self.root.path / "logs" if self.root.local else Path(gettempdir()) / "mllm" / self.name / "logs"

    def name_stages(self, fingerprints: dict[str, str]) -> None:
        """Say which stages the names mean from now on."""
        (self.root / "stages.json").write(json.dumps(fingerprints, indent=1).encode())

    def key(self, stage: str) -> str:
        """The name under which the stage's files are kept."""
        try:
            fingerprint = json.loads((self.root / "stages.json").read_bytes()).get(stage, "")
        except FileNotFoundError:
            fingerprint = ""
        return f"{stage}-{fingerprint[:8]}" if fingerprint else stage

    def checkpoints(self, stage: str) -> Place:
        return self.root / "checkpoints" / self.key(stage)

    def parts(self, stage: str) -> Place:
        """The stage's weights as safetensors."""
        return self.root / "parts" / self.key(stage)

    def steps_file(self, stage: str) -> Place:
        return self.root / "steps" / f"{self.key(stage)}.jsonl"

    def write_step(self, stage: str, record: StepRecord) -> None:
        """Write a step down; on S3 some seconds later, from another thread."""
        if stage not in self.logs_of_steps:
            self.logs_of_steps[stage] = Lines(self.steps_file(stage))
        self.logs_of_steps[stage].append([_step_adapter().dump_json(record)])

    def flush_steps(self) -> None:
        """Wait until all steps are stored."""
        for lines in self.logs_of_steps.values():
            lines.flush()

    def steps(self, stage: str) -> list[StepRecord]:
        """Steps of a stage, each once, in order. A line that a kill cut short is passed over."""
        file = self.steps_file(stage)
        follower, records = self.read_steps.setdefault(file, (Follower(file), {}))
        with _uncollected():
            for line in follower.read():
                record = parse_step(line)
                if record:
                    records[record.step] = record
        return [records[step] for step in sorted(records)]

    def write_evaluation(self, evaluation: Evaluation) -> None:
        when = evaluation.when if evaluation.step is None else f"{evaluation.step:06d}"
        self._evaluation(evaluation.stage, when).write(_evaluation_adapter().dump_json(evaluation, indent=1))

    def evaluation(self, stage: str, when: When) -> Evaluation | None:
        try:
            return _evaluation_adapter().validate_json(self._evaluation(stage, when).read_bytes())
        except FileNotFoundError:
            return None

    def evaluations(self, stage: str) -> list[Evaluation]:
        """Those during a stage, by step."""
        folder, key = self.root / "evaluations", self.key(stage)
        names = [name for name in folder.names() if re.fullmatch(re.escape(key) + r"-\d{6,}\.json", name)]
        return [self._during(folder / name) for name in sorted(names, key=lambda name: (len(name), name))]

    def _during(self, file: Place) -> Evaluation:
        """One that nobody writes again."""
        if file not in self.read_evaluations:
            self.read_evaluations[file] = _evaluation_adapter().validate_json(file.read_bytes())
        return self.read_evaluations[file]

    def _evaluation(self, stage: str, when: str) -> Place:
        return self.root / "evaluations" / f"{self.key(stage)}-{when}.json"
