"""How rows are found in files and fetched from them: what the formats of `corpora.py` share.

    scan_rows, scan_tar    a shard's bytes, forward and once              -> ShardIndex
    read_rows, read_tar    one range of the shard                         -> drafts: rows that still name their files
    documents              all files that a chunk's drafts name, at once  -> documents and rejections

A format turns one row into a `Draft` and leaves all storage to this module, so that a chunk costs one request for its rows
and one round of concurrent requests for everything they refer to. Memory holds one row while scanning, one chunk while reading.
"""

from __future__ import annotations

import csv
import errno
import glob
import io
import json
import posixpath
import re
import tarfile
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from typing import IO, Any, Literal, TypeVar

import numpy as np
import simplejpeg
from PIL import Image as PILImage

from pipelines import storage
from pipelines.manifest import Shard, ShardIndex
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

BLOCK = 2**20
"""Bytes that a scan takes at once."""

HEAD = 2**22
"""Bytes of a tar's member that a scan looks at: the header of a picture, however much EXIF it carries; a caption."""

NAME = 2**16
"""Bytes that a member's name may take in a tar's extended header; more is no name but an attempt on memory."""


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
        row if isinstance(row, SkipSample) else _attempt(lambda row=row: _within(draft(row), limits)) for row in rows
    ]
    awaited = [s for d in drafts if isinstance(d, Draft) for s in d.segments if isinstance(s, Awaited)]
    listed = {a: _attempt(lambda a=a: _parts(a, limits)) for a in dict.fromkeys(awaited)}
    found = _fetch([file for files in listed.values() if isinstance(files, tuple) for file in files], limits)
    for row, drafted in zip(range(chunk.start, chunk.stop), drafts, strict=True):
        at = RowId(corpus=corpus, shard=shard.name, epoch=chunk.epoch, row=row)
        filled = (
            drafted
            if isinstance(drafted, SkipSample)
            else _attempt(lambda d=drafted: _filled(d, listed, found, limits))
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


def _attempt(step: Callable[[], R]) -> R | SkipSample:
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
_REST_OF_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_TO_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|' + _STRING + rb")*+", re.DOTALL)
_TO_BRACKET_OR_COMMA = re.compile(rb'(?:[^"\[\]{},]++|' + _STRING + rb")*+", re.DOTALL)
_SPACE = re.compile(rb"[ \t\r\n]*+")


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
    while (place := _after(_TO_BRACKET, data, place)) < len(data):
        depth += 1 if data[place] in b"[{" else -1 if data[place] in b"]}" else 0
        deepest = max(deepest, depth)
        place += 1
    return deepest


def _after(pattern: re.Pattern[bytes], data: bytes, place: int) -> int:
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


# --- scanning: rows of lines, lists, tables and parquet ---------------------------------------------------------------


class Tape:
    """A file that is read forward only, and where in it the next byte lies."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.at = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes, fewer only where the file ends."""
        parts: list[bytes] = []
        while count > 0 and (part := self.file.read(count)):
            parts.append(part)
            count -= len(part)
            self.at += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def skip(self, to: int | None = None) -> None:
        """Read on to byte `to`, or to the end, and keep nothing."""
        while (to is None or self.at < to) and self.take(BLOCK if to is None else min(BLOCK, to - self.at)):
            pass


class Tally:
    """An index in the making, in arrays: a million rows take 20 MB."""

    def __init__(self) -> None:
        self.starts = array("q")
        self.characters = array("i")
        self.pictures = array("i")
        self.seen = True
        self.end = 0

    def add(
        self, start: int, end: int, draft: Callable[[], Draft], sizes: Mapping[int, tuple[int, int]] | None = None
    ) -> None:
        """One more row, and what its draft tells; `sizes` of pictures by their place in the archive beside the shard."""
        row = len(self.starts)
        self.starts.append(start)
        self.end = end
        try:
            drafted = draft()
        except SkipSample:  # the reader says why
            self.characters.append(0)
            return
        texts = (s for s in (*drafted.segments, *drafted.rejected) if isinstance(s, Text))
        self.characters.append(min(sum(len(text.text) for text in texts), 2**31 - 1))
        for segment in drafted.segments:
            if isinstance(segment, Video) or (isinstance(segment, Awaited) and sizes is None):
                self.seen = False
                continue
            if isinstance(segment, Text):
                continue
            size = picture_size(segment.data) if isinstance(segment, Image) else (sizes or {}).get(segment.file.start)
            if size is not None:
                self.pictures.extend((row, *size))

    def index(self, members: tuple[str, ...] = (), spans: array[int] | None = None) -> ShardIndex:
        """The index; without `pictures` where rows hold some that the scan did not pass."""
        return ShardIndex.of(
            starts=np.append(np.array(self.starts, np.int64), np.int64(self.end)),
            members=members,
            spans=None if spans is None else np.array(spans, np.int64).reshape(-1, 2),
            characters=np.array(self.characters, np.int32),
            pictures=np.array(self.pictures, np.int32).reshape(-1, 3) if self.seen else None,
        )


Row = dict[str, Any]


def scan_rows(
    uri: str,
    opener: Opener,
    draft: Callable[[Row], Draft],
    *,
    columns: tuple[str, ...] = (),
    sizes: Mapping[int, tuple[int, int]] | None = None,
) -> Tally:
    """Tally the rows of a `.jsonl`, a `.json` list, a `.csv` or `.tsv` with these `columns`, or a `.parquet`.

    Raises ValueError naming the file when it is none of these.
    """
    with closing(opener(uri)) as file:
        if suffix(uri) == "parquet":
            return _scan_parquet(uri, file, draft, columns)
        tally = Tally()
        for start, end, data in _spans(uri, Tape(file)):
            if not tally.starts and columns and data is not None and _is_header(uri, data, columns):
                continue
            tally.add(start, end, lambda data=data: draft(_parsed(uri, data, columns, LIMITS)), sizes)
        return tally


def suffix(uri: str) -> str:
    return uri.rpartition("/")[2].rpartition(".")[2].lower()


def _spans(uri: str, tape: Tape) -> Iterator[tuple[int, int, bytes | None]]:
    """Start, end and bytes of each row; None for its bytes where they are more than any row may have."""
    if suffix(uri) not in ("jsonl", "ndjson", "json", "csv", "tsv"):
        raise ValueError(f"{uri}: rows lie in .jsonl, .json, .csv, .tsv or .parquet, not in .{suffix(uri)}")
    return json_items(uri, tape) if suffix(uri) == "json" else _lines(uri, tape)


def _parsed(uri: str, data: bytes | None, columns: tuple[str, ...], limits: Limits) -> Row:
    if data is None:
        raise SkipSample(Reason.HUGE_FILE, f"a row of more than {limits.bytes:,} bytes")
    return _cells(uri, data, columns) if suffix(uri) in ("csv", "tsv") else json_object(data, limits)


def _cells(uri: str, data: bytes, columns: tuple[str, ...]) -> Row:
    cells = _split(uri, utf8(data))
    if len(cells) != len(columns):
        raise SkipSample(Reason.MISSING_FIELD, f"{len(cells)} cells in the line; expected {', '.join(columns)}")
    return dict(zip(columns, cells, strict=True))


def _split(uri: str, line: str) -> list[str]:
    line = line.strip("\r\n").removeprefix("\ufeff")
    if suffix(uri) == "tsv":
        return line.split("\t")
    try:
        return next(csv.reader([line]), [])
    except csv.Error as error:
        raise SkipSample(Reason.MISSING_FIELD, f"no line of a table: {error}") from error


def _is_header(uri: str, data: bytes, columns: tuple[str, ...]) -> bool:
    cells = _attempt(lambda: _split(uri, utf8(data)))
    return isinstance(cells, list) and tuple(cell.strip().lower() for cell in cells) == columns


def _no_text(uri: str, block: bytes) -> ValueError | None:
    """An error where a file that should hold text begins as no text does."""
    if re.search(rb"[\x00-\x08\x0e-\x1f]", block[:4096]) is None:
        return None
    packed = " (it is packed with gzip: unpack it first)" if block.startswith(b"\x1f\x8b") else ""
    return ValueError(f"{uri}: expected text, found bytes {block[:12]!r}{packed}; is this path the corpus's?")


class _Held:
    """The bytes of a row that spans blocks, unless they are more than any row may have."""

    def __init__(self) -> None:
        self.parts = bytearray()
        self.whole = True

    def add(self, part: bytes) -> None:
        self.whole = self.whole and len(self.parts) + len(part) <= LIMITS.bytes
        if self.whole:
            self.parts += part
        else:
            self.parts.clear()

    def take(self) -> bytes | None:
        data = bytes(self.parts) if self.whole else None
        self.parts.clear()
        self.whole = True
        return data


def _lines(uri: str, tape: Tape) -> Iterator[tuple[int, int, bytes | None]]:
    """Lines that are not blank. Raises ValueError when the file is no text."""
    held = _Held()
    start = 0
    while block := tape.take(BLOCK):
        base = tape.at - len(block)
        if not base and (error := _no_text(uri, block)):
            raise error
        place = 0
        while (end := block.find(b"\n", place) + 1) or (end := len(block)) > place:
            held.add(block[place:end])
            if block[end - 1] != 0x0A:
                break
            line = held.take()
            if line is None or line.strip():
                yield start, base + end, line
            start = base + end
            place = end
    line = held.take()
    if line is None or line.strip():
        yield start, tape.at, line


def json_items(uri: str, tape: Tape) -> Iterator[tuple[int, int, bytes | None]]:
    """Start, end and bytes of each item of one JSON list, which is never held whole: brackets are counted, block by block.

    An item that is no JSON is found like any other as long as its brackets and quotes are balanced. Raises ValueError
    when the file is no list, ends inside it, or goes on behind it.
    """
    depth = 0
    start: int | None = None  # of the item that we are in
    held = _Held()
    quoted = escaped = False
    number = 0
    while block := tape.take(BLOCK):
        base = tape.at - len(block)
        place = 0
        if not base:
            if error := _no_text(uri, block):
                raise error
            place = 3 if block.startswith(b"\xef\xbb\xbf") else 0
        if escaped:
            place, escaped = 1, False
        while place < len(block):
            if quoted:
                place = _after(_REST_OF_STRING, block, place)
                if place < len(block):
                    escaped = block[place] != 0x22  # a backslash whose other half is in the next block
                    quoted = escaped
                    place += 1
                continue
            if start is None:
                place = _after(_SPACE, block, place)
                if place == len(block):
                    break
                if depth == 0:
                    if number or block[place] != 0x5B:
                        raise _no_list(uri, base + place, block[place : place + 40], number)
                    depth, number, place = 1, 1, place + 1
                    continue
                if block[place] in b",]":
                    depth -= block[place] == 0x5D
                    place += 1
                    continue
                start = base + place
            begun = place
            place = _after(_TO_BRACKET_OR_COMMA if depth == 1 else _TO_BRACKET, block, place)
            if place == len(block):
                break
            byte = block[place]
            if byte == 0x22:
                quoted = True
            elif depth == 1 and byte in b",]":
                held.add(block[max(start - base, 0) : place])
                yield start, base + place, held.take()
                start = None
                number += 1
                depth -= byte == 0x5D
            else:
                depth = max(depth + (1 if byte in b"[{" else -1), 1)
            place += 1
            assert place > begun
        if start is not None:
            held.add(block[max(start - base, 0) :])
    if number == 0:
        raise _no_list(uri, 0, b"", 0)
    if depth:
        inside = "between items" if start is None else f"inside item {number - 1}, which begins at byte {start:,}"
        raise ValueError(f"{uri}: the file ends {inside}; it was cut off, or a bracket or quote there is never closed")


def _no_list(uri: str, at: int, found: bytes, number: int) -> ValueError:
    if number:
        return ValueError(f"{uri}: the JSON list ends before byte {at:,} and {found!r} follows")
    return ValueError(f"{uri}: expected one JSON list, found {found!r}; a file of one object a line is called .jsonl")


def read_rows(
    corpus: str,
    shard: Shard,
    chunk: Chunk,
    limits: Limits,
    draft: Callable[[Row], Draft],
    *,
    columns: tuple[str, ...] = (),
) -> Read:
    """Documents of the chunk's rows of a file that `scan_rows` takes."""
    if suffix(shard.uri) == "parquet":
        return documents(corpus, shard, chunk, limits, _parquet_rows(shard.uri, chunk, columns, limits), draft)

    def parsed(data: bytes) -> Draft:
        return draft(_parsed(shard.uri, data, columns, limits))

    return documents(corpus, shard, chunk, limits, _row_bytes(shard, chunk, limits), parsed)


def _row_bytes(shard: Shard, chunk: Chunk, limits: Limits) -> Iterator[bytes | SkipSample]:
    """The bytes of each row, by one request; a row over the limit is stepped over."""
    starts = shard.load().starts
    row = chunk.start
    while row < chunk.stop:
        stop = row
        while stop < chunk.stop and starts[stop + 1] - starts[stop] <= limits.bytes:
            stop += 1
        if stop > row:
            first, last = int(starts[row]), int(starts[stop])
            data = storage.read(shard.uri, first, last) if last > first else b""
            for at in range(row, stop):
                yield data[int(starts[at]) - first : int(starts[at + 1]) - first]
        if stop < chunk.stop:
            size = int(starts[stop + 1] - starts[stop])
            yield SkipSample(Reason.HUGE_FILE, f"a row of {size:,} bytes; at most {limits.bytes:,}")
            stop += 1
        row = stop


# --- parquet ----------------------------------------------------------------------------------------------------------

ROWS_AT_ONCE = 16
"""Rows of a parquet file that become Python objects together: they may hold pictures."""


def _parquet(uri: str, file: IO[bytes]) -> Any:
    import pyarrow.parquet  # takes a third of a second; most corpora do without

    try:
        # Each column is read in blocks as large as one request, so that no row group lies in memory whole.
        return pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=storage.BLOCK)
    except (pyarrow.ArrowException, OSError) as error:
        if _from_storage(error):
            raise
        raise ValueError(f"{uri}: not a parquet file, or cut off: {error}") from error


def _from_storage(error: Exception) -> bool:
    """Whether an error came out of the file below pyarrow: pyarrow's own OSErrors for damaged pages carry no number."""
    if isinstance(error, (storage.StorageError, FileNotFoundError, PermissionError)):
        return True
    return isinstance(error, OSError) and error.errno is not None


def _scan_parquet(uri: str, file: IO[bytes], draft: Callable[[Row], Draft], columns: tuple[str, ...]) -> Tally:
    parquet = _parquet(uri, file)
    tally = Tally()
    for row in _group_rows(parquet, range(parquet.metadata.num_rows), columns):
        at = len(tally.starts)
        tally.add(at, at + 1, lambda row=row: draft(_or_skip(row)))
    return tally


def _or_skip(row: Row | SkipSample) -> Row:
    if isinstance(row, SkipSample):
        raise row
    return row


def _parquet_rows(uri: str, chunk: Chunk, columns: tuple[str, ...], limits: Limits) -> Iterator[Row | SkipSample]:
    with closing(storage.open_file(uri)) as file:
        for row in _group_rows(_parquet(uri, file), range(chunk.start, chunk.stop), columns):
            if isinstance(row, dict) and _weight(row) > limits.bytes:
                yield SkipSample(Reason.HUGE_FILE, f"a row of more than {limits.bytes:,} bytes")
            else:
                yield row


def _weight(value: Any) -> int:
    """Bytes of all strings and binaries of a row, whatever it nests: parquet's depth is that of its schema."""
    if isinstance(value, (str, bytes)):
        return len(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(_weight(part) for part in parts)


def _group_rows(parquet: Any, rows: range, columns: tuple[str, ...]) -> Iterator[Row | SkipSample]:
    """These rows, from the row groups that hold them. A damaged group costs its own rows only."""
    import pyarrow

    names = [name for name in parquet.schema_arrow.names if not columns or name in columns]
    first = 0
    for group in range(parquet.metadata.num_row_groups):
        stop = first + parquet.metadata.row_group(group).num_rows
        wanted = range(max(rows.start, first), min(rows.stop, stop))
        at = first
        try:
            batches = parquet.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=names, use_threads=False)
            while wanted and at < wanted.stop:
                batch = next(batches)
                part = range(max(wanted.start, at), min(wanted.stop, at + len(batch)))
                if part:
                    yield from batch.slice(part.start - at, len(part)).to_pylist()
                at += len(batch)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError, StopIteration) as error:
            if _from_storage(error):
                raise
            for _ in range(max(at, wanted.start), wanted.stop):
                yield SkipSample(Reason.DAMAGED_SHARD, f"row group {group}: {error}")
        first = stop


# --- tar --------------------------------------------------------------------------------------------------------------


@spec
class Member:
    """One entry of a tar: its header, with any extended one, begins at `start`, its body at `offset`.

    `broken` is where the tar ceases to be one.
    """

    kind: Literal["file", "folder", "other", "broken"]
    name: str = ""
    start: int
    offset: int = 0
    size: int = 0


def tar_members(tape: Tape) -> Iterator[Member]:
    """Members of a tar read forward; bodies may be taken from `tape` as they pass.

    Our own walk over `tarfile`'s headers: its reader seeks back, keeps every member, and reads an extended header of any
    size into memory, which a hostile tar can make as large as the disk.
    """
    name: str | None = None
    size: int | None = None
    start: int | None = None
    while True:
        at = tape.at
        block = tape.take(tarfile.BLOCKSIZE)
        if not block or (len(block) == tarfile.BLOCKSIZE and not any(block)):
            if not block and at == 0:
                yield Member(kind="broken", start=0)
            return
        if name is None and size is None and (plain := _plain(block)):
            path, length = plain
            yield Member(
                kind="file", name=path, start=at if start is None else start, offset=at + len(block), size=length
            )
            tape.skip(at + len(block) + length + -length % tarfile.BLOCKSIZE)
            start = None
            continue
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            header = None
        extended = header is not None and header.type in (b"L", b"K", b"x", b"X", b"g")
        if header is None or header.size < 0 or (extended and header.size > NAME):
            yield Member(kind="broken", start=at if start is None else start)
            return
        start = at if start is None else start
        if extended:
            body = tape.take(header.size)
            tape.skip(tape.at + -header.size % tarfile.BLOCKSIZE)
            if header.type == b"L":
                name = body.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            elif header.type in (b"x", b"X"):
                path, length = _pax(body)
                name, size = path or name, length if length is not None else size
            continue
        has_body = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
        length = 0 if not has_body else header.size if size is None else size
        sparse = header.type == tarfile.GNUTYPE_SPARSE
        kind = "file" if header.isreg() and not sparse else "folder" if header.isdir() else "other"
        yield Member(kind=kind, name=name or header.name, start=start, offset=at + tarfile.BLOCKSIZE, size=length)
        tape.skip(at + tarfile.BLOCKSIZE + length + -length % tarfile.BLOCKSIZE)
        name = size = start = None


def _plain(block: bytes) -> tuple[str, int] | None:
    """Name and size in the header of an ordinary file; None where anything is unusual, for `tarfile` to look at.

    Rows of a webdataset have three files each, and `tarfile` takes three times as long for a header.
    """
    name, size, checksum = block[:100].rstrip(b"\0"), block[124:135], block[148:154]
    usual = len(block) == tarfile.BLOCKSIZE and block[156:157] == b"0" and block[135] == block[345] == 0
    if not (usual and size.isdigit() and checksum.isdigit() and name.isascii()) or b"\0" in name or name.endswith(b"/"):
        return None
    try:
        if int(checksum, 8) != sum(block[:148]) + 8 * ord(" ") + sum(block[156:]):
            return None
        return name.decode(), int(size, 8)
    except ValueError:  # 8 and 9 are digits too
        return None


def _pax(body: bytes) -> tuple[str | None, int | None]:
    """Path and size of a POSIX extended header, whose records are `length key=value`."""
    path = size = None
    place = 0
    while match := re.compile(rb"(\d{1,6}) (path|size|[^=]{1,100})=").match(body, place):
        length = int(match[1])
        value = body[match.end() : place + length - 1]
        if match[2] == b"path":
            path = value.decode("utf-8", "surrogateescape")
        elif match[2] == b"size" and value.isdigit() and len(value) < 20:
            size = int(value)
        if length <= match.end() - place:
            break
        place += length
    return path, size


def split_name(name: str) -> tuple[str, str]:
    """webdataset's rule: the key ends at the first dot of the file's name, the rest is the suffix."""
    folder, _, file = name.removeprefix("./").rpartition("/")
    stem, _, ending = file.partition(".")
    return f"{folder}/{stem}" if folder else stem, ending.lower()


def _in_row(member: Member) -> bool:
    stem, ending = split_name(member.name)
    return member.kind in ("file", "other") and bool(ending) and not stem.endswith("_stats")


Files = dict[str, bytes]
"""One row of a webdataset tar: its files by suffix."""


def scan_tar(uri: str, opener: Opener, draft: Callable[[Files], Draft]) -> ShardIndex:
    """Index the rows of a webdataset tar: consecutive members of one key. Where the tar breaks off, the rest is one bad row.

    Raises ValueError naming the file when it is no tar.
    """
    tally = Tally()
    key: str | None = None
    start = end = 0
    files: Files = {}

    def close() -> None:
        if key is not None:
            tally.add(start, end, lambda: draft(files))

    with closing(opener(uri)) as file:
        tape = Tape(file)
        for member in tar_members(tape):
            if member.kind == "broken":
                if not member.start:
                    raise no_tar(uri)
                close()
                key, files, start = "", {}, member.start
                tape.skip()
                end = tape.at
                break
            if not _in_row(member):
                continue
            stem, ending = split_name(member.name)
            if stem != key:
                close()
                key, files, start = stem, {}, member.start
            if member.kind == "file":
                files[ending] = tape.take(min(member.size, HEAD))
            tape.skip(member.offset + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
            end = tape.at
        close()
        tape.skip()  # what hashes this pass sees the file's last byte too
    return tally.index()


def no_tar(uri: str) -> ValueError:
    return ValueError(
        f"{uri}: not a tar archive (or a packed one: unpack .tar.gz first); check this corpus's path in the site file"
    )


def read_tar(corpus: str, shard: Shard, chunk: Chunk, limits: Limits, draft: Callable[[Files], Draft]) -> Read:
    """Documents of the chunk's rows of a webdataset tar."""
    return documents(
        corpus, shard, chunk, limits, _row_bytes(shard, chunk, limits), lambda data: draft(_tar_row(data, limits))
    )


def _tar_row(data: bytes, limits: Limits) -> Files:
    files: Files = {}
    key: str | None = None
    tape = Tape(io.BytesIO(data))
    for member in tar_members(tape):
        if member.kind == "broken":
            raise SkipSample(Reason.TRUNCATED_SHARD, f"no header of a tar's member at byte {member.start:,} of the row")
        if not _in_row(member):
            continue
        stem, ending = split_name(member.name)
        if member.kind == "other":
            raise SkipSample(Reason.UNSAFE_PATH, f"{member.name} is a link or a device, not a file")
        if not safe(member.name):
            raise SkipSample(Reason.UNSAFE_PATH, member.name[:80])
        if member.offset + member.size > len(data):
            raise SkipSample(Reason.TRUNCATED_SHARD, member.name)
        key = stem if key is None else key
        if stem == key:
            files[ending] = data[member.offset : member.offset + member.size]
    if not files:
        raise SkipSample(Reason.TRUNCATED_SHARD, f"no file in the row's {len(data):,} bytes; at most {limits.bytes:,}")
    return files


@spec
class Archive:
    """Files of a tar by name, as a scan found them: `spans` holds offset, size, offset, size, ...; `sizes` of the pictures
    (height, width) by offset."""

    members: tuple[str, ...]
    spans: array[int]
    sizes: dict[int, tuple[int, int]]


def scan_archive(uri: str, opener: Opener) -> Archive:
    """Find the files of a tar. Links, devices and names that lead out of it are left out. Raises ValueError when it is no tar."""
    members: list[str] = []
    spans = array("q")
    sizes: dict[int, tuple[int, int]] = {}
    with closing(opener(uri)) as file:
        tape = Tape(file)
        for member in tar_members(tape):
            if member.kind == "broken" and not member.start:
                raise no_tar(uri)
            if member.kind != "file" or not safe(member.name):
                continue
            members.append(member.name.removeprefix("./"))
            spans.extend((member.offset, member.size))
            if size := picture_size(tape.take(min(member.size, HEAD))):
                sizes[member.offset] = size
        tape.skip()
    return Archive(members=tuple(members), spans=spans, sizes=sizes)


def picture_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of an encoded image as stored, from its header; None when that cannot be read."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and len(data) >= 24:
        size = int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")
    else:
        try:
            if data[:2] == b"\xff\xd8":
                height, width, *_ = simplejpeg.decode_jpeg_header(data)
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of a great many pixels: the reader refuses those by name
                    with PILImage.open(io.BytesIO(data)) as picture:
                        width, height = picture.size
        except Exception:  # decoders of eight formats fail on damaged headers in as many ways
            return None
        size = int(height), int(width)
    return size if all(0 < side < 2**31 for side in size) else None
