"""Attention of ranks that share packs (`ops/context.py`).

ring      keys and values go round the ranks, and partial results are merged by their sums of exponentials
          (Ring Attention, arXiv:2310.01889); any number of heads
ulysses   positions are exchanged for heads, each rank attends with some heads over the whole pack, and back
          (DeepSpeed-Ulysses, arXiv:2309.14509); n must divide the heads
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from ops.attention import varlen_attention
from ops.context import Context, heads_fit


def ulysses_attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: tuple[int, ...], scale: float, context: Context
) -> Float[Tensor, "t H E"]:
    """Attention with heads dealt to ranks: two exchanges of all with all, and any backend between.

    Key heads that are too few to deal are repeated. Raises ValueError where `heads_fit` finds a reason.
    """
    n, (t, heads, width) = context.size, q.shape
    if reason := heads_fit("ulysses", n, heads, k.shape[1]):
        raise ValueError(reason)
    if k.shape[1] % n:
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    order = torch.cat([context.positions(n * t, rank) for rank in range(n)]).to(q.device)  # as the exchange lays them
    q, k, v = (
        _exchange(x.unflatten(1, (n, -1)).movedim(1, 0), context).flatten(0, 1)[order.argsort()] for x in (q, k, v)
    )
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=q.device)
    longest = max(b - a for a, b in pairwise(bounds))
    out = varlen_attention(q, k, v, cu_seqlens, longest, scale=scale)
    back = _exchange(out[order].unflatten(0, (n, t)), context)
    return back.movedim(0, 1).reshape(t, heads, width)


def _exchange(x: Float[Tensor, "n t h E"], context: Context) -> Float[Tensor, "n t h E"]:
    """Rank i's x[j] becomes rank j's x[i]."""
    ones = [1] * context.size
    return all_to_all_single_autograd(x.contiguous(), ones, ones, context.group)


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: tuple[int, ...], scale: float, context: Context
) -> Float[Tensor, "t H E"]:
    """Attention with keys and values going round. Memory is that of the rank's own positions and one neighbour's keys."""
    return _ring(q, k, v, bounds, scale, context)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bounds: tuple[int, ...], scale: float, context: Context
    ) -> Tensor:
        precise = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(q.shape, dtype=precise, device=q.device)
        sums = torch.full(q.shape[:2], -torch.inf, dtype=precise, device=q.device)  # logarithms
        held = torch.stack([k, v])
        for step in range(context.size):
            arriving = _pass_on(held, context) if step + 1 < context.size else None
            for rows, columns, causal in pairs(bounds, len(q) // 2, context, step):
                part, weight = _attend(q[rows], held[0, columns], held[1, columns], scale, causal)
                total = torch.logaddexp(sums[rows], weight)
                out[rows] *= (sums[rows] - total).exp_().unsqueeze(-1)
                out[rows] += part * (weight - total).exp_().unsqueeze(-1)
                sums[rows] = total
            held = arriving() if arriving else held
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.rest = bounds, scale, context
        return out

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        """A part's gradients need only its own inputs, and the result and the sums of all parts."""
        slope = slopes[0].contiguous()
        q, k, v, out, sums = ctx.saved_tensors
        bounds, scale, context = ctx.rest
        by_q = torch.zeros_like(q, dtype=sums.dtype)
        held = torch.stack([k, v])
        gathered = torch.zeros_like(
            held, dtype=sums.dtype
        )  # travels with the keys and values that it is the gradient of
        for step in range(context.size):
            arriving = _pass_on(held, context) if step + 1 < context.size else None
            for rows, columns, causal in pairs(bounds, len(q) // 2, context, step):
                q_part, k_part, v_part = _attend_backward(
                    slope[rows], q[rows], held[0, columns], held[1, columns], out[rows], sums[rows], scale, causal
                )
                by_q[rows] += q_part
                gathered[0, columns] += k_part
                gathered[1, columns] += v_part
            held = arriving() if arriving else held
            gathered = _pass_on(gathered, context)() if context.size > 1 else gathered
        return by_q.to(q.dtype), *gathered.to(k.dtype), None, None, None


_ring: Any = torch.compiler.disable(_Ring.apply)
"""A compiler cannot follow what ranks send each other."""


def pairs(bounds: tuple[int, ...], chunk: int, context: Context, step: int) -> Iterator[tuple[slice, slice, bool]]:
    """Products of this rank's queries with the keys held at `step`: (queries, keys, causal), as slices of what is held.

    A chunk with itself is causal, document by document. With an earlier chunk it shares one document at most, the one that
    reaches from there to here: all of its positions here see all of those there, and no mask is needed.
    """
    mine, theirs = context.chunks(context.rank), context.chunks((context.rank - step) % context.size)
    for i, ours in enumerate(mine):
        for j, other in enumerate(theirs):
            first, shift = ours * chunk, (i * chunk - ours * chunk, j * chunk - other * chunk)
            for start, stop in pairwise(bounds):
                if other == ours:
                    rows = columns = (max(start, first), min(stop, first + chunk))
                elif other < ours and start < (other + 1) * chunk and stop > first:
                    rows = (first, min(stop, first + chunk))
                    columns = (max(start, other * chunk), (other + 1) * chunk)
                else:
                    continue
                if rows[0] < rows[1]:
                    yield (
                        slice(rows[0] + shift[0], rows[1] + shift[0]),
                        slice(columns[0] + shift[1], columns[1] + shift[1]),
                        other == ours,
                    )


def _pass_on(x: Tensor, context: Context) -> Callable[[], Tensor]:
    """Begin to send `x` to the next rank; the result waits for what the one before sends."""
    arriving = torch.empty_like(x)
    to, of = ((context.rank + step) % context.size for step in (1, -1))
    under_way = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, x.contiguous(), group=context.group, group_peer=to),
            dist.P2POp(dist.irecv, arriving, group=context.group, group_peer=of),
        ]
    )

    def arrived() -> Tensor:
        for work in under_way:
            work.wait()
        return arriving

    return arrived


def _heads(x: Tensor, heads: int) -> Tensor:
    """(t, K, E) -> (1, H, t, E), key heads repeated."""
    return x.repeat_interleave(heads // x.shape[1], 1).transpose(0, 1).unsqueeze(0)


def _fused(q: Tensor) -> bool:
    """Whether torch's flash kernels take it; they alone give back the sums of exponentials and take them in backward."""
    return q.device.type == "cpu" or (q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16))


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of (t, H, E) to (s, K, E), and the logarithm of each query's sum of exponentials (t, H)."""
    a, b, c = (_heads(x, q.shape[1]) for x in (q, k, v))
    aten = torch.ops.aten
    if not _fused(q):
        scores = _scores(a, b, scale, causal)
        sums = scores.logsumexp(-1)
        out = (scores - sums.unsqueeze(-1)).exp() @ c.to(scores.dtype)
    elif q.device.type == "cpu":
        out, sums = aten._scaled_dot_product_flash_attention_for_cpu(a, b, c, 0.0, causal, scale=scale)
    else:
        out, sums, *_ = aten._scaled_dot_product_flash_attention(a, b, c, 0.0, causal, False, scale=scale)
    return out[0].transpose(0, 1), sums[0].transpose(0, 1)


def _attend_backward(
    slope: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q (t, H, E), k and v (s, K, E), where `out` and `sums` may be over more keys than these."""
    heads, kv_heads = q.shape[1], k.shape[1]
    g, a, b, c, o = (_heads(x, heads) for x in (slope, q, k, v, out))
    lse = sums.transpose(0, 1).unsqueeze(0).contiguous()
    aten = torch.ops.aten
    if not _fused(q):
        weights = (_scores(a, b, scale, causal) - lse.unsqueeze(-1)).exp()
        g, a, b, c, o = (x.to(weights.dtype) for x in (g, a, b, c, o))
        rise = weights * (g @ c.transpose(-1, -2) - (g * o).sum(-1, keepdim=True)) * scale
        parts = rise @ b, rise.transpose(-1, -2) @ a, weights.transpose(-1, -2) @ g
    elif q.device.type == "cpu":
        parts = aten._scaled_dot_product_flash_attention_for_cpu_backward(g, a, b, c, o, lse, 0.0, causal, scale=scale)
    else:
        none = torch.zeros(0, device=q.device)  # bounds and the state of random numbers: there are none
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        parts = aten._scaled_dot_product_flash_attention_backward(
            g, a, b, c, o, lse, none, none, a.shape[2], b.shape[2], 0.0, causal, state, state, scale=scale
        )
    by_q, by_k, by_v = (x[0].transpose(0, 1) for x in parts)
    by_k, by_v = (x.unflatten(1, (kv_heads, heads // kv_heads)).sum(2) for x in (by_k, by_v))
    return by_q, by_k, by_v


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if not causal:
        return scores
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
