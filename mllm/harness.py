"""Our models in EleutherAI's harness (extra `lm-eval`): text benchmarks of its own list, on an export.

    import lm_eval
    from mllm.harness import Harness

    lm_eval.simple_evaluate(model=Harness.open("runs/vila_7b/export"), tasks=["hellaswag"])

It asks in plain text and compares log-probabilities of texts, which is how language models are compared before and after they
learn to see. lmms-eval needs no adapter:
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import utils  # pyright: ignore[reportMissingImports] -- an extra
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports] -- an extra
from torch import Tensor

from mllm.generate import Sampling
from mllm.lm import ATTENTION
from mllm.speaker import Prompt, Speaker
from mllm.vlm import VisionLanguageModel
from pipelines.chat import Span
from pipelines.types import NOT_LEARNED, Batch, Pack, RowId, Sample, spec

TOKENS = 8192
"""Positions that are computed at a time."""

TOGETHER = 16
MOST = 256
"""Tokens of an answer, where a task does not say."""


@spec
class Scored:
    """Tokens of a text: `context` that is given, and `asked` whose probability is wanted."""

    context: tuple[int, ...]
    asked: tuple[int, ...]


class Harness(LM):
    """A `Speaker` as the harness asks it: log-probabilities of texts, and texts that go on. One process, one device."""

    def __init__(self, speaker: Speaker, model: VisionLanguageModel) -> None:
        super().__init__()
        self.speaker = speaker
        self.model = model
        codec = speaker.codec
        mark = codec.bos or codec.eos
        self.first = (codec.special(mark),) if mark else ()

    @classmethod
    def open(cls, folder: str | Path, device: str = "cpu") -> Harness:
        """The model of an export's folder. Raises FileNotFoundError, and ValueError for one without a language model."""
        speaker = Speaker.open(Path(folder), device)
        model = speaker.model
        if not isinstance(model, VisionLanguageModel):
            raise ValueError(
                f"{folder} holds a {type(model).__name__}, and text is asked of a model with a language model"
            )
        return cls(speaker, model)

    @property
    def tokenizer_name(self) -> str:
        return self.speaker.name

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Of each (context, continuation) the latter's log-probability, and whether each of its tokens is the likeliest."""
        return self._scored([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Log-probability of each text, in windows as long as the model reads."""
        told = []
        for request in requests:
            (text,) = request.args
            windows = utils.get_rolling_token_windows(
                token_list=self._tokens(text),
                prefix_token=self.first[0] if self.first else 0,
                max_seq_len=self.speaker.context - 1,
                context_len=1,
            )
            pairs = [utils.make_disjoint_window(window) for window in windows]
            found = self._scored([Scored(context=tuple(context), asked=tuple(asked)) for context, asked in pairs])
            told.append(sum(value for value, _ in found))
        return told

    def generate_until(self, requests: list[Any]) -> list[str]:
        """What follows each context, up to the texts that end it."""
        answers = []
        for start in range(0, len(requests), TOGETHER):
            prompts = [self._prompt(*request.args) for request in requests[start : start + TOGETHER]]
            answers += self.speaker.answers(prompts)
        return answers

    def _prompt(self, context: str, words: dict[str, Any]) -> Prompt:
        until = words.get("until") or ()
        how = Sampling(
            max_tokens=int(words.get("max_gen_toks", MOST)),
            temperature=float(words.get("temperature", 0.0)) if words.get("do_sample") else 0.0,
            stop=(until,) if isinstance(until, str) else tuple(until),
            seed=0,
        )
        ids = [*self.first, *self._tokens(context)][-(self.speaker.context - (how.max_tokens or MOST)) :]
        return self.speaker.ready(Prompt(_sample(ids), np.zeros((0, *self.speaker.tiling.shape), np.uint8), how))

    def _tokens(self, text: str) -> list[int]:
        return self.speaker.codec.encode([Span(text=text, learn=False)])[0].tolist()

    def _pair(self, context: str, continuation: str) -> Scored:
        """As the harness's own models split it: spaces at the context's end are the continuation's, tokens are the whole's."""
        bare = context.rstrip()
        whole = self._tokens(context + continuation)
        asked = whole[len(self._tokens(bare)) :] if bare else whole
        given = [*self.first, *whole[: len(whole) - len(asked)]]
        return Scored(context=tuple(given), asked=tuple(asked))

    def _scored(self, texts: Sequence[Scored]) -> list[tuple[float, bool]]:
        told: list[tuple[float, bool]] = []
        for together in _packs(texts):
            told += self._together(together)
        return told

    @torch.no_grad()
    def _together(self, texts: Sequence[Scored]) -> list[tuple[float, bool]]:
        """Several texts as one pack, each a document of its own; only positions before asked tokens get logits."""
        self.model.lm.model.set_attn_implementation(ATTENTION)  # which a cache takes away
        rows = [[*text.context, *text.asked][-(self.speaker.context) :][:-1] for text in texts]
        blank = np.zeros((0, *self.speaker.tiling.shape), np.uint8)
        batch = Batch.of(Pack.of_samples([_sample(row) for row in rows], blank), self.speaker.device)
        hidden = self.model(batch)
        told = []
        ends = np.cumsum([len(row) for row in rows])
        for end, row, text in zip(ends, rows, texts, strict=True):
            count = min(len(text.asked), len(row))
            wanted = torch.tensor(text.asked[len(text.asked) - count :], device=hidden.device)
            told.append(_of(hidden[end - count : end], self.model.lm.head, wanted))
        return told


def _of(hidden: Tensor, head: Tensor, wanted: Tensor) -> tuple[float, bool]:
    logits = (hidden @ head.to(hidden.dtype).T).float().log_softmax(-1)
    found = logits.gather(1, wanted[:, None]).sum()
    return float(found), bool((logits.argmax(-1) == wanted).all())


def _packs(texts: Sequence[Scored]) -> Iterator[list[Scored]]:
    together: list[Scored] = []
    length = 0
    for text in texts:
        own = len(text.context) + len(text.asked)
        if together and length + own > TOKENS:
            yield together
            together, length = [], 0
        together.append(text)
        length += own
    if together:
        yield together


def _sample(ids: Sequence[int]) -> Sample:
    row = RowId(corpus="harness", shard="", epoch=0, row=0)
    return Sample(
        id=row,
        source=0,
        input_ids=np.array(ids, np.int32),
        labels=np.full(len(ids), NOT_LEARNED, np.int32),
        lengths=(len(ids),),
        pictures=(),
        visual=(),
        rows=(row,),
    )
