"""`mllm data index` and `mllm data check`: what a corpus holds, and which of its rows training could not use."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

from rich.console import Console

from cluster import indexing
from cluster.rows import draw, in_order
from cluster.site import Site
from mllm.recipe import Source
from pipelines import pictures
from pipelines.corpora import Corpus
from pipelines.manifest import Manifest, plan
from pipelines.tiling import Resize
from pipelines.types import Chunk, Document, Limits, Picture, Reason, Rejected, SkipSample, spec

SMALL = Resize(size=32, mode="squash")
"""Pictures are decoded whole and then made as small as this."""


def index(corpus: Corpus, site: Site, console: Console, next_to_corpus: bool, again: bool) -> int:
    """Index a corpus and say what it holds. Returns 1 when `again` finds shards whose contents have changed, else 0."""
    uris = site.shards(corpus.name)
    logs = Path(site.cache) / "logs"
    home = indexing.home_of(site, uris, next_to_corpus)
    planned = plan(corpus, uris, (home,) if next_to_corpus else site.homes(uris))
    manifest = indexing.index_corpus(site, corpus, planned, console, logs, home)
    shards = manifest.shards
    known = [s.pictures for s in shards if s.pictures is not None]
    console.print(
        f"{corpus.name}: {manifest.rows:,} rows in {len(shards):,} shards, "
        f"{sum(s.bytes for s in shards) / 2**20:,.1f} MiB, "
        f"{sum(known):,} pictures{' or more' if len(known) < len(shards) else ''}, "
        f"{sum(s.characters for s in shards):,} characters; {len(planned.missing):,} scanned now, index in {home}",
        soft_wrap=True,
    )
    if not again:
        return 0
    wrong = indexing.verify(site, corpus, console, logs)
    for uri in wrong:
        console.print(f"{uri}: its contents are not what was indexed, though its size and time are", soft_wrap=True)
    console.print(f"{len(shards) - len(wrong):,} of {len(shards):,} shards are what was indexed")
    return 1 if wrong else 0


@spec
class Checked:
    """What became of a chunk: its good rows, their pictures (frames of videos among them), and its bad rows."""

    shard: int
    good: int
    pictures: int
    bad: tuple[Rejected, ...]


def manifest_of(corpus: Corpus, site: Site, console: Console) -> Manifest:
    """The corpus's index, its missing shards scanned first, under a bar on a terminal."""
    indexing.index_missing(site, [corpus], console, Path(site.cache) / "logs")
    return site.manifest(corpus)


def check(corpus: Corpus, site: Site, console: Console, sample: int | None = None) -> int:
    """Print each bad row with its reason, then the counts. Returns 1 when there was one, else 0.

    Rows are read and their pictures and frames decoded as training would, within the site's limits; all of them, or about
    `sample` rows in random chunks.
    """
    manifest = manifest_of(corpus, site, console)
    drawn = draw(corpus, manifest, sample)
    reasons: Counter[Reason] = Counter()
    seen: Counter[int] = Counter()
    bad: Counter[int] = Counter()
    shown = 0
    for found in in_order(partial(_check, corpus, manifest, site.limits), drawn, console, f"checking {corpus.name}"):
        for row in found.bad:
            console.print(row.label(), soft_wrap=True, markup=False, emoji=False)
        reasons.update(row.reason for row in found.bad)
        seen[found.shard] += found.good + len(found.bad)
        bad[found.shard] += len(found.bad)
        shown += found.pictures
    total, worse = seen.total(), reasons.total()
    shards = f"{len(manifest.shards):,} shard{'s' if len(manifest.shards) > 1 else ''}"
    share = f" ({worse / total:.2%})" if worse else ""
    good = f"{total - worse:,} good row{'s' if total - worse != 1 else ''}"
    console.print(
        f"{corpus.name}: {good} with {shown:,} images in {shards}, {worse:,} bad{share}; read were {drawn.words}",
        soft_wrap=True,
    )
    for reason, count in reasons.most_common():
        console.print(f"  {count:>8,} {reason}", markup=False)
    _warn(manifest, seen, bad, console)
    return 1 if reasons else 0


def _check(corpus: Corpus, manifest: Manifest, limits: Limits, chunk: Chunk) -> Checked:
    good = shown = 0
    bad: list[Rejected] = []
    for row in corpus.read(manifest.shards[chunk.shard], chunk, limits):
        found = row if isinstance(row, Rejected) else _decoded(row, limits)
        if isinstance(found, Rejected):
            bad.append(found)
        else:
            good += 1
            shown += found
    return Checked(shard=chunk.shard, good=good, pictures=shown, bad=tuple(bad))


def _decoded(document: Document, limits: Limits) -> int | Rejected:
    """Pictures of a document, every one decoded, or the reason for which training would drop it."""
    try:
        measured = pictures.measure(document, SMALL, limits)
        found = [segment for segment in measured.segments if isinstance(segment, Picture)]
        pictures.pixels(found, SMALL)
    except SkipSample as skip:
        return Rejected(row=document.id, reason=skip.reason, detail=skip.detail)
    return len(found)


def _warn(manifest: Manifest, seen: Counter[int], bad: Counter[int], console: Console) -> None:
    """Name the shards at which a run would stop, by the default of `Source.max_bad`."""
    default = {name: Source.__dataclass_fields__[name].default for name in ("max_bad", "min_rows")}
    worst = [
        i for i, count in bad.most_common() if count > default["max_bad"] * seen[i] and seen[i] >= default["min_rows"]
    ]
    for i in worst[:5]:
        console.print(f"{manifest.shards[i].name}: {bad[i]:,} of {seen[i]:,} rows are bad", soft_wrap=True)
    if worst:
        more = f" and {len(worst) - 5} more shards" if len(worst) > 5 else ""
        console.print(
            f"a run would stop here{more}: a source's max_bad is {default['max_bad']:.0%} of a shard's rows, "
            "unless the recipe allows it more",
            soft_wrap=True,
        )
