"""Objectives: `objective(model, batch) -> LossOutput`, a sum and a weight. Only the engine divides, by the global weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mllm.vlm import VisionLanguageModel
from ops.losses import linear_cross_entropy
from pipelines.types import NOT_LEARNED, Batch, spec


@dataclass(slots=True)
class LossOutput:
    """`sum` () float32, with gradient; `weight` () float32, what to divide by, summed over all packs of a step.

    `documents` float32 (S, 3), detached: each document's loss sum, learned tokens and correctly predicted tokens.
    """

    sum: Tensor
    weight: Tensor
    documents: Tensor


@spec
class Ids:
    """Token ids `first` to `last`, both of them: those of a modality, such as an image tokenizer's codes."""

    first: Annotated[int, Field(ge=0)]
    last: Annotated[int, Field(ge=0)]


@spec
class NextToken:
    """Cross-entropy of the next token over all learned positions; a token counts as often as its source's `loss_weight` says.

    Tokens of documents without pictures count `text_alone` times as much besides, and those that are one of `codes` (the
    ids of pictures, where a model writes them: LWM, arXiv:2402.08268, 4) `codes_weight` times. `z_loss` keeps logits from
    drifting (PaLM, arXiv:2204.02311, 5: 1e-4).
    """

    kind: Literal["next_token"] = "next_token"
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    text_alone: Annotated[float, Field(gt=0)] = 1.0
    codes: Ids | None = None
    codes_weight: Annotated[float, Field(gt=0)] = 1.0

    def __call__(self, model: VisionLanguageModel, batch: Batch) -> LossOutput:
        learned = batch.labels != NOT_LEARNED
        counts = self._counts(batch)
        losses = linear_cross_entropy(model(batch), model.lm.head, batch.labels, counts, self.z_loss)
        each = torch.stack([losses.each, learned.float(), losses.correct.float()], dim=1)
        documents = each.new_zeros(len(batch.sources), 3).index_add_(0, batch.document_of_token(), each)
        return LossOutput(sum=losses.sum, weight=(learned * counts).sum(), documents=documents)

    def _counts(self, batch: Batch) -> Float[Tensor, " T"]:
        """How often each position counts."""
        counts = torch.where(batch.pictured, batch.weights, batch.weights * self.text_alone)[batch.document_of_token()]
        if self.codes is None:
            return counts
        coded = (batch.labels >= self.codes.first) & (batch.labels <= self.codes.last)
        return torch.where(coded, counts * self.codes_weight, counts)


Objective = NextToken
