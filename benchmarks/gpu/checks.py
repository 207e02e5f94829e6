"""Relative errors |a - b| / |b| of results and all gradients, the largest of them: in bfloat16 of the same
bfloat16 numbers computed in float64 by the definition, in float64 of rounding alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import Row, alone
from benchmarks.gpu.cases import Case, Found
from benchmarks.gpu.device import DEVICE, DOUBLE, GROUP, HALF, without_liger
from benchmarks.gpu.inputs import bounds, drawn, lengths
from benchmarks.gpu.sizes import TOY, Sizes
from benchmarks.gpu.training import model_of, pack_of, recipe_of
from cluster.engines import build_engine
from mllm.recipe import Dtype
from ops.attention import BACKENDS, WITH_BLOCKS, Backend, available, varlen_attention
from ops.context import Context
from ops.losses import Fused, linear_cross_entropy
from ops.ring import ring_attention
from pipelines.types import NOT_LEARNED


def cases(sizes: Sizes) -> Iterator[Case]:
    def case(name: str, tolerance: float, run: Callable[[], Found]) -> Case:
        return Case((Row(name, "relative error", [], at_most=tolerance),), lambda: [run()])

    rng = random.Random(0)
    mixed = lengths(sizes.check, rng)
    ones = [1, 1, *lengths(sizes.check - 4, rng), 1, 1]
    packs = {
        "mixed lengths": (mixed, 4, 4, False),
        "documents of one token": (ones, 4, 4, False),
        "grouped queries": (mixed, 8, 2, False),
        "blocks": (mixed, 8, 2, True),
    }
    for backend in BACKENDS:
        if backend == "plain":
            continue
        for name, (each, heads, kv_heads, blocks) in packs.items():
            if blocks and backend not in WITH_BLOCKS:
                continue
            run = partial(attention_error, backend, HALF, each, heads, kv_heads, blocks)
            yield case(f"{backend}: {name}, bfloat16", 2e-2, run)
            if backend == "sdpa":
                run = partial(attention_error, backend, DOUBLE, each, heads, kv_heads, blocks)
                yield case(f"{backend}: {name}, float64", 1e-10, run)
    yield case("fused loss beside full logits, float64", 1e-10, partial(loss_error, "torch", DOUBLE))
    yield case("fused loss beside full logits, bfloat16", 2e-2, partial(loss_error, "torch", HALF))
    yield case("liger: loss beside full logits, bfloat16", 2e-2, partial(loss_error, "liger", HALF))
    yield case("ring attention of one rank, bfloat16", 2e-2, partial(ring_error, HALF, mixed))
    yield case("ring attention of one rank, float64", 1e-10, partial(ring_error, DOUBLE, mixed))
    rows = (
        Row("loss of a step in bfloat16, beside float32", "relative error", [], at_most=2e-2),
        Row("gradient norm of a step in bfloat16, beside float32", "relative error", [], at_most=5e-2),
    )
    yield Case(rows, half_step_errors)


def attention_error(
    backend: Backend, dtype: torch.dtype, each: Sequence[int], heads: int, kv_heads: int, blocked: bool
) -> Found:
    if reason := available()[backend]:
        return [], reason
    width = 64
    inputs = [drawn(sum(each), n, width, dtype=dtype, seed=i) for i, n in enumerate((heads, kv_heads, kv_heads))]
    slope = drawn(sum(each), heads, width, dtype=dtype, seed=3)
    # by turns in none and in one of two
    blocks = torch.arange(sum(each), device=DEVICE) // 8 % 3 - 1 if blocked else None

    def attend(by: Backend) -> Callable[..., Tensor]:
        return partial(varlen_attention, cu_seqlens=bounds(each), max_seqlen=max(each), blocks=blocks, backend=by)

    wanted = gradients(attend("plain"), [x.double() for x in inputs], slope)
    return worst(gradients(attend(backend), inputs, slope), wanted)


def loss_error(by: Fused, dtype: torch.dtype) -> Found:
    if by == "liger" and (reason := without_liger(dtype)):
        return [], reason
    tokens, width, words = 300, 64, 1000
    inputs = [drawn(tokens, width, dtype=dtype, seed=0), drawn(words, width, dtype=dtype, seed=1) / 8]
    labels = torch.randint(words, (tokens,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    labels[::5] = NOT_LEARNED

    def full(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ weight.T, labels, reduction="sum")

    wanted = gradients(full, [x.double() for x in inputs])
    return worst(gradients(lambda h, w: linear_cross_entropy(h, w, labels, chunk=64, by=by).sum, inputs), wanted)


def ring_error(dtype: torch.dtype, each: Sequence[int]) -> Found:
    each = [*each, *[1] * (sum(each) % 2)]  # ranks hold two chunks alike
    inputs = [drawn(sum(each), n, 64, dtype=dtype, seed=i) for i, n in enumerate((8, 2, 2))]
    slope = drawn(sum(each), 8, 64, dtype=dtype, seed=3)
    plain = partial(varlen_attention, cu_seqlens=bounds(each), max_seqlen=max(each), backend="plain")
    wanted = gradients(plain, [x.double() for x in inputs], slope)
    with alone(GROUP):
        group = dist.group.WORLD
        assert isinstance(group, dist.ProcessGroup)
        host = tuple(bounds(each).tolist())
        ring = partial(ring_attention, bounds=host, scale=64**-0.5, context=Context(group, "ring"))
        return worst(gradients(ring, inputs, slope), wanted)


def half_step_errors() -> list[Found]:
    reports = []
    ways: tuple[tuple[Dtype, Backend | None], ...] = (("float32", "sdpa"), ("bfloat16", None))
    for dtype, backend in ways:
        recipe = recipe_of(TOY, "toy", "all trained", 128, dtype=dtype)
        with alone(GROUP):
            engine = build_engine(model_of(recipe), replace(recipe.stages[0], attention=backend), 1, DEVICE)
            reports.append(engine.train_step([pack_of(recipe)], 1.0))
    exact, half = reports
    return [
        ([abs(half.loss / exact.loss - 1)], f"loss {exact.loss:.4f}"),
        ([abs(half.grad_norm / exact.grad_norm - 1)], f"norm {exact.grad_norm:.4f}"),
    ]


def worst(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Found:
    """The largest relative error."""
    return [
        max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, wanted, strict=True))
    ], ""


def gradients(call: Callable[..., Tensor], inputs: Sequence[Tensor], slope: Tensor | None = None) -> list[Tensor]:
    """The result of `call`, and its gradient by each of its inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = call(*leaves)
    out.backward(None if slope is None else slope.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
