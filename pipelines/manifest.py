"""What a corpus holds, written down once: its shards, their rows, and where each row begins.

    plan(corpus, uris, homes)            what is known, what must be scanned, what has changed since
    scan(corpus, uri, home)              one shard, read once from beginning to end: rows, byte ranges, sizes, checksum
    save(manifest, home)                 the corpus's table of shards, beside the shards' own indexes

A home is a folder on any storage: the site's cache, or `beside` the corpus itself, where everyone who reads the corpus finds
it. Whether a shard is still the one that was scanned is asked of its storage (size, time or ETag) at every start; the order's
fingerprint speaks of contents alone, so a corpus may be copied or moved and a run goes on.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import lru_cache
from typing import IO, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from numpy.typing import NDArray

from pipelines import storage
from pipelines.storage import Stat
from pipelines.types import spec

Opener = Callable[[str], IO[bytes]]


@spec
class ShardIndex:
    """Rows of one shard: row i lies in bytes `[starts[i], starts[i + 1])`; `starts` int64 (rows + 1,).

    Files in the archive beside the shard, if any, are found by `names`, uint64 (n,), sorted hashes of their names, at
    `spans`, int64 (n, 2): offset, size. Where a scan learns them cheaply: `characters` of each row's text, int32 (rows,),
    and the `pictures` of all rows, int32 (n, 3): row, height, width, as stored; None where it did not pass them.
    """

    starts: NDArray[np.int64]
    names: NDArray[np.uint64]
    spans: NDArray[np.int64]
    characters: NDArray[np.int32]
    pictures: NDArray[np.int32] | None

    @classmethod
    def of(
        cls,
        starts: NDArray[np.int64],
        members: Sequence[str] = (),
        spans: NDArray[np.int64] | None = None,
        characters: NDArray[np.int32] | None = None,
        pictures: NDArray[np.int32] | None = None,
    ) -> ShardIndex:
        """From what a scan found. Of several members of one name the last counts, as in tar.

        Raises ValueError when two names share a hash, which no two of a million do by chance.
        """
        hashes = np.array([_hash(name) for name in members], np.uint64)
        places = np.arange(len(hashes))
        order = np.lexsort((-places, hashes))
        names, first = np.unique(hashes[order], return_index=True)
        chosen = order[first]
        if len(names) < len(set(members)):
            raise ValueError(f"two of {len(members)} archive members share a hash; rename one")
        return cls(
            starts=starts,
            names=names,
            spans=(np.zeros((0, 2), np.int64) if spans is None else spans)[chosen].reshape(-1, 2),
            characters=np.zeros(0, np.int32) if characters is None else characters,
            pictures=pictures,
        )

    @property
    def rows(self) -> int:
        return len(self.starts) - 1

    def find(self, name: str) -> tuple[int, int] | None:
        """Offset and size of archive member `name`, or None."""
        wanted = np.uint64(_hash(name))
        place = int(np.searchsorted(self.names, wanted))
        if place == len(self.names) or self.names[place] != wanted:
            return None
        return int(self.spans[place, 0]), int(self.spans[place, 1])


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


@spec
class Shard:
    """One shard as planned with.

    `stamp` says what its files looked like when it was scanned, `digest` is the SHA-256 of their contents, `index` the
    address of its `ShardIndex`; `bytes` of its files, `characters` and `pictures` of its rows as far as the scan knows.
    """

    uri: str
    rows: int
    index: str
    stamp: str
    digest: str = ""
    bytes: int = 0
    characters: int = 0
    pictures: int | None = None

    @property
    def name(self) -> str:
        return self.uri.rsplit("/", 1)[-1]

    def load(self) -> ShardIndex:
        return _load(self.index)


@spec
class Manifest:
    """A corpus as planned with."""

    corpus: str
    shards: tuple[Shard, ...]

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Equal for the same rows with the same contents, wherever they lie."""
        text = "\n".join(f"{shard.name} {shard.rows} {shard.digest}" for shard in self.shards)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Scannable(Protocol):
    """What indexing asks of a corpus."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    def files(self, uri: str) -> tuple[str, ...]: ...

    def scan(self, uri: str, opener: Opener) -> ShardIndex: ...


@spec
class Planned:
    """What is known of a corpus: for each address the shard as it was scanned, or None where it must be scanned (again).

    `changed` says of those that are not what they were what they were and are.
    """

    corpus: str
    uris: tuple[str, ...]
    known: tuple[Shard | None, ...]
    changed: dict[str, str]

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(uri for uri, shard in zip(self.uris, self.known, strict=True) if shard is None)


def plan(corpus: Scannable, uris: Iterable[str], homes: Sequence[str]) -> Planned:
    """Look every shard's files up, and compare with what the homes have written down.

    Raises FileNotFoundError naming the corpus and the shard that is not there.
    """
    uris = tuple(uris)
    stamps = _stamps(corpus, uris)
    tables = [_table(_folder(corpus, home)) for home in homes]
    changed: dict[str, str] = {}
    current: list[Shard | None] = []
    for uri in uris:
        entries = [table[uri] for table in tables if uri in table]
        current.append(next((shard for shard in entries if shard.stamp == stamps[uri]), None))
        if entries and current[-1] is None:
            changed[uri] = f"{entries[0].stamp} when it was indexed, {stamps[uri]} now (size:version of its files)"
    return Planned(corpus=corpus.name, uris=uris, known=tuple(current), changed=changed)


def scan(corpus: Scannable, uri: str, home: str) -> Shard:
    """Read one shard from beginning to end, write its index to `home`, and say what it holds.

    Raises ValueError when the file is not in the corpus's format, StorageError.
    """
    stamp = _stamps(corpus, (uri,))[uri]
    with ExitStack() as opened:
        files: dict[str, _Hashed] = {}

        def opener(part: str) -> IO[bytes]:
            files[part] = _Hashed(opened.enter_context(storage.open_file(part)))
            return io.BufferedReader(files[part], 2**20)

        found = corpus.scan(uri, opener)
        digest = hashlib.sha256()
        for part in corpus.files(uri):
            if part not in files:
                opener(part)
            digest.update(files[part].finish())
    index = f"{_folder(corpus, home)}/{hashlib.sha256(f'{uri} {stamp}'.encode()).hexdigest()[:24]}.npz"
    _save(found, index)
    return Shard(
        uri=uri,
        rows=found.rows,
        index=index,
        stamp=stamp,
        digest=digest.hexdigest(),
        bytes=sum(file.hashed for file in files.values()),
        characters=int(found.characters.sum()),
        pictures=None if found.pictures is None else len(found.pictures),
    )


def save(corpus: Scannable, shards: Iterable[Shard], home: str) -> None:
    """Write the table of shards to `home`, beside those of other addresses that it knows already."""
    folder = _folder(corpus, home)
    table = _table(folder) | {shard.uri: shard for shard in shards}
    columns = {name: [getattr(shard, name) for shard in table.values()] for name in _COLUMNS}
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns), buffer)
    storage.write(f"{folder}/shards.parquet", buffer.getvalue())


def index(corpus: Scannable, uris: Iterable[str], *homes: str) -> Manifest:
    """The corpus's manifest, its unknown shards scanned here, one after the other, and kept in the last home."""
    planned = plan(corpus, uris, homes)
    return finish(corpus, planned, [scan(corpus, uri, homes[-1]) for uri in planned.missing], homes[-1])


def finish(corpus: Scannable, planned: Planned, scanned: Sequence[Shard], home: str) -> Manifest:
    """The manifest of a plan whose missing shards have been scanned; the new ones are kept in `home`."""
    if scanned:
        save(corpus, scanned, home)
    fresh = {shard.uri: shard for shard in scanned}
    shards = tuple(shard or fresh[uri] for uri, shard in zip(planned.uris, planned.known, strict=True))
    return Manifest(corpus=corpus.name, shards=shards)


def beside(uri: str) -> str:
    """The home that lies in the corpus's own folder."""
    return f"{uri.rsplit('/', 1)[0]}/.mllm"


_COLUMNS = ("uri", "rows", "index", "stamp", "digest", "bytes", "characters", "pictures")


def _folder(corpus: Scannable, home: str) -> str:
    return f"{home.rstrip('/')}/{corpus.name}-{corpus.kind}"


def _table(folder: str) -> dict[str, Shard]:
    try:
        data = storage.read(f"{folder}/shards.parquet")
    except FileNotFoundError:
        return {}
    rows = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    return {row["uri"]: Shard(**row) for row in rows}


def _stamps(corpus: Scannable, uris: Sequence[str]) -> dict[str, str]:
    """What changes when a shard does: size and version of each of its files, as its storage tells."""
    parts = {uri: corpus.files(uri) for uri in uris}
    found = _stats(corpus, [part for files in parts.values() for part in files])
    return {uri: " ".join(f"{found[p].size}:{found[p].version}" for p in files) for uri, files in parts.items()}


def _stats(corpus: Scannable, files: Sequence[str]) -> dict[str, Stat]:
    """One listing for each folder that many files lie in, one question for each other file."""
    folders: dict[str, list[str]] = {}
    for file in files:
        folders.setdefault(file.rpartition("/")[0], []).append(file)
    found: dict[str, Stat] = {}
    for folder, inside in folders.items():
        if len(inside) > LISTED and storage.scheme(folder) != "file":
            found |= storage.glob(f"{folder}/*")
    for file in files:
        if file not in found:
            try:
                found[file] = storage.stat(file)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise FileNotFoundError(
                    f"corpus {corpus.name!r}: no shard {file}; check this corpus's path under [corpora] in the site file"
                ) from error
    return found


LISTED = 8
"""Files of one folder on remote storage beyond which the folder is listed instead of asking for each."""


class _Hashed(io.RawIOBase):
    """A file that is hashed as it is read, whatever its reader skips or reads twice, and even when that has closed it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.hashed = 0
        self.at = 0
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = self.file.seek(offset, whence) if whence == io.SEEK_END else offset + (self.at if whence else 0)
        return self.at

    def readinto(self, buffer: Any) -> int:
        if self.at > self.hashed:
            self._hash_up_to(self.at)
        self.file.seek(self.at)
        data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        fresh = data[self.hashed - self.at :] if self.at + len(data) > self.hashed else b""
        self.digest.update(fresh)
        self.hashed += len(fresh)
        self.at += len(data)
        return len(data)

    def _hash_up_to(self, stop: int) -> None:
        self.file.seek(self.hashed)
        while self.hashed < stop and (data := self.file.read(min(2**20, stop - self.hashed))):
            self.digest.update(data)
            self.hashed += len(data)

    def finish(self) -> bytes:
        """The digest of the whole file, what was not read yet included."""
        self._hash_up_to(2**63 - 1)
        return self.digest.digest()


_ARRAYS = ("starts", "names", "spans", "characters", "pictures")


def _save(found: ShardIndex, uri: str) -> None:
    buffer = io.BytesIO()
    arrays = {name: getattr(found, name) for name in _ARRAYS}
    np.savez(buffer, **{name: array for name, array in arrays.items() if array is not None})
    storage.write(uri, buffer.getvalue())


@lru_cache(maxsize=64)
def _load(uri: str) -> ShardIndex:
    with np.load(io.BytesIO(storage.read(uri)), allow_pickle=False) as arrays:
        found: dict[str, Any] = {name: arrays.get(name) for name in _ARRAYS}
    return ShardIndex(**found)


def expand(pattern: str) -> list[str]:
    """`a/{000..002}.tar` -> three addresses; `a/*.jsonl` -> the files there now, sorted; anything else -> itself.

    Raises FileNotFoundError when a star matches nothing, ValueError when a range runs backwards.
    """
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if braces:
        first, last = braces.groups()
        if int(first) > int(last):
            raise ValueError(f"{pattern}: the range {first}..{last} runs backwards")
        head, tail = pattern[: braces.start()], pattern[braces.end() :]
        numbers = range(int(first), int(last) + 1)
        return [address for i in numbers for address in expand(f"{head}{i:0{len(first)}d}{tail}")]
    if "*" in pattern:
        found = list(storage.glob(pattern))
        if not found:
            raise FileNotFoundError(f"no file matches {pattern}")
        return found
    return [pattern]
