"""Masked data modelling: words and patches alike are masked and guessed, in texts, in pictures and in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mllm.chance import block_masks, tile_seeds
from mllm.objectives.base import Collected, Gathered, LossOutput, no_documents
from mllm.objectives.fused import MaskedTokens, Share
from mllm.streams import Paired
from pipelines.types import Batch, spec

if TYPE_CHECKING:
    from mllm.multiway import MultiwayEncoder, Whole


@dataclass(slots=True)
class Masks:
    """What is masked: of the texts' words bool (T,), and of the pictures' patches bool (K, P)."""

    words: Bool[Tensor, " T"]
    patches: Bool[Tensor, "K P"]


@spec
class MaskedData(Gathered):
    """Cross-entropy of masked words and of the codes of masked patches (BEiT-3, arXiv:2208.10442, 2.2; VL-BEiT, 2.3).

    `words` are the share masked of a text by itself, `paired_words` of one with a picture, as `MaskedTokens` masks; `patches` of
    a picture, in blocks as BEiT masks. Both are masked in one pass: what is left of the one helps to guess the other. A step's
    loss is the sum of four means, of words and of patches, of documents alone and of pairs, as many of them as it has.
    """

    kind: Literal["masked_data"] = "masked_data"
    words: Share = 0.15
    paired_words: Share = 0.5
    patches: Share = 0.4

    def collect(self, model: MultiwayEncoder, batch: Batch) -> Collected:
        """How much each of the four weighs in the pack, float64 (4,)."""
        whole = model.whole(batch)
        masks = self.masks(model, batch, whole)
        weights = [often.sum() for _, often in _parts(batch, whole, masks)]
        return (torch.stack(weights).double(),)

    def whole(self, packs: Sequence[Collected], group: dist.ProcessGroup | None) -> list[Tensor]:
        """For each pack the same: what the four sums are multiplied by."""
        totals = torch.stack([weighed for (weighed,) in packs]).sum(0)
        if group is not None:
            dist.all_reduce(totals, group=group)
        factors = torch.where(totals > 0, totals.sum() / totals.clamp(min=1e-6), 0.0).float()
        return [factors] * len(packs)

    def again(self, model: MultiwayEncoder, batch: Batch, told: Tensor) -> LossOutput:
        whole = model.whole(batch)
        masks = self.masks(model, batch, whole)
        ids = MaskedTokens().hidden(model, batch, Paired(whole.texts, whole.tiles), masks.words)
        seen = replace(whole, texts=replace(whole.texts, ids=ids))
        words, patches = model.read(batch, seen, masks.patches)
        scored = (
            (model.words_of(words[masks.words]), whole.texts.ids[masks.words]),
            (model.codes_of(patches[masks.patches]), model.codes(batch, whole.tiles)[masks.patches]),
        )
        documents = no_documents(batch)
        total, weight = told.new_zeros(()), told.new_zeros(())
        owners = _owners(whole, masks)
        for kind, ((logits, wanted), (owner, paired)) in enumerate(zip(scored, owners, strict=True)):
            each = F.cross_entropy(logits.float(), wanted, reduction="none") * told[2 * kind + paired.long()]
            right = (logits.argmax(-1) == wanted).to(each)
            documents.index_add_(0, owner, torch.stack([each.detach(), torch.ones_like(each), right], dim=1))
            often = batch.weights[owner]
            total, weight = total + (each * often).sum(), weight + often.sum()
        return LossOutput(sum=total, weight=weight, documents=documents)

    def masks(self, model: MultiwayEncoder, batch: Batch, whole: Whole) -> Masks:
        """What is masked of a batch: a function of its rows alone."""
        texts, both = whole.texts, Paired(whole.texts, whole.tiles)
        alone = MaskedTokens(share=self.words).masked(batch, both)
        if len(texts.documents):
            paired = whole.paired[texts.documents][texts.owner]
            alone = torch.where(paired, MaskedTokens(share=self.paired_words).masked(batch, both), alone)
        seeds = tile_seeds(batch)[whole.tiles].tolist()
        side = model.spec.image // model.spec.patch
        patches = torch.zeros(0, side * side, dtype=torch.bool)
        if seeds:
            patches = block_masks(seeds, side, round(self.patches * side * side))
        return Masks(alone, patches.to(batch.weights.device))


def _owners(whole: Whole, masks: Masks) -> list[tuple[Tensor, Tensor]]:
    """Of what is masked, words and then patches, the documents, and whether those are pairs."""
    texts = whole.texts
    at = masks.words.nonzero().squeeze(1)
    spoken = texts.documents[texts.owner[at]] if len(texts.documents) else at
    shown = whole.documents[masks.patches.nonzero()[:, 0]]
    return [(owner, whole.paired[owner]) for owner in (spoken, shown)]


def _parts(batch: Batch, whole: Whole, masks: Masks) -> list[tuple[Tensor, Float[Tensor, " M"]]]:
    """The four: documents of what is masked, and how often each counts."""
    found = []
    for owner, paired in _owners(whole, masks):
        for wanted in (~paired, paired):
            found.append((owner[wanted], batch.weights[owner[wanted]]))
    return found
