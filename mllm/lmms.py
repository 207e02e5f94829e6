"""Our models in lmms-eval (extra `lmms-eval`): its benchmarks of pictures and text, on an export.

    python -m lmms_eval --model mllm --model_args folder=runs/vila_7b/export --tasks mme

    lmms_eval.evaluator.simple_evaluate(model=Lmms(folder="runs/vila_7b/export"), tasks=["mme"])

A question is asked as a conversation, in the model's own template. Where an answer may be longer than the model's context has
room for, it is as long as there is room. What a model here cannot do (hear, see a video's file, search by beams) is refused by
name: a score of questions that were asked otherwise would mislead.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import PIL.Image
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports] -- an extra
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports] -- an extra

from mllm.generate import Sampling
from mllm.speaker import BadTurns, Prompt, Speaker, Turn

MOST = 256
"""Tokens of an answer, where a task does not say."""

HEEDED = {"max_new_tokens", "temperature", "top_p", "do_sample", "until", "num_beams", "image_aspect_ratio"}
"""Settings of a task's answers that are followed; the last asks for LLaVA's own tiling, and a recipe has one already."""


class Lmms(lmms):
    """A `Speaker` as lmms-eval asks it: conversations in, answers out. One process, one device."""

    is_simple = False

    def __init__(
        self, folder: str | Path, device: str | None = "cpu", batch_size: int | str | None = 1, **others: object
    ) -> None:
        """The model of an export's folder, to answer `batch_size` questions at a time.

        Raises FileNotFoundError, and ValueError for a model that writes no text or a setting that is not known.
        """
        super().__init__()
        if unknown := {name for name, value in others.items() if value is not None} - {"max_batch_size"}:
            raise ValueError(f"model_args {sorted(unknown)}: known are folder, device and batch_size")
        self.speaker = Speaker.open(Path(folder), device or "cpu")
        self.batch = int(batch_size or 1)

    @property
    def device(self) -> Any:
        return self.speaker.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each request. Raises ValueError, naming the task and its document, for what cannot be asked."""
        answers: list[str] = []
        for start in range(0, len(requests), self.batch):
            prompts = [self._prompt(*request.args) for request in requests[start : start + self.batch]]
            answers += self.speaker.answers(prompts)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        raise NotImplementedError(
            "lmms-eval asks conversations for answers alone; for probabilities of texts take lm-eval, mllm.harness"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        raise NotImplementedError("tasks of several rounds are not asked; take tasks of one")

    def _prompt(
        self, _text: str, messages_of: Any, how: Mapping[str, Any], number: int, task: str, split: str
    ) -> Prompt:
        document = self.task_dict[task][split][number]
        try:
            sampling = sampling_of(how)
            turns = [turn_of(message) for message in messages_of(document)]
            prompt = self.speaker.prompt(turns, replace(sampling, max_tokens=None))
        except (BadTurns, ValueError) as error:
            raise ValueError(f"task {task!r}, document {number} of {split!r}: {error}") from error
        room = self.speaker.context - len(prompt.sample.input_ids)
        prompt.how = replace(sampling, max_tokens=min(sampling.max_tokens or MOST, room))
        return prompt


def sampling_of(how: Mapping[str, Any]) -> Sampling:
    """How a task wants its answers written, in transformers' words. Raises ValueError for what is not known here."""
    if how.get("num_beams") not in (None, 1):
        raise ValueError(f"num_beams={how['num_beams']}: answers are written by one beam")
    if unknown := how.keys() - HEEDED:
        raise ValueError(f"{', '.join(sorted(unknown))}: no such setting of answers is known here")
    until = how.get("until") or ()
    drawn = bool(how.get("do_sample")) and how.get("temperature") != 0
    return Sampling(
        max_tokens=int(how.get("max_new_tokens") or MOST),
        temperature=float(how.get("temperature") or 1.0) if drawn else 0.0,
        top_p=float(how.get("top_p") or 1.0) if drawn else 1.0,
        stop=(until,) if isinstance(until, str) else tuple(until),
        seed=0,
    )


def turn_of(message: Mapping[str, Any]) -> Turn:
    """One of lmms-eval's messages. Raises ValueError for what is neither text nor picture."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return Turn(role=message["role"], parts=tuple(_parts(parts)))


def _parts(parts: Sequence[Mapping[str, Any]]) -> Iterator[str | bytes]:
    for part in parts:
        match part["type"]:
            case "text":
                yield part["text"]
            case "image":
                yield _file(part["url"])
            case kind:
                raise ValueError(f"it shows {kind}, and models here are shown pictures; take another task")


def _file(picture: PIL.Image.Image | str) -> bytes:
    """A picture as a file's bytes, nothing of it lost."""
    if isinstance(picture, str):
        return Path(picture).read_bytes()
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


MANIFEST = ModelManifest(model_id="mllm", chat_class_path="mllm.lmms.Lmms")
"""By which lmms-eval finds the model, through an entry point of this package."""
