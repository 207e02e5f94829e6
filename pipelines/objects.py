"""What a detector found in a picture, as data: a `.npz` beside the picture, and rows of bytes in a pack's `tiles`.

    key.npz    features float (K, F); boxes float (K, 4): left, top, right, bottom, in pixels where there is `size` (height,
               width), else in shares of the sides; classes: probabilities (K, C), or numbers int (K,) with `confidences` (K,);
               attributes likewise, with `attribute_confidences`

The features are those that UNITER, VL-BERT and LXMERT are trained on (bottom-up attention, arXiv:1707.07998): the detector
is run once, elsewhere. A region is to a pack what a tile is: one row of `tiles`, one token, counted by the budget of tiles.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from pipelines.types import Cut, Join, Reason, SkipSample, spec

Count = Annotated[int, Field(ge=0)]
Floats = NDArray[np.float32]

LARGEST = 2**28
"""Bytes that a file of regions may unpack to."""


@spec
class RegionRow:
    """Numbers of one region: `features`, probabilities of `classes` and of `attributes` (0: there are none), and its box.

    As bytes: features, classes and attributes in float16, one after the other, then the box, four float32 in shares of the sides.
    """

    features: Annotated[int, Field(gt=0)] = 2048
    classes: Count = 0
    attributes: Count = 0

    @property
    def halves(self) -> int:
        """Numbers in float16."""
        return self.features + self.classes + self.attributes

    @property
    def bytes(self) -> int:
        return 2 * self.halves + 16


@dataclass(slots=True)
class Found:
    """The regions of one picture, float32: `features` (K, F), `classes` (K, C), `attributes` (K, A), `boxes` (K, 4) in shares."""

    features: Floats
    classes: Floats
    attributes: Floats
    boxes: Floats

    @property
    def sure(self) -> Floats:
        """How sure the detector is of each, (K,): its likeliest class; alike where it told none."""
        return self.classes.max(1) if self.classes.shape[1] else np.ones(len(self.boxes), np.float32)


def packed(found: Found) -> bytes:
    """Regions as the file that `unpacked` reads."""
    halves = {"features": found.features, "classes": found.classes, "attributes": found.attributes}
    file = io.BytesIO()
    kept: dict[str, Any] = {name: array.astype(np.float16) for name, array in halves.items() if array.size}
    np.savez(file, boxes=found.boxes.astype(np.float32), **kept)
    return file.getvalue()


def grid(rows: int, cols: int) -> Floats:
    """Boxes of rows x cols equal parts of a picture, row by row, float32 (rows * cols, 4) in shares."""
    lines = [(c / cols, r / rows, (c + 1) / cols, (r + 1) / rows) for r in range(rows) for c in range(cols)]
    return np.array(lines, np.float32)


def unpacked(data: bytes, row: RegionRow) -> Found:
    """Read a `.npz` of regions. Raises SkipSample where it is none, is damaged, or has not the numbers that `row` says."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            size = sum(info.file_size for info in archive.infolist())
        if size > LARGEST:
            raise SkipSample(Reason.HUGE_FILE, f"regions of {size:,} bytes; at most {LARGEST:,}")
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise SkipSample(Reason.MISSING_FIELD, f"regions: {error}") from error
    for name in ("features", "boxes"):
        if name not in arrays or arrays[name].ndim != 2 or not len(arrays[name]):
            raise SkipSample(Reason.MISSING_FIELD, f"regions: no table of {name}; the .npz holds {sorted(arrays)}")
    features, boxes = (arrays[name].astype(np.float32) for name in ("features", "boxes"))
    if features.shape[1] != row.features or boxes.shape != (len(features), 4):
        raise SkipSample(
            Reason.MISSING_FIELD,
            f"regions: features {features.shape} and boxes {boxes.shape}; the recipe reads {row.features} features and 4 sides",
        )
    if "size" in arrays:
        height, width = arrays["size"].astype(np.float32).reshape(-1)[:2]
        boxes = boxes / np.array([width, height, width, height], np.float32)
    if not (np.isfinite(features).all() and np.isfinite(boxes).all()):
        raise SkipSample(Reason.BAD_BOX, "regions: a number that is none")
    if (boxes[:, :2] > boxes[:, 2:]).any() or boxes.min() < -0.01 or boxes.max() > 1.01:
        raise SkipSample(Reason.BAD_BOX, "regions: a box that is not inside the picture")
    return Found(
        features=features,
        classes=_likely(arrays, "classes", "confidences", len(boxes), row.classes),
        attributes=_likely(arrays, "attributes", "attribute_confidences", len(boxes), row.attributes),
        boxes=boxes.clip(0, 1),
    )


def _likely(arrays: dict[str, NDArray], name: str, sure: str, count: int, wanted: int) -> Floats:
    """Probabilities (K, C) as they are stored, or of the one number that each region has."""
    if not wanted:
        return np.zeros((count, 0), np.float32)
    stored = arrays.get(name)
    if stored is not None and stored.shape == (count, wanted):
        return stored.astype(np.float32)
    if stored is None or stored.shape != (count,) or stored.min() < 0 or stored.max() >= wanted:
        shape = "none" if stored is None else stored.shape
        raise SkipSample(
            Reason.MISSING_FIELD, f"regions: {name} {shape}; the recipe reads {wanted} for each of {count}"
        )
    found = np.zeros((count, wanted), np.float32)
    found[np.arange(count), stored.astype(np.int64)] = arrays.get(sure, np.ones(count)).astype(np.float32)
    return found


@spec
class Objects:
    """A picture as the regions that a detector found in it (`Image.objects`), the surest first: a tiling that looks at no pixels.

    Regions of which the detector is surer than `confidence` are taken, at least `least` and at most `most` of them (UNITER,
    arXiv:1909.11740: 10, 100 and 0.2). Each is one row of `tiles` and one token.
    """

    kind: Literal["objects"] = "objects"
    row: RegionRow = RegionRow()
    least: Annotated[int, Field(gt=0)] = 10
    most: Annotated[int, Field(gt=0)] = 100
    confidence: Annotated[float, Field(ge=0, le=1)] = 0.2

    def __post_init__(self) -> None:
        if self.least > self.most:
            raise ValueError(f"objects: least={self.least} regions are more than most={self.most}; mend one")

    @property
    def size(self) -> int:
        """Regions have no side in pixels."""
        return 1

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.row.bytes,)

    @property
    def join(self) -> Join:
        return "tiles"

    def share(self, pictures: int) -> int | None:  # noqa: ARG002 -- what was found is found
        return None

    def cut(self, height: int, width: int, single: bool = False, limit: int | None = None) -> Cut:  # noqa: ARG002 -- as above
        """The most that a picture may take, where nothing is known of it."""
        return self.counted(self.most)

    def counted(self, count: int) -> Cut:
        """How a picture of so many regions is cut."""
        return Cut(height=count, width=1, rows=count, cols=1, canvas=(count, 1))

    def found(self, objects: bytes | None) -> Cut:
        """How many regions of a picture are taken. Raises SkipSample where nobody looked for any."""
        sure = self._read(objects).sure
        return self.counted(min(len(sure), max(self.least, min(self.most, int((sure > self.confidence).sum())))))

    def rows(self, objects: bytes | None, cut: Cut, out: NDArray[np.uint8]) -> None:
        """Write the regions of one picture into `out`, uint8 (cut.tiles, row.bytes), the surest first."""
        found = self._read(objects)
        order = np.argsort(-found.sure, kind="stable")[: cut.tiles]
        halves = np.concatenate([found.features, found.classes, found.attributes], axis=1)[order].astype("<f2")
        out[:, : 2 * self.row.halves] = np.ascontiguousarray(halves).view(np.uint8)
        out[:, 2 * self.row.halves :] = np.ascontiguousarray(found.boxes[order].astype("<f4")).view(np.uint8)

    def boxes(self, rows: NDArray[np.uint8]) -> Floats:
        """Boxes of a pack's rows, (N, 4) in shares of the sides."""
        return np.ascontiguousarray(rows[:, 2 * self.row.halves :]).view("<f4")

    def _read(self, objects: bytes | None) -> Found:
        if objects is None:
            raise SkipSample(
                Reason.MISSING_FIELD, "no regions beside the picture: give it a .npz, or the stage grid_regions"
            )
        return unpacked(objects, self.row)

    def target(self, cut: Cut) -> tuple[int, int]:
        return cut.canvas

    def tile(self, pixels: Tensor, cut: Cut, out: Tensor | None = None) -> Tensor:
        """Raises ValueError: regions come of what a detector found, not of pixels."""
        raise ValueError(
            f"objects are read from what a detector found, and these are {tuple(pixels.shape)} pixels for {cut.tiles} rows"
            f"{' of a pack' if out is not None else ''}; give the stage grid_regions"
        )
