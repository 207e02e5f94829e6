"""What was in the regions of a picture that a model does not see, read off the text and the other regions."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from mllm.chance import chosen, row_seeds
from mllm.objectives.base import LossOutput, no_documents
from mllm.objectives.fused import REGION, Share
from mllm.regions import PairedRegions, Seen
from mllm.streams import Fused
from pipelines.types import Batch, spec

Target = Literal["features", "classes", "kl", "attributes"]


@spec
class MaskedRegions:
    """Masked regions (UNITER, arXiv:1909.11740, 3.2; LXMERT, arXiv:1908.07490, 3.1.2); the weight is the number of those.

    `share` of the regions are hidden, which a function of the row and the epoch chooses; words all show. Of each is told, and the
    losses added: its "features" (squared error, or `smooth` L1, their mean), its likeliest of "classes" or "attributes"
    (cross-entropy, times the detector's certainty where `sure`), or the whole distribution of classes ("kl", from it to the
    model's). Classes before `first` are no answer: 1 leaves out a detector's background. Where classes are asked for, a
    region counts as right if its class is.
    """

    kind: Literal["masked_regions"] = "masked_regions"
    targets: tuple[Target, ...]
    share: Share = 0.15
    smooth: bool = False
    sure: bool = False
    first: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"masked_regions: targets={self.targets}; name each of what is to be told once, and at least one"
            )

    def __call__(self, model: Any, batch: Batch) -> LossOutput:
        paired: PairedRegions = model.pairs(batch)
        seen, masked = self.hide(batch, paired)
        return self.read(model, batch, paired, masked, model.fuse(batch, seen))

    def hide(self, batch: Batch, paired: PairedRegions) -> tuple[PairedRegions, Bool[Tensor, " V"]]:
        """The pairs as a model sees them, and which of their regions are hidden."""
        masked = self.masked(batch, paired)
        return replace(paired, hidden=masked), masked

    def read(
        self, model: Any, batch: Batch, paired: PairedRegions, masked: Bool[Tensor, " V"], fused: Fused
    ) -> LossOutput:
        """The loss of what was made of the pairs as `hide` showed them."""
        hidden = fused.pictures[masked]
        seen: Seen = model.rows_of(batch, paired)
        each = hidden.new_zeros(len(hidden), dtype=torch.float32)
        right = torch.zeros_like(each)
        for target in self.targets:
            predicted = model.predicted(hidden, "classes" if target == "kl" else target).float()
            losses, hits = self._losses(target, predicted, seen, masked)
            each = each + losses
            right = right if target in ("features", "attributes") else hits
        documents = no_documents(batch)
        owner = paired.owner[masked]
        rows = paired.texts.documents[owner] if len(paired.texts.documents) else owner
        told = torch.stack([each.detach(), torch.ones_like(each), right], dim=1)
        documents.index_add_(0, rows, told)
        often = batch.weights[rows]
        return LossOutput(sum=(each * often).sum(), weight=often.sum(), documents=documents)

    def _losses(
        self, target: Target, predicted: Float[Tensor, "M K"], seen: Seen, masked: Bool[Tensor, " V"]
    ) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
        """Of each hidden region its loss, and whether its likeliest class was found."""
        if target == "features":
            error = F.smooth_l1_loss if self.smooth else F.mse_loss
            losses = error(predicted, seen.features[masked], reduction="none").mean(1)
            return losses, torch.zeros_like(losses)
        likely = (seen.attributes if target == "attributes" else seen.classes)[masked]
        before = self.first if target != "attributes" else 0
        certain, answer = likely[:, before:].max(1)
        answer = answer + before
        right = (predicted.argmax(1) == answer).float()
        if target == "kl":
            told = likely / likely.sum(1, keepdim=True).clamp(min=1e-6)
            return F.kl_div(F.log_softmax(predicted, 1), told, reduction="none").sum(1), right
        losses = F.cross_entropy(predicted, answer, reduction="none")
        return (losses * certain if self.sure else losses), right

    def counted(self, model: Any, batch: Batch) -> Tensor:
        """The weight, without asking the model."""
        paired: PairedRegions = model.pairs(batch)
        if not len(paired.texts.documents):
            return batch.weights.new_zeros(())
        owner = paired.owner[self.masked(batch, paired)]
        return batch.weights[paired.texts.documents[owner]].sum()

    def masked(self, batch: Batch, paired: PairedRegions) -> Bool[Tensor, " V"]:
        """Which regions are hidden."""
        if not len(paired.texts.documents):
            return torch.zeros_like(paired.tiles, dtype=torch.bool)
        return chosen(row_seeds(batch)[paired.texts.documents], paired.owner, paired.place, REGION) < self.share
