"""What formats share: drafts of rows, the files that they name, and what is safe to read.

    documents    all files that a chunk's drafts name, at once -> documents and rejections

A format turns one row into a `Draft` and leaves all storage to this module, so that a chunk costs one request for its rows
(`rows.py`, `tars.py`) and one round of concurrent requests for everything they refer to.
"""

from __future__ import annotations

import errno
import glob
import json
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any, TypeVar

from pipelines import storage
from pipelines.manifest import Shard
from pipelines.types import (
    Chunk,
    Document,
    Frames,
    Image,
    Limits,
    Reason,
    Region,
    Rejected,
    Role,
    RowId,
    SkipSample,
    Text,
    Video,
    spec,
)

Opener = Callable[[str], IO[bytes]]
"""Opens a file to be read forward; a caller may hash what passes through it."""

Read = Iterator[Document | Rejected]
R = TypeVar("R")

LIMITS = Limits()
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


# --- drafts -----------------------------------------------------------------------------------------------------------


@spec
class File:
    """Bytes `[start, stop)` of a file, by default all of them."""

    uri: str
    start: int = 0
    stop: int | None = None


@spec
class Awaited:
    """Stands in a draft where an image goes, or with `frames` a video, until its bytes are fetched. `name` is for messages."""

    file: File
    name: str
    role: Role | None = None
    frames: Frames | None = None


Segment = Text | Image | Video | Awaited


@spec
class Draft:
    """A row, parsed: a document whose segments may still be awaited."""

    segments: tuple[Segment, ...]
    rejected: tuple[Text, ...] = ()
    label: int | None = None
    regions: tuple[Region, ...] = ()


def documents(
    corpus: str, shard: Shard, chunk: Chunk, limits: Limits, rows: Iterable[R | SkipSample], draft: Callable[[R], Draft]
) -> Read:
    """The chunk's rows in order: all are drafted, then all files they name are fetched together, then they are filled in."""
    drafts = [
        row if isinstance(row, SkipSample) else attempt(lambda row=row: _within(draft(row), limits)) for row in rows
    ]
    awaited = [s for d in drafts if isinstance(d, Draft) for s in d.segments if isinstance(s, Awaited)]
    listed = {a: attempt(lambda a=a: _parts(a, limits)) for a in dict.fromkeys(awaited)}
    found = _fetch([file for files in listed.values() if isinstance(files, tuple) for file in files], limits)
    for row, drafted in zip(range(chunk.start, chunk.stop), drafts, strict=True):
        at = RowId(corpus=corpus, shard=shard.name, epoch=chunk.epoch, row=row)
        filled = (
            drafted if isinstance(drafted, SkipSample) else attempt(lambda d=drafted: _filled(d, listed, found, limits))
        )
        if isinstance(filled, SkipSample):
            yield Rejected(row=at, reason=filled.reason, detail=filled.detail)
            continue
        assert isinstance(drafted, Draft)
        yield Document(
            id=at,
            source=chunk.source,
            segments=filled,
            rejected=drafted.rejected,
            label=drafted.label,
            regions=drafted.regions,
        )


def attempt(step: Callable[[], R]) -> R | SkipSample:
    try:
        return step()
    except SkipSample as skip:
        return skip


def _within(draft: Draft, limits: Limits) -> Draft:
    """The draft, unless it asks more than a row may, or holds text that no UTF-8 can spell."""
    texts = [s for s in (*draft.segments, *draft.rejected) if isinstance(s, Text)]
    characters = sum(len(text.text) for text in texts)
    if characters > limits.characters:
        raise SkipSample(Reason.TEXT_TOO_LONG, f"{characters:,} characters; at most {limits.characters:,}")
    pictures = sum(not isinstance(s, Text) for s in draft.segments)
    if pictures > limits.pictures:
        raise SkipSample(Reason.TOO_MANY_PICTURES, f"{pictures:,} pictures; at most {limits.pictures:,}")
    for text in texts:
        try:
            text.text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair; no tokenizer takes it
            raise SkipSample(Reason.BAD_UTF8, f"lone surrogate {text.text[error.start]!r}") from error
    for segment in draft.segments:
        if isinstance(segment, Image) and len(segment.data) > limits.bytes:
            raise SkipSample(Reason.HUGE_FILE, f"an image of {len(segment.data):,} bytes; at most {limits.bytes:,}")
    return draft


def _parts(awaited: Awaited, limits: Limits) -> tuple[File, ...]:
    """The files that an awaited segment is made of: itself, or a video's frames where it names a folder."""
    file = awaited.file
    if file.stop is not None and file.stop - file.start > limits.bytes:
        size = file.stop - file.start
        raise SkipSample(Reason.HUGE_FILE, f"{awaited.name} has {size:,} bytes; at most {limits.bytes:,}")
    folder = awaited.frames is not None and not posixpath.splitext(file.uri)[1]
    if not folder and not file.uri.endswith("/"):
        return (file,)
    found = storage.glob(f"{glob.escape(file.uri.rstrip('/'))}/*")
    frames = [uri for uri in found if uri.rpartition(".")[2].lower() in IMAGE_SUFFIXES]
    if not frames:
        raise SkipSample(Reason.MISSING_IMAGE, f"no frames in {awaited.name}")
    if len(frames) > limits.pictures:
        raise SkipSample(
            Reason.TOO_MANY_PICTURES, f"{len(frames):,} frames in {awaited.name}; at most {limits.pictures:,}"
        )
    size = sum(found[uri].size for uri in frames)
    if size > limits.bytes:
        raise SkipSample(Reason.HUGE_FILE, f"frames of {size:,} bytes in {awaited.name}; at most {limits.bytes:,}")
    return tuple(File(uri=uri) for uri in sorted(frames, key=_numbered))


def _numbered(uri: str) -> list[tuple[int, str]]:
    """Sorts `frame_2` before `frame_10`."""
    return [(int(part), "") if part.isascii() and part.isdigit() else (-1, part) for part in re.split(r"(\d+)", uri)]


def _fetch(files: Iterable[File], limits: Limits) -> dict[File, bytes | None]:
    """Bytes of each file, None where there is none. A file is asked for up to one byte over the limit, never for more."""
    found: dict[File, bytes | None] = {}
    groups: dict[str, list[File]] = {}
    for file in dict.fromkeys(files):
        groups.setdefault(storage.scheme(file.uri), []).append(file)
    for group in groups.values():
        found.update(zip(group, _ranges(group, limits), strict=True))
    return found


def _ranges(files: list[File], limits: Limits) -> list[bytes | None]:
    """One round of requests, without those for no bytes: S3 refuses them (416), as it does any range of an empty object."""
    ranges = [(f.uri, f.start, limits.bytes + 1 if f.stop is None else f.stop) for f in files]
    empty = {n for n, (_, start, stop) in enumerate(ranges) if stop <= start}
    try:
        return _read_but(empty, ranges)
    except storage.StorageError as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno != errno.EINVAL:
            raise
    empty |= {n for n, file in enumerate(files) if file.stop is None and _size(file.uri) == 0}
    return _read_but(empty, ranges)


def _read_but(empty: set[int], ranges: list[tuple[str, int, int]]) -> list[bytes | None]:
    found = iter(storage.read_many([part for n, part in enumerate(ranges) if n not in empty]))
    return [b"" if n in empty else next(found) for n in range(len(ranges))]


def _size(uri: str) -> int | None:
    try:
        return storage.stat(uri).size
    except FileNotFoundError:
        return None


def _filled(
    draft: Draft,
    listed: Mapping[Awaited, tuple[File, ...] | SkipSample],
    found: Mapping[File, bytes | None],
    limits: Limits,
) -> tuple[Text | Image | Video, ...]:
    def fill(segment: Segment) -> Text | Image | Video:
        if not isinstance(segment, Awaited):
            return segment
        files = listed[segment]
        if isinstance(files, SkipSample):
            raise files
        bodies = tuple(_body(segment, file, found[file], limits) for file in files)
        if segment.frames is None:
            return Image(data=bodies[0], role=segment.role)
        single = len(files) == 1 and files[0] == segment.file
        return Video(data=bodies[0] if single else bodies, frames=segment.frames, role=segment.role)

    return tuple(fill(segment) for segment in draft.segments)


def _body(segment: Awaited, file: File, data: bytes | None, limits: Limits) -> bytes:
    if data is None:
        raise SkipSample(Reason.MISSING_IMAGE, segment.name)
    if len(data) > limits.bytes:
        raise SkipSample(Reason.HUGE_FILE, f"{segment.name} has more than {limits.bytes:,} bytes")
    if file.stop is not None and len(data) < file.stop - file.start:
        raise SkipSample(Reason.TRUNCATED_IMAGE, f"{segment.name}: the archive ends inside it")
    return data


# --- addresses --------------------------------------------------------------------------------------------------------


def folder_of(uri: str, folder: str = "") -> str:
    """The folder that a row's paths are relative to: `folder` (relative to the shard's own), or by default the shard's own."""
    if folder.startswith("/") or "://" in folder:
        return folder
    return posixpath.join(uri.rpartition("/")[0], folder)


def below(folder: str, name: str) -> str:
    """Address of the file that a row calls `name`. Raises SkipSample when the name leads out of `folder`, or is no path."""
    if re.match(r"(https?|ftp)://", name):
        raise SkipSample(
            Reason.REMOTE_IMAGE, f"{name[:80]}; download the corpus with img2dataset and name the files by their paths"
        )
    if not safe(name):
        raise SkipSample(Reason.UNSAFE_PATH, name[:80])
    if not name.isprintable() or len(name.encode()) > 1024 or any(len(part.encode()) > 255 for part in name.split("/")):
        raise SkipSample(Reason.MISSING_IMAGE, f"no file can be called {name[:80]!r}")
    return posixpath.join(folder, name)


def safe(name: str) -> bool:
    """Whether a path stays below the folder that it is joined to."""
    return not (name.startswith("/") or "://" in name or "\\" in name or ".." in name.split("/") or "\0" in name)


# --- JSON and text ----------------------------------------------------------------------------------------------------


def utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SkipSample(Reason.BAD_UTF8, str(error)) from error


_STRING = rb'"(?:[^"\\]++|\\.)*+"'
REST_OF_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
TO_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|' + _STRING + rb")*+", re.DOTALL)
TO_BRACKET_OR_COMMA = re.compile(rb'(?:[^"\[\]{},]++|' + _STRING + rb")*+", re.DOTALL)
SPACE = re.compile(rb"[ \t\r\n]*+")


def json_value(data: bytes, limits: Limits = LIMITS) -> Any:
    """One JSON value. Raises SkipSample when it is none, or is nested deeper than `limits.depth`, which is counted first."""
    if data.count(b"[") + data.count(b"{") > limits.depth and _depth(data) > limits.depth:
        raise SkipSample(Reason.DEEP_JSON, f"more than {limits.depth} levels")
    text = utf8(data)
    try:
        return json.loads(text)
    except RecursionError as error:  # only where a site allows more levels than Python does
        raise SkipSample(Reason.DEEP_JSON, "more levels than Python takes") from error
    except ValueError as error:  # JSONDecodeError, or Python's own refusal of an integer of thousands of digits
        raise SkipSample(Reason.BAD_JSON, str(error)) from error


def _depth(data: bytes) -> int:
    depth = deepest = place = 0
    while (place := after(TO_BRACKET, data, place)) < len(data):
        depth += 1 if data[place] in b"[{" else -1 if data[place] in b"]}" else 0
        deepest = max(deepest, depth)
        place += 1
    return deepest


def after(pattern: re.Pattern[bytes], data: bytes, place: int) -> int:
    """Where in `data` that which matches at `place` ends; `place` itself where nothing does."""
    match = pattern.match(data, place)
    return match.end() if match else place


def json_object(data: bytes, limits: Limits = LIMITS) -> dict[str, Any]:
    """One JSON object, as a line of jsonl or as an item of a list with the comma that follows it."""
    row = json_value(data.removeprefix(b"\xef\xbb\xbf").strip().removesuffix(b","), limits)
    if not isinstance(row, dict):
        raise SkipSample(Reason.BAD_JSON, f"expected an object, found {type(row).__name__}")
    return row


def string(row: Any, field: str) -> str:
    value = row.get(field) if isinstance(row, dict) else None
    if not isinstance(value, str):
        raise SkipSample(Reason.MISSING_FIELD, f"{field} is {'absent' if value is None else type(value).__name__}")
    return value
