"""Measured document -> samples: token sequences with their pictures' places, images never cut, labels shifted."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import groupby, takewhile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pipelines.chat import Span, Template, render
from pipelines.types import (
    IMAGE_TOKEN,
    NOT_LEARNED,
    Budget,
    Codes,
    Measured,
    Picture,
    Reason,
    Sample,
    SkipSample,
    Text,
    VisionLayout,
    spec,
)


class TextCodec:
    """A tokenizer's folder, opened lazily and never through `transformers`, whose import costs each actor seconds.

    Special tokens spelled in plain text are encoded as the characters they are.
    Raises FileNotFoundError when the folder holds no `tokenizer.json`.
    """

    def __init__(self, folder: str, bos: str | None, eos: str | None) -> None:
        self.folder = folder
        self.bos = bos
        self.eos = eos

    @cached_property
    def tokenizer(self) -> Tokenizer:
        file = Path(self.folder) / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"tokenizer: no file {file}; name a folder with a tokenizer.json in [weights]")
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        return tokenizer

    def special(self, name: str) -> int:
        """The id of a token by its name. Raises ValueError, naming the tokenizer, when the vocabulary lacks it."""
        token = self.tokenizer.token_to_id(name)
        if token is None:
            raise ValueError(
                f"tokenizer {self.folder} has no token {name!r}, which the recipe's chat template or bos/eos writes; "
                "choose the template that belongs to the tokenizer"
            )
        return token

    def encode(self, spans: list[Span]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Tokens of `spans` and whether each is learned, both (t,).

        Neighbouring plain spans are encoded as one string, as the exported chat template will be, and a token belongs to
        the span in which it starts.
        """
        ids: list[NDArray[np.int32]] = [np.zeros(0, np.int32)]
        learn: list[NDArray[np.bool_]] = [np.zeros(0, np.bool_)]
        for special, run in groupby(spans, key=lambda span: span.special):
            run = list(run)
            if special:
                ids.append(np.array([self.special(span.text) for span in run], np.int32))
                learn.append(np.array([span.learn for span in run]))
                continue
            text = "".join(span.text for span in run)
            if all(
                span.learn == run[0].learn for span in run
            ):  # where tokens start need not be known: a fifth less time
                (encoding,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)
                ids.append(np.array(encoding.ids, np.int32))
                learn.append(np.full(len(ids[-1]), run[0].learn))
                continue
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
            ends = np.cumsum([len(span.text) for span in run])
            starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
            owner = np.minimum(np.searchsorted(ends, starts, side="right"), len(run) - 1)
            ids.append(np.array(encoding.ids, np.int32))
            learn.append(np.array([span.learn for span in run])[owner])
        return np.concatenate(ids), np.concatenate(learn)

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; each visual position is shown as nothing."""
        return self.tokenizer.decode([i for i in ids if i >= 0], skip_special_tokens=True)


@spec
class Part:
    """A run of text, which may be cut between tokens, or an image with all of its positions, which may not.

    `images` are several where they are the frames of a video that the model reads together.
    """

    ids: NDArray[np.int32]
    learn: NDArray[np.bool_]
    images: tuple[Picture, ...] = ()

    @property
    def tiles(self) -> int:
        return sum(image.cut.tiles for image in self.images)

    @property
    def visual(self) -> tuple[int, ...]:
        """Positions of each image: the first has them all."""
        return (len(self.ids), *[0] * (len(self.images) - 1)) if self.images else ()

    def cut(self, at: int) -> tuple[Part, Part]:
        head = Part(ids=self.ids[:at], learn=self.learn[:at])
        return head, Part(ids=self.ids[at:], learn=self.learn[at:])


class Encoder:
    """Documents to samples, for one tokenizer, template, layout and budget."""

    def __init__(self, codec: TextCodec, template: Template, layout: VisionLayout, budget: Budget) -> None:
        self.codec = codec
        self.template = template
        self.layout = layout
        self.budget = budget

    def encode(self, document: Measured) -> list[Sample]:
        """One sample, or several when the document is longer than a pack.

        A long document is cut between tokens of its text; an image goes whole into a piece that has room for it. A
        preference row becomes one sample of two sequences and is never cut, nor is a picture with a class.
        Raises SkipSample when the document is empty, carries no loss, or holds what no pack can.
        """
        if document.label is not None:
            return [self._classified(document)]
        if not any(isinstance(s, Codes) or (isinstance(s, Text) and s.text.strip()) for s in document.segments):
            raise SkipSample(Reason.EMPTY)
        if document.rejected:
            return [self._preference(document)]
        pieces = self._split(self._parts(document, prompt=False))
        samples = [self._sample(document, [piece], number) for number, piece in enumerate(pieces)]
        samples = [sample for sample in samples if (sample.labels != NOT_LEARNED).any()]
        if not samples:
            raise SkipSample(Reason.NOTHING_TO_LEARN)
        return samples

    def prompt(self, document: Measured) -> Sample:
        """The document as a prompt that waits for the assistant: no end mark, nothing cut."""
        return self._sample(document, [self._parts(document, prompt=True)], 0)

    def _preference(self, document: Measured) -> Sample:
        """The question with the preferred answer, then with the rejected one: two sequences, each with the pictures."""
        answer = list(takewhile(lambda s: s.role == "assistant", reversed(document.segments)))
        asked = document.segments[: len(document.segments) - len(answer)]
        other = replace(document, segments=(*asked, *document.rejected))
        return self._whole(document, [self._parts(branch, prompt=False) for branch in (document, other)])

    def _classified(self, document: Measured) -> Sample:
        return self._whole(document, [self._parts(document, prompt=False)])

    def _whole(self, document: Measured, sequences: list[list[Part]]) -> Sample:
        sample = self._sample(document, sequences, 0)
        tokens, tiles = sample.cost
        if tokens > self.budget.tokens or tiles > self.budget.tiles:
            raise SkipSample(
                Reason.TOO_LONG,
                f"{tokens} tokens and {tiles} tiles; a pack holds {self.budget.tokens} and {self.budget.tiles}",
            )
        return sample

    def _parts(self, document: Measured, prompt: bool) -> list[Part]:
        """Tokens of `document`, bos in front. A conversation ends with its template's mark, any other text with eos."""
        spans = render(document, self.template, prompt)
        conversation = any(segment.role is not None for segment in document.segments)
        if self.codec.bos:
            spans.insert(0, Span(text=self.codec.bos, learn=False, special=True))
        if self.codec.eos and not conversation and not prompt:
            spans.append(Span(text=self.codec.eos, learn=document.label is None, special=True))
        parts: list[Part] = []
        for is_text, run in groupby(spans, key=lambda part: isinstance(part, Span)):
            if is_text:
                ids, learn = self.codec.encode([span for span in run if isinstance(span, Span)])
                parts.append(Part(ids=ids, learn=learn))
            else:
                parts += self._visual([part for part in run if not isinstance(part, Span)])
        return parts

    def _visual(self, shown: list[Picture | Codes]) -> Iterator[Part]:
        """Each picture by itself, or with the frames that follow it in its video, where the model reads them together."""
        marked = False  # whether the mark behind a picture stands before this one
        while shown:
            first = shown.pop(0)
            if isinstance(first, Codes):
                yield Part(ids=np.array(first.ids, np.int32), learn=np.full(len(first.ids), first.learn))
                marked = False
                continue
            frames = [first]
            while self.layout.together and shown and isinstance(shown[0], Picture) and _follows(frames[-1], shown[0]):
                frames.append(shown[0])
                shown.pop(0)
            yield self._images(tuple(frames), marked)
            marked = self.layout.around

    def _images(self, images: tuple[Picture, ...], marked: bool) -> Part:
        length, tiles = self.layout.tokens(images[0].cut) - marked, sum(image.cut.tiles for image in images)
        if length >= self.budget.tokens or tiles > self.budget.tiles:
            raise SkipSample(
                Reason.IMAGE_TOO_LONG,
                f"{length} tokens and {tiles} tiles; a pack holds {self.budget.tokens} and {self.budget.tiles}",
            )
        return Part(ids=np.full(length, IMAGE_TOKEN, np.int32), learn=np.zeros(length, np.bool_), images=images)

    def _split(self, parts: list[Part]) -> list[list[Part]]:
        """Greedy pieces within the budget. Images that would end a piece open the next one, beside their text."""
        pieces: list[list[Part]] = [[]]
        queue = deque(parts)
        while queue:
            part = queue.popleft()
            room = self.budget.tokens - sum(len(p.ids) for p in pieces[-1])
            room_tiles = self.budget.tiles - sum(p.tiles for p in pieces[-1])
            if len(part.ids) <= room and part.tiles <= room_tiles:
                pieces[-1].append(part)
                continue
            if not part.images and room > 0:
                head, part = part.cut(room)
                pieces[-1].append(head)
            carried: list[Part] = []
            while len(pieces[-1]) > 1 and pieces[-1][-1].images:
                carried.insert(0, pieces[-1].pop())
            pieces.append(carried)
            queue.appendleft(part)
        return [piece for piece in pieces if piece]

    def _sample(self, document: Measured, sequences: list[list[Part]], piece: int) -> Sample:
        ids, labels = zip(*(_shifted(parts) for parts in sequences), strict=True)
        shown = [part for parts in sequences for part in parts if part.images]
        first = replace(document.id, piece=piece)
        return Sample(
            id=first,
            source=document.source,
            input_ids=np.concatenate(ids),
            labels=np.concatenate(labels),
            lengths=tuple(len(sequence) for sequence in ids),
            pictures=tuple(image for part in shown for image in part.images),
            visual=tuple(count for part in shown for count in part.visual),
            rows=(first, *document.more),
            label=document.label,
        )


def _follows(one: Picture, other: Picture) -> bool:
    """Whether `other` is a later frame of the same video."""
    return one.frame is not None and other.frame is not None and one.of is other.of and one.frame < other.frame


def _shifted(parts: list[Part]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """One sequence's tokens, and at each position the token to be predicted there, both int32 (t,)."""
    ids = np.concatenate([part.ids for part in parts])
    learn = np.concatenate([part.learn for part in parts])
    labels = np.full(len(ids), NOT_LEARNED, np.int32)
    labels[:-1] = np.where(learn[1:], ids[1:], NOT_LEARNED)
    return ids, labels
