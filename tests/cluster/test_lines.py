"""Lines that are appended come out at the other end, whole and in order, on a disk as on S3."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import lines
from cluster.lines import Follower, Lines, read_lines
from pipelines import reach, storage
from pipelines.place import Place
from pipelines.storage import Storage, StorageError
from tests.s3 import BUCKET, Proxy, Server


@pytest.fixture
def place(anywhere: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(lines, "EVERY", 0.01)
    return anywhere / "steps.jsonl"


def test_a_reader_follows_two_writers_one_after_the_other(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "SEGMENT", 40)
    follower = Follower(place)
    assert follower.read() == []
    seen: list[bytes] = []
    for writer in range(2):
        out = Lines(place)
        for number in range(6):
            out.append([b"writer %d line %d" % (writer, number)])
            if number % 2:
                out.flush()
                seen += follower.read()
    expected = [b"writer %d line %d" % (writer, number) for writer in range(2) for number in range(6)]
    assert seen == expected
    assert read_lines(place) == expected


def test_a_line_that_is_not_whole_is_waited_for_and_one_cut_short_stands_alone(tmp_path: Path) -> None:
    place = Place(tmp_path / "steps.jsonl")
    Lines(place).append([b"one", b"two"])
    place.path.write_bytes(b"one\ntw")
    follower = Follower(place)
    assert follower.read() == [b"one"]
    Lines(place).append([b"three"])
    assert follower.read() == [b"tw", b"three"]


def test_an_outage_holds_up_the_record_and_not_the_writer(s3: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "PAUSE", 0.02)
    proxy = Proxy(s3.port)
    storage.use(proxy.storage(patience=60))
    try:
        out = Lines(Place(f"s3://{BUCKET}/outage.jsonl"))
        proxy.faults += ["refuse"] * 8
        out.append([b"written while nobody answers"])
        out.flush()
        assert read_lines(out.place) == [b"written while nobody answers"]
        storage.use(proxy.storage())
        proxy.faults += ["503"] * 99
        out.append([b"never"])
        with pytest.raises(StorageError):
            out.flush()
    finally:
        storage.use(Storage())
        proxy.close()
