"""webdataset in torch's DataLoader."""
# webdataset is in the competitors' environment only:
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import webdataset as wds
from torch.utils.data import DataLoader

from benchmarks.data.corpus import shards
from benchmarks.data.work import BATCH, WORKERS, Batch, Row, collate, prepared


def row(pair: tuple[bytes, bytes]) -> Row:
    return prepared(*pair)


def batches(corpus: Path) -> Iterator[Batch]:
    dataset = (
        wds.WebDataset(shards(corpus / "many"), shardshuffle=False)
        .to_tuple("jpg", "txt")
        .map(row)
        .batched(BATCH, collation_fn=collate)
    )
    yield from DataLoader(dataset, batch_size=None, num_workers=WORKERS)
