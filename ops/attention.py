"""Attention over packs: documents laid end to end, none of which sees another."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@cache
def flash_attention_available() -> bool:
    """Whether the `flash-attn` package and a GPU that it runs on are here."""
    return torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None


def varlen_attention(
    q: Float[Tensor, "T H E"],
    k: Float[Tensor, "T K E"],
    v: Float[Tensor, "T K E"],
    cu_seqlens: Int[Tensor, " bounds"],
    max_seqlen: int,
    scale: float | None = None,
) -> Float[Tensor, "T H E"]:
    """Causal attention inside each document `[cu_seqlens[i], cu_seqlens[i + 1])` of a pack.

    H query heads share K key-value heads (H a multiple of K). `scale` defaults to E ** -0.5. Cost is the sum of squared
    document lengths, not T squared: flash-attn's variable-length kernel where it runs, otherwise torch's SDPA document
    by document. Raises ValueError when the lengths do not add up to T.
    """
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and flash_attention_available():
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

        bounds = cu_seqlens.to(torch.int32)
        return flash_attn_varlen_func(q, k, v, bounds, bounds, max_seqlen, max_seqlen, softmax_scale=scale, causal=True)
    lengths = cu_seqlens.diff().tolist()
    if sum(lengths) != q.shape[0]:
        raise ValueError(
            f"cu_seqlens describe {sum(lengths)} positions and q has {q.shape[0]}: they come from different packs"
        )
    grouped = q.shape[1] != k.shape[1]
    documents = [
        F.scaled_dot_product_attention(
            a.transpose(0, 1), b.transpose(0, 1), c.transpose(0, 1), is_causal=True, scale=scale, enable_gqa=grouped
        ).transpose(0, 1)
        for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    ]
    return torch.cat(documents)
