"""Pictures: bytes -> uint8 tensors -> the model's floats. CPU; uint8 (3, H, W) throughout.

Resizing is torch's antialiased bicubic on uint8: 2.4 x Pillow's speed and 70 dB from its result.
"""

from __future__ import annotations

import ctypes
import io
import math
import struct
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image as PILImage
from torch import Tensor

MAX_PIXELS = 100_000_000
"""A picture above this many pixels is refused before it is decoded: web corpora hold decompression bombs."""

LEAST_DECODED = 0.9
"""Share of a damaged JPEG's rows that must have been read for it to be used; below, it counts as truncated."""

FORMATS = ("PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM", "ICO")
"""What Pillow may open beside JPEG. Its other formats have no place on web pages, and some start other programs."""

ORIENTATION = 0x0112  # the tag in EXIF

PILImage.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow's own guard acts before our count, and must not be the narrower one


class NotAnImage(ValueError):
    """The bytes are in no known image format."""


class TruncatedImage(ValueError):
    """The image's header is sound and its body is not."""


class HugeImage(ValueError):
    """More than `MAX_PIXELS` pixels."""


def settle() -> None:
    """Make this process one of many: one core, and memory that is kept.

    Torch's own threads would fight with the trainers for the other cores. The C library gives a picture's memory back to the
    system after each use and faults it in again for the next; told to keep it, decoding is a few per cent faster.
    """
    torch.set_num_threads(1)
    with suppress(OSError, AttributeError):  # other C libraries have no such call
        allocator = ctypes.CDLL(None).mallopt
        allocator(M_TRIM_THRESHOLD, 2**28)
        allocator(M_MMAP_THRESHOLD, 2**25)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's names for how much free memory is kept, and from what size on a block is the system's own (mallopt(3))."""


def header(data: bytes) -> tuple[int, int]:
    """Height and width of the picture as a person sees it, EXIF orientation applied, read without decoding.

    `decode` gives a picture of this very size (or half of it, on request). Raises NotAnImage, TruncatedImage or HugeImage.
    """
    if data[:2] == b"\xff\xd8":
        height, width, _ = _jpeg_header(data)
        return (width, height) if _jpeg_orientation(data) >= 5 else (height, width)
    picture = _open(data)
    return (picture.width, picture.height) if _orientation(picture) >= 5 else (picture.height, picture.width)


def decode(data: bytes, target: tuple[int, int] | None = None) -> UInt8[Tensor, "3 height width"]:
    """Decode an image to RGB as a person would see it.

    EXIF orientation is applied, transparency laid on white, 16 bits scaled to 8, and of an animation the first frame shown.
    Colour profiles (ICC) are ignored: numbers are taken for sRGB, as in the corpora that published models saw.

    `target` is the least (height, width) that the picture will be resized to: a JPEG both of whose sides are at least four
    times that is decoded at half size by its DCT, so that both stay at least twice the target (71 dB from the full decode).

    JPEG goes through simplejpeg, strictly at first. Where that fails, a file that lacks nothing but its end mark is whole, and
    one with damage inside is used as libjpeg mends it if at least `LEAST_DECODED` of its rows were read; a file of
    several scans (progressive) must also have its end, since its rows all look read after the first. Everything else goes
    through Pillow, which is strict. The same bytes give the same pixels every time.

    The strides are the decoder's: channels last, perhaps transposed, which `resize` reads without a copy.
    Raises NotAnImage, TruncatedImage or HugeImage.
    """
    return _decode_jpeg(data, target) if data[:2] == b"\xff\xd8" else _decode_with_pillow(data)


def _jpeg_header(data: bytes) -> tuple[int, int, str]:
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError) as error:  # KeyError: it found no colours
        raise TruncatedImage(f"no sound JPEG header: {error}") from error
    height, width = int(height), int(width)
    if height * width > MAX_PIXELS:
        raise HugeImage(f"{width} x {height}")
    return height, width, str(colour)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and stop of each segment's content, up to the first scan of the picture itself."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        stop = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        yield marker, at + 4, stop
        if marker == 0xDA or stop < at + 4:
            return
        at = stop


def _jpeg_orientation(data: bytes) -> int:
    """EXIF orientation 1 to 8; 1 where there is none."""
    for marker, start, stop in _jpeg_segments(data):
        if marker == 0xE1 and data[start : start + 6] == b"Exif\0\0":
            return _exif_orientation(data[start + 6 : stop])
    return 1


def _exif_orientation(tiff: bytes) -> int:
    """The orientation in a block of EXIF, which is a small TIFF file; 1 where it is missing or makes no sense."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * min(entries, 256), 12):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, entry)
            if tag == ORIENTATION:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _turned(pixels: Tensor, orientation: int) -> Tensor:
    """Apply an EXIF orientation to (3, h, w): flips first, then for 5 to 8 a transposition, which copies nothing."""
    flips = {2: (2,), 3: (1, 2), 4: (1,), 6: (1,), 7: (1, 2), 8: (2,)}.get(orientation)
    if flips:
        pixels = pixels.flip(flips)
    return pixels.mT if orientation >= 5 else pixels


def _decode_jpeg(data: bytes, target: tuple[int, int] | None) -> Tensor:
    height, width, colour = _jpeg_header(data)
    orientation = _jpeg_orientation(data)
    least = (0, 0)
    if target is not None:
        high, wide = target[::-1] if orientation >= 5 else target
        if height >= 4 * high and width >= 4 * wide:
            least = (height // 2, width // 2)
    if colour in ("CMYK", "YCCK"):
        array = _from_inverted_cmyk(_jpeg_array(data, "CMYK", least))
    else:
        array = _jpeg_array(data, "RGB", least)
    return _turned(torch.from_numpy(array).permute(2, 0, 1), orientation)


def _jpeg_array(data: bytes, colours: str, least: tuple[int, int]) -> NDArray[np.uint8]:
    """uint8 (h, w, channels), strictly or else as `decode` says. Raises TruncatedImage."""
    decode = partial(simplejpeg.decode_jpeg, colorspace=colours, min_height=least[0], min_width=least[1])
    with suppress(ValueError):
        return decode(data)
    with suppress(ValueError):
        return decode(data + b"\xff\xd9")
    # Rows that libjpeg gives up on are not written at all: they must not show what the memory held before.
    height, width, _ = _jpeg_header(data)
    room = np.full(height * width * len(colours), 128, np.uint8)
    try:
        shape = decode(data, strict=False, buffer=room).shape
    except ValueError as error:
        raise TruncatedImage(str(error)) from error
    array = room[: math.prod(shape)].reshape(shape)
    # What was never read is left mid-grey, from some row to the bottom.
    read = np.flatnonzero((array - np.uint8(127) > 1).any(axis=(1, 2)))
    rows = int(read[-1]) + 1 if len(read) else 0
    if rows < LEAST_DECODED * len(array) or _lacks_scans(data):
        raise TruncatedImage(f"{rows} of {len(array)} rows could be read")
    return array


def _lacks_scans(data: bytes) -> bool:
    """Whether a JPEG of several scans ends before its end mark."""
    segments = list(_jpeg_segments(data))
    first, last = segments[-1][1], data.rfind(b"\xff\xda")
    several = last >= first or any(marker in (0xC2, 0xC6, 0xCA, 0xCE) for marker, _, _ in segments)
    return several and data.find(b"\xff\xd9", max(first, last)) < 0


def _from_inverted_cmyk(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(h, w, 4) -> RGB (h, w, 3). JPEG files hold ink inverted, 255 for none, as Adobe began and all programs read."""
    ink = array.astype(np.uint16)
    return ((ink[..., :3] * ink[..., 3:] + 127) // 255).astype(np.uint8)


def _open(data: bytes) -> PILImage.Image:
    """Pillow's picture, its header read. Raises NotAnImage, TruncatedImage or HugeImage."""
    try:
        picture = PILImage.open(io.BytesIO(data), formats=FORMATS)
        if getattr(picture, "default_image", False):
            picture.seek(1)  # a PNG animation may hold a still for programs that cannot play it; the rest show frame 1
    except (PILImage.DecompressionBombError, PILImage.DecompressionBombWarning) as error:
        raise HugeImage(str(error)) from error
    except PILImage.UnidentifiedImageError as error:
        raise NotAnImage(f"first bytes are {data[:8]!r}") from error
    except OSError as error:
        raise TruncatedImage(str(error)) from error
    except Exception as error:  # Pillow's readers let through whatever hostile bytes make Python raise
        raise NotAnImage(f"first bytes are {data[:8]!r}: {error}") from error
    if picture.width * picture.height > MAX_PIXELS:
        raise HugeImage(f"{picture.width} x {picture.height}")
    if picture.width * picture.height == 0:
        raise NotAnImage(f"{picture.width} x {picture.height} pixels")
    return picture


def _orientation(picture: PILImage.Image) -> int:
    """EXIF orientation as known from what precedes the pixels, so that `header` and `decode` agree."""
    exif = picture.info.get("exif", b"")
    if picture.format == "TIFF" or not isinstance(exif, bytes):
        return 1  # Pillow itself turns a TIFF, and tells its size turned
    return _exif_orientation(exif.removeprefix(b"Exif\0\0"))


def _decode_with_pillow(data: bytes) -> UInt8[Tensor, "3 height width"]:
    picture = _open(data)
    orientation = _orientation(picture)
    try:
        picture.load()
        array = _rgb(picture)
    except Exception as error:  # as in `_open`
        raise TruncatedImage(str(error)) from error
    return _turned(torch.from_numpy(array).permute(2, 0, 1), orientation)


def _rgb(picture: PILImage.Image) -> NDArray[np.uint8]:
    """uint8 (h, w, 3) of a loaded picture of any mode, transparency on white."""
    if picture.mode.startswith("I") or picture.mode == "F":
        grey = _eight_bits(np.asarray(picture))
        clear = picture.info.get("transparency")
        if isinstance(clear, int):
            grey = np.where(np.asarray(picture) == clear, np.uint8(255), grey)
        return np.repeat(grey[..., None], 3, axis=2)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = PILImage.alpha_composite(PILImage.new("RGBA", picture.size, "white"), picture)
    return np.array(picture.convert("RGB"))


def _eight_bits(values: NDArray) -> NDArray[np.uint8]:
    """Grey of 16 bits, 65535 becoming 255; floats and wider integers are spread from their least to their greatest."""
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        values = np.nan_to_num(values.astype(np.float64))
        low, high = values.min(), values.max()
        return np.round((values - low) * (255 / (high - low if high > low else 1))).astype(np.uint8)
    return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def resize(pixels: UInt8[Tensor, "3 h w"], height: int, width: int) -> UInt8[Tensor, "3 height width"]:
    """Antialiased bicubic resize, ignoring the aspect ratio. Of unchanged size, `pixels` themselves are returned."""
    if pixels.shape[1:] == (height, width):
        return pixels
    if 1 < pixels.stride(1) < pixels.stride(2):  # a transposed picture: cheaper to transpose the small one
        return resize(pixels.mT, width, height).mT
    # Channels last is the layout of torch's fast uint8 kernel, and what decoders give. (Its `out=` variant would spare a small
    # copy, and writes wrong pixels into strided views when only one side changes.)
    batch = pixels.unsqueeze(0).contiguous(memory_format=torch.channels_last)
    return F.interpolate(batch, (height, width), mode="bicubic", antialias=True)[0]


def letterbox(
    pixels: UInt8[Tensor, "3 h w"],
    size: tuple[int, int],
    fill: tuple[int, int, int],
    out: UInt8[Tensor, "3 height width"],
) -> UInt8[Tensor, "3 height width"]:
    """Resize to `size` (height, width) and lay the picture in the middle of `out`, whose margins get the colour `fill`."""
    height, width = size
    top, left = (out.shape[1] - height) // 2, (out.shape[2] - width) // 2
    colour = torch.tensor(fill, dtype=torch.uint8).view(3, 1, 1)
    beside = out[:, top : top + height]
    for margin in (out[:, :top], out[:, top + height :], beside[:, :, :left], beside[:, :, left + width :]):
        if margin.numel():
            margin.copy_(colour)
    out[:, top : top + height, left : left + width] = resize(pixels, height, width)
    return out


def grid(pixels: UInt8[Tensor, "3 H W"], rows: int, cols: int) -> UInt8[Tensor, "rows cols 3 h w"]:
    """Cut into `rows` x `cols` equal tiles, without a copy."""
    return pixels.unflatten(2, (cols, -1)).unflatten(1, (rows, -1)).permute(1, 3, 0, 2, 4)


def patchify(tiles: UInt8[Tensor, "... 3 H W"], patch: int) -> UInt8[Tensor, "... h w 3 patch patch"]:
    """Cut each tile into patches of `patch` x `patch` pixels, channels first inside, without a copy."""
    cut = tiles.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))  # ... 3 h patch w patch
    last = cut.dim() - 5
    return cut.permute(*range(last), last + 1, last + 3, last, last + 2, last + 4)


def normalize(
    tiles: UInt8[Tensor, "N 3 H W"], mean: Float[Tensor, 3], std: Float[Tensor, 3]
) -> Float[Tensor, "N 3 H W"]:
    """Bytes in [0, 255] to `(x / 255 - mean) / std`, on the tiles' own device: they travel as bytes."""
    return (tiles.to(mean.dtype) / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
