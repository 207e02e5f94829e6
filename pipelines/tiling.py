"""How a picture becomes tiles: planned from its size alone, and cut when its pixels are there.

A tiling is a frozen value; to add one, write a class with these six words and name it in `Tiling`:

    size                    side of a tile in pixels; for patches, the side that the encoder was made for
    shape                   of one row of a pack's `tiles`: (3, size, size), or (3 * patch * patch,) for patches
    join                    how features become tokens: see `VisionLayout.tokens`
    cut(height, width)      -> Cut, arithmetic on the picture's size as a person sees it. `single` asks for one tile (or one
                            slice), as frames of videos are shown; `limit` bounds the tiles of the grid, the overview not
                            counted, as `share` gives it to the pictures of one document
    target(cut)             least (height, width) that the decoded picture must have: `ops.images.decode` may halve it
    tile(pixels, cut, out)  uint8 (3, h, w) -> uint8 (cut.tiles, *shape), into `out` when given. The pixels may be fewer than
                            the cut's height and width tell: a picture decoded at half size is cut alike

>>> DynamicTiles(size=448).cut(height=1300, width=800).tiles
7
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ops import images
from pipelines.objects import Objects
from pipelines.types import (
    Cut,
    Join,
    spec,
)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
BLACK = (0, 0, 0)
Size = tuple[int, int]


def _rows(cut: Cut, shape: tuple[int, ...], out: Tensor | None) -> Tensor:
    """`out`, or new room for the tiles of `cut`. Raises ValueError when `out` has another shape."""
    if out is None:
        return torch.empty(cut.tiles, *shape, dtype=torch.uint8)
    if out.shape != (cut.tiles, *shape):
        raise ValueError(f"out is {tuple(out.shape)} and the tiles are {(cut.tiles, *shape)}; make it with `cut.tiles`")
    return out


def _squash(pixels: Tensor, size: Size, rows: int, cols: int, out: Tensor) -> None:
    """Resize to `size`, ignoring the aspect ratio, and write the rows x cols tiles into `out`, row by row."""
    tiles = images.grid(images.resize(pixels, *size), rows, cols)
    out.view(tiles.shape).copy_(tiles)


def _patches(pixels: Tensor, size: Size, rows: int, cols: int, patch: int, out: Tensor) -> None:
    """The same as patches, each slice's own row by row, slice after slice."""
    patches = images.patchify(images.grid(images.resize(pixels, *size), rows, cols), patch)
    out.view(patches.shape).copy_(patches)


@spec
class Resize:
    """One tile: the middle square (`crop`, as CLIP does) or the whole picture squeezed (`squash`)."""

    kind: Literal["resize"] = "resize"
    size: int
    mode: Literal["crop", "squash"] = "crop"

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, self.size, self.size)

    @property
    def join(self) -> Join:
        return "tiles"

    def share(self, pictures: int) -> int | None:  # noqa: ARG002 -- every picture is one tile
        return None

    def cut(self, height: int, width: int, single: bool = False, limit: int | None = None) -> Cut:  # noqa: ARG002 -- as above
        return Cut(height=height, width=width, rows=1, cols=1, canvas=(self.size, self.size))

    def target(self, cut: Cut) -> Size:
        if self.mode == "squash":
            return cut.canvas
        scale = self.size / min(cut.height, cut.width)
        return max(self.size, round(cut.height * scale)), max(self.size, round(cut.width * scale))

    def tile(self, pixels: Tensor, cut: Cut, out: Tensor | None = None) -> Tensor:
        out = _rows(cut, self.shape, out)
        height, width = self.target(cut)
        top, left = (height - self.size) // 2, (width - self.size) // 2
        out[0] = images.resize(pixels, height, width)[:, top : top + self.size, left : left + self.size]
        return out


@spec
class Pad:
    """One tile: the whole picture, its aspect kept, on a square of the mean colour (LLaVA-1.5, VILA)."""

    kind: Literal["pad"] = "pad"
    size: int
    fill: tuple[float, float, float] = CLIP_MEAN

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, self.size, self.size)

    @property
    def join(self) -> Join:
        return "tiles"

    def share(self, pictures: int) -> int | None:  # noqa: ARG002 -- every picture is one tile
        return None

    def cut(self, height: int, width: int, single: bool = False, limit: int | None = None) -> Cut:  # noqa: ARG002 -- as above
        return Cut(height=height, width=width, rows=1, cols=1, canvas=(self.size, self.size))

    def target(self, cut: Cut) -> Size:
        scale = self.size / max(cut.height, cut.width)
        return max(1, round(cut.height * scale)), max(1, round(cut.width * scale))

    def tile(self, pixels: Tensor, cut: Cut, out: Tensor | None = None) -> Tensor:
        out = _rows(cut, self.shape, out)
        red, green, blue = (int(channel * 255) for channel in self.fill)
        images.letterbox(pixels, self.target(cut), (red, green, blue), out[0])
        return out


@spec
class AnyRes:
    """LLaVA-NeXT: a squeezed overview first, then the tiles of the canvas that suits the picture best, row by row.

    `canvases` are (rows, columns) of tiles (the paper's pinpoints / `size`). The one is taken that shows most of the picture's
    own pixels, of equals the smallest; the picture lies in its middle, aspect kept, on black. Features over the black are
    taken out and each row ends with a newline: `VisionLayout` counts them (`select_best_resolution` and `unpad_image`, LLaVA
    `mm_utils.py`, `llava_arch.py`). Several pictures of a document share the tiles of the largest canvas; where none
    fits, and for frames, the overview stands alone.
    """

    kind: Literal["any_res"] = "any_res"
    size: int
    canvases: tuple[tuple[int, int], ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))

    def __post_init__(self) -> None:
        if not self.canvases or min(min(canvas) for canvas in self.canvases) < 1:
            raise ValueError(f"any_res: canvases={self.canvases}; give at least one (rows, columns), each at least 1")

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, self.size, self.size)

    @property
    def join(self) -> Join:
        return "unpad"

    @property
    def max_tiles(self) -> int:
        """Tiles of the largest canvas, the overview not counted."""
        return max(rows * cols for rows, cols in self.canvases)

    def share(self, pictures: int) -> int | None:
        """`limit` for each of several pictures of one document; None leaves a lone one free."""
        return max(1, self.max_tiles // pictures) if pictures > 1 else None

    def cut(self, height: int, width: int, single: bool = False, limit: int | None = None) -> Cut:
        most = self.max_tiles if limit is None else limit
        fitting = [] if single else [canvas for canvas in self.canvases if canvas[0] * canvas[1] <= most]
        square = (self.size, self.size)
        if not fitting:
            return Cut(height=height, width=width, rows=1, cols=1, canvas=square)

        def worth(canvas: tuple[int, int]) -> tuple[int, int]:
            high, wide = canvas[0] * self.size, canvas[1] * self.size
            scale = min(wide / width, high / height)
            return min(int(width * scale) * int(height * scale), width * height), -high * wide

        rows, cols = max(fitting, key=worth)
        canvas = (rows * self.size, cols * self.size)
        return Cut(height=height, width=width, rows=rows, cols=cols, canvas=canvas, overview=square)

    def target(self, cut: Cut) -> Size:
        if cut.overview is None:
            return cut.canvas
        height, width = self._inside(cut)
        return max(height, self.size), max(width, self.size)

    def _inside(self, cut: Cut) -> Size:
        """Size of the picture on its canvas."""
        (high, wide), height, width = cut.canvas, cut.height, cut.width
        # In floats, as the released code has it: a product just above a whole number is rounded up there too.
        if wide / width < high / height:
            return min(math.ceil(height * (wide / width)), high), wide
        return high, min(math.ceil(width * (high / height)), wide)

    def tile(self, pixels: Tensor, cut: Cut, out: Tensor | None = None) -> Tensor:
        out = _rows(cut, self.shape, out)
        _squash(pixels, (self.size, self.size), 1, 1, out[:1])
        if cut.overview is not None:
            canvas = torch.empty(3, *cut.canvas, dtype=torch.uint8)
            images.letterbox(pixels, self._inside(cut), BLACK, canvas)
            out[1:] = images.grid(canvas, cut.rows, cut.cols).flatten(0, 1)
        return out


@spec
class DynamicTiles:
    """InternVL 1.5: the grid of 1 to `max_tiles` tiles nearest in aspect, the picture squeezed onto it; a thumbnail last.

    Nearest means |width / height - columns / rows|; of equals the larger is taken when the picture has more than half
    its pixels (`dynamic_preprocess`, InternVL `train/dataset.py`). The thumbnail, the picture squeezed into one tile, is left
    out when the grid is one tile. Several pictures of a document share `max_tiles` (`max_dynamic_patch // num_image` there).
    The paper's examples are width x height: 800 x 1300 gives 2 columns and 3 rows.
    """

    kind: Literal["dynamic_tiles"] = "dynamic_tiles"
    size: int
    max_tiles: int = 12
    thumbnail: bool = True

    def __post_init__(self) -> None:
        if self.max_tiles < 1:
            raise ValueError(f"dynamic_tiles: max_tiles={self.max_tiles}; a picture takes at least 1")

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, self.size, self.size)

    @property
    def join(self) -> Join:
        return "tiles"

    def share(self, pictures: int) -> int | None:
        """`limit` for each of several pictures of one document; None leaves a lone one free."""
        return max(1, self.max_tiles // pictures) if pictures > 1 else None

    def cut(self, height: int, width: int, single: bool = False, limit: int | None = None) -> Cut:
        most = 1 if single else self.max_tiles if limit is None else min(self.max_tiles, limit)
        rows, cols = self._grid(height, width, most)
        return Cut(
            height=height,
            width=width,
            rows=rows,
            cols=cols,
            canvas=(rows * self.size, cols * self.size),
            overview=(self.size, self.size) if self.thumbnail and rows * cols > 1 else None,
        )

    def _grid(self, height: int, width: int, most: int) -> Size:
        aspect = width / height
        grids = _grids(most)
        least = min([abs(aspect - ratio) for ratio, _, _ in grids])
        nearest = [(rows, cols) for ratio, rows, cols in grids if abs(aspect - ratio) == least]
        half = 0.5 * self.size * self.size
        larger = [(rows, cols) for rows, cols in nearest[1:] if width * height > half * rows * cols]
        return (larger or nearest[:1])[-1]

    def target(self, cut: Cut) -> Size:
        return cut.canvas

    def tile(self, pixels: Tensor, cut: Cut, out: Tensor | None = None) -> Tensor:
        out = _rows(cut, self.shape, out)
        grid = cut.rows * cut.cols
        _squash(pixels, cut.canvas, cut.rows, cut.cols, out[:grid])
        if cut.overview is not None:
            _squash(pixels, cut.overview, 1, 1, out[grid:])
        return out


@lru_cache(maxsize=64)
def _grids(most: int) -> tuple[tuple[float, int, int], ...]:
    """Columns / rows, rows, columns of every grid of 1 to `most` tiles, by area and then by columns."""
    sides = range(1, most + 1)
    found = sorted((rows * cols, cols, rows) for cols in sides for rows in sides if rows * cols <= most)
    return tuple((cols / rows, rows, cols) for _, cols, rows in found)


@spec
class Slices:
    """LLaVA-UHD, MiniCPM-V: slices of the picture's own shape, about `size`² pixels each; the overview first, when sliced.

    A picture of n times `size`² pixels (n rounded up, at most `max_tiles`) is cut into n - 1, n or n + 1 slices, by the grid
    whose columns / rows is nearest to its width / height, by logarithm; of two alike, by that of more rows. Sides of slices are
    multiples of `patch`, rounded to the nearest (MiniCPM-V, `get_sliced_grid` and `find_best_resize`) or down (LLaVA-UHD
    v1, `adapt_size` of `slice_logic.py`, where a slice has no more than `size`² pixels). A picture of one slice is enlarged or
    reduced to it and has no overview. `share` makes the pictures of a document divide `max_tiles`; the papers do not.

    Tiles are patches (3 * patch * patch): the overview's first, then each slice's, both row by row; inside a patch the channels
    come first.
    """

    kind: Literal["slices"] = "slices"
    size: int
    patch: int = 14
    max_tiles: int = 9
    rounding: Literal["round", "floor"] = "round"
    shared: bool = False

    def __post_init__(self) -> None:
        if self.size < self.patch or self.max_tiles < 1:
            raise ValueError(
                f"slices: size={self.size}, patch={self.patch}, max_tiles={self.max_tiles}; "
                "a slice holds at least one patch and a picture at least one slice"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return (3 * self.patch**2,)

    @property
    def join(self) -> Join:
        return "slices"

    def share(self, pictures: int) -> int | None:
        """`limit` for each of several pictures of one document, when they are to share."""
        return max(1, self.max_tiles // pictures) if self.shared and pictures > 1 else None

    def cut(self, height: int, width: int, single: bool = False, limit: int | None = None) -> Cut:
        most = 1 if single else self.max_tiles if limit is None else min(self.max_tiles, limit)
        rows, cols = self._grid(height, width, most)
        if rows * cols == 1:
            canvas, overview = self._fit(height, width, enlarge=True), None
        else:
            # MiniCPM-V first brings the picture to multiples of the grid, which may shift the rounding by one patch.
            high, wide = (max(round(side / n), 1) for side, n in ((height, rows), (width, cols)))
            slice_ = self._fit(high, wide, enlarge=True)
            canvas, overview = (rows * slice_[0], cols * slice_[1]), self._fit(height, width, enlarge=False)
        return Cut(height=height, width=width, rows=rows, cols=cols, canvas=canvas, overview=overview, patch=self.patch)

    def _grid(self, height: int, width: int, most: int) -> Size:
        n = min(math.ceil(width * height / self.size**2), most)
        if n <= 1:
            return 1, 1
        counts = [count for count in (n - 1, n, n + 1) if 1 < count <= most]
        grids = [(rows, count // rows) for count in counts for rows in range(1, count + 1) if count % rows == 0]
        aspect = math.log(width / height)
        return min(grids, key=lambda grid: (abs(aspect - math.log(grid[1] / grid[0])), -grid[0]))

    def _fit(self, height: int, width: int, enlarge: bool) -> Size:
        """Sides in multiples of the patch, the aspect kept: about `size`² pixels, or fewer when not to be enlarged."""
        patch = self.patch
        if self.rounding == "floor":
            scale = self.size / math.sqrt(height * width)
            return max(int(height * scale / patch), 1) * patch, max(int(width * scale / patch), 1) * patch
        if enlarge or height * width > self.size**2:
            aspect = width / height
            height = int(self.size / math.sqrt(aspect))
            width = int(height * aspect)
        return max(round(height / patch), 1) * patch, max(round(width / patch), 1) * patch

    def target(self, cut: Cut) -> Size:
        overview = cut.overview or (0, 0)
        return max(cut.canvas[0], overview[0]), max(cut.canvas[1], overview[1])

    def tile(self, pixels: Tensor, cut: Cut, out: Tensor | None = None) -> Tensor:
        out = _rows(cut, self.shape, out)
        first = 0
        if cut.overview is not None:
            first = cut.overview[0] * cut.overview[1] // self.patch**2
            _patches(pixels, cut.overview, 1, 1, self.patch, out[:first])
        _patches(pixels, cut.canvas, cut.rows, cut.cols, self.patch, out[first:])
        return out


@spec
class MultiScale:
    """S2 (arXiv:2403.13043), VILA-1.5: the picture squeezed to `size` times each scale, and cut there into tiles of `size`.

    Tiles come scale by scale, row by row. Their features are put together again, pooled to the first scale's grid and
    joined over channels, so that a picture has the tokens of one tile; every picture therefore needs all scales, frames too.
    """

    kind: Literal["multi_scale"] = "multi_scale"
    size: int
    scales: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        if not self.scales or list(self.scales) != sorted(set(self.scales)) or self.scales[0] < 1:
            raise ValueError(f"multi_scale: scales={self.scales}; give whole numbers that grow, such as (1, 2)")

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, self.size, self.size)

    @property
    def join(self) -> Join:
        return "scales"

    def share(self, pictures: int) -> int | None:  # noqa: ARG002 -- every picture needs all scales
        return None

    def cut(self, height: int, width: int, single: bool = False, limit: int | None = None) -> Cut:  # noqa: ARG002 -- as above
        most = self.scales[-1]
        side = most * self.size
        return Cut(height=height, width=width, rows=most, cols=most, canvas=(side, side), scales=self.scales)

    def target(self, cut: Cut) -> Size:
        return cut.canvas

    def tile(self, pixels: Tensor, cut: Cut, out: Tensor | None = None) -> Tensor:
        out = _rows(cut, self.shape, out)
        first = 0
        for scale in self.scales:
            side = scale * self.size
            _squash(pixels, (side, side), scale, scale, out[first : first + scale * scale])
            first += scale * scale
        return out


@spec
class Native:
    """Qwen2-VL: the picture at its own size, sides rounded to multiples of patch * merge, pixels kept between two bounds.

    (`smart_resize`, `qwen_vl_utils/vision_process.py`.) Tiles are patches (3 * patch * patch), row by row over the whole
    picture -- not in Qwen's order, where the patches of one merged square follow one another -- with channels first inside.
    Frames are cut as pictures are. `size` is the side that the encoder was made for, if it has one.
    """

    kind: Literal["native"] = "native"
    size: int
    patch: int = 14
    merge: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280

    def __post_init__(self) -> None:
        if self.min_pixels > self.max_pixels or self.max_pixels < self.factor**2:
            raise ValueError(
                f"native: min_pixels={self.min_pixels}, max_pixels={self.max_pixels} and squares of {self.factor} pixels; "
                f"max_pixels must be at least min_pixels and {self.factor**2}"
            )

    @property
    def factor(self) -> int:
        """Pixels of a side of the square of patches that becomes one token."""
        return self.patch * self.merge

    @property
    def shape(self) -> tuple[int, ...]:
        return (3 * self.patch**2,)

    @property
    def join(self) -> Join:
        return "patches"

    def share(self, pictures: int) -> int | None:  # noqa: ARG002 -- pixels are bounded, not tiles
        return None

    def cut(self, height: int, width: int, single: bool = False, limit: int | None = None) -> Cut:  # noqa: ARG002 -- as above
        canvas = self._canvas(height, width)
        return Cut(height=height, width=width, rows=1, cols=1, canvas=canvas, patch=self.patch)

    def _canvas(self, height: int, width: int) -> Size:
        factor = self.factor
        high, wide = round(height / factor) * factor, round(width / factor) * factor
        if high * wide > self.max_pixels:
            scale = math.sqrt(height * width / self.max_pixels)
            high = max(factor, int(height / scale / factor) * factor)
            wide = max(factor, int(width / scale / factor) * factor)
        elif high * wide < self.min_pixels:
            scale = math.sqrt(self.min_pixels / (height * width))
            high = math.ceil(height * scale / factor) * factor
            wide = math.ceil(width * scale / factor) * factor
        # A strip so thin that one side was raised to the factor would else exceed the bound that packs are planned by.
        longest = max(factor, self.max_pixels // min(high, wide) // factor * factor)
        return min(high, longest), min(wide, longest)

    def target(self, cut: Cut) -> Size:
        return cut.canvas

    def tile(self, pixels: Tensor, cut: Cut, out: Tensor | None = None) -> Tensor:
        out = _rows(cut, self.shape, out)
        _patches(pixels, cut.canvas, 1, 1, self.patch, out)
        return out


AnyTiling = Resize | Pad | AnyRes | DynamicTiles | Slices | MultiScale | Native | Objects
Tiling = Annotated[AnyTiling, Field(discriminator="kind")]
