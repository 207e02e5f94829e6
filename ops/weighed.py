"""Attention whose weights are changed before they weigh: plainly, in the memory that kernels save.

    weighed_attention(q, k, v, runs, weigh)      `weigh` gets the softmax's weights, and whose they are, and gives others

For dropout that is chosen from outside, which no kernel can do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ops.cross import Runs

Weigh = Callable[[Float[Tensor, "S H L K"], Int[Tensor, "S L"]], Float[Tensor, "S H L K"]]
"""Other weights in the place of these, of the queries at these places of `q`. What fills up a rectangle has place 0."""

FILLING = 1.5
"""How much larger than its runs a rectangle may be."""


def weighed_attention(
    q: Float[Tensor, "T H E"],
    k: Float[Tensor, "V K E"],
    v: Float[Tensor, "V K E"],
    runs: Runs,
    weigh: Weigh,
    *,
    scale: float | None = None,
) -> Float[Tensor, "T H E"]:
    """Each run of `q` attends to its whole run of `k` and `v` by `weigh` of the softmax; H is a multiple of K and `scale`
    defaults to E ** -0.5.

    Runs of about the same lengths are computed together. Without queries the result is empty and keeps its graph. Raises
    ValueError when runs do not add up to the rows.
    """
    runs.check(len(q), len(k))
    if not len(q):
        return q + 0 * (k.sum() + v.sum())
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    firsts, key_firsts = (list(accumulate(lengths, initial=0)) for lengths in (runs.queries, runs.keys))
    found, places = [], []
    for group in _alike(runs):
        # Places are found where nothing waits for them, nor lacks memory.
        at, there = _rectangle([firsts[n] for n in group], [runs.queries[n] for n in group])
        seen, keys = _rectangle([key_firsts[n] for n in group], [runs.keys[n] for n in group])
        own = there.flatten().nonzero().squeeze(1)
        places.append(at.flatten()[own])
        at, own, seen, keys = (x.to(q.device) for x in (at, own, seen, keys))
        a, b, c = (x.transpose(1, 2) for x in (q[at], k[seen], v[seen]))
        scores = (factor * a @ b.mT).float().masked_fill(~keys[:, None, None], -torch.inf)
        out = weigh(scores.softmax(-1).to(v.dtype), at) @ c
        found.append(out.transpose(1, 2).flatten(0, 1)[own])
    return torch.cat(found)[torch.cat(places).argsort().to(q.device)]


def _rectangle(firsts: Sequence[int], lengths: Sequence[int]) -> tuple[Int[Tensor, "S L"], Bool[Tensor, "S L"]]:
    """The places of runs, one a row, and which of them are there."""
    along = torch.arange(max(lengths))
    there = along < torch.tensor(lengths)[:, None]
    return (torch.tensor(firsts)[:, None] + along).where(there, 0), there


def _alike(runs: Runs) -> Iterator[list[int]]:
    """Numbers of runs that have queries, in groups that waste little where each is filled up to the longest."""
    group: list[int] = []
    longest = most = own = 0
    for n in sorted(
        (n for n, count in enumerate(runs.queries) if count), key=lambda n: (runs.queries[n], runs.keys[n])
    ):
        queries, keys = runs.queries[n], runs.keys[n]
        own += queries * keys
        longest, most = max(longest, queries), max(most, keys)
        if group and (len(group) + 1) * longest * most > FILLING * own:
            yield group
            group, longest, most, own = [], queries, keys, queries * keys
        group.append(n)
    yield group
