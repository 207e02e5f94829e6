"""`mllm data check`: read all rows of a corpus as training would, and name the bad ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Console

from cluster import indexing
from cluster.site import Site, SiteError
from mllm.recipes import RECIPES
from pipelines.corpora import Corpus
from pipelines.manifest import plan
from pipelines.pictures import decode
from pipelines.types import Chunk, Document, Image, Reason, Rejected, SkipSample


def find_corpus(name: str) -> Corpus:
    """The corpus that some recipe calls `name`. Raises SiteError naming those there are."""
    known: dict[str, Corpus] = {}
    for recipe in (build() for build in RECIPES.values()):
        known |= {source.corpus.name: source.corpus for stage in recipe.stages for source in stage.mixture}
        known |= {corpus.name: corpus for corpus in recipe.held_out}
    if name not in known:
        raise SiteError(f"no recipe reads a corpus {name!r}; they read {', '.join(sorted(known))}")
    return known[name]


def index(name: str, site: Site, console: Console, next_to_corpus: bool, again: bool) -> int:
    """Index a corpus and say what it holds. Returns 1 when `again` finds shards whose contents have changed, else 0."""
    corpus = find_corpus(name)
    uris = site.shards(name)
    logs = Path(site.cache) / "logs"
    home = indexing.home_of(site, uris, next_to_corpus)
    planned = plan(corpus, uris, (home,) if next_to_corpus else site.homes(uris))
    manifest = indexing.index_corpus(site, corpus, planned, console, logs, home)
    shards = manifest.shards
    known = [s.pictures for s in shards if s.pictures is not None]
    console.print(
        f"{name}: {manifest.rows:,} rows in {len(shards):,} shards, {sum(s.bytes for s in shards) / 2**20:,.1f} MiB, "
        f"{sum(known):,} pictures{' or more' if len(known) < len(shards) else ''}, "
        f"{sum(s.characters for s in shards):,} characters; "
        f"{len(planned.missing):,} scanned now, index in {home}",
        soft_wrap=True,
    )
    if not again:
        return 0
    wrong = indexing.verify(site, corpus, console, logs)
    for uri in wrong:
        console.print(f"{uri}: its contents are not what was indexed, though its size and time are", soft_wrap=True)
    console.print(f"{len(shards) - len(wrong):,} of {len(shards):,} shards are what was indexed")
    return 1 if wrong else 0


def check(name: str, site: Site) -> int:
    """Print each bad row with its reason, then the counts. Returns 1 when there was one, else 0."""
    corpus = find_corpus(name)
    manifest = site.manifest(corpus)
    reasons: Counter[Reason] = Counter()
    good = pictures = 0
    for number, shard in enumerate(manifest.shards):
        whole = Chunk(source=0, shard=number, epoch=0, start=0, stop=shard.rows)
        for row in corpus.read(shard, whole):
            found = row if isinstance(row, Rejected) else _first_bad_image(row)
            if found:
                reasons[found.reason] += 1
                print(found.label())
            else:
                good += 1
                pictures += sum(isinstance(s, Image) for s in row.segments) if isinstance(row, Document) else 0
    print(
        f"{name}: {good:,} good rows with {pictures:,} images in {len(manifest.shards)} shards, {sum(reasons.values()):,} bad"
    )
    for reason, count in reasons.most_common():
        print(f"  {count:>8,} {reason}")
    return 1 if reasons else 0


def _first_bad_image(document: Document) -> Rejected | None:
    for segment in document.segments:
        if isinstance(segment, Image):
            try:
                decode(segment)
            except SkipSample as skip:
                return Rejected(row=document.id, reason=skip.reason, detail=skip.detail)
    return None
