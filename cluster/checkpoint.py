"""Checkpoints: DCP shards that any number of workers can load, and a manifest written last.

runs/NAME/checkpoints/STAGE/step-000040/
    __0_0.distcp ...   weights and optimiser, sharded
    state.json         TrainState: step, tokens, progress, position in the data, tally of rows
    manifest.json      Manifest: there only when everything else is
"""

from __future__ import annotations

import shutil
import warnings
from dataclasses import field, replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from mllm.encoders import Folder
from mllm.recipe import Recipe, Stage
from mllm.tune import add_adapters, merge_adapters
from mllm.vlm import VisionLanguageModel
from pipelines.place import Place
from pipelines.types import Position, spec


@spec
class ShardTally:
    """Rows of one shard that were met and dropped so far."""

    seen: int = 0
    dropped: int = 0


@spec
class TrainState:
    """Where a stage stands after `step` steps; `position` is the next pack to train on.

    `recent` are loss and gradient norm of the last steps that were taken, as far as a guard against spikes looks back.
    """

    step: int = 0
    tokens: int = 0
    progress: float = 0.0
    position: Position = Position()
    shards: dict[str, ShardTally] = field(default_factory=dict)
    recent: tuple[tuple[float, float], ...] = ()

    def advanced(self, tokens: int, progress: float, position: Position, shards: dict[str, ShardTally]) -> TrainState:
        return replace(
            self, step=self.step + 1, tokens=self.tokens + tokens, progress=progress, position=position, shards=shards
        )


@spec
class Manifest:
    """What a checkpoint is of. `fingerprint` names the stage, `order` the data's order, `world` the ranks that wrote it."""

    run: str
    stage: str
    fingerprint: str
    order: str
    step: int
    world: int
    final: bool
    versions: dict[str, str]


@cache
def _manifests() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


@cache
def _states() -> TypeAdapter[TrainState]:
    return TypeAdapter(TrainState)


def save(place: Place, state: dict[str, Any], at: TrainState, manifest: Manifest, keep: int = 2) -> Place:
    """Write `folder/step-N`, all ranks together, and drop all but the `keep` newest whole checkpoints.

    Half-written ones have no manifest and another name, and are never read.
    """
    folder = place.path
    final, scratch = folder / f"step-{at.step:06d}", folder / f".step-{at.step:06d}.part"
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    dist.barrier()
    dcp_save(state, checkpoint_id=str(scratch), no_dist=False)
    if first:
        (scratch / "state.json").write_bytes(_states().dump_json(at, indent=1))
        (scratch / "manifest.json").write_bytes(_manifests().dump_json(manifest, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        scratch.rename(final)
        for old in checkpoints(place)[:-keep]:
            old.remove()
    dist.barrier()
    return Place(final)


def checkpoints(folder: Place) -> list[Place]:
    """Whole checkpoints of a stage, oldest first."""
    return [
        folder / name
        for name in folder.names()
        if name.startswith("step-") and (folder / name / "manifest.json").is_file()
    ]


def latest(folder: Place, fingerprint: str, order: str) -> Place | None:
    """The newest whole checkpoint of the stage.

    Raises ValueError when it was written by another stage or another order: going on from it would change what was learned.
    """
    found = checkpoints(folder)
    if not found:
        return None
    manifest = read_manifest(found[-1])
    if manifest.fingerprint != fingerprint:
        raise ValueError(
            f"{found[-1]} belongs to stage {manifest.fingerprint} and the recipe now says {fingerprint}: "
            "the recipe was changed; train under another --run, or put the recipe back"
        )
    if manifest.order != order:
        raise ValueError(
            f"{found[-1]} follows the data order {manifest.order} and the corpora now give {order}: a shard was changed, "
            "added or removed; put it back, or train under another --run"
        )
    return found[-1]


def read_manifest(folder: Place) -> Manifest:
    return _manifests().validate_json((folder / "manifest.json").read_bytes())


def read_state(folder: Place) -> TrainState:
    return _states().validate_json((folder / "state.json").read_bytes())


def load(folder: Place, state: dict[str, Any], alone: bool = False) -> None:
    """Fill the tensors of `state` from a checkpoint, resharded to whoever asks.

    A collective, unless there is no process group or it is said that this rank reads `alone`.
    """
    alone = alone or not dist.is_initialized()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it is meant to be, where one process loads
        dcp_load(state, checkpoint_id=str(folder), no_dist=alone)


def read_model(recipe: Recipe, stage: Stage, folder: Place, weights: Folder) -> VisionLanguageModel:
    """The model that `stage` left in the checkpoint `folder`, whole, on CPU, float32, its adapters merged.

    `weights` finds what the recipe's parts name, for whatever the checkpoint does not hold.
    """
    torch.manual_seed(recipe.seed)
    model = recipe.model.build(weights)
    adapted = add_adapters(model, stage.tune)
    state = {"model": model.state_dict()}
    load(folder, state, alone=True)
    model.load_state_dict(state["model"])
    if adapted:
        merge_adapters(model)
    return model.requires_grad_(True)
