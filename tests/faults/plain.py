"""What a restart costs without any of this: Ray Train alone, the same model, the same workers, a checkpoint by torch.save.

python -m tests.faults.plain ADDRESS RECIPE STEPS_FILE FEWEST MOST RESIZE

Batches are made up by an actor of Ray Data that has imported what decodes and tokenises.
Each step leaves a line: when, which step, the process that wrote it, the number of workers. RESIZE are the seconds
between two looks for more workers.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def train(config: dict[str, Any]) -> None:
    """Steps of the recipe's language model on made-up batches."""
    import ray.train
    import torch
    from ray.train import Checkpoint
    from ray.train.torch import prepare_model
    from transformers import AutoModelForCausalLM

    from mllm.recipes import by_name

    built = by_name(config["recipe"]).vlm.build()
    model = AutoModelForCausalLM.from_config(built.lm.model.config, attn_implementation="sdpa")
    resumed = ray.train.get_checkpoint()
    first = 0
    if resumed:
        with resumed.as_directory() as folder:
            saved = torch.load(Path(folder) / "state.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        first = saved["step"]
    copies = prepare_model(model)
    optimizer = torch.optim.AdamW(copies.parameters())
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    for step, ids in zip(range(first, 10_000), batches(), strict=False):
        copies(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            with Path(config["steps"]).open("a") as out:
                out.write(f"{time.time()} {step} {os.getpid()} {world}\n")
        if (step + 1) % 5 == 0:
            with tempfile.TemporaryDirectory() as folder:
                torch.save({"model": model.state_dict(), "step": step + 1}, Path(folder) / "state.pt")
                ray.train.report({"step": step}, checkpoint=Checkpoint.from_directory(folder) if rank == 0 else None)


def batches() -> Iterator[Any]:
    """Token ids int64 (4, 256), without end."""
    import ray.train

    shard = ray.train.get_dataset_shard("train")
    assert shard
    for batch in shard.iter_torch_batches(batch_size=4):
        yield batch["ids"]


class Tokenise:
    """Imports what a preprocessor of pictures and words imports, and makes rows up."""

    def __init__(self) -> None:
        import simplejpeg  # noqa: F401 -- to have it imported is what this is for
        import tokenizers  # noqa: F401
        import torch  # noqa: F401

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        return {"ids": np.random.default_rng(0).integers(0, 100, (len(batch["id"]), 256))}


def main(address: str, recipe: str, steps: str, fewest: str, most: str, resize: str) -> None:
    """Train on the cluster at `address` until this process is ended."""
    from cluster.local import QUIET

    os.environ.update(QUIET)  # the same intervals at which Ray looks after its workers
    import ray
    import ray.data
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(address=address, log_to_driver=False)
    # Trainers fill the smallest of clusters, and what makes rows must run all the same: no task that reads, an actor without CPU.
    numbers = ray.data.from_items([{"id": number} for number in range(100_000)])
    rows = numbers.map_batches(Tokenise, concurrency=1, batch_size=64, num_cpus=0)
    TorchTrainer(
        train,
        train_loop_config={"recipe": recipe, "steps": steps},
        datasets={"train": rows},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=int(most) if fewest == most else (int(fewest), int(most)),
            elastic_resize_monitor_interval_s=float(resize),
        ),
        run_config=ray.train.RunConfig(
            name=Path(steps).stem,  # given again, it goes on from what it kept
            storage_path=str(Path(steps).parent / "plain"),
            failure_config=ray.train.FailureConfig(max_failures=99),
        ),
    ).fit()


if __name__ == "__main__":
    main(*sys.argv[1:])
