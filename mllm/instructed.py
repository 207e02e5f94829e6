"""InstructBLIP (arXiv:2305.06500): a Q-Former that reads what is asked before it says what it sees.

The instruction is the text before a document's first learned token. The Q-Former has a vocabulary of its own, so an annotator,
`Instructions`, writes it once more in that one, and packs carry it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mllm.pairs import shown
from mllm.resamplers import QFormer, Querying
from pipelines.chat import ChatML, Template
from pipelines.encode import TextCodec
from pipelines.types import NOT_LEARNED, Batch, Pack, spec


@spec
class InstructedQFormer:
    """A Q-Former whose queries meet the instruction in self-attention (arXiv:2305.06500, 2.3), then one matrix.

    The class is transformers' `InstructBlipQFormerModel`; `former.weights` name a folder in InstructBLIP's form, or what
    `blip2_stage1` was exported to. A pack without instructions is seen by queries alone.
    """

    kind: Literal["instructed_q_former"] = "instructed_q_former"
    former: QFormer = QFormer()
    vocab_size: int = 30_523
    positions: int = 512

    @property
    def weights(self) -> str | None:
        """The folder that it begins from."""
        return self.former.weights

    def tokens(self, patches: int) -> int:
        """Visual tokens of a tile: those of its queries."""
        return self.former.tokens(patches)

    def tiny(self) -> Self:
        return replace(self, former=self.former.tiny(), vocab_size=2048, positions=160)

    def bare(self) -> Self:
        return replace(self, former=replace(self.former, weights=None))

    def config(self, d_in: int) -> Any:
        """transformers' configuration, without dropout."""
        from transformers import InstructBlipQFormerConfig

        former = self.former
        return InstructBlipQFormerConfig(
            vocab_size=self.vocab_size,
            max_position_embeddings=self.positions,
            hidden_size=former.hidden_size,
            num_hidden_layers=former.layers,
            num_attention_heads=former.heads,
            intermediate_size=former.intermediate_size,
            cross_attention_frequency=former.every,
            encoder_hidden_size=d_in,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )

    def build(self, d_in: int, d_out: int) -> nn.Module:
        from transformers import InstructBlipQFormerModel

        model = InstructBlipQFormerModel._from_config(self.config(d_in), attn_implementation="sdpa")
        return InstructedQuerying(model, self.former.queries, self.former.hidden_size, d_out)


class InstructedQuerying(Querying):
    """`InstructedQFormer`."""

    def own_name(self, name: str) -> str | None:
        for table in ("word_embeddings.weight", "position_embeddings.weight"):
            if name.endswith(f"embeddings.{table}"):
                return f"embeddings.{table}"
        found = super().own_name(name)
        return f"embeddings.{found}" if found and found.startswith("layernorm.") else found

    def forward(
        self, features: Float[Tensor, "N P Dv"], asked: Int[Tensor, "N L"] | None = None
    ) -> Float[Tensor, "N Q D"]:
        """`asked` are ids of each tile's instruction, and `NOT_LEARNED` where it has ended."""
        if asked is None:
            asked = torch.full((len(features), 1), NOT_LEARNED, device=features.device)
        there = nn.functional.pad(asked != NOT_LEARNED, (len(self.queries), 0), value=True)
        seen = there[:, None, None].expand(
            -1, -1, there.shape[1], -1
        )  # whole, or transformers would look what is in it
        found = self.model(
            input_ids=asked.clamp(min=0),
            attention_mask=seen,
            query_embeds=self.queries.expand(len(features), -1, -1),
            encoder_hidden_states=features,
        ).last_hidden_state
        return self.project(found[:, : len(self.queries)]).clone()


def asked_of_tiles(batch: Batch, tiles: int) -> Int[Tensor, "N L"] | None:
    """The instruction of each tile's document; None for a batch that carries none."""
    if batch.instructions is None:
        return None
    if not len(batch.cuts):
        return batch.instructions.new_full((tiles, 1), NOT_LEARNED)
    asked = batch.instructions[shown(batch).documents.repeat_interleave(batch.cuts[:, 0].long())]
    longest = int((asked != NOT_LEARNED).sum(1).max())
    return asked[:, : max(longest, 1)]


@spec
class Instructions:
    """Writes each document's instruction in the Q-Former's words: what stands before the first token that is learned.

    `of` names the language model's tokenizer, from whose ids the text is read back, without special tokens and without what
    `chat` writes around turns; `tokenizer` the Q-Former's. A longer one keeps its beginning.
    """

    kind: Literal["instructions"] = "instructions"
    tokenizer: str
    of: str
    chat: Template = ChatML()
    bos: str = "[CLS]"
    eos: str = "[SEP]"
    longest: int = 128

    def tiny(self) -> Self:
        """For the example tokenizer and texts."""
        words = {"tokenizer": "example-bpe", "of": "example-bpe", "bos": "<|im_start|>", "eos": "<|im_end|>"}
        return replace(self, chat=ChatML(), longest=32, **words)

    def packs(self, folder: Callable[[str], str]) -> Callable[[Pack], Pack]:
        """Find both tokenizers. Raises FileNotFoundError where a folder holds none."""
        codec, read = TextCodec(folder(self.tokenizer), self.bos, self.eos), TextCodec(folder(self.of), None, None)
        first, last = codec.special(self.bos), codec.special(self.eos)

        def annotate(pack: Pack) -> Pack:
            rows = np.full((len(pack.sources), self.longest), NOT_LEARNED, np.int32)
            for row, (start, stop) in enumerate(zip(pack.cu_seqlens[:-1], pack.cu_seqlens[1:], strict=True)):
                learned = np.flatnonzero(pack.labels[start:stop] != NOT_LEARNED)
                end = stop if not len(learned) else start + learned[0] + 1
                text = self._plain(read.decode(pack.input_ids[start:end].tolist()))
                words = codec.tokenizer.encode(text, add_special_tokens=False).ids[: self.longest - 2]
                rows[row, : len(words) + 2] = [first, *words, last]
            return replace(pack, instructions=rows)

        return annotate

    def empty(self, pack: Pack) -> Pack:
        return replace(pack, instructions=np.zeros((0, self.longest), np.int32))

    def _plain(self, text: str) -> str:
        """Without the template's own words."""
        marks = [span.text for role in ("system", "user", "assistant") for span in self.chat.before(role)]  # type: ignore[arg-type]  # roles all
        for mark in (self.chat.system, *marks):
            text = text.replace(mark, " ") if mark.strip() else text
            text = text.removesuffix(mark.rstrip()) if mark.strip() else text
        return text.strip()


QFORMER_TOKENIZER = "qformer_tokenizer"
"""The folder within an export that holds the Q-Former's tokenizer, by the name that InstructBLIP's own folders have."""


def in_folder(how: Instructions | None, folder: Path, text: Path) -> Callable[[Pack], Pack] | None:
    """`how`, of an export: the Q-Former's tokenizer lies in it, the language model's in `text`. None where there is none."""
    own = folder / QFORMER_TOKENIZER
    if how is None or not own.is_dir():
        return None
    return replace(how, tokenizer=str(own), of=str(text)).packs(str)
