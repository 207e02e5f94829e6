"""Bytes from where corpora lie: a disk, S3, or anything else that fsspec speaks. The one door to storage of this floor.

    read(uri, start, stop)     a range of one file           open_file(uri)      a file from its beginning, for scanning
    stat(uri)                  its size and version          names(folder)       what lies in a folder

    write(uri, data)           a file, whole                 create(uri, data)   the same, unless there is one
    open_write(uri)            a large file, as it comes     remove(uri)         a file or a folder

Storage fails for a moment (a refused connection, a 503, a body that ends early, a server that says nothing): each request has a
deadline and is tried again, `ATTEMPTS` times and for `patience` seconds at least, with growing, jittered pauses; then it raises
`StorageError`. What is not there (FileNotFoundError) or not allowed (PermissionError) is raised at once, since waiting does not
bring it.

Credentials come from the usual AWS chain, or from the site file through `use`; they are never printed.
"""

from __future__ import annotations

import asyncio
import errno
import io
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import field, replace
from functools import lru_cache, partial
from itertools import count
from typing import IO, Any, Protocol, TypeVar
from uuid import uuid4

import fsspec
from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.implementations.local import LocalFileSystem

from pipelines.value import spec

T = TypeVar("T")

ATTEMPTS = 5
"""Times that a request is tried at least."""

PAUSE = 0.25
"""Seconds before the second attempt; each later pause is twice as long, and each is stretched by up to half at random."""

LONGEST_PAUSE = 4.0
"""Seconds before any later attempt: when storage comes back, a run should not sleep on."""

AT_ONCE = 16
"""Requests of one `read_many` that are under way together."""

BLOCK = 8 * 2**20
"""Bytes of one request of an opened file."""

PART = 16 * 2**20
"""Bytes of one part of a large file on its way to S3, which takes up to 10,000 of them: 156 GiB a file."""

PARTS_AT_ONCE = 4
"""Parts of one file that are under way together."""


class StorageError(OSError):
    """Storage did not answer as it should, again and again; says nothing about the data."""


@spec
class Storage:
    """How storage is reached: S3's address and keys where the usual AWS chain (environment, profile, role) does not say.

    `deadline` is the seconds that one request may take before it is tried again, `patience` those for which it is tried again at
    least: an outage that is shorter only makes a run wait; `ahead` is the chunks of rows that are read from
    remote storage before they are needed. Keys do not show when this is printed.
    """

    endpoint: str | None = None
    region: str | None = None
    key: str | None = field(default=None, repr=False)
    secret: str | None = field(default=None, repr=False)
    deadline: float = 30.0
    patience: float = 60.0
    ahead: int = 4

    def s3(self) -> dict[str, Any]:
        """Arguments of s3fs. It gets no retries of its own: two layers of them would multiply. It remembers no listing, since
        others write here too, and asks for a whole file at once, not for its size before.
        """
        return {
            "endpoint_url": self.endpoint,
            "key": self.key,
            "secret": self.secret,
            "client_kwargs": {} if self.region is None else {"region_name": self.region},
            "config_kwargs": {"connect_timeout": self.deadline, "retries": {"total_max_attempts": 1}},
            "use_listings_cache": False,
            "max_concurrency": 1,
        }


class _Current:
    """This process's storage: a worker is told once, when it starts."""

    storage = Storage()


def use(storage: Storage) -> None:
    """Reach storage in this way from now on, in this process."""
    if storage != _Current.storage:
        _Current.storage = storage
        _filesystem.cache_clear()


def in_use() -> Storage:
    return _Current.storage


@contextmanager
def hasty(deadline: float) -> Iterator[None]:
    """As long as this lasts a request is answered within `deadline` seconds or fails: for who asks, and does not train."""
    before = in_use()
    use(replace(before, patience=0.0, deadline=min(deadline, before.deadline)))
    try:
        yield
    finally:
        use(before)


@lru_cache(maxsize=16)
def _filesystem(scheme: str) -> AbstractFileSystem:
    if scheme not in ("s3", "s3a"):
        return fsspec.filesystem(scheme)
    filesystem = fsspec.filesystem(scheme, **_Current.storage.s3())
    filesystem.retries = 1
    return filesystem


def _place(uri: str) -> tuple[AbstractFileSystem, str]:
    filesystem = _filesystem(scheme(uri))
    return filesystem, str(filesystem._strip_protocol(uri))


def scheme(uri: str) -> str:
    """`s3` of `s3://bucket/file`; `file` of a path."""
    return uri.split("://", 1)[0] if "://" in uri else "file"


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
    filesystem, path = _place(uri)
    if isinstance(filesystem, AsyncFileSystem):
        data: Any = _tried(uri, lambda: _awaited(filesystem, lambda: _range(filesystem, path, start, stop)))
    else:
        data = _tried(uri, lambda: filesystem.cat_file(path, start=start, end=stop))
    return bytes(data)


def read_into(uri: str, start: int, buffer: memoryview) -> int:
    """Bytes of a file from `start` on, into a writable `buffer`; returns how many there were. Raises as `read` does."""
    filesystem, path = _place(uri)
    if not isinstance(filesystem, LocalFileSystem):
        data = read(uri, start, start + len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def from_disk() -> int:
        with open(path, "rb", buffering=0) as source:
            done = 0
            while done < len(buffer) and (got := os.preadv(source.fileno(), [buffer[done:]], start + done)):
                done += got
            return done

    return _tried(uri, from_disk)


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
    filesystem, _ = _place(ranges[0][0])
    if not isinstance(filesystem, AsyncFileSystem):
        return [_or_none(*part) for part in ranges]
    found: list[bytes | None] = [None] * len(ranges)
    waiting = dict(enumerate(ranges))

    async def one(number: int, gate: asyncio.Semaphore) -> BaseException | None:
        uri, start, stop = ranges[number]
        async with gate:
            try:
                request = _range(filesystem, str(filesystem._strip_protocol(uri)), start, stop)
                found[number] = await asyncio.wait_for(request, _Current.storage.deadline)
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

    _tried(ranges[0][0], lambda: sync(filesystem.loop, everyone))
    return found


def _or_none(uri: str, start: int | None, stop: int | None) -> bytes | None:
    try:
        return read(uri, start, stop)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None


def write(uri: str, data: bytes) -> None:
    """Write a file whole: a reader sees the old one or the new one."""
    filesystem, path = _place(uri)
    if isinstance(filesystem, AsyncFileSystem):
        _tried(uri, lambda: _awaited(filesystem, lambda: filesystem._pipe_file(path, data)))
        return
    scratch = f"{path}.{uuid4().hex}.part"  # nodes that share a disk may write the same file at once
    filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    filesystem.pipe_file(scratch, data)
    filesystem.mv(scratch, path)


def create(uri: str, data: bytes) -> bool:
    """Write a file whole if there is none yet; False where there is. Of many who try at once one succeeds.

    A writer whose answer was lost on the way finds its own file and is told True: let `data` tell writers apart.
    """
    filesystem, path = _place(uri)
    if isinstance(filesystem, AsyncFileSystem):
        made = _tried(uri, lambda: _awaited(filesystem, lambda: _put_if_absent(filesystem, path, data)))
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
    filesystem, path = _place(folder)
    if (prefix or after) and scheme(folder) in ("s3", "s3a"):
        s3: Any = filesystem
        return _tried(folder, lambda: _awaited(s3, lambda: _some_names(s3, path, prefix, after)))
    if prefix or after:
        return [name for name in names(folder) if name.startswith(prefix) and name > after]
    _tried(folder, lambda: filesystem.invalidate_cache(path))
    try:
        found: Any = _tried(folder, lambda: filesystem.ls(path, detail=False))
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
    filesystem, path = _place(folder)
    _tried(folder, lambda: filesystem.invalidate_cache(path))
    try:
        found: Any = _tried(folder, lambda: filesystem.ls(path, detail=True))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    files = {info["name"].rsplit("/", 1)[-1]: int(info["size"]) for info in found if info["type"] == "file"}
    return {name: files[name] for name in sorted(files) if name and not name.endswith(".part")}


def remove(uri: str) -> None:
    """Take a file, or a folder with all that is in it, away; nothing happens where there is none."""
    filesystem, path = _place(uri)
    _tried(uri, lambda: filesystem.invalidate_cache(path))
    with suppress(FileNotFoundError):
        _tried(uri, lambda: filesystem.rm(path, recursive=True))
    if scheme(uri) in ("s3", "s3a"):  # some servers keep a folder that has become empty, under a name of its own
        s3: Any = filesystem
        bucket, key, _ = s3.split_path(path)
        request = {"Bucket": bucket, "Key": f"{key}/"}
        _tried(uri, lambda: _awaited(s3, lambda: s3._call_s3("delete_object", **request)))
        s3.invalidate_cache(path)


def stat(uri: str) -> Stat:
    """Size and version of a file. Raises FileNotFoundError."""
    filesystem, path = _place(uri)
    info = _tried(uri, lambda: filesystem.info(path, refresh=True) if scheme(uri) != "file" else filesystem.info(path))
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
    filesystem, path = _place(pattern)
    _tried(pattern, filesystem.invalidate_cache)
    found: Any = _tried(pattern, lambda: filesystem.glob(path, detail=True))  # a dict, as `detail` asks
    named = {filesystem.unstrip_protocol(p) if "://" in pattern else p: info for p, info in found.items()}
    return {name: _stat(info) for name, info in sorted(named.items()) if info["type"] == "file"}


def open_file(uri: str) -> IO[bytes]:
    """A file to be read from its beginning; it may be sought in. Each block is one request, tried like any other."""
    if scheme(uri) == "file":
        return open(_place(uri)[1], "rb")
    return io.BufferedReader(_Blocks(uri, stat(uri).size), BLOCK)


class Writer(Protocol):
    """A file that is being written. Once its `with` ends well the file is there, whole; an error in it leaves none."""

    def __enter__(self) -> Writer: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...

    def write(self, data: bytes | bytearray | memoryview) -> None: ...


def open_write(uri: str) -> Writer:
    """A large file, to be written from its beginning to its end. S3 gets it part by part, several at once, each tried like any
    other request; on a disk it has another name until it is whole, and its bytes are on the disk when it gets its own.

    Raises OSError, or StorageError when its patience is at an end.
    """
    filesystem, path = _place(uri)
    if scheme(uri) == "file":
        return _ToDisk(path)
    return _ToS3(uri, filesystem, path) if isinstance(filesystem, AsyncFileSystem) else _Elsewhere(filesystem, path)


class _ToDisk:
    def __init__(self, path: str) -> None:
        self.path = path
        self.scratch = f"{path}.{uuid4().hex}.part"
        os.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        self.file = open(self.scratch, "wb", buffering=0)  # noqa: SIM115 -- __exit__ closes it

    def __enter__(self) -> Writer:
        return self

    def write(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        while len(view):  # a disk may take less than it is given
            view = view[self.file.write(view) :]

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with self.file:
                if kind is None:
                    os.fsync(self.file.fileno())
            if kind is None:
                os.replace(self.scratch, self.path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(self.scratch)


class _Elsewhere:
    """By fsspec's own file, which commits when it is closed."""

    def __init__(self, filesystem: AbstractFileSystem, path: str) -> None:
        self.filesystem, self.path = filesystem, path
        filesystem.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        self.file: Any = filesystem.open(path, "wb")

    def __enter__(self) -> Writer:
        return self

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.file.write(data)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.file.close()
        if kind is not None:
            self.filesystem.rm(self.path)


class _ToS3:
    """A multipart upload; a file of less than two parts' bytes is one request."""

    def __init__(self, uri: str, filesystem: Any, path: str) -> None:
        self.uri, self.filesystem = uri, filesystem
        bucket, key, _ = filesystem.split_path(path)
        self.object = {"Bucket": bucket, "Key": key}
        self.buffer = bytearray()
        self.size = 0
        self.upload = ""
        self.parts: list[Future[str]] = []
        self.ended = False

    def __enter__(self) -> Writer:
        return self

    def write(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            taken = view[: PART - len(self.buffer)]
            self.buffer += taken
            view = view[len(taken) :]
            if len(self.buffer) == PART:
                self._send()

    def _send(self) -> None:
        """Put what is collected on its way, once there is room for it: no more than `PARTS_AT_ONCE` parts wait in memory."""
        if not self.upload:
            self.upload = self._asked("create_multipart_upload")["UploadId"]
        if len(self.parts) >= PARTS_AT_ONCE:
            self.parts[-PARTS_AT_ONCE].result()
        part, self.buffer = self.buffer, bytearray()
        self.size += len(part)
        self.parts.append(_beside(partial(self._put, len(self.parts) + 1, part)))

    def _put(self, number: int, part: bytearray) -> str:
        return self._asked("upload_part", UploadId=self.upload, PartNumber=number, Body=bytes(part))["ETag"]

    def _asked(self, method: str, **words: Any) -> Any:
        def request() -> Any:
            if self.ended:
                raise RuntimeError("another part has failed")
            return _awaited(self.filesystem, lambda: self.filesystem._call_s3(method, **self.object, **words))

        return _tried(self.uri, request)

    def _complete(self) -> None:
        if not self.upload:
            write(self.uri, bytes(self.buffer))
            return
        if self.buffer:
            self._send()
        tags = [{"PartNumber": number, "ETag": part.result()} for number, part in enumerate(self.parts, 1)]
        try:
            self._asked("complete_multipart_upload", UploadId=self.upload, MultipartUpload={"Parts": tags})
        except FileNotFoundError:  # the upload is over: an earlier attempt has done it, and its answer was lost
            if stat(self.uri).size != self.size:
                raise
        self.filesystem.invalidate_cache(self.uri.rsplit("/", 1)[0])

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        whole = False
        try:
            if kind is None:
                self._complete()
                whole = True
        finally:
            self.ended = True
            wait(self.parts)
            if self.upload and not whole:  # parts that nobody completes would be paid for until somebody finds them
                with suppress(Exception):
                    _awaited(
                        self.filesystem,
                        lambda: self.filesystem._call_s3("abort_multipart_upload", **self.object, UploadId=self.upload),
                    )


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


def _beside(call: Callable[[], T]) -> Future[T]:
    """Make `call` in a thread that does not keep the process from ending, as a pool's would: a request may take minutes."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="upload").start()
    return future


def _awaited(filesystem: AsyncFileSystem, request: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """One request of an asynchronous file system, given up at the deadline."""

    async def bounded() -> Any:
        return await asyncio.wait_for(request(), _Current.storage.deadline)

    return sync(filesystem.loop, bounded)


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


FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Answers that waiting does not change."""

FINAL_NUMBERS = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _tried(uri: str, request: Callable[[], T]) -> T:
    started = time.monotonic()
    for attempt in count(1):
        try:
            return request()
        except Exception as error:
            if type(error).__name__ == "NoCredentialsError":
                raise PermissionError(
                    f"{uri}: no credentials; set them the usual way (AWS_ACCESS_KEY_ID, a profile, a role) "
                    "or as key and secret under [storage] in the site file"
                ) from error
            if isinstance(error, PermissionError) and error.errno is None and uri not in str(error):
                raise PermissionError(
                    f"{uri}: not allowed ({error}); check the keys (the AWS chain, or key and secret under [storage] in the "
                    "site file) and what their owner may do there"
                ) from error
            if not _transient(error):
                raise
            if attempt >= ATTEMPTS and time.monotonic() - started >= _Current.storage.patience:
                raise StorageError(
                    f"{uri}: no answer in {attempt} attempts, the last: {type(error).__name__}: {error}; "
                    "the storage is at fault, not the data: once it answers, the same command goes on"
                ) from error
            time.sleep(min(LONGEST_PAUSE, PAUSE * 2 ** min(attempt - 1, 16)) * (1 + random.random() / 2))
    raise AssertionError("an attempt returns or the last one raises")


def _transient(error: Exception) -> bool:
    """Whether another attempt may fare better. S3's client raises its own kinds for broken connections, which are no OSError."""
    if isinstance(error, FINAL) or (isinstance(error, OSError) and error.errno in FINAL_NUMBERS):
        return False
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, (OSError, TimeoutError)) or package in ("botocore", "aiobotocore", "aiohttp")
