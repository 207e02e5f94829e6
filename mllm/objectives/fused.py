"""Objectives of encoders that see a text and its picture together: does it belong to it, and what are its masked words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from mllm.chance import chosen, row_seeds
from mllm.objectives.base import Collected, Gathered, LossOutput, no_documents
from mllm.pairs import Texts
from mllm.streams import Fused, Fuser, P, Paired, with_texts
from ops.transport import transport_cost
from pipelines.types import NOT_LEARNED, Batch, spec

TURN, HIDE, HOW, WHAT, REGION = range(5)
"""Salts: whether a pair is torn apart, which tokens are masked, in which way, by which words, which regions are."""


class Vocabulary(Protocol):
    """A model that knows how many words there are, and which stands for a masked one."""

    vocabulary: int
    mask: int


Share = Annotated[float, Field(gt=0, lt=1)]


@spec
class MaskedTokens:
    """Cross-entropy of masked words, seen with their picture; the weight is their number (BERT, arXiv:1810.04805, 3.1).

    `share` of a text's tokens, without its first and last, are masked: eight in ten become the mask, one another word, one stays.
    Which ones is a function of the row and the epoch. With `whole_words` all tokens of a word are masked or none (ViLT,
    arXiv:2102.03334, 3.3); where a word ends the model knows from its tokenizer.
    """

    kind: Literal["masked_tokens"] = "masked_tokens"
    share: Share = 0.15
    whole_words: bool = False

    def __call__(self, model: Fuser, batch: Batch) -> LossOutput:
        paired = model.pairs(batch)
        seen, masked = self.hide(model, batch, paired)
        return self.read(model, batch, paired, masked, model.fuse(batch, seen))

    def hide(self, model: Fuser, batch: Batch, paired: P) -> tuple[P, Bool[Tensor, " T"]]:
        """The pairs as a model sees them, and which of their tokens are masked."""
        masked = self.masked(batch, paired, model.continues)
        ids = self.hidden(model, batch, paired, masked)
        return replace(paired, texts=replace(paired.texts, ids=ids)), masked

    def read(self, model: Fuser, batch: Batch, paired: Paired, masked: Bool[Tensor, " T"], fused: Fused) -> LossOutput:
        """The loss of what was made of the pairs as `hide` showed them."""
        texts = paired.texts
        logits = model.words_of(fused.texts[masked]).float()
        right = texts.ids[masked]
        each = F.cross_entropy(logits, right, reduction="none")
        documents = no_documents(batch)
        owner = texts.documents[texts.owner[masked]] if len(texts.documents) else right
        told = torch.stack([each.detach(), torch.ones_like(each), (logits.argmax(-1) == right).to(each)], dim=1)
        documents.index_add_(0, owner, told)
        often = batch.weights[owner]
        return LossOutput(sum=(each * often).sum(), weight=often.sum(), documents=documents)

    def counted(self, model: Fuser, batch: Batch) -> Tensor:
        """The weight, without asking the model."""
        paired = model.pairs(batch)
        masked = self.masked(batch, paired, model.continues)
        texts = paired.texts
        return (
            batch.weights[texts.documents[texts.owner[masked]]].sum()
            if len(texts.documents)
            else batch.weights.new_zeros(())
        )

    def masked(self, batch: Batch, paired: Paired, continues: Tensor | None = None) -> Tensor:
        """Which tokens of the pairs' texts are masked, bool (T,). `continues` (C,) says which tokens are no word's first."""
        texts = paired.texts
        if not len(texts.documents):
            return torch.zeros_like(texts.ids, dtype=torch.bool)
        return self.drawn(row_seeds(batch)[texts.documents], texts, continues)

    def drawn(self, rows: Int[Tensor, " S"], texts: Texts, continues: Tensor | None = None) -> Bool[Tensor, " T"]:
        """Which tokens of `texts` are masked where `rows` are the seeds of each one's row."""
        last = texts.cu_seqlens[1:].long() - 1
        inner = texts.positions > 0
        inner[last] = False
        draw = chosen(rows, texts.owner, texts.positions, HIDE)
        if not self.whole_words or continues is None:
            return inner & (draw < self.share)
        # A word is drawn by its first token, which bos never is.
        first = (continues[texts.ids] == 0) | (texts.positions <= 1)
        number = torch.arange(len(first), device=first.device)
        begin = torch.where(first, number, 0).cummax(0).values
        return inner & (draw[begin] < self.share)

    def hidden(self, model: Vocabulary, batch: Batch, paired: Paired, masked: Tensor) -> Tensor:
        """Ids of the pairs' texts, int64 (T,), with what stands in the place of those that are masked."""
        texts = paired.texts
        if not len(texts.documents):
            return texts.ids
        how = self._draw(batch, paired, HOW)
        other = (self._draw(batch, paired, WHAT) * model.vocabulary).long()
        stands = torch.where(
            how < 0.8, torch.full_like(texts.ids, model.mask), torch.where(how < 0.9, other, texts.ids)
        )
        return torch.where(masked, stands, texts.ids)

    def _draw(self, batch: Batch, paired: Paired, salt: int) -> Float[Tensor, " T"]:
        texts = paired.texts
        return chosen(row_seeds(batch)[texts.documents], texts.owner, texts.positions, salt)


@spec
class Matching(Gathered):
    """Does the text belong to the picture? Cross-entropy of two answers (ViLT, arXiv:2102.03334, 3.2) over pairs.

    `torn` is the share of pairs that get another pair's text: the next one's, all pairs of the step standing in an order that is
    chance but depends on rows alone, so that neither packs nor ranks matter. With `alignment` the cost of moving words onto
    patches is added for pairs that belong together and taken away for others, so many times (word-patch alignment).
    """

    kind: Literal["matching"] = "matching"
    torn: Share = 0.5
    alignment: Annotated[float, Field(ge=0)] = 0.0

    def collect(self, model: Fuser, batch: Batch) -> Collected:
        texts = model.pairs(batch).texts
        count = len(texts.documents)
        ids = torch.full((max(count, 1), model.context), NOT_LEARNED, device=texts.ids.device)
        ids[texts.owner, texts.positions] = texts.ids
        rows = row_seeds(batch)[texts.documents]
        zero = torch.zeros_like(rows)
        turn = chosen(rows, torch.arange(count, device=rows.device), zero, TURN) if count else zero.float()
        return ids[:count], rows, turn < self.torn

    def whole(self, packs: Sequence[Collected], group: dist.ProcessGroup | None) -> list[list[tuple[list[int], bool]]]:
        mine = [list(zip(*(x.tolist() for x in pack), strict=True)) for pack in packs]
        everyone: list[Any] = [mine]
        if group is not None:
            everyone = [None] * group.size()
            dist.all_gather_object(everyone, mine, group=group)
        ring = sorted({(seed, tuple(ids)) for packs in everyone for pack in packs for ids, seed, _ in pack})
        after = {pair: ring[(place + 1) % len(ring)][1] for place, pair in enumerate(ring)}
        told = []
        for pack in mine:
            rows = []
            for ids, seed, torn in pack:
                text = after[seed, tuple(ids)] if torn else ids
                rows.append(([i for i in text if i != NOT_LEARNED], list(text) == list(ids)))
            told.append(rows)
        return told

    def again(self, model: Fuser, batch: Batch, told: list[tuple[list[int], bool]]) -> LossOutput:
        paired = model.pairs(batch)
        return self.read(
            model, batch, paired, told, model.fuse(batch, with_texts(paired, [words for words, _ in told]))
        )

    def read(
        self, model: Fuser, batch: Batch, paired: Paired, told: list[tuple[list[int], bool]], fused: Fused
    ) -> LossOutput:
        """The loss of what was made of the pairs with the texts that they were told."""
        count = len(told)
        logits = model.match(fused.pooled[:count]).float()
        belongs = torch.tensor([right for _, right in told], dtype=torch.long, device=logits.device)
        each = F.cross_entropy(logits, belongs, reduction="none")
        if self.alignment:
            each = each + self.alignment * self._moved(model, fused, paired, told) * (2 * belongs - 1)
        documents = no_documents(batch)
        rows = paired.texts.documents
        right = (logits.argmax(-1) == belongs).to(each) if count else each.detach()
        documents[rows] = torch.stack([each.detach(), torch.ones_like(each), right], dim=1)
        often = batch.weights[rows]
        return LossOutput(sum=(each * often).sum(), weight=often.sum(), documents=documents)

    def counted(self, model: Fuser, batch: Batch) -> Tensor:
        """The weight, without asking the model."""
        return batch.weights[model.pairs(batch).texts.documents].sum()

    def _moved(
        self, model: Fuser, fused: Fused, paired: Paired, told: list[tuple[list[int], bool]]
    ) -> Float[Tensor, " P"]:
        """The cost of moving words onto patches or regions, without the first and last token and the picture's CLS."""
        lengths = torch.tensor([len(words) for words, _ in told], device=fused.texts.device)
        if not len(lengths):
            return fused.texts[:0, 0].float()
        places = torch.arange(max(len(words) for words, _ in told), device=lengths.device)[None]
        # Beyond a text's end stand rows of others, which do not count.
        rows = (lengths.cumsum(0) - lengths)[:, None] + places
        spread = fused.texts[rows.clamp(max=len(fused.texts) - 1)]
        there = (places > 0) & (places < lengths[:, None] - 1)
        onto, which = model.aligned(fused, paired)
        return transport_cost(spread, onto, there, onto=which)
