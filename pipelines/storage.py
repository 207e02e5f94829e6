"""Bytes from where corpora lie: a disk, S3, or anything else that fsspec speaks. The one door to storage of this floor.

    read(uri, start, stop)     a range of one file           open_file(uri)      a file from its beginning, for scanning
    stat(uri)                  its size and version          names(folder)       what lies in a folder

    write(uri, data)           a file, whole                 create(uri, data)   the same, unless there is one
    open_write(uri)            a large file, as it comes     remove(uri)         a file or a folder

Each request has a deadline and is tried again for a while; then it raises `StorageError` (`pipelines/reach.py`). What is not
there (FileNotFoundError) or not allowed (PermissionError) is raised at once, since waiting does not bring it.

Credentials come from the usual AWS chain, or from the site file through `use`; they are never printed.
"""

from __future__ import annotations

import asyncio
import errno
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import IO, Any, Protocol, TypeVar
from uuid import uuid4

from fsspec.asyn import AsyncFileSystem, sync
from fsspec.implementations.local import LocalFileSystem

from pipelines.reach import Storage as Storage
from pipelines.reach import StorageError as StorageError
from pipelines.reach import awaited, place, tried
from pipelines.reach import hasty as hasty
from pipelines.reach import in_use as in_use
from pipelines.reach import scheme as scheme
from pipelines.reach import use as use
from pipelines.uploads import Elsewhere, ToDisk, ToS3, Writer
from pipelines.value import spec

T = TypeVar("T")

AT_ONCE = 16
"""Requests of one `read_many` that are under way together."""

BLOCK = 8 * 2**20
"""Bytes of one request of an opened file."""


@spec
class Stat:
    """A file's size in bytes, and a word that changes when it is written anew (its time, or its ETag)."""

    size: int
    version: str


def read(uri: str, start: int | None = None, stop: int | None = None) -> bytes:
    """Bytes `[start, stop)` of a file, fewer where it ends before; by default all.

    Raises FileNotFoundError, PermissionError or, when its patience is at an end, StorageError.
    """
    if start is not None and start == stop:
        return b""  # which S3 cannot be asked for
    filesystem, path = place(uri)
    if isinstance(filesystem, AsyncFileSystem):
        data: Any = tried(uri, lambda: awaited(filesystem, lambda: _range(filesystem, path, start, stop)))
    else:
        data = tried(uri, lambda: filesystem.cat_file(path, start=start, end=stop))
    return bytes(data)


class Digest(Protocol):
    """What is told bytes in their order."""

    def update(self, data: memoryview, /) -> object: ...


D = TypeVar("D", bound=Digest)


def read_into(uri: str, start: int, buffers: Sequence[memoryview], new: Callable[[], D]) -> tuple[int, list[D]]:
    """Bytes of a file from `start` on, into writable `buffers`, one after the other; returns how many there were, and of each
    buffer that is full the digest of its bytes, begun by `new`. Raises as `read` does.
    """
    size = sum(map(len, buffers))
    filesystem, path = place(uri)
    if isinstance(filesystem, LocalFileSystem):
        return tried(uri, lambda: _scatter(path, start, buffers, [new() for _ in buffers]))
    data = memoryview(read(uri, start, start + size))
    done, digests = 0, [new() for _ in buffers]
    for buffer, each in zip(buffers, digests, strict=True):
        here = data[done : done + len(buffer)]
        buffer[: len(here)] = here
        each.update(here)
        done += len(here)
    return done, digests


PORTION = 512 * 2**10
"""Bytes of a disk that are read before they are digested: so few that they still lie in a core's own cache."""

MOST_BUFFERS = 1024
"""Linux's limit on those of one call (IOV_MAX)."""


def _scatter(path: str, start: int, buffers: Sequence[memoryview], digests: list[D]) -> tuple[int, list[D]]:
    done = 0
    with open(path, "rb", buffering=0) as source:
        for some in _portions(buffers):
            got = _filled(source.fileno(), [view for _, view in some], start + done)
            done += got
            for number, view in some:
                digests[number].update(view)
            if got < sum(len(view) for _, view in some):
                break  # the file has ended
    return done, digests


def _portions(buffers: Sequence[memoryview]) -> Iterator[list[tuple[int, memoryview]]]:
    """Parts of buffers, with the buffer's number, together up to `PORTION` bytes."""
    some: list[tuple[int, memoryview]] = []
    room = PORTION
    for number, buffer in enumerate(buffers):
        left = buffer
        while left:
            some.append((number, left[:room]))
            left, room = left[room:], room - len(some[-1][1])
            if not room or len(some) == MOST_BUFFERS:
                yield some
                some, room = [], PORTION
    if some:
        yield some


def _filled(handle: int, views: Sequence[memoryview], start: int) -> int:
    """Bytes that were read: all that the views hold, unless the file ends before."""
    left = deque(views)
    done = 0
    while left and (got := os.preadv(handle, left, start + done)):
        done += got
        while left and got >= len(left[0]):
            got -= len(left.popleft())
        if got:
            left[0] = left[0][got:]
    return done


async def _range(filesystem: AsyncFileSystem, path: str, start: int | None, stop: int | None) -> Any:
    """S3 refuses any range of an empty file, and any that begins behind a file's end; on a disk both are empty."""
    try:
        return await filesystem._cat_file(path, start=start, end=stop)
    except OSError as error:
        beyond = error.errno == errno.EINVAL or "InvalidRange" in str(error) or "416" in str(error)
        if start is None or not beyond or (await filesystem._info(path))["size"] > start:
            raise
        return b""


def read_many(ranges: Sequence[tuple[str, int | None, int | None]]) -> list[bytes | None]:
    """`read` of each `(uri, start, stop)`, None where there is no such file; on S3 up to `AT_ONCE` requests together."""
    if not ranges:
        return []
    filesystem, _ = place(ranges[0][0])
    if not isinstance(filesystem, AsyncFileSystem):
        return [_or_none(*part) for part in ranges]
    found: list[bytes | None] = [None] * len(ranges)
    waiting = dict(enumerate(ranges))

    async def one(number: int, gate: asyncio.Semaphore) -> BaseException | None:
        uri, start, stop = ranges[number]
        async with gate:
            try:
                request = _range(filesystem, str(filesystem._strip_protocol(uri)), start, stop)
                found[number] = await asyncio.wait_for(request, in_use().deadline)
            except FileNotFoundError:
                pass
            except Exception as error:
                return error
        del waiting[number]
        return None

    async def everyone() -> None:
        gate = asyncio.Semaphore(AT_ONCE)
        errors = await asyncio.gather(*(one(number, gate) for number in list(waiting)))
        worst = next((error for error in errors if error is not None), None)
        if worst is not None:
            raise worst

    tried(ranges[0][0], lambda: sync(filesystem.loop, everyone))
    return found


def _or_none(uri: str, start: int | None, stop: int | None) -> bytes | None:
    try:
        return read(uri, start, stop)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None


def write(uri: str, data: bytes) -> None:
    """Write a file whole: a reader sees the old one or the new one."""
    filesystem, path = place(uri)
    if isinstance(filesystem, AsyncFileSystem):
        tried(uri, lambda: awaited(filesystem, lambda: filesystem._pipe_file(path, data)))
        return
    scratch = f"{path}.{uuid4().hex}.part"  # nodes that share a disk may write the same file at once
    filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    filesystem.pipe_file(scratch, data)
    filesystem.mv(scratch, path)


def create(uri: str, data: bytes) -> bool:
    """Write a file whole if there is none yet; False where there is. Of many who try at once one succeeds.

    A writer whose answer was lost on the way finds its own file and is told True: let `data` tell writers apart.
    """
    filesystem, path = place(uri)
    if isinstance(filesystem, AsyncFileSystem):
        made = tried(uri, lambda: awaited(filesystem, lambda: _put_if_absent(filesystem, path, data)))
    else:
        scratch = f"{path}.{uuid4().hex}.part"
        filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        filesystem.pipe_file(scratch, data)
        try:
            os.link(scratch, path)  # fails where there is a file; readers see all of it or nothing
            made = True
        except FileExistsError:
            made = False
        finally:
            os.unlink(scratch)
    return made or read(uri) == data


async def _put_if_absent(filesystem: AsyncFileSystem, path: str, data: bytes) -> bool:
    try:
        await filesystem._pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    except OSError as error:
        if "PreconditionFailed" in str(error) or "pre-conditions" in str(
            error
        ):  # as S3 words it where it names no condition
            return False
        raise
    return True


def names(folder: str, prefix: str = "", after: str = "") -> list[str]:
    """Names of what lies in a folder, in order; of a folder that is not there, none. Scratch files are left out.

    With `prefix` only names that begin so, with `after` only those behind that one: S3, which tells a thousand names at a time,
    is then asked for no others.
    """
    filesystem, path = place(folder)
    if (prefix or after) and scheme(folder) in ("s3", "s3a"):
        s3: Any = filesystem
        return tried(folder, lambda: awaited(s3, lambda: _some_names(s3, path, prefix, after)))
    if prefix or after:
        return [name for name in names(folder) if name.startswith(prefix) and name > after]
    tried(folder, lambda: filesystem.invalidate_cache(path))
    try:
        found: Any = tried(folder, lambda: filesystem.ls(path, detail=False))
    except (FileNotFoundError, NotADirectoryError):
        return []
    inside = {p.rstrip("/") for p in found} - {path.rstrip("/")}  # S3 may list an empty folder as its own content
    return sorted(name for p in inside if not (name := p.rsplit("/", 1)[-1]).endswith(".part"))


async def _some_names(s3: Any, path: str, prefix: str, after: str) -> list[str]:
    """Files of a folder on S3, which alone of all storage begins a listing in the middle."""
    bucket, key, _ = s3.split_path(path)
    request = {"Bucket": bucket, "Prefix": f"{key}/{prefix}", "Delimiter": "/"}
    if after:
        request["StartAfter"] = f"{key}/{after}"
    found: list[str] = []
    while True:
        answer = await s3._call_s3("list_objects_v2", **request)
        found += [entry["Key"].rsplit("/", 1)[-1] for entry in answer.get("Contents", [])]
        if not answer.get("IsTruncated"):
            # Asked again, since a server may know the word for where to begin and take it for a page's alone.
            return sorted(name for name in found if name > after and name and not name.endswith(".part"))
        request["ContinuationToken"] = answer["NextContinuationToken"]


def sizes(folder: str) -> dict[str, int]:
    """Bytes of each file that lies right in a folder, by name; of a folder that is not there, none. One listing tells all."""
    filesystem, path = place(folder)
    tried(folder, lambda: filesystem.invalidate_cache(path))
    try:
        found: Any = tried(folder, lambda: filesystem.ls(path, detail=True))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    files = {info["name"].rsplit("/", 1)[-1]: int(info["size"]) for info in found if info["type"] == "file"}
    return {name: files[name] for name in sorted(files) if name and not name.endswith(".part")}


def remove(uri: str) -> None:
    """Take a file, or a folder with all that is in it, away; nothing happens where there is none."""
    filesystem, path = place(uri)
    tried(uri, lambda: filesystem.invalidate_cache(path))
    with suppress(FileNotFoundError):
        tried(uri, lambda: filesystem.rm(path, recursive=True))
    if scheme(uri) in ("s3", "s3a"):  # some servers keep a folder that has become empty, under a name of its own
        s3: Any = filesystem
        bucket, key, _ = s3.split_path(path)
        request = {"Bucket": bucket, "Key": f"{key}/"}
        tried(uri, lambda: awaited(s3, lambda: s3._call_s3("delete_object", **request)))
        s3.invalidate_cache(path)


def stat(uri: str) -> Stat:
    """Size and version of a file. Raises FileNotFoundError."""
    filesystem, path = place(uri)
    info = tried(uri, lambda: filesystem.info(path, refresh=True) if scheme(uri) != "file" else filesystem.info(path))
    if info["type"] == "directory":
        raise FileNotFoundError(f"{uri} is a folder")
    return _stat(info)


def _stat(info: dict[str, Any]) -> Stat:
    return Stat(size=int(info["size"]), version=str(info.get("mtime") or info.get("ETag") or info.get("LastModified")))


def exists(uri: str) -> bool:
    """Whether a file is there; none lies below another file."""
    try:
        stat(uri)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def glob(pattern: str) -> dict[str, Stat]:
    """Files whose address matches `pattern` (`*`, `**`, `?`), in order, with what one listing tells of each."""
    filesystem, path = place(pattern)
    tried(pattern, filesystem.invalidate_cache)
    found: Any = tried(pattern, lambda: filesystem.glob(path, detail=True))  # a dict, as `detail` asks
    named = {filesystem.unstrip_protocol(p) if "://" in pattern else p: info for p, info in found.items()}
    return {name: _stat(info) for name, info in sorted(named.items()) if info["type"] == "file"}


def open_file(uri: str) -> IO[bytes]:
    """A file to be read from its beginning; it may be sought in. Each block is one request, tried like any other."""
    if scheme(uri) == "file":
        return open(place(uri)[1], "rb")
    return io.BufferedReader(_Blocks(uri, stat(uri).size), BLOCK)


def open_write(uri: str) -> Writer:
    """A large file, to be written from its beginning to its end. S3 gets it part by part, several at once, each tried like any
    other request; on a disk it has another name until it is whole, and its bytes are on the disk when it gets its own.

    Raises OSError, or StorageError when its patience is at an end.
    """
    filesystem, path = place(uri)
    if scheme(uri) == "file":
        return ToDisk(path)
    return ToS3(uri, filesystem, path) if scheme(uri) == "s3" else Elsewhere(filesystem, path)


class _Blocks(io.RawIOBase):
    def __init__(self, uri: str, size: int) -> None:
        self.uri = uri
        self.size = size
        self.at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        stop = min(self.at + len(buffer), self.size)
        if stop <= self.at:
            return 0
        data = read(self.uri, self.at, stop)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def ahead(calls: Iterable[Callable[[], T]], depth: int) -> Iterator[T]:
    """Results of `calls` in their order, up to `depth` of them made before they are asked for, in threads."""
    with ThreadPoolExecutor(depth) as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for call in calls:
                waiting.append(pool.submit(call))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
