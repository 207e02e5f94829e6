"""What formats share: texts and pictures as rows have them. All raise SkipSample for a row that has them not."""

from __future__ import annotations

import base64
import binascii

from pipelines.reading import IMAGE_SUFFIXES, Awaited, File, below, json_object, string, utf8
from pipelines.rows import Row
from pipelines.tars import Files
from pipelines.types import Frames, Image, Reason, Role, SkipSample

SLOT = "<image>"
VIDEO_SLOT = "<video>"
VIDEO_SUFFIXES = ("mp4", "avi", "webm", "mkv", "mov")


def picture_of(files: Files) -> bytes:
    image = next((files[ending] for ending in IMAGE_SUFFIXES if ending in files), None)
    if image is None:
        raise SkipSample(Reason.MISSING_IMAGE, f"the row holds {sorted(files)}")
    return image


def image_of(files: Files) -> Image:
    """The picture, or what a detector found in it, or both."""
    objects = files.get("npz")
    return Image(
        data=b"" if objects is not None and not set(files) & set(IMAGE_SUFFIXES) else picture_of(files), objects=objects
    )


def caption_of(files: Files) -> str:
    if "txt" in files:
        return some_text(utf8(files["txt"]))
    if "json" in files:
        return some_text(first_of(json_object(files["json"]), "caption", "text"))
    raise SkipSample(Reason.MISSING_FIELD, "neither .txt nor .json holds a caption")


def first_of(row: Row, *fields: str) -> str:
    """The first of these fields that the row has."""
    return string(row, next((field for field in fields if row.get(field) is not None), fields[0]))


def some_text(text: str, strip: bool = True) -> str:
    """Text that is not blank."""
    if not text.strip():
        raise SkipSample(Reason.EMPTY)
    return web_text(text.strip() if strip else text)


def names_of(value: object) -> list[str]:
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise SkipSample(Reason.MISSING_FIELD, f"image or video is {str(value)[:80]}; expected one path or several")
    return [str(name) for name in names]


def awaited(folder: str, name: str, role: Role | None = None, frames: Frames | None = None) -> Awaited:
    return Awaited(file=File(uri=below(folder, name)), name=name, role=role, frames=frames)


def decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text.rpartition(",")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise SkipSample(Reason.NOT_AN_IMAGE, f"image_base64: {error}") from error


def web_text(text: str) -> str:
    """Text from the web, refused when it spells the slot that an image would fill in other loaders."""
    if SLOT in text:
        raise SkipSample(Reason.LITERAL_IMAGE, text[max(0, text.index(SLOT) - 20) :][:60])
    return text
