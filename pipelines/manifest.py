"""What a corpus holds, written down once: its shards, their rows, and where each row begins.

    index(corpus, shards, cache) -> Manifest        scans shards that the cache does not know

Every later step trusts the manifest; a shard that changed since (size or time) is scanned again, and the order's
fingerprint with it.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import fsspec
import numpy as np
from numpy.typing import NDArray

from pipelines.types import spec


@spec
class ShardIndex:
    """Rows of one shard: row i lies in bytes `[starts[i], starts[i + 1])`; `starts` int64 (rows + 1,).

    `members` and `spans` (int64 (n, 2): offset, size) find files by name in the archive beside the shard, if any.
    Where a scan learns them cheaply: `characters` of each row's text, int32 (rows,), and the `pictures` of all rows,
    int32 (n, 3): row, height, width, as stored.
    """

    starts: NDArray[np.int64]
    members: tuple[str, ...] = ()
    spans: NDArray[np.int64] | None = None
    characters: NDArray[np.int32] | None = None
    pictures: NDArray[np.int32] | None = None

    @property
    def rows(self) -> int:
        return len(self.starts) - 1

    def find(self, name: str) -> tuple[int, int] | None:
        """Offset and size of archive member `name`, or None."""
        place = _places(self.members).get(name)
        return None if place is None or self.spans is None else (int(self.spans[place, 0]), int(self.spans[place, 1]))


@lru_cache(maxsize=64)
def _places(members: tuple[str, ...]) -> dict[str, int]:
    return {name: place for place, name in enumerate(members)}


@spec
class Shard:
    """One shard as planned with: its address, rows, and the file that holds its index."""

    uri: str
    rows: int
    index: str
    stamp: str

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
        text = "\n".join(f"{shard.name} {shard.rows} {shard.stamp}" for shard in self.shards)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Scannable(Protocol):
    """What `index` asks of a corpus."""

    @property
    def name(self) -> str: ...

    def scan(self, uri: str) -> ShardIndex: ...


def index(corpus: Scannable, uris: Iterable[str], cache: str) -> Manifest:
    """Manifest of `corpus` over `uris` in the order given, from `cache` where the shard is unchanged.

    Raises FileNotFoundError naming the corpus and the shard that is not there.
    """
    shards = []
    for uri in uris:
        stamp = _stamp(corpus, uri)
        file = Path(cache) / f"{corpus.name}-{hashlib.sha256(f'{uri} {stamp}'.encode()).hexdigest()[:20]}.npz"
        if not file.is_file():
            _save(corpus.scan(uri), file)
        shards.append(Shard(uri=uri, rows=_load(str(file)).rows, index=str(file), stamp=stamp))
    return Manifest(corpus=corpus.name, shards=tuple(shards))


def _stamp(corpus: Scannable, uri: str) -> str:
    """Changes when the shard does: the size and time that its storage tells, and how it is read."""
    filesystem, path = fsspec.core.url_to_fs(uri)
    try:
        info = filesystem.info(path)
    except (FileNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"corpus {corpus.name!r}: no shard {uri} ({type(error).__name__}); "
            "check this corpus's path under [corpora] in the site file"
        ) from error
    written = info.get("mtime") or info.get("ETag") or info.get("LastModified")
    return hashlib.sha256(f"{info['size']} {written} {type(corpus).__name__}".encode()).hexdigest()[:12]


def _save(found: ShardIndex, file: Path) -> None:
    buffer = io.BytesIO()
    spans = found.spans if found.spans is not None else np.zeros((0, 2), np.int64)
    np.savez(buffer, starts=found.starts, members=np.array(found.members, dtype=np.str_), spans=spans)
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(f".{os.getpid()}.part")
    scratch.write_bytes(buffer.getvalue())
    scratch.replace(file)


@lru_cache(maxsize=256)
def _load(file: str) -> ShardIndex:
    with np.load(file, allow_pickle=False) as arrays:
        return ShardIndex(
            starts=arrays["starts"], members=tuple(str(name) for name in arrays["members"]), spans=arrays["spans"]
        )


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
        filesystem, path = fsspec.core.url_to_fs(pattern)
        found = sorted(filesystem.unstrip_protocol(p) if "://" in pattern else p for p in filesystem.glob(path))
        if not found:
            raise FileNotFoundError(f"no file matches {pattern}")
        return [str(p) for p in found]
    return [pattern]
