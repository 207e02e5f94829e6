"""What a run tells a monitor: every metric is drawn, every curve is of a metric, and files of a run become their points."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster import gauges
from cluster.cli import main
from cluster.grafana import ALERTS, ROWS, alerts, dashboard, write
from cluster.journal import Fault, GroupStarted, Journal, RunStarted, StageStarted
from cluster.metrics import Evaluation, PackRecord, RunFolder, SourceLoss, StepRecord
from cluster.telemetry import Telemetry, TensorBoard, goodput, scalars
from cluster.views import StageView
from mllm.evaluate import SourceScore
from mllm.recipe import Recipe
from pipelines.place import Place
from tests.prometheus import ABSENT, PROMTOOL

EVERY = [*gauges.OF_RUN, *gauges.OF_RANKS]


def step(number: int, time: float = 0.0, loss: float = 2.0) -> StepRecord:
    return StepRecord(
        step=number,
        progress=number / 10,
        loss=loss,
        grad_norm=1.0,
        lr=1e-3,
        tokens=100,
        learned=80,
        images=3,
        rows=4,
        fill=0.9,
        imbalance=1.1,
        seconds=1.0,
        data_wait=0.1,
        world=2,
        time=time or 100.0 + number,
        sources=(SourceLoss(source="pairs", loss=loss, accuracy=0.5, tokens=80),),
        packs=(PackRecord(window=0, pack=number, digest=number),),
    )


class Heard:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.evaluations: list[tuple[float, int]] = []
        self.restarts = 0

    def step(self, view: StageView, record: StepRecord) -> None:
        assert view.steps[-1].step >= record.step
        self.steps.append(record.step)

    def evaluation(self, evaluation: Evaluation, step: int) -> None:
        self.evaluations.append((evaluation.scores[0].loss, step))

    def events(self, events, stage: str) -> None:
        self.restarts = sum(isinstance(event, GroupStarted) and event.stage == stage for event in events) - 1

    def close(self) -> None: ...


class Broken(Heard):
    def step(self, view: StageView, record: StepRecord) -> None:  # noqa: ARG002 -- a sink's
        raise OSError("no room")


def test_every_metric_is_drawn_once_at_least_and_has_a_name_of_its_own() -> None:
    drawn = {curve.metric for _, row in ROWS for panel in row for curve in panel.curves}
    assert drawn == set(EVERY)
    assert len({metric.name for metric in EVERY}) == len(EVERY)
    for metric in EVERY:
        assert re.fullmatch(r"mllm_[a-z_]+[a-z]", metric.name)
        assert not metric.name.endswith("_total"), "Ray appends it to counters"


def test_alerts_ask_for_metrics_that_there_are() -> None:
    exported = {f"{metric.exported}{'_total' if metric.counter else ''}" for metric in EVERY}
    for alert in ALERTS:
        asked = set(re.findall(r"ray_mllm_\w+", alert.when))
        assert asked
        assert asked <= exported, alert.name
    names = {rule["alert"] for rule in alerts()["groups"][0]["rules"]}
    assert len(names) == len(ALERTS)


def test_the_command_writes_a_page_that_grafana_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["dashboard", "--out", str(tmp_path / "there")])
    page, rules = capsys.readouterr().out.split()
    model = json.loads(Path(page).read_text())
    assert model == json.loads(json.dumps(dashboard()))
    places = [tuple(panel["gridPos"].values()) for panel in model["panels"]]
    cells = [(x + i, y + j) for x, y, w, h in places for i in range(w) for j in range(h)]
    assert len(cells) == len(set(cells)), "no panel lies on another"
    assert all(x + w <= 24 for x, _, w, _ in places)
    ids = [panel["id"] for panel in model["panels"]]
    assert len(ids) == len(set(ids))
    assert "MllmNoProgress" in Path(rules).read_text()


@pytest.mark.skipif(PROMTOOL is None, reason=ABSENT)
def test_prometheus_takes_the_alert_rules(tmp_path: Path) -> None:
    _, rules = write(tmp_path)
    told = subprocess.run([str(PROMTOOL), "check", "rules", str(rules)], capture_output=True, text=True, timeout=30)
    assert told.returncode == 0, told.stdout + told.stderr
    assert f"SUCCESS: {len(ALERTS)} rules found" in told.stdout


def test_a_metric_is_given_exactly_its_tags() -> None:
    board = gauges.Board("run", "align")
    with pytest.raises(ValueError, match=r"mllm_source_loss has the tags \('source',\) and was given \('rank',\)"):
        board.set(gauges.SOURCE_LOSS, 1.0, rank="0")


def test_sinks_hear_of_steps_as_they_are_written_and_one_that_fails_is_left_out(tmp_path: Path, recipe: Recipe) -> None:
    run = RunFolder(tmp_path / "run")
    journal = Journal(run.root)
    journal.append(RunStarted(time=1.0, recipe="x", workers=(1, 1), versions={}))
    heard, said = Heard(), list[str]()
    telemetry = Telemetry(run, recipe, [Broken(), heard], said.append)
    telemetry._look()
    assert heard.steps == []

    journal.append(StageStarted(time=1.0, stage="align", fingerprint="f", steps=10, parts=()))
    journal.append(GroupStarted(time=1.0, stage="align", fingerprint="f", world=2, step=0))
    run.write_step("align", step(1))
    run.write_step("align", step(2))
    run.flush_steps()
    telemetry._look()
    assert heard.steps == [2], "what was there before it looked is no news; the last says where the run is"
    assert said == ["Broken gets no more numbers of this run (OSError: no room); the run goes on"]

    journal.append(Fault(time=2.0, what="workers", stage="align", step=2, detail="killed"))
    journal.append(GroupStarted(time=3.0, stage="align", fingerprint="f", world=2, step=1))
    run.write_step("align", step(2))
    run.write_step("align", step(3))
    run.write_evaluation(
        Evaluation(stage="align", when="after", scores=(SourceScore(source="pairs", loss=1.5, accuracy=0.5, tokens=9),))
    )
    run.flush_steps()
    telemetry._look()
    assert heard.steps == [2, 2, 3]
    assert heard.evaluations == [(1.5, 3)]
    assert heard.restarts == 1
    telemetry._look()
    assert heard.evaluations == [(1.5, 3)]
    assert len(said) == 1


def test_goodput_is_the_share_of_time_in_steps_that_count() -> None:
    view = StageView(name="align")
    for number in range(1, 6):
        view.add(step(number))
    assert goodput(view) == pytest.approx(1.0)
    view.add(replace(step(3), time=115.0))  # a restart of 9 s, and two steps that are to be done again
    view.add(replace(step(4), time=116.0))
    assert goodput(view) == pytest.approx(4 / 16)


def test_tensorboard_reads_the_curve_and_not_what_was_done_again(tmp_path: Path) -> None:
    from tensorboardX.proto import event_pb2

    messages: Any = event_pb2  # whose names are made when it is imported
    sink = TensorBoard(Place(tmp_path))
    view = StageView(name="align")
    for record in (step(1), step(2, loss=9.0), step(2, loss=3.0), step(3)):
        view.add(record)
        sink.step(view, record)
    sink.evaluation(
        Evaluation(
            stage="align", when="after", scores=(SourceScore(source="pairs", loss=1.5, accuracy=0.5, tokens=9),)
        ),
        3,
    )
    sink.close()
    events = [
        messages.Event.FromString(data)
        for file in sorted((tmp_path / "align").iterdir())
        for data in records(file.read_bytes())
    ]
    starts = [event for event in events if event.HasField("session_log")]
    assert [event.step for event in starts] == [2], "TensorBoard drops what was from here on before"
    last = {(value.tag, event.step): value.simple_value for event in events for value in event.summary.value}
    assert last["loss", 2] == 3.0
    assert last["loss", 3] == 2.0
    assert last["held_out/pairs/loss", 3] == 1.5
    assert {tag for tag, at in last if at == 3} >= set(scalars(step(3)))


def records(data: bytes) -> list[bytes]:
    """A TFRecord file's records: length, CRC, content, CRC."""
    found = []
    while data:
        size = int.from_bytes(data[:8], "little")
        found.append(data[12 : 12 + size])
        data = data[16 + size :]
    return found
