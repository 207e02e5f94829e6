"""Tiled document -> samples: one token sequence each, images never cut, labels shifted."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pipelines.chat import ChatML, Span, Vicuna, render
from pipelines.types import (
    IMAGE_TOKEN,
    NOT_LEARNED,
    Budget,
    Reason,
    Sample,
    SkipSample,
    Text,
    Tiled,
    Tiles,
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
        ids: list[int] = []
        learn: list[bool] = []
        for special, run in groupby(spans, key=lambda span: span.special):
            run = list(run)
            if special:
                ids += [self.special(span.text) for span in run]
                learn += [span.learn for span in run]
                continue
            encoding = self.tokenizer.encode("".join(span.text for span in run), add_special_tokens=False)
            ends = np.cumsum([len(span.text) for span in run])
            starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
            owner = np.minimum(np.searchsorted(ends, starts, side="right"), len(run) - 1)
            ids += encoding.ids
            learn += [run[i].learn for i in owner]
        return np.array(ids, np.int32), np.array(learn, np.bool_)

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; each visual position is shown as nothing."""
        return self.tokenizer.decode([i for i in ids if i >= 0], skip_special_tokens=True)


@spec
class Part:
    """A run of text, which may be cut between tokens, or an image with all of its positions, which may not."""

    ids: NDArray[np.int32]
    learn: NDArray[np.bool_]
    image: Tiles | None = None

    @property
    def tiles(self) -> int:
        return 0 if self.image is None else len(self.image.pixels)

    def cut(self, at: int) -> tuple[Part, Part]:
        head = Part(ids=self.ids[:at], learn=self.learn[:at])
        return head, Part(ids=self.ids[at:], learn=self.learn[at:])


class Encoder:
    """Documents to samples, for one tokenizer, template, layout and budget."""

    def __init__(self, codec: TextCodec, template: ChatML | Vicuna, layout: VisionLayout, budget: Budget) -> None:
        self.codec = codec
        self.template = template
        self.layout = layout
        self.budget = budget

    def encode(self, document: Tiled) -> list[Sample]:
        """One sample, or several when the document is longer than a pack.

        A long document is cut between tokens of its text; an image goes whole into a piece that has room for it.
        Raises SkipSample when the document is empty, carries no loss, or holds an image that no pack can.
        """
        if not any(isinstance(s, Text) and s.text.strip() for s in document.segments):
            raise SkipSample(Reason.EMPTY)
        pieces = self._split(self._parts(document, prompt=False))
        samples = [self._sample(document, piece, number) for number, piece in enumerate(pieces)]
        samples = [sample for sample in samples if (sample.labels != NOT_LEARNED).any()]
        if not samples:
            raise SkipSample(Reason.NOTHING_TO_LEARN)
        return samples

    def prompt(self, document: Tiled) -> Sample:
        """The document as a prompt that waits for the assistant: no end mark, nothing cut."""
        return self._sample(document, self._parts(document, prompt=True), 0)

    def _parts(self, document: Tiled, prompt: bool) -> list[Part]:
        """Tokens of `document`, bos in front. A conversation ends with its template's mark, any other text with eos."""
        spans = render(document, self.template, prompt)
        conversation = any(segment.role is not None for segment in document.segments)
        if self.codec.bos:
            spans.insert(0, Span(text=self.codec.bos, learn=False, special=True))
        if self.codec.eos and not conversation and not prompt:
            spans.append(Span(text=self.codec.eos, learn=True, special=True))
        parts: list[Part] = []
        for is_image, run in groupby(spans, key=lambda part: isinstance(part, Tiles)):
            if is_image:
                parts += [self._image(tiles) for tiles in run if isinstance(tiles, Tiles)]
            else:
                ids, learn = self.codec.encode([span for span in run if isinstance(span, Span)])
                parts.append(Part(ids=ids, learn=learn))
        return parts

    def _image(self, tiles: Tiles) -> Part:
        length = self.layout.tokens(len(tiles.pixels))
        if length >= self.budget.tokens or len(tiles.pixels) > self.budget.tiles:
            raise SkipSample(
                Reason.IMAGE_TOO_LONG,
                f"{length} tokens and {len(tiles.pixels)} tiles; a pack holds {self.budget.tokens} and {self.budget.tiles}",
            )
        return Part(ids=np.full(length, IMAGE_TOKEN, np.int32), learn=np.zeros(length, np.bool_), image=tiles)

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
            if part.image is None and room > 0:
                head, part = part.cut(room)
                pieces[-1].append(head)
            carried: list[Part] = []
            while len(pieces[-1]) > 1 and pieces[-1][-1].image is not None:
                carried.insert(0, pieces[-1].pop())
            pieces.append(carried)
            queue.appendleft(part)
        return [piece for piece in pieces if piece]

    def _sample(self, document: Tiled, parts: list[Part], piece: int) -> Sample:
        ids = np.concatenate([part.ids for part in parts])
        learn = np.concatenate([part.learn for part in parts])
        labels = np.full(len(ids), NOT_LEARNED, np.int32)
        labels[:-1] = np.where(learn[1:], ids[1:], NOT_LEARNED)
        images = [part.image for part in parts if part.image is not None]
        side = self.layout.tile
        return Sample(
            id=replace(document.id, piece=piece),
            source=document.source,
            input_ids=ids,
            labels=labels,
            tiles=np.concatenate([np.zeros((0, 3, side, side), np.uint8), *(i.pixels.numpy() for i in images)]),
            grids=np.array([i.grid for i in images], np.int16).reshape(-1, 2),
        )
