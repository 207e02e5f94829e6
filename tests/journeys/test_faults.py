"""The core of `make faults`: a stage on two nodes and S3, through a hang, a killed driver, an outage; and bad batches.

What must come out is the curve of a plain loop over the same order in one process, without Ray, without a fault.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from benchmarks.common import in_child, on_ranks
from cluster.controller import RunError
from cluster.engines import build_engine
from cluster.journal import Decision, Event, Fault, GroupStarted, Journal
from cluster.metrics import StepRecord
from cluster.policy import Watch
from cluster.run import train
from cluster.schedule import learning_rate_factor
from cluster.site import Site
from mllm.care import Guard
from mllm.recipe import Recipe, Steps, dump
from pipelines import storage
from pipelines.windows import PackWindows, Stream
from tests.faults.catalogue import kill_driver, refuse, stop_worker
from tests.faults.poison import Poisoned
from tests.faults.rig import Rig
from tests.faults.suite import Fault as Injected
from tests.faults.suite import Overcome, go_through
from tests.s3 import BUCKET, KEY, SECRET, Proxy, Server

STEPS = 32


def undisturbed(recipe: Recipe, stream: Stream, steps: int) -> list[tuple[list[int], float]]:
    """Digests and loss of each step of the recipe's only stage, trained in this process alone."""
    stage = recipe.stages[0]
    torch.manual_seed(recipe.seed)
    engine = build_engine(recipe.vlm.build(), stage, len(stage.mixture), torch.device("cpu"))
    assert dist.get_world_size() == 1
    packs = (pack for k in range(10_000) for pack in PackWindows(stream).packs(k))
    curve = []
    for step in range(steps):
        mine = [next(packs) for _ in range(stage.packs_per_step)]
        report = engine.train_step(mine, learning_rate_factor(stage.schedule, (step + 0.5) / steps))
        curve.append(([pack.digest for pack in mine], report.loss))
    return curve


@pytest.fixture
def alone(recipe: Recipe) -> Recipe:
    """The pretrain stage by itself, long enough for all that happens to it."""
    stage = replace(recipe.stage("pretrain"), duration=Steps(count=STEPS), save_every=4)
    return replace(recipe, name="alone", stages=(stage,), held_out=())


@dataclass(frozen=True)
class Outcome:
    """What a run that went through faults has left: its steps and events, and what a person saw."""

    overcome: list[Overcome]
    steps: list[StepRecord]
    events: list[Event]
    log: str


def through_faults(folder: Path, recipe: Path, site: Site, server: Server) -> Outcome:
    """Train the recipe on two nodes and let three faults happen. In a process of its own: Ray ends one whose cluster is gone."""
    proxy = Proxy(server.port)
    settings = proxy.storage(patience=60)
    storage.use(settings)
    there = replace(
        site, runs=f"s3://{BUCKET}/faults", storage=settings, watch=Watch(least=6.0), preprocessors=1, cache=str(folder)
    )
    with Rig(folder, there, str(recipe), [], proxy) as rig:
        for _ in range(2):
            rig.add_node()
        rig.words = ("--workers", "2", "--run", "alone")
        rig.train(*rig.words)
        faults = [
            Injected("hang", stop_worker),
            Injected("driver", kill_driver),
            Injected("S3", refuse, restarts=False),
        ]
        overcome = go_through(rig, "pretrain", faults, random.Random(0))
        rig.wait_for_end()
        _tells_no_secret(rig)
        return Outcome(overcome, rig.steps("pretrain"), Journal(rig.results.root).events(), rig.log.read_text())


@pytest.mark.timeout(600)
def test_faults_leave_no_mark(alone: Recipe, site: Site, s3: Server, tmp_path: Path) -> None:
    (tmp_path / "alone.json").write_text(dump(alone))
    curve = on_ranks(1, undisturbed, alone, site.stream(alone, alone.stages[0]), STEPS)[0]
    left = in_child(through_faults, tmp_path / "rig", tmp_path / "alone.json", site, s3)
    assert [one.redone < 8 for one in left.overcome] == [True] * 3
    assert [[pack.digest for pack in step.packs] for step in left.steps] == [digests for digests, _ in curve]
    assert [step.loss for step in left.steps] == [pytest.approx(loss, rel=1e-4) for _, loss in curve]
    hang = next(event for event in left.events if isinstance(event, Fault) and event.what == "hang")
    assert "the process is stopped" in hang.detail
    assert [event.world for event in left.events if isinstance(event, GroupStarted)] == [2, 2, 2]
    assert "was ended by SIGKILL; another one goes on" in left.log


def _tells_no_secret(rig: Rig) -> None:
    """Neither on storage nor on this machine is a key to it to be found, in nothing that a run writes down."""
    kept = [
        storage.read(uri)
        for uri in storage.glob(f"{rig.results.root}/**")
        if not uri.endswith((".bin", ".safetensors"))
    ]
    logged = [file.read_bytes() for file in [rig.log, *rig.results.logs.rglob("*")] if file.is_file()]
    assert len(kept) > 20
    assert logged
    assert not [text for text in kept + logged if SECRET.encode() in text or KEY.encode() in text]


def poisoned(recipe: Recipe, stream: Stream, guard: Guard) -> Recipe:
    """The recipe, whose third step has a bad pack and whose sixth one that is bad only at first."""
    per_step = recipe.stages[0].packs_per_step
    packs = [pack for k in range(4) for pack in PackWindows(stream).packs(k)]
    always, once = (int(packs[step * per_step].input_ids.sum()) for step in (2, 5))
    stage = replace(
        recipe.stages[0], objective=Poisoned(always=always, once=once), guard=guard, duration=Steps(count=8)
    )
    return replace(recipe, name=f"poisoned-{guard.bad}", stages=(stage,))


@pytest.mark.usefixtures("ray_cluster")
def test_a_bad_batch_is_left_out_and_a_bad_machine_forgiven(alone: Recipe, site: Site) -> None:
    stream = site.stream(alone, alone.stages[0])
    recipe = poisoned(alone, stream, Guard())
    folder = train(recipe, site, None, Console(file=io.StringIO()))
    steps = folder.steps("pretrain")
    assert [step.taken for step in steps] == [step != 2 for step in range(8)]
    events = Journal(folder.root).events()
    assert [event.what for event in events if isinstance(event, Decision)] == ["replay", "skip", "replay", "take"]
    first, second = (event for event in events if isinstance(event, Fault))
    assert (first.what, first.step, second.step) == ("not_finite", 2, 5)
    assert first.rows
    assert all(name.split("/")[0] in ("example-pairs", "example-pages") for name in first.rows)


@pytest.mark.usefixtures("ray_cluster")
def test_where_the_policy_says_so_a_bad_batch_stops_the_run(alone: Recipe, site: Site) -> None:
    recipe = poisoned(alone, site.stream(alone, alone.stages[0]), Guard(bad="stop"))
    with pytest.raises(RunError, match=r"stage 'pretrain': step 3 had loss nan"):
        train(recipe, site, None, Console(file=io.StringIO()))
