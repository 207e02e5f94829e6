"""UnifiedVocabulary: pictures are tokens too, with a table and a head of their own beside the text's."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from mllm.fusion.splice import Fused, spliced
from mllm.lm import CausalLM, LanguageModel
from pipelines.types import Batch, spec

Positive = Annotated[int, Field(gt=0)]


@spec
class UnifiedVocabulary:
    """LWM's second vocabulary (arXiv:2402.08268, 4.1): `rows` codes, 8,192 of the VQGAN's and marks, with embedding and head.

    In documents a code is an id from the language model's own vocabulary size on, where `DiscreteCodes` is told to write it
    (`first`). What predicts a code is the head of codes and what predicts a word the head of words: the objective
    `two_vocabularies` knows which. Pictures that are no codes are spliced in as ever.
    """

    shares: ClassVar[bool] = True
    sees_pictures: ClassVar[bool] = False
    period: ClassVar[int] = 1
    kind: Literal["unified_vocabulary"] = "unified_vocabulary"
    rows: Positive = 8448

    def width(self, encoder: int, lm: int) -> int:  # noqa: ARG002 -- one signature for all fusions
        """Width of the visual tokens that it takes: the language model's."""
        return lm

    def positions(self, tokens: int) -> int:
        """Positions that a tile of `tokens` visual tokens takes: one each."""
        return tokens

    def tiny(self) -> UnifiedVocabulary:
        """The same: its rows are ids of the data."""
        return self

    def build(self, lm: CausalLM, vision_width: int) -> Unified:  # noqa: ARG002 -- one signature for all fusions
        return Unified(lm.arch.vocab_size, self.rows, lm.arch.hidden_size)


class Unified(Fused):
    """`first` is the id of code 0; `head` the matrix (rows, D) that predicts codes."""

    def __init__(self, first: int, rows: int, width: int) -> None:
        super().__init__()
        self.first = first
        self.embedding = nn.Embedding(rows, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head = nn.Linear(width, rows, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def words(self, ids: Int[Tensor, " T"]) -> Int[Tensor, " T"]:
        return torch.where(ids < self.first, ids, 0)

    def forward(
        self, lm: LanguageModel, text: Float[Tensor, "T D"], visual: Float[Tensor, "V D"], batch: Batch
    ) -> Float[Tensor, "T D"]:
        codes = self.embedding((batch.input_ids - self.first).clamp(min=0))
        joined = torch.where((batch.input_ids >= self.first).unsqueeze(1), codes.to(text.dtype), text)
        return lm(spliced(joined, visual, batch.visual, batch.visual_count), batch)

    def parts(self, lm: LanguageModel) -> dict[str, list[nn.Parameter]]:
        return {
            **super().parts(lm),
            "fusion.embeddings": list(self.embedding.parameters()),
            "fusion.head": list(self.head.parameters()),
        }
