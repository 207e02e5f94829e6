"""The order of the data: a pure function of seed, manifests, mixture and the number of a window.

    order.window(k)  ->  which rows of which shards make the k-th window, in O(sources + chunks of the window)

Nothing is materialised and nothing remembered: any window can be asked for at any time by anyone, so resuming is asking for
the window where the run stopped. In each window every source has its share to within one row (or one group of rows); in each
epoch of a source every row comes exactly once. Rows travel in chunks of neighbours, so that a shard is read by range; which
chunks follow one another is a seeded permutation, drawn anew each epoch, and chunk borders move from epoch to epoch. The
sequence of a source's rows knows nothing of the other sources, of shard borders, or of windows.
"""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Annotated, Literal

from pydantic import Field

from pipelines.manifest import Manifest
from pipelines.types import Chunk, Window, spec


@spec
class BySize:
    """Shares go by size to the power of `power`: 1 is proportional, 0.5 the square root (InstructBLIP 2.4), 0 equal shares.

    A source's size is what one epoch of the mixture takes of it, so after its cap and repeat factor.
    """

    kind: Literal["by_size"] = "by_size"
    power: Annotated[float, Field(ge=0)] = 1.0


@spec
class ByWeight:
    """Shares go by the weight that each source is given."""

    kind: Literal["by_weight"] = "by_weight"


@spec
class Knot:
    """The weights of all sources, in the mixture's order, at progress `at` in [0, 1]."""

    at: Annotated[float, Field(ge=0, le=1)]
    weights: tuple[Annotated[float, Field(ge=0)], ...]


@spec
class Scheduled:
    """Shares move with progress: between two knots they change linearly, before the first and after the last they stay.

    Progress runs over `rows` rows of the mixture; None means the order's own length, which must then be known in epochs.
    """

    kind: Literal["scheduled"] = "scheduled"
    knots: tuple[Knot, ...]
    rows: Annotated[int, Field(gt=0)] | None = None


Sampling = Annotated[BySize | ByWeight | Scheduled, Field(discriminator="kind")]


@spec
class Drawn:
    """A source as the order draws from it.

    `cap`: one epoch of the mixture takes at most so many of its rows, other ones each time (Cambrian-1's threshold).
    `repeat`: it takes them so many times; 0.5 is a different half each time (InternVL's repeat factors).
    `group`: so many rows are drawn together, to make one document (VILA's several pairs to an item).
    """

    manifest: Manifest
    weight: float | None = None
    cap: int | None = None
    repeat: float = 1.0
    group: int = 1

    @property
    def rows(self) -> int:
        """Rows that one epoch of the mixture takes."""
        rows = self.manifest.rows if self.cap is None else min(self.cap, self.manifest.rows)
        return round(rows * _exact(self.repeat))


Curve = tuple[tuple[Fraction, tuple[Fraction, ...]], ...]
"""Shares of all sources, summing to one, at growing points of progress."""


@dataclass(frozen=True)
class Order:
    """`window_rows` and `chunk_rows` count rows; `epochs` is the order's length, None for one without end.

    Raises ValueError when a source is empty or the sampling does not fit the sources.
    """

    seed: int
    sources: tuple[Drawn, ...]
    sampling: BySize | ByWeight | Scheduled = BySize()  # noqa: RUF009 -- a frozen value
    window_rows: int = 1024
    chunk_rows: int = 32
    epochs: float | None = None

    def __post_init__(self) -> None:
        for source in self.sources:
            manifest = source.manifest
            if source.rows == 0:
                raise ValueError(
                    f"corpus {manifest.corpus!r}: an epoch takes no rows of it; it has {manifest.rows} in "
                    f"{len(manifest.shards)} shards, cap={source.cap}, repeat={source.repeat}"
                )
            if source.group > self.chunk_rows:
                raise ValueError(
                    f"corpus {manifest.corpus!r}: group={source.group} rows make one document and chunk={self.chunk_rows} "
                    "rows are read together; raise chunk"
                )
        _ = self._curve  # says what is wrong with the weights before a worker starts

    @property
    def rows(self) -> int:
        """Rows that one epoch of the mixture takes of all sources together."""
        return sum(source.rows for source in self.sources)

    @cached_property
    def length(self) -> int | None:
        """Rows of the whole order, None when it has no end."""
        return None if self.epochs is None else round(_exact(self.epochs) * self.rows)

    @property
    def windows(self) -> int | None:
        """Windows of the whole order, the last of which may be short; None when it has no end."""
        return None if self.length is None else -(-self.length // self.window_rows)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for two orders exactly when they deal the same rows of the same shards."""
        words = [
            str(self.seed),
            str(self.window_rows),
            str(self.chunk_rows),
            repr(self._curve),
            str(self._progress_rows),
        ]
        words += [f"{s.manifest.corpus} {s.manifest.fingerprint} {s.rows} {s.group}" for s in self.sources]
        return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]

    def shares(self, rows: int) -> tuple[Fraction, ...]:
        """Share of each source when `rows` rows of the mixture have been drawn."""
        curve, p = self._curve, self._progress(rows)
        for (a, before), (b, after) in pairwise(curve):
            if p < b:
                return tuple(
                    u + (v - u) * max(Fraction(0), p - a) / (b - a) for u, v in zip(before, after, strict=True)
                )
        return curve[-1][1]

    def window(self, k: int) -> Window:
        """The k-th window; empty past the end."""
        chunks: list[Chunk] = []
        for source in range(len(self.sources)):
            chunks += self._chunks(source, self._taken(source, k), self._taken(source, k + 1))
        random.Random(f"{self.seed} window {k}").shuffle(chunks)
        return Window(k=k, chunks=tuple(chunks))

    def tree(self) -> str:
        """The mixture, one line a source."""
        length = "without end" if self.epochs is None else f"{self.epochs:g} epochs"
        lines = [
            f"mixture of {self.rows:,} rows an epoch, {length}, {self.window_rows:,} a window, order {self.fingerprint}"
        ]
        first, last = self.shares(0), self.shares(self._progress_rows or 0)
        for source, a, b in zip(self.sources, first, last, strict=True):
            manifest = source.manifest
            share = f"{float(a):6.1%}" + (f" to {float(b):.1%}" if a != b else "")
            words = [f"{manifest.rows:>12,} rows in {len(manifest.shards):,} shards"]
            words += [f"capped at {source.cap:,}"] if source.cap is not None and source.cap < manifest.rows else []
            words += [f"times {source.repeat:g}"] if source.repeat != 1 else []
            words += [f"{source.group} rows a document"] if source.group != 1 else []
            lines.append(f"  {manifest.corpus:<24} {share}  {', '.join(words)}")
        return "\n".join(lines)

    @cached_property
    def _curve(self) -> Curve:
        match self.sampling:
            case BySize(power=power):
                given = [source.manifest.corpus for source in self.sources if source.weight is not None]
                if given:
                    raise ValueError(
                        f"sampling goes by size, and {given} have a weight; leave it away or sample by_weight"
                    )
                sizes = [Fraction(s.rows) if power == 1 else _exact(s.rows**power) for s in self.sources]
                return ((Fraction(0), _normal(sizes)),)
            case ByWeight():
                given = [source.weight for source in self.sources if source.weight is not None]
                if len(given) < len(self.sources):
                    raise ValueError(
                        f"{len(given)} of {len(self.sources)} sources have a weight; give all of them one, "
                        "or none (shares by size)"
                    )
                return ((Fraction(0), _normal([_exact(weight) for weight in given])),)
            case Scheduled(knots=knots):
                return self._scheduled(knots)

    def _scheduled(self, knots: tuple[Knot, ...]) -> Curve:
        places = [_exact(knot.at) for knot in knots]
        if not knots or places != sorted(set(places)):
            raise ValueError(f"the knots of a schedule stand at growing progress, found {[knot.at for knot in knots]}")
        for knot in knots:
            if len(knot.weights) != len(self.sources) or not sum(knot.weights):
                raise ValueError(
                    f"the knot at {knot.at} has weights {knot.weights} for {len(self.sources)} sources; "
                    "give each source one, not all of them zero"
                )
        if self._progress_rows is None:
            raise ValueError("a schedule of weights needs a stage measured in epochs, or its own `rows`")
        curve = [(at, _normal([_exact(w) for w in knot.weights])) for at, knot in zip(places, knots, strict=True)]
        return tuple(curve if places[0] == 0 else [(Fraction(0), curve[0][1]), *curve])

    @cached_property
    def _progress_rows(self) -> int | None:
        if isinstance(self.sampling, Scheduled):
            return self.sampling.rows or self.length
        return None

    def _progress(self, rows: int) -> Fraction:
        return Fraction(rows, self._progress_rows) if self._progress_rows else Fraction(0)

    def _taken(self, source: int, k: int) -> int:
        """Rows of `source` drawn before window k: its share of all, rounded down to whole groups; at the end, to whole rows."""
        rows = k * self.window_rows
        if self.length is not None and rows >= self.length:
            return int(self._area(source, self.length))
        group = self.sources[source].group
        return int(self._area(source, rows)) // group * group

    def _area(self, source: int, rows: int) -> Fraction:
        """The share of `source`, summed over the first `rows` rows: a piecewise linear curve has its integral in closed form."""
        curve = self._curve
        if len(curve) == 1:
            return rows * curve[0][1][source]
        p, area = self._progress(rows), Fraction(0)
        for (a, before), (b, after) in pairwise(curve):
            width = min(p, b) - a
            if width <= 0:
                break
            u, v = before[source], after[source]
            area += width * (u + (v - u) * width / (b - a) / 2)
        area += max(Fraction(0), p - curve[-1][0]) * curve[-1][1][source]
        return area * (self._progress_rows or 0)

    def _chunks(self, source: int, start: int, stop: int) -> Iterator[Chunk]:
        """Rows `[start, stop)` of the endless stream of epochs of one source, as chunks of shards."""
        manifest = self.sources[source].manifest
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
        key = f"{self.seed} {self._keys[source]} {epoch}"
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
        return [list(accumulate(shard.rows for shard in source.manifest.shards)) for source in self.sources]

    @cached_property
    def _keys(self) -> list[str]:
        """A source's own seed: its corpus's name, so that the company it is in changes nothing, and which of that name it is."""
        names = [source.manifest.corpus for source in self.sources]
        return [f"{name} {names[:i].count(name)}" for i, name in enumerate(names)]


def _exact(value: float) -> Fraction:
    return Fraction(value).limit_denominator(10**6)


def _normal(sizes: list[Fraction]) -> tuple[Fraction, ...]:
    total = sum(sizes, Fraction(0))
    return tuple(size / total for size in sizes)


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
