"""The order of the data: a pure function of seed, manifests, weights and the number of a window.

    order.window(k)  ->  which rows of which shards make the k-th window, in O(sources + chunks of the window)

Nothing is materialised and nothing remembered: any window can be asked for at any time by anyone, so resuming is asking for
the window where the run stopped. In each window every source has its share to within one row; in each epoch of a source
every row comes exactly once. Rows travel in chunks of neighbours, so that a shard is read by range; which chunks follow one
another is a seeded permutation, drawn anew each epoch, and chunk borders move from epoch to epoch.
"""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate

from pipelines.manifest import Manifest
from pipelines.types import Chunk, Window


@dataclass(frozen=True)
class Order:
    """`weights` are shares of the rows of a window and sum to one; `window_rows` and `chunk_rows` count rows."""

    seed: int
    manifests: tuple[Manifest, ...]
    weights: tuple[Fraction, ...]
    window_rows: int = 1024
    chunk_rows: int = 32

    @classmethod
    def of(
        cls,
        manifests: Sequence[Manifest],
        weights: Sequence[float | None],
        seed: int,
        window_rows: int,
        chunk_rows: int,
    ) -> Order:
        """Weights of None stand for the source's size; given weights are relative to one another.

        Raises ValueError when a source is empty, or when only some sources have a weight.
        """
        for manifest in manifests:
            if manifest.rows == 0:
                raise ValueError(f"corpus {manifest.corpus!r} holds no rows in {len(manifest.shards)} shards")
        given = [weight for weight in weights if weight is not None]
        if given and len(given) < len(weights):
            raise ValueError(
                f"{len(given)} of {len(weights)} sources have a weight; give all of them one, or none (shares by size)"
            )
        sizes = (
            [Fraction(w).limit_denominator(10**6) for w in given] if given else [Fraction(m.rows) for m in manifests]
        )
        total = sum(sizes, Fraction(0))
        return cls(seed, tuple(manifests), tuple(size / total for size in sizes), window_rows, chunk_rows)

    @property
    def rows(self) -> int:
        """Rows of all sources together: the length of one epoch."""
        return sum(manifest.rows for manifest in self.manifests)

    def windows(self, epochs: float) -> int:
        """Windows that `epochs` passes take; the last one may be short."""
        return -(-self._last(epochs) // self.window_rows)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for two orders exactly when they deal the same rows of the same shards."""
        words = [str(self.seed), str(self.window_rows), str(self.chunk_rows)]
        words += [f"{m.corpus} {m.fingerprint} {w}" for m, w in zip(self.manifests, self.weights, strict=True)]
        return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]

    def window(self, k: int, epochs: float | None = None) -> Window:
        """The k-th window; with `epochs`, an order that ends after that many passes."""
        last = self._last(epochs) if epochs is not None else None
        chunks: list[Chunk] = []
        for source in range(len(self.manifests)):
            start, stop = self._drawn(source, k, last), self._drawn(source, k + 1, last)
            chunks += self._chunks(source, start, stop)
        random.Random(f"{self.seed} window {k}").shuffle(chunks)
        return Window(k=k, chunks=tuple(chunks))

    def tree(self) -> str:
        """The mixture, one line a source."""
        lines = [f"mixture of {self.rows:,} rows, {self.window_rows:,} a window, order {self.fingerprint}"]
        for manifest, weight in zip(self.manifests, self.weights, strict=True):
            lines.append(
                f"  {manifest.corpus:<24} {float(weight):6.1%}  {manifest.rows:>12,} rows in {len(manifest.shards):,} shards"
            )
        return "\n".join(lines)

    def _last(self, epochs: float) -> int:
        return round(Fraction(epochs).limit_denominator(10**6) * self.rows)

    def _drawn(self, source: int, k: int, last: int | None) -> int:
        """Rows of `source` drawn before window k: the share of the whole, rounded down."""
        rows = k * self.window_rows if last is None else min(k * self.window_rows, last)
        return int(rows * self.weights[source])

    def _chunks(self, source: int, start: int, stop: int) -> Iterator[Chunk]:
        """Rows `[start, stop)` of the endless stream of epochs of one source, as chunks of shards."""
        manifest = self.manifests[source]
        bounds = self._bounds[source]
        while start < stop:
            epoch, place = divmod(start, manifest.rows)
            upto = min(stop - start, manifest.rows - place) + place
            for first, end in self._runs(source, epoch, manifest.rows, place, upto):
                while first < end:
                    shard = bisect_right(bounds, first)
                    base = bounds[shard - 1] if shard else 0
                    until = min(end, bounds[shard])
                    yield Chunk(source=source, shard=shard, epoch=epoch, start=first - base, stop=until - base)
                    first = until
            start += upto - place

    def _runs(self, source: int, epoch: int, rows: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Places `[start, stop)` of one shuffled epoch, as runs of consecutive rows of the corpus.

        The rows, turned by a random amount, are cut into chunks; all are `chunk_rows` long but the last. The chunks are
        permuted, and only the place of the short one bends the arithmetic.
        """
        size = self.chunk_rows
        count = -(-rows // size)
        key = f"{self.seed} {source} {epoch}"
        turn = random.Random(f"{key} turn").randrange(rows)
        permutation = Permutation(count, key)
        short = rows - (count - 1) * size
        pivot = permutation.where(count - 1) * size
        while start < stop:
            if start < pivot:
                slot, inside, length = start // size, start % size, size
            elif start < pivot + short:
                slot, inside, length = pivot // size, start - pivot, short
            else:
                after = start - pivot - short
                slot, inside, length = pivot // size + 1 + after // size, after % size, size
            take = min(length - inside, stop - start)
            first = (permutation[slot] * size + inside + turn) % rows
            until = first + take
            yield first, min(until, rows)
            if until > rows:
                yield 0, until - rows
            start += take

    @cached_property
    def _bounds(self) -> list[list[int]]:
        """For each source the number of rows up to and including each shard."""
        return [list(accumulate(shard.rows for shard in manifest.shards)) for manifest in self.manifests]


class Permutation:
    """A seeded permutation of `range(n)` that is computed, not stored: a four-round Feistel network over the smallest
    power of four that holds n, walked until it lands inside (Black and Rogaway 2002, cycle walking)."""

    ROUNDS = 4

    def __init__(self, n: int, key: str) -> None:
        self.n = n
        self.half = max(1, ((n - 1).bit_length() + 1) // 2)
        self.mask = (1 << self.half) - 1
        digest = hashlib.sha256(key.encode()).digest()
        self.keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(self.ROUNDS)]

    def __getitem__(self, i: int) -> int:
        """What stands at place i."""
        while True:
            left, right = i >> self.half, i & self.mask
            for key in self.keys:
                left, right = right, left ^ self._mix(right, key)
            i = left << self.half | right
            if i < self.n:
                return i

    def where(self, value: int) -> int:
        """The place at which `value` stands."""
        while True:
            left, right = value >> self.half, value & self.mask
            for key in reversed(self.keys):
                left, right = right ^ self._mix(left, key), left
            value = left << self.half | right
            if value < self.n:
                return value

    def _mix(self, value: int, key: int) -> int:
        """splitmix64's finaliser."""
        z = (value + key) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        return (z ^ (z >> 31)) & self.mask
