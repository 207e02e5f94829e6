"""Retrieval by a language model: what it holds at a text's last token is compared with pictures (FROMAGe)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from mllm.objectives.base import Collected, Gathered, LossOutput
from mllm.objectives.contrast import Contrastive, Told
from mllm.pairs import Pairs, Texts, first_pictures, texts_of
from mllm.pooled import Found
from mllm.vlm import VisionLanguageModel
from pipelines.types import NOT_LEARNED, Batch, spec

LONGEST = 2048
"""Tokens of a text that are read; a longer one keeps its beginning and its last."""


@spec
class RetrievalToken(Gathered):
    """Each text, read without its picture, against all pictures of the step, and each picture against all texts.

    InfoNCE both ways (FROMAGe, arXiv:2301.13823, eq. 3, 4) between pictures and the language model's state at a text's last
    token, which the recipe makes one of its own: `model.lm.eos` is [RET], and `lm.embeddings` with a `first_row` trains its row
    alone. The weight is the number of pairs. Raises ValueError for a connector other than `first_feature`.
    """

    kind: Literal["retrieval_token"] = "retrieval_token"

    def collect(self, model: VisionLanguageModel, batch: Batch) -> Collected:
        return Contrastive().collect(_Retrieving(model), batch)

    def whole(self, packs: Sequence[Collected], group: dist.ProcessGroup | None) -> list[Told]:
        return Contrastive().whole(packs, group)

    def counted(self, model: VisionLanguageModel, batch: Batch) -> Tensor:  # noqa: ARG002 -- as others' that ask it
        """The weight, without asking the model."""
        both = torch.isin(first_pictures(batch).documents, texts_of(batch, LONGEST).documents)
        return both.sum().to(batch.weights)

    def again(self, model: VisionLanguageModel, batch: Batch, told: Told) -> LossOutput:
        return Contrastive().again(_Retrieving(model), batch, told)


@dataclass(frozen=True, slots=True)
class _Retrieving:
    """A vision-language model as a model of pairs."""

    model: VisionLanguageModel

    def pairs(self, batch: Batch) -> Pairs:
        model = self.model
        if not model.retrieves:
            raise ValueError("retrieval_token compares what the connector 'first_feature' makes; take that one")
        texts = texts_of(batch, LONGEST)
        hidden = model.lm(model.lm.embed(texts.ids), alone(batch, texts))
        found = model.connector(model.features(batch), hidden[texts.cu_seqlens[1:].long() - 1])
        assert isinstance(found, Found)
        pictures = first_pictures(batch)
        documents = pictures.documents[torch.isin(pictures.documents, texts.documents)]
        images = found.pictures[pictures.tiles[torch.isin(pictures.documents, texts.documents)]]
        words = found.texts[: len(texts.documents)][torch.isin(texts.documents, documents)]
        return Pairs(images, words, documents, found.scale, found.scale.new_zeros(1))


def alone(batch: Batch, texts: Texts) -> Batch:
    """The batch's texts without pictures, as a batch of which nothing is learned."""
    return replace(
        batch,
        input_ids=texts.ids,
        labels=torch.full_like(texts.ids, NOT_LEARNED),
        positions=texts.positions,
        visual=torch.zeros_like(texts.ids, dtype=torch.bool),
        visual_count=0,
        cu_seqlens=texts.cu_seqlens,
        max_seqlen=texts.max_seqlen,
    )
