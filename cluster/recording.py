"""What is kept of a step: its line in the run's record, and the tally of rows."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from cluster import quarantine
from cluster.checkpoint import ShardTally, TrainState
from cluster.counted import stage_cost
from cluster.deal import Held, Step
from cluster.engines import StepReport
from cluster.job import StageJob, TooManyBadRows
from cluster.metrics import PackRecord, RunFolder, SourceLoss, StepRecord
from cluster.mfu import peak_flops
from cluster.phases import PHASES, Phases
from mllm.flops import Cost, Work, work_of
from mllm.recipe import Source
from mllm.tune import peak_rate
from pipelines.types import Rejected


def tally_of(job: StageJob, before: dict[str, ShardTally], held: list[Held]) -> dict[str, ShardTally]:
    """Rows met and dropped by shard. Raises TooManyBadRows, on every rank alike."""
    tally = dict(before)
    fresh: list[Rejected] = []
    for pack in held:
        for shard in {shard for shard, _ in pack.rows}:
            old = tally.get(shard, ShardTally())
            rows = len({row for name, row in pack.rows if name == shard})
            tally[shard] = replace(old, seen=old.seen + rows)
        for rejected in pack.dropped:
            shard = f"{rejected.row.corpus}/{rejected.row.shard}"
            old = tally.get(shard, ShardTally())
            tally[shard] = ShardTally(seen=old.seen + 1, dropped=old.dropped + 1)
            fresh.append(rejected)
    if fresh and dist.get_rank() == 0:
        quarantine.append(job.folder, job.stage.name, fresh)
    limits = {source.corpus.name: source for source in job.stage.mixture}
    for rejected in fresh:
        _check_share(limits[rejected.row.corpus], tally, rejected, job.folder.name)
    return tally


def _check_share(source: Source, tally: dict[str, ShardTally], last: Rejected, run: str) -> None:
    shard = f"{last.row.corpus}/{last.row.shard}"
    found = tally[shard]
    if found.seen >= source.min_rows and found.dropped > source.max_bad * found.seen:
        raise TooManyBadRows(
            f"shard {shard}: {found.dropped} of {found.seen} rows were dropped, more than the {source.max_bad:.0%} that its "
            f"source allows (max_bad); the last was {last.label()}. See them with: mllm data quarantine {run}"
        )


@dataclass(frozen=True, slots=True)
class Meter:
    """What a pack costs and what a device could compute, FLOP/s. `cost` is None for a model that cannot be counted."""

    cost: Cost | None
    peak: float


def meter_of(job: StageJob, device: torch.device) -> Meter:
    try:
        cost = stage_cost(job.recipe, job.stage)
    except (ValueError, RuntimeError):  # a run does not stop for want of a number; `mllm plan` says why it is missing
        cost = None
    return Meter(cost, peak_flops(device, job.stage.parallel.dtype))


def record_step(
    job: StageJob,
    state: TrainState,
    step: Step,
    report: StepReport,
    factor: float,
    meter: Meter | None,
    folder: RunFolder,
) -> list[tuple[Phases, int]]:
    """Rank 0, which has the `meter`, writes the step's line, and gets the phases and tokens of all ranks."""
    timings: list[Any] = [None] * dist.get_world_size()
    tokens = sum(len(pack.input_ids) for pack in step.mine)
    work = sum((work_of(pack) for pack in step.mine), Work())
    phases = replace(report.phases, data=step.waited)
    dist.gather_object((phases, report.seconds, tokens, work), timings if dist.get_rank() == 0 else None)
    if meter is None:
        return []
    ranks, seconds, loads, works = zip(*timings, strict=True)
    waits = [each.data for each in ranks]
    slowest = max(range(len(ranks)), key=lambda rank: ranks[rank].own)
    work = sum(works, Work())
    total = sum(held.tokens for held in step.all)
    dropped = [rejected for held in step.all for rejected in held.dropped]
    reasons: dict[str, int] = {}
    for rejected in dropped:
        reasons[str(rejected.reason)] = reasons.get(str(rejected.reason), 0) + 1
    record = StepRecord(
        step=state.step,
        progress=state.progress,
        loss=report.loss,
        grad_norm=report.grad_norm,
        lr=factor * peak_rate(job.stage.tune),
        tokens=total,
        learned=report.learned,
        images=sum(held.images for held in step.all),
        rows=sum(len(held.rows) for held in step.all),
        fill=total / (len(step.all) * job.stage.context),
        imbalance=max(loads) * len(loads) / max(1, sum(loads)),
        seconds=max(seconds) + max(waits),
        data_wait=max(waits),
        taken=report.taken,
        world=len(loads),
        time=time.time(),
        sources=tuple(
            SourceLoss(source=source.corpus.name, loss=total / weight, accuracy=right / weight, tokens=int(weight))
            for source, (total, weight, right) in zip(job.stage.mixture, report.sources.tolist(), strict=True)
            if weight
        ),
        packs=tuple(PackRecord(window=h.at.window, pack=h.at.pack, digest=h.digest) for h in step.all),
        dropped=tuple(rejected.label() for rejected in dropped),
        reasons=reasons,
        flops=meter.cost.model_flops(work) if meter.cost else 0.0,
        hardware_flops=meter.cost.hardware_flops(work) if meter.cost else 0.0,
        peak=meter.peak,
        usual=Phases(**{name: median(getattr(each, name) for each in ranks) for name in PHASES}),
        slowest=(slowest, ranks[slowest]),
    )
    folder.write_step(job.stage.name, record)
    return list(zip(ranks, loads, strict=True))
