"""Corpora indexed before they are read: each new or changed shard is scanned once, as Ray tasks when there is much to scan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.local import ray_running
from cluster.site import Site
from mllm.recipe import Recipe
from pipelines import storage
from pipelines.corpora import Corpus
from pipelines.manifest import Manifest, Planned, Shard, beside, finish, plan, save, scan

SAVED_EVERY = 64
"""Shards after which the table is written, so that an interrupted scan goes on where it was."""

SMALL = 256 * 2**20
"""Bytes up to which shards are scanned in this process: starting Ray takes longer."""


def corpora_of(recipe: Recipe) -> list[Corpus]:
    """Every corpus that a recipe reads, each once."""
    sources = [source.corpus for stage in recipe.stages for source in stage.mixture]
    return list(dict.fromkeys([*sources, *recipe.held_out]))


def index_missing(site: Site, corpora: Sequence[Corpus], console: Console, logs: Path) -> None:
    """Scan what the manifests of `corpora` lack, so that planning afterwards only reads. Names what changed."""
    for corpus in corpora:
        uris = site.shards(corpus.name)
        planned = plan(corpus, uris, site.homes(uris))
        if planned.missing:
            index_corpus(site, corpus, planned, console, logs, site.homes(uris)[-1])


def index_corpus(site: Site, corpus: Corpus, planned: Planned, console: Console, logs: Path, home: str) -> Manifest:
    """Scan the plan's missing shards and write them to `home`. Raises ValueError for a shard not in the corpus's format."""
    for uri, words in planned.changed.items():
        console.print(
            f"{corpus.name}: {uri} has changed: {words}; it is indexed again, and runs begun before will not go on",
            soft_wrap=True,
        )
    scanned: list[Shard] = []
    with _progress(console) as progress:
        bar = progress.add_task(f"indexing {corpus.name}", total=len(planned.missing), rows="")
        for shard in _scans(site, corpus, planned.missing, home, logs):
            scanned.append(shard)
            progress.update(bar, advance=1, rows=f"{sum(s.rows for s in scanned):,} rows")
            if len(scanned) % SAVED_EVERY == 0:
                save(corpus, scanned, home)
    return finish(corpus, planned, scanned, home)


def verify(site: Site, corpus: Corpus, console: Console, logs: Path) -> list[str]:
    """Read every shard again; the addresses of those whose contents are not what the manifest says."""
    uris = site.shards(corpus.name)
    manifest = site.manifest(corpus)
    expected = {shard.uri: shard.digest for shard in manifest.shards}
    with _progress(console) as progress:
        bar = progress.add_task(f"reading {corpus.name}", total=len(uris), rows="")
        wrong = []
        for shard in _scans(site, corpus, uris, site.homes(uris)[-1], logs):
            progress.update(bar, advance=1)
            if shard.digest != expected[shard.uri]:
                wrong.append(shard.uri)
    return sorted(wrong)


def home_of(site: Site, uris: Sequence[str], next_to_corpus: bool) -> str:
    """Where a corpus's index is to be written."""
    return beside(uris[0]) if next_to_corpus else site.homes(uris)[-1]


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    """A bar on a terminal; elsewhere none, which would leave an empty line behind."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rows]}"))
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
    with bar if console.is_terminal else nullcontext():
        yield bar


def _scans(site: Site, corpus: Corpus, uris: Sequence[str], home: str, logs: Path) -> Iterator[Shard]:
    """Scanned shards, as they are done."""
    if len(uris) == 1 or _bytes(corpus, uris) <= SMALL:
        yield from (scan(corpus, uri, home) for uri in uris)
        return
    with ray_running(site.ray_address, site.pools.preprocessors[1] + 1, logs, site.ray_token_file):
        yield from _remote(site, corpus, uris, home)


def _bytes(corpus: Corpus, uris: Sequence[str]) -> int:
    """What is to be read; no more of it is looked up than it takes to know that it is much."""
    total = 0
    for uri in uris:
        total += sum(storage.stat(part).size for part in corpus.files(uri))
        if total > SMALL:
            break
    return total


def _remote(site: Site, corpus: Corpus, uris: Sequence[str], home: str) -> Iterator[Shard]:
    """One task a shard, a bounded number of them at a time, so that a corpus of any size is a short queue."""
    import ray

    task = ray.remote(_scan)
    waiting = list(reversed(uris))
    running: set[ray.ObjectRef] = set()
    most = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    while waiting or running:
        while waiting and len(running) < most:
            running.add(task.remote(corpus, waiting.pop(), home, site.storage))
        done, rest = ray.wait(list(running), num_returns=1)
        running = set(rest)
        yield from ray.get(done)


def _scan(corpus: Corpus, uri: str, home: str, how: storage.Storage) -> Shard:
    storage.use(how)
    return scan(corpus, uri, home)
