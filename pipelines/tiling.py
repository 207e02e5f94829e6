"""How an image becomes tiles of one size. A tiling is a frozen value; to add one, write a class and name it in `Tiling`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from ops import images
from pipelines.types import Cut, Document, Image, Limits, Measured, Picture, Reason, SkipSample, spec

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)


@spec
class Resize:
    """One tile: the middle square (`crop`, as CLIP does) or the whole picture squeezed (`squash`)."""

    kind: Literal["resize"] = "resize"
    size: int
    mode: Literal["crop", "squash"] = "crop"

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, self.size, self.size)

    def grid(self, height: int, width: int) -> tuple[int, int]:  # noqa: ARG002 -- every picture gives one tile
        """Tiles (rows, columns) that a picture of this size becomes."""
        return (1, 1)

    def cut(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (3, h, w) -> uint8 (rows * columns, 3, size, size)."""
        if self.mode == "crop":
            return images.centre_crop(pixels, self.size).unsqueeze(0)
        return images.resize(pixels, self.size, self.size).unsqueeze(0)


@spec
class Pad:
    """One tile: the whole picture, its aspect kept, on a square of the mean colour (LLaVA-1.5, VILA)."""

    kind: Literal["pad"] = "pad"
    size: int
    fill: tuple[float, float, float] = CLIP_MEAN

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, self.size, self.size)

    def grid(self, height: int, width: int) -> tuple[int, int]:  # noqa: ARG002 -- every picture gives one tile
        """Tiles (rows, columns) that a picture of this size becomes."""
        return (1, 1)

    def cut(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (3, h, w) -> uint8 (1, 3, size, size)."""
        red, green, blue = (int(channel * 255) for channel in self.fill)
        return images.pad_to_square(pixels, self.size, (red, green, blue)).unsqueeze(0)


Tiling = Annotated[Resize | Pad, Field(discriminator="kind")]


def measure(document: Document, tiling: Resize | Pad, limits: Limits) -> Measured:
    def one(segment: Image) -> Picture:
        try:
            height, width = images.header(segment.data)
        except images.NotAnImage as error:
            raise SkipSample(Reason.NOT_AN_IMAGE, str(error)) from error
        return Picture(
            of=segment,
            role=segment.role,
            cut=Cut(height=height, width=width, rows=1, cols=1, canvas=(tiling.size, tiling.size)),
        )

    return Measured(
        id=document.id,
        source=document.source,
        segments=tuple(one(s) if isinstance(s, Image) else s for s in document.segments),
    )


def pixels(pictures: Sequence[Picture], tiling: Resize | Pad, out=None):
    if out is None:
        out = np.empty((sum(p.cut.tiles for p in pictures), 3, tiling.size, tiling.size), np.uint8)
    at = 0
    for p in pictures:
        out[at : at + 1] = tiling.cut(decode(p.of, tiling.size)).numpy()
        at += 1
    return out


def decode(image: Image, target: int | None = None) -> torch.Tensor:
    """`ops.images.decode`, its errors turned into the reason for which the row is dropped. uint8 (3, h, w)."""
    try:
        return images.decode(image.data, target)
    except images.NotAnImage as error:
        raise SkipSample(Reason.NOT_AN_IMAGE, str(error)) from error
    except images.TruncatedImage as error:
        raise SkipSample(Reason.TRUNCATED_IMAGE, str(error)) from error
    except images.HugeImage as error:
        raise SkipSample(Reason.HUGE_IMAGE, str(error)) from error
