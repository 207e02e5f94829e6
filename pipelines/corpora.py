"""Corpora as the field publishes them. Each is a frozen value that can scan a shard and read rows of it.

    Pairs            webdataset tars of pictures and captions           COYO, LAION, CC (img2dataset)
    Questions        webdataset tars of pictures, questions, answers    VQA 2.0, GQA
    CaptionList      csv, tsv or jsonl of paths and captions            FROMAGe, LLaMA-Adapter
    Labelled         webdataset tars with classes, or a list of paths   ImageNet
    Interleaved      jsonl of pages, pictures in a tar or a folder      MMC4
    Obelics          parquet of pages                                   OBELICS
    Conversations    JSON list or jsonl of turns, pictures, videos      LLaVA, ShareGPT4V, InternVL, MiniCPM, Qwen-VL
    TextOnly         jsonl, JSON list or parquet                        FLAN, Alpaca
    Preferences      jsonl or parquet of two answers                    LLaVA-NeXT, RLHF-V, RLAIF-V, hh-rlhf
    Regions          jsonl of boxes and what they show                  RefCOCO, Visual Genome, GRIT
    Videos           jsonl or webdataset tars of clips and captions     WebVid

Every one has three methods. `files(uri)` are the files that one shard consists of, not those its rows merely refer to.
`scan(uri, opener)` reads them once and finds the rows. `read(shard, chunk, limits)` yields each row of a chunk in order, as a
`Document` or as a `Rejected` with its reason; it makes one request for the rows and one round of requests for all that they
refer to. Only storage errors are raised, and by `scan` ValueError for a shard that is no such file at all.

To add a format: a class with these methods, and its name in `Corpus`. Formats share `reading.py`, `rows.py` and `tars.py`.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field

from pipelines import storage
from pipelines.manifest import Shard, ShardIndex
from pipelines.reading import (
    IMAGE_SUFFIXES,
    LIMITS,
    Awaited,
    Draft,
    File,
    Opener,
    Read,
    Segment,
    below,
    folder_of,
    json_object,
    safe,
    string,
    utf8,
)
from pipelines.rows import Row, read_rows, scan_rows, suffix
from pipelines.tars import Files, read_tar, scan_archive, scan_tar
from pipelines.types import Chunk, Frames, Image, Limits, Reason, Region, Role, SkipSample, Text, Video, spec

SLOT = "<image>"
VIDEO_SLOT = "<video>"
VIDEO_SUFFIXES = ("mp4", "avi", "webm", "mkv", "mov")


@spec
class Pairs:
    """Image-caption pairs in webdataset tars as img2dataset writes them: `key.jpg`, `key.txt`, `key.json` (COYO, LAION, CC).

    The caption is the `.txt`, or `caption` or `text` of the `.json`. The document is the image, a line break and the caption,
    all of whose tokens are learned (VILA 4.1; LLaVA `plain`). A `.npz` is what a detector found (`pipelines.objects`), and
    may stand without the picture.
    """

    kind: Literal["pairs"] = "pairs"
    name: str

    def files(self, uri: str) -> tuple[str, ...]:
        return (uri,)

    def scan(self, uri: str, opener: Opener = storage.open_file) -> ShardIndex:
        return scan_tar(uri, opener, self._draft)

    def read(self, shard: Shard, chunk: Chunk, limits: Limits = LIMITS) -> Read:
        """Documents of rows `[chunk.start, chunk.stop)`, in order."""
        return read_tar(self.name, shard, chunk, limits, self._draft)

    def _draft(self, files: Files) -> Draft:
        return Draft(segments=(_seen(files), Text(text="\n" + _caption(files))))


@spec
class Questions:
    """Questions about pictures, each with one of a list of answers: webdataset tars of `key.jpg`, `key.txt` and `key.cls`.

    The `.txt` is the question and the `.cls` the number of its answer, `Document.label`; a row without one has none that is in
    the list. The document is the image, a line break and the question. A `.npz` is as in `Pairs` (VQA 2.0, GQA; LXMERT,
    arXiv:1908.07490, 3.1).
    """

    kind: Literal["questions"] = "questions"
    name: str

    def files(self, uri: str) -> tuple[str, ...]:
        return (uri,)

    def scan(self, uri: str, opener: Opener = storage.open_file) -> ShardIndex:
        return scan_tar(uri, opener, self._draft)

    def read(self, shard: Shard, chunk: Chunk, limits: Limits = LIMITS) -> Read:
        """Documents of rows `[chunk.start, chunk.stop)`, in order."""
        return read_tar(self.name, shard, chunk, limits, self._draft)

    def _draft(self, files: Files) -> Draft:
        answer = utf8(files["cls"]).strip() if "cls" in files else ""
        if answer and not (answer.isascii() and answer.isdigit() and len(answer) < 10):
            raise SkipSample(Reason.MISSING_FIELD, f"answer {answer[:40]!r} is no number of a list")
        label = int(answer) if answer else None
        return Draft(segments=(_seen(files), Text(text="\n" + _caption(files))), label=label)


@spec
class CaptionList:
    """A list of loose pictures and their captions: csv or tsv with these `columns` in order, or jsonl with them as keys.

    A first line that spells the columns is stepped over. One column is the caption (`caption` or `text`), one the picture's
    path (`filename`, `image` or `path`) below `images`, which is by default the list's own folder (FROMAGe, LLaMA-Adapter).
    A cell cannot hold a line break. Rows that name a `url` instead are refused: img2dataset makes `Pairs` of them.
    """

    kind: Literal["caption_list"] = "caption_list"
    name: str
    columns: tuple[str, ...] = ("caption", "filename")
    images: str = ""

    def files(self, uri: str) -> tuple[str, ...]:
        return (uri,)

    def scan(self, uri: str, opener: Opener = storage.open_file) -> ShardIndex:
        draft = partial(self._draft, folder_of(uri, self.images))
        return scan_rows(uri, opener, draft, columns=self.columns).index()

    def read(self, shard: Shard, chunk: Chunk, limits: Limits = LIMITS) -> Read:
        """Documents of rows `[chunk.start, chunk.stop)`, in order."""
        draft = partial(self._draft, folder_of(shard.uri, self.images))
        return read_rows(self.name, shard, chunk, limits, draft, columns=self.columns)

    def _draft(self, folder: str, row: Row) -> Draft:
        image = _awaited(folder, _first(row, "filename", "image", "path", "url"))
        return Draft(segments=(image, Text(text="\n" + _some(_first(row, "caption", "text")))))


@spec
class Labelled:
    """Pictures with a class: webdataset tars with `key.jpg` and `key.cls`, or a csv, tsv or jsonl of `path,label`.

    A label is a number, or the place of a name in `classes`. The document is the picture; its class is `Document.label`.
    """

    kind: Literal["labelled"] = "labelled"
    name: str
    classes: tuple[str, ...] = ()
    columns: tuple[str, ...] = ("path", "label")
    images: str = ""

    def files(self, uri: str) -> tuple[str, ...]:
        return (uri,)

    def scan(self, uri: str, opener: Opener = storage.open_file) -> ShardIndex:
        if suffix(uri) == "tar":
            return scan_tar(uri, opener, self._in_tar)
        draft = partial(self._in_list, folder_of(uri, self.images))
        return scan_rows(uri, opener, draft, columns=self.columns).index()

    def read(self, shard: Shard, chunk: Chunk, limits: Limits = LIMITS) -> Read:
        """Documents of rows `[chunk.start, chunk.stop)`, in order."""
        if suffix(shard.uri) == "tar":
            return read_tar(self.name, shard, chunk, limits, self._in_tar)
        draft = partial(self._in_list, folder_of(shard.uri, self.images))
        return read_rows(self.name, shard, chunk, limits, draft, columns=self.columns)

    def _in_tar(self, files: Files) -> Draft:
        if "cls" not in files:
            raise SkipSample(Reason.MISSING_FIELD, f"no .cls; the row holds {sorted(files)}")
        return Draft(segments=(Image(data=_picture(files)),), label=self._class(utf8(files["cls"])))

    def _in_list(self, folder: str, row: Row) -> Draft:
        image = _awaited(folder, _first(row, "path", "image", "filename"))
        return Draft(segments=(image,), label=self._class(row.get("label")))

    def _class(self, label: object) -> int:
        name = str(label).strip()
        if name in self.classes:
            return self.classes.index(name)
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            known = (
                f"none of the {len(self.classes)} classes" if self.classes else "no number, and no classes are named"
            )
            raise SkipSample(Reason.MISSING_FIELD, f"label {name[:40]!r} is {known}")
        if self.classes and int(name) >= len(self.classes):
            raise SkipSample(Reason.MISSING_FIELD, f"label {name} of {len(self.classes)} classes")
        return int(name)


@spec
class Interleaved:
    """Web pages in MMC4's layout: `docs_shard_N.jsonl`, whose `image_info` places pictures between sentences.

    A picture's bytes are its `image_base64` where there is one; else the file `image_name` below `folder`, where one is set;
    else the member of that name of the tar `archive`, beside the shard, in whose name `\\1` is the shard's number. Each matched
    sentence follows its image; the first `max_images` are kept, those below `min_similarity` are not, and images after the
    last sentence are dropped (VILA 4.1). `drop_duplicates` leaves out pages that MMC4 marks `could_have_url_duplicate`.
    """

    kind: Literal["interleaved"] = "interleaved"
    name: str
    max_images: int = 6
    min_similarity: float = 0.0
    archive: str | None = r"images_shard_\1.tar"
    folder: str | None = None
    drop_duplicates: bool = False

    def files(self, uri: str) -> tuple[str, ...]:
        archive = self._archive(uri)
        return (uri,) if archive is None else (uri, archive)

    def scan(self, uri: str, opener: Opener = storage.open_file) -> ShardIndex:
        archive = self._archive(uri)
        if archive is None:
            return scan_rows(uri, opener, partial(self._draft, partial(self._loose, uri))).index()
        found = scan_archive(archive, opener)
        places = {name: 2 * place for place, name in enumerate(found.members)}

        def member(name: str) -> File:
            return _member(archive, name, _span(found.spans, places.get(name)))

        tally = scan_rows(uri, opener, partial(self._draft, member), sizes=found.sizes)
        return tally.index(found.members, found.spans)

    def read(self, shard: Shard, chunk: Chunk, limits: Limits = LIMITS) -> Read:
        """Documents of rows `[chunk.start, chunk.stop)`, in order."""
        archive = self._archive(shard.uri)
        if archive is None:
            return read_rows(self.name, shard, chunk, limits, partial(self._draft, partial(self._loose, shard.uri)))
        index = shard.load()

        def member(name: str) -> File:
            return _member(archive, name, index.find(name))

        return read_rows(self.name, shard, chunk, limits, partial(self._draft, member))

    def _draft(self, find: Callable[[str], File], row: Row) -> Draft:
        sentences = row.get("text_list")
        listed = row.get("image_info")
        if not isinstance(sentences, list) or not isinstance(listed, list):
            raise SkipSample(Reason.MISSING_FIELD, "text_list or image_info")
        if not all(isinstance(sentence, str) for sentence in sentences):
            raise SkipSample(Reason.MISSING_FIELD, "text_list holds what is no string")
        if not any(sentence.strip() for sentence in sentences):
            raise SkipSample(Reason.EMPTY)
        if self.drop_duplicates and row.get("could_have_url_duplicate"):
            raise SkipSample(Reason.DUPLICATE, str(row.get("url", ""))[:80])
        before: dict[int, list[Segment]] = {}
        for info in listed[: self.max_images]:
            place = info.get("matched_text_index") if isinstance(info, dict) else None
            if not isinstance(place, int):
                raise SkipSample(Reason.MISSING_FIELD, "matched_text_index")
            if not 0 <= place < len(sentences):
                raise SkipSample(Reason.IMAGE_INDEX, f"matched_text_index {place} of {len(sentences)} sentences")
            likeness = info.get("matched_sim", 1.0)
            if not isinstance(likeness, (int, float)) or likeness >= self.min_similarity:
                before.setdefault(place, []).append(self._image(find, info))
        segments: list[Segment] = []
        text = ""
        for place, sentence in enumerate(sentences):
            if place in before:
                if text:
                    segments.append(Text(text=text))
                segments += before[place]
                text = "\n" + _web(sentence.strip())
            else:
                text += (" " if text else "") + _web(sentence.strip())
        return Draft(segments=(*segments, Text(text=text)))

    def _image(self, find: Callable[[str], File], info: Row) -> Segment:
        if info.get("image_base64"):
            return Image(data=_base64(string(info, "image_base64")))
        name = string(info, "image_name")
        if not safe(name):
            raise SkipSample(Reason.UNSAFE_PATH, name[:80])
        return Awaited(file=find(name), name=name)

    def _loose(self, uri: str, name: str) -> File:
        if self.folder is None:
            raise SkipSample(
                Reason.MISSING_IMAGE, f"{name}: no image_base64, and the corpus names no folder and no archive"
            )
        return File(uri=below(folder_of(uri, self.folder), name))

    def _archive(self, uri: str) -> str | None:
        """The tar beside a shard, where pictures come from one."""
        if self.archive is None or self.folder is not None:
            return None
        number = re.search(r"(\d+)", uri.rpartition("/")[2])
        return folder_of(uri, number.expand(self.archive) if number else self.archive)


def _span(spans: Any, place: int | None) -> tuple[int, int] | None:
    return None if place is None else (spans[place], spans[place + 1])


def _member(archive: str, name: str, span: tuple[int, int] | None) -> File:
    if span is None:
        raise SkipSample(Reason.MISSING_IMAGE, f"{name} is not in {archive}")
    return File(uri=archive, start=span[0], stop=span[0] + span[1])


@spec
class Obelics:
    """Web pages as OBELICS lays them out: parquet with `images` and `texts`, lists of one length of which one is null at each
    place, and `images_bytes`, a list of the same length with the encoded pictures.

    OBELICS itself has addresses only: a row with a picture whose bytes are not there is refused (`REMOTE_IMAGE`).
    Texts follow their pictures after a line break.
    """

    kind: Literal["obelics"] = "obelics"
    name: str

    def files(self, uri: str) -> tuple[str, ...]:
        return (uri,)

    def scan(self, uri: str, opener: Opener = storage.open_file) -> ShardIndex:
        return scan_rows(uri, opener, self._draft, columns=("images", "texts", "images_bytes")).index()

    def read(self, shard: Shard, chunk: Chunk, limits: Limits = LIMITS) -> Read:
        """Documents of rows `[chunk.start, chunk.stop)`, in order."""
        columns = ("images", "texts", "images_bytes")
        return read_rows(self.name, shard, chunk, limits, self._draft, columns=columns)

    def _draft(self, row: Row) -> Draft:
        images, texts = row.get("images"), row.get("texts")
        if not isinstance(images, list) or not isinstance(texts, list):
            raise SkipSample(Reason.MISSING_FIELD, "images or texts")
        bodies = row.get("images_bytes") or [None] * len(images)
        if not len(images) == len(texts) == len(bodies):
            lengths = f"{len(images)} images, {len(texts)} texts, {len(bodies)} images_bytes"
            raise SkipSample(Reason.IMAGE_INDEX, f"{lengths}; expected as many of each")
        segments: list[Segment] = []
        for address, text, body in zip(images, texts, bodies, strict=True):
            if body is not None:
                segments.append(Image(data=body))
            elif address is not None:
                raise SkipSample(
                    Reason.REMOTE_IMAGE,
                    f"{str(address)[:80]}; download the pictures with img2dataset and add them as a column images_bytes",
                )
            elif text is not None and text.strip():
                segments.append(Text(text=("\n" if segments else "") + _web(text.strip())))
        if not segments:
            raise SkipSample(Reason.EMPTY)
        return Draft(segments=tuple(segments))


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
                    segments.append(_awaited(folder, file, role, frames))
                else:
                    segments.append(Text(text=part, role=role, learn=role == "assistant"))
        return Draft(segments=tuple(segments))

    def _slots(self, row: Row, turns: list[tuple[Role, str]]) -> dict[str, Iterator[Media]]:
        """The files that go to each spelling of a slot, in order. Raises SkipSample where they do not match the slots."""
        image = row.get("image") or row.get("images") or []
        video = _names(row.get("video") or [])
        files: dict[str, list[Media]] = {SLOT: []}
        if isinstance(image, dict):
            files.update({slot: [(name, None) for name in _names(names)] for slot, names in image.items()})
        else:
            files[SLOT] += [(name, None) for name in _names(image)]
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
        asked = {"from": "human", "value": f"{VIDEO_SLOT}\n{_web(string(row, 'q'))}"}
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
            return Draft(segments=(Text(text=_some(string(row, "text"), strip=False)),))
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
                user = Text(text=_web(asked), role="user", learn=False)
                return Draft(segments=(user, Text(text=_web(said), role="assistant")))
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
        segments.append(Text(text=_some(better, strip=False), role="assistant"))
        return Draft(segments=tuple(segments), rejected=(Text(text=_some(worse, strip=False), role="assistant"),))

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
            return _awaited(folder, value, "user")
        if value is not None:
            raise SkipSample(Reason.MISSING_FIELD, f"image is {type(value).__name__}; expected a path or bytes")
        return _awaited(folder, string(row, "video"), "user", self.frames) if row.get("video") else None


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
        return [Text(text=_web(text), role=role, learn=False)]
    slot = VIDEO_SLOT if VIDEO_SLOT in text and isinstance(media, Awaited) and media.frames else SLOT
    before, found, after = text.partition(slot)
    if not found:
        before, after = "", "\n" + text
    return [
        *([Text(text=_web(before), role=role, learn=False)] if before else []),
        media,
        *([Text(text=_web(after), role=role, learn=False)] if after else []),
    ]


@spec
class Shares:
    """Boxes as Shikra spells them, in shares of the sides, after the phrase: `a kite[0.123,0.456,0.789,0.987]`; several are
    separated by `;` (arXiv:2306.15195)."""

    kind: Literal["shares"] = "shares"
    digits: int = 3

    def spell(self, phrase: str, boxes: list[Box]) -> str:
        return f"{phrase}[{';'.join(','.join(f'{share:.{self.digits}f}' for share in box) for box in boxes)}]"


@spec
class Thousandths:
    """Boxes as Qwen-VL spells them, in whole thousandths below 1000:
    `<ref>a kite</ref><box>(123,456),(789,987)</box>` (arXiv:2308.12966)."""

    kind: Literal["thousandths"] = "thousandths"

    def spell(self, phrase: str, boxes: list[Box]) -> str:
        def box(corners: Box) -> str:
            x0, y0, x1, y1 = (min(int(share * 1000), 999) for share in corners)
            return f"<box>({x0},{y0}),({x1},{y1})</box>"

        return f"<ref>{phrase}</ref>{''.join(map(box, boxes))}"


@spec
class Patches:
    """Boxes as Kosmos-2 spells them, by the numbers of the corner patches of a `bins` x `bins` grid:
    `<phrase>a kite</phrase><object><patch_index_0044><patch_index_0863></object>` (arXiv:2306.14824)."""

    kind: Literal["patches"] = "patches"
    bins: int = 32

    def spell(self, phrase: str, boxes: list[Box]) -> str:
        def corner(x: float, y: float) -> str:
            column, row = (min(int(share * self.bins), self.bins - 1) for share in (x, y))
            return f"<patch_index_{row * self.bins + column:04d}>"

        spelled = "</delimiter_of_multi_objects/>".join(corner(*box[:2]) + corner(*box[2:]) for box in boxes)
        return f"<phrase>{phrase}</phrase><object>{spelled}</object>"


Box = tuple[float, float, float, float]
Spelling = Annotated[Shares | Thousandths | Patches, Field(discriminator="kind")]


@spec
class Regions:
    """Pictures with boxes and what they show, one jsonl schema to which RefCOCO, Visual Genome and GRIT are easily brought:

        {"image": "a.jpg", "width": 640, "height": 480, "text": "a kite over a lake",
         "regions": [{"box": [10, 20, 300, 200], "phrase": "a kite"}]}

    `image` is a path below `images`; a box is left, top, right, bottom, in pixels where the row has `width` and `height` and
    otherwise in shares of the sides; `phrase` may be called `label`, `text` (or `caption`) may be absent. `boxes` says how a box
    is spelled after its phrase in the text: those of one phrase stand together at its first mention, and a phrase that is
    not in the text gets a line of its own. With None the text stays as it is, and phrases are in `Document.regions` alone.
    """

    kind: Literal["regions"] = "regions"
    name: str
    images: str = ""
    boxes: Spelling | None = Shares()

    def files(self, uri: str) -> tuple[str, ...]:
        return (uri,)

    def scan(self, uri: str, opener: Opener = storage.open_file) -> ShardIndex:
        return scan_rows(uri, opener, partial(self._draft, folder_of(uri, self.images))).index()

    def read(self, shard: Shard, chunk: Chunk, limits: Limits = LIMITS) -> Read:
        """Documents of rows `[chunk.start, chunk.stop)`, in order."""
        return read_rows(self.name, shard, chunk, limits, partial(self._draft, folder_of(shard.uri, self.images)))

    def _draft(self, folder: str, row: Row) -> Draft:
        image = _awaited(folder, string(row, "image"))
        listed = row.get("regions")
        if not isinstance(listed, list):
            raise SkipSample(Reason.MISSING_FIELD, "regions")
        sides = (row["width"], row["height"]) if "width" in row and "height" in row else (1, 1)
        regions = tuple(_region(region, sides) for region in listed)
        caption = row.get("text", row.get("caption")) or ""
        if not isinstance(caption, str):
            raise SkipSample(Reason.MISSING_FIELD, f"text is {type(caption).__name__}")
        text = self._spelled(_web(caption.strip()), regions)
        if not text and not regions:
            raise SkipSample(Reason.EMPTY)
        return Draft(segments=(image, Text(text="\n" + text)) if text else (image,), regions=regions)

    def _spelled(self, text: str, regions: tuple[Region, ...]) -> str:
        if self.boxes is None:
            return text
        phrases: dict[str, list[Box]] = {}
        for region in regions:
            phrases.setdefault(region.label, []).append(region.box)
        places: dict[int, str] = {}
        taken = bytearray(len(text))
        own_lines: list[str] = []
        # The longest phrase takes its place first, so that "dog" is not found inside "dog house".
        for phrase in sorted(phrases, key=len, reverse=True):
            at = next(
                (
                    m.start()
                    for m in re.finditer(re.escape(phrase), text)
                    if phrase and not any(taken[m.start() : m.end()])
                ),
                None,
            )
            if at is None:
                own_lines.append(phrase)
                continue
            places[at] = phrase
            taken[at : at + len(phrase)] = b"\1" * len(phrase)
        spelled, end = "", 0
        for at, phrase in sorted(places.items()):
            spelled += text[end:at] + self.boxes.spell(phrase, phrases[phrase])
            end = at + len(phrase)
        lines = [self.boxes.spell(phrase, phrases[phrase]) for phrase in phrases if phrase in own_lines]
        return "\n".join(filter(None, [spelled + text[end:], *lines]))


def _region(region: object, sides: tuple[Any, Any]) -> Region:
    row = region if isinstance(region, dict) else {}
    box = row.get("box")
    size = f"{sides[0]} x {sides[1]}"
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(n) for n in (*box, *sides)):
        raise SkipSample(Reason.BAD_BOX, f"{str(box)[:80]} of {size}; expected left, top, right, bottom")
    left, top, right, bottom = box
    if not (0 <= left < right <= sides[0] and 0 <= top < bottom <= sides[1]):
        raise SkipSample(Reason.BAD_BOX, f"{str(box)[:80]} is empty, inverted or outside {size}")
    label = row.get("phrase", row.get("label")) or ""
    if not isinstance(label, str):
        raise SkipSample(Reason.MISSING_FIELD, f"phrase is {type(label).__name__}")
    shares = (left / sides[0], top / sides[1], right / sides[0], bottom / sides[1])
    return Region(image=0, box=shares, label=_web(label.strip()))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


@spec
class Videos:
    """Clips with captions: jsonl with `video` and `caption` or `text`, or webdataset tars of `key.mp4` and `key.txt`.

    `video` is a file below `videos` (by default the list's own folder), or a folder of frames: a path that ends in `/` or has
    no suffix. Frames are shown in the order of the numbers in their names.
    """

    kind: Literal["videos"] = "videos"
    name: str
    videos: str = ""
    frames: Frames = Frames()

    def files(self, uri: str) -> tuple[str, ...]:
        return (uri,)

    def scan(self, uri: str, opener: Opener = storage.open_file) -> ShardIndex:
        if suffix(uri) == "tar":
            return scan_tar(uri, opener, self._in_tar)
        return scan_rows(uri, opener, partial(self._in_list, folder_of(uri, self.videos))).index()

    def read(self, shard: Shard, chunk: Chunk, limits: Limits = LIMITS) -> Read:
        """Documents of rows `[chunk.start, chunk.stop)`, in order."""
        if suffix(shard.uri) == "tar":
            return read_tar(self.name, shard, chunk, limits, self._in_tar)
        return read_rows(self.name, shard, chunk, limits, partial(self._in_list, folder_of(shard.uri, self.videos)))

    def _in_tar(self, files: Files) -> Draft:
        data = next((files[ending] for ending in VIDEO_SUFFIXES if ending in files), None)
        if data is None:
            raise SkipSample(Reason.MISSING_IMAGE, f"no video; the row holds {sorted(files)}")
        return Draft(segments=(Video(data=data, frames=self.frames), Text(text="\n" + _caption(files))))

    def _in_list(self, folder: str, row: Row) -> Draft:
        video = _awaited(folder, string(row, "video"), frames=self.frames)
        return Draft(segments=(video, Text(text="\n" + _some(_first(row, "caption", "text")))))


Corpus = Annotated[
    Pairs
    | Questions
    | CaptionList
    | Labelled
    | Interleaved
    | Obelics
    | Conversations
    | TextOnly
    | Preferences
    | Regions
    | Videos,
    Field(discriminator="kind"),
]


def _picture(files: Files) -> bytes:
    image = next((files[ending] for ending in IMAGE_SUFFIXES if ending in files), None)
    if image is None:
        raise SkipSample(Reason.MISSING_IMAGE, f"the row holds {sorted(files)}")
    return image


def _seen(files: Files) -> Image:
    """The picture, or what a detector found in it, or both."""
    objects = files.get("npz")
    return Image(
        data=b"" if objects is not None and not set(files) & set(IMAGE_SUFFIXES) else _picture(files), objects=objects
    )


def _caption(files: Files) -> str:
    if "txt" in files:
        return _some(utf8(files["txt"]))
    if "json" in files:
        return _some(_first(json_object(files["json"]), "caption", "text"))
    raise SkipSample(Reason.MISSING_FIELD, "neither .txt nor .json holds a caption")


def _first(row: Row, *fields: str) -> str:
    """The first of these fields that the row has."""
    return string(row, next((field for field in fields if row.get(field) is not None), fields[0]))


def _some(text: str, strip: bool = True) -> str:
    """Text that is not blank."""
    if not text.strip():
        raise SkipSample(Reason.EMPTY)
    return _web(text.strip() if strip else text)


def _names(value: object) -> list[str]:
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise SkipSample(Reason.MISSING_FIELD, f"image or video is {str(value)[:80]}; expected one path or several")
    return [str(name) for name in names]


def _awaited(folder: str, name: str, role: Role | None = None, frames: Frames | None = None) -> Awaited:
    return Awaited(file=File(uri=below(folder, name)), name=name, role=role, frames=frames)


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode(text.rpartition(",")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise SkipSample(Reason.NOT_AN_IMAGE, f"image_base64: {error}") from error


def _web(text: str) -> str:
    """Text from the web, refused when it spells the slot that an image would fill in other loaders."""
    if SLOT in text:
        raise SkipSample(Reason.LITERAL_IMAGE, text[max(0, text.index(SLOT) - 20) :][:60])
    return text
