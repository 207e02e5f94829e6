"""Frames of a video: chosen by a plain rule, decoded by their number."""

import builtins
import io
from collections.abc import Callable
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines import video
from pipelines.types import Frames
from tests.conftest import CORPUS

CLIP = (CORPUS / "video" / "bigbuckbunny.mp4").read_bytes()


def made(count: int = 12, rotation: int = 0, form: str = "mp4", width: int = 64) -> bytes:
    """A video whose n-th frame is grey of 20 n (mod 240), and whose left half is black."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as container:
        stream: Any = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, 48, "yuv420p"
        stream.codec_context.gop_size = 5
        if rotation:
            stream.set_display_rotation(rotation)
        for n in range(count):
            array = np.full((48, width, 3), 20 * n % 240, np.uint8)
            array[:, : width // 2] = 0
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def level(frame: Any) -> int:
    return round(float(frame[:, 24, 48].float().mean()) / 20)


@pytest.mark.parametrize(
    ("frames", "fps", "rule", "numbers"),
    [
        (132, 25.0, Frames(count=4), (0, 43, 87, 131)),
        (3, 25.0, Frames(count=8), (0, 1, 2)),
        (9, None, Frames(count=1), (4,)),
        (100, 25.0, Frames(count=8, fps=2), (0, 14, 28, 42, 56, 70, 84, 99)),
        (100, 25.0, Frames(count=9, fps=2), (0, 12, 24, 36, 48, 60, 72, 84, 96)),
        (10, 5.0, Frames(count=99, fps=30), tuple(range(10))),
        (10, None, Frames(count=2, fps=1), (0, 9)),
    ],
)
def test_frames_are_chosen_evenly(frames: int, fps: float | None, rule: Frames, numbers: tuple[int, ...]) -> None:
    assert video.chosen(frames, fps, rule) == numbers


@given(st.integers(1, 5000), st.none() | st.floats(0.1, 240), st.integers(1, 64), st.none() | st.floats(0.1, 60))
def test_chosen_frames_exist_ascend_and_are_few(frames: int, fps: float | None, count: int, rate: float | None) -> None:
    numbers = video.chosen(frames, fps, Frames(count=count, fps=rate))
    assert 1 <= len(numbers) <= count
    assert list(numbers) == sorted(set(numbers))
    assert numbers[0] >= 0
    assert numbers[-1] < frames


def test_a_video_without_frames_has_none_to_choose() -> None:
    with pytest.raises(ValueError, match="at least one"):
        video.chosen(0, 25.0, Frames())


def test_a_real_clip() -> None:
    assert video.probe(CLIP) == (132, 25.0, 720, 1280)
    first, last, again = video.decode(CLIP, [0, 131, 0])
    assert first.shape == (3, 720, 1280)
    assert first.equal(again)
    assert not first.equal(last)


def test_frames_come_by_number_in_the_order_asked() -> None:
    data = made()
    assert video.probe(data) == (12, 10.0, 48, 64)
    assert [level(frame) for frame in video.decode(data, [7, 2, 2, 11, 0])] == [7, 2, 2, 11, 0]


@pytest.mark.parametrize("form", ["mp4", "avi", "matroska", "mpegts"])
def test_groups_without_a_wanted_frame_change_nothing(form: str) -> None:
    data = made(count=40, form=form)
    every = video.decode(data, range(40))
    for numbers in ([17], [3, 38], [39], [5, 9, 10]):
        assert all(a.equal(every[n]) for a, n in zip(video.decode(data, numbers), numbers, strict=True))


@pytest.mark.parametrize("form", ["avi", "matroska", "mpegts"])
def test_other_containers(form: str) -> None:
    data = made(form=form)
    assert video.probe(data)[0] == 12
    assert [level(frame) for frame in video.decode(data, [3, 9])] == [3, 9]


@pytest.mark.parametrize(("rotation", "size"), [(90, (64, 48)), (180, (48, 64)), (270, (64, 48))])
def test_a_clip_filmed_sideways_is_turned(rotation: int, size: tuple[int, int]) -> None:
    data = made(rotation=rotation)
    assert video.probe(data)[2:] == size
    (frame,) = video.decode(data, [10])
    assert tuple(frame.shape[1:]) == size
    dark = {90: frame[:, -10:], 180: frame[:, :, -10:], 270: frame[:, :10]}[rotation]
    assert dark.float().mean() < 40


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", b"ffconcat version 1.0\nfile /etc/hostname\n"],
)
@pytest.mark.parametrize("read", [video.probe, lambda data: video.decode(data, [0])])
def test_what_is_no_video_is_refused(data: bytes, read: Callable[[bytes], object]) -> None:
    with pytest.raises(video.NotAVideo):
        read(data)


def test_a_clip_cut_short_is_used_up_to_its_end() -> None:
    data = made(form="mpegts", count=40)
    short = data[: len(data) // 2]
    count = video.probe(short)[0]
    assert 10 < count < 30
    (last,) = video.decode(short, [count - 1])
    assert video.decode(short, [count])[0].equal(last)
    with pytest.raises(video.TruncatedVideo, match="frame 39"):
        video.decode(short, [0, 39])


def test_without_pyav_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name == "av":
            raise ModuleNotFoundError("No module named 'av'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ModuleNotFoundError, match=r"mllm\[video\]"):
        video.probe(CLIP)
