"""Corpora as the field publishes them. Each is a frozen value that can scan a shard and read rows of it.

To add a format: a class with `scan` and `read`, and its name in `Corpus`. A row that cannot be used is yielded as a
`Rejected` with its reason; only storage errors are raised.
"""

from __future__ import annotations

import io
import json
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import IO, Annotated, Any, Literal

import fsspec
import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from pipelines.manifest import Shard, ShardIndex
from pipelines.types import Chunk, Document, Image, Reason, Rejected, Role, RowId, SkipSample, Text, spec

SLOT = "<image>"
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")

Read = Iterator[Document | Rejected]


@spec
class Pairs:
    """Image-caption pairs in webdataset tars as img2dataset writes them: `key.jpg`, `key.txt`, `key.json` (COYO, LAION, CC).

    The document is the image, a line break and the caption, all of whose tokens are learned (VILA 4.1; LLaVA `plain`).
    """

    kind: Literal["pairs"] = "pairs"
    name: str

    def scan(self, uri: str) -> ShardIndex:
        starts: list[int] = []
        key = None
        end = 0
        with _open(uri) as file, _open_tar(file) as archive:
            for member in _members(archive):
                stem, suffix = _split_name(member.name)
                if not member.isfile() or not _is_sample_member(stem, suffix):
                    continue
                if stem != key:
                    starts.append(member.offset)
                    key = stem
                end = member.offset_data + -(-member.size // 512) * 512
        return ShardIndex(starts=np.array([*starts, end] if starts else [0], np.int64))

    def read(self, shard: Shard, chunk: Chunk) -> Read:
        """Documents of rows `[chunk.start, chunk.stop)`, in order."""
        yield from _rows(self.name, shard, chunk, lambda data, _: self._document(data))

    def _document(self, data: bytes) -> tuple[Text | Image, ...]:
        files: dict[str, bytes] = {}
        with _open_tar(io.BytesIO(data)) as archive:
            for member in _members(archive):
                if member.isfile():
                    body = archive.extractfile(member)
                    try:
                        content = body.read() if body else b""
                    except tarfile.ReadError as error:
                        raise SkipSample(Reason.TRUNCATED_SHARD, member.name) from error
                    files[_split_name(member.name)[1]] = content
        image = next((files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files), None)
        if image is None:
            raise SkipSample(Reason.MISSING_IMAGE, f"the row holds {sorted(files)}")
        if "txt" in files:
            caption = _utf8(files["txt"]).strip()
        elif "json" in files:
            caption = _string(_json(files["json"]), "caption").strip()
        else:
            raise SkipSample(Reason.MISSING_FIELD, "neither .txt nor .json holds a caption")
        if not caption:
            raise SkipSample(Reason.EMPTY)
        return Image(data=image), Text(text="\n" + _web(caption))


@spec
class Interleaved:
    """Web pages in MMC4's layout: `docs_shard_N.jsonl`, and the images by name in a tar beside it.

    `archive` gives the tar's address: `\\1` is the shard's number. Each matched sentence follows its image; the first
    `max_images` are kept, those below `min_similarity` are not, and images after the last sentence are dropped (VILA 4.1).
    """

    kind: Literal["interleaved"] = "interleaved"
    name: str
    max_images: int = 6
    min_similarity: float = 0.0
    archive: str = r"images_shard_\1.tar"

    def scan(self, uri: str) -> ShardIndex:
        members: list[str] = []
        spans: list[tuple[int, int]] = []
        with _open(self._archive(uri)) as file, _open_tar(file) as archive:
            for member in _members(archive):
                members.append(member.name)
                spans.append((member.offset_data, member.size))
        return ShardIndex(
            starts=_line_starts(uri), members=tuple(members), spans=np.array(spans, np.int64).reshape(-1, 2)
        )

    def read(self, shard: Shard, chunk: Chunk) -> Read:
        """Documents of rows `[chunk.start, chunk.stop)`, in order."""
        index = shard.load()
        with _open(self._archive(shard.uri)) as archive:

            def image(name: str) -> Image:
                span = index.find(name)
                if span is None:
                    raise SkipSample(Reason.MISSING_IMAGE, f"{name} is not in {self._archive(shard.uri)}")
                archive.seek(span[0])
                data = archive.read(span[1])
                if len(data) < span[1]:
                    raise SkipSample(Reason.TRUNCATED_IMAGE, f"{name}: the archive ends inside it")
                return Image(data=data)

            yield from _rows(self.name, shard, chunk, lambda data, _: self._document(data, image))

    def _document(self, line: bytes, image: Callable[[str], Image]) -> tuple[Text | Image, ...]:
        row = _json(line)
        sentences = row.get("text_list")
        listed = row.get("image_info")
        if not isinstance(sentences, list) or not isinstance(listed, list):
            raise SkipSample(Reason.MISSING_FIELD, "text_list or image_info")
        if not any(isinstance(sentence, str) and sentence.strip() for sentence in sentences):
            raise SkipSample(Reason.EMPTY)
        before: dict[int, list[str]] = {}
        for info in listed[: self.max_images]:
            place = info.get("matched_text_index") if isinstance(info, dict) else None
            if not isinstance(place, int) or not isinstance(info.get("image_name"), str):
                raise SkipSample(Reason.MISSING_FIELD, "image_name or matched_text_index")
            if not 0 <= place < len(sentences):
                raise SkipSample(Reason.IMAGE_INDEX, f"matched_text_index {place} of {len(sentences)} sentences")
            if info.get("matched_sim", 1.0) >= self.min_similarity:
                before.setdefault(place, []).append(info["image_name"])
        segments: list[Text | Image] = []
        text = ""
        for place, sentence in enumerate(sentences):
            if place in before:
                if text:
                    segments.append(Text(text=text))
                segments += [image(name) for name in before[place]]
                text = "\n" + _web(str(sentence).strip())
            else:
                text += (" " if text else "") + _web(str(sentence).strip())
        return *segments, Text(text=text)

    def _archive(self, uri: str) -> str:
        folder, file = uri.rsplit("/", 1) if "/" in uri else (".", uri)
        number = re.search(r"(\d+)", file)
        return f"{folder}/{number.expand(self.archive) if number else self.archive}"


@spec
class Conversations:
    """Instructions as LLaVA writes them: one JSON list (or jsonl) of `image`, `conversations[{from, value}]`.

    `image` is a path relative to the file's folder, or several. `<image>` marks the slots; only answers are learned.
    """

    kind: Literal["conversations"] = "conversations"
    name: str

    def scan(self, uri: str) -> ShardIndex:
        return ShardIndex(starts=_line_starts(uri) if uri.endswith(".jsonl") else _item_starts(uri))

    def read(self, shard: Shard, chunk: Chunk) -> Read:
        """Documents of rows `[chunk.start, chunk.stop)`, in order."""
        filesystem, path = fsspec.core.url_to_fs(shard.uri)
        root = posixpath.dirname(path)

        def image(name: str) -> bytes:
            try:
                return filesystem.cat_file(posixpath.join(root, name))
            except (FileNotFoundError, IsADirectoryError) as error:
                raise SkipSample(Reason.MISSING_IMAGE, name) from error

        yield from _rows(self.name, shard, chunk, lambda data, _: self._document(data, image))

    def _document(self, item: bytes, image: Callable[[str], bytes]) -> tuple[Text | Image, ...]:
        row = _json(item.strip().rstrip(b","))
        turns = row.get("conversations")
        if not isinstance(turns, list) or not turns:
            raise SkipSample(Reason.MISSING_FIELD, "conversations")
        names = row.get("image") or []
        names = [names] if isinstance(names, str) else list(names)
        slots = sum(_string(turn, "value").count(SLOT) for turn in turns)
        if slots != len(names):
            raise SkipSample(Reason.IMAGE_INDEX, f"{slots} <image> slots and {len(names)} images")
        waiting = iter(names)
        segments: list[Text | Image] = []
        for turn in turns:
            role = self._role(turn)
            for number, text in enumerate(_string(turn, "value").split(SLOT)):
                if number:
                    segments.append(Image(data=image(next(waiting)), role=role))
                if text:
                    segments.append(Text(text=text, role=role, learn=role == "assistant"))
        return tuple(segments)

    def _role(self, turn: dict[str, Any]) -> Role:
        roles: dict[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
        role = roles.get(_string(turn, "from"))
        if role is None:
            raise SkipSample(Reason.MISSING_FIELD, f"from is {turn['from']!r}, not human or gpt")
        return role


@spec
class TextOnly:
    """Text without images, jsonl. The fields tell the form: `text` alone, or a question and an answer as
    `inputs/targets` (FLAN), `instruction/input/output` (Alpaca, self-instruct) or `question/answer`."""

    kind: Literal["text"] = "text"
    name: str

    def scan(self, uri: str) -> ShardIndex:
        return ShardIndex(starts=_line_starts(uri))

    def read(self, shard: Shard, chunk: Chunk) -> Read:
        """Documents of rows `[chunk.start, chunk.stop)`, in order."""
        yield from _rows(self.name, shard, chunk, lambda data, _: self._document(data))

    def _document(self, line: bytes) -> tuple[Text | Image, ...]:
        row = _json(line)
        if "text" in row:
            return (Text(text=_web(_string(row, "text"))),)
        for question, context, answer in (
            ("inputs", "", "targets"),
            ("instruction", "input", "output"),
            ("question", "", "answer"),
        ):
            if question in row:
                asked = "\n".join(
                    filter(None, [_string(row, question), _string(row, context) if context in row else ""])
                )
                said = _string(row, answer)
                if not said.strip():
                    raise SkipSample(Reason.EMPTY, f"{answer} is empty")
                user = Text(text=_web(asked), role="user", learn=False)
                return user, Text(text=_web(said), role="assistant")
        raise SkipSample(Reason.MISSING_FIELD, f"found {sorted(row)}; expected text, inputs, instruction or question")


Corpus = Annotated[Pairs | Interleaved | Conversations | TextOnly, Field(discriminator="kind")]


def _rows(
    corpus: str, shard: Shard, chunk: Chunk, document: Callable[[bytes, RowId], tuple[Text | Image, ...]]
) -> Read:
    """Read the chunk's bytes at once and turn each row into a document or a rejection."""
    starts = shard.load().starts
    offset, end = int(starts[chunk.start]), int(starts[chunk.stop])
    filesystem, path = fsspec.core.url_to_fs(shard.uri)
    data: bytes = filesystem.cat_file(path, start=offset, end=end)
    for row in range(chunk.start, chunk.stop):
        at = RowId(corpus=corpus, shard=shard.name, epoch=chunk.epoch, row=row)
        try:
            segments = document(data[starts[row] - offset : starts[row + 1] - offset], at)
        except SkipSample as skip:
            yield Rejected(row=at, reason=skip.reason, detail=skip.detail)
        else:
            yield Document(id=at, source=chunk.source, segments=segments)


def _open(uri: str) -> IO[bytes]:
    filesystem, path = fsspec.core.url_to_fs(uri)
    return filesystem.open(path, "rb")


def _open_tar(file: IO[bytes]) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode="r:")


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Members up to the end, or up to where a truncated archive breaks off."""
    while True:
        try:
            member = archive.next()
        except (tarfile.ReadError, EOFError):
            return
        if member is None:
            return
        yield member
        archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every member it has seen, for ever


def _split_name(name: str) -> tuple[str, str]:
    """webdataset's rule: the key ends at the first dot of the file's name, the rest is the suffix."""
    folder, _, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}/{stem}", suffix.lower()


def _is_sample_member(stem: str, suffix: str) -> bool:
    return bool(suffix) and not stem.endswith("_stats")


def _line_starts(uri: str) -> NDArray[np.int64]:
    starts = [0]
    with _open(uri) as file:
        for line in file:
            starts.append(starts[-1] + len(line))
    return np.array(starts, np.int64)


def _item_starts(uri: str) -> NDArray[np.int64]:
    """Where each item of a JSON list begins, in bytes. Raises ValueError when the file is no such list."""
    with _open(uri) as file:
        text = file.read().decode("utf-8", errors="surrogateescape")
    decoder = json.JSONDecoder()
    at = re.compile(r"\s*\[\s*").match(text)
    if at is None:
        raise ValueError(f"{uri}: expected a JSON list of conversations, found {text[:40]!r}")
    starts: list[int] = []
    place, byte = at.end(), len(text[: at.end()].encode("utf-8", errors="surrogateescape"))
    between = re.compile(r"\s*,?\s*")
    while place < len(text) and text[place] != "]":
        starts.append(byte)
        try:
            _, end = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise ValueError(f"{uri}: item {len(starts) - 1} is not valid JSON: {error}") from error
        gap = between.match(text, end)
        following = gap.end() if gap else end
        byte += len(text[place:following].encode("utf-8", errors="surrogateescape"))
        place = following
    return np.array([*starts, byte], np.int64)


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SkipSample(Reason.BAD_UTF8, str(error)) from error


def _json(data: bytes) -> dict[str, Any]:
    text = _utf8(data)
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise SkipSample(Reason.BAD_JSON, str(error)) from error
    if not isinstance(row, dict):
        raise SkipSample(Reason.BAD_JSON, f"expected an object, found {type(row).__name__}")
    return row


def _string(row: Any, field: str) -> str:
    value = row.get(field) if isinstance(row, dict) else None
    if not isinstance(value, str):
        raise SkipSample(Reason.MISSING_FIELD, f"{field} is {'absent' if value is None else type(value).__name__}")
    return value


def _web(text: str) -> str:
    """Text from the web, refused when it spells the slot that an image would fill in other loaders."""
    if SLOT in text:
        raise SkipSample(Reason.LITERAL_IMAGE, text[max(0, text.index(SLOT) - 20) :][:60])
    return text
