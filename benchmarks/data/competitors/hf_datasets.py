"""HF datasets, streaming: parquet shards on local disk, pictures as bytes, in torch's DataLoader."""
# datasets is in the competitors' environment only:
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from datasets import load_dataset
from torch.utils.data import DataLoader

from benchmarks.data.corpus import SHARD_ROWS, link, read, shards
from benchmarks.data.work import BATCH, WORKERS, Batch, collate, prepared


def prepare(corpus: Path, rows: int) -> None:
    """A parquet file for each tar, in row groups of 64, then linked as often as the tars are."""
    once, many = corpus / "parquet", corpus / "parquet-many"
    once.mkdir(exist_ok=True)
    many.mkdir(exist_ok=True)
    for uri in shards(corpus / "tar"):
        file = once / f"{Path(uri).stem}.parquet"
        if not file.is_file():
            found = [{"jpg": picture, "txt": caption.decode()} for _, picture, caption in read(uri)]
            pyarrow.parquet.write_table(pa.Table.from_pylist(found), file, row_group_size=64, compression="none")
    for number, file in enumerate(islice(cycle(sorted(once.glob("*.parquet"))), rows // SHARD_ROWS)):
        link(file, many / f"{number:05d}.parquet")


def row(sample: dict[str, Any]) -> dict[str, Any]:
    return {"row": prepared(sample["jpg"], sample["txt"])}


def together(samples: list[dict[str, Any]]) -> Batch:
    return collate(sample["row"] for sample in samples)


def batches(corpus: Path) -> Iterator[Batch]:
    files = sorted(str(file) for file in (corpus / "parquet-many").glob("*.parquet"))
    dataset = load_dataset("parquet", data_files=files, split="train", streaming=True)
    mapped = dataset.map(row, remove_columns=["jpg", "txt"])
    yield from DataLoader(mapped, batch_size=BATCH, num_workers=WORKERS, collate_fn=together)
