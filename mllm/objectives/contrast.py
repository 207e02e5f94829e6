"""Image-text contrast over all pairs of an optimiser step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mllm.multiway import MultiwayEncoder
from mllm.objectives.base import Collected, Gathered, LossOutput, leaves, no_documents, slopes, steered
from mllm.pairs import PairModel, Pairs
from ops.contrast import contrastive_rows, sigmoid_rows
from pipelines.types import Batch, spec

Told = tuple[Tensor, Tensor, Collected]
"""Of a pack's pairs their losses and whether each was found (P,), and the slopes by what was collected of it."""


@spec
class Contrastive(Gathered):
    """Each picture against all texts of the step, and each text against all pictures.

    `softmax` is CLIP's InfoNCE both ways (arXiv:2103.00020, fig. 3), `sigmoid` SigLIP's, pair by pair (arXiv:2303.15343, alg. 1).
    A document's pair is its first picture and its text; documents without both have none. The weight is the number of pairs,
    and a pair counts as right where its text is the picture's nearest. Negatives are all other pairs of the step, on all ranks.
    """

    kind: Literal["contrastive"] = "contrastive"
    loss: Literal["softmax", "sigmoid"] = "softmax"

    def collect(self, model: PairModel | MultiwayEncoder, batch: Batch) -> Collected:
        pairs = _embedded(model, batch)
        return pairs.images, pairs.texts, pairs.scale, pairs.bias

    def whole(self, packs: Sequence[Collected], group: dist.ProcessGroup | None) -> list[Told]:
        with torch.enable_grad():
            packs = leaves(packs)
            images, texts = (torch.cat([pack[side] for pack in packs]).float() for side in (0, 1))
            scale, bias = (packs[0][place].float().squeeze() for place in (2, 3))  # the same numbers in every pack
            if self.loss == "softmax":
                rows = contrastive_rows(images, texts, scale, group)
            else:
                rows = sigmoid_rows(images, texts, scale, bias, group)
            by = slopes(rows.sum, packs)
        counts = [len(pack[0]) for pack in packs]
        return list(zip(rows.each.split(counts), rows.right.split(counts), by, strict=True))

    def counted(self, model: PairModel | MultiwayEncoder, batch: Batch) -> Tensor:
        """The weight, which asks the model which documents are pairs."""
        return torch.tensor(float(len(_embedded(model, batch).documents)), device=batch.sources.device)

    def again(self, model: PairModel | MultiwayEncoder, batch: Batch, told: Told) -> LossOutput:
        losses, right, slope = told
        pairs: Pairs = _embedded(model, batch)
        documents = no_documents(batch)
        documents[pairs.documents] = torch.stack([losses, torch.ones_like(losses), right.to(losses)], dim=1)
        value = steered((pairs.images, pairs.texts, pairs.scale, pairs.bias), slope) + losses.sum()
        return LossOutput(sum=value, weight=losses.new_tensor(float(len(losses))), documents=documents)


def _embedded(model: PairModel | MultiwayEncoder, batch: Batch) -> Pairs:
    """The embeddings of a batch's pairs. A model that sees pairs whole as well has `pairs` that are none."""
    return model.embedded(batch) if isinstance(model, MultiwayEncoder) else model.pairs(batch)
