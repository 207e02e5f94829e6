"""Objectives of pictures alone: their class, their masked pixels, the codes of their masked patches."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from mllm.bert import CrossEncoder
from mllm.classify import ImageClassifier, Scores
from mllm.masked import MaskedAutoencoder, MaskedPredictor
from mllm.objectives.base import LossOutput, no_documents
from pipelines.types import Batch, spec


@spec
class Classification:
    """Cross-entropy of each document's class, by its first picture; the weight is the number of those that have one.

    Of a model that reads a question with the picture the class is the answer (VQA). `smoothing` of the labels as in Inception-v3
    (arXiv:1512.00567, 7).
    """

    kind: Literal["classification"] = "classification"
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def __call__(self, model: ImageClassifier | CrossEncoder, batch: Batch) -> LossOutput:
        return self.read(batch, model.scores(batch))

    def read(self, batch: Batch, scores: Scores, asked: Bool[Tensor, " I"] | None = None) -> LossOutput:
        """The loss of `scores`; of those that are not `asked` nothing counts."""
        logits = scores.logits.float()
        classes = batch.classes[scores.documents]
        if asked is not None:
            classes = torch.where(asked, classes, -1)
        if len(classes) and int(classes.max()) >= logits.shape[1]:
            raise ValueError(
                f"the batch has class {int(classes.max())} and the model scores of {logits.shape[1]}; raise model.classes"
            )
        known = classes >= 0
        each = F.cross_entropy(
            logits, classes, reduction="none", ignore_index=-1, label_smoothing=self.smoothing if len(classes) else 0.0
        )
        right = known & (logits.argmax(1) == classes) if len(classes) else known
        return _summed(batch, scores.documents, each, known.float(), right.float())

    def counted(self, model: ImageClassifier | CrossEncoder, batch: Batch) -> Tensor:
        """The weight, without running the model."""
        documents = model.scored(batch)
        return (batch.weights[documents] * (batch.classes[documents] >= 0)).sum()


@spec
class MaskedPixels:
    """Squared error of masked patches' pixels, a patch's mean (MAE, arXiv:2111.06377, 3); the weight is the number of patches."""

    kind: Literal["masked_pixels"] = "masked_pixels"

    def __call__(self, model: MaskedAutoencoder, batch: Batch) -> LossOutput:
        hidden = model.hidden(batch)
        error = (hidden.predicted.float() - hidden.target.float()).square().mean(-1)
        masked = hidden.masked.float()
        return _summed(batch, hidden.documents, (error * masked).sum(1), masked.sum(1), torch.zeros_like(masked[:, 0]))


@spec
class MaskedCodes:
    """Cross-entropy of masked patches' codes (BEiT, arXiv:2106.08254, eq. 2); the weight is the number of patches."""

    kind: Literal["masked_codes"] = "masked_codes"

    def __call__(self, model: MaskedPredictor, batch: Batch) -> LossOutput:
        hidden = model.hidden(batch)
        logits = hidden.predicted.float()
        each = F.cross_entropy(logits.flatten(0, 1), hidden.target.flatten(), reduction="none").view_as(hidden.masked)
        masked = hidden.masked.float()
        right = ((logits.argmax(-1) == hidden.target) * masked).sum(1)
        return _summed(batch, hidden.documents, (each * masked).sum(1), masked.sum(1), right)


def _summed(
    batch: Batch,
    documents: Tensor,
    losses: Float[Tensor, " I"],
    counts: Float[Tensor, " I"],
    right: Float[Tensor, " I"],
) -> LossOutput:
    """Pictures' losses as a batch's, each counting as often as its document is said to."""
    often = batch.weights[documents]
    told = no_documents(batch).index_add_(0, documents, torch.stack([losses.detach(), counts, right], dim=1))
    return LossOutput(sum=(losses * often).sum(), weight=(counts * often).sum(), documents=told)
