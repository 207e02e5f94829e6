"""Pages of one's own as a corpus: HTML and Markdown with local pictures, brought to MMC4's layout for `Interleaved`.

    convert("manual/", "corpus/")                        every page below a folder
    convert(["a.html", "b.md"], "s3://bucket/corpus")    these pages

writes `docs_shard_N_v3.jsonl`, one page a line, and `images_shard_N.tar` beside it with the pictures of those pages.

What it says of likeness is position, not meaning: no CLIP has seen these pictures. `matched_text_index` is the sentence that
follows the picture on the page (the last one, where none follows), `matched_sim` is 1.0, and `similarity_matrix` is 1.0 there
and 0.0 elsewhere. Each line says so itself: `"similarity": "position"`. A threshold on it selects nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
import re
import tarfile
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from typing import Any
from urllib.parse import unquote

from markdown_it import MarkdownIt

from pipelines import storage
from pipelines.reading import IMAGE_SUFFIXES
from pipelines.rows import picture_size
from pipelines.types import Limits, spec

HTML_SUFFIXES = ("html", "htm", "xhtml")
MARKDOWN_SUFFIXES = ("md", "markdown")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


DROPPED = _words("script style nav header footer noscript template svg form head button")
"""Elements that hold no text of the page, with all that is in them."""

BLOCKS = _words(
    "address article aside blockquote br caption dd details div dl dt fieldset figcaption figure h1 h2 h3 h4 h5 h6 hr li main "
    "ol p pre section summary table tbody td th thead tr ul"
)
"""Elements that end a sentence where they begin and where they end."""

VOID = _words("area base br col embed hr img input link meta param source track wbr")
ABBREVIATIONS = _words("e.g. i.e. etc. cf. vs. fig. figs. eq. no. nos. vol. pp. dr. mr. mrs. ms. prof. st. approx.")

PLACE = "\ufffc"
"""Unicode's stand-in for an object within text: marks where an image is until sentences are known."""


@spec
class Converted:
    """What a conversion did, in counts. `remote`, `missing` and `unreadable` pictures were left out, as were `empty` pages."""

    shards: int
    pages: int
    sentences: int
    images: int
    empty: int
    remote: int
    missing: int
    unreadable: int


def convert(pages: str | Iterable[str], out: str, rows_per_shard: int = 1000) -> Converted:
    """Write the pages of a folder, or these pages, to folder `out` in MMC4's layout; the same pages give the same bytes.

    Pages are taken in the order of their addresses. Pictures are found relative to their page. Memory holds one shard.
    Raises ValueError when there is no page, or one is neither HTML nor Markdown; FileNotFoundError when one is not there.
    """
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard is {rows_per_shard}; a shard holds at least one page")
    addresses = _pages_below(pages) if isinstance(pages, str) else sorted(set(pages))
    if not addresses:
        raise ValueError(
            f"no page to convert in {pages!r}; expected .{', .'.join((*HTML_SUFFIXES, *MARKDOWN_SUFFIXES))}"
        )
    counts = dict.fromkeys(Converted.__dataclass_fields__, 0)
    shard = _Shard()
    for address in addresses:
        row = _row(address, shard, counts)
        if row is None:
            counts["empty"] += 1
            continue
        shard.rows.append(row)
        if len(shard.rows) == rows_per_shard:
            shard = _written(shard, out, counts)
    if shard.rows:
        _written(shard, out, counts)
    return Converted(**counts)


def _pages_below(folder: str) -> list[str]:
    found = storage.glob(f"{folder.rstrip('/')}/**")
    return sorted(uri for uri in found if _suffix(uri) in (*HTML_SUFFIXES, *MARKDOWN_SUFFIXES))


def _suffix(uri: str) -> str:
    return uri.rpartition("/")[2].rpartition(".")[2].lower()


class _Shard:
    """Rows, and the pictures of all of them by name; a picture that two pages show is kept once."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.pictures: dict[str, bytes] = {}


def _written(shard: _Shard, out: str, counts: dict[str, int]) -> _Shard:
    number = counts["shards"]
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in sorted(shard.pictures.items()):
            member = tarfile.TarInfo(name)  # its time, owner and group are zero: the same pages give the same bytes
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in shard.rows)
    storage.write(posixpath.join(out, f"images_shard_{number}.tar"), body.getvalue())
    storage.write(posixpath.join(out, f"docs_shard_{number}_v3.jsonl"), lines.encode("utf-8", "replace"))
    counts["shards"] += 1
    counts["pages"] += len(shard.rows)
    return _Shard()


def _row(address: str, shard: _Shard, counts: dict[str, int]) -> dict[str, Any] | None:
    """One page as a line of MMC4, or None where it has no text. Its pictures go to the shard."""
    page = _Page()
    page.feed(_html(address))
    page.close()
    page.end_block()
    sentences = page.sentences
    if not sentences:
        return None
    matched: list[dict[str, Any]] = []
    bodies = _pictures(address, [source for source, _, _ in page.images], counts)
    for (source, alt, place), found in zip(page.images, bodies, strict=True):
        if found is None:
            continue
        name, data = found
        shard.pictures[name] = data
        place = min(place, len(sentences) - 1)
        matched.append(
            {"image_name": name, "raw_url": source, "matched_text_index": place, "matched_sim": 1.0, "alt": alt}
        )
    counts["sentences"] += len(sentences)
    counts["images"] += len(matched)
    return {
        "url": address,
        "text_list": sentences,
        "image_info": matched,
        "similarity_matrix": [
            [float(at == info["matched_text_index"]) for at in range(len(sentences))] for info in matched
        ],
        "could_have_url_duplicate": 0,
        "similarity": "position",
    }


def _html(address: str) -> str:
    if _suffix(address) not in (*HTML_SUFFIXES, *MARKDOWN_SUFFIXES):
        raise ValueError(f"{address}: expected a page ending in .{', .'.join((*HTML_SUFFIXES, *MARKDOWN_SUFFIXES))}")
    text = storage.read(address).decode("utf-8-sig", "replace").replace("\r\n", "\n")
    if _suffix(address) in HTML_SUFFIXES:
        return text
    text = re.sub(r"\A---\n.*?\n(---|\.\.\.)\n", "", text, count=1, flags=re.DOTALL)  # front matter of site generators
    return str(MarkdownIt("commonmark").enable("table").render(text))


def _pictures(address: str, sources: list[str], counts: dict[str, int]) -> list[tuple[str, bytes] | None]:
    """Name and bytes of each picture of a page, None where it is remote, missing or no picture that can be read."""
    folder = address.rpartition("/")[0]
    local: dict[str, str] = {}
    for source in sources:
        path = unquote(source.partition("#")[0].partition("?")[0])
        if re.match(r"([a-zA-Z][a-zA-Z0-9+.-]*:|//)", source):
            counts["remote"] += 1
        elif not path or "\0" in path or any(len(part.encode()) > 255 for part in path.split("/")):
            counts["missing"] += 1
        else:
            local[source] = (
                posixpath.normpath(posixpath.join(folder, path)) if "://" not in folder else _join(folder, path)
            )
    most = Limits().bytes
    found = dict(zip(local, storage.read_many([(uri, 0, most + 1) for uri in local.values()]), strict=True))
    named: list[tuple[str, bytes] | None] = []
    for source in sources:
        data = found.get(source)
        if source not in local or data is None:
            counts["missing"] += source in local
            named.append(None)
        elif len(data) > most or _suffix(local[source]) not in IMAGE_SUFFIXES or picture_size(data) is None:
            counts["unreadable"] += 1
            named.append(None)
        else:
            named.append((f"{hashlib.sha256(data).hexdigest()[:20]}.{_suffix(local[source])}", data))
    return named


def _join(folder: str, path: str) -> str:
    """`path` seen from a folder of an object store, which knows no `..` of its own."""
    scheme, _, place = folder.partition("://")
    return f"{scheme}://{posixpath.normpath(posixpath.join(place, path)).lstrip('/')}"


class _Page(HTMLParser):
    """Sentences of a page in reading order, and its images: address, description, and the number of the sentence that holds
    or follows it."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.sentences: list[str] = []
        self.images: list[tuple[str, str, int]] = []
        self.text: list[str] = []
        self.waiting: list[tuple[str, str]] = []  # images of the block that is being read
        self.preformatted = 0
        self.dropped = ""
        self.depth = 0  # of elements like the dropped one inside it

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if self.dropped:
            self.depth += tag == self.dropped
            return
        if tag not in VOID and (
            tag in DROPPED or given.get("role") == "navigation" or "headerlink" in given.get("class", "")
        ):
            self.end_block()
            self.dropped, self.depth = tag, 1
        elif tag == "img":
            if given.get("src", "").strip():
                self.waiting.append((given["src"].strip(), given.get("alt", "").strip()))
                self.text.append(PLACE)
        elif tag in BLOCKS:
            self.end_block()
            self.preformatted += tag == "pre"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """`<img/>` opens nothing, and neither does `<nav/>` in XHTML."""
        if tag in VOID:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if self.dropped:
            self.depth -= tag == self.dropped
            self.dropped = self.dropped if self.depth else ""
        elif tag in BLOCKS:
            self.end_block()
            self.preformatted = max(self.preformatted - (tag == "pre"), 0)

    def handle_data(self, data: str) -> None:
        if not self.dropped:
            self.text.append(data.replace(PLACE, ""))

    def end_block(self) -> None:
        text = "".join(self.text)
        self.text.clear()
        sentences = [text.strip("\n").rstrip()] if self.preformatted else list(split_sentences(text))
        for sentence in sentences:
            for _ in range(sentence.count(PLACE)):
                source, alt = self.waiting.pop(0)
                self.images.append((source, alt, len(self.sentences)))
            said = sentence.replace(PLACE, "")
            said = said if self.preformatted else " ".join(said.split())
            self.sentences += [said] if said.strip() else []


def split_sentences(text: str) -> Iterator[str]:
    """Sentences of a block of text: they end at `.`, `!` or `?`, with any closing quote or bracket, before a space and
    anything but a small letter, and at `。`, `！` or `？`. A common abbreviation or a single initial ends none.

    The rule knows no language; it is right often enough to place pictures by.
    """
    text = " ".join(text.split())
    begun = 0
    for match in re.finditer(r"""[.!?]+["'”’)\]]*(?= [^a-z])|[。！？]+["'”’」』）]*""", text):
        last = text[begun : match.end()].rpartition(" ")[2].lstrip("(\"'“‘[")
        if (
            last.lower() in ABBREVIATIONS
            or re.fullmatch(r"[A-Z]\.", last)
            or re.fullmatch(r"\d+\.", text[begun : match.end()])
        ):
            continue
        yield text[begun : match.end()].strip()
        begun = match.end()
    if text[begun:].strip():
        yield text[begun:].strip()
