"""An actor that makes a stage's stream of packs for each group of workers that begins.

Ray Train asks for the data of every group in a new process. This one is there from the run's beginning: it has imported all that
a stream is made of before a group has failed. It knows nothing of what is learned, so that it is there soon; who calls it
imports this file, which therefore imports little.
"""

from __future__ import annotations

import importlib
import pickle
from typing import TYPE_CHECKING, Any

from pipelines.garbage import collect_rarely, collect_usually
from pipelines.value import spec

if TYPE_CHECKING:
    from cluster.job import StageJob
    from pipelines.place import Place
    from pipelines.windows import Pools, Stream


@spec
class Dealt:
    """What a stage's packs are dealt by: its stream, the folder of its checkpoints and whose they must be, the actors that make
    packs, the logical CPUs that each trainer holds, and how many trainers share a pack.
    """

    stream: Stream
    checkpoints: Place
    fingerprint: str
    pools: Pools
    cpus: float
    context: int


class Dealer:
    """The actor."""

    def __init__(self) -> None:
        collect_rarely()
        for name in ("cluster.checkpoint", "pipelines.stream"):
            importlib.import_module(name)  # now, and not when a group waits for its packs
        collect_usually()
        self.ahead: tuple[_Asked, list[Any]] | None = None

    def foresee(self, what: bytes, world: int) -> None:
        """Make the iterators that the next group is likely to ask for, and what they wait for, while Ray Train begins it."""
        _beckon()
        asked = _asked(what, world)
        self.ahead = asked, _made(asked)

    def splits(self, what: bytes, world: int) -> list[Any]:
        """Ray Data's iterators for `world` ranks, from the stage's last checkpoint on; `what` is as `dumped` gives it."""
        ahead, self.ahead = self.ahead, None  # what another group has begun to read is not given twice
        asked = _asked(what, world)  # workers whose controller was lost may have saved since
        return ahead[1] if ahead and ahead[0] == asked else _made(asked)


@spec
class _Asked:
    """What decides a group's packs: those of a stage, where they begin, and the actors that make them as the cluster is now."""

    what: bytes
    world: int
    begin: Place | None
    pools: Pools


def _asked(what: bytes, world: int) -> _Asked:
    from cluster import checkpoint
    from pipelines import storage

    dealt: Dealt = pickle.loads(what)
    storage.use(dealt.stream.storage)
    found = checkpoint.newest(dealt.checkpoints, dealt.fingerprint, dealt.stream.order.fingerprint)
    pools = dealt.pools.within(_cluster_cpus() - dealt.cpus * world)
    return _Asked(what=what, world=world, begin=found.folder if found else None, pools=pools)


def _made(asked: _Asked) -> list[Any]:
    from cluster import checkpoint
    from cluster.local import divert_ray_logging
    from pipelines.stream import dataset
    from pipelines.types import Position

    dealt: Dealt = pickle.loads(asked.what)
    divert_ray_logging()
    start = checkpoint.read_state(asked.begin).position if asked.begin else Position()
    hands = dataset(dealt.stream, start, dealt.stream.windows, asked.pools, asked.world, dealt.context)
    return hands.streaming_split(asked.world, equal=False)


def _beckon() -> None:
    """Start the actors that Ray Train waits for before it begins a group, and Ray Data before it begins a stream: there is one of
    each in a cluster, which whoever needs it first starts.
    """
    from ray.data._internal import stats  # developers' interfaces of Ray's
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator

    coordinator.get_or_create_autoscaling_coordinator()
    stats.get_or_create_stats_actor()


def _cluster_cpus() -> float:
    """Logical CPUs of all nodes that are alive, whoever holds them."""
    import ray

    return sum(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"])


def dumped(job: StageJob, pools: Pools, cpus: float) -> bytes:
    """A stage whose trainers hold `cpus` each, for who hands it on to a dealer and need not import what it is made of."""
    from cluster.fsdp import context_of

    dealt = Dealt(
        stream=job.stream,
        checkpoints=job.checkpoints,
        fingerprint=job.fingerprint,
        pools=pools,
        cpus=cpus,
        context=context_of(job.stage.parallel),
    )
    return pickle.dumps(dealt)


def start_dealer() -> Any:
    """The actor, on this node, beside the run's driver."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options: Any = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    return ray.remote(Dealer).options(**options).remote()
