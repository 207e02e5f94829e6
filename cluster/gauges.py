"""What a run tells a monitor: every metric once, with its name, its unit and its tags.

The run's driver exports what concerns the run (`cluster/telemetry.py`), each worker what only it knows. Ray's agents put `ray_`
before the names and serve them to Prometheus, beside Ray's own. `cluster/grafana.py` draws what is defined here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

Tag = Literal["run", "stage", "source", "rank", "phase", "reason", "what", "device"]

Unit = Literal["none", "percentunit", "s", "bytes", "dateTimeFromNow"]
"""As Grafana calls them; `percentunit` is a share of 1."""


@dataclass(frozen=True)
class Metric:
    """One metric. A `counter` only grows, from zero at each start of the process that tells it; others are what is now."""

    name: str
    help: str
    unit: Unit = "none"
    tags: tuple[Tag, ...] = ()
    counter: bool = False

    @property
    def labels(self) -> tuple[Tag, ...]:
        """All its tags: those of every metric, and its own."""
        return ("run", "stage", *self.tags)

    @property
    def exported(self) -> str:
        """Its name in Prometheus."""
        return f"ray_{self.name}"


STEP = Metric("mllm_step", "Optimiser steps of the stage so far")
PROGRESS = Metric("mllm_progress", "Share of the stage that is done", "percentunit")
LOSS = Metric("mllm_loss", "Mean loss of the last step")
GRAD_NORM = Metric("mllm_grad_norm", "Norm of the gradient before clipping")
LR = Metric("mllm_lr", "Learning rate of the part with the highest one")
SOURCE_LOSS = Metric("mllm_source_loss", "Mean loss a learned token, by source", tags=("source",))
SOURCE_ACCURACY = Metric("mllm_source_accuracy", "Share of tokens predicted right", "percentunit", ("source",))
SOURCE_TOKENS = Metric("mllm_source_tokens", "Learned tokens, by source", tags=("source",), counter=True)
HELD_OUT_LOSS = Metric(
    "mllm_held_out_loss", "Loss on held-out rows before, during or after the stage", tags=("source",)
)
TOKENS = Metric("mllm_tokens", "Positions trained on", counter=True)
LEARNED = Metric("mllm_learned_tokens", "Positions with loss", counter=True)
IMAGES = Metric("mllm_images", "Pictures trained on", counter=True)
ROWS = Metric("mllm_rows", "Rows trained on", counter=True)
DROPPED = Metric("mllm_rows_dropped", "Rows of the stage that were left out, by reason", tags=("reason",))
NOT_TAKEN = Metric("mllm_steps_not_taken", "Steps of the stage whose loss or gradient was no number, or leapt")
STEP_SECONDS = Metric("mllm_step_seconds", "Duration of the last step, waiting for data included", "s")
DATA_WAIT = Metric("mllm_data_wait_seconds", "Time that the slowest rank waited for data in the last step", "s")
FILL = Metric("mllm_pack_fill", "Tokens by what the packs could hold", "percentunit")
IMBALANCE = Metric("mllm_imbalance", "Tokens of the rank that had most by the mean")
MFU = Metric("mllm_mfu", "Model FLOPs utilisation", "percentunit")
WORLD = Metric("mllm_world_size", "Training workers")
RESTARTS = Metric("mllm_restarts", "Groups of workers that began in the stage after its first")
FAULTS = Metric("mllm_faults", "Faults of the stage in the journal, by kind", tags=("what",))
GOODPUT = Metric(
    "mllm_goodput", "Share of the time since the first step that went into steps that count", "percentunit"
)
END = Metric(
    "mllm_stage_end_seconds", "Moment at which the stage will be through at its present pace", "dateTimeFromNow"
)

PHASE = Metric("mllm_phase_seconds", "Time of a rank in a phase of the last step", "s", ("rank", "phase"))
MEMORY = Metric(
    "mllm_memory_bytes", "Greatest memory that a rank's tensors or process took", "bytes", ("rank", "device")
)
STALL = Metric("mllm_checkpoint_stall_seconds", "Time for which the last checkpoint held training up", "s", ("rank",))

OF_RUN = (
    STEP, PROGRESS, LOSS, GRAD_NORM, LR, SOURCE_LOSS, SOURCE_ACCURACY, SOURCE_TOKENS, HELD_OUT_LOSS, TOKENS, LEARNED, IMAGES,
    ROWS, DROPPED, NOT_TAKEN, STEP_SECONDS, DATA_WAIT, FILL, IMBALANCE, MFU, WORLD, RESTARTS, FAULTS, GOODPUT, END,
)  # fmt: skip
OF_RANKS = (PHASE, MEMORY, STALL)


class Board:
    """Metrics of one run and stage, as this process tells them. It must be part of a Ray cluster."""

    def __init__(self, run: str, stage: str) -> None:
        self.common = {"run": run, "stage": stage}

    def set(self, metric: Metric, value: float, **tags: str) -> None:
        """Say what `metric` is now."""
        _of_ray(metric).set(float(value), self._tags(metric, tags))

    def add(self, metric: Metric, value: float, **tags: str) -> None:
        """Add to a counter; nothing happens for 0."""
        if value > 0:
            _of_ray(metric).inc(float(value), self._tags(metric, tags))

    def _tags(self, metric: Metric, tags: Mapping[str, str]) -> dict[str, str]:
        if tags.keys() != set(metric.tags):
            raise ValueError(f"{metric.name} has the tags {metric.tags} and was given {tuple(tags)}")
        return {**self.common, **tags}


@cache
def _of_ray(metric: Metric) -> Any:
    from ray.util import metrics

    kind = metrics.Counter if metric.counter else metrics.Gauge
    return kind(metric.name, metric.help, metric.labels)
