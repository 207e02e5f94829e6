"""Objectives of models that align pictures and texts: contrast with keys, hard matching, taught words, captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from mllm.aligned import Aligner, Embedded, Given, likeness, unfilled
from mllm.aligned.rows import given
from mllm.chance import chosen, mixed
from mllm.multiway import MultiwayEncoder
from mllm.objectives.base import Collected, Gathered, LossOutput, no_documents
from mllm.objectives.fused import MaskedTokens, Share
from mllm.streams import Paired
from pipelines.types import Batch, spec

TEXT, PICTURE = 7, 8
"""Salts: which text is hard for a picture, which picture for a text."""

Trust = Annotated[float, Field(ge=0, lt=1)]


def everyone(mine: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, int]:
    """Rows of all ranks, one rank's after the other's, and where this rank's begin. A collective; no gradient."""
    if group is None:
        return mine, 0
    count = torch.tensor([len(mine)], device=mine.device)
    counts = [torch.empty_like(count) for _ in range(group.size())]
    dist.all_gather(counts, count, group=group)
    lengths = torch.cat(counts).tolist()
    filled = mine.new_zeros(max(1, *lengths), *mine.shape[1:])
    filled[: len(mine)] = mine
    found = [torch.empty_like(filled) for _ in lengths]
    dist.all_gather(found, filled.contiguous(), group=group)
    return torch.cat([rows[:n] for rows, n in zip(found, lengths, strict=True)]), sum(lengths[: group.rank()])


class Step:
    """A step's pairs in the order of their rows' seeds, which neither packs nor ranks change."""

    def __init__(self, seeds: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.counts = [len(each) for each in seeds]
        self.seeds, self.first = everyone(torch.cat(list(seeds)), group)
        self.order = self.seeds.argsort(stable=True)
        self.seeds = self.seeds[self.order]

    def all(self, mine: Sequence[Tensor]) -> Tensor:
        """Of each pack its pairs' rows -> those of all, in order."""
        return everyone(torch.cat(list(mine)), self.group)[0][self.order]

    def places(self) -> list[Int[Tensor, " P"]]:
        """For each of this rank's packs where its pairs stand in that order."""
        back = torch.empty_like(self.order)
        back[self.order] = torch.arange(len(back), device=back.device)
        return list(back[self.first : self.first + sum(self.counts)].split(self.counts))


@dataclass(slots=True)
class Keys:
    """A step's keys, in the order of `Step`, and where a pack's pairs stand among them."""

    images: Float[Tensor, "A Q E"]
    texts: Float[Tensor, "A E"]
    places: Int[Tensor, " P"]


@spec
class MomentumContrast(Gathered):
    """Each picture against the keys of all texts of the step and the queue, each text against those of all pictures.

    Keys have no gradient: the twin's embeddings (ALBEF, arXiv:2107.07651, eq. 1, 6; MoCo), or where there is none the model's
    own, as in BLIP-2's published code. `soft` is how much a target is the twin's own likeness instead of the pair alone; it
    grows from nothing over the first `ramp` pairs. `smoothing` is spread over all keys. The weight is the number of pairs, each
    counting as its source says; a pair is right where its text's key is the picture's nearest of the step.
    """

    kind: Literal["momentum_contrast"] = "momentum_contrast"
    soft: Trust = 0.0
    ramp: Annotated[int, Field(ge=0)] = 0
    smoothing: Trust = 0.0

    def collect(self, model: Aligner, batch: Batch) -> Collected:
        keys = model.keys(batch)
        return keys.images, keys.texts, model.given(batch).seeds

    def whole(self, packs: Sequence[Collected], group: dist.ProcessGroup | None) -> list[Keys]:
        step = Step([pack[2] for pack in packs], group)
        images, texts = (step.all([pack[side] for pack in packs]) for side in (0, 1))
        return [Keys(images, texts, places) for places in step.places()]

    def counted(self, model: Aligner, batch: Batch) -> Tensor:
        """The weight, without asking the model."""
        return batch.weights[model.given(batch).documents].sum()

    def again(self, model: Aligner, batch: Batch, told: Keys) -> LossOutput:
        own, rows = model.embedded(batch), model.given(batch).documents
        warmth = model.warmth()
        images, texts = told.images, told.texts
        if model.queue is not None:
            before = model.queue.held()
            images, texts = torch.cat([images, before[0][:, None]]), torch.cat([texts, before[1]])
        with torch.no_grad():
            trust = model.trust(self.soft, self.ramp)
            pair = F.one_hot(told.places, max(len(texts), 1))[:, : len(texts)].float()
            to_text = self._target(likeness(told.images[told.places], texts) / warmth, pair, trust)
            to_image = self._target(likeness(images, told.texts[told.places]).T / warmth, pair, trust)
        by_text = likeness(own.images, texts) / warmth
        by_image = likeness(images, own.texts).T / warmth
        each = (_cross_entropy(by_text, to_text) + _cross_entropy(by_image, to_image)) / 2
        right = torch.zeros_like(each)
        if len(each):
            right = (by_text[:, : len(told.texts)].argmax(1) == told.places).to(each)
        documents = no_documents(batch)
        documents[rows] = torch.stack([each.detach(), torch.ones_like(each), right], dim=1)
        often = batch.weights[rows]
        nothing = 0 * (
            own.images.sum() + own.texts.sum() + warmth.sum()
        )  # a pack without pairs has gradients all the same
        return LossOutput(sum=(each * often).sum() + nothing, weight=often.sum(), documents=documents)

    def _target(self, logits: Float[Tensor, "P A"], pair: Float[Tensor, "P A"], trust: float) -> Float[Tensor, "P A"]:
        target = trust * logits.softmax(1) + (1 - trust) * pair if trust else pair
        return (1 - self.smoothing) * target + self.smoothing / max(pair.shape[1], 1)

    def settle(self, model: Aligner, told: Sequence[Keys]) -> None:
        model.feed(told[0].images, told[0].texts)


def _cross_entropy(logits: Float[Tensor, "P A"], target: Float[Tensor, "P A"]) -> Float[Tensor, " P"]:
    return -(logits.log_softmax(1) * target).sum(1)


@dataclass(slots=True)
class Asked:
    """What a pack is asked: its pairs' numbers int64 (n,), the text beside each picture (n, L), whether it belongs there (n,).

    `seeds` int64 (n,) are of the rows of both; `often` is what a row counts, so that all of a step's rows count as much as its
    pairs.
    """

    pairs: Int[Tensor, " n"]
    ids: Int[Tensor, "n L"]
    belongs: Int[Tensor, " n"]
    seeds: Int[Tensor, " n"]
    often: float


@spec
class HardMatching(Gathered):
    """Does the text belong to the picture? Each pair, and for each picture and each text another that looks alike.

    The other is drawn by how alike the contrast finds them, from all pairs of the step whose text is not the same (ALBEF,
    arXiv:2107.07651, 3.2; BLIP-2 draws from all ranks as well). The draw is a function of the row, the epoch and those numbers.
    A pair is asked on the rank that has its picture: texts travel, pictures do not. The loss is the mean of all that is asked,
    and the weight the number of pairs.
    """

    kind: Literal["hard_matching"] = "hard_matching"

    def collect(self, model: Aligner | MultiwayEncoder, batch: Batch) -> Collected:
        known = _given(model, batch)
        own, keys, warmth = _likened(model, batch)
        count = len(known.documents)
        ids = known.rows.filled(model.context)[:count]
        often = batch.weights[known.documents]
        return own.images, own.texts, keys.images, keys.texts, ids, known.seeds, often, warmth

    def whole(self, packs: Sequence[Collected], group: dist.ProcessGroup | None) -> list[Asked]:
        step = Step([pack[5] for pack in packs], group)
        images, texts, key_images, key_texts, ids, _, often = (step.all([pack[n] for pack in packs]) for n in range(7))
        warmth = packs[0][7]
        same = _alike(ids)
        text = drawn(likeness(images, key_texts) / warmth, same, step.seeds, TEXT)
        picture = drawn(likeness(key_images, texts).T / warmth, same, step.seeds, PICTURE)
        every = torch.arange(len(ids), device=ids.device)
        some = ~same.all(1)  # which have another at all
        beside = torch.cat([every, text[some], every[some]])  # the text
        shown = torch.cat([every, every[some], picture[some]])
        belongs = torch.cat([torch.ones_like(every), torch.zeros_like(every[some]), torch.zeros_like(every[some])])
        seeds = mixed(step.seeds[shown]) + step.seeds[beside]
        factor = float(often.sum() / often[shown].sum().clamp(min=1e-9)) if len(every) else 1.0
        asked = []
        for places in step.places():
            number = torch.full((len(ids),), -1, device=ids.device)
            number[places] = torch.arange(len(places), device=ids.device)
            mine = number[shown] >= 0
            asked.append(Asked(number[shown[mine]], ids[beside[mine]], belongs[mine], seeds[mine], factor))
        return asked

    def counted(self, model: Aligner | MultiwayEncoder, batch: Batch) -> Tensor:
        """The weight, without asking the model."""
        return batch.weights[_given(model, batch).documents].sum()

    def again(self, model: Aligner | MultiwayEncoder, batch: Batch, told: Asked) -> LossOutput:
        rows = _given(model, batch).documents
        scores = model.matched(batch, told.pairs, unfilled(told.ids, told.seeds)).float()
        logits = scores[: len(told.pairs)]
        each = F.cross_entropy(logits, told.belongs, reduction="none") * told.often
        of = rows[told.pairs]
        documents = no_documents(batch)
        right = (logits.argmax(1) == told.belongs).to(each) * told.often
        documents.index_add_(0, of, torch.stack([each.detach(), torch.zeros_like(each), right], dim=1))
        documents[rows, 1] = 1
        often = batch.weights
        value = (each * often[of]).sum() + 0 * scores.sum()
        return LossOutput(sum=value, weight=often[rows].sum(), documents=documents)


def _given(model: Aligner | MultiwayEncoder, batch: Batch) -> Given:
    """The batch's pairs; a model that aligns remembers them."""
    return given(batch, model.context) if isinstance(model, MultiwayEncoder) else model.given(batch)


def _likened(model: Aligner | MultiwayEncoder, batch: Batch) -> tuple[Embedded, Embedded, Float[Tensor, " 1"]]:
    """Embeddings of the batch's pairs, what they are compared with, and the temperature."""
    if not isinstance(model, MultiwayEncoder):
        return model.embedded(batch), model.keys(batch), model.warmth()
    pairs = model.embedded(batch)
    own = Embedded(pairs.images[:, None].float(), pairs.texts.float())
    return own, Embedded(own.images.detach(), own.texts.detach()), 1 / pairs.scale.float()


def _alike(ids: Int[Tensor, "A L"]) -> Bool[Tensor, "A A"]:
    """Which texts are the same, each one itself among them."""
    if not len(ids):
        return torch.zeros(0, 0, dtype=torch.bool, device=ids.device)
    number = ids.unique(dim=0, return_inverse=True)[1]
    return number[:, None] == number[None]


def drawn(
    logits: Float[Tensor, "A A"], never: Bool[Tensor, "A A"], seeds: Int[Tensor, " A"], salt: int
) -> Int[Tensor, " A"]:
    """For each row a column, by the softmax of its logits over those that are not `never`; any where all are never.

    The draw is of the row's seed: the same for whoever draws it.
    """
    if not len(logits):
        return seeds
    weights = logits.double().masked_fill(never, -torch.inf).softmax(1).nan_to_num(0)
    rows = torch.arange(len(logits), device=logits.device)
    sums = weights.cumsum(1)
    at = chosen(seeds, rows, torch.zeros_like(rows), salt).to(sums)[:, None] * sums[:, -1:]
    found = torch.searchsorted(sums, at, right=True).squeeze(1).clamp(max=len(logits) - 1)
    # Where rounding leads behind the last that can be, or onto one whose weight is none, the likeliest stands in.
    return torch.where(weights[rows, found] > 0, found, weights.argmax(1))


@spec
class DistilledTokens:
    """Cross-entropy of masked words seen with their picture, `soft` of it with what the twin would write there.

    As ALBEF has it (arXiv:2107.07651, eq. 3, 7). `soft` grows from nothing over the first `ramp` pairs. What is masked is what
    `MaskedTokens` masks; the weight is the number of such tokens.
    """

    kind: Literal["distilled_tokens"] = "distilled_tokens"
    share: Share = 0.15
    soft: Trust = 0.4
    ramp: Annotated[int, Field(ge=0)] = 0

    def __call__(self, model: Aligner, batch: Batch) -> LossOutput:
        known, paired, base = model.given(batch), self._paired(model, batch), MaskedTokens(share=self.share)
        texts = known.texts
        chosen_ = base.masked(batch, paired)
        hidden = base.hidden(model, batch, paired, chosen_)
        at = torch.zeros_like(known.rows.there)
        at[texts.owner, texts.positions] = chosen_
        ids = known.rows.ids.clone()
        ids[texts.owner, texts.positions] = hidden
        rows = replace(known.rows, ids=ids)
        logits = model.masked(batch, rows, at).float()
        right = texts.ids[chosen_]
        each = F.cross_entropy(logits, right, reduction="none")
        taught = model.taught(batch, rows, at)
        trust = model.trust(self.soft, self.ramp) if taught is not None else 0.0
        if taught is not None:
            each = (1 - trust) * each + trust * _cross_entropy(logits, taught.float().softmax(1))
        documents = no_documents(batch)
        owner = texts.documents[texts.owner[chosen_]] if len(texts.documents) else right
        found = torch.stack([each.detach(), torch.ones_like(each), (logits.argmax(-1) == right).to(each)], dim=1)
        documents.index_add_(0, owner, found)
        often = batch.weights[owner]
        return LossOutput(sum=(each * often).sum() + 0 * logits.sum(), weight=often.sum(), documents=documents)

    def counted(self, model: Aligner, batch: Batch) -> Tensor:
        """The weight, without asking the model."""
        texts, paired = model.given(batch).texts, self._paired(model, batch)
        if not len(texts.documents):
            return batch.weights.new_zeros(())
        masked = MaskedTokens(share=self.share).masked(batch, paired)
        return batch.weights[texts.documents[texts.owner[masked]]].sum()

    def _paired(self, model: Aligner, batch: Batch) -> Paired:
        known = model.given(batch)
        return Paired(known.texts, known.tiles[: len(known.documents)])


@spec
class Captioning:
    """Cross-entropy of each word of a pair's text, by the picture and the words before it (BLIP, CoCa, BLIP-2).

    `smoothing` is spread over the vocabulary. The weight is the number of words, the end mark with them.
    """

    kind: Literal["captioning"] = "captioning"
    smoothing: Trust = 0.0

    def __call__(self, model: Aligner, batch: Batch) -> LossOutput:
        known = model.given(batch)
        rows, count = known.rows, len(known.documents)
        scores = model.caption(batch)
        wanted = rows.there[:count, 1:]
        logits, right = scores[:count, :-1][wanted].float(), rows.ids[:count, 1:][wanted]
        each = F.cross_entropy(logits, right, reduction="none", label_smoothing=self.smoothing)
        owner = known.documents[:, None].expand(wanted.shape)[wanted]
        documents = no_documents(batch)
        found = torch.stack([each.detach(), torch.ones_like(each), (logits.argmax(-1) == right).to(each)], dim=1)
        documents.index_add_(0, owner, found)
        often = batch.weights[owner]
        return LossOutput(sum=(each * often).sum() + 0 * scores.sum(), weight=often.sum(), documents=documents)

    def counted(self, model: Aligner, batch: Batch) -> Tensor:
        """The weight, without asking the model."""
        known = model.given(batch)
        count = len(known.documents)
        words = known.rows.there[:count, 1:].sum(1)
        return (batch.weights[known.documents] * words).sum()
