"""An objective that spoils chosen packs: once, as a faulty machine does, or always, as bad data does."""

from __future__ import annotations

from dataclasses import replace

from mllm.objectives import LossOutput, NextToken
from mllm.vlm import VisionLanguageModel
from pipelines.types import Batch, spec

MET: set[int] = set()
"""Sums of packs that this process has met."""


@spec
class Poisoned(NextToken):
    """Next tokens; the loss of the pack whose ids sum to `always` is no number, that of `once` only when it is met first."""

    always: int = 0
    once: int = 0

    def __call__(self, model: VisionLanguageModel, batch: Batch) -> LossOutput:
        output = NextToken.__call__(self, model, batch)
        name = int(batch.input_ids.sum())
        bad = name == self.always or (name == self.once and name not in MET)
        MET.add(name)
        return replace(output, sum=output.sum * float("nan")) if bad else output
