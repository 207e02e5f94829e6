"""`mllm data stats CORPUS`: what a corpus is made of, as a table and as a page.

    random chunks  ->  Facts of each row (headers alone, nothing is decoded)  ->  sections  ->  terminal and stats.html

Rows, shards and bytes are the manifest's, exact; all else is of the sample.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table as Lines

from cluster.amounts import quantity
from cluster.datacheck import manifest_of
from cluster.figures import SPREAD, Histogram, Points, Section, Spread, StatsPage, Table
from cluster.rows import Draw, draw, in_order
from cluster.site import Site
from pipelines import pictures
from pipelines.corpora import Corpus
from pipelines.encode import TextCodec
from pipelines.manifest import Manifest
from pipelines.tiling import Resize
from pipelines.types import Chunk, Document, Image, Limits, Picture, Rejected, SkipSample, Text, Video, spec

SAMPLE = 2000
"""Rows that are read unless a person says how many."""

CLOUD = 1500
"""Points of a cloud at most: more say nothing more, and make the page heavy."""

EXAMPLES = 3
"""Bad rows shown for each reason."""

HEADERS = Resize(size=1)
"""A tiling for those who want a picture's size alone."""


@spec
class Shown:
    """A picture's height and width as a person sees it, the bytes and the format of its file, and a hash of those bytes.

    Of a video: its frames' size, and how many of them are `frames` that training shows.
    """

    height: int
    width: int
    bytes: int
    format: str
    digest: bytes
    frames: int = 0


@spec
class Facts:
    """What the statistics take of one row: `turns` are its runs of one role, `length` its text, in tokens or characters."""

    length: int
    learned: int
    pictures: tuple[Shown, ...]
    turns: tuple[str, ...]
    digest: bytes
    label: int | None = None
    regions: int = 0
    preference: bool = False


Row = Facts | Rejected


@spec
class CorpusStats:
    """A corpus's exact size, and what a sample of its rows shows. `unit` is what text is measured in."""

    corpus: Corpus
    manifest: Manifest
    drawn: Draw
    rows: tuple[Facts, ...]
    bad: tuple[Rejected, ...]
    unit: str

    @property
    def stills(self) -> list[Shown]:
        return [shown for row in self.rows for shown in row.pictures if not shown.frames]

    @property
    def clips(self) -> list[Shown]:
        return [shown for row in self.rows for shown in row.pictures if shown.frames]

    @property
    def textual(self) -> float:
        """Share of the rows without picture or video."""
        return sum(not row.pictures for row in self.rows) / max(1, len(self.rows))

    @property
    def repeated(self) -> tuple[int, int]:
        """Rows that another row of the sample equals in all, and pictures whose file came before."""
        rows = len(self.rows) - len({row.digest for row in self.rows})
        files = [shown.digest for row in self.rows for shown in row.pictures]
        return rows, len(files) - len(set(files))


def write_stats(
    corpus: Corpus, site: Site, console: Console, out: Path, sample: int = SAMPLE, tokenizer: str | None = None
) -> Path:
    """Print the statistics of a corpus, write them to the page `out`, and return `out`."""
    stats = measure(corpus, site, console, sample, tokenizer)
    show(stats, console)
    written = page(stats).write(out)
    console.print(f"page: {written}", soft_wrap=True, markup=False)
    return written


def measure(
    corpus: Corpus, site: Site, console: Console, sample: int = SAMPLE, tokenizer: str | None = None
) -> CorpusStats:
    """Read about `sample` rows in random chunks. With a tokenizer's folder text is measured in tokens."""
    manifest = manifest_of(corpus, site, console)
    drawn = draw(corpus, manifest, sample)
    codec = None if tokenizer is None else TextCodec(tokenizer, None, None)
    length = len if codec is None else partial(_tokens, codec)
    rows: list[Row] = []
    work = partial(_facts, corpus, manifest, site.limits, length)
    for found in in_order(work, drawn, console, f"reading {corpus.name}"):
        rows += found
    return CorpusStats(
        corpus=corpus,
        manifest=manifest,
        drawn=drawn,
        rows=tuple(row for row in rows if isinstance(row, Facts)),
        bad=tuple(row for row in rows if isinstance(row, Rejected)),
        unit="characters" if codec is None else "tokens",
    )


def _tokens(codec: TextCodec, text: str) -> int:
    return len(codec.tokenizer.encode(text, add_special_tokens=False).ids)


def _facts(corpus: Corpus, manifest: Manifest, limits: Limits, length: Callable[[str], int], chunk: Chunk) -> list[Row]:
    found: list[Row] = []
    for row in corpus.read(manifest.shards[chunk.shard], chunk, limits):
        if isinstance(row, Rejected):
            found.append(row)
            continue
        try:
            found.append(_of_document(row, limits, length))
        except SkipSample as skip:
            found.append(Rejected(row=row.id, reason=skip.reason, detail=skip.detail))
    return found


def _of_document(document: Document, limits: Limits, length: Callable[[str], int]) -> Facts:
    """Raises SkipSample when a picture's header says that the row cannot be used."""
    measured = pictures.measure(document, HEADERS, limits)
    digest = hashlib.blake2b(digest_size=16)
    texts = [segment for segment in (*document.segments, *document.rejected) if isinstance(segment, Text)]
    shown = tuple(_shown(segment for segment in measured.segments if isinstance(segment, Picture)))
    for text in texts:
        digest.update(f"{text.role} {len(text.text)} {text.text}".encode("utf-8", "replace"))
    for picture in shown:
        digest.update(picture.digest)
    lengths = [(length(text.text), text.learn) for text in texts]
    roles = [segment.role for segment in document.segments if isinstance(segment, Text | Image | Video)]
    return Facts(
        length=sum(n for n, _ in lengths),
        learned=sum(n for n, learn in lengths if learn),
        pictures=shown,
        turns=tuple(str(role) for role, _ in groupby(roles) if role is not None),
        digest=digest.digest(),
        label=document.label,
        regions=len(document.regions),
        preference=bool(document.rejected),
    )


def _shown(found: Iterator[Picture]) -> Iterator[Shown]:
    """The pictures of a row; the frames of one video together."""
    for _, run in groupby(found, key=lambda picture: id(picture.of)):
        run = list(run)
        of, cut = run[0].of, run[0].cut
        files = of.data if isinstance(of.data, tuple) else (of.data,)
        digest = hashlib.blake2b(digest_size=16)
        for data in files:
            digest.update(data)
        yield Shown(
            height=cut.height,
            width=cut.width,
            bytes=sum(map(len, files)),
            format=format_of(files[0]) + (" frames" if isinstance(of.data, tuple) else ""),
            digest=digest.digest(),
            frames=len(run) if isinstance(of, Video) else 0,
        )


def format_of(data: bytes) -> str:
    """A picture's or video's format, by the first bytes of its file."""
    for name, start, mark in (
        ("JPEG", 0, b"\xff\xd8"),
        ("PNG", 0, b"\x89PNG"),
        ("GIF", 0, b"GIF8"),
        ("BMP", 0, b"BM"),
        ("TIFF", 0, b"II*\0"),
        ("TIFF", 0, b"MM\0*"),
        ("WebP", 8, b"WEBP"),
        ("AVI", 8, b"AVI "),
        ("Matroska or WebM", 0, b"\x1aE\xdf\xa3"),
        ("MP4 or MOV", 4, b"ftyp"),
    ):
        if data[start : start + len(mark)] == mark:
            return name
    return "other"


# --- what is told -----------------------------------------------------------------------------------------------------


def page(stats: CorpusStats) -> StatsPage:
    """The statistics as a page."""
    manifest, bad = stats.manifest, len(stats.bad)
    size = sum(shard.bytes for shard in manifest.shards)
    read = len(stats.rows) + bad
    numbers = [
        ("rows", f"{manifest.rows:,}", f"{read:,} of them read here"),
        ("shards", f"{len(manifest.shards):,}", f"{manifest.rows / len(manifest.shards):,.0f} rows each"),
        ("bytes", bytes_words(size), f"{bytes_words(size / max(1, manifest.rows))} a row"),
        ("pictures a row", quantity(_mean(len(row.pictures) for row in stats.rows)), f"{stats.textual:.1%} of rows have none"),
        (f"{stats.unit} a row", quantity(_mean(row.length for row in stats.rows)), f"{_learned(stats):.0%} of them learned"),
        ("bad rows", f"{bad / max(1, read):.2%}", f"{bad:,} of {read:,}"),
    ]  # fmt: skip
    return StatsPage(
        title=stats.corpus.name,
        facts=(
            f"corpus of kind {stats.corpus.kind}",
            f"read were {stats.drawn.words}",
            "pictures by their headers alone",
        ),
        numbers=tuple(numbers),
        sections=tuple(_sections(stats)),
    )


def _sections(stats: CorpusStats) -> Iterator[Section]:
    spreads = _spreads(stats)
    if stats.rows:
        figures = [Histogram.of("Length of text", f"{stats.unit} a row", [row.length for row in stats.rows])]
        counts = [len(row.pictures) for row in stats.rows]
        if any(counts):
            figures.append(Histogram.of("Pictures", "a row", counts))
        if any(row.turns for row in stats.rows):
            figures.append(Histogram.of("Turns", "a row", [len(row.turns) for row in stats.rows]))
        table = Table(head=SPREAD, rows=tuple((spread.name, *spread.cells) for spread in spreads))
        yield Section(title="Rows", tables=(table,), figures=tuple(figures))
    if stats.stills:
        yield Section(title="Pictures", figures=tuple(_figures(stats.stills)), tables=(_formats(stats.stills),))
    if stats.clips:
        yield Section(title="Videos", figures=tuple(_figures(stats.clips)), tables=(_formats(stats.clips),))
    if any(row.turns for row in stats.rows):
        turns = Counter(role for row in stats.rows for role in row.turns)
        rows = tuple((role, f"{count:,}", f"{count / len(stats.rows):.2f}") for role, count in turns.most_common())
        yield Section(title="Roles", tables=(Table(head=("role", "turns", "a row"), rows=rows),))
    labels = Counter(row.label for row in stats.rows if row.label is not None)
    if labels:
        rows = tuple(
            (str(label), f"{count:,}", f"{count / labels.total():.1%}") for label, count in labels.most_common(20)
        )
        facts = (f"{len(labels):,} classes in the sample; the commonest here",)
        yield Section(title="Classes", facts=facts, tables=(Table(head=("class", "rows", "share"), rows=rows),))
    again, files = stats.repeated
    facts = (f"{again:,} rows equal another of the sample", f"{files:,} picture files came before in it")
    yield Section(title="Duplicates", facts=facts)
    if stats.bad:
        yield Section(title="Bad rows", tables=(_bad_rows(stats),))


def _spreads(stats: CorpusStats) -> list[Spread]:
    rows, stills, clips = stats.rows, stats.stills, stats.clips
    told: list[tuple[str, list[float]]] = [
        (f"{stats.unit} a row", [row.length for row in rows]),
        (f"{stats.unit} learned", [row.learned for row in rows] if _learned(stats) < 1 else []),
        ("pictures a row", [len(row.pictures) for row in rows] if stats.stills or stats.clips else []),
        ("turns a row", [len(row.turns) for row in rows] if any(row.turns for row in rows) else []),
        ("boxes a row", [row.regions for row in rows] if any(row.regions for row in rows) else []),
        ("width, px", [shown.width for shown in stills]),
        ("height, px", [shown.height for shown in stills]),
        ("megapixels", [shown.width * shown.height / 1e6 for shown in stills]),
        ("width / height", [shown.width / shown.height for shown in stills]),
        ("file, bytes", [shown.bytes for shown in stills]),
        ("video width, px", [shown.width for shown in clips]),
        ("video height, px", [shown.height for shown in clips]),
        ("video frames shown", [shown.frames for shown in clips]),
        ("video, bytes", [shown.bytes for shown in clips]),
    ]
    return [Spread.of(name, values) for name, values in told if values]


def _figures(shown: Sequence[Shown]) -> Iterator[Histogram | Points]:
    yield Histogram.of("Width", "pixels", [s.width for s in shown])
    yield Histogram.of("Height", "pixels", [s.height for s in shown])
    sizes = tuple((s.width, s.height) for s in shown[:: -(-len(shown) // CLOUD)])
    yield Points(title="Sizes", unit="pixels", across="width", up="height", pairs=sizes)
    yield Histogram.of("Area", "megapixels", [s.width * s.height / 1e6 for s in shown])
    yield Histogram.of("Aspect", "width / height", [s.width / s.height for s in shown])
    yield Histogram.of("File", "bytes", [s.bytes for s in shown])


def _formats(shown: Sequence[Shown]) -> Table:
    counts = Counter(s.format for s in shown)
    weight = {name: sum(s.bytes for s in shown if s.format == name) / count for name, count in counts.items()}
    rows = tuple((n, f"{c:,}", f"{c / len(shown):.1%}", bytes_words(weight[n])) for n, c in counts.most_common())
    return Table(head=("format", "files", "share", "mean size"), rows=rows)


def _bad_rows(stats: CorpusStats) -> Table:
    counts = Counter(row.reason for row in stats.bad)
    rows = []
    for reason, count in counts.most_common():
        examples = [row for row in stats.bad if row.reason == reason][:EXAMPLES]
        words = "; ".join(row.row.label() + (f" ({row.detail})" if row.detail else "") for row in examples)
        rows.append((str(reason), words, f"{count:,}"))
    note = "Pictures were judged by their headers: `mllm data check` decodes them, and may find more."
    return Table(head=("reason", "for example", "rows"), rows=tuple(rows), note=note, left=2)


def show(stats: CorpusStats, console: Console) -> None:
    """Print the statistics."""
    manifest = stats.manifest
    size = sum(shard.bytes for shard in manifest.shards)
    shards = f"{len(manifest.shards):,} shard{'s' if len(manifest.shards) > 1 else ''}"
    _say(console, f"{stats.corpus.name} ({stats.corpus.kind}): {manifest.rows:,} rows in {shards}, {bytes_words(size)}")
    _say(console, f"below: {stats.drawn.words}, pictures by their headers")
    lines = Lines(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, head in enumerate(SPREAD):
        lines.add_column(head, justify="right" if place else "left", no_wrap=True)
    for spread in _spreads(stats):
        lines.add_row(spread.name, *spread.cells)
    console.print(lines)
    if stats.stills or stats.clips:
        formats = Counter(shown.format for shown in (*stats.stills, *stats.clips))
        _say(console, f"formats: {', '.join(f'{name} {count:,}' for name, count in formats.most_common())}")
        _say(console, f"rows of text alone: {stats.textual:.1%}")
    turns = Counter(role for row in stats.rows for role in row.turns)
    if turns:
        _say(console, f"turns: {', '.join(f'{role} {count:,}' for role, count in turns.most_common())}")
    labels = {row.label for row in stats.rows if row.label is not None}
    if labels:
        _say(console, f"classes: {len(labels):,}")
    again, files = stats.repeated
    _say(console, f"duplicates in the sample: {again:,} rows, {files:,} picture files")
    read = len(stats.rows) + len(stats.bad)
    _say(console, f"bad rows: {len(stats.bad):,} of {read:,}")
    for reason, count in Counter(row.reason for row in stats.bad).most_common():
        _say(console, f"  {count:>8,} {reason}")


def _say(console: Console, words: str) -> None:
    console.print(words, soft_wrap=True, markup=False, emoji=False)


def _mean(values: Iterator[int]) -> float:
    listed = list(values)
    return sum(listed) / max(1, len(listed))


def _learned(stats: CorpusStats) -> float:
    return sum(row.learned for row in stats.rows) / max(1, sum(row.length for row in stats.rows))


def bytes_words(count: float) -> str:
    """`812 B`, `3.2 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1000 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    raise AssertionError("the last unit takes any count")
