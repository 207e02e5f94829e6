"""torch's DataLoader over tars, read with tarfile: what a person writes without a library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from benchmarks.data.corpus import read, shards
from benchmarks.data.work import BATCH, WORKERS, Batch, Row, collate, prepared


class Tars(IterableDataset[Row]):
    def __init__(self, uris: list[str]) -> None:
        self.uris = uris

    def __iter__(self) -> Iterator[Row]:
        info = get_worker_info()
        for uri in self.uris[info.id :: info.num_workers] if info else self.uris:
            for _, picture, caption in read(uri):
                yield prepared(picture, caption)


def batches(corpus: Path) -> Iterator[Batch]:
    yield from DataLoader(Tars(shards(corpus / "many")), batch_size=BATCH, num_workers=WORKERS, collate_fn=collate)
