"""Web pages, whose pictures stand between texts."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from pipelines import storage
from pipelines.corpora.cells import decoded, web_text
from pipelines.manifest import Shard, ShardIndex
from pipelines.reading import LIMITS, Awaited, Draft, File, Opener, Read, Segment, below, folder_of, safe, string
from pipelines.rows import Row, read_rows, scan_rows
from pipelines.tars import scan_archive
from pipelines.types import Chunk, Image, Limits, Reason, SkipSample, Text, spec


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
                text = "\n" + web_text(sentence.strip())
            else:
                text += (" " if text else "") + web_text(sentence.strip())
        return Draft(segments=(*segments, Text(text=text)))

    def _image(self, find: Callable[[str], File], info: Row) -> Segment:
        if info.get("image_base64"):
            return Image(data=decoded(string(info, "image_base64")))
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
                segments.append(Text(text=("\n" if segments else "") + web_text(text.strip())))
        if not segments:
            raise SkipSample(Reason.EMPTY)
        return Draft(segments=tuple(segments))
