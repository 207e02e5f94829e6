"""Pictures as tokens of a codebook, or as regions of a grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from mllm.annotators.readers import classifier, codebook
from mllm.annotators.shown import Segment, Shown, by_pictures, shown_of
from ops import images
from pipelines import objects
from pipelines.annotate import Folder, Rows
from pipelines.tiling import Resize
from pipelines.types import Codes, Document, Image, spec


@spec
class DiscreteCodes:
    """Pictures as tokens: `size` x `size` pixels, squeezed, through the VQ encoder of Chameleon, Janus or Emu3, row by row.

    `first` is the vocabulary's id of code 0 and `codes` the size of the codebook; `before` and `after` are ids around a
    picture's codes (LWM's <vision>, </vision>). A video becomes the codes of its frames, one after the other (LWM,
    arXiv:2402.08268, 4.1). Boxes of a row's pictures are left away with the pictures.
    """

    kind: Literal["discrete_codes"] = "discrete_codes"
    weights: str
    size: Annotated[int, Field(gt=0)]
    first: Annotated[int, Field(ge=0)]
    codes: Annotated[int, Field(gt=0)] = 8192
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def last(self) -> int:
        """The greatest id of the vocabulary that it may write."""
        return max((self.first + self.codes - 1, *self.before, *self.after))

    def documents(self, folder: Folder) -> Callable[[Rows], Rows]:
        """Load the encoder. Raises ValueError when the folder holds none of the kinds, or one of another codebook."""
        encode = codebook(folder(self.weights), self.codes)
        tiling = Resize(size=self.size, mode="squash")

        def ask(_: list[Shown], tiles: Tensor) -> list[list[int]]:
            return encode(tiles).tolist()

        return lambda rows: by_pictures(rows, shown_of, tiling, ask, self._coded)

    def _coded(self, row: Document, codes: dict[int, list[list[int]]]) -> Document:
        segments: list[Segment] = []
        for place, segment in enumerate(row.segments):
            if place not in codes:
                segments.append(segment)
            for picture in codes.get(place, ()):
                ids = (*self.before, *(self.first + code for code in picture), *self.after)
                segments.append(Codes(ids=ids, role=segment.role))
        return replace(row, segments=tuple(segments), regions=())


@spec
class GridRegions:
    """Regions for pictures that have none beside them: a grid of `rows` x `cols` boxes, each seen by a frozen classifier.

    A stand-in for a detector (grids do as well as objects: arXiv:2001.03615). The picture is squeezed so that a box is `size`
    pixels a side; a box's features are the classifier's pooled ones and its classes the distribution that it gives. Weights are
    those of a ResNet or a ViT with a head.
    """

    kind: Literal["grid_regions"] = "grid_regions"
    weights: str
    rows: Annotated[int, Field(gt=0)] = 6
    cols: Annotated[int, Field(gt=0)] = 6
    size: Annotated[int, Field(gt=0)] = 224

    def documents(self, folder: Folder) -> Callable[[Rows], Rows]:
        """Load the classifier. Raises ValueError when the folder holds none of the kinds."""
        look = classifier(folder(self.weights), self.size)
        boxes = objects.grid(self.rows, self.cols)
        tiling = Resize(size=self.size * max(self.rows, self.cols), mode="squash")

        def ask(_: list[Shown], tiles: Tensor) -> list[bytes]:
            none = np.zeros((len(boxes), 0), np.float32)
            high, wide = self.rows * self.size, self.cols * self.size
            crops = (images.grid(images.resize(tile, high, wide), self.rows, self.cols).flatten(0, 1) for tile in tiles)
            return [objects.packed(objects.Found(*look(each), none, boxes)) for each in crops]

        def bare(row: Document) -> list[int]:
            return [n for n, s in enumerate(row.segments) if isinstance(s, Image) and s.objects is None and s.data]

        return lambda rows: by_pictures(rows, bare, tiling, ask, self._found)

    def _found(self, row: Document, found: dict[int, list[bytes]]) -> Document:
        segments = [
            replace(s, objects=found[n][0]) if n in found and isinstance(s, Image) else s
            for n, s in enumerate(row.segments)
        ]
        return replace(row, segments=tuple(segments))
