"""Storage that fails is tried again and then stops the run: a row is never dropped for bad luck."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from pipelines.corpora import Pairs, Read
from pipelines.manifest import Shard, ShardIndex, index
from pipelines.order import Order
from pipelines.types import Chunk
from pipelines.windows import ATTEMPTS, PackWindows, Stream
from tests.conftest import CORPUS


@dataclass
class Unsteady:
    """A corpus on storage that breaks off in the middle of a read, so many times."""

    failures: int
    name: str = "pairs"
    inner: Pairs = field(default_factory=lambda: Pairs(name="pairs"))

    def scan(self, uri: str) -> ShardIndex:
        return self.inner.scan(uri)

    def read(self, shard: Shard, chunk: Chunk) -> Read:
        rows = self.inner.read(shard, chunk)
        yield next(rows)
        if self.failures:
            self.failures -= 1
            raise ConnectionResetError("the storage hung up")
        yield from rows


def windows(stream: Stream, corpus: Unsteady, cache: Path) -> PackWindows:
    manifest = index(corpus, [str(CORPUS / "pairs/00000.tar")], str(cache))
    order = Order.of([manifest], [None], 0, 8, 8)
    return PackWindows(replace(stream, corpora=(corpus,), order=order))  # pyright: ignore[reportArgumentType]


def test_a_read_that_breaks_off_is_begun_again_and_loses_nothing(stream: Stream, tmp_path: Path) -> None:
    steady = windows(stream, Unsteady(0), tmp_path).packs(0)
    shaky = windows(stream, Unsteady(ATTEMPTS - 2), tmp_path).packs(0)
    assert [pack.digest for pack in shaky] == [pack.digest for pack in steady]
    assert not any(pack.dropped for pack in shaky)


def test_storage_that_stays_away_stops_the_run(stream: Stream, tmp_path: Path) -> None:
    with pytest.raises(ConnectionResetError, match="the storage hung up"):
        windows(stream, Unsteady(ATTEMPTS + 5), tmp_path).packs(0)
