"""The faults: what is done to a running stage, and what must be put right again by hand of the rig (never by a person).

Each is a function of a rig, a random generator and the stage that is being trained. It returns when the fault has happened; that
the run recovers is what the suite looks at. `Fault.after` puts the surroundings back for the next one: a node that was lost is
replaced, as a cluster's autoscaler would.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import psutil

from cluster import checkpoint
from pipelines.place import Place
from tests.faults.rig import Rig

Act = Callable[[Rig, random.Random, str], object]

Death = Literal["worker", "node", "drain", "driver", "SIGTERM", "head"]
"""What a plain Ray Train run is put through as well. Where Ray's own controller dies, its driver must be given again."""


@dataclass(frozen=True)
class Fault:
    """`what` names it in the table. `restarts` tells those after which a new group of workers must begin; `ends` is the exit code
    of those that end the whole run, which then is started again by who started it. `like` is the death of which a plain Ray
    Train restart is measured beside it, and `groups` how many groups of workers must begin before one gets on. `lasts` are the
    seconds that the fault itself takes; of one that `hides`, nothing shows until it is looked for, and Ray Train never looks.
    """

    what: str
    act: Act
    restarts: bool = True
    after: Callable[[Rig], object] = lambda _: None
    ends: int | None = None
    like: Death = "worker"
    groups: int = 1
    lasts: float = 0.0
    hides: bool = False


def kill_worker(rig: Rig, rng: random.Random, _: str) -> None:
    rig.pick(rng, "RayTrainWorker").kill()


def kill_preprocessor(rig: Rig, rng: random.Random, _: str) -> None:
    rig.pick(rng, "MapWorker").kill()


def stop_worker(rig: Rig, rng: random.Random, _: str) -> None:
    """SIGSTOP: the process is there, and does nothing any more."""
    rig.pick(rng, "RayTrainWorker").suspend()


def starve_worker(rig: Rig, rng: random.Random, _: str) -> None:
    """No more memory for one worker: what it asks the kernel for is refused, as in a container at its limit.

    One that gets along for `STARVED` seconds, with what it has set free itself, is killed as the kernel's own killer does.
    """
    worker = rig.pick(rng, "RayTrainWorker")
    used = worker.memory_info().vms
    worker.rlimit(psutil.RLIMIT_AS, (used, used))
    with suppress(psutil.TimeoutExpired):
        worker.wait(STARVED)
        return
    worker.kill()


STARVED = 20.0


def lose_node(rig: Rig, rng: random.Random, _: str) -> None:
    rig.kill_node(rng.choice(rig.training_nodes()))


def drain_node(rig: Rig, rng: random.Random, _: str) -> None:
    """The notice that a spot instance gets, 20 s before it is taken away; then it is."""
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue] -- compiled; Ray has no public call for it

    node = rng.choice(rig.training_nodes())
    deadline = int((time.time() + 20) * 1000)
    client = GcsClient(address=rig.cluster.address)
    client.drain_node(node.node_id, 2, "spot instance reclaimed", deadline)

    def gone() -> None:
        time.sleep(20)
        rig.kill_node(node)

    rig.background = threading.Thread(target=gone)
    rig.background.start()


def replace_node(rig: Rig) -> None:
    if rig.background is not None:
        rig.background.join()
    rig.add_node()


def ask_driver(rig: Rig, _: random.Random, __: str) -> None:
    rig.driver().send_signal(signal.SIGTERM)


def kill_driver(rig: Rig, _: random.Random, __: str) -> None:
    rig.driver().kill()


def kill_ray_controller(rig: Rig, rng: random.Random, _: str) -> None:
    rig.pick(rng, "TrainController").kill()


def new_cluster(rig: Rig, _: random.Random, __: str) -> None:
    """The head dies with all its nodes; some seconds later another cluster answers at its address."""
    count = len(rig.nodes)
    rig.stop_cluster()
    time.sleep(3)
    rig.start_cluster()
    for _node in range(count):
        rig.add_node()


def refuse(rig: Rig, _: random.Random, __: str) -> None:
    """Storage refuses all connections for 20 s."""
    _storage(rig, "refuse", 20)


def storm(rig: Rig, _: random.Random, __: str) -> None:
    _storage(rig, "storm", 20)


def slow(rig: Rig, _: random.Random, __: str) -> None:
    _storage(rig, "slow", 20)


def truncate(rig: Rig, _: random.Random, __: str) -> None:
    _storage(rig, "truncate", 10)


def _storage(rig: Rig, fault: str, seconds: float) -> None:
    assert rig.proxy, "this fault is one of S3"
    rig.proxy.otherwise = fault
    time.sleep(seconds)
    rig.proxy.otherwise = ""


def refuse_checkpoint(rig: Rig, _: random.Random, stage: str) -> None:
    """Storage goes away in the middle of a checkpoint, for 20 s."""
    folder = rig.results.checkpoints(stage)
    before = set(folder.names())
    rig.wait_for(lambda: bool(set(folder.names()) - before), pause=0.02)
    _storage(rig, "refuse", 20)


def corrupt_checkpoint(rig: Rig, rng: random.Random, stage: str) -> None:
    """A bit of the newest checkpoint flips, and a worker dies."""
    folder = rig.results.checkpoints(stage)
    rig.wait_for(lambda: bool(checkpoint.checkpoints(folder)))
    newest = checkpoint.checkpoints(folder)[-1]
    shard = newest / next(name for name in newest.names() if not name.endswith(".json"))
    flip(shard, rng)
    kill_worker(rig, rng, stage)


def flip(file: Place, rng: random.Random) -> None:
    """Change one bit of a file."""
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write(bytes(data))


def second_controller(rig: Rig, _: random.Random, __: str) -> None:
    """Another person starts the same run: it must be refused with words, and the first one not notice."""
    command = [
        sys.executable,
        "-m",
        "cluster.cli",
        "train",
        rig.recipe,
        "--site",
        str(rig.site_file()),
        "-s",
        *rig.changes,
    ]
    other = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert other.returncode == 2, other.stdout + other.stderr
    assert "is being driven by process" in other.stderr, other.stderr


def fill_store(rig: Rig, _: random.Random, __: str) -> None:
    """Somebody else's objects fill the object stores of all nodes to nine tenths for 15 s."""
    script = textwrap.dedent("""
        import sys, time
        import numpy as np, ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
        ray.init(address=sys.argv[1], log_to_driver=False)

        @ray.remote(num_cpus=0)
        class Hoard:
            def fill(self, size):
                self.held = [ray.put(np.zeros(2**22, np.uint8)) for _ in range(int(size) // 2**22)]

        hoards = []
        for node in ray.nodes():
            if node["Alive"]:
                hoard = Hoard.options(scheduling_strategy=On(node["NodeID"], soft=False)).remote()
                hoards.append(hoard.fill.remote(0.9 * node["Resources"]["object_store_memory"]))
        ray.get(hoards)
        time.sleep(15)
    """)
    subprocess.run([sys.executable, "-c", script, rig.cluster.address], timeout=180, check=True, capture_output=True)


LONG_RUN: tuple[Fault, ...] = (
    Fault("SIGKILL of a worker", kill_worker),
    Fault("SIGKILL of a preprocessing actor", kill_preprocessor, restarts=False),
    Fault("loss of a node", lose_node, after=replace_node, like="node"),
    Fault("drain of a node, 20 s notice", drain_node, after=replace_node, like="drain"),
    Fault("SIGTERM to the driver", ask_driver, ends=143, like="SIGTERM"),
    Fault("SIGKILL of the driver", kill_driver, like="driver"),
    Fault("SIGKILL of Ray Train's controller", kill_ray_controller, like="driver"),
    Fault("head killed, new cluster", new_cluster, like="head"),
    Fault("SIGSTOP of a worker", stop_worker, hides=True),
    Fault("S3 refuses connections, 20 s", refuse, restarts=False, lasts=20),
    Fault("S3 answers 503 to two thirds, 20 s", storm, restarts=False, lasts=20),
    Fault("S3 answers a second late, 20 s", slow, restarts=False, lasts=20),
    Fault("S3 cuts bodies short, 10 s", truncate, restarts=False, lasts=10),
    Fault("S3 refuses in a checkpoint, 20 s", refuse_checkpoint, restarts=False, lasts=20),
    Fault("newest checkpoint corrupt, worker killed", corrupt_checkpoint, groups=2),
    Fault("two controllers", second_controller, restarts=False),
    Fault("a worker has no more memory", starve_worker, hides=True),
    Fault("object store nearly full, 15 s", fill_store, restarts=False, lasts=15),
)
"""What one run goes through in each of its stages, in an order drawn anew for each."""
