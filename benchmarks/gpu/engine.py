"""A step of `FSDPEngine` over one full pack on one device: half visual tokens, documents of mixed lengths,
random weights. Nothing is computed again where that fits, else each layer. The bare loop is what a person writes without an
engine: the same model class, attention, objective and recomputation, weights and gradients in bfloat16, float32 master weights
that fused AdamW steps, gradients clipped. Fair because it computes in the engine's types; autocast would keep activations in
float32 and could not take most attention kernels. The two run one after the other, since together they would not fit. MFU is
the model FLOPs of the pack (PaLM's, nothing computed again counts) over time and the data sheet's peak; on a CPU over what
its products reach. Peak memory is that of a step with all weights and states; foretold is `cluster.memory`, without a GPU.
Data wait is the share of the step in which its pack becomes a batch on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from statistics import median
from typing import Any

import torch

from benchmarks.common import Row, alone, ratios
from benchmarks.gpu.bare import Bare
from benchmarks.gpu.cases import Case, Found
from benchmarks.gpu.device import CUDA, DEVICE, DTYPE, GROUP
from benchmarks.gpu.measuring import GIB, attempt, seconds, steps_of
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.training import model_of, pack_of, recipe_of
from cluster.engines import build_engine
from cluster.memory import memory
from cluster.mfu import peak_flops
from mllm.flops import Work, cost_of, work_of
from mllm.recipe import Recipe, Recompute
from mllm.tune import apply_tuning
from pipelines.types import Batch

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


def cases(sizes: Sizes) -> Iterator[Case]:
    for decoder in sizes.decoders:
        for tuning in sizes.tunings:
            for tokens in sizes.steps:
                rows = tuple(Row(f"{decoder}, {tuning}, {tokens:,} tokens: {what}", unit, []) for what, unit in STEP)
                yield Case(rows, partial(step_times, sizes, decoder, tuning, tokens))


def step_times(sizes: Sizes, decoder: str, tuning: str, tokens: int) -> list[Found]:
    recipe, ours = recipe_of(sizes, decoder, tuning, tokens), None
    if reason := too_large(recipe):
        return [([], reason)] * len(STEP)
    ways: tuple[Recompute, ...] = ("none", "full")
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


def too_large(recipe: Recipe) -> str:
    """Why the device cannot hold even weights and states; nothing where it can."""
    least, room = states(recipe), torch.cuda.mem_get_info()[1] if CUDA else None
    if room is None or least <= room:
        return ""
    return f"does not fit: weights and states alone are {least / GIB:.0f} GiB, the device has {room / GIB:.0f}"


def states(recipe: Recipe) -> int:
    """Bytes of weights in float32, and of gradients and moments of those that are trained."""
    model = recipe.vlm.meta()
    trained = sum(p.numel() for group in apply_tuning(model, recipe.stages[0].tune) for p in group.parameters)
    return 4 * sum(p.numel() for p in model.parameters()) + 12 * trained


def mfu(recipe: Recipe, work: Work, times: Sequence[float]) -> Found:
    if not peak():
        return [], "nobody has told this device's peak; cluster/mfu.py has a table"
    stage = recipe.stages[0]
    model = recipe.vlm.meta()
    apply_tuning(model, stage.tune)
    layout = recipe.vlm.layout(recipe.tiling)
    flops = cost_of(model, stage.objective, layout, stage.parallel.recompute).model_flops(work)
    return [flops / t / peak() for t in times], f"{flops / 1e12:.3g} TFLOP of {peak() / 1e12:.3g} TFLOP/s"


@cache
def peak() -> float:
    return peak_flops(DEVICE, DTYPE)
