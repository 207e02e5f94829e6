"""Turns of conversations, two answers to compare, and plain text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal

from pipelines import storage
from pipelines.corpora.cells import SLOT, VIDEO_SLOT, VIDEO_SUFFIXES, awaited, names_of, some_text, web_text
from pipelines.manifest import Shard, ShardIndex
from pipelines.reading import LIMITS, Awaited, Draft, Opener, Read, Segment, folder_of, json_object, string
from pipelines.rows import Row, read_rows, scan_rows, suffix
from pipelines.types import Chunk, Frames, Image, Limits, Reason, Role, SkipSample, Text, spec


@spec
class Conversations:
    """Instructions as LLaVA writes them, a JSON list or jsonl of `image`, `conversations[{from, value}]`; answers are learned.

    `image` is a path or several, and `<image>` marks their slots; `video` likewise, with `<video>` or `<image>` as its slot: a
    file, or a folder of frames. Paths are relative to `images`, by default the file's own folder. Also read are MiniCPM's
    `role` and `content`, whose `image` may be a dict from slot to path, and which may leave out the slot of its only image;
    Qwen-VL's inline `<img>path</img>`; and Video-ChatGPT's `q, a, video_id`, where the file is `video_id` + `video_suffix`.
    """

    kind: Literal["conversations"] = "conversations"
    name: str
    images: str = ""
    frames: Frames = Frames()
    video_suffix: str = ".mp4"

    def files(self, uri: str) -> tuple[str, ...]:
        return (uri,)

    def scan(self, uri: str, opener: Opener = storage.open_file) -> ShardIndex:
        return scan_rows(uri, opener, partial(self._draft, folder_of(uri, self.images))).index()

    def read(self, shard: Shard, chunk: Chunk, limits: Limits = LIMITS) -> Read:
        """Documents of rows `[chunk.start, chunk.stop)`, in order."""
        return read_rows(self.name, shard, chunk, limits, partial(self._draft, folder_of(shard.uri, self.images)))

    def _draft(self, folder: str, row: Row) -> Draft:
        if "video_id" in row and "q" in row:
            row = self._video_chatgpt(row)
        turns = _turns(row.get("conversations", row.get("messages")))
        if not turns:
            raise SkipSample(Reason.MISSING_FIELD, "conversations")
        slots = self._slots(row, turns)
        segments: list[Segment] = []
        for role, text in turns:
            for part, is_slot in _parts_of(text, slots):
                if is_slot:
                    file, frames = next(slots[part])
                    segments.append(awaited(folder, file, role, frames))
                else:
                    segments.append(Text(text=part, role=role, learn=role == "assistant"))
        return Draft(segments=tuple(segments))

    def _slots(self, row: Row, turns: list[tuple[Role, str]]) -> dict[str, Iterator[Media]]:
        """The files that go to each spelling of a slot, in order. Raises SkipSample where they do not match the slots."""
        image = row.get("image") or row.get("images") or []
        video = names_of(row.get("video") or [])
        files: dict[str, list[Media]] = {SLOT: []}
        if isinstance(image, dict):
            files.update({slot: [(name, None) for name in names_of(names)] for slot, names in image.items()})
        else:
            files[SLOT] += [(name, None) for name in names_of(image)]
        if video:
            slot = VIDEO_SLOT if files[SLOT] or any(VIDEO_SLOT in text for _, text in turns) else SLOT
            files[slot] = [(name, self.frames) for name in video]
        if not image and not video:
            for match in re.finditer(r"<img>([^<>]{1,1024})</img>", "\n".join(text for _, text in turns)):
                files.setdefault(match[0], []).append((match[1], None))
        if "content" in _first_turn(row) and len(files[SLOT]) == 1 and not any(SLOT in text for _, text in turns):
            turns[0] = (turns[0][0], f"{SLOT}\n{turns[0][1]}")  # MiniCPM: "the image is placed at the front"
        found = Counter(part for _, text in turns for part, is_slot in _parts_of(text, files) if is_slot)
        for slot, names in files.items():
            if found[slot] != len(names):
                what = f"{found[slot]} {slot} slots and {len(names)} {'videos' if video else 'images'}"
                raise SkipSample(Reason.IMAGE_INDEX, what)
        return {slot: iter(names) for slot, names in files.items()}

    def _video_chatgpt(self, row: Row) -> Row:
        name = string(row, "video_id")
        file = name if suffix(name) in VIDEO_SUFFIXES else name + self.video_suffix
        asked = {"from": "human", "value": f"{VIDEO_SLOT}\n{web_text(string(row, 'q'))}"}
        return {"video": file, "conversations": [asked, {"from": "gpt", "value": string(row, "a")}]}


Media = tuple[str, Frames | None]
"""A file as a row names it; with frames where it is a video."""


def _parts_of(text: str, slots: Mapping[str, object]) -> Iterator[tuple[str, bool]]:
    """The text cut at its slots: each part, and whether it is one. A slot is `<word>`, or Qwen-VL's, which spells its path."""
    begun = 0
    for match in re.finditer(r"<img>[^<>]{1,1024}</img>|<[^<>\s]{1,64}>", text):
        if match[0] in slots:
            if match.start() > begun:
                yield text[begun : match.start()], False
            yield match[0], True
            begun = match.end()
    if begun < len(text):
        yield text[begun:], False


def _first_turn(row: Row) -> Row:
    turns = row.get("conversations", row.get("messages"))
    return turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}


ROLES: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


def _turns(turns: object) -> list[tuple[Role, str]]:
    """Turns as `{from, value}` or as `{role, content}`."""
    if not isinstance(turns, list):
        return []
    return [_turn(turn) for turn in turns]


def _turn(turn: object) -> tuple[Role, str]:
    row = turn if isinstance(turn, dict) else {}
    speaker = string(row, "from" if "from" in row else "role")
    if speaker not in ROLES:
        raise SkipSample(Reason.MISSING_FIELD, f"a turn is by {speaker[:40]!r}; expected {', '.join(ROLES)}")
    return ROLES[speaker], string(row, "value" if "value" in row else "content")


@spec
class TextOnly:
    """Text without images: jsonl, a JSON list or parquet. The fields tell the form: `text` alone, or a question and an answer
    as `inputs/targets` (FLAN), `instruction/input/output` (Alpaca, self-instruct) or `question/answer`."""

    kind: Literal["text"] = "text"
    name: str

    def files(self, uri: str) -> tuple[str, ...]:
        return (uri,)

    def scan(self, uri: str, opener: Opener = storage.open_file) -> ShardIndex:
        return scan_rows(uri, opener, self._draft).index()

    def read(self, shard: Shard, chunk: Chunk, limits: Limits = LIMITS) -> Read:
        """Documents of rows `[chunk.start, chunk.stop)`, in order."""
        return read_rows(self.name, shard, chunk, limits, self._draft)

    def _draft(self, row: Row) -> Draft:
        if "text" in row:
            return Draft(segments=(Text(text=some_text(string(row, "text"), strip=False)),))
        for question, context, answer in (
            ("inputs", "", "targets"),
            ("instruction", "input", "output"),
            ("question", "", "answer"),
        ):
            if question in row:
                given = string(row, context) if row.get(context) is not None else ""
                asked = "\n".join(filter(None, [string(row, question), given]))
                said = string(row, answer)
                if not said.strip():
                    raise SkipSample(Reason.EMPTY, f"{answer} is empty")
                user = Text(text=web_text(asked), role="user", learn=False)
                return Draft(segments=(user, Text(text=web_text(said), role="assistant")))
        raise SkipSample(Reason.MISSING_FIELD, f"found {sorted(row)}; expected text, inputs, instruction or question")


@spec
class Preferences:
    """Two answers to one question, the better one first: jsonl, a JSON list or parquet.

    The question is `prompt` or `question`: a string, or a list of turns; the answers are `chosen` and `rejected`: strings,
    turns, or whole transcripts as `"\\n\\nHuman: ...\\n\\nAssistant: ..."` that differ in their last answer (hh-rlhf). A picture
    is `image` -- a path below `images` (LLaVA-NeXT), encoded bytes, or `{bytes, path}` (RLAIF-V) -- and a clip is `video`; they
    stand at `<image>` or `<video>` in the question, or before it. RLHF-V's `text`, which holds the three fields as JSON, is
    read too. The chosen answer is in the document's segments, the other in `rejected`; stored `logps` are not kept.
    """

    kind: Literal["preferences"] = "preferences"
    name: str
    images: str = ""
    frames: Frames = Frames()

    def files(self, uri: str) -> tuple[str, ...]:
        return (uri,)

    def scan(self, uri: str, opener: Opener = storage.open_file) -> ShardIndex:
        return scan_rows(uri, opener, partial(self._draft, folder_of(uri, self.images))).index()

    def read(self, shard: Shard, chunk: Chunk, limits: Limits = LIMITS) -> Read:
        """Documents of rows `[chunk.start, chunk.stop)`, in order."""
        return read_rows(self.name, shard, chunk, limits, partial(self._draft, folder_of(shard.uri, self.images)))

    def _draft(self, folder: str, row: Row) -> Draft:
        if "chosen" not in row and isinstance(row.get("text"), str):
            row = row | json_object(row["text"].encode("utf-8", "surrogatepass"))
        prompt = _said(row.get("prompt", row.get("question")), "user")
        (asked, better), (also, worse) = (_asked(prompt, row, field) for field in ("chosen", "rejected"))
        if asked != also:
            raise SkipSample(Reason.MISSING_FIELD, "chosen and rejected answer different questions")
        if better == worse:
            raise SkipSample(Reason.SAME_ANSWERS, better[:80])
        media = self._media(folder, row)
        segments: list[Segment] = []
        first = next((place for place, (role, _) in enumerate(asked) if role == "user"), 0)
        for place, (role, text) in enumerate(asked):
            segments += _placed(media if place == first else None, text, role)
        segments.append(Text(text=some_text(better, strip=False), role="assistant"))
        return Draft(segments=tuple(segments), rejected=(Text(text=some_text(worse, strip=False), role="assistant"),))

    def _media(self, folder: str, row: Row) -> Segment | None:
        value: Any = row.get("image") or row.get("images")
        if isinstance(value, list):
            if len(value) != 1:
                raise SkipSample(Reason.IMAGE_INDEX, f"{len(value)} images; a preference has one at most")
            value = value[0]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return Image(data=value, role="user")
        if isinstance(value, str):
            return awaited(folder, value, "user")
        if value is not None:
            raise SkipSample(Reason.MISSING_FIELD, f"image is {type(value).__name__}; expected a path or bytes")
        return awaited(folder, string(row, "video"), "user", self.frames) if row.get("video") else None


def _said(value: object, alone: Role) -> list[tuple[Role, str]]:
    """Turns of a conversation in any of its forms; a plain string is one turn by `alone`."""
    if isinstance(value, dict):
        return [_turn(value)]
    if not isinstance(value, str):
        return _turns(value)
    if not value.startswith("\n\nHuman:"):
        return [(alone, value)]
    parts = re.split(r"\n\n(Human|Assistant):", value)[1:]
    spoken = zip(parts[::2], parts[1::2], strict=True)
    turns: list[tuple[Role, str]] = [("user" if who == "Human" else "assistant", text.strip()) for who, text in spoken]
    return turns[:-1] if alone == "user" and turns[-1] == ("assistant", "") else turns


def _asked(prompt: list[tuple[Role, str]], row: Row, field: str) -> tuple[list[tuple[Role, str]], str]:
    """What was asked, and the answer. An answer that is a whole conversation holds its question."""
    turns = _said(row.get(field), "assistant")
    if not turns or turns[-1][0] != "assistant":
        raise SkipSample(Reason.MISSING_FIELD, f"{field} holds no answer")
    asked = prompt if len(turns) == 1 else turns[:-1]
    if not asked:
        raise SkipSample(Reason.MISSING_FIELD, "prompt or question")
    return asked, turns[-1][1]


def _placed(media: Segment | None, text: str, role: Role) -> list[Segment]:
    """A question around its picture or clip: at its slot, or before it."""
    if media is None:
        return [Text(text=web_text(text), role=role, learn=False)]
    slot = VIDEO_SLOT if VIDEO_SLOT in text and isinstance(media, Awaited) and media.frames else SLOT
    before, found, after = text.partition(slot)
    if not found:
        before, after = "", "\n" + text
    return [
        *([Text(text=web_text(before), role=role, learn=False)] if before else []),
        media,
        *([Text(text=web_text(after), role=role, learn=False)] if after else []),
    ]
