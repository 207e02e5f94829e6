"""A Ray of this machine alone, without the processes that would serve others.

`ray.init` begins a server of the dashboard's API where no dashboard is wanted too, and waits until it answers; a monitor for an
autoscaler, of which there is none here; and one that carries the workers' output to the driver, which keeps its own. Half of the
time that such a Ray needs to be there is theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Developers' interfaces of Ray's, as this release has them.
from ray._private.node import Node
from ray._private.parameter import RayParams


class _Alone(Node):
    def start_api_server(self, **_: Any) -> None:
        """Nobody asks it."""

    def start_log_monitor(self) -> None:
        """Nobody listens to it."""


@contextmanager
def alone(cpus: int, object_store: int) -> Iterator[str]:
    """The address of a Ray with `cpus` logical CPUs and so many bytes of shared memory, which ends with this process at the
    latest.
    """
    wanted = RayParams(num_cpus=cpus, object_store_memory=object_store, include_dashboard=False, no_monitor=True)
    node = _Alone(wanted, head=True, shutdown_at_exit=False, spawn_reaper=True, ray_init_cluster=True)
    try:
        assert node.address
        yield node.address
    finally:
        node.kill_all_processes(check_alive=False, allow_graceful=True)
