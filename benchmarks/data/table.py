"""Images a second that reach a trainer: ourselves beside seven other loaders and the limit, same rows, same cores.

The limit is two bare processes that read a tar, decode, resize to 336 x 336, tokenise, and hand nothing over. Every loader does
that same work through the same functions (simplejpeg, torch's antialiased bicubic on uint8, the same tokenizer) in two workers,
and delivers tensors to one consumer, which counts and forgets them; competitors pad batches of 64, ours are packs of 4,096
tokens. Fair because: each is a fresh command with caches of its own, measured alone, in rounds that begin with another one each
time; ratios are within a round; all files are in the page cache (a first pass before the clock); every process has one torch
thread and the same settings of its allocator; workers are as nice as Ray makes its own; the competitors' libraries live in
their own environment with the same torch, and each reads the format that it likes best. Competitors do not shuffle, ours does.
The rate is that of the run's middle half: what a loader has made ahead when the clock starts it has also made ahead when it
stops. First batches are timed from the command, so imports and Ray's start are in them. Memory is the proportional set size of
the whole process tree, object store included, sampled each second. The S3 server shares the two cores with what it serves. How
much packing saves over padding depends on the rows: with 576 tokens a picture, four times these, padding wastes less and the
ratio is about 1.4. The pictures: see `benchmarks/data/corpus.py`.
"""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks.common import CACHE, Section, ratios, scratch
from benchmarks.data.children import Failed, Outcome, run
from benchmarks.data.corpus import ROWS, SHARD_ROWS, corpus, repeated, shards, warm
from benchmarks.data.ours import BUCKET, BUDGET, BUFFER, S3

COMPETITORS = {
    "bare_torch": "torch DataLoader over tars",
    "web_dataset": "DataLoader + webdataset",
    "mosaic": "mosaicml-streaming",
    "energon": "Megatron-Energon",
    "lit_data": "LitData",
    "hf_datasets": "HF datasets, streaming",
    "naive_ray": "Ray Data, naive",
}
LIMIT = "limit: bare decode, resize, tokenise"
STRICT = "mllm, packed in strict order"
LOOSE = "mllm, packed, order as it comes"
BUCKETED = "mllm, packed in strict order, from S3"
OURS = {LIMIT: "limit", STRICT: "strict", LOOSE: "loose", BUCKETED: "s3"}
PART = {"s3": "tar"}
"""The bucket holds each shard once and is gone round; on disk a shard has as many names as it is read."""

PEERS = tuple(COMPETITORS.values())

PYTHON = CACHE / "venv-competitors" / "bin" / "python"


@dataclass(frozen=True)
class Size:
    """How much is read: different rows, rows of a timed run, rows of the large corpus, rows of a window, rounds."""

    rows: int = ROWS
    timed: int = 16 * 1024
    large: int = 20 * ROWS
    window: int = 1024
    rounds: int = 3

    @classmethod
    def quick(cls) -> Size:
        return cls(rows=256, timed=1024, large=2048, window=128, rounds=1)


Found = dict[str, list[Outcome]]


def measure(section: Section, quick: bool) -> None:
    size = Size.quick() if quick else Size()
    folder = corpus(CACHE, size.rows)
    for part, rows in (("many", size.timed), ("long", size.large)):
        repeated(folder / "tar", folder / part, rows)
    bytes_a_row = sum(Path(uri).stat().st_size for uri in shards(folder / "tar")) / size.rows
    section.facts.append(
        f"{size.rows:,} different rows of {bytes_a_row / 1024:.0f} KiB in tars of {SHARD_ROWS}; {size.timed:,} read by each "
        f"loader in each of {size.rounds} rounds; windows of {size.window:,} rows"
    )
    fill(section, ours("index", folder, "many", size).report)
    ours("index", folder, "long", size, size.large)
    with bucket(folder):
        found, failed = rounds(folder, size)
    throughput(section, found, failed)
    memory(section, folder, size)
    resume(section, folder, size)


def ours(what: str, folder: Path, part: str, size: Size, rows: int | None = None) -> Outcome:
    arguments = [what, str(folder), part, str(rows or size.timed), str(size.window)]
    return run(sys.executable, ["benchmarks.data.ours", *arguments], folder)


def competitor(name: str, word: str, folder: Path, size: Size) -> Outcome:
    if not PYTHON.is_file():
        raise Failed("no environment for competitors; `make bench-data` creates it")
    return run(PYTHON, ["benchmarks.data.competitors", name, word, str(folder), str(size.timed)], folder)


@contextmanager
def bucket(folder: Path) -> Iterator[None]:
    """A real S3 server on loopback that holds the tars; children find its address in their environment."""
    from tests.s3 import running

    with scratch() as inside, running(inside) as server:
        server.upload(folder / "tar", BUCKET.split("/", 3)[3])
        os.environ[S3] = json.dumps(asdict(server.storage))
        yield
        del os.environ[S3]


def rounds(folder: Path, size: Size) -> tuple[Found, dict[str, str]]:
    """Outcomes of every loader, round by round, each round beginning with another; and why those failed that did."""
    found: Found = defaultdict(list)
    failed: dict[str, str] = {}
    for name, title in COMPETITORS.items():
        attempt(failed, title, lambda name=name: competitor(name, "prepare", folder, size))
    warm(folder)
    turns: list[tuple[str, Callable[[], Outcome]]] = [
        *((title, lambda w=what: ours(w, folder, PART.get(w, "many"), size)) for title, what in OURS.items()),
        *((title, lambda n=name: competitor(n, "run", folder, size)) for name, title in COMPETITORS.items()),
    ]
    for number in range(size.rounds):
        start = number * len(turns) // size.rounds
        for title, turn in turns[start:] + turns[:start]:
            if title not in failed and (outcome := attempt(failed, title, turn)):
                found[title].append(outcome)
    return {title: outcomes for title, outcomes in found.items() if title not in failed}, failed


def attempt(failed: dict[str, str], title: str, turn: Callable[[], Outcome]) -> Outcome | None:
    try:
        return turn()
    except Failed as error:
        failed[title] = f"could not run: {error}"
        return None


def throughput(section: Section, found: Found, failed: dict[str, str]) -> None:
    titles = (*OURS, *PEERS)
    rates = {title: [outcome.report["steady"] for outcome in outcomes] for title, outcomes in found.items()}
    for title in titles:
        section.add(title, "images/s", rates.get(title, []), failed.get(title, ""))
    for title in [t for t in titles if t in rates and t != LIMIT and LIMIT in rates]:
        goal = 0.95 if title == STRICT else None
        section.add(f"{title} / limit", "ratio", ratios(rates[title], rates[LIMIT]), at_least=goal)
    peers = [rates[title] for title in PEERS if title in rates]
    best = [max(together) for together in zip(*peers, strict=True)]
    compared(section, f"{STRICT} / best peer of the round", rates.get(STRICT), best, at_least=1.0)
    compared(section, "strict order / order as it comes", rates.get(STRICT), rates.get(LOOSE), at_least=0.97)
    compared(section, "S3 / local disk", rates.get(BUCKETED), rates.get(STRICT))
    for title in [t for t in titles if t in found]:
        section.add(f"first batch: {title}", "s", [outcome.report["first"] for outcome in found[title]])
    for title in [t for t in titles if t in found]:
        section.add(f"peak memory: {title}", "GB", [outcome.peak for outcome in found[title]])


def compared(
    section: Section, name: str, over: list[float] | None, under: list[float] | None, at_least: float | None = None
) -> None:
    section.add(name, "ratio", ratios(over, under) if over and under else [], at_least=at_least)


def fill(section: Section, found: dict[str, list[float]]) -> None:
    note = f"packs of {BUDGET.tokens:,} tokens and {BUDGET.tiles} tiles; n counts windows"
    section.add("pack fill", "share", found["fill"], note)
    section.add("pack fill, of the bound", "share", found["of bound"], "see the section on packing", at_least=0.99)
    section.add("fill of batches of 8 padded to the longest", "share", found["padding"], "the same samples, shuffled")
    useful = ratios(found["fill"], found["padding"])
    section.add("useful tokens in as many positions, packed / padded", "ratio", useful, at_least=1.7)


def memory(section: Section, folder: Path, size: Size) -> None:
    """Over the small corpus again and again, until all buffers are full, and over one that is as much larger as `large` is."""
    small = ours("strict", folder, "tar", size)
    large = ours("strict", folder, "long", size, size.large)
    lean = ours("lean", folder, "tar", size)
    times, buffer = size.large // size.rows, BUFFER // 2**20
    section.add(f"peak memory, corpus of {size.rows:,} rows", "GB", [small.peak], f"{size.timed:,} rows read")
    section.add(
        f"peak memory, corpus of {size.large:,} rows", "GB", [large.peak], f"{times} times as large, read to its end"
    )
    section.add("large corpus / small one, peak memory", "ratio", [large.peak / small.peak], at_most=1.1)
    half = len(large.memory) // 2
    early, late = median(large.memory[half // 2 : half]), median(large.memory[half:])
    section.add("second half / second quarter of that run, memory", "ratio", [late / early], at_most=1.05)
    saved = small.peak - lean.peak
    note = f"{buffer // 4:,} MiB instead of {buffer:,} MiB; Ray and the actors themselves are the rest"
    section.add("peak memory saved by a quarter of the buffer", "GB", [saved], note)
    section.add(
        "a quarter of the buffer / all of it, images/s", "ratio", [lean.report["steady"] / small.report["steady"]]
    )
    spilled = [outcome.report["spilled"] for outcome in (small, large, lean)]
    section.add("spilled by the object store", "bytes", spilled, at_most=0)


def resume(section: Section, folder: Path, size: Size) -> None:
    found = ours("starts", folder, "long", size, size.large).report
    section.add("first pack, from the beginning", "s", found["fresh"], "Ray is up; actors are new each time")
    section.add(f"first pack, from row {size.large * 3 // 4:,}", "s", found["deep"], "in the middle of a window")
    section.add("deep / from the beginning", "ratio", ratios(found["deep"], found["fresh"]), at_most=1.1)
