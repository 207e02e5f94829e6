"""Shards of every format, made of the example corpus: real pictures, captions, pages, instructions and a real clip."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpora import (
    CaptionList,
    Conversations,
    Corpus,
    Interleaved,
    Labelled,
    Obelics,
    Pairs,
    Preferences,
    Questions,
    Regions,
    TextOnly,
    Videos,
)
from pipelines.manifest import Manifest, expand, index
from pipelines.types import Chunk, Document, Limits, Rejected
from tests.conftest import CORPUS

CLIP = CORPUS / "video" / "bigbuckbunny.mp4"
PAGES = CORPUS / "interleaved" / "docs_shard_0_v3.jsonl"

Row = Document | Rejected


def indexed(corpus: Corpus, pattern: str | Path, cache: Path) -> Manifest:
    return index(corpus, expand(str(pattern)), str(cache / "index"))


def read(corpus: Corpus, manifest: Manifest, shard: int = 0, limits: Limits | None = None) -> list[Row]:
    place = manifest.shards[shard]
    chunk = Chunk(source=0, shard=shard, epoch=0, start=0, stop=place.rows)
    return list(corpus.read(place, chunk, limits or Limits()))


def rows_of(corpus: Corpus, uri: str | Path, limits: Limits | None = None) -> list[Row]:
    """Every row of a shard."""
    return read(corpus, indexed(corpus, uri, Path(uri).parent), 0, limits)


@cache
def captioned() -> tuple[tuple[bytes, str], ...]:
    """The pictures and captions of one example shard."""
    with tarfile.open(CORPUS / "pairs" / "00002.tar") as archive:
        files = {member.name: body(archive, member) for member in archive}
    stems = sorted(name[:-4] for name in files if name.endswith(".jpg"))
    return tuple((files[f"{stem}.jpg"], files[f"{stem}.txt"].decode()) for stem in stems)


@cache
def pages() -> tuple[dict[str, Any], ...]:
    return tuple(json.loads(line) for line in PAGES.read_text().splitlines())


@cache
def page_pictures() -> dict[str, bytes]:
    with tarfile.open(CORPUS / "interleaved" / "images_shard_0.tar") as archive:
        return {member.name: body(archive, member) for member in archive}


def write_lines(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def body(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, f"{member.name} is no file"
    return file.read()


def write_tar(path: Path, members: Iterable[tuple[str | tarfile.TarInfo, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name) if isinstance(name, str) else name
            member.size = len(data) if member.isfile() else 0
            archive.addfile(member, io.BytesIO(data))
    return path


def write_pictures(folder: Path, count: int) -> list[tuple[str, str]]:
    """Loose pictures below `folder`: name and caption of each."""
    folder.mkdir(parents=True, exist_ok=True)
    named = []
    for number, (data, caption) in enumerate(captioned()[:count]):
        (folder / f"{number}.jpg").write_bytes(data)
        named.append((f"{number}.jpg", caption))
    return named


def obelics_rows() -> list[dict[str, Any]]:
    """The example pages as OBELICS would hold them."""
    rows = []
    for page in pages()[:12]:
        at = {info["matched_text_index"]: info["image_name"] for info in page["image_info"]}
        images: list[str | None] = []
        texts: list[str | None] = []
        bodies: list[bytes | None] = []
        for place, sentence in enumerate(page["text_list"]):
            if place in at:
                images.append(f"https://example.org/{at[place]}")
                texts.append(None)
                bodies.append(page_pictures()[at[place]])
            images.append(None)
            texts.append(sentence)
            bodies.append(None)
        rows.append(
            {"images": images, "texts": texts, "images_bytes": bodies, "metadata": "[]", "general_metadata": "{}"}
        )
    return rows


def write_parquet(path: Path, rows: list[dict[str, Any]], group: int = 4) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)
    return path


def write_frames(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for number, (data, _) in enumerate(captioned()[:count]):
        (folder / f"frame_{number}.jpg").write_bytes(data)
    return folder


def talk(question: str, answer: str) -> list[dict[str, str]]:
    """A question and its answer as LLaVA writes them."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def chat(question: str, answer: str) -> list[dict[str, str]]:
    """The same as MiniCPM, and most others, write them."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def every_format(folder: Path) -> Iterator[tuple[Corpus, Path]]:
    """One shard of each format and of each form that a format comes in; no row of it is bad."""
    named = write_pictures(folder / "images", 6)
    write_frames(folder / "images" / "clip", 11)
    (folder / "images" / "clip.mp4").write_bytes(CLIP.read_bytes())
    pictures = [data for data, _ in captioned()[:8]]

    yield Pairs(name="pairs"), CORPUS / "pairs" / "00002.tar"
    asked = [
        ((f"{n}.jpg", data), (f"{n}.txt", b"What is it?"), (f"{n}.cls", b"%d" % (n % 3)))
        for n, data in enumerate(pictures)
    ]
    yield Questions(name="vqa"), write_tar(folder / "vqa.tar", [member for row in asked for member in row])
    yield CaptionList(name="tsv", images="images"), _table(folder / "c.tsv", "\t", ("caption", "filename"), named)
    yield (
        CaptionList(name="jsonl"),
        write_lines(folder / "images" / "c.jsonl", [{"caption": c, "image": n} for n, c in named]),
    )
    yield (
        Labelled(name="tar"),
        write_tar(
            folder / "labels.tar",
            [m for n, data in enumerate(pictures) for m in ((f"a/{n}.jpg", data), (f"a/{n}.cls", str(n % 3).encode()))],
        ),
    )
    labels = [(str(n % 2), name) for n, (name, _) in enumerate(named)]
    yield Labelled(name="csv", images="images"), _table(folder / "l.csv", ",", ("path", "label"), labels)
    yield Interleaved(name="archive"), PAGES
    (folder / "pages").mkdir()
    for name, data in page_pictures().items():
        (folder / "pages" / name).write_bytes(data)
    yield Interleaved(name="folder", folder="pages"), write_lines(folder / "docs_shard_1.jsonl", pages()[:12])
    yield (
        Interleaved(name="base64", archive=None),
        write_lines(folder / "docs_shard_2.jsonl", map(with_base64, pages()[:12])),
    )
    yield Obelics(name="obelics"), write_parquet(folder / "obelics.parquet", obelics_rows())
    yield Conversations(name="llava"), CORPUS / "instruct" / "llava_instruct_heldout.json"
    which = "<image_00> or <image_01>?"
    yield (
        Conversations(name="minicpm", images="images"),
        write_lines(
            folder / "minicpm.jsonl",
            [
                {"image": {"<image_00>": a, "<image_01>": b}, "conversations": chat(which, "The first.")}
                for (a, _), (b, _) in pairwise(named)
            ],
        ),
    )
    yield (
        Conversations(name="video", images="images"),
        write_lines(
            folder / "clips.jsonl",
            [
                {"video": "clip.mp4", "conversations": talk("<video>\nWhat?", "A rabbit.")},
                {"video": "clip/", "conversations": talk("<image>\nWhat?", "Clip art.")},
                {"q": "What is it?", "a": "A rabbit.", "video_id": "clip"},
            ],
        ),
    )
    lines = [json.loads(line) for line in (CORPUS / "text" / "gsm8k_train_200.jsonl").read_text().splitlines()]
    yield TextOnly(name="jsonl"), CORPUS / "text" / "gsm8k_train_200.jsonl"
    (folder / "text.json").write_text(json.dumps(lines[:30], indent=1))
    yield TextOnly(name="json"), folder / "text.json"
    yield (
        TextOnly(name="parquet"),
        write_parquet(
            folder / "flan.parquet", [{"inputs": r["question"], "targets": r["answer"]} for r in lines[:30]], 7
        ),
    )
    answers = [
        {"question": "What is shown?", "chosen": mine, "rejected": other, "image": {"bytes": data, "path": "x.jpg"}}
        for (data, mine), (_, other) in zip(captioned()[:9], captioned()[9:18], strict=True)
        if mine != other
    ]
    yield Preferences(name="rlaif-v"), write_parquet(folder / "dpo.parquet", answers, 4)
    yield (
        Preferences(name="llava-next", images="images"),
        write_lines(
            folder / "dpo.jsonl",
            [{"prompt": "What is it?", "chosen": c, "rejected": "A horse?", "image": n} for n, c in named],
        ),
    )
    yield (
        Regions(name="regions", images="images"),
        write_lines(
            folder / "regions.jsonl",
            [
                {"image": n, "text": c, "regions": [{"box": [0.1, 0.2, 0.5, 1.0], "phrase": c.split()[0]}]}
                for n, c in named
            ],
        ),
    )
    yield (
        Videos(name="list", videos="images"),
        write_lines(
            folder / "v.jsonl", [{"video": "clip.mp4", "caption": "a rabbit"}, {"video": "clip", "text": "clip art"}]
        ),
    )
    yield (
        Videos(name="tar"),
        write_tar(
            folder / "v.tar",
            [(f"{n}.{e}", d) for n in range(2) for e, d in (("mp4", CLIP.read_bytes()), ("txt", b"a rabbit"))],
        ),
    )


def with_base64(page: dict[str, Any]) -> dict[str, Any]:
    return page | {
        "image_info": [
            info | {"image_base64": base64.b64encode(page_pictures()[info["image_name"]]).decode()}
            for info in page["image_info"]
        ]
    }


def _table(path: Path, between: str, columns: tuple[str, str], named: list[tuple[str, str]]) -> Path:
    lines = [between.join(columns), *(between.join((second, first)) for first, second in named)]
    path.write_text("\n".join(lines) + "\n")
    return path
