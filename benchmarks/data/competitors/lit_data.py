"""LitData: optimised chunks on local disk through StreamingDataset and StreamingDataLoader."""
# litdata is in the competitors' environment only:
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import litdata

from benchmarks.data.corpus import link, read, shards
from benchmarks.data.work import BATCH, WORKERS, Batch, Row, collate, prepared, repeated_index


def rows_of(uri: str) -> Iterator[dict[str, Any]]:
    for _, picture, caption in read(uri):
        yield {"jpg": picture, "txt": caption.decode()}


def prepare(corpus: Path, rows: int) -> None:
    """Chunks of the rows of the tars, then linked as often as the tars are."""
    once, many = corpus / "lit", corpus / "lit-many"
    if not (once / "index.json").is_file():
        shutil.rmtree(once, ignore_errors=True)
        litdata.optimize(rows_of, shards(corpus / "tar"), str(once), chunk_bytes="16MB", num_workers=1, verbose=False)
    shutil.rmtree(many, ignore_errors=True)
    many.mkdir()
    listed: list[dict[str, Any]] = []
    own = json.loads((once / "index.json").read_text())["chunks"]
    times = -(-rows // sum(chunk["chunk_size"] for chunk in own))
    for number, chunk in enumerate(islice(cycle(own), times * len(own))):
        name = f"chunk-0-{number}.bin"
        link(once / chunk["filename"], many / name)
        listed.append({**chunk, "filename": name})
    repeated_index(once / "index.json", "chunks", listed, many / "index.json")


class Rows(litdata.StreamingDataset):
    def __getitem__(self, index: Any) -> Row:
        sample = super().__getitem__(index)
        return prepared(sample["jpg"], sample["txt"])


def batches(corpus: Path) -> Iterator[Batch]:
    dataset = Rows(str(corpus / "lit-many"), cache_dir=str(corpus / "cache-lit"))
    yield from litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=WORKERS, collate_fn=collate)
