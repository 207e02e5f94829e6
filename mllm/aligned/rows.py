"""Texts as rows of a rectangle, and what a model is given of a batch: its pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mllm.pairs import Texts
from mllm.streams import pairs_of
from pipelines.types import NOT_LEARNED, Batch


@dataclass(slots=True)
class Rows:
    """`ids` int64 (S, L), of which `there` bool (S, L) says where a token stands: each row from its beginning on.

    `seeds` int64 (S,) are what is left out in training by; without them nothing is.
    """

    ids: Int[Tensor, "S L"]
    there: Bool[Tensor, "S L"]
    seeds: Int[Tensor, " S"] | None = None

    def begun_with(self, mark: int | None) -> Rows:
        """The same with `mark` in place of each row's first token, which tells a model what to do with it; None leaves it."""
        if mark is None:
            return self
        ids = self.ids.clone()
        ids[:, 0] = mark
        return replace(self, ids=ids)

    def filled(self, longest: int) -> Int[Tensor, "S longest"]:
        """`ids` with what is not there marked, in a rectangle of one width, to be sent to other ranks."""
        ids = self.ids.masked_fill(~self.there, NOT_LEARNED)
        return torch.nn.functional.pad(ids, (0, longest - ids.shape[1]), value=NOT_LEARNED)


def rows_of(texts: Texts) -> Rows:
    """Packed texts as rows, each document beginning one."""
    owner, count = texts.owner, len(texts.cu_seqlens) - 1
    ids = torch.zeros(count, texts.max_seqlen, dtype=torch.long, device=texts.ids.device)
    there = torch.zeros_like(ids, dtype=torch.bool)
    ids[owner, texts.positions] = texts.ids
    there[owner, texts.positions] = True
    return Rows(ids, there)


def unfilled(ids: Int[Tensor, "S longest"], seeds: Int[Tensor, " S"]) -> Rows:
    """What `Rows.filled` made, without columns that are empty in all rows; one blank row where there is none."""
    if not len(ids):
        blank = torch.zeros(1, 1, dtype=torch.long, device=ids.device)
        return Rows(blank, torch.ones_like(blank, dtype=torch.bool), blank[0])
    there = ids != NOT_LEARNED
    width = int(there.sum(1).max())
    return Rows(ids[:, :width].clamp(min=0), there[:, :width], seeds)


@dataclass(slots=True)
class Given:
    """Pairs of a batch: documents with a picture and text.

    `texts` packed and as `rows`, which are one blank row where there is no pair; `tiles` int64, the tile of each row;
    `documents` int64 (P,) and `seeds` int64 (P,), those of the pairs' own rows in their corpus.
    """

    texts: Texts
    rows: Rows
    tiles: Int[Tensor, " S"]
    documents: Int[Tensor, " P"]
    seeds: Int[Tensor, " P"]


def given(batch: Batch, longest: int) -> Given:
    """The pairs of `batch`, texts of at most `longest` tokens. Raises ValueError for a batch without seeds."""
    if batch.seeds is None:
        raise ValueError("the batch knows no seeds of its rows; make it with Batch.of")
    paired = pairs_of(batch, longest)
    tiles = paired.tiles if len(paired.tiles) else torch.zeros(1, dtype=torch.long, device=batch.tiles.device)
    documents = paired.texts.documents
    seeds = batch.seeds[documents]
    rows = replace(rows_of(paired.texts), seeds=seeds if len(seeds) else torch.zeros_like(tiles))
    return Given(paired.texts, rows, tiles, documents, seeds)


@dataclass(slots=True)
class Embedded:
    """Embeddings of pairs, of unit length: pictures float (P, Q, E), one or several each, and texts float (P, E)."""

    images: Float[Tensor, "P Q E"]
    texts: Float[Tensor, "P E"]


def likeness(images: Float[Tensor, "A Q E"], texts: Float[Tensor, "B E"]) -> Float[Tensor, "A B"]:
    """How alike pictures and texts are, in float32; of a picture's several embeddings the nearest counts (BLIP-2, 3.1)."""
    return torch.einsum("aqe,be->aqb", images.float(), texts.float()).amax(1)
