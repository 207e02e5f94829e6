"""Pictures with a caption, a question or a class."""

from __future__ import annotations

from functools import partial
from typing import Literal

from pipelines import storage
from pipelines.corpora.cells import awaited, caption_of, first_of, image_of, picture_of, some_text
from pipelines.manifest import Shard, ShardIndex
from pipelines.reading import LIMITS, Draft, Opener, Read, folder_of, utf8
from pipelines.rows import Row, read_rows, scan_rows, suffix
from pipelines.tars import Files, read_tar, scan_tar
from pipelines.types import Chunk, Image, Limits, Reason, SkipSample, Text, spec


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
        return Draft(segments=(image_of(files), Text(text="\n" + caption_of(files))))


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
        return Draft(segments=(image_of(files), Text(text="\n" + caption_of(files))), label=label)


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
        image = awaited(folder, first_of(row, "filename", "image", "path", "url"))
        return Draft(segments=(image, Text(text="\n" + some_text(first_of(row, "caption", "text")))))


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
        return Draft(segments=(Image(data=picture_of(files)),), label=self._class(utf8(files["cls"])))

    def _in_list(self, folder: str, row: Row) -> Draft:
        image = awaited(folder, first_of(row, "path", "image", "filename"))
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
