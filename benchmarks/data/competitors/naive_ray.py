"""Ray Data as its documentation shows it: `read_webdataset`, `map_batches`, `iter_torch_batches`; order as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
import torch

from benchmarks.data.corpus import shards
from benchmarks.data.work import BATCH, WORKERS, Batch, collate, prepared


def rows(batch: Any) -> Any:
    collated = collate(prepared(*pair) for pair in zip(batch["jpg"], batch["txt"], strict=True))
    longest = torch.zeros(len(batch["jpg"]), LONGEST, dtype=torch.int64)
    longest[:, : collated["tokens"].shape[1]] = collated["tokens"]
    return {
        "pixels": collated["pixels"].numpy(),
        "tokens": longest.numpy(),
        "lengths": collated["lengths"].numpy(),
    }


LONGEST = 2048
"""Batches that are joined need equal shapes, so tokens are padded to more than the longest caption."""


def batches(corpus: Path) -> Iterator[Batch]:
    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.read_webdataset(shards(corpus / "many"), decoder=None, include_paths=False)
    mapped = dataset.map_batches(rows, batch_size=BATCH)
    for batch in mapped.iter_batches(batch_size=BATCH, batch_format="numpy"):
        tensors = {name: torch.as_tensor(np.ascontiguousarray(value)) for name, value in batch.items()}
        yield Batch(pixels=tensors["pixels"], tokens=tensors["tokens"], lengths=tensors["lengths"])
