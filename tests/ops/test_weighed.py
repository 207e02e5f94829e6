"""Attention whose weights somebody changes: without a change it is attention, and whose weight is whose never goes astray."""

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops.cross import Runs, cross_attention
from ops.weighed import weighed_attention

RUNS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=6)


def drawn(runs: Runs, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(runs.queries) * 97 + sum(runs.keys))

    def some(rows: int, heads: int) -> Tensor:
        return torch.randn(rows, heads, 8, generator=generator).requires_grad_()

    return some(sum(runs.queries), 4), some(sum(runs.keys), kv_heads), some(sum(runs.keys), kv_heads)


@settings(max_examples=40, deadline=None)
@given(RUNS, st.sampled_from([2, 4]), st.sampled_from([None, 0.7]))
def test_unchanged_it_is_attention(lengths: list[tuple[int, int]], kv_heads: int, scale: float | None) -> None:
    runs = Runs(*zip(*lengths, strict=True))
    found = []
    for attend in (
        lambda q, k, v: weighed_attention(q, k, v, runs, lambda weights, _: weights, scale=scale),
        lambda q, k, v: cross_attention(q, k, v, runs, scale=scale),
    ):
        inputs = drawn(runs, kv_heads)
        out = attend(*inputs)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found.append((out, *(x.grad for x in inputs)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(RUNS)
def test_each_weight_is_changed_by_its_query_key_and_head(lengths: list[tuple[int, int]]) -> None:
    runs = Runs(*zip(*lengths, strict=True))
    q, k, v = drawn(runs, 4)

    def factors(at: Tensor, keys: int) -> Tensor:
        """Of each head, query and key of its own."""
        heads, places = torch.arange(4)[:, None, None], torch.arange(keys)
        return torch.sin(1.0 + at[..., None, :, None] * 3.1 + heads * 0.7 + places * 1.9)

    out = weighed_attention(q, k, v, runs, lambda weights, at: weights * factors(at, weights.shape[-1]))
    starts, key_starts = (list(accumulate(ns, initial=0)) for ns in (runs.queries, runs.keys))
    for n, (queries, keys) in enumerate(lengths):
        at = torch.arange(starts[n], starts[n] + queries)
        seen = slice(key_starts[n], key_starts[n] + keys)
        scores = torch.einsum("ihe,jhe->hij", q[at], k[seen]) * 8**-0.5
        expected = torch.einsum("hij,jhe->ihe", scores.softmax(-1) * factors(at, keys), v[seen])
        torch.testing.assert_close(out[at], expected, rtol=1e-4, atol=1e-4)


def test_runs_of_another_pack_are_refused() -> None:
    q, k, v = drawn(Runs((3,), (2,)), 4)
    with pytest.raises(ValueError, match="they come from different packs"):
        weighed_attention(q, k, v, Runs((2,), (2,)), lambda weights, _: weights)
