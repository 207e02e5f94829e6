"""Objectives: `objective(model, batch) -> LossOutput`, a sum and a weight. Only the engine divides, by the global weight."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mllm.objectives.base import Gathered, LossOutput
from mllm.objectives.contrast import Contrastive
from mllm.objectives.language import DPO, Ids, NextToken

Objective = Annotated[NextToken | DPO | Contrastive, Field(discriminator="kind")]

__all__ = ["DPO", "Contrastive", "Gathered", "Ids", "LossOutput", "NextToken", "Objective"]
