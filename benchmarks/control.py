"""The control plane: what it costs a step, how fast a journal is read again, and a simulated week of failures.

**Journal.** 10,000 events as a run leaves them, read by a process that knows nothing and folded into the run's state, on a
disk and on S3; most come in chapters of 512, and of those after the last chapter most in a page.

**A step.** What control adds to each step on rank 0: saying twice what the rank is at, by a real Ray actor that a thread calls,
judging loss and gradient norm against the 64 steps before, and agreeing on what else to do (which travels with a message that
is sent anyway). Beside it the processor's time of the whole process for it, of that thread and of Ray's too.
Evaluations and checkpoints are not in it; the checkpoint's stall is told beside the time of the steps between two at the
default interval.

**A simulated week.** 1,024 workers on 128 nodes train from 10,000 shards for a week of simulated time, and nodes fail by a
Poisson process. Assumptions: a mean time between failures of 7.9 hours for a job of 1,024 GPUs (Meta's clusters,
arXiv:2410.21680, 5) and of 49.5 hours (Llama 3's 419 unexpected interruptions in 54 days on 16,384 GPUs, arXiv:2407.21783,
3.3.4, scaled); steps of 10 s; a lost node is back after 2 hours. *Here*: a checkpoint every 200 steps that stalls training for
1 s, workers that begin again 120 s after the failure (detection, new processes, a checkpoint of some hundred GB read), and go
on with the nodes that are left (`--workers 512 1024`), in proportion slower. *Hourly*: a checkpoint an hour that stops
training for 60 s, and 15 minutes until the job runs again on the full number of nodes, of which there always are enough.
*Goodput* is the share of the week, at full speed, that committed steps took. The order is the real one: at each failure the
position goes back to the checkpoint's, window numbers are asked of `pipelines.order.Order`, and at the end the committed
windows are counted: each once, none left out.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from benchmarks.common import Section, alone, in_child, ratios, scratch
from cluster.journal import (
    Decision,
    Event,
    Fault,
    GroupStarted,
    Journal,
    LeaseTaken,
    RunState,
    dump_event,
    gather,
)
from cluster.policy import judge
from mllm.care import Guard
from pipelines import storage
from pipelines.manifest import Manifest, Shard
from pipelines.order import Drawn, Order
from pipelines.place import Place
from pipelines.storage import Storage

EVENTS = 10_000
WEEK = 7 * 24 * 3600.0


def measure(section: Section, quick: bool) -> None:
    events = EVENTS // 20 if quick else EVENTS
    with scratch() as folder:
        place = Place(folder / "run")
        write_journal(place, events)
        section.add(f"replay of {events:,} events, disk", "s", [replayed(place, events) for _ in range(3)], at_most=1.0)
    from tests.s3 import running

    with scratch() as folder, running(folder) as server:
        seconds = in_child(on_s3, events, server.storage)
    section.add(f"replay of {events:,} events, S3", "s", seconds, at_most=1.0)
    steps = 20 if quick else 300
    control, processor = in_child(control_of_a_step, steps)
    section.add("control of a step", "ms", control, at_most=1.0)
    section.add("processor's time for it, all threads", "ms", [processor])
    stall, between = in_child(stall_and_interval, 2 if quick else 8)
    section.add("stall of a checkpoint", "s", stall, "smoke model, pretrain")
    section.add("stall / the 200 steps between two", "ratio", ratios(stall, between), at_most=0.01)
    for hours, source in ((7.9, "arXiv:2410.21680"), (49.5, "arXiv:2407.21783")):
        simulate(section, hours, source, 3 if quick else 20)


# -- journal -----------------------------------------------------------------------------------------------------------


def write_journal(run: Place, count: int) -> None:
    """A journal of `count` events, written as `Journal` writes it but without asking each time what is there."""
    events: list[Event] = [LeaseTaken(time=0.0, owner="process 1")]
    while len(events) < count:
        step = len(events)
        events += [
            Fault(time=step, what="workers", stage="pretrain", step=step, detail="the worker died", rank=step % 1024),
            Decision(time=step, what="restart", stage="pretrain", why="from the last checkpoint"),
            GroupStarted(time=step, stage="pretrain", fingerprint="f", world=1024, step=step),
        ]
    folder = run / "journal"
    for number, event in enumerate(events[:count]):
        (folder / f"{number:06d}.json").write(dump_event(event))
        if gathered := gather(events[: number + 1]):
            name, piece = gathered
            (folder / name).write(piece)


def replayed(run: Place, count: int) -> float:
    started = time.perf_counter()
    journal = Journal(run)
    state = RunState.replay(journal.events())
    seconds = time.perf_counter() - started
    assert len(journal.known) == count
    assert state.token == 0
    return seconds


def on_s3(events: int, settings: Storage) -> list[float]:
    storage.use(settings)
    run = Place("s3://corpus/run")
    write_journal(run, events)
    return [replayed(run, events) for _ in range(3)]


# -- a step ------------------------------------------------------------------------------------------------------------


def control_of_a_step(steps: int) -> tuple[list[float], float]:
    """Milliseconds that rank 0 spends on control in each of so many steps, and the processor's time of a step on average."""
    from cluster.local import ray_running
    from cluster.pulse import Beats, start_pulse

    with scratch() as folder, ray_running(None, 2, folder):
        beats = Beats(start_pulse(), 0)
        guard = Guard(spike=8.0)
        recent = [(3.0 + 0.01 * (n % 7), 1.0 + 0.1 * (n % 5)) for n in range(guard.window)]
        beats("start", 0)
        time.sleep(2)
        found = []
        used = time.process_time()
        for step in range(steps):
            started = time.perf_counter()
            beats("step", step)
            judge(guard, recent, 3.0, 1.0)
            beats("data", step)
            _ = beats.wish
            found.append(1e3 * (time.perf_counter() - started))
            time.sleep(0.02)  # the step itself
        processor = 1e3 * (time.process_time() - used) / steps
        beats.close()
    return found, processor


def stall_and_interval(repetitions: int) -> tuple[list[float], list[float]]:
    """Seconds that a save stops training, and that the 200 steps between two saves take, of the smoke recipe's pretrain."""
    from cluster.checkpoint import Manifest as CheckpointManifest
    from cluster.checkpoint import TrainState
    from cluster.engines import build_engine, finite
    from cluster.saver import Saver
    from cluster.site import EXAMPLE, load_site
    from mllm.recipes import by_name
    from pipelines.windows import PackWindows

    recipe = by_name("vila_smoke")
    stage = recipe.stage("pretrain")
    manifest = CheckpointManifest(
        run="bench", stage="pretrain", fingerprint="f", order="o", step=0, world=1, final=False, versions={}
    )
    stall: list[float] = []
    between: list[float] = []
    with scratch() as folder, alone():
        site = replace(load_site(str(EXAMPLE)), cache=str(folder / "cache"))
        packs = list(PackWindows(site.stream(recipe, stage)).packs(0))[: stage.packs_per_step]
        engine = build_engine(recipe.model.build(), stage, len(stage.mixture), torch.device("cpu"))
        with Saver(Place(folder / "checkpoints")) as saver:

            def settled(loss: float, grad_norm: float) -> bool:
                saver.settle()
                return finite(loss, grad_norm)

            for step in range(repetitions + 1):
                saver.save(engine.state(), TrainState(step=step), replace(manifest, step=step))
                report = engine.train_step(packs, 1.0, settled)
                outcome = saver.wait()[-1]
                if step:  # the first one plans
                    stall.append(outcome.stall)
                    between.append(200 * report.seconds)
    return stall, between


# -- a week of failures ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """How a run saves and recovers. `interval` in steps, all else in seconds; `elastic`: fewer nodes go on at once."""

    interval: int
    stall: float
    recovery: float
    elastic: bool


HERE = Way(interval=200, stall=1.0, recovery=120.0, elastic=True)
HOURLY = Way(interval=360, stall=60.0, recovery=900.0, elastic=False)
NODES, REPAIR, STEP = 128, 2 * 3600.0, 10.0


def week(way: Way, hours: float, seed: int) -> tuple[float, list[tuple[int, int]]]:
    """Goodput of one week, and the steps [first, last) that each checkpoint added to the weights, in order."""
    rng = random.Random(seed)
    moment, done, saved = 0.0, 0, 0
    fails = rng.expovariate(1 / (hours * 3600))
    back: list[float] = []
    committed: list[tuple[int, int]] = []
    while moment < WEEK:
        back = [when for when in back if when > moment]
        speed = (NODES - len(back)) / NODES if way.elastic else 1.0
        ends = moment + STEP / speed + (way.stall if (done + 1) % way.interval == 0 else 0.0)
        if ends > fails:
            moment = fails + way.recovery
            back.append(fails + REPAIR)
            fails = moment + rng.expovariate(1 / (hours * 3600))
            done = saved
            continue
        moment, done = ends, done + 1
        if done % way.interval == 0:
            committed.append((saved, done))
            saved = done
    return saved * STEP / WEEK, committed


def simulate(section: Section, hours: float, source: str, weeks: int) -> None:
    shards = tuple(
        Shard(uri=f"s3://c/{n:05d}.tar", rows=10_000, index="", stamp="", digest=f"{n:064x}") for n in range(10_000)
    )
    order = Order(seed=0, sources=(Drawn(manifest=Manifest(corpus="web", shards=shards)),), window_rows=1024 * 16)
    asked: list[float] = []
    goodput: dict[str, list[float]] = {"here": [], "hourly": []}
    for seed in range(weeks):
        for name, way in (("here", HERE), ("hourly", HOURLY)):
            share, spans = week(way, hours, seed)
            goodput[name].append(share)
            assert spans[0][0] == 0
            assert all(before[1] == after[0] for before, after in pairwise(spans)), "a step lost or repeated"
            for first, _ in spans[:: max(1, len(spans) // 4)]:  # where a run would have gone on
                started = time.perf_counter()
                order.window(first)
                asked.append(1e3 * (time.perf_counter() - started))
    section.add(f"goodput, a failure every {hours} h", "share", goodput["here"], source)
    section.add("the same, hourly checkpoints", "share", goodput["hourly"])
    section.add("here / hourly", "ratio", ratios(goodput["here"], goodput["hourly"]))
    section.add("any window of 100 million rows in 10,000 shards", "ms", asked, "what going on at a position asks")
