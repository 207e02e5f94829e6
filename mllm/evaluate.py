"""Evaluation without a benchmark's harness: held-out loss and accuracy by source, a few-shot probe, greedy answers.

Everything here is a function of a model and packs, so that it runs inside a training worker, sharded, or alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mllm.objectives import LossOutput
from pipelines.encode import Encoder
from pipelines.types import NOT_LEARNED, Batch, Measured, Pack, Picture, Sample, Text, spec

Score = Callable[[Batch], LossOutput]
"""The objective bound to a model: what `cluster` calls through its sharded wrapper."""

Pixels = Callable[[Sequence[Sample]], NDArray[np.uint8]]
"""Decodes the pictures of samples: `PackWindows.pixels`."""


@spec
class SourceScore:
    """Held-out result of one source: mean loss in nats a learned token, and the share of them predicted right."""

    source: str
    loss: float
    accuracy: float
    tokens: int


@spec
class ProbeScore:
    """The few-shot probe with `shots` examples: the share of `questions` answered right where `choices` guesses by chance."""

    shots: int
    accuracy: float
    questions: int
    choices: int


@spec
class Answer:
    """What the model writes about a held-out picture. `image` is a PNG in base64, empty where an earlier answer has it."""

    source: str
    row: str
    image: str
    prompt: str
    expected: str
    written: str


@torch.no_grad()
def source_sums(score: Score, packs: Sequence[Pack], sources: int, device: torch.device) -> Tensor:
    """Loss sum, learned tokens and right tokens of each source, float64 (sources, 3)."""
    sums = torch.zeros(sources, 3, dtype=torch.float64, device=device)
    for pack in packs:
        batch = Batch.of(pack, device)
        sums.index_add_(0, batch.sources, score(batch).documents.double())
    return sums


def source_scores(sums: Tensor, names: Sequence[str]) -> tuple[SourceScore, ...]:
    """Sums, added over ranks, to scores."""
    return tuple(
        SourceScore(source=name, loss=total / max(1, weight), accuracy=right / max(1, weight), tokens=int(weight))
        for name, (total, weight, right) in zip(names, sums.tolist(), strict=True)
    )


@spec
class Question:
    """One item of the probe: the sequences to compare, of which the first is true."""

    shots: int
    candidates: tuple[Sample, ...]


def few_shot_questions(
    documents: Sequence[Measured], encoder: Encoder, shots: Sequence[int], count: int, choices: int = 4, seed: int = 0
) -> list[Question]:
    """Which caption belongs to the picture? `documents` are image-caption pairs, all held out.

    Each question shows k other pairs, then a picture with each of `choices` captions in turn; the caption with the lowest
    loss a token is the answer. Chance is 1 / choices. Questions that do not fit a pack are left out.
    """
    pairs = [d for d in documents if [type(s) for s in d.segments] == [Picture, Text]]
    rng = random.Random(seed)
    questions = []
    for number, asked in enumerate(pairs[:count]):
        others = pairs[:number] + pairs[number + 1 :]
        wrong = [d.segments[1] for d in others if d.segments[1] != asked.segments[1]]
        if len(others) < max(shots, default=0) or len(wrong) < choices - 1:
            continue
        captions = [asked.segments[1], *rng.sample(wrong, choices - 1)]
        for k in shots:
            shown = [part for d in rng.sample(others, k) for part in (*d.segments, Text(text="\n\n", learn=False))]
            context = tuple(replace(part, learn=False) if isinstance(part, Text) else part for part in shown)
            candidates = [
                encoder.encode(replace(asked, segments=(*context, asked.segments[0], caption))) for caption in captions
            ]
            if all(len(pieces) == 1 for pieces in candidates):
                questions.append(Question(shots=k, candidates=tuple(pieces[0] for pieces in candidates)))
    return questions


@torch.no_grad()
def probe_sums(
    score: Score, questions: Sequence[Question], pixels: Pixels, shots: Sequence[int], device: torch.device
) -> Tensor:
    """Right answers and questions for each entry of `shots`, float64 (len(shots), 2)."""
    sums = torch.zeros(len(shots), 2, dtype=torch.float64, device=device)
    for question in questions:
        pack = Pack.of_samples(question.candidates, pixels(question.candidates))
        documents = score(Batch.of(pack, device)).documents
        place = list(shots).index(question.shots)
        sums[place, 0] += float((documents[:, 0] / documents[:, 1]).argmin() == 0)
        sums[place, 1] += 1
    return sums


def probe_scores(sums: Tensor, shots: Sequence[int], choices: int = 4) -> tuple[ProbeScore, ...]:
    """Sums, added over ranks, to scores."""
    return tuple(
        ProbeScore(shots=k, accuracy=right / max(1, asked), questions=int(asked), choices=choices)
        for k, (right, asked) in zip(shots, sums.tolist(), strict=True)
    )


@torch.no_grad()
def greedy(
    next_logits: Callable[[Batch], Tensor],
    prompts: Sequence[Sample],
    tiles: NDArray[np.uint8],
    stop: int | None,
    limit: int,
    device: torch.device,
) -> list[list[int]]:
    """Up to `limit` tokens after each prompt, each the likeliest, ended by `stop`.

    `next_logits` gives (S, C), the token after each document; `tiles` are the prompts' own, in order. All prompts go as one
    pack, computed anew for each token and `limit` times whatever happens, so that ranks stay in step: right for a handful
    of samples, no way to serve.
    """
    written: list[list[int]] = [[] for _ in prompts]
    for _ in range(limit if prompts else 0):
        samples = [_continued(prompt, text) for prompt, text in zip(prompts, written, strict=True)]
        batch = Batch.of(Pack.of_samples(samples, tiles), device)
        for text, token in zip(written, next_logits(batch).argmax(-1).tolist(), strict=True):
            text.append(token)
    return [text[: text.index(stop)] if stop in text else text for text in written]


def _continued(prompt: Sample, written: list[int]) -> Sample:
    ids = np.concatenate([prompt.input_ids, np.array(written, np.int32)])
    return replace(prompt, input_ids=ids, labels=np.full(len(ids), NOT_LEARNED, np.int32), lengths=(len(ids),))


def prompt_of(document: Measured) -> tuple[Measured, str]:
    """A document cut before its first learned text, and that text: what is asked and what is expected."""
    for place, segment in enumerate(document.segments):
        if isinstance(segment, Text) and segment.learn:
            lead = segment.text[: len(segment.text) - len(segment.text.lstrip("\n"))]
            opening = (Text(text=lead, learn=False),) if segment.role is None and lead else ()
            return replace(document, segments=(*document.segments[:place], *opening)), segment.text.strip()
    raise ValueError(f"{document.id.label()}: nothing in it is learned, so nothing can be asked")
