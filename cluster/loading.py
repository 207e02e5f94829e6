"""Tensors out of a checkpoint: into what asks for them, resharded, or as a whole model."""

from __future__ import annotations

import warnings
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from cluster.checkpoint import INDEX, CorruptCheckpoint, checked
from cluster.shards import Index, LoadPlanner, ShardReader, parse_index
from mllm.model import Model
from mllm.recipe import Recipe, Stage
from mllm.tune import add_adapters, merge_adapters
from pipelines.place import Place


def load(folder: Place, state: dict[str, Any], alone: bool = False) -> None:
    """Fill the tensors of `state` from a checkpoint, resharded to whoever asks; nothing else of it is read.

    A collective, unless there is no process group or it is said that this rank reads `alone`. Raises CorruptCheckpoint, on every
    rank alike, as soon as one rank reads a byte that was not written.
    """
    alone = alone or not dist.is_initialized()

    def index() -> Index:
        return parse_index(checked(folder, INDEX))

    planner = LoadPlanner()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "torch.distributed is disabled"
            )  # it is meant to be, where one process loads
            dcp_load(state, storage_reader=ShardReader(folder, index), planner=planner, no_dist=alone)
    except CheckpointException as error:
        raise _cause(error) from error
    planner.finish()


def _cause(error: CheckpointException) -> BaseException:
    """What went wrong on the first rank where something did; that bytes are not what they were goes before all else."""
    causes = [error.failures[rank][0] for rank in sorted(error.failures)]
    return next((cause for cause in causes if isinstance(cause, CorruptCheckpoint)), causes[0])


def read_model(recipe: Recipe, stage: Stage, folder: Place, merge: bool = True) -> Model:
    """The model that `stage` left in the checkpoint `folder`, whole, on CPU, float32, its adapters merged if that is wished.

    A checkpoint holds all weights, frozen ones too: those that the recipe's parts name need not be there.
    """
    model = recipe.model_of(stage).empty()
    adapted = add_adapters(model, stage.tune)
    state = {"model": model.state_dict()}
    load(folder, state, alone=True)
    model.load_state_dict(state["model"])
    if adapted and merge:
        merge_adapters(model)
    return model.requires_grad_(True)
