"""Videos: which frames are shown, and their pixels. Frames are known by their number in the order of showing, from 0.

Files are read by PyAV, an optional package (`pip install 'mllm[video]'`), imported when the first video comes.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ops.images import LEAST_DECODED, MAX_PIXELS
from pipelines.types import Frames

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame

MAX_FRAMES = 1_000_000
"""Longer videos are refused: a corpus of films belongs cut into clips."""

FORMATS = "mov,mp4,m4a,3gp,avi,matroska,webm,mpeg,mpegts,flv,asf,ogg,gif,m4v"
"""Containers that may be opened. FFmpeg's playlists are not among them: they name other files, and addresses."""


class NotAVideo(ValueError):
    """The bytes are in no known video format, or hold no picture."""


class TruncatedVideo(ValueError):
    """The file ends, or cannot be decoded further, well before the frame that is wanted."""


class HugeVideo(ValueError):
    """More than `MAX_FRAMES` frames, or more than `MAX_PIXELS` pixels in one."""


def chosen(frames: int, fps: float | None, rule: Frames) -> tuple[int, ...]:
    """Numbers of the frames that `rule` shows of a video of `frames` frames at `fps`, ascending, no frame twice.

    By count: from the first frame to the last at equal steps, rounded down (`np.linspace(0, frames - 1, count, dtype=int)`,
    LLaVA-NeXT `llava/train/train.py`); the middle frame when one is asked for, every frame when there are too few. By fps:
    every round(fps / rule.fps)-th, unless those are more than `count` or the video's own rate is unknown.
    Raises ValueError when there is no frame.
    """
    if frames < 1 or rule.count < 1:
        raise ValueError(f"{rule.count} of {frames} frames; a video shows at least one")
    if rule.fps is not None and fps:
        numbers = range(0, frames, max(1, round(fps / rule.fps)))
        if len(numbers) <= rule.count:
            return tuple(numbers)
    count = min(rule.count, frames)
    if count == 1:
        return (frames // 2,)
    return tuple(i * (frames - 1) // (count - 1) for i in range(count))


def probe(data: bytes) -> tuple[int, float | None, int, int]:
    """Frames, frames a second (None when not told), height and width as shown.

    Frames are counted by walking through the packets, since headers are often wrong, and the size is that of the first frame,
    the only one decoded. Raises NotAVideo or HugeVideo; ModuleNotFoundError when PyAV is missing.
    """
    av = _library()
    with _open(av, data) as container:
        stream = container.streams.video[0]
        frames = 0
        try:
            for packet in container.demux(stream):
                frames += packet.size > 0 and not packet.is_discard
                if frames > MAX_FRAMES:
                    raise HugeVideo(f"more than {MAX_FRAMES} frames; cut it into clips")
        except (av.FFmpegError, IndexError):
            pass  # cut short: the frames so far may do
        fps = float(stream.average_rate) if stream.average_rate else None
    first = next(_decoded(av, data), None)
    if first is None or frames == 0:
        raise NotAVideo("no frame can be decoded")
    height, width = _shown(first)
    return frames, fps, height, width


def frames(data: bytes, numbers: Sequence[int]) -> Iterator[Tensor]:
    """Frames `numbers`, in that order, as uint8 (3, h, w): decoded in one pass, held no longer than needed.

    Where every group of frames starts with a key frame and needs none outside, groups without a wanted frame are passed over.
    Numbers count the frames that the decoder gives, whatever the container's time stamps say. The last frame stands in for a
    later one when at least `LEAST_DECODED` of the frames up to that one came: counts of packets may be off by a few.
    Raises NotAVideo, TruncatedVideo or HugeVideo; ModuleNotFoundError when PyAV is missing.
    """
    av = _library()
    awaited = Counter(numbers)
    held: dict[int, Tensor] = {}
    due = 0  # place in `numbers` of the frame to be given next
    latest, count = None, 0
    last = max(numbers, default=-1)
    for number, frame in _of_groups(av, data, set(numbers)) or enumerate(_decoded(av, data)):
        if number > last:
            break
        latest, count = frame, number + 1
        if number in awaited:
            held[number] = _pixels(frame)
        while due < len(numbers) and numbers[due] in held:
            yield _taken(held, awaited, numbers[due])
            due += 1
    for number in numbers[due:]:
        if number not in held:
            if latest is None:
                raise NotAVideo("no frame can be decoded")
            if count < LEAST_DECODED * (number + 1):
                raise TruncatedVideo(f"frame {number} is wanted and the file ends after {count}")
            held[number] = _pixels(latest)
        yield _taken(held, awaited, number)


def decode(data: bytes, numbers: Sequence[int]) -> list[Tensor]:
    """`frames` as a list."""
    return list(frames(data, numbers))


def _taken(held: dict[int, Tensor], awaited: Counter[int], number: int) -> Tensor:
    awaited[number] -= 1
    return held[number] if awaited[number] else held.pop(number)


def _library() -> Any:
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "videos are read by PyAV, which is not installed; pip install 'mllm[video]', or leave videos out of the mixture"
        ) from error
    return av


def _open(av: Any, data: bytes) -> InputContainer:
    """The container, with at least one video stream. Raises NotAVideo or HugeVideo."""
    try:
        container = av.open(io.BytesIO(data), options={"format_whitelist": FORMATS, "protocol_whitelist": ""})
    except (av.FFmpegError, ValueError, OSError) as error:
        raise NotAVideo(f"first bytes are {data[:8]!r}") from error
    if not container.streams.video:
        container.close()
        raise NotAVideo("the file has no video stream")
    stream = container.streams.video[0]
    width, height = getattr(stream, "width", 0) or 0, getattr(stream, "height", 0) or 0  # none without a known codec
    if width * height > MAX_PIXELS:
        container.close()
        raise HugeVideo(f"{width} x {height}")
    return container


def _decoded(av: Any, data: bytes) -> Iterator[VideoFrame]:
    """Frames in the order of showing, up to the end or to the first that cannot be decoded."""
    with _open(av, data) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"  # one actor, one core
        try:
            yield from container.decode(stream)
        except (av.FFmpegError, IndexError):
            return


def _of_groups(av: Any, data: bytes, wanted: set[int]) -> Iterator[tuple[int, VideoFrame]] | None:
    """Numbered frames of the groups that hold a wanted one; None unless the time stamps show that each group is closed."""
    with _open(av, data) as container:
        try:
            packets = [p for p in container.demux(container.streams.video[0]) if p.size]
        except (av.FFmpegError, IndexError):
            return None
        stamps = [(p.pts, p.is_keyframe) for p in packets if not (p.is_discard or p.is_corrupt)]
    shown = sorted(pts for pts, _ in stamps if pts is not None)
    if len(shown) != len(packets) or len(set(shown)) != len(shown) or max(wanted, default=0) >= len(shown):
        return None
    starts = [at for at, (_, key) in enumerate(stamps) if key]
    groups = list(pairwise([*starts, len(stamps)]))
    if starts[:1] != [0]:
        return None
    for start, stop in groups:
        # A key frame shown after others of its group would mean that those lean on the group before.
        if sorted(pts for pts, _ in stamps[start:stop] if pts is not None) != shown[start:stop]:
            return None
        if stamps[start][0] != shown[start]:
            return None
    needed = [(start, stop) for start, stop in groups if any(number in wanted for number in range(start, stop))]
    if len(needed) == len(groups):
        return None
    return _decoded_groups(av, data, needed, {pts: number for number, pts in enumerate(shown)})


def _decoded_groups(
    av: Any, data: bytes, groups: list[tuple[int, int]], numbers: dict[int | None, int]
) -> Iterator[tuple[int, VideoFrame]]:
    """Frames of `groups` (ranges of packets, ascending), numbered by their time stamps; up to the first that fails."""
    with _open(av, data) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        packets = (packet for packet in container.demux(stream) if packet.size)
        at = 0
        try:
            for start, stop in groups:
                group = list(islice(packets, start - at, stop - at))
                at = stop
                for packet in (*group, None):  # None: hand out what is still held back
                    for frame in stream.codec_context.decode(packet):
                        yield numbers[frame.pts], frame
                stream.codec_context.flush_buffers()
        except (av.FFmpegError, IndexError, KeyError):
            return


def _quarters(frame: VideoFrame) -> int:
    """Quarter turns, anticlockwise, that the file asks for: telephones film sideways."""
    return round(frame.rotation / 90) % 4


def _shown(frame: VideoFrame) -> tuple[int, int]:
    return (frame.width, frame.height) if _quarters(frame) % 2 else (frame.height, frame.width)


def _pixels(frame: VideoFrame) -> Tensor:
    array = frame.to_ndarray(format="rgb24")
    return torch.rot90(torch.from_numpy(array).permute(2, 0, 1), _quarters(frame), (1, 2))
