"""A trained model that is talked to: turns of a conversation in, its answer out, piece by piece.

speaker = Speaker.open(Path("runs/vila_smoke/export"))
prompt = speaker.prompt([Turn(role="user", parts=(png, "What is it?"))], Sampling(max_tokens=40))
for pieces in speaker.write([prompt]): ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mllm.export import read_back
from mllm.generate import LONG, Annotate, Sampling, choose, decoder_of
from mllm.instructed import in_folder
from mllm.model import Model
from mllm.recipe import Recipe, load
from pipelines import pictures
from pipelines.encode import Encoder, TextCodec
from pipelines.types import (
    CONVERSATION,
    Budget,
    Document,
    Image,
    Limits,
    Measured,
    Role,
    RowId,
    Sample,
    SkipSample,
    Text,
    spec,
)

LOST = "\ufffd"
"""What bytes are read as that make no character yet."""


@spec
class Turn:
    """What one side says: texts, and pictures as the bytes of their files, in order."""

    role: Role
    parts: tuple[str | bytes, ...]


@spec
class Piece:
    """What has come to an answer: `text`, perhaps none, and why it has ended, if it has. `tokens` are all that were written."""

    text: str
    tokens: int
    finish: Literal["stop", "length"] | None = None


class BadTurns(ValueError):
    """A conversation that cannot be answered; the message says which turn and why."""


class TooLong(BadTurns):
    """A conversation that leaves no room for an answer."""


@dataclass(slots=True)
class Prompt:
    """A conversation that waits for its answer. `gone` may be set by whoever asked: nobody wants it any more."""

    sample: Sample
    tiles: NDArray[np.uint8]
    how: Sampling
    gone: bool = False


class Speaker:
    """A model with its tokenizer and template, on one device. `context` is the most tokens of prompt and answer together.

    `annotate` writes instructions for a connector that reads them (`mllm.instructed`).
    """

    def __init__(
        self,
        recipe: Recipe,
        model: Model,
        tokenizer: str,
        limits: Limits = CONVERSATION,
        annotate: Annotate | None = None,
    ) -> None:
        words = recipe.model.words
        if words.tokenizer is None:
            raise ValueError(f"recipe {recipe.name!r} has a model that reads no text, so it cannot be talked to")
        last = recipe.stages[-1]
        self.name = recipe.name
        self.model = model
        self.decoder = decoder_of(model.eval().requires_grad_(False), annotate)
        self.device = next(model.parameters()).device
        self.context = words.longest or last.context
        self.tiling = recipe.tiling
        self.limits = limits
        self.codec = TextCodec(tokenizer, words.bos, words.eos)
        budget = Budget(tokens=self.context, tiles=last.max_tiles)
        self.encoder = Encoder(self.codec, words.chat, recipe.model.layout(recipe.tiling), budget)
        marks = [span.text for span in words.chat.after("assistant") if span.special and span.learn]
        self.ends = {self.codec.special(mark) for mark in (*marks, *([words.eos] if words.eos else []))}

    @classmethod
    def open(cls, folder: Path, device: torch.device | str = "cpu", limits: Limits = CONVERSATION) -> Speaker:
        """The model of an export's folder. Raises FileNotFoundError where it is none, ValueError where it writes no text."""
        model = read_back(folder).to(device)
        recipe = load((folder / "recipe.json").read_bytes())
        inner = folder / "lm"
        text = inner if (inner / "tokenizer.json").is_file() else folder
        return cls(recipe, model, str(text), limits, in_folder(recipe.instructions, folder, text))

    def prompt(self, turns: Sequence[Turn], how: Sampling) -> Prompt:
        """The conversation as tokens and tiles, its pictures decoded. Raises BadTurns."""
        try:
            document = self._document(turns)
            sample = self.encoder.prompt(document)
            tiles = np.zeros((0, *self.tiling.shape), np.uint8)
            if sample.pictures:
                tiles = pictures.pixels(sample.pictures, self.tiling)
        except SkipSample as skip:
            raise BadTurns(str(skip)) from skip
        if sample.tiles > self.encoder.budget.tiles:
            raise TooLong(
                f"the pictures take {sample.tiles} tiles and the model was trained on {self.encoder.budget.tiles} at once; "
                "show fewer or smaller ones"
            )
        return self.ready(Prompt(sample, tiles, how))

    def ready(self, prompt: Prompt) -> Prompt:
        """`prompt` if it leaves room for its answer, whose greatest length is then known. Raises TooLong."""
        asked = len(prompt.sample.input_ids)
        most = prompt.how.max_tokens or max(1, min(LONG, self.context - asked))
        if asked + most > self.context:
            raise TooLong(
                f"{asked} tokens are asked and {most} to be answered, more than the {self.context} that the model has; "
                "shorten the conversation or lower max_tokens"
            )
        prompt.how = replace(prompt.how, max_tokens=most)
        return prompt

    def _document(self, turns: Sequence[Turn]) -> Measured:
        check(turns)
        segments: list[Text | Image] = []
        shown = characters = 0
        for number, turn in enumerate(turns):
            before: str | bytes | None = None
            if number and turns[number - 1].role == turn.role:
                segments.append(Text(text="\n\n", role=turn.role, learn=False))
            for part in turn.parts:
                if isinstance(part, bytes):
                    shown += 1
                    segments.append(Image(data=part, role=turn.role))
                else:
                    characters += len(part)
                    # Instruction corpora write a picture, a new line, and the question.
                    line = "\n" if isinstance(before, bytes) and not part.startswith("\n") else ""
                    # As in training, an instruction is what stands before the first answer.
                    segments.append(Text(text=line + part, role=turn.role, learn=turn.role == "assistant"))
                before = part
        if shown > self.limits.pictures:
            raise BadTurns(f"{shown} pictures, more than the {self.limits.pictures} that one conversation may have")
        if characters > self.limits.characters:
            raise BadTurns(f"{characters} characters, more than the {self.limits.characters} that are read")
        row = RowId(corpus="chat", shard="", epoch=0, row=0)
        return pictures.measure(Document(id=row, source=0, segments=tuple(segments)), self.tiling, self.limits)

    def write(self, prompts: Sequence[Prompt]) -> Iterator[list[tuple[int, Piece]]]:
        """After each token what has come to which of `prompts`, until all have ended; of those that are `gone` nothing comes."""
        going = list(range(len(prompts)))
        pens = [Pen(self.codec, prompt.how, self.ends) for prompt in prompts]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.decoder.begin([p.sample for p in prompts], [p.tiles for p in prompts])
        while going:
            tokens = [pens[number].choose(row) for number, row in zip(going, logits, strict=True)]
            pieces = [(number, pens[number].add(token)) for number, token in zip(going, tokens, strict=True)]
            stay = [at for at, (n, piece) in enumerate(pieces) if piece.finish is None and not prompts[n].gone]
            yield [(number, piece) for number, piece in pieces if piece.text or piece.finish]
            if not stay:
                return
            if len(stay) < len(going):
                # The last token must be seen before rows are left: a cache takes one for each row that it has.
                self.decoder.keep(stay)
                going, tokens = [going[at] for at in stay], [tokens[at] for at in stay]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                logits = self.decoder.step(tokens)

    def answer(self, turns: Sequence[Turn], how: Sampling) -> str:
        """The whole answer to one conversation. Raises BadTurns."""
        return self.answers([self.prompt(turns, how)])[0]

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """The whole answers to prompts that are written together."""
        texts = [""] * len(prompts)
        for pieces in self.write(prompts):
            for number, piece in pieces:
                texts[number] += piece.text
        return texts


def check(turns: Sequence[Turn]) -> None:
    """Raise BadTurns unless a model could answer: a system first if at all, the user last, pictures in the user's turns."""
    if not turns:
        raise BadTurns("there are no messages; give at least one of the user")
    for number, turn in enumerate(turns):
        if turn.role == "system" and number:
            raise BadTurns(f"message {number} is of the system, which speaks once and first; move it to the front")
        if turn.role != "user" and any(isinstance(part, bytes) for part in turn.parts):
            raise BadTurns(f"message {number} is of the {turn.role} and has a picture; only the user shows pictures")
        if not any(turn.parts):
            raise BadTurns(f"message {number} is empty; say something, or leave it away")
    if turns[-1].role != "user":
        raise BadTurns(f"the last message is of the {turns[-1].role}, and the model answers the user; end with theirs")


class Pen:
    """Writes one answer: draws its tokens, and gives its text as far as it is certain."""

    def __init__(self, codec: TextCodec, how: Sampling, ends: set[int]) -> None:
        self.codec = codec
        self.how = how
        self.ends = ends
        self.ids: list[int] = []
        self.given = ""
        self.chance = torch.Generator()
        if self.how.seed is None:
            self.chance.seed()
        else:
            self.chance.manual_seed(self.how.seed)

    def choose(self, logits: torch.Tensor) -> int:
        """The next token, by float logits (C,)."""
        return choose(logits, self.how, self.chance)

    def add(self, token: int) -> Piece:
        """What `token` adds. Text that might yet become a `stop`, or half a character, is held back."""
        ended = token in self.ends
        if not ended:
            self.ids.append(token)
        full = len(self.ids) == self.how.max_tokens
        text = self._text()
        text = text if ended or full else text.rstrip(LOST)
        places = [at for stop in self.how.stop if (at := text.find(stop)) >= 0]
        if places:
            return self._piece(text[: min(places)], "stop")
        if ended or full:
            return self._piece(text, "stop" if ended else "length")
        return self._piece(text[: len(text) - self._begun(text)], None)

    def _text(self) -> str:
        return self.codec.decode(self.ids)

    def _begun(self, text: str) -> int:
        """Characters at the end with which a `stop` may have begun."""
        found = (n for stop in self.how.stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(found, default=0)

    def _piece(self, text: str, finish: Literal["stop", "length"] | None) -> Piece:
        new = text[len(self.given) :]
        self.given += new
        return Piece(text=new, tokens=len(self.ids), finish=finish)
