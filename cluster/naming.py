"""Which corpus a word on the command line means: one that a recipe or the site knows by name, or one at an address.

    find_corpus("mmc4-core", site)                                          as a recipe spells it
    find_corpus("s3://bucket/x/{00000..00009}.tar", site)                   its kind guessed from the first row
    find_corpus("notes.csv", site, "caption_list", ["columns=[\\"text\\",\\"path\\"]"])

The answer is the corpus and a site on which its name leads to its shards, so that whatever reads a corpus by its name reads
this one too.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from dataclasses import fields, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from cluster.site import Site, SiteError
from mllm.recipes import RECIPES
from pipelines import storage
from pipelines.corpora import CaptionList, Corpus, Labelled
from pipelines.corpora.cells import VIDEO_SUFFIXES
from pipelines.reading import IMAGE_SUFFIXES, json_object
from pipelines.rows import Tape, json_items, suffix
from pipelines.tars import HEAD, no_tar, split_name, tar_members
from pipelines.types import SkipSample, spec

SHARDS = ("tar", "jsonl", "ndjson", "json", "csv", "tsv", "parquet")
"""Endings of files that hold rows."""


def _kind_of(corpus: type) -> str:
    return str(next(field.default for field in fields(corpus) if field.name == "kind"))


KINDS = tuple(_kind_of(corpus) for corpus in get_args(get_args(Corpus)[0]))
"""What `--kind` may say: the kinds of the union `Corpus`."""


def find_corpus(word: str, site: Site, kind: str | None = None, changes: Iterable[str] = ()) -> tuple[Corpus, Site]:
    """The corpus that `word` means, with `changes` (key=value) to its options, and the site on which it is found.

    A name means what the recipes spell so, or else what lies there on the site; anything else that looks like one is an
    address, `{00..09}` and `*` included. Without `kind` the first row must tell it. Raises SiteError.
    """
    if kind is not None and kind not in KINDS:
        raise SiteError(f"--kind {kind}: no such kind of corpus{_near(kind, KINDS)}; kinds are {', '.join(KINDS)}")
    known = known_corpora()
    if word in known and kind in (None, known[word].kind):
        corpus = _changed(known[word], changes)
        return corpus, site if corpus == known[word] else _apart(site, corpus)
    if word in known or word in site.corpora:
        corpus = _made(word, site.shards(word)[0], kind, changes)
        return corpus, _apart(site, corpus)
    if not _is_address(word):
        if word in RECIPES:
            raise SiteError(f"{word!r} is a recipe; `data stats` and `data preview` take one, the others take a corpus")
        names = [*known, *site.corpora, *RECIPES]
        raise SiteError(
            f"no recipe reads a corpus {word!r}, and the site has none of that name{_near(word, names)}; "
            f"recipes read {', '.join(sorted(known))}. An address is a path or s3://..., such as 'data/{{00000..00009}}.tar'"
        )
    address = word if "://" in word else str(Path(word).expanduser().absolute())
    name = _name(address)
    located = replace(site, corpora=site.corpora | {name: address})
    shards = _shards(located, name, address)
    corpus = _made(name, shards[0], kind, changes)
    return corpus, _apart(located, corpus)


def known_corpora() -> dict[str, Corpus]:
    """Every corpus that a recipe reads, by its name."""
    known: dict[str, Corpus] = {}
    for recipe in (build() for build in RECIPES.values()):
        known |= {source.corpus.name: source.corpus for stage in recipe.stages for source in stage.mixture}
        known |= {corpus.name: corpus for corpus in recipe.held_out}
    return known


def tokenizer_folder(word: str, site: Site) -> str:
    """The tokenizer that `word` means: a recipe's, one under [weights], or a folder. Raises SiteError when there is none."""
    name = RECIPES[word]().model.words.tokenizer if word in RECIPES else word
    if name is None:
        raise SiteError(
            f"--tokenizer {word}: the recipe's model reads no text; name a recipe with a tokenizer, or a folder"
        )
    folder = site.folder(name)
    if not (Path(folder) / "tokenizer.json").is_file():
        raise SiteError(
            f"--tokenizer {word}: {folder} is no folder with a tokenizer.json{_near(word, [*RECIPES, *site.weights])}; "
            "name a recipe, a name under [weights] in the site file, or a folder"
        )
    return folder


def is_recipe(word: str) -> bool:
    """Whether a word means a recipe: its name, or a JSON file that holds an object as `dump` writes it, and no list of rows."""
    if word in RECIPES:
        return True
    file = Path(word)
    return suffix(word) == "json" and "://" not in word and file.is_file() and _begins_object(file)


def _begins_object(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(256).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")


def _is_address(word: str) -> bool:
    return "/" in word or any(sign in word for sign in "*{") or suffix(word) in SHARDS


def _name(address: str) -> str:
    """A corpus's name from its address: that of its file, or of its folder where the file's is a pattern or a number."""
    folder, _, file = address.rpartition("/")
    stem = file.partition(".")[0]
    named = stem if re.search(r"[A-Za-z]", stem) and not re.search(r"[{*?]", file) else folder.rpartition("/")[2]
    return re.sub(r"[^\w.-]+", "-", named).strip("-.") or "corpus"


def _shards(site: Site, name: str, address: str) -> list[str]:
    """Addresses of the shards. Raises SiteError, for a folder with the pattern that would name its files."""
    if address.endswith("/") or ("://" not in address and Path(address).is_dir()):
        folder = address.rstrip("/")
        endings = Counter(suffix(file) for file in storage.glob(f"{folder}/*") if suffix(file) in SHARDS)
        found = ", ".join(f"'{folder}/*.{ending}' ({count})" for ending, count in endings.most_common())
        raise SiteError(f"{address} is a folder; name its shards: {found or 'it holds none that this project reads'}")
    shards = site.shards(name)
    try:
        storage.stat(shards[0])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SiteError(f"no file {shards[0]}; check the address") from error
    return shards


def _apart(site: Site, corpus: Corpus) -> Site:
    """The site with a cache of this corpus's own: an index depends on the corpus's options, and names may be the same."""
    words = json.dumps([site.corpora.get(corpus.name), _adapter().dump_python(corpus, mode="json")])
    return replace(site, cache=f"{site.cache}/named/{hashlib.sha256(words.encode()).hexdigest()[:12]}")


# --- options ----------------------------------------------------------------------------------------------------------


@cache
def _adapter() -> TypeAdapter[Corpus]:
    return TypeAdapter(Corpus)


def _made(name: str, uri: str, kind: str | None, changes: Iterable[str]) -> Corpus:
    changes = list(changes)
    options: dict[str, Any] = {}
    if kind is None or kind in ("caption_list", "labelled", "interleaved"):  # of which the row tells more than the kind
        guess = guess_kind(uri)
        kind = kind or guess.certain(uri)
        options = guess.options if kind in guess.kinds else {}
    made = _valid({"kind": kind, "name": name, **options}, kind)
    return _changed(made, changes)


def _changed(corpus: Corpus, changes: Iterable[str]) -> Corpus:
    """The corpus with `key=value` changes; values are JSON or plain words. Raises SiteError naming the options there are."""
    words: dict[str, Any] = _adapter().dump_python(corpus, mode="json")
    options = [name for name in words if name not in ("kind", "name")]
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise SiteError(f"-s {change}: write key=value, as in -s max_images=4")
        *path, last = key.strip().split(".")
        node: Any = words
        for step in path:
            node = node.get(step) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node or (not path and last not in options):
            there = f"options are {', '.join(options)}" if options else "it has no options"
            raise SiteError(f"-s {key}: a corpus of kind {corpus.kind!r} has no {key!r}{_near(key, options)}; {there}")
        node[last] = _parsed(value)
    return _valid(words, corpus.kind)


def _valid(words: dict[str, Any], kind: str) -> Corpus:
    try:
        return _adapter().validate_json(json.dumps(words))
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(str(step) for step in fault['loc'] if step != kind)}: {fault['msg'].removeprefix('Value error, ')} "
            f"(found {fault['input']!r})"
            for fault in error.errors()
        )
        raise SiteError(f"corpus of kind {kind!r}: {faults}") from error


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _near(word: str, names: Iterable[str]) -> str:
    near = get_close_matches(word, list(names), 1)
    return f", did you mean {near[0]!r}?" if near else ""


# --- guessing ---------------------------------------------------------------------------------------------------------


@spec
class Guess:
    """Which kinds a shard's first row fits, what it holds, and the columns that a table's first line spells."""

    kinds: tuple[str, ...]
    found: str
    columns: tuple[str, ...] = ()
    inline: bool = False
    """Pages whose pictures are in the row itself, so that no archive lies beside them."""

    @property
    def options(self) -> dict[str, Any]:
        """Options of a corpus that the row tells."""
        return {"columns": self.columns} if self.columns else {"archive": None} if self.inline else {}

    def certain(self, uri: str) -> str:
        """The one kind that fits. Raises SiteError when there is none or another."""
        if len(self.kinds) == 1:
            return self.kinds[0]
        *first, last = self.kinds or ("",)
        fit = f"which {', '.join(first)} and {last} fit" if first else "which no kind fits at once"
        raise SiteError(
            f"{uri}: its first row holds {self.found}, {fit}; say --kind, one of {', '.join(self.kinds or KINDS)}"
        )


def guess_kind(uri: str) -> Guess:
    """What the first row of a shard tells. Raises ValueError when the file is not what its ending says."""
    match suffix(uri):
        case "tar":
            return _of_files(_first_files(uri))
        case "csv" | "tsv":
            return _of_table(uri)
        case "jsonl" | "ndjson" | "json" | "parquet":
            return _of_row(_first_row(uri))
        case other:
            raise SiteError(f"{uri}: rows lie in .{', .'.join(SHARDS)}, not in .{other}")


def _of_files(files: Mapping[str, bytes]) -> Guess:
    kinds = []
    image = any(ending in files for ending in IMAGE_SUFFIXES)
    caption = "txt" in files or bool({"caption", "text"} & set(_keys(files.get("json", b"{}"))))
    if caption and any(ending in files for ending in VIDEO_SUFFIXES):
        kinds.append("videos")
    if (image or "npz" in files) and caption:
        kinds.append("pairs")
    if image and "cls" in files:
        kinds.append("labelled")
    if (image or "npz" in files) and {"txt", "cls"} <= files.keys():
        kinds.append("questions")
    return Guess(kinds=tuple(kinds), found=", ".join(f".{ending}" for ending in sorted(files)) or "no file")


def _keys(data: bytes) -> list[str]:
    try:
        return list(json_object(data))
    except SkipSample:
        return []


def _of_table(uri: str) -> Guess:
    line = _first_line(uri).decode("utf-8-sig", "replace").strip("\r\n")
    cells = line.split("\t") if suffix(uri) == "tsv" else next(csv.reader([line]), [])
    columns = tuple(cell.strip().lower() for cell in cells)
    found = f"the cells {', '.join(repr(cell[:24]) for cell in cells[:6])}"
    picture = {"path", "image", "filename"} & set(columns)
    kinds = []
    if picture and {"caption", "text"} & set(columns):
        kinds.append(CaptionList(name="").kind)
    if picture and "label" in columns:
        kinds.append(Labelled(name="").kind)
    if kinds:
        return Guess(kinds=tuple(kinds), found=found, columns=columns)
    return Guess(kinds=("caption_list", "labelled"), found=f"{found}, no line of column names")


UNMISTAKABLE: tuple[tuple[str, frozenset[str]], ...] = (
    ("interleaved", frozenset({"text_list", "image_info"})),
    ("preferences", frozenset({"chosen", "rejected"})),
    ("regions", frozenset({"image", "regions"})),
    ("conversations", frozenset({"conversations"})),
    ("conversations", frozenset({"messages"})),
    ("conversations", frozenset({"video_id", "q", "a"})),
)
"""Fields that only one format has."""


def _of_row(row: Mapping[str, Any]) -> Guess:
    keys = set(row)
    found = f"the fields {', '.join(sorted(keys)[:12])}" if keys else "no field"
    for kind, needed in UNMISTAKABLE:
        if needed <= keys:
            return Guess(kinds=(kind,), found=found, inline=kind == "interleaved" and _inline(row["image_info"]))
    if isinstance(row.get("images"), list) and isinstance(row.get("texts"), list):
        return Guess(kinds=("obelics",), found=found)
    if isinstance(row.get("text"), str) and {"chosen", "rejected"} <= set(_keys(row["text"].encode())):
        return Guess(kinds=("preferences",), found=found)  # RLHF-V keeps all three as JSON in one field
    said = {"caption", "text"} & keys
    picture = {"image", "filename", "path"} & keys
    fits: dict[str, bool] = {
        "videos": "video" in keys and bool(said),
        "caption_list": bool(picture and said),
        "labelled": bool(picture) and "label" in keys,
        "text": not picture
        and "video" not in keys
        and any(needed <= keys for needed in ({"text"}, {"inputs", "targets"}, {"instruction", "output"}, QUESTION)),
    }
    return Guess(kinds=tuple(kind for kind, fit in fits.items() if fit), found=found)


QUESTION = {"question", "answer"}


def _inline(listed: object) -> bool:
    return isinstance(listed, list) and any(isinstance(info, dict) and info.get("image_base64") for info in listed)


def _first_files(uri: str) -> dict[str, bytes]:
    """The files of a tar's first row, each up to its head."""
    files: dict[str, bytes] = {}
    key: str | None = None
    with closing(storage.open_file(uri)) as file:
        tape = Tape(file)
        for member in tar_members(tape):
            if member.kind == "broken" and not member.start:
                raise no_tar(uri)
            stem, ending = split_name(member.name)
            if member.kind != "file" or not ending or stem.endswith("_stats"):
                continue
            key = stem if key is None else key
            if stem != key:
                break
            files[ending] = tape.take(min(member.size, HEAD))
    return files


def _first_row(uri: str) -> Mapping[str, Any]:
    """The first row of a file of lines, a JSON list or a parquet file; empty where it is no row."""
    if suffix(uri) == "parquet":
        return _first_of_parquet(uri)
    read: Callable[[str], bytes] = _first_item if suffix(uri) == "json" else _first_line
    try:
        return json_object(read(uri))
    except SkipSample:
        return {}


def _first_line(uri: str) -> bytes:
    with closing(storage.open_file(uri)) as file:
        for _ in range(100):
            line = file.readline(16 * HEAD)
            if line.strip() or not line:
                return line
    return b""


def _first_item(uri: str) -> bytes:
    with closing(storage.open_file(uri)) as file:
        for _, _, data in json_items(uri, Tape(file)):
            return data or b""
    return b""


def _first_of_parquet(uri: str) -> Mapping[str, Any]:
    import pyarrow.parquet

    with closing(storage.open_file(uri)) as file:
        try:
            batches = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=storage.BLOCK).iter_batches(1)
            return next((batch.to_pylist()[0] for batch in batches if len(batch)), {})
        except pyarrow.ArrowException as error:
            raise ValueError(f"{uri}: not a parquet file, or cut off: {error}") from error
