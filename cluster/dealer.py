"""An actor that deals a stage's stream of packs to each group of workers that begins.

Ray Train begins a group without asking the run's driver. The actor is there from the run's beginning and imports nothing until
training goes on, when there is time for it: what the first group needs the driver makes, which has imported all that a stream is
made of. A group that begins in place of one that failed finds the actor ready. It knows nothing of what is learned; who calls it
imports this file, which therefore imports little.
"""

from __future__ import annotations

import importlib
import pickle
from typing import TYPE_CHECKING, Any

from pipelines.garbage import collect_rarely, collect_usually
from pipelines.reach import Storage, use
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
    """The actor. Splits are Ray Data's iterators, one for each rank, as a list that holds a reference to the list of them: who
    hands them on need not import what they are made of.
    """

    def __init__(self) -> None:
        self.ahead: tuple[Asked, list[Any]] | None = None
        self.held: Any = None

    def ready(self) -> None:
        """Import all that a stream is made of: now, and not when a group waits for its packs."""
        collect_rarely()
        for name in ("cluster.checkpoint", "pipelines.stream"):
            importlib.import_module(name)
        collect_usually()

    def keep(self, asked: Asked, splits: list[Any]) -> None:
        """Deal these `splits` to the next group, if what decides them is the same then.

        It is the first of a new controller of Ray Train's; what a lost one's workers held nobody else gives back.
        """
        from ray.util import remove_placement_group

        self.ahead = asked, splits
        held, self.held = self.held, None
        if held is not None:
            remove_placement_group(held)  # no harm where Ray Train has done it

    def holds(self, held: Any) -> None:
        """A group has begun whose workers hold this placement group."""
        self.held = held

    def splits(self, what: bytes, world: int) -> list[Any]:
        """Splits for `world` ranks, from the stage's last checkpoint on; `what` is as `dumped` gives it."""
        ahead, self.ahead = self.ahead, None  # what another group has begun to read is not given twice
        if ahead:
            asked, splits = ahead
            if asked == _asked(what, world, asked.checkpoints, asked.storage):
                return splits
        return _made(what, world, _cluster_cpus())

    def end(self, splits: list[Any]) -> None:
        """Stop making what a group that is no more would have read."""
        import ray

        first, *_ = ray.get(splits[0])
        first._coord_actor.shutdown_executor.remote()  # as Ray Train does it, for there is no other word for it


@spec
class Asked:
    """What decides a group's packs: a stage's stream, the ranks, the cluster's CPUs, and what there is in the folder of the
    stage's checkpoints: workers whose controller was lost may have saved since.
    """

    what: bytes
    world: int
    cpus: float
    checkpoints: Place
    storage: Storage
    saved: tuple[str, ...]


def _asked(what: bytes, world: int, checkpoints: Place, storage: Storage) -> Asked:
    """As it is now. Imports nothing that a stream is made of."""
    use(storage)
    return Asked(
        what=what,
        world=world,
        cpus=_cluster_cpus(),
        checkpoints=checkpoints,
        storage=storage,
        saved=tuple(checkpoints.names()),
    )


def foresee(dealer: Any, what: bytes, world: int) -> None:
    """Make in this process the splits that the next group is likely to ask for, while Ray Train begins it."""
    dealt: Dealt = pickle.loads(what)
    asked = _asked(what, world, dealt.checkpoints, dealt.stream.storage)
    dealer.keep.remote(asked, _made(what, world, asked.cpus))


def _made(what: bytes, world: int, cpus: float) -> list[Any]:
    import ray

    from cluster import checkpoint
    from cluster.local import divert_ray_logging
    from pipelines.stream import dataset
    from pipelines.types import Position

    dealt: Dealt = pickle.loads(what)
    stream = dealt.stream
    divert_ray_logging()
    use(stream.storage)
    found = checkpoint.newest(dealt.checkpoints, dealt.fingerprint, stream.order.fingerprint)
    start = checkpoint.read_state(found.folder).position if found else Position()
    pools = dealt.pools.within(cpus - dealt.cpus * world)
    hands = dataset(stream, start, stream.windows, pools, world, dealt.context)
    return [ray.put(hands.streaming_split(world, equal=False))]


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
    from cluster.mesh import context_of

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
    """The actor, on this node, beside the run's driver; and those that Ray Train and Ray Data would wait for."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options: Any = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    dealer = ray.remote(Dealer).options(**options).remote()
    _beckon()
    return dealer
