"""The preview, read as a browser would read it, beside the rows that it was made from."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from cluster.preview import Grid, Picture, Reader, Words, write_preview
from pipelines.chat import ChatML
from pipelines.corpora import Conversations, Corpus, Interleaved, TextOnly
from pipelines.encode import TextCodec
from pipelines.manifest import expand, index
from pipelines.order import Drawn, Order
from pipelines.tiling import AnyRes, AnyTiling, DynamicTiles, MultiScale, Native, Pad, Resize, Slices
from pipelines.types import Budget, Image, RowId, VisionLayout
from pipelines.windows import PackWindows, Stream

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CODEC = TextCodec(str(EXAMPLES / "tokenizer"), "<|endoftext|>", "<|im_end|>")


class Page(HTMLParser):
    """Documents of a preview by the label of their row: all text, the marked text, and the number of pictures."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.text: dict[str, str] = {}
        self.marked: dict[str, str] = {}
        self.pictures: dict[str, int] = {}
        self.words = ""
        self.label = ""
        self.inside: list[tuple[str, str]] = []
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            assert dict(attrs)["src"].startswith("data:image/png;base64,")  # type: ignore[union-attr]  # else the test fails
            self.pictures[self.label] += 1
        elif tag != "meta":
            self.inside.append((tag, dict(attrs).get("class") or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self.inside]
        if "style" in tags:
            return
        self.words += data
        if "article" in tags and "header" in tags and " row " in data:
            self.label = data
            self.text[data] = self.marked[data] = ""
            self.pictures[data] = 0
        if ("div", "text") in self.inside and "figcaption" not in tags:
            self.text[self.label] += data
            if "mark" in tags and "special" not in self.inside[-1][1]:
                self.marked[self.label] += data


def stream_of(corpus: Corpus, pattern: str, cache: Path) -> Stream:
    manifest = index(corpus, expand(pattern), str(cache))
    return Stream(
        order=Order(seed=0, sources=(Drawn(manifest=manifest),), window_rows=32, chunk_rows=8, epochs=1),
        corpora=(corpus,),
        tiling=Pad(size=96),
        template=ChatML(),
        layout=VisionLayout(shape=(3, 96, 96), tokens_per_tile=36),
        budget=Budget(tokens=512, tiles=14),
        tokenizer=str(EXAMPLES / "tokenizer"),
        bos="<|endoftext|>",
        eos="<|im_end|>",
        loss_weights=(1.0,),
    )


@pytest.fixture
def instructions(tmp_path: Path) -> Stream:
    file = EXAMPLES / "corpus" / "instruct" / "llava_instruct.json"
    return stream_of(Conversations(name="instructions"), str(file), tmp_path)


def test_marked_words_are_the_assistants(instructions: Stream, tmp_path: Path) -> None:
    page = Page(write_preview(instructions, 3, tmp_path / "preview.html"))
    rows = json.loads((EXAMPLES / "corpus" / "instruct" / "llava_instruct.json").read_text())
    whole = [label for label in page.text if "piece" not in label]
    assert len(whole) > 5
    for label in whole:
        turns = rows[int(label.rpartition(" row ")[2])]["conversations"]
        said = [turn["value"] for turn in turns if turn["from"] == "gpt"]
        asked = [turn["value"].replace("<image>", "").strip() for turn in turns if turn["from"] == "human"]
        assert page.marked[label] == "".join(said)
        assert all(question in page.text[label] for question in asked)


def test_pictures_stand_in_their_documents(instructions: Stream, tmp_path: Path) -> None:
    page = Page(write_preview(instructions, 3, tmp_path / "preview.html"))
    packs = list(islice(PackWindows(instructions).packs(0), 3))
    assert sum(page.pictures.values()) == sum(len(pack.tiles) for pack in packs)
    assert "36 tokens" in page.words
    assert f"{len(packs[0].input_ids)} of 512 tokens" in page.words
    assert f"{len(packs[0].tiles)} of 14 tiles" in page.words


def test_documents_split_over_packs_lose_no_words(tmp_path: Path) -> None:
    pattern = str(EXAMPLES / "corpus" / "interleaved" / "docs_shard_0_v3.jsonl")
    stream = replace(stream_of(Interleaved(name="pages"), pattern, tmp_path), budget=Budget(tokens=128, tiles=3))
    packs = PackWindows(stream).packs(0)
    reader = Reader(CODEC, stream.tiling)
    for pack in packs:
        for document, shown in zip(pack.rows, reader.pack(pack).documents, strict=True):
            assert shown.row == document
        assert sum(page.tokens for page in reader.pack(pack).documents) == len(pack.input_ids)
        assert sum(page.learned for page in reader.pack(pack).documents) == pack.learned


def test_dropped_rows_are_named(tmp_path: Path) -> None:
    rows = ['{"text": "one"}', "{broken", '{"text": "two <b>bold</b> words"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    stream = stream_of(TextOnly(name="notes"), str(tmp_path / "rows.jsonl"), tmp_path)
    page = Page(write_preview(stream, 10, tmp_path / "preview.html"))
    assert "1 row of this window dropped" in page.words
    assert "notes/rows.jsonl row 1: not valid JSON" in page.words
    assert page.marked["notes/rows.jsonl row 2"] == "two <b>bold</b> words"


def test_characters_of_many_tokens_are_whole() -> None:
    """Bytes of one character are one character, even where learning begins inside it."""
    reader = Reader(CODEC, Pad(size=96))
    row = RowId(corpus="notes", shard="rows.jsonl", epoch=0, row=0)
    ids = np.array(CODEC.tokenizer.encode("fin 🦆 日本", add_special_tokens=False).ids, np.int32)
    for border in range(len(ids) + 1):
        shown = reader.document(row, 0, ids, np.arange(len(ids)) >= border, iter(()))
        assert "".join(run.text for run in shown.runs if isinstance(run, Words)) == "fin 🦆 日本"


TILINGS: tuple[AnyTiling, ...] = (
    Resize(size=96),
    Pad(size=96),
    AnyRes(size=96),
    DynamicTiles(size=96, max_tiles=6),
    Slices(size=96, patch=16, max_tiles=6),
    MultiScale(size=96),
    Native(size=96, patch=16),
)


@pytest.mark.parametrize("tiling", TILINGS, ids=lambda tiling: tiling.kind)
def test_pictures_of_every_tiling_are_put_together_again(tiling: AnyTiling, tmp_path: Path) -> None:
    """The largest view of a picture looks like the picture, whatever it was cut into."""
    file = EXAMPLES / "corpus" / "instruct" / "llava_instruct.json"
    layout = VisionLayout(shape=tiling.shape, tokens_per_tile=36, join=tiling.join, merge=getattr(tiling, "merge", 1))
    plain = stream_of(Conversations(name="instructions"), str(file), tmp_path)
    stream = replace(plain, tiling=tiling, layout=layout, budget=Budget(tokens=2048, tiles=1500))
    page = Page(write_preview(stream, 1, tmp_path / "preview.html"))
    assert sum(page.pictures.values()) > 0
    windows = PackWindows(stream)
    plan = windows.plan(0, windows.rows(0))
    pack = windows.cut(plan, 0)
    views = [
        view for shown in Reader(CODEC, tiling).pack(pack).documents for view in shown.runs if isinstance(view, Picture)
    ]
    wanted = [picture for sample in plan.groups[0] for picture in sample.pictures]
    assert len(views) == len(wanted)
    for shown, picture in zip(views, wanted, strict=True):
        assert (shown.height, shown.width) == (picture.cut.height, picture.cut.width)
        if tiling.kind not in ("resize", "pad", "any_res"):  # which cut off, or add a border
            assert isinstance(picture.of, Image)
            original = PILImage.open(io.BytesIO(picture.of.data)).convert("RGB")
            assert difference(whole(max(shown.views, key=lambda view: len(view.tiles))), original) < 8


def whole(view: Grid) -> PILImage.Image:
    """The tiles of a view laid beside one another."""
    tiles = [PILImage.open(io.BytesIO(base64.b64decode(tile.partition(",")[2]))) for tile in view.tiles]
    width, height = tiles[0].size
    canvas = PILImage.new("RGB", (width * view.columns, height * (len(tiles) // view.columns)))
    for place, tile in enumerate(tiles):
        canvas.paste(tile, (place % view.columns * width, place // view.columns * height))
    return canvas


def difference(one: PILImage.Image, other: PILImage.Image) -> float:
    """Mean difference of two pictures' channels, both brought to 32 x 32."""
    small = [np.asarray(picture.resize((32, 32), PILImage.Resampling.BOX), float) for picture in (one, other)]
    return float(np.abs(small[0] - small[1]).mean())
