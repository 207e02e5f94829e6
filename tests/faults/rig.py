"""Where faults happen: a cluster of several nodes on this machine, a run on it as a user starts one, and what the run left.

with Rig(folder, storage) as rig:
    rig.add_node(); rig.add_node()
    rig.train(recipe_words)
    rig.wait_for_step("align", 5)
    rig.kill(rig.trainers()[0])
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil

from cluster.journal import GroupStarted, Journal
from cluster.metrics import RunFolder, StepRecord
from cluster.site import Site
from pipelines.place import Place
from pipelines.storage import Storage
from tests.s3 import Proxy, free_port

CPUS = 4
"""Logical CPUs of a node: two trainers, a preprocessor and some air."""

STORE = 300 * 2**20


class Rig:
    """A head without trainers, nodes that come and go, and one run under its supervisor."""

    def __init__(
        self, folder: Path, site: Site, recipe: str, changes: Sequence[str], proxy: Proxy | None = None
    ) -> None:
        self.folder = folder
        self.site = site
        self.recipe = recipe
        self.changes = list(changes)
        self.proxy = proxy
        self.words: tuple[str, ...] = ()
        self.port = free_port()
        self.nodes: list[Any] = []
        self.cluster: Any = None
        self.run: subprocess.Popen[bytes] | None = None
        self.log = folder / "run.log"
        self.background: threading.Thread | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        self.start_cluster()
        return self

    def __exit__(self, *_: object) -> None:
        if self.run is not None and self.run.poll() is None:
            os.killpg(self.run.pid, signal.SIGKILL)
            self.run.wait()
        self.stop_cluster()

    def start_cluster(self) -> None:
        """A head at the rig's port; it holds no trainer, as heads of real clusters should."""
        from ray.cluster_utils import Cluster

        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        head = {"gcs_server_port": self.port, "num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, connect=False, head_node_args=head)
        self.nodes = []

    def stop_cluster(self) -> None:
        """End every process of the cluster at once, the head's too."""
        for node in [*self.nodes, self.cluster.head_node]:
            if node is not None:
                node.kill_all_processes(check_alive=False, allow_graceful=False)
        self.nodes, self.cluster = [], None

    def add_node(self, cpus: int = CPUS) -> Any:
        self.nodes.append(self.cluster.add_node(num_cpus=cpus, object_store_memory=STORE))
        return self.nodes[-1]

    def kill_node(self, node: Any) -> None:
        """As a machine that loses its power."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def train(self, *words: str, again: bool = False) -> subprocess.Popen[bytes]:
        """Start `mllm train` on the rig's site; `again` where it was started before."""
        changes = ["-s", *self.changes] if self.changes else []
        site = ["--site", str(self.site_file())]
        command = [sys.executable, "-m", "cluster.cli", "train", self.recipe, *site, "--unchecked", *words, *changes]
        with self.log.open("ab" if again else "wb") as out:
            run = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        self.run = run
        return run

    def site_file(self) -> Path:
        """The site, as the command reads it."""
        site, file = self.site, self.folder / "site.toml"
        lines = [f"{name} = {json.dumps(getattr(site, name))}" for name in ("runs", "cache", "preprocessors")]
        lines += [f'ray_address = "127.0.0.1:{self.port}"', "buffer = 33554432"]
        lines += ["[storage]", *(f"{k} = {json.dumps(v)}" for k, v in _fields(site.storage).items())]
        lines += ["[watch]", *(f"{k} = {json.dumps(v)}" for k, v in _fields(site.watch).items())]
        for table, entries in (("corpora", site.corpora), ("weights", site.weights)):
            lines += [f"[{table}]", *(f"{json.dumps(name)} = {json.dumps(value)}" for name, value in entries.items())]
        file.write_text("\n".join(lines))
        return file

    # -- looking at the run -------------------------------------------------------------------------------------------

    @property
    def results(self) -> RunFolder:
        """What the run has left so far."""
        name = self.words[self.words.index("--run") + 1] if "--run" in self.words else self.recipe
        return self.results_of(name)

    def results_of(self, name: str) -> RunFolder:
        return RunFolder(Place(f"{self.site.runs}/{name}"))

    def steps(self, stage: str) -> list[StepRecord]:
        return self.results.steps(stage)

    def planned(self, stage: str) -> int | None:
        """Steps that the stage has, once it has begun."""
        begun = [event for event in Journal(self.results.root).state().started_stages if event.stage == stage]
        return begun[-1].steps if begun else None

    def groups(self) -> list[GroupStarted]:
        """Every beginning of a group of workers, as the journal tells it."""
        return list(Journal(self.results.root).state().groups)

    def wait_for(self, what: Callable[[], bool], seconds: float = 180, pause: float = 0.1) -> float:
        """Wait until `what` holds, and say how long that took. Raises AssertionError where the run ends or time does."""
        assert self.run is not None
        started = time.monotonic()
        while not what():
            if self.run.poll() is not None or time.monotonic() - started > seconds:
                raise AssertionError(f"the run ended or stalled (exit {self.run.poll()}):\n{self.told()}")
            time.sleep(pause)
        return time.monotonic() - started

    def wait_for_end(self, seconds: float = 900) -> None:
        """Wait until the command is through. Raises AssertionError where it did not end well."""
        code = self.exit_code(seconds)
        assert code == 0, f"the command ended with {code}:\n{self.told()}"

    def exit_code(self, seconds: float) -> int | None:
        """With what the command ends; None where it does not within `seconds`."""
        assert self.run is not None
        with suppress(subprocess.TimeoutExpired):
            return self.run.wait(seconds)
        return None

    def told(self) -> str:
        """The end of what the command has said, and of its logs."""
        logs = sorted(self.results.logs.glob("*.txt")) if self.results.logs.is_dir() else []
        return "\n".join(f"-- {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in (self.log, *logs))

    def wait_for_step(self, stage: str, step: int, seconds: float = 180) -> float:
        return self.wait_for(lambda: (done := self.steps(stage)) != [] and done[-1].step >= step, seconds)

    # -- processes ----------------------------------------------------------------------------------------------------

    def processes(self, words: str) -> list[psutil.Process]:
        """Processes of the rig's nodes whose title holds `words`, by age."""
        found = [process for node in [self.cluster.head_node, *self.nodes] for process in _under(node)]
        return sorted((p for p in found if words in _title(p)), key=lambda p: p.pid)

    def training_nodes(self) -> list[Any]:
        """Nodes on which a training worker runs."""
        self.wait_for(lambda: bool(self.trainers()))
        pids = {process.pid for process in self.trainers()}
        return [node for node in self.nodes if pids & {child.pid for child in _under(node)}]

    def trainers(self) -> list[psutil.Process]:
        return self.processes("RayTrainWorker")

    def driver(self) -> psutil.Process:
        """The process that drives the run, under its supervisor."""
        assert self.run is not None
        return next(p for p in psutil.Process(self.run.pid).children() if "cluster.cli" in _title(p))

    def pick(self, rng: random.Random, words: str, seconds: float = 60) -> psutil.Process:
        """One of the processes, once there is one."""
        self.wait_for(lambda: bool(self.processes(words)), seconds)
        return rng.choice(self.processes(words))


def _under(node: Any) -> list[psutil.Process]:
    """The processes of a node's raylet."""
    found = []
    for info in node.all_processes.get("raylet", []):
        try:
            found += psutil.Process(info.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            continue
    return found


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _fields(value: Storage | Any) -> dict[str, Any]:
    """What a spec says other than its defaults."""
    default = type(value)()
    names = type(value).__dataclass_fields__
    return {name: getattr(value, name) for name in names if getattr(value, name) != getattr(default, name)}
