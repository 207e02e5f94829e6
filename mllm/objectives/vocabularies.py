"""The objective of a model with two vocabularies (LWM, arXiv:2402.08268)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mllm.fusion.unified import Unified
from mllm.objectives.base import Collected, Gathered, LossOutput
from ops.losses import linear_cross_entropy
from pipelines.types import NOT_LEARNED, Batch, spec

if TYPE_CHECKING:
    from mllm.vlm import VisionLanguageModel


@spec
class TwoVocabularies(Gathered):
    """Half the mean loss of words and half that of codes, however many a step has of each (LWM's published code).

    Codes are predicted by the head of codes and words by that of words: neither competes with the other. Both means are those of
    the whole step, so that packing changes nothing; where a step has one kind alone, its loss counts half, as there.
    """

    kind: Literal["two_vocabularies"] = "two_vocabularies"

    def collect(self, model: VisionLanguageModel, batch: Batch) -> Collected:
        """How much words and codes weigh in the pack, float64 (2,)."""
        return (torch.stack(_weights(*_targets(model, batch), _counts(batch))).double(),)

    def whole(self, packs: Sequence[Collected], group: dist.ProcessGroup | None) -> list[Tensor]:
        """For each pack the same: what words' and codes' sums are multiplied by."""
        weights = torch.stack([weighed for (weighed,) in packs]).sum(0)
        if group is not None:
            dist.all_reduce(weights, group=group)
        factors = torch.where(weights > 0, 0.5 * weights.sum() / weights.clamp(min=1e-6), 0.0).float()
        return [factors] * len(packs)

    def again(self, model: VisionLanguageModel, batch: Batch, told: Tensor) -> LossOutput:
        """Raises ValueError for a model of one vocabulary."""
        targets, counts = _targets(model, batch), _counts(batch)
        hidden = model(batch)
        heads = (model.lm.head, _fusion(model).head.weight)
        words, codes = (
            linear_cross_entropy(hidden, head, labels, counts) for head, labels in zip(heads, targets, strict=True)
        )
        learned = (batch.labels != NOT_LEARNED).float()
        rows = torch.stack([words.each + codes.each, learned, (words.correct | codes.correct).float()], dim=1)
        documents = rows.new_zeros(len(batch.sources), 3).index_add_(0, batch.document_of_token(), rows)
        weight = torch.stack(_weights(*targets, counts)).sum()
        return LossOutput(sum=told[0] * words.sum + told[1] * codes.sum, weight=weight, documents=documents)


def _fusion(model: VisionLanguageModel) -> Unified:
    if not isinstance(model.fusion, Unified):
        raise ValueError("two_vocabularies needs a model with two; take unified_vocabulary as its fusion")
    return model.fusion


def _targets(model: VisionLanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Labels of words and of codes, each int64 (T,) without the other's."""
    first = _fusion(model).first
    coded = batch.labels >= first
    return torch.where(coded, NOT_LEARNED, batch.labels), torch.where(coded, batch.labels - first, NOT_LEARNED)


def _counts(batch: Batch) -> Tensor:
    return batch.weights[batch.document_of_token()]


def _weights(words: Tensor, codes: Tensor, counts: Tensor) -> list[Tensor]:
    return [((labels != NOT_LEARNED) * counts).sum() for labels in (words, codes)]
