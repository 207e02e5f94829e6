"""The fullest pack of a stage, told from the recipe alone: what memory and FLOPs are foretold of."""

from __future__ import annotations

import numpy as np

from mllm.objectives import DPO, Gathered
from mllm.recipe import Recipe, Stage
from mllm.vlm import VLM
from pipelines.corpora import TextOnly
from pipelines.types import IMAGE_TOKEN, NOT_LEARNED, Branch, Pack, Position

WORDS = 1009
"""Ids that texts are made of: a prime, so that no two documents have the same text."""

LONGEST = 128
"""Tokens of a document without a picture, for kinds that read texts as rows of a rectangle and cut what is longer."""


def fullest(recipe: Recipe, stage: Stage, features: bool = False) -> Pack:
    """The pack that takes the most: of a vision-language model one document, as many tiles as fit, everything else learned, or
    two answers of half its length where those are compared; of other kinds, and where pairs of a step are compared, as many
    documents of a picture and text as fit.
    """
    if not isinstance(recipe.model, VLM) or isinstance(stage.objective, Gathered):
        return of_documents(recipe, stage)
    tiling = recipe.tiling_of(stage)
    layout = recipe.vlm.layout(tiling)
    branches = (Branch.PREFERRED, Branch.REJECTED) if isinstance(stage.objective, DPO) else (Branch.ONLY,)
    count = len(branches)
    tokens, most = stage.context // count, stage.max_tiles // count
    large = 16 * tiling.size
    cut = tiling.cut(tiling.size, tiling.size, single=True) if tiling.join == "tiles" else tiling.cut(large, large)
    if cut.tiles > most:
        cut = tiling.cut(large, large, limit=max(1, most - 1))  # beside which there may be an overview
    each = layout.tokens(cut)
    pictures = min(most // cut.tiles, (tokens - 1) // each)
    tiles = count * pictures * cut.tiles
    ids = np.ones(tokens, np.int32)
    ids[: pictures * each] = IMAGE_TOKEN
    ids = np.tile(ids, count)
    labels = np.where(ids == IMAGE_TOKEN, np.int32(NOT_LEARNED), np.int32(1))
    made = None
    if features:
        tower = recipe.vlm.tower  # features are those of one
        made = np.zeros((tiles, tower.tokens(tiling.size), tower.width), np.uint16)
    return Pack(
        at=Position(),
        of=1,
        input_ids=ids,
        labels=labels,
        positions=np.tile(np.arange(tokens, dtype=np.int32), count),
        cu_seqlens=np.arange(count + 1, dtype=np.int32) * tokens,
        sources=np.zeros(count, np.int16),
        branches=np.array(branches, np.int8),
        classes=np.full(count, -1, np.int32),
        weights=np.ones(count, np.float32),
        ids=(),
        tiles=np.zeros((0 if features else tiles, *layout.shape), np.uint8),
        cuts=np.array([(cut.tiles, each, *cut.numbers)] * (count * pictures), np.int32).reshape(-1, 11),
        rows=(),
        features=made,
        references=np.zeros((count, 2), np.float32) if count > 1 else None,
    )


LENGTHS = (1.0, 0.5, 0.0)
"""Texts of the packs that FLOPs are told by, as shares of the fullest pack's: three tell a polynomial of second degree."""


def unlike(recipe: Recipe, stage: Stage) -> list[Pack]:
    """Packs of as many documents as the fullest of `of_documents` has, with texts as long, half as long, and of two tokens."""
    return [of_documents(recipe, stage, share) for share in LENGTHS]


def of_documents(recipe: Recipe, stage: Stage, share: float = 1.0) -> Pack:
    """Documents alike, each a picture and text, or text alone where the stage reads nothing else. All have the first class.

    Texts have a `share` of what fits.
    """
    tiling = recipe.tiling_of(stage)
    layout = recipe.model.layout(tiling)
    cut = tiling.cut(tiling.size, tiling.size)
    pictured = isinstance(recipe.model, VLM) or not all(isinstance(source.corpus, TextOnly) for source in stage.mixture)
    each = layout.tokens(cut) if pictured else 0
    tiles = cut.tiles if pictured else 0
    count = stage.context // (each + 2) if pictured else -(-stage.context // LONGEST)
    count = max(1, min(count, stage.max_tiles // tiles if tiles else count))
    length = stage.context // count
    least = min(length, each + 2)
    length = least + round(share * (length - least))
    ids = 1 + np.arange(count * length, dtype=np.int32) % WORDS
    ids.reshape(count, length)[:, :each] = IMAGE_TOKEN
    return Pack(
        at=Position(),
        of=1,
        input_ids=ids,
        labels=np.where(ids == IMAGE_TOKEN, np.int32(NOT_LEARNED), ids),
        positions=np.tile(np.arange(length, dtype=np.int32), count),
        cu_seqlens=np.arange(count + 1, dtype=np.int32) * length,
        sources=np.zeros(count, np.int16),
        branches=np.zeros(count, np.int8),
        classes=np.zeros(count, np.int32),
        weights=np.ones(count, np.float32),
        ids=(),
        tiles=np.zeros((count * tiles, *layout.shape), np.uint8),
        cuts=np.array([(tiles, each, *cut.numbers)] * (count if pictured else 0), np.int32).reshape(-1, 11),
        rows=(),
    )
