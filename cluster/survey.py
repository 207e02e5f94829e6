"""What every node of a cluster says of itself: versions, GPUs, whether it may write where the run will, and reads the corpora.

    survey(nodes, errand)      one Ray task pinned to each node, which holds no CPU and no GPU; a node that is silent is told, too

Tasks import nothing that takes long, so that a cluster with hundreds of nodes answers in seconds.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from cluster.versions import code, versions
from pipelines import storage
from pipelines.place import Place
from pipelines.storage import Storage
from pipelines.types import spec

ANSWER = 90.0
"""Seconds within which all nodes must have answered. A process of Ray's starts in a few, on a busy node in some more."""

PAYLOAD = 16 * 2**20
"""Bytes that each node writes to storage and reads again."""

GLANCE = 2**20
"""Bytes that are read of a corpus's first shard."""

HASTE = 10.0
"""Seconds after which storage is said not to answer: a run is more patient, a person who waits for a table is not."""


@spec
class Errand:
    """What a node is asked to do. `folders` are written to, `seen` are files that who asks has written there, or nothing where
    they need not be on one disk; `corpora` are the addresses of first shards by corpus.
    """

    storage: Storage
    folders: tuple[str, ...]
    seen: tuple[str, ...]
    corpora: dict[str, str]


@spec
class Gpu:
    """A GPU as its driver tells of it; bytes of memory."""

    name: str
    memory: int


@spec
class Rights:
    """What a node may do in a folder; bytes a second. `trouble` says why it may not. `exclusive` is whether a file that is there
    is left as it is by who creates it, `shared` whether the node sees what another machine has written.
    """

    folder: str
    trouble: str = ""
    exclusive: bool = True
    shared: bool = True
    writes: float = 0.0
    reads: float = 0.0


@spec
class Glance:
    """A look at a corpus's first shard; bytes a second."""

    corpus: str
    trouble: str = ""
    reads: float = 0.0


@spec
class NodeReport:
    """One node's answer. `trouble` is why there is none."""

    node: str
    trouble: str = ""
    host: str = ""
    versions: dict[str, str]
    code: str = ""
    gpus: tuple[Gpu, ...] = ()
    rights: tuple[Rights, ...] = ()
    corpora: tuple[Glance, ...] = ()


def survey(nodes: Sequence[dict[str, Any]], errand: Errand, seconds: float = ANSWER) -> list[NodeReport]:
    """Each node's answer, in the order of `nodes`, which are entries of `ray.nodes()`; those that are late have `trouble`."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    tasks = []
    names = [name_of(node, nodes) for node in nodes]
    for node, name in zip(nodes, names, strict=True):
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        work = ray.remote(report).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
        tasks.append(work.remote(name, errand))
    done, late = ray.wait(tasks, num_returns=len(tasks), timeout=seconds)
    for task in late:
        ray.cancel(task, force=True)
    return [
        _answer(task, name) if task in done else _none(name, seconds) for task, name in zip(tasks, names, strict=True)
    ]


def name_of(node: dict[str, Any], nodes: Sequence[dict[str, Any]]) -> str:
    """A node's address; with Ray's id where several nodes share one, as those of one machine do."""
    address = node["NodeManagerAddress"]
    alone = sum(other["NodeManagerAddress"] == address for other in nodes) == 1
    return address if alone else f"{address} ({node['NodeID'][:8]})"


def _answer(task: Any, node: str) -> NodeReport:
    import ray

    from cluster.callbacks import root_of

    try:
        return ray.get(task)
    except Exception as error:  # whatever keeps a node from answering is what there is to tell of it
        return NodeReport(node=node, trouble=root_of(error), versions={})


def _none(node: str, seconds: float) -> NodeReport:
    return NodeReport(node=node, trouble=f"did not answer within {seconds:.0f} s", versions={})


def report(node: str, errand: Errand) -> NodeReport:
    """What this machine has to say; called on each node."""
    storage.use(errand.storage)
    return NodeReport(
        node=node,
        host=socket.gethostname(),
        versions=versions(),
        code=code(),
        gpus=gpus(),
        rights=tuple(rights(folder, seen) for folder, seen in zip(errand.folders, errand.seen, strict=True)),
        corpora=tuple(_glance(corpus, uri) for corpus, uri in errand.corpora.items()),
    )


def gpus() -> tuple[Gpu, ...]:
    """This machine's GPUs, also those that Ray hides from who has not asked for one. Needs no library and makes no context."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = ["--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    told = subprocess.run([program, *query], capture_output=True, text=True, timeout=30)
    lines = told.stdout.strip().splitlines() if told.returncode == 0 else []
    return tuple(
        Gpu(name=name.strip(), memory=int(size) * 2**20) for name, size in (line.rsplit(",", 1) for line in lines)
    )


def rights(folder: str, seen: str = "") -> Rights:
    """Write, create, read and remove a file of this node's own in `folder`. `seen` is a file that should be visible there."""
    probe = Place(folder) / f".doctor-{uuid4().hex}"
    data = uuid4().bytes * (PAYLOAD // 16)
    try:
        began = time.perf_counter()
        exclusive = probe.create(data)
        wrote = time.perf_counter()
        exclusive = exclusive and not probe.create(b"second")  # else two controllers could take one lease
        begun = time.perf_counter()
        whole = probe.read_bytes() == data if exclusive else True
        read = time.perf_counter()
        probe.remove()
        if not whole:
            return Rights(folder=folder, trouble="what was read is not what was written")
        shared = not seen or Place(seen).is_file()
    except OSError as error:
        return Rights(folder=folder, trouble=_words(error).replace(probe.uri, folder))  # the same words from every node
    return Rights(
        folder=folder,
        exclusive=exclusive,
        shared=shared,
        writes=len(data) / (wrote - began),
        reads=len(data) / (read - begun),
    )


def _glance(corpus: str, uri: str) -> Glance:
    try:
        began = time.perf_counter()
        data = storage.read(uri, 0, GLANCE)
        return Glance(corpus=corpus, reads=len(data) / (time.perf_counter() - began))
    except OSError as error:
        return Glance(corpus=corpus, trouble=_words(error))


def _words(error: OSError) -> str:
    """The error in a line, with its kind where its words alone say little."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
