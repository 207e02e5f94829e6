"""Rows of a corpus for those who look at it: all of them or a random sample, a chunk at a time, several at once.

    draw(corpus, manifest, sample)      which chunks                     in_order(work, drawn, ...)    work on each, in order

Memory holds as many chunks as are worked on together, whatever the size of a shard.
"""

from __future__ import annotations

import os
import random
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import accumulate, chain, islice
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.site import SiteError
from pipelines.corpora import Conversations, Corpus, Preferences, Videos
from pipelines.manifest import Manifest, Shard
from pipelines.types import Chunk, spec

T = TypeVar("T")

ROWS = 32
"""Rows that are read together, as training reads them."""

BYTES = 64 * 2**20
"""What they may weigh together, as far as their shard's own size tells."""

CLIPS = 4
"""Rows that are read together where each may name a video."""

AT_ONCE = min(8, os.cpu_count() or 1)
"""Chunks that are worked on together."""


@spec
class Draw:
    """Chunks of a corpus to be read, which hold `rows` of its `of` rows."""

    chunks: Iterable[Chunk]
    rows: int
    of: int

    @property
    def words(self) -> str:
        """`all 460 rows`, or `a random sample of 2,016 of 1,200,000 rows`."""
        if self.rows == self.of:
            return f"all {self.of:,} rows"
        return f"a random sample of {self.rows:,} of {self.of:,} rows"


def draw(corpus: Corpus, manifest: Manifest, sample: int | None = None, size: int | None = None, seed: int = 0) -> Draw:
    """All rows in order, or about `sample` of them in random chunks. `size` is that of a chunk, by default what fits memory.

    Raises ValueError for a sample of no row.
    """
    if sample is not None and sample < 1:
        raise ValueError(f"--sample {sample}: at least one row is read")
    sizes = [_size(corpus, shard, size) for shard in manifest.shards]
    if sample is None or sample >= manifest.rows:
        return Draw(
            chunks=chain.from_iterable(_cut(i, s.rows, sizes[i]) for i, s in enumerate(manifest.shards)),
            rows=manifest.rows,
            of=manifest.rows,
        )
    ends = list(accumulate(-(-shard.rows // sizes[i]) for i, shard in enumerate(manifest.shards)))
    count = max(1, round(sample * ends[-1] / manifest.rows))
    chosen: list[Chunk] = []
    for number in sorted(random.Random(seed).sample(range(ends[-1]), min(count, ends[-1]))):
        shard = bisect_right(ends, number)
        place = number - (ends[shard - 1] if shard else 0)
        chosen += islice(_cut(shard, manifest.shards[shard].rows, sizes[shard], place), 1)
    return Draw(chunks=chosen, rows=sum(chunk.stop - chunk.start for chunk in chosen), of=manifest.rows)


def _size(corpus: Corpus, shard: Shard, size: int | None) -> int:
    if size is not None:
        return size
    most = CLIPS if isinstance(corpus, Videos | Conversations | Preferences) else ROWS
    return max(1, min(most, BYTES * shard.rows // max(1, shard.bytes)))


def _cut(shard: int, rows: int, size: int, first: int = 0) -> Iterator[Chunk]:
    for start in range(first * size, rows, size):
        yield Chunk(source=0, shard=shard, epoch=0, start=start, stop=min(start + size, rows))


def in_order(work: Callable[[Chunk], T], drawn: Draw, console: Console, title: str) -> Iterator[T]:
    """`work` on each chunk, several at once, its results in the chunks' order; a bar on a terminal.

    Raises SiteError when a package is missing that a row needs.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    shown = bar if console.is_terminal else nullcontext()  # off a terminal a bar leaves an empty line behind
    waiting = deque()
    with ThreadPoolExecutor(AT_ONCE) as pool, shown:
        task = bar.add_task(title, total=drawn.rows)
        try:
            chunks = iter(drawn.chunks)
            while True:
                for chunk in islice(chunks, 2 * AT_ONCE - len(waiting)):
                    waiting.append((chunk.stop - chunk.start, pool.submit(work, chunk)))
                if not waiting:
                    return
                rows, done = waiting.popleft()
                yield done.result()
                bar.update(task, advance=rows)
        except ModuleNotFoundError as error:
            raise SiteError(str(error)) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
