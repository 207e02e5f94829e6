"""Pictures and texts of a pack as pairs, whatever model reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipelines.types import Batch


@dataclass(slots=True)
class Pairs:
    """Embeddings of a pack's pairs, of unit length (P, D) each; the index of each one's document int64 (P,).

    `scale` and `bias`, both (1,), are what logits are multiplied by and added to.
    """

    images: Float[Tensor, "P D"]
    texts: Float[Tensor, "P D"]
    documents: Int[Tensor, " P"]
    scale: Float[Tensor, " 1"]
    bias: Float[Tensor, " 1"]


class PairModel(Protocol):
    """A model that has an embedding for pictures and one for texts, in one space."""

    def pairs(self, batch: Batch) -> Pairs: ...


@dataclass(slots=True)
class Texts:
    """The text of a pack's documents, end to end, without places of pictures.

    `ids` and `positions` int64 (T,), `cu_seqlens` int32 (S+1,), `max_seqlen` of them; `documents` int64 (S,), the index of each
    one's document in the batch; `at` int64 (T,), each token's place in the batch. A batch without text has one blank token that
    is no document's: `documents` and `at` are empty, and so is all that is read off by them.
    """

    ids: Int[Tensor, " T"]
    positions: Int[Tensor, " T"]
    cu_seqlens: Int[Tensor, " bounds"]
    max_seqlen: int
    documents: Int[Tensor, " S"]
    at: Int[Tensor, " T"]

    @property
    def owner(self) -> Int[Tensor, " T"]:
        """Which of these texts each token is of."""
        lengths = self.cu_seqlens.diff().long()
        return torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)

    @property
    def last(self) -> Int[Tensor, " S"]:
        """Where each document's last token is; of no document where the text is blank."""
        return (self.cu_seqlens[1:].long() - 1)[: len(self.documents)]


def texts_of(batch: Batch, longest: int) -> Texts:
    """The texts of a batch, each of at most `longest` tokens: a longer one keeps its first and its very last, the end mark."""
    owner = batch.document_of_token()
    at = (~batch.visual).nonzero().squeeze(1)
    counts = torch.bincount(owner[at], minlength=len(batch.sources))
    place = _restarted(owner[at], counts)
    kept = (place < longest - 1) | (place == counts[owner[at]] - 1)
    at, place = at[kept], place[kept].clamp(max=longest - 1)
    if not len(at):
        blank = torch.zeros(1, dtype=torch.long, device=owner.device)
        bounds = torch.tensor([0, 1], dtype=torch.int32, device=owner.device)
        return Texts(blank, blank, bounds, 1, documents=at, at=at)
    counts = counts.clamp(max=longest)
    there = counts.nonzero().squeeze(1)
    bounds = torch.nn.functional.pad(counts[there].cumsum(0), (1, 0)).to(torch.int32)
    return Texts(batch.input_ids[at], place, bounds, int(counts.max()), documents=there, at=at)


def _restarted(owner: Int[Tensor, " T"], counts: Int[Tensor, " S"]) -> Int[Tensor, " T"]:
    """Places from zero in each document."""
    starts = counts.cumsum(0) - counts
    return torch.arange(len(owner), device=owner.device) - starts[owner]


@dataclass(slots=True)
class Shown:
    """Pictures of a batch: the document of each, int64 (I,), and the first of its tiles, int64 (I,)."""

    documents: Int[Tensor, " I"]
    tiles: Int[Tensor, " I"]


def shown(batch: Batch) -> Shown:
    """All pictures of a batch in order."""
    tiles, positions = batch.cuts[:, 0].long(), batch.cuts[:, 1].long()
    places = batch.visual.nonzero().squeeze(1)
    # A further frame of a video has no position; its document is that of the last position before it.
    first = places[positions.cumsum(0) - positions - (positions == 0).long()]
    return Shown(batch.document_of_token()[first], tiles.cumsum(0) - tiles)


def frames_of(batch: Batch, tiles: int) -> list[int]:
    """How many of a batch's `tiles`, one after the other, are read together: the frames of a video, 1 for any other tile."""
    counts: list[int] = []
    for count, positions in batch.cuts[:, :2].tolist():
        if positions:
            counts += [1] * count
        else:
            counts[-1] += count
    return counts or [1] * tiles


def first_pictures(batch: Batch) -> Shown:
    """The first picture of each document that has one."""
    every = shown(batch)
    new = torch.ones_like(every.documents, dtype=torch.bool)
    new[1:] = every.documents[1:] != every.documents[:-1]
    return Shown(every.documents[new], every.tiles[new])
