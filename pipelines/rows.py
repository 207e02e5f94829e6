"""Rows of files of lines, JSON lists, tables and parquet: found in one pass forward, fetched by range.

    scan_rows    a shard's bytes, forward and once      -> Tally, which becomes a ShardIndex
    read_rows    one range of the shard                 -> drafts, and of these documents

Memory holds one row while scanning, one chunk while reading.
"""

from __future__ import annotations

import csv
import io
import re
import warnings
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import IO, Any

import numpy as np
import simplejpeg
from PIL import Image as PILImage

from pipelines import storage
from pipelines.manifest import Shard, ShardIndex
from pipelines.reading import (
    LIMITS,
    REST_OF_STRING,
    SPACE,
    TO_BRACKET,
    TO_BRACKET_OR_COMMA,
    Awaited,
    Draft,
    Opener,
    Read,
    after,
    attempt,
    documents,
    json_object,
    utf8,
)
from pipelines.types import (
    Chunk,
    Image,
    Limits,
    Reason,
    SkipSample,
    Text,
    Video,
)

BLOCK = 2**20
"""Bytes that a scan takes at once."""


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
    cells = attempt(lambda: _split(uri, utf8(data)))
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
                place = after(REST_OF_STRING, block, place)
                if place < len(block):
                    escaped = block[place] != 0x22  # a backslash whose other half is in the next block
                    quoted = escaped
                    place += 1
                continue
            if start is None:
                place = after(SPACE, block, place)
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
            place = after(TO_BRACKET_OR_COMMA if depth == 1 else TO_BRACKET, block, place)
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

    return documents(corpus, shard, chunk, limits, row_bytes(shard, chunk, limits), parsed)


def row_bytes(shard: Shard, chunk: Chunk, limits: Limits) -> Iterator[bytes | SkipSample]:
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
