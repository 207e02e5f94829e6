"""A group of workers as Ray Train begins and ends it, without what a run does not need of that.

Ray Train's trainer for torch has its controller, which only begins, watches and ends groups, import torch first. It begins an
actor that would split datasets, where the run's dealer has split them. And it begins one that gives a lost controller's resources
back, which asks the dashboard whether the controller lives: where there is none it gives nothing back, and never ends; the dealer
does it here. Each is a process that imports for seconds while the workers are to start. Ray Train's controller imports this file:
it must import little.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import ray
from ray.exceptions import GetTimeoutError
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig

# Developers' interfaces of Ray's, as this release has them.
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.data_integration.interfaces import DatasetShardMetadata
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.util import TrainingFramework
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

PATIENCE = timedelta(minutes=30)
"""How long a collective may take, which is Ray Train's own word for torch; a rank that hangs is found sooner."""

FAREWELL = 30.0
"""Seconds that the ranks of a group have to part."""


class Trainer(DataParallelTrainer):
    """Ray Train's trainer, which begins no process that does nothing for the run. Give it `Dealing` among its callbacks."""

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        idle = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [each for each in super()._create_default_callbacks() if not isinstance(each, idle)]


# -- the packs ---------------------------------------------------------------------------------------------------------


class Dealing(WorkerGroupCallback):
    """Has `dealer` deal the stage's packs to each group that begins, from the last checkpoint on; `what` is as `dumped` gives it.

    Ray Train asks in its controller's process, with the group's size. Its own split is `equal=True`, which drops rows, and knows
    no position.
    """

    def __init__(self, dealer: Any, what: bytes) -> None:
        self.dealer = dealer
        self.what = what
        self.splits: Any = None

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        self.splits = self.dealer.splits.remote(self.what, len(workers))
        return {"dataset_shard_provider": [Splits(self.splits)] * len(workers)}

    def after_worker_group_start(self, worker_group: Any) -> None:
        super().after_worker_group_start(worker_group)
        held = worker_group.get_worker_group_state().placement_group_handle.placement_group
        self.dealer.holds.remote(held)

    def after_worker_group_shutdown(self, worker_group_context: object) -> None:  # noqa: ARG002 -- Ray's
        self._end()

    def after_worker_group_abort(self, worker_group_context: object) -> None:  # noqa: ARG002 -- Ray's
        self._end()

    def _end(self) -> None:
        if self.splits is not None:
            self.dealer.end.remote(
                self.splits
            )  # the actors that make packs give their CPUs back before others ask for them
        self.splits = None


class Splits:
    """What Ray Train asks for a rank's data, in its worker's process."""

    def __init__(self, splits: Any) -> None:
        self.splits = splits

    def get_dataset_shard(self, dataset_info: DatasetShardMetadata) -> Any:
        (splits,) = ray.get(self.splits)
        return ray.get(splits)[dataset_info.world_rank]


# -- the processes -----------------------------------------------------------------------------------------------------


@dataclass
class Meeting(BackendConfig):
    """That the ranks' processes form torch's process group, by `backend`, before they train."""

    backend: Literal["gloo", "nccl"]

    @property
    def backend_cls(self) -> type[Processes]:
        return Processes

    @property
    def train_func_context(self) -> Any:
        return on_its_device

    @property
    def framework(self) -> TrainingFramework:
        """What the dashboard calls it."""
        return TrainingFramework.TORCH

    def to_dict(self) -> dict[str, Any]:
        return {"backend": self.backend}


class Processes(Backend):
    """How they meet and part: as Ray Train's own backend for torch has it, which the controller would import torch for."""

    share_cuda_visible_devices = True  # ranks of a node must see one another's GPUs

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, Meeting)
        address, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(meet, backend_config.backend, address, port)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:  # noqa: ARG002 -- Ray's
        if len(worker_group) > 1:
            with suppress(GetTimeoutError):  # their processes are ended all the same
                ray.get(worker_group.execute_async(part), timeout=FAREWELL)


def meet(backend: Literal["gloo", "nccl"], address: str, port: int) -> None:
    """Join the group whose rank 0 listens at `address`; torch and others read the environment besides. In a worker's process."""
    import ray.train
    import torch.distributed as dist

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    told = {
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
        "RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_RANK": context.get_local_rank(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        "NODE_RANK": context.get_node_rank(),
    }
    os.environ.update({name: str(value) for name, value in told.items()})
    if backend == "nccl" and "TORCH_NCCL_BLOCKING_WAIT" not in os.environ:
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")  # a collective that is given up ends its process
    dist.init_process_group(backend, init_method="env://", rank=rank, world_size=world, timeout=PATIENCE)


def part() -> None:
    """Leave the group. In a worker's process."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def on_its_device() -> Iterator[None]:
    """Training happens in a thread of its own, and which GPU is meant by default is a thread's word."""
    import torch

    if torch.cuda.is_available():
        import ray.train.torch

        torch.cuda.set_device(ray.train.torch.get_device())
    yield
