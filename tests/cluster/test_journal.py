"""Events add up to the state of a run, and survive being written."""

from pathlib import Path

from cluster.journal import Event, Journal, RunFailed, RunFinished, RunStarted, RunState, StageFinished, StageStarted

STARTED = RunStarted(time=1.0, recipe="r", workers=(2, 2), versions={"torch": "2"})
ALIGN = StageStarted(time=2.0, stage="align", fingerprint="a1", steps=4, parts=())
ALIGNED = StageFinished(time=3.0, stage="align", fingerprint="a1", checkpoint="checkpoints/align/step-000004")
FAILED = RunFailed(time=4.0, stage="pretrain", error="disk full")


def test_replay_knows_what_is_done_running_and_failed() -> None:
    running = RunState.replay([STARTED, ALIGN])
    assert (running.stage, running.finished, running.finished_stages) == ("align", False, ())
    failed = RunState.replay([STARTED, ALIGN, ALIGNED, FAILED])
    assert failed.failure == "disk full"
    assert failed.finished_stage("a1") == ALIGNED
    assert failed.finished_stage("a2") is None
    again = RunState.replay([STARTED, ALIGN, ALIGNED, FAILED, STARTED])
    assert again.failure is None
    assert len(again.starts) == 2
    assert RunState.replay([STARTED, ALIGN, ALIGNED, RunFinished(time=9.0)]).finished


def test_events_are_read_back_in_the_order_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    events: list[Event] = [STARTED, ALIGN, ALIGNED, FAILED]
    for event in events:
        journal.append(event)
    assert Journal(tmp_path).events() == events
    assert [file.name for file in sorted((tmp_path / "journal").iterdir())][:2] == [
        "000000-run_started.json",
        "000001-stage_started.json",
    ]
