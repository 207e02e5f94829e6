"""Large files as they are written, from their beginning to their end: on a disk, on S3 part by part, or by fsspec's own way."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from typing import Any, Protocol, TypeVar
from uuid import uuid4

from fsspec import AbstractFileSystem

from pipelines.reach import awaited, tried

T = TypeVar("T")

PART = 16 * 2**20
"""Bytes of one part of a large file on its way to S3, which takes up to 10,000 of them: 156 GiB a file."""

PARTS_AT_ONCE = 4
"""Parts of one file that are under way together."""


class Writer(Protocol):
    """A file that is being written. Once its `with` ends well the file is there, whole; an error in it leaves none."""

    def __enter__(self) -> Writer: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...

    def write(self, data: bytes | bytearray | memoryview) -> None: ...


class ToDisk:
    """Under another name until it is whole; its bytes are on the disk when it gets its own."""

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


class Elsewhere:
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


class ToS3:
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
            return awaited(self.filesystem, lambda: self.filesystem._call_s3(method, **self.object, **words))

        return tried(self.uri, request)

    def _complete(self) -> None:
        if not self.upload:
            self._asked("put_object", Body=bytes(self.buffer))
            return
        if self.buffer:
            self._send()
        tags = [{"PartNumber": number, "ETag": part.result()} for number, part in enumerate(self.parts, 1)]
        try:
            self._asked("complete_multipart_upload", UploadId=self.upload, MultipartUpload={"Parts": tags})
        except FileNotFoundError:  # the upload is over: an earlier attempt has done it, and its answer was lost
            if self._asked("head_object")["ContentLength"] != self.size:
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
                    awaited(
                        self.filesystem,
                        lambda: self.filesystem._call_s3("abort_multipart_upload", **self.object, UploadId=self.upload),
                    )


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
