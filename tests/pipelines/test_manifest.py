"""What is written down of a corpus: once, in bounded memory, and not believed when the corpus has changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.cli import main
from pipelines import manifest
from pipelines.corpora import Interleaved, Pairs, TextOnly
from pipelines.manifest import beside, expand, index, plan
from tests.conftest import CORPUS, ROOT


@pytest.fixture
def pairs(tmp_path: Path) -> list[str]:
    """A copy of three shards that a test may spoil."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for number in range(3):
        shutil.copy(CORPUS / f"pairs/0000{number}.tar", folder)
    return expand(f"{folder}/{{00000..00002}}.tar")


def test_a_second_look_scans_nothing_and_finds_the_same(pairs: list[str], tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    first = index(Pairs(name="pairs"), pairs, cache)
    assert first.rows == 276
    assert all(shard.digest and shard.characters and shard.pictures == 92 for shard in first.shards)
    assert not plan(Pairs(name="pairs"), pairs, (cache,)).missing
    assert index(Pairs(name="pairs"), pairs, cache) == first


def test_a_changed_shard_is_named_and_scanned_again(pairs: list[str], tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    before = index(Pairs(name="pairs"), pairs, cache)
    shutil.copy(CORPUS / "pairs/00004.tar", pairs[1])
    planned = plan(Pairs(name="pairs"), pairs, (cache,))
    assert planned.missing == (pairs[1],)
    assert "when it was indexed" in planned.changed[pairs[1]]
    after = index(Pairs(name="pairs"), pairs, cache)
    assert after.fingerprint != before.fingerprint
    assert [a == b for a, b in zip(before.shards, after.shards, strict=True)] == [True, False, True]


def test_a_change_of_the_archive_beside_a_shard_is_a_change_of_the_shard(tmp_path: Path) -> None:
    shutil.copytree(CORPUS / "interleaved", tmp_path / "pages")
    uris = expand(f"{tmp_path}/pages/docs_shard_{{0..1}}_v3.jsonl")
    cache = str(tmp_path / "cache")
    index(Interleaved(name="pages"), uris, cache)
    shutil.copy(CORPUS / "interleaved/images_shard_0.tar", tmp_path / "pages/images_shard_1.tar")
    assert plan(Interleaved(name="pages"), uris, (cache,)).missing == (uris[1],)


def test_copying_a_corpus_changes_nothing_of_its_fingerprint(pairs: list[str], tmp_path: Path) -> None:
    here = index(Pairs(name="pairs"), pairs, str(tmp_path / "cache"))
    there = index(Pairs(name="pairs"), expand(f"{CORPUS}/pairs/{{00000..00002}}.tar"), str(tmp_path / "cache"))
    assert here.fingerprint == there.fingerprint
    assert here != there


def test_an_index_beside_the_corpus_is_found_by_everyone(pairs: list[str], tmp_path: Path) -> None:
    corpus = Pairs(name="pairs")
    index(corpus, pairs, beside(pairs[0]))
    planned = plan(corpus, pairs, (beside(pairs[0]), str(tmp_path / "somebody-elses-cache")))
    assert not planned.missing


def test_a_shard_that_is_not_there_is_named_with_its_corpus(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"corpus 'pairs': no shard .*gone\.tar; check this corpus's path"):
        index(Pairs(name="pairs"), [str(tmp_path / "gone.tar")], str(tmp_path))


MEASURED = """
import resource, sys
from pipelines.corpora import TextOnly
from pipelines.manifest import index
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = index(TextOnly(name="million"), [sys.argv[1]], sys.argv[2])
print(found.rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_million_rows_are_indexed_in_bounded_memory(tmp_path: Path) -> None:
    """In a process of its own, whose peak is the scan's."""
    file, cache = tmp_path / "million.jsonl", str(tmp_path / "cache")
    with file.open("wb") as out:
        for start in range(0, 1_000_000, 10_000):
            out.write(b"".join(b'{"text": "row %d"}\n' % row for row in range(start, start + 10_000)))
    told = subprocess.run(
        [sys.executable, "-c", MEASURED, str(file), cache], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows, kilobytes = map(int, told.stdout.split())
    assert rows == 1_000_000
    assert kilobytes < 100 * 2**10
    (shard,) = index(TextOnly(name="million"), [str(file)], cache).shards
    starts = shard.load().starts
    with file.open("rb") as source:
        source.seek(int(starts[765_432]))
        assert json.loads(source.readline()) == {"text": "row 765432"}


def test_the_command_indexes_names_changes_and_verifies(
    pairs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site.toml"
    site.write_text(f'cache = "cache"\n[corpora]\nexample-pairs = "{tmp_path}/pairs/*.tar"\n')

    def run(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main(["data", "index", "example-pairs", "--site", str(site), *words])
        assert isinstance(end.value.code, int)
        return end.value.code, " ".join(capsys.readouterr().out.split())

    code, told = run()
    assert code == 0
    assert "276 rows in 3 shards" in told
    assert "3 scanned now" in told
    assert "0 scanned now" in run()[1]
    time.sleep(0.01)
    data = bytearray(Path(pairs[2]).read_bytes())
    data[3000] ^= 1  # inside the first picture
    Path(pairs[2]).write_bytes(data)
    code, told = run()
    assert "00002.tar has changed" in told
    assert "1 scanned now" in told
    # A shard that rots on the disk keeps its size and time: only reading it again finds that.
    data[3000] ^= 1
    stamp = Path(pairs[2]).stat()
    Path(pairs[2]).write_bytes(data)
    os.utime(pairs[2], ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert "0 scanned now" in run()[1]
    code, told = run("--verify")
    assert code == 1
    assert "00002.tar: its contents are not what was indexed" in told


@pytest.mark.usefixtures("ray_cluster")
def test_many_shards_are_scanned_as_ray_tasks_and_found_the_same(
    pairs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cluster import indexing

    here = index(Pairs(name="example-pairs"), pairs, str(tmp_path / "here"))
    monkeypatch.setattr(indexing, "SMALL", 0)
    site = tmp_path / "site.toml"
    site.write_text(f'cache = "cache"\n[corpora]\nexample-pairs = "{tmp_path}/pairs/*.tar"\n')
    with pytest.raises(SystemExit):
        main(["data", "index", "example-pairs", "--site", str(site), "--beside"])
    assert "3 scanned now" in " ".join(capsys.readouterr().out.split())
    there = index(Pairs(name="example-pairs"), pairs, beside(pairs[0]))
    assert there.fingerprint == here.fingerprint
    assert manifest.plan(Pairs(name="example-pairs"), pairs, (beside(pairs[0]),)).missing == ()
