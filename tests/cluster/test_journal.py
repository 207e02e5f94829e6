"""Events add up to the state of a run, and survive being written."""

from pathlib import Path

import pytest

from cluster import journal as journal_room
from cluster.journal import (
    Event,
    Journal,
    OldRun,
    RunFailed,
    RunFinished,
    RunStarted,
    RunState,
    StageFinished,
    StageStarted,
)
from pipelines.place import Place

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
    assert Journal(tmp_path).state() == RunState.replay(events)


def test_a_long_journal_is_read_in_chapters_and_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_room, "CHAPTER", 4)
    events: list[Event] = [STARTED, ALIGN, ALIGNED] * 3 + [FAILED]
    for event in events:
        Journal(tmp_path).append(event)
    assert Journal(tmp_path).events() == events
    for number in range(8):
        (tmp_path / "journal" / f"{number:06d}.json").unlink()
    assert Journal(tmp_path).events() == events, "the chapter has what is in it"


def test_pages_between_chapters_say_the_same(anywhere: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_room, "CHAPTER", 8)
    monkeypatch.setattr(journal_room, "PAGE", 3)
    events: list[Event] = [RunStarted(time=n, recipe="r", workers=(2, 2), versions={}) for n in range(24)]
    reader, asleep = Journal(anywhere), Journal(anywhere)
    writer = Journal(anywhere)
    for number, event in enumerate(events, 1):
        writer.append(event)
        assert Journal(anywhere).events() == events[:number], "who knows nothing"
        assert reader.events() == events[:number], "who reads on"
        if number in (2, 13, 24):
            assert asleep.events() == events[:number], "who comes now and then"
    folder = anywhere / "journal"
    assert folder.names(prefix="page-") == [f"page-{n:06d}.json" for n in (3, 6, 9, 12, 15, 18, 21)]
    for chapter in folder.names(prefix="chapter-"):
        (folder / chapter).remove()
    assert Journal(anywhere).events() == events, "a chapter that its writer could not write any more is not missed"
    for page in folder.names(prefix="page-"):
        (folder / page).remove()
    assert Journal(anywhere).events() == events
    for number in (*range(6), *range(8, 14)):
        (folder / f"{number:06d}.json").remove()
    (folder / "chapter-000008.json").write(journal_room.dump_chapter(events[:8]))
    (folder / "page-000014.json").write(journal_room.dump_chapter(events[8:14]))
    assert Journal(anywhere).events() == events, "a page has what is in it"


def test_a_stage_that_was_changed_is_not_finished_any_more() -> None:
    changed = StageStarted(time=5.0, stage="align", fingerprint="a2", steps=4, parts=())
    state = RunState.replay([STARTED, ALIGN, ALIGNED, STARTED, changed])
    assert state.finished_stages == ()
    assert state.stage == "align"


def test_a_journal_of_an_older_format_is_refused_with_words(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "000000-run_started.json").write_text("{}")
    with pytest.raises(OldRun, match=r"written by an older version.*--run"):
        Journal(tmp_path).state()
