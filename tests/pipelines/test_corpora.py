"""Readers over the example corpus, and over copies of it that were damaged as web data is."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import re
import shutil
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from pydantic import TypeAdapter

from pipelines import storage
from pipelines.corpora import (
    CaptionList,
    Conversations,
    Corpus,
    Interleaved,
    Labelled,
    Obelics,
    Pairs,
    Patches,
    Preferences,
    Questions,
    Regions,
    Shares,
    TextOnly,
    Thousandths,
    Videos,
)
from pipelines.manifest import Shard, expand, scan
from pipelines.rows import Tape, json_items
from pipelines.types import Chunk, Codes, Document, Frames, Image, Limits, Reason, Region, Rejected, Text, Video
from tests.conftest import CORPUS
from tests.pipelines.shards import (
    CLIP,
    body,
    captioned,
    chat,
    every_format,
    indexed,
    obelics_rows,
    pages,
    read,
    rows_of,
    talk,
    write_frames,
    write_lines,
    write_parquet,
    write_pictures,
    write_tar,
)


def shape(document: Document | Rejected) -> str:
    assert isinstance(document, Document)
    return "".join("I" if isinstance(s, Image) else "T" for s in document.segments)


def test_pairs_are_a_picture_and_its_caption(tmp_path: Path) -> None:
    corpus = Pairs(name="pairs")
    manifest = indexed(corpus, str(CORPUS / "pairs/{00000..00004}.tar"), tmp_path)
    assert [shard.rows for shard in manifest.shards] == [92] * 5
    rows = read(corpus, manifest, 2)
    assert {shape(row) for row in rows} == {"IT"}
    with tarfile.open(CORPUS / "pairs/00002.tar") as archive:
        captions = [body(archive, m).decode() for m in archive if m.name.endswith(".txt")]
    assert [row.segments[1].text.strip() for row in rows if isinstance(row, Document)] == captions  # type: ignore[union-attr]  # else the test fails


def test_a_chunk_reads_its_own_rows_only(tmp_path: Path) -> None:
    corpus = Pairs(name="pairs")
    manifest = indexed(corpus, str(CORPUS / "pairs/00000.tar"), tmp_path)
    whole = read(corpus, manifest)
    part = list(corpus.read(manifest.shards[0], Chunk(source=0, shard=0, epoch=3, start=10, stop=13)))
    assert [p.segments for p in part if isinstance(p, Document)] == [
        w.segments for w in whole[10:13] if isinstance(w, Document)
    ]
    assert [p.id.row for p in part if isinstance(p, Document)] == [10, 11, 12]
    assert part[0].id.epoch == 3  # type: ignore[union-attr]  # else the test fails


def test_pages_show_each_image_before_its_sentence(tmp_path: Path) -> None:
    corpus = Interleaved(name="pages", max_images=2)
    manifest = indexed(corpus, str(CORPUS / "interleaved/docs_shard_0_v3.jsonl"), tmp_path)
    lines = (CORPUS / "interleaved/docs_shard_0_v3.jsonl").read_text().splitlines()
    assert manifest.rows == len(lines)
    for row, line in zip(read(corpus, manifest), map(json.loads, lines), strict=True):
        assert isinstance(row, Document)
        assert shape(row).count("I") == min(2, len(line["image_info"]))
        text = " ".join(s.text.strip() for s in row.segments if isinstance(s, Text) and s.text)
        assert text.split() == " ".join(line["text_list"]).split()
        for before, after in zip(row.segments, row.segments[1:], strict=False):
            if isinstance(before, Image) and isinstance(after, Text):
                sentence = after.text.strip()
                assert any(
                    sentence.startswith(line["text_list"][i["matched_text_index"]].strip()) for i in line["image_info"]
                )


def test_images_below_the_similarity_are_left_out_and_the_page_stays(tmp_path: Path) -> None:
    corpus = Interleaved(name="pages", min_similarity=2.0)
    manifest = indexed(corpus, str(CORPUS / "interleaved/docs_shard_0_v3.jsonl"), tmp_path)
    assert {shape(row) for row in read(corpus, manifest)} == {"T"}


def test_conversations_hold_their_pictures_where_the_slots_are(tmp_path: Path) -> None:
    corpus = Conversations(name="talk")
    manifest = indexed(corpus, str(CORPUS / "instruct/llava_instruct.json"), tmp_path)
    items = json.loads((CORPUS / "instruct/llava_instruct.json").read_text())
    assert manifest.rows == len(items)
    for row, item in zip(read(corpus, manifest), items, strict=True):
        assert isinstance(row, Document)
        images = item["image"] if isinstance(item.get("image"), list) else [item["image"]] if item.get("image") else []
        assert [s.data for s in row.segments if isinstance(s, Image)] == [
            (CORPUS / "instruct" / name).read_bytes() for name in images
        ]
        assert all(s.learn == (s.role == "assistant") for s in row.segments if isinstance(s, Text))


@pytest.mark.parametrize(
    ("line", "question", "answer"),
    [
        ({"inputs": "Q", "targets": "A"}, "Q", "A"),
        ({"instruction": "Q", "input": "", "output": "A"}, "Q", "A"),
        ({"instruction": "Q", "input": "C", "output": "A"}, "Q\nC", "A"),
        ({"question": "Q", "answer": "A"}, "Q", "A"),
    ],
)
def test_text_only_rows_of_each_form(tmp_path: Path, line: dict[str, str], question: str, answer: str) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps(line) + "\n")
    corpus = TextOnly(name="text")
    (row,) = read(corpus, indexed(corpus, str(tmp_path / "t.jsonl"), tmp_path))
    assert isinstance(row, Document)
    asked, said = row.segments
    assert isinstance(asked, Text)
    assert isinstance(said, Text)
    assert (asked.text, asked.role, asked.learn) == (question, "user", False)
    assert (said.text, said.role, said.learn) == (answer, "assistant", True)


def damaged_pairs(folder: Path, change: Callable[[str, bytes], bytes | None]) -> str:
    """A copy of a real shard whose members were passed through `change`; None leaves a member out."""
    out = folder / "00000.tar"
    with tarfile.open(CORPUS / "pairs/00000.tar") as archive, tarfile.open(out, "w") as copy:
        for number, member in enumerate(archive):
            if number >= 30:
                break
            body = archive.extractfile(member)
            data = change(member.name, body.read() if body else b"")
            if data is not None:
                member.size = len(data)
                copy.addfile(member, io.BytesIO(data))
    return str(out)


FIRST = "000040009"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda name, data: None if name == f"{FIRST}.jpg" else data, Reason.MISSING_IMAGE),
        (lambda name, data: b"\xff\xfe caption \xc3\x28" if name == f"{FIRST}.txt" else data, Reason.BAD_UTF8),
        (lambda name, data: b"  \n" if name == f"{FIRST}.txt" else data, Reason.EMPTY),
        (lambda name, data: b"see <image> here" if name == f"{FIRST}.txt" else data, Reason.LITERAL_IMAGE),
        (
            lambda name, data: None if name == f"{FIRST}.txt" else (b"{}" if name == f"{FIRST}.json" else data),
            Reason.MISSING_FIELD,
        ),
        (
            lambda name, data: None if name == f"{FIRST}.txt" else (b"{nope" if name == f"{FIRST}.json" else data),
            Reason.BAD_JSON,
        ),
    ],
)
def test_a_bad_pair_is_dropped_alone_and_named(
    tmp_path: Path, change: Callable[[str, bytes], bytes | None], reason: Reason
) -> None:
    corpus = Pairs(name="pairs")
    first, *others = read(corpus, indexed(corpus, damaged_pairs(tmp_path, change), tmp_path))
    assert isinstance(first, Rejected)
    assert first.reason is reason
    assert first.label().startswith(f"pairs/00000.tar row 0: {reason}")
    assert len(others) == 9
    assert all(isinstance(row, Document) for row in others)


def test_a_tar_that_breaks_off_keeps_its_whole_rows(tmp_path: Path) -> None:
    whole = (CORPUS / "pairs/00000.tar").read_bytes()
    cut = tmp_path / "00000.tar"
    cut.write_bytes(whole[:60_000])
    corpus = Pairs(name="pairs")
    *good, last = read(corpus, indexed(corpus, str(cut), tmp_path))
    assert len(good) > 2
    assert all(isinstance(row, Document) for row in good)
    assert isinstance(last, Rejected)
    assert last.reason in (Reason.TRUNCATED_SHARD, Reason.MISSING_IMAGE, Reason.MISSING_FIELD)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"image_info": [{"image_name": "gone.jpg", "matched_text_index": 0}]}, Reason.MISSING_IMAGE),
        ({"image_info": [{"image_name": "x.jpg", "matched_text_index": 99}]}, Reason.IMAGE_INDEX),
        ({"image_info": [{"matched_text_index": 0}]}, Reason.MISSING_FIELD),
        ({"text_list": ["", " "]}, Reason.EMPTY),
        ({"text_list": ["a literal <image> in the text"], "image_info": []}, Reason.LITERAL_IMAGE),
        ({"text_list": None}, Reason.MISSING_FIELD),
        ({"text_list": ["one", None], "image_info": []}, Reason.MISSING_FIELD),
    ],
)
def test_a_bad_page_is_dropped_alone_and_named(tmp_path: Path, change: dict[str, object], reason: Reason) -> None:
    shutil.copy(CORPUS / "interleaved/images_shard_0.tar", tmp_path)
    lines = (CORPUS / "interleaved/docs_shard_0_v3.jsonl").read_text().splitlines()[:3]
    lines[1] = json.dumps(json.loads(lines[1]) | change)
    (tmp_path / "docs_shard_0_v3.jsonl").write_text("\n".join(lines) + "\n")
    corpus = Interleaved(name="pages")
    before, bad, after = read(corpus, indexed(corpus, str(tmp_path / "docs_shard_0_v3.jsonl"), tmp_path))
    assert isinstance(before, Document)
    assert isinstance(after, Document)
    assert isinstance(bad, Rejected)
    assert bad.reason is reason
    assert bad.row.row == 1


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"image": "nowhere.jpg", "conversations": [{"from": "human", "value": "<image>?"}]}, Reason.MISSING_IMAGE),
        ({"conversations": [{"from": "human", "value": "<image>?"}]}, Reason.IMAGE_INDEX),
        ({"conversations": [{"from": "martian", "value": "hi"}]}, Reason.MISSING_FIELD),
        ({"conversations": [{"from": "human"}]}, Reason.MISSING_FIELD),
        ({"id": "x"}, Reason.MISSING_FIELD),
    ],
)
def test_a_bad_conversation_is_dropped_alone_and_named(tmp_path: Path, item: dict[str, object], reason: Reason) -> None:
    good = {"conversations": [{"from": "human", "value": "hi, é"}, {"from": "gpt", "value": "hello"}]}
    (tmp_path / "talk.json").write_text(json.dumps([good, item, good], ensure_ascii=False))
    corpus = Conversations(name="talk")
    before, bad, after = read(corpus, indexed(corpus, str(tmp_path / "talk.json"), tmp_path))
    assert shape(before) == shape(after) == "TT"
    assert isinstance(bad, Rejected)
    assert bad.reason is reason


def test_a_line_that_is_no_json_is_dropped_alone(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "one"}\nnot json\n{"text": "\xff"}\n{"text": "four"}\n')
    corpus = TextOnly(name="text")
    rows = read(corpus, indexed(corpus, str(tmp_path / "t.jsonl"), tmp_path))
    assert [type(row) for row in rows] == [Document, Rejected, Rejected, Document]
    assert [row.reason for row in rows if isinstance(row, Rejected)] == [Reason.BAD_JSON, Reason.BAD_UTF8]


def test_a_changed_shard_is_indexed_again_and_changes_the_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    corpus = TextOnly(name="text")
    file.write_text('{"text": "one"}\n')
    before = indexed(corpus, str(file), tmp_path / "cache")
    assert indexed(corpus, str(file), tmp_path / "cache").fingerprint == before.fingerprint
    file.write_text('{"text": "one"}\n{"text": "two"}\n')
    after = indexed(corpus, str(file), tmp_path / "cache")
    assert (before.rows, after.rows) == (1, 2)
    assert before.fingerprint != after.fingerprint


def test_a_shard_that_is_not_there_is_named_with_its_corpus(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"corpus 'pairs': no shard .*00007\.tar"):
        indexed(Pairs(name="pairs"), str(tmp_path / "{00007..00008}.tar"), tmp_path)
    with pytest.raises(FileNotFoundError, match="no file matches"):
        expand(str(tmp_path / "*.tar"))


# --- every format -----------------------------------------------------------------------------------------------------

LISTED = {
    Pairs: ("pairs",),
    Questions: ("vqa",),
    CaptionList: ("tsv", "jsonl"),
    Labelled: ("tar", "csv"),
    Interleaved: ("archive", "folder", "base64"),
    Obelics: ("obelics",),
    Conversations: ("llava", "minicpm", "video"),
    TextOnly: ("jsonl", "json", "parquet"),
    Preferences: ("rlaif-v", "llava-next"),
    Regions: ("regions",),
    Videos: ("list", "tar"),
}
FORMS = tuple(f"{format_.__name__}-{form}" for format_, forms in LISTED.items() for form in forms)
PARQUET = ("Obelics-obelics", "TextOnly-parquet", "Preferences-rlaif-v")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Corpus, str, Shard]]:
    """By form: the corpus, its shard's address, and the shard as indexed."""
    folder = tmp_path_factory.mktemp("shards")
    found = {}
    for corpus, uri in every_format(folder):
        found[f"{type(corpus).__name__}-{corpus.name}"] = (
            corpus,
            str(uri),
            scan(corpus, str(uri), str(folder / "index")),
        )
    return found


def chunk_of(shard: Shard, start: int = 0, stop: int | None = None) -> Chunk:
    return Chunk(source=0, shard=0, epoch=0, start=start, stop=shard.rows if stop is None else stop)


def test_there_is_a_shard_of_every_format(shards: dict[str, tuple[Corpus, str, Shard]]) -> None:
    assert set(shards) == set(FORMS)
    formats = get_args(get_args(Corpus)[0])
    assert set(LISTED) == set(formats)


@pytest.mark.parametrize("form", FORMS)
def test_chunks_of_any_size_read_what_the_whole_shard_reads(
    shards: dict[str, tuple[Corpus, str, Shard]], form: str
) -> None:
    corpus, _, shard = shards[form]
    whole = list(corpus.read(shard, chunk_of(shard)))
    assert len(whole) == shard.rows > 1
    assert not [row.label() for row in whole if isinstance(row, Rejected)]
    for size in (1, 3, 7):
        starts = range(0, shard.rows, size)
        parts = [corpus.read(shard, chunk_of(shard, at, min(at + size, shard.rows))) for at in starts]
        assert [row for part in parts for row in part] == whole
    assert list(corpus.read(shard, chunk_of(shard, 1, 1))) == []


@pytest.mark.parametrize("form", FORMS)
def test_the_index_knows_each_rows_text_and_pictures(shards: dict[str, tuple[Corpus, str, Shard]], form: str) -> None:
    corpus, uri, shard = shards[form]
    index = corpus.scan(uri)
    rows = [row for row in corpus.read(shard, chunk_of(shard)) if isinstance(row, Document)]
    texts = [[s.text for s in (*row.segments, *row.rejected) if isinstance(s, Text)] for row in rows]
    assert index.characters is not None
    assert index.characters.tolist() == [sum(map(len, each)) for each in texts]
    assert index.starts.dtype == np.int64
    assert bool((np.diff(index.starts) > 0).all())
    if index.pictures is None:
        assert any(not isinstance(s, Text) for row in rows for s in row.segments)
        return
    images = [(n, s.data) for n, row in enumerate(rows) for s in row.segments if isinstance(s, Image)]
    sizes = [(n, PILImage.open(io.BytesIO(data))) for n, data in images]
    assert index.pictures.tolist() == [[n, picture.height, picture.width] for n, picture in sizes]


class Forward(io.RawIOBase):
    """A file that can only be read on, and hashes what passes."""

    def __init__(self, uri: str, hashes: dict[str, Any]) -> None:
        self.file = storage.open_file(uri)
        self.hash = hashes.setdefault(uri, hashlib.sha256())

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:  # type: ignore[override]  # a stand-in for a file
        data = self.file.read(min(size, 1000) if size > 0 else size)
        self.hash.update(data)
        return data

    def close(self) -> None:
        self.file.close()
        super().close()


@pytest.mark.parametrize("form", [form for form in FORMS if form not in PARQUET])
def test_a_scan_reads_each_file_forward_to_its_end(shards: dict[str, tuple[Corpus, str, Shard]], form: str) -> None:
    corpus, uri, _ = shards[form]
    hashes: dict[str, Any] = {}
    seen = corpus.scan(uri, lambda uri: Forward(uri, hashes))  # type: ignore[arg-type,return-value]  # a stand-in for a file
    assert seen.starts.tolist() == corpus.scan(uri).starts.tolist()
    assert {uri: each.hexdigest() for uri, each in hashes.items()} == {
        uri: hashlib.sha256(Path(uri).read_bytes()).hexdigest() for uri in corpus.files(uri)
    }


@pytest.mark.parametrize("form", FORMS)
def test_a_chunk_costs_one_request_for_its_rows_and_one_for_all_their_files(
    shards: dict[str, tuple[Corpus, str, Shard]], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, uri, shard = shards[form]
    asked: list[str] = []
    read, many = storage.read, storage.read_many
    monkeypatch.setattr(storage, "read", lambda uri, *at: asked.append(uri) or read(uri, *at))

    def counted(ranges: Any) -> Any:
        asked.append(f"{len(ranges)} files")
        monkeypatch.setattr(storage, "read", read)  # which read_many calls for itself
        return many(ranges)

    monkeypatch.setattr(storage, "read_many", counted)
    assert list(corpus.read(shard, chunk_of(shard)))
    rows = [each for each in asked if not each.endswith("files")]
    assert rows == ([] if form in PARQUET else [uri])  # parquet is read by row groups, through an opened file
    assert len(asked) - len(rows) <= 1


@pytest.mark.parametrize("form", FORMS)
def test_a_shard_that_went_away_is_storages_error_and_not_a_bad_row(
    shards: dict[str, tuple[Corpus, str, Shard]], form: str
) -> None:
    corpus, uri, shard = shards[form]
    with pytest.raises(FileNotFoundError):
        list(corpus.read(replace(shard, uri=f"{shard.uri}.gone.{uri.rpartition('.')[2]}"), chunk_of(shard)))


@pytest.mark.parametrize("form", FORMS)
def test_a_shard_of_other_bytes_is_refused_in_one_sentence(
    shards: dict[str, tuple[Corpus, str, Shard]], form: str, tmp_path: Path
) -> None:
    corpus, uri, _ = shards[form]
    bad = tmp_path / Path(uri).name
    for data in (CLIP.read_bytes()[:5000], gzip.compress(b"x" * 5000)):
        for file in corpus.files(str(bad)):
            Path(file).write_bytes(data)
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
            corpus.scan(str(bad))


def test_corpora_survive_json(shards: dict[str, tuple[Corpus, str, Shard]]) -> None:
    adapter = TypeAdapter(Corpus)
    for corpus, _, _ in shards.values():
        assert adapter.validate_json(adapter.dump_json(corpus)) == corpus


words = st.sampled_from(["", "a", "<image>", "../x", "human", "gpt", "/etc/passwd", "\ud800"])
INNER = "from value role content box label image_name matched_text_index matched_sim bytes path <image>"
OUTER = (
    "text caption image images video conversations text_list image_info regions width height prompt question chosen rejected "
    "instruction input output inputs q a video_id path label"
)
inner_keys, outer_keys = (st.sampled_from(re.split(" ", keys)) for keys in (INNER, OUTER))
values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(inner_keys, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.dictionaries(outer_keys, values, max_size=5) | values, min_size=1, max_size=4))
def test_no_row_of_json_is_anything_but_a_document_or_a_rejection(rows: list[object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        uri = Path(folder) / "0.jsonl"
        uri.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for corpus in (
            CaptionList(name="c"),
            Labelled(name="l"),
            Interleaved(name="i", archive=None),
            Conversations(name="t"),
            TextOnly(name="x"),
            Preferences(name="p"),
            Regions(name="r"),
            Videos(name="v"),
        ):
            assert len(rows_of(corpus, uri)) == len(rows)


# --- rows in files ----------------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=15,
)


@settings(max_examples=120, deadline=None)
@given(
    st.lists(anything, max_size=6),
    st.sampled_from([None, 0, 1, "\t"]),
    st.booleans(),
    st.sampled_from(["", " ", "\r\n\t"]),
    st.integers(1, 9),
)
def test_the_items_of_a_json_list_are_found_wherever_blocks_end(
    items: list[object], indent: int | str | None, ascii_only: bool, around: str, block: int
) -> None:
    text = around + json.dumps(items, indent=indent, ensure_ascii=ascii_only) + around
    data = text.encode()
    with mock.patch("pipelines.rows.BLOCK", block):
        found = list(json_items("memory", Tape(io.BytesIO(data))))
    assert [json.loads(body) for _, _, body in found if body is not None] == items
    assert [data[start:end] for start, end, _ in found] == [body for _, _, body in found]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected one JSON list"),
        ('{"a": 1}', "expected one JSON list"),
        ('"[1]"', "expected one JSON list"),
        ('[{"a": 1}, {"b": [2}', "ends inside item 1, which begins at byte 11"),
        ('[{"a": "open]', "ends inside item 0"),
        ("[1, 2", "ends inside item 1"),
        ("[1] [2]", "ends before byte 4"),
    ],
)
def test_a_file_that_is_no_one_list_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "talk.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        Conversations(name="talk").scan(str(tmp_path / "talk.json"))


def test_blank_lines_carriage_returns_a_mark_and_a_missing_last_newline_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "two"}\n\n{"text": "three"}')
    rows = rows_of(TextOnly(name="text"), tmp_path / "t.jsonl")
    assert [row.segments[0].text for row in rows if isinstance(row, Document)] == ["one", "two", "three"]  # type: ignore[union-attr]  # else the test fails
    starts = TextOnly(name="text").scan(str(tmp_path / "t.jsonl")).starts.tolist()
    for block in (1, 2, 5, 17):  # wherever the blocks of a scan end
        with mock.patch("pipelines.rows.BLOCK", block):
            assert TextOnly(name="text").scan(str(tmp_path / "t.jsonl")).starts.tolist() == starts
    (tmp_path / "none.jsonl").write_bytes(b"\n\n")
    assert rows_of(TextOnly(name="text"), tmp_path / "none.jsonl") == []


def test_scanning_holds_a_row_and_not_the_shard(tmp_path: Path) -> None:
    item = json.dumps({"text": "x" * 4000}).encode()
    with (tmp_path / "t.json").open("wb") as file:
        file.write(b"[" + b",\n".join([item] * 10_000) + b"]")
    tracemalloc.start()
    index = TextOnly(name="text").scan(str(tmp_path / "t.json"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert index.rows == 10_000
    assert peak < 8 * 2**20 < (tmp_path / "t.json").stat().st_size


@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
def test_a_row_too_large_to_hold_is_stepped_over(tmp_path: Path, name: str) -> None:
    rows = [{"text": "one"}, {"text": "x" * 5000}, {"text": "three"}]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / name).write_text("\n".join(lines) if name == "t.jsonl" else f"[{', '.join(lines)}]")
    small = Limits(bytes=1000)
    with mock.patch("pipelines.rows.LIMITS", small), mock.patch("pipelines.rows.BLOCK", 100):
        index = TextOnly(name="text").scan(str(tmp_path / name))
    assert index.characters is not None
    assert index.characters.tolist() == [3, 0, 5]
    assert only(rows_of(TextOnly(name="text"), tmp_path / name, small)).reason is Reason.HUGE_FILE


def only(rows: list[Document | Rejected]) -> Rejected:
    (row,) = [row for row in rows if isinstance(row, Rejected)]
    return row


LONG = {"text": "y" * 5000}


@pytest.mark.parametrize(
    ("line", "limits", "reason"),
    [
        (json.dumps(LONG), Limits(characters=1000), Reason.TEXT_TOO_LONG),
        (json.dumps(LONG), Limits(bytes=1000), Reason.HUGE_FILE),
        ('{"text": ' + "[" * 100 + "]" * 100 + "}", Limits(), Reason.DEEP_JSON),
        ('{"text": ' + "[" * 500_000, Limits(), Reason.DEEP_JSON),
        ('{"text": ' + "[" * 500_000, Limits(depth=10**6), Reason.DEEP_JSON),
        ('{"text": ' + "9" * 5000 + "}", Limits(), Reason.BAD_JSON),
        ('{"text": "\\ud800"}', Limits(), Reason.BAD_UTF8),
        ('{"text": "a", ', Limits(), Reason.BAD_JSON),
        ("[1]", Limits(), Reason.BAD_JSON),
        ('{"text": " "}', Limits(), Reason.EMPTY),
    ],
)
def test_a_row_beyond_a_limit_is_dropped_alone(tmp_path: Path, line: str, limits: Limits, reason: Reason) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "one"}\n' + line + '\n{"text": "three"}\n')
    rows = rows_of(TextOnly(name="text"), tmp_path / "t.jsonl", limits)
    assert only(rows).reason is reason
    assert [row.id.row for row in rows if isinstance(row, Document)] == [0, 2]


def test_brackets_in_text_and_side_by_side_are_not_deep(tmp_path: Path) -> None:
    write_lines(tmp_path / "t.jsonl", [{"text": "[" * 500 + '"{'}, {"text": "flat", "matrix": [[0.0]] * 500}])
    assert all(isinstance(row, Document) for row in rows_of(TextOnly(name="text"), tmp_path / "t.jsonl"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../secret.jpg", Reason.UNSAFE_PATH),
        ("a/../../secret.jpg", Reason.UNSAFE_PATH),
        ("/etc/passwd", Reason.UNSAFE_PATH),
        ("file:///etc/passwd", Reason.UNSAFE_PATH),
        ("s3://other/bucket.jpg", Reason.UNSAFE_PATH),
        ("nul\0.jpg", Reason.UNSAFE_PATH),
        ("https://example.org/a.jpg", Reason.REMOTE_IMAGE),
        ("n" * 300 + ".jpg", Reason.MISSING_IMAGE),
        ("line\nbreak.jpg", Reason.MISSING_IMAGE),
        ("images", Reason.MISSING_IMAGE),
        ("gone.jpg", Reason.MISSING_IMAGE),
        ("huge.jpg", Reason.HUGE_FILE),
    ],
)
def test_a_path_that_leads_nowhere_or_out_drops_its_row_alone(tmp_path: Path, name: str, reason: Reason) -> None:
    (tmp_path / "secret.jpg").write_bytes(captioned()[0][0])
    folder = tmp_path / "corpus"
    ((good, caption),) = write_pictures(folder / "images", 1)
    (folder / "huge.jpg").write_bytes(bytes(200_000))
    rows = [{"caption": caption, "image": path} for path in (f"images/{good}", name, f"images/{good}")]
    write_lines(folder / "c.jsonl", rows)
    found = rows_of(CaptionList(name="list"), folder / "c.jsonl", Limits(bytes=100_000))
    assert only(found).reason is reason
    assert only(found).row.row == 1


def test_an_empty_object_is_a_bad_picture_and_no_fault_of_the_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S3 answers 416 to any range of an object without bytes."""
    ((good, caption),) = write_pictures(tmp_path, 1)
    (tmp_path / "empty.jpg").touch()
    rows = [{"caption": caption, "image": name} for name in (good, "empty.jpg", "gone.jpg")]
    many = storage.read_many

    def strict(ranges: Any) -> Any:
        if any(uri.endswith("empty.jpg") for uri, _, _ in ranges):
            raise storage.StorageError("no answer") from OSError(22, "The requested range is not satisfiable")
        return many(ranges)

    monkeypatch.setattr(storage, "read_many", strict)
    first, second, third = rows_of(CaptionList(name="list"), write_lines(tmp_path / "c.jsonl", rows))
    assert isinstance(first, Document)
    assert isinstance(second, Document)  # the decoder says what it is
    assert second.segments[0] == Image(data=b"")
    assert isinstance(third, Rejected)
    monkeypatch.setattr(storage, "read_many", mock.Mock(side_effect=storage.StorageError("an outage")))
    with pytest.raises(storage.StorageError, match="an outage"):
        rows_of(CaptionList(name="list"), tmp_path / "c.jsonl")


# --- tars -------------------------------------------------------------------------------------------------------------


def link(name: str, to: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = kind
    member.linkname = to
    return member


PICTURE, CAPTION = captioned()[0][0], captioned()[0][1].encode()


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([(link("1.jpg", "/etc/passwd"), b""), ("1.txt", CAPTION)], Reason.UNSAFE_PATH),
        ([(link("1.jpg", "0.jpg", tarfile.LNKTYPE), b""), ("1.txt", CAPTION)], Reason.UNSAFE_PATH),
        ([(link("1.jpg", "", tarfile.CHRTYPE), b""), ("1.txt", CAPTION)], Reason.UNSAFE_PATH),
        ([(link("1.jpg", "", tarfile.FIFOTYPE), b""), ("1.txt", CAPTION)], Reason.UNSAFE_PATH),
        ([("../1.jpg", PICTURE), ("../1.txt", CAPTION)], Reason.UNSAFE_PATH),
        ([("/1.jpg", PICTURE), ("/1.txt", CAPTION)], Reason.UNSAFE_PATH),
        ([("1.jpg", PICTURE)], Reason.MISSING_FIELD),
        ([("1.bmp", bytes(300_000)), ("1.txt", CAPTION)], Reason.HUGE_FILE),
        ([("1.jpg", PICTURE), ("1.json", b'{"caption": 3}')], Reason.MISSING_FIELD),
    ],
)
def test_a_hostile_row_of_a_tar_is_dropped_alone(
    tmp_path: Path, members: list[tuple[str | tarfile.TarInfo, bytes]], reason: Reason
) -> None:
    good = [[(f"{n}.jpg", PICTURE), (f"{n}.txt", CAPTION)] for n in (0, 2)]
    write_tar(tmp_path / "0.tar", [*good[0], *members, *good[1]])
    rows = rows_of(Pairs(name="pairs"), tmp_path / "0.tar", Limits(bytes=100_000))
    assert only(rows).reason is reason
    assert [row.id.row for row in rows if isinstance(row, Document)] == [0, 2]


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_folders_and_strangers_are_read_over(tmp_path: Path, format_: int) -> None:
    folder = "/".join(["a" * 40] * 3) if format_ == tarfile.USTAR_FORMAT else "ä" * 90
    files = {
        folder: None,
        f"{folder}/1.jpg": PICTURE,
        "0_stats.json": b"{}",
        f"{folder}/1.json": b'{"text": "a hat"}',
        "README": b"hi",
        f"{folder}/2.webp": PICTURE,
        f"{folder}/2.txt": CAPTION,
    }
    with tarfile.open(tmp_path / "0.tar", "w", format=format_) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if data is None else tarfile.REGTYPE
            member.size = len(data or b"")
            archive.addfile(member, io.BytesIO(data or b""))
    rows = rows_of(Pairs(name="pairs"), tmp_path / "0.tar")
    assert [row.segments[1].text for row in rows if isinstance(row, Document)] == ["\na hat", "\n" + CAPTION.decode()]  # type: ignore[union-attr]  # else the test fails


def test_a_header_that_lies_about_its_size_neither_crashes_nor_grows(tmp_path: Path) -> None:
    good = tarfile.TarInfo("0.jpg")
    good.size = len(PICTURE)
    body = good.tobuf() + PICTURE + bytes(-len(PICTURE) % 512)
    for kind, name in ((tarfile.GNUTYPE_LONGNAME, "x"), (tarfile.XHDTYPE, "x"), (tarfile.REGTYPE, "0.txt")):
        liar = tarfile.TarInfo(name)
        liar.type = kind
        liar.size = 2**40
        (tmp_path / "0.tar").write_bytes(body + liar.tobuf(tarfile.GNU_FORMAT) + bytes(2**20))
        rows = rows_of(Pairs(name="pairs"), tmp_path / "0.tar")
        assert {row.reason for row in rows if isinstance(row, Rejected)} <= {
            Reason.MISSING_FIELD,
            Reason.TRUNCATED_SHARD,
        }
        assert not any(isinstance(row, Document) for row in rows)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 20_000), st.binary(min_size=1, max_size=600))
def test_a_tar_with_any_bytes_written_over_is_read_or_refused(at: int, noise: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole = bytearray((CORPUS / "pairs/00000.tar").read_bytes()[:60_000])
        whole[at : at + len(noise)] = noise
        (Path(folder) / "0.tar").write_bytes(whole)
        with contextlib.suppress(ValueError):
            rows = rows_of(Pairs(name="pairs"), Path(folder) / "0.tar")
            assert rows or at < 512


# --- pages ------------------------------------------------------------------------------------------------------------


def test_pictures_come_from_the_row_the_folder_or_the_tar(shards: dict[str, tuple[Corpus, str, Shard]]) -> None:
    segments = []
    for form in ("Interleaved-archive", "Interleaved-folder", "Interleaved-base64"):
        corpus, _, shard = shards[form]
        rows = corpus.read(shard, chunk_of(shard, 0, 12))
        segments.append([row.segments for row in rows if isinstance(row, Document)])
    assert segments[0] == segments[1] == segments[2]


@pytest.mark.parametrize(
    ("corpus", "change", "reason"),
    [
        (Interleaved(name="i", archive=None), {}, Reason.MISSING_IMAGE),
        (Interleaved(name="i", folder="nowhere"), {}, Reason.MISSING_IMAGE),
        (Interleaved(name="i", folder="."), {"image_name": "../x.jpg"}, Reason.UNSAFE_PATH),
        (Interleaved(name="i", archive=None), {"image_base64": "???"}, Reason.NOT_AN_IMAGE),
        (Interleaved(name="i", archive=None, drop_duplicates=True), {"could_have_url_duplicate": 1}, Reason.DUPLICATE),
    ],
)
def test_a_page_whose_pictures_cannot_be_had_is_refused(
    tmp_path: Path, corpus: Interleaved, change: dict[str, Any], reason: Reason
) -> None:
    page = pages()[0]
    info = page["image_info"][0] | {k: v for k, v in change.items() if k.startswith("image")}
    write_lines(tmp_path / "docs_shard_0.jsonl", [page | change | {"image_info": [info]}])
    assert only(rows_of(corpus, tmp_path / "docs_shard_0.jsonl")).reason is reason


def test_a_huge_or_cut_off_picture_of_the_archive_drops_its_page_alone(tmp_path: Path) -> None:
    shutil.copy(CORPUS / "interleaved/docs_shard_0_v3.jsonl", tmp_path)
    whole = (CORPUS / "interleaved/images_shard_0.tar").read_bytes()
    (tmp_path / "images_shard_0.tar").write_bytes(whole[: len(whole) // 2])
    rows = rows_of(Interleaved(name="pages"), tmp_path / "docs_shard_0_v3.jsonl", Limits(bytes=40_000))
    reasons = {row.reason for row in rows if isinstance(row, Rejected)}
    assert {Reason.MISSING_IMAGE, Reason.TRUNCATED_IMAGE} <= reasons
    assert reasons <= {Reason.MISSING_IMAGE, Reason.TRUNCATED_IMAGE, Reason.HUGE_FILE}
    assert any(isinstance(row, Document) for row in rows)


def test_obelics_pages_alternate_as_they_were(shards: dict[str, tuple[Corpus, str, Shard]]) -> None:
    corpus, _, shard = shards["Obelics-obelics"]
    for row, source in zip(corpus.read(shard, chunk_of(shard)), obelics_rows(), strict=True):
        assert isinstance(row, Document)
        nodes = zip(source["images_bytes"], source["texts"], strict=True)
        shown = [s.text.strip() if isinstance(s, Text) else s.data for s in row.segments if not isinstance(s, Codes)]
        assert shown == [body or text.strip() for body, text in nodes if body or text.strip()]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"images_bytes": None}, Reason.REMOTE_IMAGE),
        ({"texts": ["one"]}, Reason.IMAGE_INDEX),
        ({"texts": None}, Reason.MISSING_FIELD),
        ({"images": [None], "texts": [" "], "images_bytes": [None]}, Reason.EMPTY),
        ({"images": [None], "texts": ["an <image>"], "images_bytes": [None]}, Reason.LITERAL_IMAGE),
    ],
)
def test_a_bad_row_of_obelics_is_dropped_alone(tmp_path: Path, change: dict[str, Any], reason: Reason) -> None:
    rows = [row for row in obelics_rows() if any(row["images"])][:3]
    rows[1] = rows[1] | change
    found = rows_of(Obelics(name="o"), write_parquet(tmp_path / "o.parquet", rows, 2))
    assert only(found).reason is reason
    if reason is Reason.REMOTE_IMAGE:
        assert "img2dataset" in only(found).detail


def test_limits_hold_in_parquet_too(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "o.parquet", [row for row in obelics_rows() if any(row["images"])])
    corpus = Obelics(name="o")
    for limits, reason in (
        (Limits(bytes=1), Reason.HUGE_FILE),
        (Limits(characters=1), Reason.TEXT_TOO_LONG),
        (Limits(pictures=0), Reason.TOO_MANY_PICTURES),
    ):
        assert {row.reason for row in rows_of(corpus, file, limits) if isinstance(row, Rejected)} == {reason}


def test_a_damaged_row_group_costs_its_own_rows(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "o.parquet", obelics_rows(), 4)
    corpus = Obelics(name="o")
    manifest = indexed(corpus, file, tmp_path)
    data = bytearray(file.read_bytes())
    group = pq.ParquetFile(io.BytesIO(bytes(data))).metadata.row_group(1).column(0)
    at = group.dictionary_page_offset or group.data_page_offset
    data[at : at + 40] = b"\xff" * 40
    file.write_bytes(data)
    rows = read(corpus, manifest)
    assert [type(row) for row in rows] == [Document] * 4 + [Rejected] * 4 + [Document] * 4
    assert {row.reason for row in rows if isinstance(row, Rejected)} == {Reason.DAMAGED_SHARD}


# --- conversations and clips ------------------------------------------------------------------------------------------


def talks(folder: Path, *items: dict[str, Any], images: str = "images") -> list[Document | Rejected]:
    write_pictures(folder / "images", 3)
    return rows_of(Conversations(name="talk", images=images), write_lines(folder / "talk.jsonl", items))


def test_slots_are_filled_in_the_spelling_of_each_family(tmp_path: Path) -> None:
    qwen = [{"from": "user", "value": "Picture 1: <img>2.jpg</img>\nWhat?"}, {"from": "assistant", "value": "A hat."}]
    two = chat("<image_01><image_00> <b>which</b>?", "The first.")
    rows = talks(
        tmp_path,
        {"image": "0.jpg", "messages": [{"role": "system", "content": "Be brief."}, *chat("<image>?", "A hat.")]},
        {"image": {"<image_00>": "0.jpg", "<image_01>": "1.jpg"}, "conversations": two},
        {"image": "1.jpg", "conversations": chat("What?", "A hat.")},
        {"conversations": qwen},
    )
    assert [shape(row) for row in rows] == ["TITT", "IITT", "ITT", "TITT"]
    pictures = [data for data, _ in captioned()[:3]]
    documents = [row for row in rows if isinstance(row, Document)]
    shown = [[pictures.index(s.data) for s in row.segments if isinstance(s, Image)] for row in documents]
    assert shown == [[0], [1, 0], [1], [2]]
    system = rows[0].segments[0]  # type: ignore[union-attr]  # else the test fails
    assert isinstance(system, Text)
    assert (system.role, system.learn) == ("system", False)


def test_pictures_may_lie_under_another_root(tmp_path: Path) -> None:
    (tmp_path / "list").mkdir()
    write_pictures(tmp_path / "pool" / "coco", 1)
    item = {"image": "coco/0.jpg", "conversations": talk("<image>?", "A hat.")}
    for root in (str(tmp_path / "pool"), "../pool"):
        file = write_lines(tmp_path / "list" / "talk.jsonl", [item])
        assert [shape(row) for row in rows_of(Conversations(name="t", images=root), file)] == ["ITT"]


@pytest.mark.parametrize(
    "item",
    [
        {"image": ["0.jpg", "1.jpg"], "conversations": [{"from": "human", "value": "<image>?"}]},
        {"image": {"<image_00>": "0.jpg"}, "conversations": [{"from": "human", "value": "no slot"}]},
        {"image": {"plain": "0.jpg"}, "conversations": [{"from": "human", "value": "plain"}]},
        {"image": "0.jpg", "conversations": [{"from": "human", "value": "no slot"}]},
        {"video": "a.mp4", "conversations": [{"from": "human", "value": "<video><video>"}]},
        {"image": {"<a>": "0.jpg"}, "conversations": [{"from": "human", "value": "<a> and <image>"}]},
    ],
)
def test_slots_and_files_must_match(tmp_path: Path, item: dict[str, Any]) -> None:
    assert only(talks(tmp_path, item)).reason is Reason.IMAGE_INDEX


def test_a_clip_is_a_file_or_frames_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    write_frames(tmp_path / "clip", 11)
    (tmp_path / "clip" / "notes.txt").write_text("no frame")
    (tmp_path / "a.mp4").write_bytes(CLIP.read_bytes())
    (tmp_path / "empty").mkdir()
    clips = ["a.mp4", "clip/", "clip", "empty/", "gone.mp4", "../x.mp4"]
    file = write_lines(tmp_path / "v.jsonl", [{"video": clip, "caption": "a rabbit"} for clip in clips])
    frames = Frames(count=4, fps=2.0)
    *good, empty, gone, out = rows_of(Videos(name="v", frames=frames), file)
    videos = [row.segments[0] for row in good if isinstance(row, Document)]
    assert videos[0] == Video(data=CLIP.read_bytes(), frames=frames)
    assert videos[1] == videos[2] == Video(data=tuple(data for data, _ in captioned()[:11]), frames=frames)
    reasons = [row.reason for row in (empty, gone, out) if isinstance(row, Rejected)]
    assert reasons == [Reason.MISSING_IMAGE, Reason.MISSING_IMAGE, Reason.UNSAFE_PATH]
    limited = rows_of(Videos(name="v"), file, Limits(pictures=10, bytes=20_000))
    assert [row.reason for row in limited[:2] if isinstance(row, Rejected)] == [
        Reason.HUGE_FILE,
        Reason.TOO_MANY_PICTURES,
    ]


# --- preferences, classes, regions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "chosen": "good", "rejected": "bad"},
        {"question": "Q", "chosen": "good", "rejected": "bad", "logps": [1, 2]},
        {"prompt": [{"role": "user", "content": "Q"}], "chosen": "good", "rejected": "bad"},
        {"prompt": talk("Q", "")[:1], "chosen": talk("Q", "good")[1], "rejected": talk("Q", "bad")[1]},
        {"chosen": chat("Q", "good"), "rejected": chat("Q", "bad")},
        {"chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant: bad"},
        {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " good", "rejected": " bad"},
        {"text": json.dumps({"question": "Q", "chosen": "good", "rejected": "bad"})},
    ],
)
def test_two_answers_of_each_form(tmp_path: Path, row: dict[str, Any]) -> None:
    (found,) = rows_of(Preferences(name="p"), write_lines(tmp_path / "p.jsonl", [row]))
    assert isinstance(found, Document)
    question, answer = found.segments
    (other,) = found.rejected
    assert isinstance(question, Text)
    assert isinstance(answer, Text)
    assert (question.text, question.role, question.learn) == ("Q", "user", False)
    assert (answer.text.strip(), answer.role, answer.learn) == ("good", "assistant", True)
    assert (other.text.strip(), other.role, other.learn) == ("bad", "assistant", True)


def test_the_picture_of_a_preference_stands_at_its_slot_or_before_the_question(tmp_path: Path) -> None:
    write_pictures(tmp_path / "images", 1)
    (tmp_path / "images" / "a.mp4").write_bytes(CLIP.read_bytes())
    answers = {"chosen": "good", "rejected": "bad"}
    rows = [
        {"prompt": "What?", "image": "0.jpg", **answers},
        {"prompt": "See <image> here", "image": "0.jpg", **answers},
        {"prompt": "<video>\nWhat?", "video": "a.mp4", **answers},
    ]
    found = rows_of(Preferences(name="p", images="images"), write_lines(tmp_path / "p.jsonl", rows))
    documents = [row for row in found if isinstance(row, Document)]
    kinds = [[s.text if isinstance(s, Text) else type(s).__name__ for s in row.segments] for row in documents]
    assert kinds == [["Image", "\nWhat?", "good"], ["See ", "Image", " here", "good"], ["Video", "\nWhat?", "good"]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rejected": "good"}, Reason.SAME_ANSWERS),
        ({"rejected": None}, Reason.MISSING_FIELD),
        ({"prompt": None}, Reason.MISSING_FIELD),
        ({"chosen": " "}, Reason.EMPTY),
        ({"rejected": "an <image>"}, Reason.LITERAL_IMAGE),
        ({"image": ["a.jpg", "b.jpg"]}, Reason.IMAGE_INDEX),
        ({"image": 3}, Reason.MISSING_FIELD),
        ({"image": "gone.jpg"}, Reason.MISSING_IMAGE),
        ({"chosen": "\n\nHuman: A\n\nAssistant: x", "rejected": "\n\nHuman: B\n\nAssistant: y"}, Reason.MISSING_FIELD),
        ({"chosen": "\n\nHuman: A\n\nAssistant: x\n\nHuman: B"}, Reason.MISSING_FIELD),
    ],
)
def test_a_bad_preference_is_dropped_and_named(tmp_path: Path, change: dict[str, Any], reason: Reason) -> None:
    row = {"prompt": "Q", "chosen": "good", "rejected": "bad"} | change
    assert only(rows_of(Preferences(name="p"), write_lines(tmp_path / "p.jsonl", [row]))).reason is reason


def test_classes_are_numbers_or_names(tmp_path: Path) -> None:
    write_pictures(tmp_path, 2)
    (tmp_path / "l.tsv").write_text("0.jpg\tcat\n1.jpg\t0\n0.jpg\tdog\n0.jpg\t2\n0.jpg\n")
    rows = rows_of(Labelled(name="l", classes=("hat", "cat")), tmp_path / "l.tsv")
    assert [row.label if isinstance(row, Document) else row.reason for row in rows] == [
        1,
        0,
        *[Reason.MISSING_FIELD] * 3,
    ]
    assert shape(rows[0]) == "I"


def test_a_comma_in_quotes_is_part_of_its_cell(tmp_path: Path) -> None:
    write_pictures(tmp_path, 1)
    (tmp_path / "c.csv").write_text('caption,filename\n"a hat, red",0.jpg\n' + "x" * 200_000 + ",0.jpg\na,b,c\n")
    good, *bad = rows_of(CaptionList(name="c"), tmp_path / "c.csv")
    assert isinstance(good, Document)
    assert good.segments[1] == Text(text="\na hat, red")
    assert {row.reason for row in bad if isinstance(row, Rejected)} == {Reason.MISSING_FIELD}


KITE = {
    "image": "0.jpg",
    "width": 200,
    "height": 100,
    "text": "a dog house and a dog",
    "regions": [
        {"box": [20, 10, 100, 50], "phrase": "dog"},
        {"box": [0, 0, 200, 100], "label": "dog house"},
        {"box": [0, 0, 20, 20], "label": "a tree"},
        {"box": [0, 0, 10, 10], "phrase": "dog"},
    ],
}


@pytest.mark.parametrize(
    ("boxes", "text"),
    [
        (
            Shares(),
            "a dog house[0.000,0.000,1.000,1.000] and a dog[0.100,0.100,0.500,0.500;0.000,0.000,0.050,0.100]"
            "\na tree[0.000,0.000,0.100,0.200]",
        ),
        (
            Thousandths(),
            "a <ref>dog house</ref><box>(0,0),(999,999)</box> and a <ref>dog</ref><box>(100,100),(500,500)</box>"
            "<box>(0,0),(50,100)</box>\n<ref>a tree</ref><box>(0,0),(100,200)</box>",
        ),
        (
            Patches(),
            "a <phrase>dog house</phrase><object><patch_index_0000><patch_index_1023></object> and a <phrase>dog</phrase>"
            "<object><patch_index_0099><patch_index_0528></delimiter_of_multi_objects/><patch_index_0000><patch_index_0097>"
            "</object>\n<phrase>a tree</phrase><object><patch_index_0000><patch_index_0195></object>",
        ),
        (None, "a dog house and a dog"),
    ],
)
def test_boxes_are_spelled_as_each_model_reads_them(tmp_path: Path, boxes: Any, text: str) -> None:
    write_pictures(tmp_path, 1)
    (row,) = rows_of(Regions(name="r", boxes=boxes), write_lines(tmp_path / "r.jsonl", [KITE]))
    assert isinstance(row, Document)
    assert row.segments[1] == Text(text="\n" + text)
    assert row.regions[0] == Region(image=0, box=(0.1, 0.1, 0.5, 0.5), label="dog")
    assert [region.label for region in row.regions] == ["dog", "dog house", "a tree", "dog"]


@pytest.mark.parametrize(
    "box",
    [
        *([50, 10, 20, 50], [0, 0, 201, 50], [-1, 0, 5, 5], [0, 0, 0, 0], [0, 0, 1]),
        *("0,0,1,1", None, [0, 0, "1", 1], [0, 0, True, 1], [0, 0, float("nan"), 1]),
    ],
)
def test_a_box_outside_its_picture_is_refused(tmp_path: Path, box: object) -> None:
    write_pictures(tmp_path, 1)
    bad = KITE | {"regions": [{"box": box, "phrase": "dog"}]}
    assert only(rows_of(Regions(name="r"), write_lines(tmp_path / "r.jsonl", [KITE, bad]))).reason is Reason.BAD_BOX
