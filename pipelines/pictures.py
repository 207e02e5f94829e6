"""Pictures of documents: measured from their headers when a window is planned, decoded and cut when their pack is due."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ops import images
from pipelines import video
from pipelines.objects import Objects
from pipelines.tiling import AnyTiling, Size
from pipelines.types import (
    Codes,
    Cut,
    Document,
    Image,
    Limits,
    Measured,
    Picture,
    Reason,
    SkipSample,
    Text,
    Video,
)

BAD_IMAGE = (images.NotAnImage, images.TruncatedImage, images.HugeImage)
BAD_VIDEO = (video.NotAVideo, video.TruncatedVideo, video.HugeVideo)


def measure(document: Document, tiling: AnyTiling, limits: Limits | None = None) -> Measured:
    """Read the headers of the document's pictures, choose the frames of its videos, and plan how each is cut.

    Images of one document share the tiles that `tiling.share` gives them; frames are single. Raises SkipSample when a
    picture cannot be used: no image or video, a header cut short, or beyond `limits`.
    """
    limits = limits or Limits()
    limit = tiling.share(max(1, sum(isinstance(segment, Image) for segment in document.segments)))
    segments: list[Text | Picture | Codes] = []
    for segment in document.segments:
        if isinstance(segment, (Text, Codes)):
            segments.append(segment)
        elif isinstance(tiling, Objects):
            segments.append(_regions(segment, tiling))
        elif isinstance(segment, Image):
            cut = tiling.cut(*_size(segment.data, limits), limit=limit)
            segments.append(Picture(of=segment, cut=cut, role=segment.role))
        else:
            segments += _frames(segment, tiling, limits)
    return Measured(
        id=document.id,
        source=document.source,
        segments=tuple(segments),
        rejected=document.rejected,
        label=document.label,
        regions=document.regions,
    )


def _regions(segment: Image | Video, tiling: Objects) -> Picture:
    if isinstance(segment, Video):
        raise SkipSample(Reason.MISSING_FIELD, "a video has no regions; take a tiling of pixels")
    return Picture(of=segment, cut=tiling.found(segment.objects), role=segment.role)


def _size(data: bytes, limits: Limits) -> Size:
    if len(data) > limits.bytes:
        raise SkipSample(Reason.HUGE_FILE, f"{len(data)} bytes; a file may have {limits.bytes}")
    try:
        size = images.header(data)
    except BAD_IMAGE as error:
        raise _skip(error) from error
    return _within(size, limits)


def _within(size: Size, limits: Limits) -> Size:
    height, width = size
    if height * width > limits.pixels:
        raise SkipSample(Reason.HUGE_IMAGE, f"{width} x {height}; a picture may have {limits.pixels} pixels")
    if max(size) > limits.ratio * min(size):
        raise SkipSample(Reason.EXTREME_RATIO, f"{width} x {height}; sides may differ by a factor of {limits.ratio:g}")
    return size


def _skip(error: Exception) -> SkipSample:
    """The reason for which the row of a picture or video that raised `error` is dropped."""
    reasons = {
        images.TruncatedImage: Reason.TRUNCATED_IMAGE,
        images.HugeImage: Reason.HUGE_IMAGE,
        video.NotAVideo: Reason.NOT_A_VIDEO,
        video.TruncatedVideo: Reason.TRUNCATED_VIDEO,
        video.HugeVideo: Reason.HUGE_IMAGE,
    }
    return SkipSample(reasons.get(type(error), Reason.NOT_AN_IMAGE), str(error))


def _frames(segment: Video, tiling: AnyTiling, limits: Limits) -> Iterator[Picture]:
    if isinstance(segment.data, tuple):
        for number in video.chosen(len(segment.data), None, segment.frames):
            cut = tiling.cut(*_size(segment.data[number], limits), single=True)
            yield Picture(of=segment, cut=cut, frame=number, role=segment.role)
        return
    if len(segment.data) > limits.bytes:
        raise SkipSample(Reason.HUGE_FILE, f"{len(segment.data)} bytes; a file may have {limits.bytes}")
    try:
        frames, fps, height, width = video.probe(segment.data)
    except BAD_VIDEO as error:
        raise _skip(error) from error
    cut = tiling.cut(*_within((height, width), limits), single=True)
    for number in video.chosen(frames, fps, segment.frames):
        yield Picture(of=segment, cut=cut, frame=number, role=segment.role)


def pixels(pictures: Sequence[Picture], tiling: AnyTiling, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """Decode and cut `pictures` in order: uint8 (sum of cut.tiles, *tiling.shape), into `out` when given.

    Neighbouring frames of one `Video` are decoded in one pass. Raises SkipSample when a body cannot be decoded or its size
    is not the one its header told; `out` is then half written. Raises ValueError when `out` has another shape.
    """
    shape = (sum(picture.cut.tiles for picture in pictures), *tiling.shape)
    if out is None:
        out = np.empty(shape, np.uint8)
    if out.shape != shape or not out.flags.c_contiguous:
        raise ValueError(f"out is {out.shape} and the tiles are {shape}; give a C-contiguous array of that shape")
    first = 0
    if isinstance(tiling, Objects):
        for picture in pictures:
            found = picture.of.objects if isinstance(picture.of, Image) else None
            tiling.rows(found, picture.cut, out[first : first + picture.cut.tiles])
            first += picture.cut.tiles
        return out
    rows = torch.from_numpy(out)
    for _, run in groupby(pictures, key=lambda picture: id(picture.of)):
        run = list(run)
        bodies = _decoded(run, tiling)
        for picture in run:
            decoded = next(bodies)
            _agree(picture.cut, decoded)
            tiling.tile(decoded, picture.cut, rows[first : first + picture.cut.tiles])
            first += picture.cut.tiles
            del decoded  # so that the next is decoded into memory that the core's cache still holds
    return out


def _decoded(run: list[Picture], tiling: AnyTiling) -> Iterator[Tensor]:
    """Pixels (3, h, w) of pictures that come of the same image or video."""
    of = run[0].of
    try:
        if isinstance(of, Video) and isinstance(of.data, bytes):
            yield from video.frames(of.data, [picture.frame or 0 for picture in run])
            return
        for picture in run:
            data = of.data[picture.frame or 0] if isinstance(of.data, tuple) else of.data
            yield images.decode(data, tiling.target(picture.cut))
    except (*BAD_IMAGE, *BAD_VIDEO) as error:
        raise _skip(error) from error


def _agree(cut: Cut, decoded: Tensor) -> None:
    """A body that is not of the size its header told is damaged, and would be cut by a wrong plan."""
    size = tuple(decoded.shape[1:])
    if size not in ((cut.height, cut.width), (-(-cut.height // 2), -(-cut.width // 2))):
        raise SkipSample(
            Reason.TRUNCATED_IMAGE, f"header says {cut.width} x {cut.height}, body is {size[1]} x {size[0]}"
        )


def decode(image: Image, target: Size | None = None) -> torch.Tensor:
    """`ops.images.decode`, its errors turned into the reason for which the row is dropped. uint8 (3, h, w)."""
    try:
        return images.decode(image.data, target)
    except BAD_IMAGE as error:
        raise _skip(error) from error
