"""Objectives: `objective(model, batch) -> LossOutput`, a sum and a weight. Only the engine divides, by the global weight."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mllm.objectives.base import Gathered, LossOutput
from mllm.objectives.contrast import Contrastive
from mllm.objectives.fused import MaskedTokens, Matching
from mllm.objectives.language import DPO, Ids, NextToken
from mllm.objectives.pictures import Classification, MaskedCodes, MaskedPixels
from mllm.objectives.regions import MaskedRegions
from mllm.objectives.sums import OneOf, Sum, Term
from mllm.objectives.vocabularies import TwoVocabularies

Objective = Annotated[
    NextToken
    | DPO
    | TwoVocabularies
    | Contrastive
    | Classification
    | MaskedPixels
    | MaskedCodes
    | Matching
    | MaskedTokens
    | MaskedRegions
    | Sum
    | OneOf,
    Field(discriminator="kind"),
]

__all__ = [
    "DPO",
    "Classification",
    "Contrastive",
    "Gathered",
    "Ids",
    "LossOutput",
    "MaskedCodes",
    "MaskedPixels",
    "MaskedRegions",
    "MaskedTokens",
    "Matching",
    "NextToken",
    "Objective",
    "OneOf",
    "Sum",
    "Term",
    "TwoVocabularies",
]
