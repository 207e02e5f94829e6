"""Attention over packs: documents laid end to end, none of which sees another.

One call, `varlen_attention`, and whatever computes it:

    plain     the definition, all T x T scores at once; what the others are tested against
    sdpa      torch's scaled_dot_product_attention, document by document, or all at once where they are of one length; anywhere
    flex      torch's flex_attention, one compiled kernel for a pack, blocks too; GPU
    varlen    torch's own variable-length kernel; GPU, 16 bits
    flash2    the package flash-attn; flash3: flash-attn-3 (Hopper); flash4: flash-attn-4 (Hopper, Blackwell)

Without a word the fastest that can is taken; `available` says why another cannot.
"""
# Kernels for GPUs are not on every machine:
# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Backend = Literal["flash4", "flash3", "flash2", "varlen", "flex", "sdpa", "plain"]

BACKENDS: tuple[Backend, ...] = get_args(Backend)
"""From the one that is taken first to the one that is never taken unasked."""

WITH_BLOCKS: tuple[Backend, ...] = ("flex", "sdpa", "plain")
"""Backends that can let parts of a document see each other both ways."""


@cache
def available() -> dict[Backend, str]:
    """Of each backend why this machine cannot run it; an empty word where it can."""
    no_gpu = "" if torch.cuda.is_available() else "needs a GPU"
    generation = torch.cuda.get_device_capability()[0] if not no_gpu else 0
    return {
        "flash4": no_gpu or _package("flash_attn.cute", "flash-attn-4") or _since(9, generation),
        "flash3": no_gpu or _package("flash_attn_interface", "flash-attn-3") or _since(9, generation),
        "flash2": no_gpu or _package("flash_attn_2_cuda", "flash-attn") or _since(8, generation),
        "varlen": no_gpu or _package("torch.nn.attention.varlen", "torch 2.10 or later") or _since(8, generation),
        "flex": no_gpu and f"{no_gpu}: on a CPU torch has no backward for it",
        "sdpa": "",
        "plain": "",
    }


def _package(module: str, name: str) -> str:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # the package around it is missing
        found = None
    return "" if found else f"needs {name}"


def _since(least: int, generation: int) -> str:
    return "" if generation >= least else f"needs compute capability {least}.0 or later"


def chosen(device: torch.device, dtype: torch.dtype, blocks: bool = False) -> Backend:
    """The backend that `varlen_attention` takes by itself."""
    if device.type != "cuda":
        return "sdpa"
    half = dtype in (torch.float16, torch.bfloat16)
    able = available()
    for backend in BACKENDS:
        if able[backend] or (blocks and backend not in WITH_BLOCKS):
            continue
        if half or backend in WITH_BLOCKS:
            return backend
    return "sdpa"


def varlen_attention(
    q: Float[Tensor, "T H E"],
    k: Float[Tensor, "T K E"],
    v: Float[Tensor, "T K E"],
    cu_seqlens: Int[Tensor, " bounds"],
    max_seqlen: int,
    *,
    scale: float | None = None,
    causal: bool = True,
    blocks: Int[Tensor, " T"] | None = None,
    slopes: Float[Tensor, " H"] | None = None,
    backend: Backend | None = None,
) -> Float[Tensor, "T H E"]:
    """Attention inside each document `[cu_seqlens[i], cu_seqlens[i + 1])` of a pack, which may hold none.

    H query heads share K key-value heads (H a multiple of K). `scale` defaults to E ** -0.5. A position sees itself and what
    comes before it; with `causal` off, its whole document. `blocks` adds to the causal view: positions of one document with
    the same number see each other, whichever comes first, and -1 is in no block. A prefix (PrefixLM, arXiv:1910.10683,
    3.2.1) is a block of its own; so is each picture whose patches see each other. `slopes` are ALiBi's (arXiv:2108.12409, 3):
    a head's score falls by its slope for each position between the two.

    Cost is the sum of squared document lengths, except for `plain`. Raises ValueError when the lengths do not add up to T
    (where they are looked at: GPU kernels do not), and when the `backend` asked for cannot run this here.
    """
    if backend is None:
        backend = chosen(q.device, q.dtype, blocks is not None or slopes is not None)
    elif reason := available()[backend]:
        raise ValueError(f"attention by {backend!r} {reason}; leave the backend away for {chosen(q.device, q.dtype)!r}")
    if blocks is not None and backend not in WITH_BLOCKS:
        raise ValueError(f"attention by {backend!r} knows no blocks; those that do: {', '.join(WITH_BLOCKS)}")
    if slopes is not None and backend not in WITH_BLOCKS:
        raise ValueError(f"attention by {backend!r} knows no slopes; those that do: {', '.join(WITH_BLOCKS)}")
    if blocks is not None and not causal:
        raise ValueError("blocks widen a causal view, and without `causal` all of a document is seen already")
    if not len(q):  # a part of every pack's graph, even of an empty one's: no rank may lack gradients that others have
        return q + 0 * (k.sum() + v.sum())
    if backend == "sdpa":
        return _sdpa(q, k, v, _lengths(cu_seqlens, len(q)), scale, causal, blocks, slopes)
    if backend == "plain":
        return _plain(q, k, v, _documents(cu_seqlens, len(q)), scale, causal, blocks, slopes)
    if backend == "flex":
        return _flex(q, k, v, cu_seqlens, scale, causal, blocks, slopes)
    return flash(backend, q, k, v, cu_seqlens.to(torch.int32), max_seqlen, scale, causal)


def _lengths(cu_seqlens: Tensor, positions: int) -> list[int]:
    lengths = cu_seqlens.diff().tolist()
    if sum(lengths) != positions:
        raise ValueError(
            f"cu_seqlens describe {sum(lengths)} positions and q has {positions}: they come from different packs"
        )
    return lengths


def _documents(cu_seqlens: Tensor, positions: int) -> Int[Tensor, " T"]:
    """The number of each position's document."""
    counts = torch.tensor(_lengths(cu_seqlens, positions), device=cu_seqlens.device)
    return torch.arange(len(counts), device=cu_seqlens.device).repeat_interleave(counts)


def seen(positions: Int[Tensor, " n"], blocks: Int[Tensor, " n"] | None, causal: bool) -> Bool[Tensor, "n n"]:
    """Which key (column) each query (row) of one document sees."""
    if not causal:
        return torch.ones(len(positions), len(positions), dtype=torch.bool, device=positions.device)
    view = positions[:, None] >= positions[None]
    return view if blocks is None else view | ((blocks[:, None] == blocks[None]) & (blocks[:, None] >= 0))


def falling(slopes: Float[Tensor, " H"], length: int) -> Float[Tensor, "H n n"]:
    """What ALiBi adds to the scores of one document of `length` positions: slope * (key - query)."""
    at = torch.arange(length, device=slopes.device)
    return slopes[:, None, None] * (at[None] - at[:, None])


def _plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor,
    scale: float | None,
    causal: bool,
    blocks: Tensor | None,
    slopes: Tensor | None,
) -> Tensor:
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = torch.einsum("ihe,jhe->hij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if slopes is not None:
        scores = scores + falling(slopes, len(q)).to(scores.dtype)
    view = seen(torch.arange(len(q), device=q.device), blocks, causal) & (documents[:, None] == documents[None])
    return torch.einsum("hij,jhe->ihe", scores.masked_fill(~view, -torch.inf).softmax(-1), v)


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    scale: float | None,
    causal: bool,
    blocks: Tensor | None,
    slopes: Tensor | None,
) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    if blocks is None and slopes is None and len(set(lengths)) == 1 < len(lengths):  # documents alike are a batch
        a, b, c = (x.unflatten(0, (len(lengths), -1)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(a, b, c, is_causal=causal, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(0, 1)
    parts = [None] * len(lengths) if blocks is None else blocks.split(lengths)
    outputs = []
    for a, b, c, part in zip(q.split(lengths), k.split(lengths), v.split(lengths), parts, strict=True):
        mask = None if part is None else seen(torch.arange(len(a), device=q.device), part, causal)
        if slopes is not None:
            view = seen(torch.arange(len(a), device=q.device), part, causal)
            mask = falling(slopes, len(a)).masked_fill(~view, -torch.inf).to(q.dtype)
        heads = (x.transpose(0, 1).unsqueeze(0) for x in (a, b, c))  # torch's fused kernels want a batch
        out = F.scaled_dot_product_attention(
            *heads, attn_mask=mask, is_causal=causal and mask is None, scale=scale, enable_gqa=grouped
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


class _Mask:
    """flex's mask of the pack at hand: all layers share it, and making it takes as long as some layers' attention."""

    def __init__(self) -> None:
        self.of: tuple[Tensor, Tensor | None, bool] | None = None
        self.mask: Any = None

    def __call__(self, cu_seqlens: Tensor, positions: int, causal: bool, blocks: Tensor | None) -> Any:
        key = (cu_seqlens, blocks, causal)
        if self.of is None or any(a is not b for a, b in zip(self.of, key, strict=True)):
            self.of, self.mask = key, _block_mask(cu_seqlens, positions, causal, blocks)
        return self.mask


_mask = _Mask()


def _block_mask(cu_seqlens: Tensor, positions: int, causal: bool, blocks: Tensor | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    at = torch.arange(positions, device=cu_seqlens.device)
    documents = torch.searchsorted(cu_seqlens[1:].contiguous(), at, right=True)

    def view(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001 -- flex's signature
        same = documents[query] == documents[key]
        if not causal:
            return same
        if blocks is None:
            return same & (query >= key)
        return same & ((query >= key) | ((blocks[query] == blocks[key]) & (blocks[query] >= 0)))

    return create_block_mask(view, None, None, positions, positions, device=str(cu_seqlens.device))


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float | None,
    causal: bool,
    blocks: Tensor | None,
    slopes: Tensor | None,
) -> Tensor:
    heads = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    mask = _mask(cu_seqlens, len(q), causal, blocks)
    grouped = q.shape[1] != k.shape[1]

    def fallen(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001 -- flex's
        return score + slopes[head] * (key - query)  # type: ignore[index]  # only where there are slopes

    of_scores = None if slopes is None else fallen
    compiled = _compiled_flex()
    return compiled(*heads, score_mod=of_scores, block_mask=mask, scale=scale, enable_gqa=grouped)[0].transpose(0, 1)


def flash(
    backend: Backend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    longest: int,
    scale: float | None,
    causal: bool,
    key_bounds: Tensor | None = None,
    longest_keys: int | None = None,
) -> Tensor:
    """Kernels that read the bounds themselves, int32; keys may have bounds of their own where the view is not causal.

    Imported here: none of them is on every machine.
    """
    of_keys = bounds if key_bounds is None else key_bounds
    most = longest if longest_keys is None else longest_keys
    match backend:
        case "flash4":
            from flash_attn.cute import flash_attn_varlen_func as flash4

            out = flash4(q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=of_keys, softmax_scale=scale, causal=causal)
        case "flash3":
            from flash_attn_interface import flash_attn_varlen_func as flash3

            out = flash3(q, k, v, bounds, of_keys, longest, most, softmax_scale=scale, causal=causal)
        case "flash2":
            from flash_attn import flash_attn_varlen_func as flash2

            out = flash2(q, k, v, bounds, of_keys, longest, most, softmax_scale=scale, causal=causal)
        case _:
            from torch.nn.attention.varlen import varlen_attn

            window = (-1, 0) if causal else (-1, -1)
            grouped = q.shape[1] != k.shape[1]
            out = varlen_attn(
                q, k, v, bounds, of_keys, longest, most, scale=scale, window_size=window, enable_gqa=grouped
            )
    return out[0] if isinstance(out, tuple) else out
