"""Objectives: `objective(model, batch) -> LossOutput`, a sum and a weight. Only the engine divides, by the global weight."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mllm.objectives.aligned import Captioning, DistilledTokens, HardMatching, MomentumContrast
from mllm.objectives.base import Gathered, LossOutput
from mllm.objectives.contrast import Contrastive
from mllm.objectives.data import MaskedData
from mllm.objectives.fused import MaskedTokens, Matching
from mllm.objectives.language import DPO, Ids, NextToken
from mllm.objectives.once import AtOnce
from mllm.objectives.pictures import Classification, MaskedCodes, MaskedPixels
from mllm.objectives.regions import MaskedRegions
from mllm.objectives.retrieval import RetrievalToken
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
    | MaskedData
    | MaskedRegions
    | MomentumContrast
    | HardMatching
    | DistilledTokens
    | Captioning
    | RetrievalToken
    | Sum
    | OneOf
    | AtOnce,
    Field(discriminator="kind"),
]

__all__ = [
    "DPO",
    "AtOnce",
    "Captioning",
    "Classification",
    "Contrastive",
    "DistilledTokens",
    "Gathered",
    "HardMatching",
    "Ids",
    "LossOutput",
    "MaskedCodes",
    "MaskedData",
    "MaskedPixels",
    "MaskedRegions",
    "MaskedTokens",
    "Matching",
    "MomentumContrast",
    "NextToken",
    "Objective",
    "OneOf",
    "RetrievalToken",
    "Sum",
    "Term",
    "TwoVocabularies",
]
