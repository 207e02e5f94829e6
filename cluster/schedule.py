"""Arithmetic of a stage: how far it is, how fast it learns, how packs are shared out."""

from __future__ import annotations

import math

from mllm.recipe import WSD, Constant, Cosine, Epochs, Linear, Schedule, Stage, Steps, Tokens
from pipelines.types import Position


def learning_rate_factor(schedule: Schedule, progress: float) -> float:
    """Share of the peak learning rate at `progress` in [0, 1]."""
    if progress < schedule.warmup:
        return progress / schedule.warmup
    done = min(1.0, (progress - schedule.warmup) / max(1e-9, 1 - schedule.warmup))
    match schedule:
        case Cosine(floor=floor):
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
        case Linear(floor=floor):
            return floor + (1 - floor) * (1 - done)
        case Constant():
            return 1.0
        case WSD(decay=decay, halvings=halvings):
            return 0.5 ** (halvings * max(0.0, min(1.0, (progress - 1 + decay) / decay)))


def accumulation(packs_per_step: int, world: int) -> int:
    """Packs that each of `world` ranks takes in a step; ranks without one take an empty pack."""
    return -(-packs_per_step // world)


def progress(stage: Stage, windows: int | None, step: int, tokens: int, at: Position, packs_in_window: int) -> float:
    """Share of the stage that is done after `step` steps and `tokens` tokens, the next pack being `at`.

    A stage measured in epochs goes by its place among the `windows` of its order, which is known without counting packs.
    """
    match stage.duration:
        case Steps(count=count):
            return min(1.0, step / count)
        case Tokens(count=count):
            return min(1.0, tokens / count)
        case Epochs():
            if not windows:
                raise ValueError(f"stage {stage.name!r} is measured in epochs and its stream has no end")
            return min(1.0, (at.window + at.pack / max(1, packs_in_window)) / windows)


def planned_steps(stage: Stage) -> int | None:
    """Steps of the stage where its duration tells: None for epochs, whose packs are known only once they are packed."""
    match stage.duration:
        case Steps(count=count):
            return count
        case Tokens() | Epochs():
            return None


def due(stage: Stage, step: int) -> bool:
    """Whether a checkpoint is to be written after `step`."""
    return step % stage.save_every == 0


def stale(stage: Stage, since: float) -> bool:
    """Whether one is to be written because the last was begun `since` seconds ago, by one rank's steady clock.

    One rank asks and tells the others: no two clocks agree.
    """
    return stage.save_minutes is not None and since >= 60 * stage.save_minutes
