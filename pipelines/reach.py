"""How storage is reached: the settings of this process, the file system of an address, and requests that are tried again.

Storage fails for a moment (a refused connection, a 503, a body that ends early, a server that says nothing): each request has a
deadline and is tried again, `ATTEMPTS` times and for `patience` seconds at least, with growing, jittered pauses; then it raises
`StorageError`. What is not there (FileNotFoundError) or not allowed (PermissionError) is raised at once, since waiting does not
bring it.
"""

from __future__ import annotations

import asyncio
import errno
import random
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import field, replace
from functools import lru_cache
from itertools import count
from typing import Any, TypeVar

import fsspec
from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem, sync

from pipelines.value import spec

T = TypeVar("T")

ATTEMPTS = 5
"""Times that a request is tried at least."""

PAUSE = 0.25
"""Seconds before the second attempt; each later pause is twice as long, and each is stretched by up to half at random."""

LONGEST_PAUSE = 4.0
"""Seconds before any later attempt: when storage comes back, a run should not sleep on."""


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


def place(uri: str) -> tuple[AbstractFileSystem, str]:
    filesystem = _filesystem(scheme(uri))
    return filesystem, str(filesystem._strip_protocol(uri))


def scheme(uri: str) -> str:
    """`s3` of `s3://bucket/file`; `file` of a path."""
    return uri.split("://", 1)[0] if "://" in uri else "file"


def awaited(filesystem: AsyncFileSystem, request: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """One request of an asynchronous file system, given up at the deadline."""

    async def bounded() -> Any:
        return await asyncio.wait_for(request(), _Current.storage.deadline)

    return sync(filesystem.loop, bounded)


FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Answers that waiting does not change."""

FINAL_NUMBERS = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def tried(uri: str, request: Callable[[], T]) -> T:
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
