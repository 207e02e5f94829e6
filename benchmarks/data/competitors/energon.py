"""Megatron-Energon: the tars with the metadata of `energon prepare`, a task encoder that gets the raw bytes."""
# megatron.energon is in the competitors' environment only:
# pyright: reportMissingImports=false

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.energon import (
    CaptioningSample,
    DefaultTaskEncoder,
    WorkerConfig,
    get_loader,
    get_train_dataset,
    stateless,
)

from benchmarks.data.corpus import SHARD_ROWS, repeated, shards
from benchmarks.data.work import BATCH, WORKERS, Batch, collate, prepared


def prepare(corpus: Path, _rows: int) -> None:
    """The tars under another folder, by links, with the metadata beside them. Its loader goes round them without a seam."""
    folder = corpus / "energon"
    if (folder / ".nv-meta" / "dataset.yaml").is_file():
        return
    repeated(corpus / "tar", folder, SHARD_ROWS * len(shards(corpus / "tar")))
    command = [
        sys.executable,
        "-m",
        "megatron.energon.cli.main",
        "prepare",
        str(folder),
        "--non-interactive",
        "--no-progress",
    ]
    command += ["--split-ratio", "1,0,0", "--sample-type", "CaptioningSample", "--num-workers", str(WORKERS)]
    command += ["--field-map", '{"image": "jpg", "caption": "txt"}', "--force-overwrite"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


class Encoder(DefaultTaskEncoder):
    decoder = None  # raw bytes: decoding is `prepared`'s work

    @stateless
    def encode_sample(self, sample: CaptioningSample) -> Any:
        return prepared(bytes(sample.image), sample.caption)

    @stateless
    def batch(self, samples: list[Any]) -> Any:
        return collate(samples)


def batches(corpus: Path) -> Iterator[Batch]:
    dataset = get_train_dataset(
        str(corpus / "energon"),
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=WORKERS),
        batch_size=BATCH,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Encoder(),
    )
    yield from get_loader(dataset)
