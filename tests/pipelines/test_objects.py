"""Regions as data: what a detector found beside a picture, as rows of a pack; what is damaged is dropped alone and named."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import pictures
from pipelines.corpora import Pairs, Questions
from pipelines.objects import Found, Objects, RegionRow, grid, packed, unpacked
from pipelines.tiling import Resize
from pipelines.types import Document, Image, Picture, Reason, RowId, SkipSample, Text
from tests.pipelines.shards import captioned, rows_of, write_tar

ROW = RegionRow(features=5, classes=3, attributes=2)
AT = RowId(corpus="c", shard="s", epoch=0, row=0)


def stored(**arrays: Any) -> bytes:
    file = io.BytesIO()
    words: dict[str, Any] = {"features": np.ones((4, 5)), "boxes": np.tile([0.0, 0.0, 0.5, 1.0], (4, 1))}
    words |= {"classes": np.full((4, 3), 0.3), "attributes": np.zeros((4, 2)), **arrays}
    np.savez(file, **{name: x for name, x in words.items() if x is not None})
    return file.getvalue()


def found(count: int = 6) -> Found:
    draw = np.random.default_rng(0)
    classes = draw.dirichlet(np.ones(3), count).astype(np.float32)
    attributes = draw.dirichlet(np.ones(2), count).astype(np.float32)
    return Found(draw.normal(size=(count, 5)).astype(np.float32), classes, attributes, grid(2, 3)[:count])


def rows_in(tiling: Objects, objects: bytes) -> np.ndarray:
    document = Document(id=AT, source=0, segments=(Image(data=b"", objects=objects), Text(text="a")))
    measured = pictures.measure(document, tiling)
    shown = [segment for segment in measured.segments if isinstance(segment, Picture)]
    return pictures.pixels(shown, tiling)


def test_the_surest_regions_come_first_and_unsure_ones_only_where_few_are_sure() -> None:
    given = found()
    order = np.argsort(-given.sure)
    sure = float(np.sort(given.sure)[::-1][2:4].mean())  # three are surer
    for least, most, count in ((1, 100, 3), (5, 100, 5), (1, 2, 2), (100, 100, 6)):
        tiling = Objects(row=ROW, least=least, most=most, confidence=sure)
        rows = rows_in(tiling, packed(given))
        assert rows.shape == (count, ROW.bytes)
        halves = np.ascontiguousarray(rows[:, :20]).view("<f2")
        kept = order[:count]
        assert np.allclose(halves[:, :5], given.features[kept], atol=1e-2)
        assert np.allclose(halves[:, 5:8], given.classes[kept], atol=1e-3)
        assert np.allclose(halves[:, 8:], given.attributes[kept], atol=1e-3)
        assert np.array_equal(tiling.boxes(rows), given.boxes[kept])


def test_one_class_with_a_certainty_is_a_distribution_too_and_boxes_may_be_in_pixels() -> None:
    data = stored(
        classes=np.array([2, 0, 1, 1]),
        confidences=np.array([0.9, 0.5, 0.25, 1.0]),
        boxes=np.tile([10.0, 20.0, 30.0, 40.0], (4, 1)),
        size=np.array([40, 60]),
    )
    read = unpacked(data, ROW)
    assert np.allclose(read.classes, [[0, 0, 0.9], [0.5, 0, 0], [0, 0.25, 0], [0, 1, 0]])
    assert np.allclose(read.boxes, [[1 / 6, 0.5, 0.5, 1.0]] * 4)


BAD = {
    "no regions at all": (None, "no regions beside the picture"),
    "no archive": (b"words", "not a zip file"),
    "cut short": (stored()[:300], "not a zip file"),
    "another width": (stored(features=np.ones((4, 6))), "the recipe reads 5 features"),
    "no boxes": (stored(boxes=None), "no table of boxes"),
    "no classes": (stored(classes=None), "classes none"),
    "a class beyond": (stored(classes=np.array([0, 1, 2, 3])), "the recipe reads 3"),
    "objects of Python": (stored(features=np.array([[{}]], object)), "allow_pickle"),
    "a box outside": (stored(boxes=np.tile([0.0, 0.0, 2.0, 1.0], (4, 1))), "not inside the picture"),
    "a box inside out": (stored(boxes=np.tile([0.5, 0.0, 0.2, 1.0], (4, 1))), "not inside the picture"),
    "no number": (stored(features=np.full((4, 5), np.nan)), "a number that is none"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_regions_drop_their_row_alone(what: str) -> None:
    data, reason = BAD[what]
    with pytest.raises(SkipSample, match=reason):
        Objects(row=ROW).found(data)


def test_rows_of_a_tar_bring_regions_with_or_without_their_picture(tmp_path: Path) -> None:
    (picture, caption), *_ = captioned()
    regions = packed(found())
    members = [
        *(("0.npz", regions), ("0.txt", caption.encode()), ("0.cls", b"2")),
        *(("1.jpg", picture), ("1.npz", regions), ("1.txt", caption.encode())),
        *(("2.jpg", picture), ("2.txt", caption.encode()), ("2.cls", b"blue")),
    ]
    path = write_tar(tmp_path / "0.tar", members)
    pairs = rows_of(Pairs(name="pairs"), path)
    assert [row.label for row in pairs if isinstance(row, Document)] == [None] * 3  # a caption is no question
    bare, both, _ = pairs
    assert isinstance(bare, Document)
    assert isinstance(both, Document)
    for row, data in ((bare, b""), (both, picture)):
        assert row.segments[0] == Image(data=data, objects=regions)
    with pytest.raises(SkipSample) as skip:
        pictures.measure(bare, Resize(size=32))
    assert skip.value.reason in (Reason.NOT_AN_IMAGE, Reason.TRUNCATED_IMAGE)
    assert pictures.measure(both, Resize(size=32)).segments
    asked = rows_of(Questions(name="vqa"), path)
    assert [row.label if isinstance(row, Document) else row.reason for row in asked] == [2, None, Reason.MISSING_FIELD]
