"""What a GPU makes of attention, losses and training steps: checks of the numbers first, then times, memory and MFU.

    python -m benchmarks.gpu                     everything, to benchmarks/results/gpu-NAME.md
    python -m benchmarks.gpu checks attention    some sections; the others keep their last result
    python -m benchmarks.gpu --toy               the same code at toy sizes, anywhere; so too where there is no GPU
    python -m benchmarks.gpu --list              the table of what would be measured, to benchmarks/results/gpu.md

It needs neither Ray nor data nor weights: models are random, packs are drawn from a fixed seed. A row is written as soon as it
is measured. What cannot be had says why in its note; the exit status is 1 where a check or a measurement failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import CACHE, HERE, Row, Section, alone, number, peak_bytes, ratios, scratch, table
from cluster.checkpoint import Manifest, TrainState
from cluster.engines import build_engine, finite
from cluster.fullest import fullest
from cluster.memory import memory
from cluster.mfu import peak_flops
from cluster.recompute import recompute
from cluster.saver import Saver
from mllm.connectors import MLP
from mllm.encoders import ClipVision, Encoder
from mllm.flops import Work, cost_of, work_of
from mllm.lm import CausalLM, Llama
from mllm.objectives import NextToken
from mllm.recipe import FSDP, Dtype, Full, Recipe, Recompute, Source, Stage, Steps, Tuning
from mllm.tune import apply_tuning
from mllm.vlm import VLM, VisionLanguageModel
from ops.attention import BACKENDS, WITH_BLOCKS, Backend, available, varlen_attention
from ops.context import Context
from ops.losses import Fused, fused_by, liger_is_there, linear_cross_entropy
from ops.ring import ring_attention
from pipelines.corpora import TextOnly
from pipelines.place import Place
from pipelines.tiling import Pad
from pipelines.types import IMAGE_TOKEN, NOT_LEARNED, Batch, Pack

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
GROUP = "cpu:gloo,cuda:nccl" if CUDA else "gloo"
HALF, DOUBLE = torch.bfloat16, torch.float64
DTYPE: Dtype = "bfloat16" if CUDA else "float32"
COMPUTED = torch.bfloat16 if CUDA else torch.float32

GIB = 2**30

ABOUT = {
    "checks": """Relative errors |a - b| / |b| of results and all gradients, the largest of them: in bfloat16 of the same
bfloat16 numbers computed in float64 by the definition, in float64 of rounding alone.""",
    "attention": """Forward and backward over a pack of documents of mixed lengths, causal, grouped queries. FLOPs are those
of pairs that see each other: 4 for each pair, head and number of a head forward, 2.5 times as many backward.""",
    "loss": """Forward and backward of the fused loss, by torch and by Liger's kernel, beside `F.cross_entropy` of full logits in
float32, as transformers has it, every position learned. Memory is that above what lies there before.""",
    "engine": """A step of `FSDPEngine` over one full pack on one device: half visual tokens, documents of mixed lengths,
random weights. Nothing is computed again where that fits, else each layer. The bare loop is what a person writes without an
engine: the same model class, attention, objective and recomputation, weights and gradients in bfloat16, float32 master weights
that fused AdamW steps, gradients clipped. Fair because it computes in the engine's types; autocast would keep activations in
float32 and could not take most attention kernels. The two run one after the other, since together they would not fit. MFU is
the model FLOPs of the pack (PaLM's, nothing computed again counts) over time and the data sheet's peak; on a CPU over what
its products reach. Peak memory is that of a step with all weights and states; foretold is `cluster.memory`, without a GPU.
Data wait is the share of the step in which its pack becomes a batch on the device.""",
    "checkpoint": """Seconds in which `cluster.saver.Saver` holds a run up: weights, and the moments of what is trained,
float32, to the local disk. The copy to the host is what training waits for; the speed is that of the writing beside it.""",
}


@dataclass(frozen=True)
class Sizes:
    """How large everything is. `packs` of attention and `steps` of the engine are in tokens."""

    packs: tuple[int, ...]
    heads: tuple[int, int, int]
    losses: tuple[int, int, tuple[int, ...]]
    tower: ClipVision
    decoders: dict[str, Llama]
    tunings: dict[str, tuple[str, ...]]
    steps: tuple[int, ...]
    check: int
    repetitions: int


SIGLIP = ClipVision(
    hidden_size=1152,
    layers=27,
    heads=16,
    intermediate_size=4304,
    patch=14,
    image=378,  # 384, of which its 27 x 27 patches see no more
    activation="gelu_pytorch_tanh",
)

FULL = Sizes(
    packs=(4096, 8192, 16384, 32768),
    heads=(12, 2, 128),
    losses=(8192, 2048, (32_000, 152_064)),
    tower=SIGLIP,
    decoders={
        "1.5B": Llama(
            vocab_size=151_936,
            hidden_size=1536,
            layers=28,
            heads=12,
            kv_heads=2,
            intermediate_size=8960,
            context=32768,
            tied=True,
        ),
        "7B": Llama(
            vocab_size=152_064,
            hidden_size=3584,
            layers=28,
            heads=28,
            kv_heads=4,
            intermediate_size=18944,
            context=32768,
        ),
    },
    tunings={
        "connector alone": ("connector",),
        "tower frozen": ("connector", "lm"),
        "all trained": ("encoder", "connector", "lm"),
    },
    steps=(4096, 8192, 16384, 32768),
    check=1024,
    repetitions=5,
)

TOY = Sizes(
    packs=(128,),
    heads=(4, 2, 16),
    losses=(64, 32, (500,)),
    tower=ClipVision(hidden_size=32, layers=2, heads=2, intermediate_size=64, patch=14, image=28),
    decoders={
        "toy": Llama(
            vocab_size=300, hidden_size=64, layers=2, heads=4, kv_heads=2, intermediate_size=128, context=256, tied=True
        )
    },
    tunings={"tower frozen": ("connector", "lm"), "all trained": ("encoder", "connector", "lm")},
    steps=(128,),
    check=96,
    repetitions=2,
)

Found = tuple[Sequence[float], str]
"""Values of a row, none where they could not be had, and its note."""


@dataclass(frozen=True)
class Case:
    """Rows that are measured together, still empty, and how."""

    section: str
    rows: tuple[Row, ...]
    run: Callable[[], Sequence[Found]]


def cases(sizes: Sizes) -> list[Case]:
    """All that is measured at these sizes, in the order in which it is."""
    return [*_checks(sizes), *_attention(sizes), *_losses(sizes), *_steps(sizes), *_saving(sizes)]


def _checks(sizes: Sizes) -> Iterator[Case]:
    def case(name: str, tolerance: float, run: Callable[[], Found]) -> Case:
        return Case("checks", (Row(name, "relative error", [], at_most=tolerance),), lambda: [run()])

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
    yield Case("checks", rows, half_step_errors)


def _attention(sizes: Sizes) -> Iterator[Case]:
    for tokens in sizes.packs:
        for backend in BACKENDS:
            if backend == "plain":
                continue
            name = f"{backend}, {tokens:,} tokens"
            rows = (Row(f"{name}: time", "ms", []), Row(f"{name}: speed", "TFLOP/s", []))
            yield Case("attention", rows, partial(attention_times, sizes, backend, tokens))


def _losses(sizes: Sizes) -> Iterator[Case]:
    tokens, width, vocabularies = sizes.losses
    for words in vocabularies:
        name = f"{tokens:,} tokens, {words:,} words"
        rows = (
            Row(f"{name}: fused", "ms", []),
            Row(f"{name}: full logits", "ms", []),
            Row(f"{name}: time, fused / full", "ratio", []),
            Row(f"{name}: memory, fused", "GiB", []),
            Row(f"{name}: memory, full logits", "GiB", []),
            Row(f"{name}: memory, fused / full", "ratio", []),
        )
        yield Case("loss", rows, partial(loss_times, tokens, width, words, sizes.repetitions))
        rows = (Row(f"liger, {name}: time", "ms", []), Row(f"liger, {name}: memory", "GiB", []))
        yield Case("loss", rows, partial(liger_times, tokens, width, words, sizes.repetitions))


STEP = (
    ("step", "s"),
    ("speed", "tokens/s"),
    ("MFU", "share"),
    ("peak memory", "GiB"),
    ("foretold memory", "GiB"),
    ("foretold / measured", "ratio"),
    ("data wait", "share"),
    ("bare torch step", "s"),
    ("engine / bare torch", "ratio"),
    ("bare torch peak memory", "GiB"),
)


def _steps(sizes: Sizes) -> Iterator[Case]:
    for decoder in sizes.decoders:
        for tuning in sizes.tunings:
            for tokens in sizes.steps:
                rows = tuple(Row(f"{decoder}, {tuning}, {tokens:,} tokens: {what}", unit, []) for what, unit in STEP)
                yield Case("engine", rows, partial(step_times, sizes, decoder, tuning, tokens))


def _saving(sizes: Sizes) -> Iterator[Case]:
    decoder = next(iter(sizes.decoders))
    rows = (
        Row(f"{decoder}, tower frozen: stall of a checkpoint", "s", []),
        Row(f"{decoder}, tower frozen: size of a checkpoint", "GB", []),
        Row(f"{decoder}, tower frozen: speed", "GB/s", []),
    )
    yield Case("checkpoint", rows, partial(checkpoint_stall, sizes, decoder))


def lengths(tokens: int, rng: random.Random) -> list[int]:
    """Documents' lengths, from few to half of all, evenly by their logarithm, that add up to `tokens`."""
    found: list[int] = []
    left = tokens
    while left:
        drawn = round(2 ** rng.uniform(4, np.log2(max(32, tokens // 2))))
        found.append(min(left, drawn))
        left -= found[-1]
    return found


def bounds(each: Sequence[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(each)], dtype=torch.int32, device=DEVICE)


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def free() -> None:
    gc.collect()
    if CUDA:
        torch.compiler.reset()  # after so many shapes torch would leave flex uncompiled, all scores at once
        torch.cuda.empty_cache()


def seconds(act: Callable[[], Any], repetitions: int, warm_up: int = 2) -> list[float]:
    """Seconds of each call, everything that it starts on the device included, after some calls that do not count."""
    times = []
    for _ in range(warm_up + repetitions):
        wait()
        started = time.perf_counter()
        act()
        wait()
        times.append(time.perf_counter() - started)
    return times[warm_up:]


def above(act: Callable[[], Any]) -> int:
    """The most bytes that `act` holds on the device above what lies there before."""
    if not CUDA:
        return peak_bytes(act)
    free()
    wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    act()
    wait()
    return torch.cuda.max_memory_allocated() - before


def steps_of(build: Callable[[], Callable[[], Any]], repetitions: int) -> tuple[list[float], int]:
    """Seconds of the steps that `build` gives, and the most bytes that one holds, weights and states among them."""
    if CUDA:
        step = build()
        seconds(step, 0)
        torch.cuda.reset_peak_memory_stats()
        return seconds(step, repetitions, 0), torch.cuda.max_memory_allocated()

    def twice() -> None:  # the profiler sees only what comes while it looks
        step = build()
        step()
        step()

    held = peak_bytes(twice)
    return seconds(build(), repetitions), held


def worst(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Found:
    """The largest relative error."""
    return [
        max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, wanted, strict=True))
    ], ""


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers; a seed gives the same ones whenever it is asked."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    return made.to(DEVICE, dtype)


def gradients(call: Callable[..., Tensor], inputs: Sequence[Tensor], slope: Tensor | None = None) -> list[Tensor]:
    """The result of `call`, and its gradient by each of its inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = call(*leaves)
    out.backward(None if slope is None else slope.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def attention_error(
    backend: Backend, dtype: torch.dtype, each: Sequence[int], heads: int, kv_heads: int, blocked: bool
) -> Found:
    if reason := available()[backend]:
        return [], reason
    width = 64
    inputs = [drawn(sum(each), n, width, dtype=dtype, seed=i) for i, n in enumerate((heads, kv_heads, kv_heads))]
    slope = drawn(sum(each), heads, width, dtype=dtype, seed=3)
    blocks = (
        torch.arange(sum(each), device=DEVICE) // 8 % 3 - 1 if blocked else None
    )  # by turns in none and in one of two

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


def without_liger(dtype: torch.dtype) -> str:
    """Why Liger's kernel cannot take a loss here; nothing where it can."""
    return fused_by(DEVICE.type, dtype, liger_is_there())[1]


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


def loss_inputs(tokens: int, width: int, words: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (T, D) and head (C, D) with gradient, and labels (T,)."""
    hidden = drawn(tokens, width, dtype=COMPUTED, seed=0).requires_grad_()
    weight = (drawn(words, width, dtype=COMPUTED, seed=1) / width**0.5).requires_grad_()
    return hidden, weight, torch.randint(words, (tokens,), generator=torch.Generator().manual_seed(2)).to(DEVICE)


def fused_loss(hidden: Tensor, weight: Tensor, labels: Tensor, by: Fused) -> None:
    linear_cross_entropy(hidden, weight, labels, by=by).sum.backward()
    hidden.grad = weight.grad = None


def liger_times(tokens: int, width: int, words: int, repetitions: int) -> list[Found]:
    if reason := without_liger(COMPUTED):
        return [([], reason)] * 2
    act = partial(fused_loss, *loss_inputs(tokens, width, words), "liger")
    return [([1e3 * t for t in seconds(act, repetitions)], ""), ([above(act) / GIB], "")]


def loss_times(tokens: int, width: int, words: int, repetitions: int) -> list[Found]:
    hidden, weight, labels = loss_inputs(tokens, width, words)
    fused = partial(fused_loss, hidden, weight, labels, "torch")

    def full() -> None:
        F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum").backward()
        hidden.grad = weight.grad = None

    note = f"width {width:,}, {DTYPE}"
    times, held = seconds(fused, repetitions), above(fused)
    ours: list[Found] = [([1e3 * t for t in times], note), ([held / GIB], "")]
    try:
        full_times, full_held = seconds(full, repetitions), above(full)
    except torch.OutOfMemoryError:
        none: Found = ([], "full logits do not fit")
        return [ours[0], none, none, ours[1], none, none]
    return [
        ours[0],
        ([1e3 * t for t in full_times], ""),
        (ratios(times, full_times), ""),
        ours[1],
        ([full_held / GIB], ""),
        ([held / full_held], ""),
    ]


def recipe_of(
    sizes: Sizes, decoder: str, tuning: str, tokens: int, how: Recompute = "none", dtype: Dtype = DTYPE
) -> Recipe:
    """One stage, one pack a step, half of its tokens visual."""
    tower = sizes.tower
    tune: dict[str, Tuning] = {part: Full(lr=1e-5) for part in sizes.tunings[tuning]}
    stage = Stage(
        name="stage",
        mixture=(Source(corpus=TextOnly(name="random")),),
        tune=tune,
        context=tokens,
        tokens_per_step=tokens,
        max_tiles=max(1, tokens // 2 // tower.tokens(tower.image)),
        duration=Steps(count=1),
        parallel=FSDP(dtype=dtype, recompute=how),
    )
    return Recipe(
        name="gpu",
        model=VLM(
            encoder=Encoder(arch=tower, layer=-2),
            connector=MLP(depth=2),
            lm=CausalLM(arch=sizes.decoders[decoder], tokenizer="none"),
        ),
        tiling=Pad(size=tower.image),
        stages=(stage,),
    )


def model_of(recipe: Recipe) -> VisionLanguageModel:
    torch.manual_seed(0)
    with DEVICE:
        return recipe.vlm.build()


def pack_of(recipe: Recipe) -> Pack:
    """A full pack: documents of mixed lengths, pictures in the first ones, all text learned."""
    stage, rng = recipe.stages[0], random.Random(0)
    side, tiles, tokens = recipe.vlm.layout(recipe.tiling).tokens_per_tile, stage.max_tiles, stage.context
    texts = lengths(tokens - tiles * side, rng)
    pictures = [tiles // len(texts) + (i < tiles % len(texts)) for i in range(len(texts))]
    words = np.random.default_rng(0).integers(0, recipe.vlm.lm.arch.vocab_size, tokens, np.int32)
    each = [n * side + text for n, text in zip(pictures, texts, strict=True)]
    visual = np.concatenate([np.arange(n * side + text) < n * side for n, text in zip(pictures, texts, strict=True)])
    count = len(each)
    full = fullest(recipe, stage)
    return replace(
        full,
        input_ids=np.where(visual, np.int32(IMAGE_TOKEN), words),
        labels=np.where(visual, np.int32(NOT_LEARNED), words),
        positions=np.concatenate([np.arange(n, dtype=np.int32) for n in each]),
        cu_seqlens=np.cumsum([0, *each], dtype=np.int32),
        sources=np.zeros(count, np.int16),
        branches=np.zeros(count, np.int8),
        classes=np.full(count, -1, np.int32),
        weights=np.ones(count, np.float32),
        tiles=np.random.default_rng(1).integers(0, 256, full.tiles.shape, np.uint8),
    )


class Bare:
    """The loop without an engine: weights in the compute type, master weights in float32."""

    def __init__(self, recipe: Recipe) -> None:
        self.stage = recipe.stages[0]
        self.model = model_of(recipe).train()
        groups = apply_tuning(self.model, self.stage.tune)
        weights = [p for group in groups for p in group.parameters]
        self.pairs = [(p, p.detach().clone()) for p in weights]
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(COMPUTED)
        for unit in self.model.units():
            if self.stage.parallel.recompute != "none":
                recompute(self.model, unit, self.stage.parallel.recompute)
        self.optimizer = torch.optim.AdamW([master for _, master in self.pairs], lr=1e-5, fused=True)

    def step(self, pack: Pack) -> float:
        output = NextToken()(self.model, Batch.of(pack, DEVICE))
        output.sum.backward()
        for parameter, master in self.pairs:
            if parameter.grad is not None:
                master.grad = parameter.grad.float().div_(output.weight)
                parameter.grad = None
        nn.utils.clip_grad_norm_([master for _, master in self.pairs], self.stage.optimizer.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for parameter, master in self.pairs:
                parameter.copy_(master)
        return float(output.sum.detach() / output.weight)


def step_times(sizes: Sizes, decoder: str, tuning: str, tokens: int) -> list[Found]:
    least, room = states(recipe_of(sizes, decoder, tuning, tokens)), torch.cuda.mem_get_info()[1] if CUDA else None
    if room is not None and least > room:
        reason = f"does not fit: weights and states alone are {least / GIB:.0f} GiB, the device has {room / GIB:.0f}"
        return [([], reason)] * len(STEP)
    ways: tuple[Recompute, ...] = ("none", "full")
    recipe, ours = recipe_of(sizes, decoder, tuning, tokens), None
    for how in ways:
        recipe = recipe_of(sizes, decoder, tuning, tokens, how)
        with alone(GROUP):
            ours = attempt(partial(steps_of, partial(engine_step, recipe), sizes.repetitions))
        if ours is not None:
            break
    plain = attempt(partial(steps_of, partial(bare_step, recipe), sizes.repetitions))
    stage, pack = recipe.stages[0], pack_of(recipe)
    how = f"{DTYPE}, recompute {stage.parallel.recompute}"
    foretold = memory(recipe, stage, (1,))[1]
    found: dict[str, Found] = {"foretold memory": ([foretold / GIB], how)}
    if plain is not None:
        found["bare torch step"] = plain[0], how
        found["bare torch peak memory"] = [plain[1] / GIB], ""
    if ours is not None:
        times, held = ours
        work = work_of(pack)
        found["step"] = times, f"{work.tiles} tiles, {len(pack.sources)} documents; {how}"
        found["speed"] = [tokens / t for t in times], ""
        found["MFU"] = mfu(recipe, work, times)
        found["peak memory"] = [held / GIB], ""
        found["foretold / measured"] = [foretold / held], ""
        moving = seconds(lambda: Batch.of(pack, DEVICE), sizes.repetitions)
        found["data wait"] = [t / median(times) for t in moving], "the copy, and what is reckoned from the pack"
        if plain is not None:
            found["engine / bare torch"] = ratios(times, plain[0]), ""
    return [found.get(what, ([], f"does not fit: out of memory, {how}")) for what, _ in STEP]


def engine_step(recipe: Recipe) -> Callable[[], Any]:
    engine, pack = build_engine(model_of(recipe), recipe.stages[0], 1, DEVICE), pack_of(recipe)
    return lambda: engine.train_step([pack], 1.0)


def bare_step(recipe: Recipe) -> Callable[[], Any]:
    loop, pack = Bare(recipe), pack_of(recipe)
    return lambda: loop.step(pack)


def states(recipe: Recipe) -> int:
    """Bytes of weights in float32, and of gradients and moments of those that are trained."""
    model = recipe.vlm.meta()
    trained = sum(p.numel() for group in apply_tuning(model, recipe.stages[0].tune) for p in group.parameters)
    return 4 * sum(p.numel() for p in model.parameters()) + 12 * trained


def attempt(act: Callable[[], tuple[list[float], int]]) -> tuple[list[float], int] | None:
    """None where the device's memory does not suffice."""
    try:
        return act()
    except torch.OutOfMemoryError:
        return None
    finally:
        free()


@cache
def peak() -> float:
    return peak_flops(DEVICE, DTYPE)


def mfu(recipe: Recipe, work: Work, times: Sequence[float]) -> Found:
    if not peak():
        return [], "nobody has told this device's peak; cluster/mfu.py has a table"
    stage = recipe.stages[0]
    model = recipe.vlm.meta()
    apply_tuning(model, stage.tune)
    layout = recipe.vlm.layout(recipe.tiling)
    flops = cost_of(model, stage.objective, layout, stage.parallel.recompute).model_flops(work)
    return [flops / t / peak() for t in times], f"{flops / 1e12:.3g} TFLOP of {peak() / 1e12:.3g} TFLOP/s"


def checkpoint_stall(sizes: Sizes, decoder: str) -> list[Found]:
    recipe = recipe_of(sizes, decoder, "tower frozen", sizes.steps[0], "full")
    manifest = Manifest(run="gpu", stage="stage", fingerprint="", order="", step=1, world=1, final=False, versions={})
    with scratch() as folder, alone(GROUP):
        engine = build_engine(model_of(recipe), recipe.stages[0], 1, DEVICE)
        engine.train_step([pack_of(recipe)], 1.0)
        state = engine.state()
        size, room = size_of(state), shutil.disk_usage(folder).free
        if 2 * size > 0.9 * room:
            return [([], f"two of {size / 1e9:.0f} GB, and the disk has room for {room / 1e9:.0f}")] * 3
        saver = Saver(Place(folder), keep=1)

        def settled(loss: float, grad_norm: float) -> bool:
            saver.settle()
            return finite(loss, grad_norm)

        for step in range(2):  # the first finds its buffers
            saver.save(state, TrainState(step=step), manifest)
            engine.train_step([pack_of(recipe)], 1.0, settled)
            done = saver.wait()[-1]
    return [([done.stall], ""), ([done.size / 1e9], ""), ([done.size / 1e9 / done.seconds], "")]


def size_of(state: Any) -> int:
    """Bytes of the tensors in nested dictionaries and lists."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(map(size_of, inner))


def filled(case: Case) -> tuple[list[Row], bool]:
    """A case's rows, and whether it failed."""
    try:
        found = case.run()
        failed = False
    except torch.OutOfMemoryError:
        found, failed = [([], "out of memory")] * len(case.rows), False
    except Exception as error:  # one that fails must not cost the others their numbers
        traceback.print_exc()
        reason = str(error).strip().splitlines() or [""]
        found, failed = [([], f"failed: {type(error).__name__}: {reason[0][:120]}")] * len(case.rows), True
    free()
    rows = [replace(row, values=list(values), note=note) for row, (values, note) in zip(case.rows, found, strict=True)]
    return rows, failed or any(row.values and not row.met for row in rows)


def header() -> list[str]:
    """The device, versions and date. Packages that are not there are left out."""
    device = torch.cuda.get_device_name() if CUDA else "no GPU"
    memory_ = f", {torch.cuda.mem_get_info()[1] / GIB:.0f} GiB" if CUDA else ""
    versions = [f"python {platform.python_version()}"]
    for package in ("torch", "transformers", "triton", "liger-kernel", "flash-attn", "flash-attn-3", "flash-attn-4"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return [f"{device}{memory_}", ", ".join(versions), f"{datetime.now(UTC):%Y-%m-%d}"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(ABOUT)}; by default all")
    parser.add_argument("--toy", action="store_true", help="toy sizes; the numbers mean little")
    parser.add_argument("--list", action="store_true", help="write the table without measuring anything")
    parser.add_argument("--out", type=Path, help="folder for the table")
    asked = parser.parse_args()
    unknown = sorted(set(asked.names) - set(ABOUT))
    if unknown:
        parser.error(f"no section {unknown[0]!r}; there are {', '.join(ABOUT)}")
    toy = asked.toy or not (CUDA or asked.list)
    folder: Path = asked.out or (CACHE if toy else HERE / "results")
    folder.mkdir(parents=True, exist_ok=True)
    sizes = TOY if toy else FULL
    if asked.list:
        (folder / "gpu.md").write_text(markdown(unmeasured(sizes)))
        return 0
    device = torch.cuda.get_device_name().replace(" ", "-").lower() if CUDA else "cpu"
    return measure(folder / f"gpu-{device}{'-toy' if toy else ''}.json", sizes, asked.names or list(ABOUT))


def measure(file: Path, sizes: Sizes, names: Sequence[str]) -> int:
    saved: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    failures = 0
    for name in ABOUT:
        if name not in names:
            continue
        section = Section(name, ABOUT[name])
        print(f"{name}:", flush=True)
        for case in cases(sizes):
            if case.section != name:
                continue
            rows, failed = filled(case)
            failures += failed
            section.rows += rows
            for row in rows:
                print(
                    f"  {row.name}: {number(row.median) if row.values else 'none'} {row.unit}  {row.note}", flush=True
                )
            saved[name] = {"header": header(), **asdict(section)}
            file.write_text(json.dumps(saved, indent=1) + "\n")
            file.with_suffix(".md").write_text(markdown(saved))
    print(f"saved {file.with_suffix('.md')}" + (f"; {failures} failed" if failures else ""))
    return min(failures, 1)


def unmeasured(sizes: Sizes) -> dict[str, Any]:
    """Every section with its rows as they are before anything is run."""
    today = f"no machine with a GPU has run this yet, {datetime.now(UTC):%Y-%m-%d}"
    sections = {name: Section(name, about) for name, about in ABOUT.items()}
    for case in cases(sizes):
        sections[case.section].rows += [replace(row, note="not measured") for row in case.rows]
    return {name: {"header": [today], **asdict(section)} for name, section in sections.items()}


def markdown(saved: dict[str, Any]) -> str:
    title = ["# Benchmarks on a GPU", "", "`python -m benchmarks.gpu` writes this file.", ""]
    return "\n".join(title + [line for name in ABOUT if name in saved for line in table(saved[name])])


if __name__ == "__main__":
    sys.exit(main())
