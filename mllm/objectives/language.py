"""Objectives of language models: the next token, and preferences between answers."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from mllm.objectives.base import LossOutput
from mllm.vlm import VisionLanguageModel
from ops.losses import linear_cross_entropy
from pipelines.types import NOT_LEARNED, Batch, Branch, spec


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

    def counted(self, model: VisionLanguageModel, batch: Batch) -> Tensor:  # noqa: ARG002 -- as others' that ask it
        """The weight, without asking the model."""
        return ((batch.labels != NOT_LEARNED) * self._counts(batch)).sum()

    def _counts(self, batch: Batch) -> Float[Tensor, " T"]:
        """How often each position counts."""
        counts = torch.where(batch.pictured, batch.weights, batch.weights * self.text_alone)[batch.document_of_token()]
        if self.codes is None:
            return counts
        coded = (batch.labels >= self.codes.first) & (batch.labels <= self.codes.last)
        return torch.where(coded, counts * self.codes_weight, counts)


@spec
class DPO:
    """Prefer one answer to another more than a frozen reference does (arXiv:2305.18290, eq. 7).

    For a pair w over l it is -log sigmoid(beta * ((log p(w) - log r(w)) - (log p(l) - log r(l)))), summed over pairs; `gamma`
    adds so many times the mean loss of a token of w (LLaVA-NeXT's SFT term). Log-probabilities r are the pack's `references`,
    which the annotator reference_log_probs makes. The weight is the number of pairs, each counting `batch.weights` times;
    a document that is no answer counts nothing. Raises ValueError for a batch without references.
    """

    kind: Literal["dpo"] = "dpo"
    beta: Annotated[float, Field(gt=0)] = 0.1
    gamma: Annotated[float, Field(ge=0)] = 0.0

    def __call__(self, model: VisionLanguageModel, batch: Batch) -> LossOutput:
        if batch.references is None:
            raise ValueError(
                "DPO compares with a reference, and the batch has none; add reference_log_probs to the annotators"
            )
        owner = batch.document_of_token()
        learned = batch.labels != NOT_LEARNED
        preferred = (batch.branches == Branch.PREFERRED).nonzero().squeeze(1)
        rejected = (batch.branches == Branch.REJECTED).nonzero().squeeze(1)  # each follows its own
        hidden, head = model(batch), model.lm.head
        with torch.no_grad():
            each = linear_cross_entropy(hidden.detach(), head.detach(), batch.labels).each
        documents = each.new_zeros(len(batch.sources), 2).index_add_(
            0, owner, torch.stack([-each, learned.to(each)], 1)
        )
        ratio = documents[:, 0] - batch.references
        margin = ratio[preferred] - ratio[rejected]
        counts, lengths = batch.weights[preferred], documents[preferred, 1].clamp(min=1)
        losses = -logsigmoid(self.beta * margin) - self.gamma * documents[preferred, 0] / lengths
        # The loss's slope by each answer's log-probability, which is minus the sum of its positions' losses.
        slope = self.beta * torch.sigmoid(-self.beta * margin)
        by_document = ratio.new_zeros(len(batch.sources))
        by_document[preferred] = counts * (slope + self.gamma / lengths)
        by_document[rejected] = -counts * slope
        steered = linear_cross_entropy(hidden, head, batch.labels, by_document[owner]).sum
        value = (counts * losses).sum()
        told = ratio.new_zeros(len(batch.sources), 3)
        told[preferred] = torch.stack([losses, torch.ones_like(losses), (margin > 0).to(losses)], dim=1)
        return LossOutput(sum=steered - steered.detach() + value, weight=counts.sum(), documents=told)
