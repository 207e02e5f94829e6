"""How an image becomes tiles of one size. A tiling is a frozen value; to add one, write a class and name it in `Tiling`."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from ops import images
from pipelines.types import Document, Image, Reason, SkipSample, Text, Tiled, Tiles, spec

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)


@spec
class Resize:
    """One tile: the middle square (`crop`, as CLIP does) or the whole picture squeezed (`squash`)."""

    kind: Literal["resize"] = "resize"
    size: int
    mode: Literal["crop", "squash"] = "crop"

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

    def grid(self, height: int, width: int) -> tuple[int, int]:  # noqa: ARG002 -- every picture gives one tile
        """Tiles (rows, columns) that a picture of this size becomes."""
        return (1, 1)

    def cut(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (3, h, w) -> uint8 (1, 3, size, size)."""
        red, green, blue = (int(channel * 255) for channel in self.fill)
        return images.pad_to_square(pixels, self.size, (red, green, blue)).unsqueeze(0)


Tiling = Annotated[Resize | Pad, Field(discriminator="kind")]


def tile(document: Document, tiling: Resize | Pad) -> Tiled:
    """Decode every image of `document` and cut it. Raises SkipSample when one cannot be decoded."""
    return Tiled(
        id=document.id,
        source=document.source,
        segments=tuple(s if isinstance(s, Text) else _tile_image(s, tiling) for s in document.segments),
    )


def _tile_image(image: Image, tiling: Resize | Pad) -> Tiles:
    pixels = decode(image, tiling.size)
    height, width = pixels.shape[1:]
    return Tiles(pixels=tiling.cut(pixels), grid=tiling.grid(height, width), original=(height, width), role=image.role)


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
