"""Phase times on two ranks: a rank that is slowed is the one with more time of its own, and the other one waits for it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn

from benchmarks.common import on_ranks
from cluster.checkpoint import TrainState
from cluster.deal import Step, describe
from cluster.job import StageJob
from cluster.phases import PHASES, Paces, Phases
from cluster.policy import Watch
from cluster.saver import Saver
from cluster.worker import Training
from mllm.recipe import DDP, FSDP, Frozen, Full, Parallel, Recipe, Stage, Steps
from pipelines.types import Position
from pipelines.windows import PackWindows, Stream
from tests.cluster.test_engine import engine_of, share

pytestmark = pytest.mark.alone  # who is slow is measured

NAP = 0.2
"""Seconds by which a rank is slowed in each pack: far more than these models take."""

ALL = {"encoder": Full(lr=1e-4), "connector": Full(lr=1e-3), "lm": Full(lr=1e-3)}
LM_ALONE = {"encoder": Frozen(), "connector": Frozen(), "lm": Full(lr=1e-3)}


def nap(*_: Any) -> None:
    time.sleep(NAP)


def long_nap(*_: Any) -> None:
    time.sleep(3 * NAP)


def slowed(recipe: Recipe, stage: Stage, stream: Stream, where: str, backward: bool) -> list[tuple[Phases, float]]:
    """Phases and seconds of three steps of two packs each, of which rank 1 sleeps in the module `where` in each pack."""
    packs = list(PackWindows(stream).packs(0)) * 3
    engine: Any = engine_of(recipe, stage)
    if dist.get_rank() == 1:
        module: nn.Module = engine.module.model.get_submodule(where)
        if backward:
            module.register_forward_hook(lambda _, __, output: output.register_hook(nap) and None)
        else:
            module.register_forward_pre_hook(nap)
    reports = [engine.train_step(share(packs, 4, step), 1.0) for step in range(4)]
    return [(report.phases, report.seconds) for report in reports[1:]]  # the first one makes ready


def usual(steps: list[tuple[Phases, float]]) -> Phases:
    """The median of each phase: this machine may have other things to do in one of the steps."""
    return Phases(**{name: median(getattr(phases, name) for phases, _ in steps) for name in PHASES})


@pytest.mark.parametrize(
    ("parallel", "where", "backward", "phase"),
    [
        (FSDP(dtype="float32"), "lm", False, "lm"),
        (FSDP(dtype="float32", recompute="none"), "encoder", False, "vision"),
        (FSDP(dtype="float32"), "encoder", True, "vision"),
        (DDP(dtype="float32"), "lm.model.model.layers.1", True, "lm"),
    ],
)
def test_a_rank_that_is_slowed_has_the_time_and_the_other_waits(
    small: Recipe, stream: Stream, parallel: Parallel, where: str, backward: bool, phase: str
) -> None:
    stage = replace(small.stage("pretrain"), tune=ALL, parallel=parallel)
    other = "vision" if phase == "lm" else "lm"
    fast, slow = map(usual, on_ranks(2, slowed, small, stage, stream, where, backward))
    lost = 2 * NAP  # two packs a rank
    assert getattr(slow, phase) - getattr(fast, phase) == pytest.approx(lost, rel=0.5)
    assert abs(getattr(slow, other) - getattr(fast, other)) < lost / 2
    assert fast.communication - slow.communication == pytest.approx(lost, rel=0.5)


def test_phases_are_all_of_a_step(small: Recipe, stream: Stream) -> None:
    stage = replace(small.stage("pretrain"), tune=ALL)
    for ranks in on_ranks(2, slowed, small, stage, stream, "lm", False):
        for phases, seconds in ranks:
            assert phases.own + phases.communication == pytest.approx(seconds, rel=0.1)


def test_where_nothing_of_vision_is_trained_all_of_backward_is_the_language_models(
    small: Recipe, stream: Stream
) -> None:
    stage = replace(small.stage("pretrain"), tune=LM_ALONE)
    first = "lm.model.model.layers.0"
    fast, slow = map(usual, on_ranks(2, slowed, small, stage, stream, first, True))
    assert slow.lm - fast.lm == pytest.approx(2 * NAP, rel=0.5)
    assert max(slow.vision, fast.vision) < NAP


def judged_run(job: StageJob) -> None:
    """Six steps of the stage as its workers take them, judged every two of them; rank 1 sleeps in each of its first four."""
    packs = list(PackWindows(job.stream).packs(0))
    engine: Any = engine_of(job.recipe, job.stage)
    nobody: Any = None  # not asked within these steps
    training = Training(job, engine, nobody, TrainState(), nobody, Saver(job.checkpoints))
    training.paces = Paces(dist.get_world_size(), steps=2)
    handle = engine.module.model.lm.register_forward_pre_hook(long_nap) if dist.get_rank() == 1 else None
    for number in range(6):
        if number == 4 and handle:
            handle.remove()
        held = [describe(pack, index) for index, pack in enumerate(packs[:4])]
        training._train(Step(share(packs, 4, 0), held, 0.0, Position(window=number + 1), 4, ()))
    job.folder.flush_steps()


def test_the_journal_names_a_straggler_once_and_each_step_its_slowest_rank(
    small: Recipe, stream: Stream, tmp_path: Path
) -> None:
    stage = replace(small.stage("pretrain"), tune=ALL, parallel=FSDP(dtype="float32"), duration=Steps(count=6))
    job = StageJob(
        recipe=small,
        stage=stage,
        stream=stream,
        held_out=None,
        run=str(tmp_path / "run"),
        token=-1,
        watch=Watch(straggler=2.0),
        fingerprint="f",
        previous=None,
        weights={},
        versions={},
    )
    on_ranks(2, judged_run, job)
    state = job.journal.state()
    (fault,) = state.faults
    assert (fault.what, fault.rank, fault.step) == ("straggler", 1, 2)
    assert "lost in lm" in fault.detail
    assert [decision.what for decision in state.decisions] == ["go_on"]
    for record in job.folder.steps(stage.name)[:4]:
        assert record.slowest is not None
        rank, phases = record.slowest
        assert rank == 1
        assert phases.lm > record.usual.lm > 0


def test_means_are_told_after_every_so_many_steps() -> None:
    paces = Paces(2, steps=3)
    for _ in range(2):
        for step in range(2):
            assert not paces.add([(Phases(lm=1.0 + step), 10), (Phases(data=3.0), 0)])
        one, two = paces.add([(Phases(lm=3.0), 40), (Phases(), 0)])
        assert (one.phases, one.tokens) == (Phases(lm=2.0), 20.0)
        assert (two.phases, two.tokens) == (Phases(data=2.0), 0.0)
