"""Text from a model, a token at a time: how the next token is chosen, and where its logits come from.

A `Decoder` gives logits after each of several prompts. `Cached` keeps keys and values of what it has seen, and takes language
models of transformers in whose sequence visual tokens stand; `Recomputed` takes every model that writes, and computes all anew
for each token. `decoder_of` chooses. Both are for trying a model out: prompts that begin together stay together until each ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mllm.fusion.splice import Spliced, spliced
from mllm.lm import LanguageModel
from mllm.model import Model
from mllm.vlm import VisionLanguageModel
from pipelines.types import NOT_LEARNED, Batch, Pack, Sample, spec

LONG = 256
"""Tokens of an answer whose asker has not said how long it may be."""


@spec
class Sampling:
    """How an answer is written: at most `max_tokens`, ended by the model's own end mark or before any text of `stop`.

    Without `max_tokens` it is as long as the model's context has room for, and no longer than `LONG`.

    `temperature` 0 takes the likeliest token each time; else logits are divided by it, and one is drawn of the likeliest tokens
    that hold `top_p` of the probability between them (nucleus sampling, arXiv:1904.09751). The same `seed`, the same answer.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: an answer has at least one token")
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature}: take 0, the likeliest token each time, or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: it is a share of the probability, above 0 and at most 1")
        if "" in self.stop:
            raise ValueError("stop: an empty text would end every answer before it begins")


def choose(logits: Float[Tensor, " C"], how: Sampling, chance: torch.Generator) -> int:
    """The next token, drawn with `chance`, a generator on the CPU."""
    if how.temperature == 0:
        return int(logits.argmax())
    shares, tokens = (logits.float().cpu() / how.temperature).softmax(-1).sort(descending=True)
    before = shares.cumsum(-1) - shares
    kept = shares[before < how.top_p]  # the likeliest token always is
    return int(tokens[torch.multinomial(kept, 1, generator=chance)])


class Decoder(Protocol):
    """Logits after prompts that are written on together."""

    def begin(self, prompts: Sequence[Sample], tiles: Sequence[NDArray[np.uint8]]) -> Float[Tensor, "S C"]:
        """Logits after each prompt; `tiles` are each one's own pictures, uint8 (n, *shape of a tile)."""
        ...

    def step(self, tokens: Sequence[int]) -> Float[Tensor, "S C"]:
        """Logits once each prompt has got its token."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these prompts alone, in this order."""
        ...


Annotate = Callable[[Pack], Pack]
"""What writes into a pack what its model reads besides (`mllm.annotators`)."""


def decoder_of(model: Model, annotate: Annotate | None = None) -> Decoder:
    """The quickest decoder for `model`, which is that decoder's from now on.

    `annotate` writes instructions for a model whose connector reads them, as they are when prompts begin. Raises ValueError where
    the model writes no text, or would read instructions that nobody writes.
    """
    if type(model).next_logits is Model.next_logits:
        raise ValueError(
            f"{type(model).__name__} writes no text, so it cannot be talked to; take a model with a language model"
        )
    if isinstance(model, VisionLanguageModel) and model.reads_instructions and annotate is None:
        raise ValueError(
            "the model's connector reads the instruction with words of its own, and nothing here writes it in them; export it "
            "again, so that the Q-Former's tokenizer lies in the folder"
        )
    if isinstance(model, VisionLanguageModel) and can_cache(model):
        return Cached(model, annotate)
    return Recomputed(model, annotate)


def can_cache(model: VisionLanguageModel) -> bool:
    """Whether the language model alone, told embeddings, computes what the whole does."""
    lm = model.lm
    plain = type(lm) is LanguageModel and isinstance(model.fusion, Spliced) and hasattr(lm.decoder, "rotary_emb")
    return (
        plain and getattr(lm.model.config, "embedding_multiplier", 1.0) == 1.0
    )  # else it would multiply a second time


class Recomputed:
    """All prompts as one pack, computed anew for each token."""

    def __init__(self, model: Model, annotate: Annotate | None = None) -> None:
        self.model = model
        self.annotate = annotate
        self.device = next(model.parameters()).device
        self.prompts: list[Sample] = []
        self.tiles: list[NDArray[np.uint8]] = []
        self.asked: NDArray[np.int32] | None = None

    def begin(self, prompts: Sequence[Sample], tiles: Sequence[NDArray[np.uint8]]) -> Float[Tensor, "S C"]:
        self.prompts, self.tiles = list(prompts), list(tiles)
        self.asked = _pack(prompts, tiles, self.annotate).instructions
        return self._logits()

    def step(self, tokens: Sequence[int]) -> Float[Tensor, "S C"]:
        self.prompts = [longer(prompt, token) for prompt, token in zip(self.prompts, tokens, strict=True)]
        return self._logits()

    def keep(self, rows: Sequence[int]) -> None:
        self.prompts = [self.prompts[row] for row in rows]
        self.tiles = [self.tiles[row] for row in rows]
        self.asked = None if self.asked is None else self.asked[list(rows)]

    @torch.no_grad()
    def _logits(self) -> Tensor:
        pack = replace(_pack(self.prompts, self.tiles, None), instructions=self.asked)
        return self.model.next_logits(Batch.of(pack, self.device))


class Cached:
    """The language model of transformers with its own cache, behind our encoder and connector.

    Prompts are filled up at their left, where the mask hides it, so that all go on at the same place.
    """

    def __init__(self, model: VisionLanguageModel, annotate: Annotate | None = None) -> None:
        self.model = model
        self.annotate = annotate
        self.lm: Any = model.lm.model
        self.device = next(model.parameters()).device
        self.seen: Any = None
        self.mask = torch.zeros(0, 0, dtype=torch.long)

    @torch.no_grad()
    def begin(self, prompts: Sequence[Sample], tiles: Sequence[NDArray[np.uint8]]) -> Float[Tensor, "S C"]:
        self.lm.set_attn_implementation("sdpa")  # ours is over packs, and has no cache
        batch = Batch.of(_pack(prompts, tiles, self.annotate), self.device)
        text = self.model.lm.embed(batch.input_ids)
        whole = spliced(text, self.model.visual(batch), batch.visual, batch.visual_count)
        rows = whole.split([len(prompt.input_ids) for prompt in prompts])
        embeddings = pad_sequence(list(rows), batch_first=True, padding_side="left")
        ones = [torch.ones(len(row), dtype=torch.long, device=self.device) for row in rows]
        self.mask = pad_sequence(ones, batch_first=True, padding_side="left")
        self.seen = None
        return self._logits(self.mask.cumsum(1).sub(1).clamp(min=0), inputs_embeds=embeddings)

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Float[Tensor, "S C"]:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        ids = torch.tensor(tokens, device=self.device)[:, None]
        return self._logits(self.mask.sum(1, keepdim=True) - 1, input_ids=ids)

    def keep(self, rows: Sequence[int]) -> None:
        chosen = torch.tensor(rows, dtype=torch.long, device=self.device)
        self.mask = self.mask[chosen]
        self.seen.batch_select_indices(chosen)

    def _logits(self, places: Tensor, **told: Tensor) -> Tensor:
        out = self.lm(
            attention_mask=self.mask,
            position_ids=places,
            past_key_values=self.seen,
            use_cache=True,
            logits_to_keep=1,
            **told,
        )
        self.seen = out.past_key_values
        return out.logits[:, -1]


def _pack(prompts: Sequence[Sample], tiles: Sequence[NDArray[np.uint8]], annotate: Annotate | None) -> Pack:
    pack = Pack.of_samples(prompts, np.concatenate(list(tiles)))
    return pack if annotate is None else annotate(pack)


def longer(prompt: Sample, *tokens: int) -> Sample:
    """`prompt` with tokens after it, of which nothing is learned."""
    ids = np.concatenate([prompt.input_ids, np.array(tokens, np.int32)])
    return replace(prompt, input_ids=ids, labels=np.full(len(ids), NOT_LEARNED, np.int32), lengths=(len(ids),))
