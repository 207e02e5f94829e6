"""Rows of tars: webdataset's, whose files of one name are a row, and archives of pictures beside a list.

scan_tar, scan_archive    a tar's bytes, forward and once    -> ShardIndex, Archive
read_tar                  one range of the tar               -> drafts, and of these documents
"""

from __future__ import annotations

import io
import re
import tarfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Literal

from pipelines.manifest import Shard, ShardIndex
from pipelines.reading import Draft, Opener, Read, documents, safe
from pipelines.rows import Tally, Tape, picture_size, row_bytes
from pipelines.types import (
    Chunk,
    Limits,
    Reason,
    SkipSample,
    spec,
)

HEAD = 2**22
"""Bytes of a tar's member that a scan looks at: the header of a picture, however much EXIF it carries; a caption."""

NAME = 2**16
"""Bytes that a member's name may take in a tar's extended header; more is no name but an attempt on memory."""


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
        corpus, shard, chunk, limits, row_bytes(shard, chunk, limits), lambda data: draft(_tar_row(data, limits))
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
