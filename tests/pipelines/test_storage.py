"""Bytes from a real S3 server, as from a disk; and what happens when it fails for a moment, or for good."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path

import fsspec
import pytest

from pipelines import reach, storage, uploads
from pipelines.place import Place
from pipelines.storage import Storage, StorageError
from tests.s3 import BUCKET, Proxy, Server

DATA = bytes(range(256)) * 400


@pytest.fixture(params=["disk", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder on each kind of storage, with a few files."""
    if request.param == "disk":
        home = str(tmp_path)
    else:
        server: Server = request.getfixturevalue("s3")
        storage.use(server.storage)
        home = f"s3://{BUCKET}/{tmp_path.name}"
    for name in ("a.bin", "b.bin", "deep/c.bin"):
        storage.write(f"{home}/{name}", DATA + name.encode())
    yield home
    storage.use(Storage())


def test_ranges_listings_and_whole_files(root: str) -> None:
    whole = DATA + b"a.bin"
    assert storage.read(f"{root}/a.bin") == whole
    assert storage.read(f"{root}/a.bin", 1000, 1010) == whole[1000:1010]
    assert storage.read(f"{root}/a.bin", len(whole) - 3, len(whole) + 99) == b"bin"
    assert storage.stat(f"{root}/a.bin").size == len(whole)
    assert [name.rsplit("/", 1)[1] for name in storage.glob(f"{root}/*.bin")] == ["a.bin", "b.bin"]
    assert storage.exists(f"{root}/deep/c.bin")
    assert not storage.exists(f"{root}/deep/d.bin")
    assert not storage.exists(f"{root}/deep/c.bin/below")


def test_many_ranges_come_back_in_order_and_what_is_not_there_as_none(root: str) -> None:
    wanted = [(f"{root}/{'ab'[i % 2]}.bin", 7 * i, 7 * i + 5) for i in range(40)]
    found = storage.read_many([*wanted, (f"{root}/none.bin", 0, 1), (f"{root}/deep", None, None)])
    assert found == [*((DATA * 2)[start:stop] for _, start, stop in wanted), None, None]


@pytest.mark.parametrize(
    "sizes", [[1] * 2500, [0, 7, 0, 1000, 3, 0], [100, 10**6, 5], []], ids=["many", "some", "short", "none"]
)
def test_a_range_fills_buffers_one_after_the_other_and_says_how_far_it_went(
    root: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = (DATA + b"a.bin")[13:]
    buffers = [bytearray(size) for size in sizes]
    monkeypatch.setattr(storage, "PORTION", 64)
    length, digests = storage.read_into(f"{root}/a.bin", 13, [*map(memoryview, buffers)], sha256)
    assert length == min(len(whole), sum(sizes))
    assert b"".join(buffers)[:length] == whole[:length]
    full = [number for number in range(len(sizes)) if sum(sizes[: number + 1]) <= length]
    assert [digests[number].digest() for number in full] == [sha256(buffers[number]).digest() for number in full]
    with pytest.raises(FileNotFoundError):
        storage.read_into(f"{root}/none.bin", 0, [memoryview(bytearray(1))], sha256)


def test_an_empty_file_and_a_range_behind_the_end_are_empty(root: str) -> None:
    storage.write(f"{root}/empty.bin", b"")
    assert storage.read(f"{root}/empty.bin", 0, 100) == b""
    assert storage.read(f"{root}/a.bin", len(DATA) + 500, len(DATA) + 600) == b""
    assert storage.read(f"{root}/a.bin", 7, 7) == b""
    assert storage.read_many([(f"{root}/empty.bin", 0, 9), (f"{root}/a.bin", 0, 2)]) == [b"", DATA[:2]]


def test_reads_ahead_come_in_order_and_no_more_of_them_than_asked() -> None:
    begun: list[int] = []

    def read(number: int) -> int:
        begun.append(number)
        return number

    results = storage.ahead((partial(read, n) for n in range(50)), depth=3)
    assert next(results) == 0
    time.sleep(0.05)
    assert max(begun) <= 4
    assert list(results) == list(range(1, 50))


def test_a_failed_read_ahead_is_raised_where_it_is_needed() -> None:
    def read(number: int) -> int:
        if number == 5:
            raise StorageError("gone")
        return number

    results = storage.ahead((partial(read, n) for n in range(9)), depth=4)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(StorageError, match="gone"):
        next(results)


def test_an_opened_file_is_read_and_sought_in(root: str) -> None:
    with storage.open_file(f"{root}/b.bin") as file:
        assert file.read(10) == DATA[:10]
        file.seek(5000)
        assert file.read(10) == DATA[5000:5010]
        assert len(file.read()) == len(DATA) + 5 - 5010


def test_a_file_that_is_written_again_has_another_version(root: str) -> None:
    before = storage.stat(f"{root}/a.bin")
    time.sleep(0.01)
    storage.write(f"{root}/a.bin", DATA[::-1])
    after = storage.stat(f"{root}/a.bin")
    assert after != before
    assert storage.read(f"{root}/a.bin") == DATA[::-1]


def test_of_many_who_create_a_file_one_does(root: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda who: storage.create(f"{root}/one.json", b"by %d" % who), range(8)))
    assert made.count(True) == 1
    assert storage.read(f"{root}/one.json") == b"by %d" % made.index(True)
    assert storage.create(f"{root}/one.json", b"by %d" % made.index(True))  # its answer was lost, and it asks again


def test_what_others_write_is_seen_at_once_though_the_folder_was_listed_before(root: str, s3: Server) -> None:
    assert storage.names(f"{root}/deep") == ["c.bin"]
    if root.startswith("s3"):
        client = fsspec.filesystem("s3", **s3.storage.s3(), skip_instance_cache=True)
        client.pipe_file(f"{root}/deep/d.bin", DATA)
    else:
        Path(root, "deep", "d.bin").write_bytes(DATA)
    assert storage.names(f"{root}/deep", after="c.bin") == ["d.bin"]
    assert storage.read_many([(f"{root}/deep/d.bin", None, None)]) == [DATA]
    assert storage.read(f"{root}/deep/d.bin") == DATA
    assert storage.stat(f"{root}/deep/d.bin").size == len(DATA)


def test_a_folder_tells_what_is_in_it_and_can_be_removed(root: str) -> None:
    assert storage.names(root) == ["a.bin", "b.bin", "deep"]
    assert storage.names(f"{root}/none") == []
    assert storage.names(root, after="a.bin", prefix="b") == ["b.bin"]
    assert storage.names(root, prefix="c") == storage.names(f"{root}/none", after="a") == []
    storage.remove(f"{root}/a.bin")
    storage.remove(f"{root}/deep")
    storage.remove(f"{root}/none")
    assert not storage.names(f"{root}/deep")
    assert "deep" not in storage.names(root)
    assert "a.bin" not in storage.names(root)
    assert "b.bin" in storage.names(root)


def test_a_place_is_a_path_on_any_storage(root: str) -> None:
    place = Place(root) / "new" / "words.txt"
    assert not place.is_file()
    place.write(b"one")
    assert place.read_text() == "one"
    assert not place.create(b"two")
    assert (place.name, place.parent.name, place.under(Place(root))) == ("words.txt", "new", "new/words.txt")
    assert place.parent.names() == ["words.txt"]
    place.remove()
    assert place.parent.names() == []


def test_what_is_not_there_is_said_at_once(root: str) -> None:
    started = time.monotonic()
    with pytest.raises(FileNotFoundError):
        storage.read(f"{root}/none.bin")
    assert time.monotonic() - started < reach.PAUSE * 2


@pytest.fixture
def proxy(s3: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    storage.use(s3.storage)
    storage.write(f"s3://{BUCKET}/steady.bin", DATA)
    monkeypatch.setattr(reach, "PAUSE", 0.02)
    proxy = Proxy(s3.port)
    storage.use(proxy.storage())
    yield proxy
    proxy.close()
    storage.use(Storage())


@pytest.mark.parametrize("fault", ["refuse", "503", "truncate"])
def test_a_passing_fault_is_tried_again_and_changes_nothing(proxy: Proxy, fault: str) -> None:
    proxy.faults += [fault, fault, ""]
    assert storage.read(f"s3://{BUCKET}/steady.bin", 100, 5000) == DATA[100:5000]
    assert proxy.met == [fault, fault, ""]


def test_one_of_many_requests_that_fails_is_tried_again_alone(proxy: Proxy) -> None:
    proxy.faults += ["", "503", ""]
    found = storage.read_many([(f"s3://{BUCKET}/steady.bin", i, i + 9) for i in range(3)])
    assert found == [DATA[i : i + 9] for i in range(3)]
    assert len(proxy.met) == 4


def test_a_server_that_says_nothing_meets_its_deadline(proxy: Proxy) -> None:
    storage.use(proxy.storage(deadline=0.5))
    proxy.faults += ["silent"]
    started = time.monotonic()
    assert storage.read(f"s3://{BUCKET}/steady.bin", 0, 10) == DATA[:10]
    assert 0.4 < time.monotonic() - started < 10


def test_an_outage_shorter_than_its_patience_only_makes_a_run_wait(proxy: Proxy) -> None:
    storage.use(proxy.storage(patience=60))
    proxy.faults += ["refuse"] * (reach.ATTEMPTS + 3)
    assert storage.read(f"s3://{BUCKET}/steady.bin", 0, 10) == DATA[:10]
    assert len(proxy.met) == reach.ATTEMPTS + 4


def test_an_outage_ends_with_words_about_storage_not_data(proxy: Proxy) -> None:
    proxy.faults += ["503"] * 99
    with pytest.raises(StorageError, match=r"steady\.bin: no answer in 5 attempts, .* not the data"):
        storage.read(f"s3://{BUCKET}/steady.bin")
    assert len(proxy.met) == reach.ATTEMPTS


def test_a_wrong_secret_is_refused_at_once_and_never_shown(s3: Server) -> None:
    wrong = Storage(endpoint=s3.storage.endpoint, region="us-east-1", key="loopback-key", secret="not-the-secret")
    storage.use(wrong)
    try:
        with pytest.raises(PermissionError) as refused:
            storage.read(f"s3://{BUCKET}/ready")
        assert "not-the-secret" not in f"{refused.value} {wrong!r} {wrong}"
    finally:
        storage.use(Storage())


LARGE = bytes(range(256)) * (uploads.PART // 100)
"""Two parts and a half."""


def begin_and_fail(uri: str) -> None:
    with storage.open_write(uri) as out:
        out.write(LARGE)
        raise RuntimeError("on the way")


def test_a_large_file_is_whole_once_it_is_written_and_nothing_of_it_is_there_when_that_fails(root: str) -> None:
    with storage.open_write(f"{root}/sub/large.bin") as out:
        for start in range(0, len(LARGE), 999_999):
            out.write(memoryview(LARGE)[start : start + 999_999])
        assert not storage.exists(f"{root}/sub/large.bin")
    assert storage.read(f"{root}/sub/large.bin") == LARGE
    with storage.open_write(f"{root}/sub/small.bin") as out:
        out.write(b"few")
    assert storage.sizes(f"{root}/sub") == {"large.bin": len(LARGE), "small.bin": 3}
    with pytest.raises(RuntimeError, match="on the way"):
        begin_and_fail(f"{root}/sub/never.bin")
    assert storage.names(f"{root}/sub") == ["large.bin", "small.bin"]
    assert storage.sizes(f"{root}/none") == {}


def unfinished(server: Server) -> list[str]:
    """Uploads of parts that were neither completed nor given up."""
    client = fsspec.filesystem("s3", **server.storage.s3(), skip_instance_cache=True)
    return [upload["Key"] for upload in client.list_multipart_uploads(BUCKET)]


@pytest.mark.parametrize("fault", ["refuse", "503", "truncate"])
def test_each_part_of_a_large_file_is_tried_again(proxy: Proxy, s3: Server, fault: str) -> None:
    # Its beginning is refused, then two of its parts, then its completion.
    proxy.faults[:] = ["503", "", "", fault, "", fault, "", "", "503"]
    with storage.open_write(f"s3://{BUCKET}/streamed-{fault}.bin") as out:
        out.write(LARGE)
    assert proxy.met.count(fault) >= 2
    storage.use(s3.storage)
    assert storage.read(f"s3://{BUCKET}/streamed-{fault}.bin") == LARGE
    assert f"streamed-{fault}.bin" not in unfinished(s3)


def test_a_completion_whose_answer_was_lost_is_no_failure(proxy: Proxy) -> None:
    proxy.faults[:] = [""] * 4 + ["truncate"]  # begin, three parts; what comes last is done and its answer cut off
    with storage.open_write(f"s3://{BUCKET}/lost.bin") as out:
        out.write(LARGE)
    assert proxy.met[4:] == ["truncate", "", *proxy.met[6:]]
    assert storage.read(f"s3://{BUCKET}/lost.bin") == LARGE


def test_a_large_file_that_storage_refuses_ends_with_words_and_leaves_nothing(proxy: Proxy, s3: Server) -> None:
    proxy.faults[:] = [""] * 2 + ["503"] * 40
    with pytest.raises(StorageError, match="no answer"), storage.open_write(f"s3://{BUCKET}/refused.bin") as out:
        out.write(LARGE * 3)
    proxy.faults.clear()
    storage.use(s3.storage)
    assert not storage.exists(f"s3://{BUCKET}/refused.bin")
