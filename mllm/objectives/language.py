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
from pipelines.answers import changed_tokens
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
    a document that is no answer counts nothing. A batch without references has the loss of the next token if it has no answers
    either -- what is held out is told in the words of the stages before -- and raises ValueError if it has.

    A token that one of the two answers alone has counts `changed_weight` times in log p and log r, others once: RLHF-V's
    corrected segments (arXiv:2312.00849, 3.2), found as `pipelines.answers` says. With `mean` both are divided by what an
    answer's tokens weigh together, as that paper writes them; its code sums them, as does DPO.
    """

    kind: Literal["dpo"] = "dpo"
    beta: Annotated[float, Field(gt=0)] = 0.1
    gamma: Annotated[float, Field(ge=0)] = 0.0
    changed_weight: Annotated[float, Field(gt=0)] = 1.0
    mean: bool = False

    def __call__(self, model: VisionLanguageModel, batch: Batch) -> LossOutput:
        if batch.references is None:
            if not batch.branches.any():
                return NextToken()(model, batch)
            raise ValueError(
                "DPO compares with a reference, and the batch has none; add reference_log_probs to the annotators"
            )
        owner = batch.document_of_token()
        learned = (batch.labels != NOT_LEARNED).float()
        heavy = learned * self._counts(batch)
        preferred = (batch.branches == Branch.PREFERRED).nonzero().squeeze(1)
        rejected = (batch.branches == Branch.REJECTED).nonzero().squeeze(1)  # each follows its own
        hidden, head = model(batch), model.lm.head
        with torch.no_grad():
            each = linear_cross_entropy(hidden.detach(), head.detach(), batch.labels).each
        columns = torch.stack([-each * heavy, heavy, -each, learned], 1).to(each)
        said, weighs, plain, count = each.new_zeros(len(batch.sources), 4).index_add_(0, owner, columns).unbind(1)
        reference = batch.references[:, 0] + (self.changed_weight - 1) * batch.references[:, 1]
        share = 1 / weighs.clamp(min=1e-6) if self.mean else torch.ones_like(weighs)
        ratio = (said - reference) * share
        margin = ratio[preferred] - ratio[rejected]
        counts, lengths = batch.weights[preferred], count[preferred].clamp(min=1)
        losses = -logsigmoid(self.beta * margin) - self.gamma * plain[preferred] / lengths
        # The loss's slope by each answer's log-probability, which is minus the sum of its positions' losses.
        slope = counts * self.beta * torch.sigmoid(-self.beta * margin)
        by_answer, by_text = ratio.new_zeros(2, len(batch.sources))
        by_answer[preferred], by_answer[rejected] = slope * share[preferred], -slope * share[rejected]
        by_text[preferred] = counts * self.gamma / lengths
        steered = linear_cross_entropy(hidden, head, batch.labels, by_answer[owner] * heavy + by_text[owner]).sum
        value = (counts * losses).sum()
        told = ratio.new_zeros(len(batch.sources), 3)
        told[preferred] = torch.stack([losses, torch.ones_like(losses), (margin > 0).to(losses)], dim=1)
        return LossOutput(sum=steered - steered.detach() + value, weight=counts.sum(), documents=told)

    def _counts(self, batch: Batch) -> Float[Tensor, " T"]:
        """How often each position counts in its answer's log-probability."""
        if self.changed_weight == 1:
            return torch.ones_like(batch.labels, dtype=torch.float32)
        changed = changed_tokens(batch.labels.cpu().numpy(), batch.cu_seqlens.tolist(), batch.branches.tolist())
        return torch.where(torch.from_numpy(changed).to(batch.labels.device), self.changed_weight, 1.0)
