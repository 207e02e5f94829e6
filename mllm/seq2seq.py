"""Encoder-decoder language models over packs: a document's prompt goes to the encoder, its answer to the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mllm.lm import Before, LanguageModel
from pipelines.types import NOT_LEARNED, Batch


@dataclass(frozen=True, slots=True)
class Rows:
    """Runs of a pack's positions as rows of a rectangle: `at` int64 (S, L) is the position at each place, `there` bool (S, L)
    whether one stands there; `places` and `positions` int64 (n,) are those places, counted through, and their positions."""

    at: Int[Tensor, "S L"]
    there: Tensor
    places: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]


class EncoderDecoder(LanguageModel):
    """T5 (arXiv:1910.10683) as BLIP-2 and CROME have it; `model(batch)` gives hidden states at the pack's own positions.

    Of a document, the positions up to the one that predicts its first learned token are the encoder's, both ways; from that
    position on they are the decoder's, which begins there with its start token in place of the token that stands there. So
    labels need not be moved. A document without learned tokens is all prompt: its last position asks for the first token of
    an answer. Documents are rows of a batch, filled up to the longest: transformers' relative positions know no packs.
    """

    @property
    def layers(self) -> nn.ModuleList:
        """Blocks of both stacks, the encoder's first."""
        return nn.ModuleList([*self.model.encoder.block, *self.model.decoder.block])

    def forward(
        self,
        embeddings: Float[Tensor, "T D"],
        batch: Batch,
        positions: Int[Tensor, " T"] | None = None,  # noqa: ARG002 -- its positions are relative
        before: Before | None = None,
    ) -> Float[Tensor, "T D"]:
        """Hidden states of the decoder at its positions, zeros at the others. Raises ValueError for what only decoders can."""
        if before is not None or batch.share is not None:
            raise ValueError(
                "an encoder-decoder lets nothing between its layers and shares no packs; take splice or pre_lm_adapter as the "
                "fusion, and parallel.context=1"
            )
        asked, answered = prompts_and_answers(batch)
        seen = self.model.encoder(
            inputs_embeds=embeddings[asked.at], attention_mask=asked.there.long()
        ).last_hidden_state
        start = self.embedding(torch.full_like(answered.at[:, :1], self.model.config.decoder_start_token_id))
        given = torch.cat([start.to(embeddings.dtype), embeddings[answered.at[:, 1:]]], dim=1)
        told = self.model.decoder(
            inputs_embeds=given,
            attention_mask=answered.there.long(),
            encoder_hidden_states=seen,
            encoder_attention_mask=asked.there.long(),
            use_cache=False,
        ).last_hidden_state
        if self.model.config.scale_decoder_outputs:
            told = told * self.width**-0.5
        rows = told.flatten(0, 1)[answered.places]
        return torch.zeros_like(embeddings).index_copy(0, answered.positions, rows.to(embeddings.dtype))

    def units(self) -> list[nn.Module]:
        return [*self.model.encoder.block, *self.model.decoder.block]


def prompts_and_answers(batch: Batch) -> tuple[Rows, Rows]:
    """What of each document the encoder reads and what the decoder writes; they share the position between them."""
    bounds = batch.cu_seqlens.tolist()
    learned = (batch.labels != NOT_LEARNED).tolist()
    asked, answered = [], []
    for start, stop in pairwise(bounds):
        between = next((at for at in range(start, stop) if learned[at]), stop - 1)
        asked.append(range(start, between + 1))
        answered.append(range(between, stop))
    return _rows(asked, batch.labels.device), _rows(answered, batch.labels.device)


def _rows(runs: list[range], device: torch.device) -> Rows:
    longest = max(len(run) for run in runs)
    lengths = torch.tensor([len(run) for run in runs])
    starts = torch.tensor([run.start for run in runs])
    along = torch.arange(longest)
    there = along < lengths[:, None]
    at = torch.where(there, starts[:, None] + along, starts[:, None])
    places = there.flatten().nonzero().squeeze(1)
    return Rows(*(x.to(device) for x in (at, there, places, at.flatten()[places])))
