"""mosaicml-streaming: MDS shards on local disk through StreamingDataset, in order."""
# streaming is in the competitors' environment only:
# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from benchmarks.data.corpus import SHARD_ROWS, link, read, shards
from benchmarks.data.work import BATCH, WORKERS, Batch, Row, collate, prepared, repeated_index

# The package's own __init__ imports torchvision, whose wheel does not fit the CPU build of torch; its core does not.
found = importlib.util.find_spec("streaming")
assert found is not None
sys.modules["streaming"] = importlib.util.module_from_spec(found)

from streaming.base import MDSWriter, StreamingDataset  # noqa: E402 -- after the above
from streaming.base.util import clean_stale_shared_memory  # noqa: E402 -- likewise


def prepare(corpus: Path, rows: int) -> None:
    """MDS shards of as many rows as the tars have, then linked as often as the tars are."""
    once, many = corpus / "mds", corpus / "mds-many"
    if not (once / "index.json").is_file():
        shutil.rmtree(once, ignore_errors=True)
        with MDSWriter(out=str(once), columns={"jpg": "bytes", "txt": "str"}, size_limit=2**24) as out:
            for uri in shards(corpus / "tar"):
                for _, picture, caption in read(uri):
                    out.write({"jpg": picture, "txt": caption.decode()})
    shutil.rmtree(many, ignore_errors=True)
    many.mkdir()
    listed: list[dict[str, Any]] = []
    own = json.loads((once / "index.json").read_text())["shards"]
    times = -(-rows // sum(shard["samples"] for shard in own))
    for number, shard in enumerate(islice(cycle(own), times * len(own))):
        name = f"shard.{number:05d}.mds"
        link(once / shard["raw_data"]["basename"], many / name)
        listed.append({**shard, "raw_data": {**shard["raw_data"], "basename": name}})
    repeated_index(once / "index.json", "shards", listed, many / "index.json")


class Rows(StreamingDataset):
    def __getitem__(self, at: int) -> Row:  # pyright: ignore[reportIncompatibleMethodOverride]
        sample = super().__getitem__(at)
        return prepared(sample["jpg"], sample["txt"])


def batches(corpus: Path) -> Iterator[Batch]:
    clean_stale_shared_memory()
    dataset = Rows(local=str(corpus / "mds-many"), batch_size=BATCH, shuffle=False, predownload=SHARD_ROWS)
    yield from DataLoader(dataset, batch_size=BATCH, num_workers=WORKERS, collate_fn=collate)
