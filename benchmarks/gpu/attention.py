"""Forward and backward over a pack of documents of mixed lengths, causal, grouped queries. FLOPs are those
of pairs that see each other: 4 for each pair, head and number of a head forward, 2.5 times as many backward.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

from benchmarks.common import Row
from benchmarks.gpu.cases import Case, Found
from benchmarks.gpu.device import COMPUTED, DTYPE
from benchmarks.gpu.inputs import bounds, drawn, lengths
from benchmarks.gpu.measuring import seconds
from benchmarks.gpu.sizes import Sizes
from ops.attention import BACKENDS, Backend, available, varlen_attention


def cases(sizes: Sizes) -> Iterator[Case]:
    for tokens in sizes.packs:
        for backend in BACKENDS:
            if backend == "plain":
                continue
            name = f"{backend}, {tokens:,} tokens"
            rows = (Row(f"{name}: time", "ms", []), Row(f"{name}: speed", "TFLOP/s", []))
            yield Case(rows, partial(attention_times, sizes, backend, tokens))


def attention_times(sizes: Sizes, backend: Backend, tokens: int) -> list[Found]:
    if reason := available()[backend]:
        return [([], reason)] * 2
    heads, kv_heads, width = sizes.heads
    each = lengths(tokens, random.Random(0))
    q, k, v = (
        drawn(tokens, n, width, dtype=COMPUTED, seed=i).requires_grad_()
        for i, n in enumerate((heads, kv_heads, kv_heads))
    )
    slope = drawn(tokens, heads, width, dtype=COMPUTED, seed=3)
    documents, longest = bounds(each), max(each)

    def act() -> None:
        varlen_attention(q, k, v, documents, longest, backend=backend).backward(slope)
        q.grad = k.grad = v.grad = None

    times = seconds(act, 2 * sizes.repetitions)
    flops = 3.5 * 4 * heads * width * sum(n * (n + 1) // 2 for n in each)
    note = f"{len(each)} documents, the longest {longest:,}; {heads} heads of {width}, {kv_heads} of keys; {DTYPE}"
    return [([1e3 * t for t in times], note), ([flops / t / 1e12 for t in times], "")]
