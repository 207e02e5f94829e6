"""Benchmarks as a person has them: a file of questions beside a folder of pictures, asked and scored as the authors do.

    items = read_items(Path("textvqa.jsonl"), Path("images"))
    task = TextVQA()
    asked = [one for item in items for one in task.ask(item)]
    scores = task.scores(asked, answers)

A file has a JSON object a line (or, in MMBench's form, is a table of tabs whose pictures are in base64). The names of fields are
those of each benchmark's own files: `question_id`/`index`/`id`, `question`/`text`, `image`, `answers`/`answer`/`label`,
`choices`/`options` or columns `A` to `Z`, `category`/`subject`, `hint`. To add one: a `@spec` with `ask` and `scores`, and its
name in `Task`.
"""

from __future__ import annotations

import base64
import binascii
import csv
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mllm import scorers
from mllm.scorers import LETTERS
from mllm.speaker import Turn
from pipelines.types import spec

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
"""LLaVA-1.5's words at the end of a question (arXiv:2310.03744, 3.2), which those that were tuned on its mixture know."""


@spec
class Item:
    """A question with what is true of it. `choices` are those of a question that has some, `answers` then one letter.

    `picture` is the file's bytes; `group` names questions that belong together, such as MME's two of one picture.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    picture: bytes | None = None
    choices: tuple[str, ...] = ()
    subject: str = ""
    group: str = ""


@spec
class Asked:
    """An item as it is asked: the words, and the letter that would be right where choices were given."""

    item: Item
    words: str
    choices: tuple[str, ...] = ()
    right: str = ""

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The conversation that asks it."""
        shown = () if self.item.picture is None else (self.item.picture,)
        return (Turn(role="user", parts=(*shown, self.words)),)


Scores = dict[str, float]
"""Numbers by their names, the one that tables show first; of shares, in [0, 1]."""


@spec
class ShortAnswers:
    """VQAv2 and TextVQA: soft accuracy against what people answered."""

    kind: Literal["vqav2", "textvqa"]

    def ask(self, item: Item) -> list[Asked]:
        return [Asked(item=item, words=f"{item.question}\n{SHORT}")]

    def scores(self, asked: Sequence[Asked], answers: Sequence[str]) -> Scores:
        return _mean("accuracy", asked, answers, lambda one, said: scorers.vqa_accuracy(said, one.item.answers))


@spec
class Exact:
    """Any questions: the share that is answered word for word."""

    kind: Literal["exact"] = "exact"

    def ask(self, item: Item) -> list[Asked]:
        return [Asked(item=item, words=item.question)]

    def scores(self, asked: Sequence[Asked], answers: Sequence[str]) -> Scores:
        return _mean("exact", asked, answers, lambda one, said: scorers.exact(said, one.item.answers))


@spec
class MME:
    """MME: acc and acc+ of each subtask, and their sum over all."""

    kind: Literal["mme"] = "mme"

    def ask(self, item: Item) -> list[Asked]:
        return [Asked(item=item, words=f"{item.question}\n{SHORT}")]

    def scores(self, asked: Sequence[Asked], answers: Sequence[str]) -> Scores:
        subtasks: dict[str, list[tuple[str, bool]]] = defaultdict(list)
        for one, said in zip(asked, answers, strict=True):
            right = scorers.mme_said(said) == one.item.answers[0].strip().lower()
            subtasks[one.item.subject].append((one.item.group or one.item.id, right))
        found = {name: scorers.mme(of) for name, of in sorted(subtasks.items())}
        scores = {"score": sum(pair.score for pair in found.values())}
        for name, pair in found.items():
            head = f"{name} " if name else ""
            scores |= {f"{head}acc": pair.accuracy, f"{head}acc+": pair.plus}
        return scores


@spec
class POPE:
    """POPE: F1 of saying that something is in a picture."""

    kind: Literal["pope"] = "pope"

    def ask(self, item: Item) -> list[Asked]:
        return [Asked(item=item, words=f"{item.question}\n{SHORT}")]

    def scores(self, asked: Sequence[Asked], answers: Sequence[str]) -> Scores:
        pairs = [(scorers.pope_said(said), one.item.answers[0].strip().lower()) for one, said in _pairs(asked, answers)]
        found = scorers.pope(pairs)
        names = ("f1", "accuracy", "precision", "recall", "yes")
        return {name: getattr(found, name) for name in names}


@spec
class MMMU:
    """MMMU: the share of questions whose letter is right, by subject; those without choices word for word."""

    kind: Literal["mmmu"] = "mmmu"

    def ask(self, item: Item) -> list[Asked]:
        if not item.choices:
            return [Asked(item=item, words=f"{item.question}\n{SHORT}")]
        return [_with_letters(item, item.choices, item.answers[0])]

    def scores(self, asked: Sequence[Asked], answers: Sequence[str]) -> Scores:
        return _by_subject([(one.item.subject, _right(one, said)) for one, said in _pairs(asked, answers)])


@spec
class MMBench:
    """MMBench: a question counts where it is answered right with its choices in every turn."""

    kind: Literal["mmbench"] = "mmbench"

    def ask(self, item: Item) -> list[Asked]:
        if not item.choices:
            raise ValueError(
                f"question {item.id!r} has no choices, and mmbench is about choosing; give A, B, ... or choices"
            )
        place, count = LETTERS.index(item.answers[0]), len(item.choices)
        turned = scorers.rotations(item.choices)
        return [_with_letters(item, choices, LETTERS[(place - turn) % count]) for turn, choices in enumerate(turned)]

    def scores(self, asked: Sequence[Asked], answers: Sequence[str]) -> Scores:
        right = [(one.item, _right(one, said)) for one, said in _pairs(asked, answers)]
        subjects: dict[str, list[tuple[str, bool]]] = defaultdict(list)
        for item, one in right:
            subjects[item.subject].append((item.id, bool(one)))
        scores = {"circular": scorers.circular((item.id, bool(one)) for item, one in right)}
        scores["single"] = sum(one for _, one in right) / max(1, len(right))
        return scores | {name: scorers.circular(of) for name, of in sorted(subjects.items()) if name}


Task = Annotated[ShortAnswers | Exact | MME | POPE | MMMU | MMBench, Field(discriminator="kind")]

TaskName = Literal["textvqa", "vqav2", "mme", "mmmu", "mmbench", "pope", "exact"]


def task_of(name: TaskName) -> ShortAnswers | Exact | MME | POPE | MMMU | MMBench:
    """The task of that name."""
    match name:
        case "textvqa" | "vqav2":
            return ShortAnswers(kind=name)
        case "mme":
            return MME()
        case "mmmu":
            return MMMU()
        case "mmbench":
            return MMBench()
        case "pope":
            return POPE()
        case "exact":
            return Exact()


def _pairs(asked: Sequence[Asked], answers: Sequence[str]) -> list[tuple[Asked, str]]:
    return list(zip(asked, answers, strict=True))


def _mean(name: str, asked: Sequence[Asked], answers: Sequence[str], score: Callable[[Asked, str], float]) -> Scores:
    values = [(one.item.subject, score(one, said)) for one, said in _pairs(asked, answers)]
    return _by_subject(values, name)


def _by_subject(values: Sequence[tuple[str, float]], name: str = "accuracy") -> Scores:
    found = scorers.by_subject(values)
    whole = sum(value for _, value in values) / max(1, len(values))
    return {name: whole} | {subject: value for subject, (value, _) in found.items() if subject}


def _with_letters(item: Item, choices: tuple[str, ...], right: str) -> Asked:
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return Asked(item=item, words="\n".join([item.question, *lines, LETTER]), choices=choices, right=right)


def _right(one: Asked, said: str) -> float:
    if not one.choices:
        return scorers.exact(said, one.item.answers)
    return float(scorers.chosen(said, one.choices) == one.right)


def read_items(file: Path, pictures: Path | None = None) -> list[Item]:
    """The questions of `file`; pictures that it names lie in the folder `pictures`, the file's own by default.

    Raises ValueError, naming line and field, for a line that is no question.
    """
    folder = pictures or file.parent
    if not file.is_file():
        raise FileNotFoundError(f"no file {file} of questions")
    items = []
    for number, row in _rows(file):
        try:
            items.append(_item(row, folder, number))
        except (KeyError, ValueError, OSError, TypeError, binascii.Error) as error:
            told = f"has no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{file} line {number}: {told}") from error
    if not items:
        raise ValueError(f"{file} has no questions")
    return items


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open(encoding="utf-8", newline="") as text:
        if file.suffix == ".tsv":
            csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # pictures are in the table
            for number, row in enumerate(csv.DictReader(text, delimiter="\t"), 2):
                yield number, {key: value for key, value in row.items() if value}
            return
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file} line {number}: not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{file} line {number}: expected an object with a question, found {type(row).__name__}"
                )
            yield number, row


def _item(row: dict[str, Any], folder: Path, number: int) -> Item:
    choices = _choices(row)
    answers = _first(row, ("answers", "answer", "label", "gt_answer"), "answer")
    answers = tuple(map(_answer, answers if isinstance(answers, list) else [answers]))
    if choices:
        answers = (_letter(answers, choices),)
    words = str(_first(row, ("question", "text"), "question"))
    hint = row.get("hint")
    image = row.get("image")
    return Item(
        id=str(_first(row, ("question_id", "index", "id"), "id", number)),
        question=f"{hint}\n{words}" if isinstance(hint, str) and hint.strip() else words,
        answers=answers,
        picture=None if image is None else _picture(str(image), folder),
        choices=choices,
        subject=str(_first(row, ("category", "subject", "subfield"), "subject", "")),
        group=str(image if isinstance(image, str) and len(image) < 200 else row.get("group", "")),
    )


def _first(row: dict[str, Any], names: Sequence[str], what: str, default: Any = None) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    if default is None:
        raise KeyError(f"{what} (looked for {', '.join(names)})")
    return default


def _answer(answer: Any) -> str:
    """What a person answered: as text, or in VQA's own form `{"answer": ...}`."""
    return str(answer["answer"]) if isinstance(answer, dict) else str(answer)


def _choices(row: dict[str, Any]) -> tuple[str, ...]:
    listed = row.get("choices", row.get("options"))
    if isinstance(listed, list):
        return tuple(map(str, listed))
    return tuple(str(row[letter]) for letter in LETTERS if row.get(letter) is not None)


def _letter(answers: tuple[str, ...], choices: tuple[str, ...]) -> str:
    """The right letter, told as such, as the choice's number from 0, or as its text."""
    said = answers[0].strip()
    letters = LETTERS[: len(choices)]
    if len(said) == 1 and said.upper() in letters:
        return said.upper()
    if said in choices:
        return letters[choices.index(said)]
    if said.isdigit() and int(said) < len(choices):
        return letters[int(said)]
    raise ValueError(f"the answer {said!r} is none of the choices {list(choices)}, nor a letter of theirs")


def _picture(image: str, folder: Path) -> bytes:
    """A picture's bytes: a file of the folder, or the file itself in base64. Raises ValueError for one outside of the folder."""
    if len(image) < 1000:
        path = (folder / image).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise ValueError(f"picture {image!r} lies outside of {folder}; name the folder with --images")
        if not path.is_file():
            raise ValueError(f"no picture {path}; name the folder with --images")
        return path.read_bytes()
    return base64.b64decode(image, validate=True)
