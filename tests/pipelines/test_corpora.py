"""Readers over the example corpus, and over copies of it that were damaged as web data is."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.corpora import Conversations, Corpus, Interleaved, Pairs, TextOnly
from pipelines.manifest import Manifest, expand, index
from pipelines.types import Chunk, Document, Image, Reason, Rejected, Text
from tests.conftest import CORPUS


def read(corpus: Corpus, manifest: Manifest, shard: int = 0) -> list[Document | Rejected]:
    place = manifest.shards[shard]
    return list(corpus.read(place, Chunk(source=0, shard=shard, epoch=0, start=0, stop=place.rows)))


def indexed(corpus: Corpus, pattern: str, cache: Path) -> Manifest:
    return index(corpus, expand(pattern), str(cache))


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
        captions = [archive.extractfile(m).read().decode() for m in archive if m.name.endswith(".txt")]  # type: ignore[union-attr]
    assert [row.segments[1].text.strip() for row in rows if isinstance(row, Document)] == captions  # type: ignore[union-attr]


def test_a_chunk_reads_its_own_rows_only(tmp_path: Path) -> None:
    corpus = Pairs(name="pairs")
    manifest = indexed(corpus, str(CORPUS / "pairs/00000.tar"), tmp_path)
    whole = read(corpus, manifest)
    part = list(corpus.read(manifest.shards[0], Chunk(source=0, shard=0, epoch=3, start=10, stop=13)))
    assert [p.segments for p in part if isinstance(p, Document)] == [
        w.segments for w in whole[10:13] if isinstance(w, Document)
    ]
    assert [p.id.row for p in part if isinstance(p, Document)] == [10, 11, 12]
    assert part[0].id.epoch == 3  # type: ignore[union-attr]


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
