"""The objective of a model with two vocabularies (LWM, arXiv:2402.08268)."""

from __future__ import annotations

from typing import Literal

import torch

from mllm.fusion.unified import Unified
from mllm.objectives import LossOutput
from mllm.vlm import VisionLanguageModel
from ops.losses import linear_cross_entropy
from pipelines.types import NOT_LEARNED, Batch, spec


@spec
class TwoVocabularies:
    """Half the mean loss of codes and half that of words, however many there are of each (LWM's published code).

    Codes are predicted by the head of codes and words by that of words: neither competes with the other. Means are those of a
    pack, which counts as often as it has learned tokens; with one kind alone its loss counts half, as there.
    """

    kind: Literal["two_vocabularies"] = "two_vocabularies"

    def __call__(self, model: VisionLanguageModel, batch: Batch) -> LossOutput:
        """Raises ValueError for a model of one vocabulary."""
        fusion = model.fusion
        if not isinstance(fusion, Unified):
            raise ValueError("two_vocabularies needs a model with two; take unified_vocabulary as its fusion")
        hidden = model(batch)
        counts = batch.weights[batch.document_of_token()]
        coded = batch.labels >= fusion.first
        words = torch.where(coded, NOT_LEARNED, batch.labels)
        codes = torch.where(coded, batch.labels - fusion.first, NOT_LEARNED)
        losses = [
            linear_cross_entropy(hidden, head, labels, counts)
            for head, labels in ((model.lm.head, words), (fusion.head.weight, codes))
        ]
        weights = [((labels != NOT_LEARNED) * counts).sum() for labels in (words, codes)]
        total = weights[0] + weights[1]
        halves = [loss.sum / weight.clamp(min=1e-6) for loss, weight in zip(losses, weights, strict=True)]
        learned = (batch.labels != NOT_LEARNED).float()
        each = losses[0].each + losses[1].each
        right = (losses[0].correct | losses[1].correct).float()
        rows = torch.stack([each, learned, right], dim=1)
        documents = rows.new_zeros(len(batch.sources), 3).index_add_(0, batch.document_of_token(), rows)
        return LossOutput(sum=0.5 * (halves[0] + halves[1]) * total, weight=total, documents=documents)
