"""Models in the pipeline: filters, captions, codes, frozen features, a reference's log-probabilities.

    ScoreFilter, Recaption, DiscreteCodes,
    GridRegions                               of documents: before rows are measured and packed
    FrozenFeatures, ReferenceLogProbs         of packs: after they are cut, in place of work that the trainer would do
    Instructions (`mllm.instructed`)          of packs as well: prompts in the words of a Q-Former

Each is a value that an actor builds once; what is built is a pure function of the rows or the pack that it is given (greedy
decoding, no dropout), so that a window comes out the same whoever makes it. Weights are `transformers` folders.
To add one: a spec with `documents`, or with `packs` and `empty` (see `pipelines.annotate`), and its name in `Annotator`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mllm.annotators.codes import DiscreteCodes, GridRegions
from mllm.annotators.features import FrozenFeatures
from mllm.annotators.reference import ReferenceLogProbs
from mllm.annotators.rewrite import Recaption, ScoreFilter
from mllm.instructed import Instructions

Annotator = Annotated[
    ScoreFilter | Recaption | DiscreteCodes | GridRegions | FrozenFeatures | ReferenceLogProbs | Instructions,
    Field(discriminator="kind"),
]

__all__ = [
    "Annotator",
    "DiscreteCodes",
    "FrozenFeatures",
    "GridRegions",
    "Recaption",
    "ReferenceLogProbs",
    "ScoreFilter",
]
