"""Amounts as a person reads them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """`values` as a row of at most `width` blocks, each the mean of its share of them."""
    count = min(width, len(values))
    edges = [len(values) * i // count for i in range(count + 1)] if count else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    span = (high - low) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (mean - low) / span)] for mean in means)


def quantity(value: float) -> str:
    """Three digits and a letter: `998`, `12.3k`, `1.24M`."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def flop_words(value: float) -> str:
    """Three digits and the unit: `312 TFLOP`, `1.21 EFLOP`."""
    for size, letter in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {letter}FLOP"
    return f"{value:.3g} FLOP"


def duration(seconds: float | None) -> str:
    """`0:42`, `1:03:20`, `2d 03:10`; a dash for the unknown."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
