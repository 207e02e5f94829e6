"""Peak memory of a training step, foretold by running it on tensors that have shapes and no memory.

The engine itself takes a step on a pack that is as full as the stage allows, under torch's fake tensors and a process group
that sends nothing; every storage that comes and goes is counted. So shards, recomputation, types, frozen parts and the loss's
chunks are those of the code that will run. What is not in it: the allocator's gaps, the communicators' buffers and the
libraries' workspaces, about 1 to 2 GiB on a GPU.

Two things keep it quick. Of equal layers only a few are built, and what each moment of the step holds goes on in a straight
line with their number. And what a rank holds at a moment is whole + sharded / ranks, so that one world tells all others.
"""

from __future__ import annotations

import multiprocessing
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_map_only

from cluster.counted import takes_features
from cluster.fsdp import FSDPEngine
from cluster.fullest import fullest
from cluster.held import CPU, Course, Held
from cluster.schedule import accumulation
from cluster.stacks import Depths, layer_weights, shortened, stacks_of
from mllm import dropout
from mllm.aligned.twin import Queue
from mllm.annotators import ReferenceLogProbs
from mllm.encoders import Encoder
from mllm.objectives import DPO, Gathered, aligned
from mllm.objectives.aligned import drawn
from mllm.recipe import (
    DDP,
    FSDP,
    AdamW,
    Constant,
    Frozen,
    Full,
    LoRA,
    Recipe,
    Source,
    Stage,
    Steps,
    Tuning,
    ZeRO,
    dump,
    load,
)
from mllm.tune import apply_tuning
from mllm.vlm import VLM, VisionLanguageModel
from pipelines.corpora import TextOnly
from pipelines.types import Batch, Pack

RANKS = 8
"""Ranks of the simulated world where a copy is shared, from which other worlds follow but one rank, which gathers nothing."""


class Unforetold(ValueError):
    """Why a stage's memory is not foretold, in words for a person."""


def memory(recipe: Recipe, stage: Stage, worlds: Sequence[int]) -> dict[int, int]:
    """Peak bytes on each rank by world size, from the second step on, when the optimiser has its states.

    The optimiser is taken for AdamW, whose moments are the largest. ZeRO is reckoned from full shards: stage 3 is
    taken for them, stage 2 adds the weights in the compute type and stage 1 the gradients too, both whole. A model whose
    states are `offload`ed leaves out shards of weights, gradients and moments. Ranks that share a pack (`context`) are taken
    to hold equal parts of its positions and tiles. An objective that sees all packs of a step is taken to see as many of each
    rank as the step has for it, all of them full, with whatever the model remembers full; what other actors hold, a reference
    model say, is theirs. Worlds that are no whole number of groups are left out.

    Raises Unforetold where what a step computes hangs on numbers that only data tells.
    """
    ask = partial(_memory, dump(_plain(recipe, stage)), takes_features(stage), tuple(worlds))
    if not dist.is_initialized():
        return ask()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:  # a process has one world
        return apart.submit(ask).result()


def _plain(recipe: Recipe, stage: Stage) -> Recipe:
    """The recipe with one stage and only what memory depends on, so that stages alike are simulated once."""
    parallel = stage.parallel
    share = parallel.context if isinstance(parallel, FSDP) else 1
    packs = stage.packs_per_step if isinstance(stage.objective, Gathered) else 1  # of which others know nothing
    if not isinstance(recipe.model, VLM):
        plain = replace(stage, name="stage", ema=None, duration=Steps(count=1), optimizer=AdamW(), schedule=Constant())
        plain = replace(plain, sampling=None, tokens_per_step=packs * stage.context, window=1, chunk=1, save_every=1)
        return replace(
            recipe, name="plain", paper="", model=recipe.model.bare(), stages=(plain,), held_out=(), shots=(), seed=0
        )
    context = -(-stage.context // share)
    plain = replace(
        stage,
        name="stage",
        mixture=(Source(corpus=TextOnly(name="any")),),
        tune=_coarse(stage.tune),
        ema=None,
        attention=None,
        rope_theta=None,
        tiling=None,
        context=context,
        max_tiles=-(-stage.max_tiles // share),
        tokens_per_step=packs * context,
        duration=Steps(count=1),
        optimizer=AdamW(),
        schedule=Constant(),
        sampling=None,
        grouping="mixed",
        annotators=(ReferenceLogProbs(checkpoint="any"),) if isinstance(stage.objective, DPO) else (),
        window=1,
        chunk=1,
        save_every=1,
    )
    return replace(
        recipe,
        name="plain",
        paper="",
        model=_whole(recipe.vlm.bare()),
        tiling=recipe.tiling_of(stage),
        stages=(plain,),
        held_out=(),
        shots=(),
        seed=0,
    )


def _whole(model: VLM) -> VLM:
    """The model with all branches of its towers: whose are left out rows say, which nobody knows here, and it takes no memory."""
    encoder = model.encoder
    if isinstance(encoder, Encoder):
        return replace(model, encoder=replace(encoder, drop_path=0.0))
    return replace(
        model, encoder=replace(encoder, towers=tuple(replace(tower, drop_path=0.0) for tower in encoder.towers))
    )


def _coarse(tune: Mapping[str, Tuning]) -> dict[str, Tuning]:
    """What a stage trains, without what takes no memory. A pattern is taken for the whole of the part that it lies in."""
    found: dict[str, Tuning] = {}
    for key, how in tune.items():
        match how:
            case Full():
                found[key if not re.search(r"[*?[]", key) else key.split(".")[0]] = Full(lr=1.0)
            case LoRA():
                found[key] = replace(how, lr=1.0, weight_decay=0.0)
            case Frozen():
                pass  # a little too much is foretold
    return found


def _memory(words: str, features: bool, worlds: tuple[int, ...]) -> dict[int, int]:
    stage = load(words).stages[0]
    found = {}
    for world in worlds:
        ranks = _ranks(stage.parallel, world)
        if ranks is not None:
            found[world] = round(_peak(words, features, ranks, world))
    return found


def _ranks(parallel: FSDP | DDP | ZeRO, world: int) -> int | None:
    """Ranks that hold one copy between them; None where `world` is not a whole number of such groups."""
    match parallel:
        case FSDP(shard=shard):
            ranks = world if shard is None else shard
            return None if world % ranks or world % parallel.context else ranks
        case DDP():
            return 1
        case ZeRO():
            return world


def _simulated(parallel: FSDP | DDP | ZeRO, ranks: int, alone: bool) -> tuple[FSDP | DDP, int]:
    """What the engine is asked for in place of `parallel`, and on how many ranks.

    Where a rank has the whole copy it need not be alone, nor, if weights come from the host, train the plain module.
    """
    if ranks > 1:
        ahead = parallel.prefetch if isinstance(parallel, FSDP) else 1
        return FSDP(dtype=parallel.dtype, recompute=parallel.recompute, prefetch=ahead), RANKS
    plain = alone and not isinstance(parallel, ZeRO) and not (isinstance(parallel, FSDP) and parallel.offload)
    return DDP(dtype=parallel.dtype, recompute=parallel.recompute), 1 if plain else 2


def _peak(words: str, features: bool, ranks: int, world: int) -> float:
    recipe = load(words)
    stage = recipe.stages[0]
    simulated, there = _simulated(stage.parallel, ranks, world == 1)
    built = dump(replace(recipe, stages=(replace(stage, parallel=simulated),)))
    stacks = stacks_of(recipe.vlm, stage) if isinstance(recipe.model, VLM) else {}
    small = {where: stack.built for where, stack in stacks.items()}

    def peaks(layers: dict[str, int]) -> dict[str, float]:
        course, _ = _course(built, features, tuple(layers.items()), there)
        return {label: float((whole + shared / ranks).max()) for label, (whole, shared) in course.items()}

    base = peaks(small)
    found = dict(base)
    for where, stack in stacks.items():
        added = stack.layers - stack.built
        if not added:
            continue
        if stack.lies:
            extra = dict.fromkeys(base, 4 * layer_weights(recipe.vlm, where) / ranks)
        else:
            deeper = peaks(small | {where: stack.built + stack.period})
            extra = {label: (deeper[label] - base[label]) / stack.period for label in base}
        found = {label: peak + added * extra[label] for label, peak in found.items()}
    if isinstance(stage.objective, Gathered):
        (most, left), (most_there, left_there) = (
            _compared(built, features, tuple(small.items()), there, size) for size in (world, there)
        )
        found["whole"] += most - most_there
        after = {label for label in found if label.startswith(("pack 2", "step"))}
        found |= {label: found[label] + left - left_there for label in after}
    return _adjusted(found, recipe, ranks)


def _adjusted(found: dict[str, float], recipe: Recipe, ranks: int) -> float:
    """The peak, with what the simulation cannot know."""
    stage = recipe.stages[0]
    parallel = stage.parallel
    gathers_less = isinstance(parallel, ZeRO) and parallel.stage < 3
    if isinstance(parallel, DDP) or not (gathers_less or parallel.offload):
        return max(found.values())
    total, trained = _counts(dump(recipe))  # which builds the whole model
    if isinstance(parallel, ZeRO) and gathers_less:
        item = 2 if parallel.dtype == "bfloat16" else 4
        whole = item * total + (4 * trained if parallel.stage == 1 else 0)
        found = {label: peak + whole * (1 - 1 / ranks) for label, peak in found.items()}
    if parallel.offload:
        away = 12 * trained if gathers_less else 4 * total + 12 * trained
        found = {label: peak - away / ranks for label, peak in found.items() if "step" not in label}
    return max(found.values())


@cache
def _counts(words: str) -> tuple[int, int]:
    """Parameters of the model, all and trained."""
    recipe = load(words)
    module = recipe.model.meta()
    groups = apply_tuning(module, recipe.stages[0].tune)
    trained = sum(p.numel() for group in groups for p in group.parameters)
    return sum(p.numel() for p in module.parameters()), trained


@cache
def _course(words: str, features: bool, depths: Depths, world: int) -> tuple[Course, Any]:
    """Simulate the last pack of a run's second step on rank 0 of `world`; and what an objective collects of a pack, or nothing.

    Of objectives that see a step's packs together "pack 1" is what it collects of the last one, "whole" what it makes of all and
    "pack 2" what it learns from the last.
    """
    recipe = load(words)
    stage = recipe.stages[0]
    assert not isinstance(stage.parallel, ZeRO)
    held = Held()
    pack = fullest(recipe, stage, features)
    with _nobody(world, _bringing(stage, world)) as group, FakeTensorMode(allow_non_fake_inputs=True), held:
        with (
            patch.object(torch.nn.init, "_no_grad_trunc_normal_", lambda tensor, *_, **__: tensor),
            warnings.catch_warnings(),
        ):
            # What is copied, a twin say, is asked where its numbers are.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            # It draws until no number lies outside, which of numbers that are not there nobody can say.
            model = (shortened(recipe.vlm, depths) if depths else recipe.model).build()
        for module in model.modules():
            if isinstance(module, Queue):
                module.seen.fill_(module.size)
        with _where_they_are():
            engine = FSDPEngine(model, stage, stage.parallel, 1, CPU)
        engine.whole = {}  # of rank 0's weights, which are spread before the first step
        told = _Told(engine, held, group)
        (optimizer,) = engine.optimizers
        _graded(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        _graded(optimizer)  # those of packs before, which the last one meets
        _mark(engine, optimizer, held)
        held.moment("begin")
        try:
            with (
                _quiet(),
                _as_mine(),
                _undrawn(),
                patch.object(aligned, "drawn", _drawn),
                patch.object(engine, "_told", told),
            ):
                engine.train_step([pack], 1.0)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise Unforetold(
                f"memory is not predicted: what {stage.objective.kind!r} computes hangs on its numbers ({error})"
            ) from error
        return held.course(world // engine.copies), told.collected


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():  # torch wonders at hooks of a layer before which nothing learns
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        # What it looks at when it makes a fake of a number that was computed for real.
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        # OPT's layers give a view, which nobody adds to in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        yield


@contextmanager
def _where_they_are() -> Iterator[None]:
    """Modules stay where they are made, which is where they belong: peft moves adapters all the same, and what is watched cannot
    be swapped for another.
    """
    with patch.object(nn.Module, "to", lambda module, *_, **__: module):
        yield


@contextmanager
def _as_mine() -> Iterator[None]:
    """Objects that ranks would send each other are this one's own: they lie beside the accelerator's memory."""

    def gathered(everyone: list[Any], mine: Any, group: dist.ProcessGroup | None = None) -> None:  # noqa: ARG001 -- as torch's
        everyone[:] = [mine] * len(everyone)

    with patch.object(dist, "all_gather_object", gathered):
        yield


@contextmanager
def _undrawn() -> Iterator[None]:
    """What dropout leaves out, nobody knows: whole numbers are computed for real here, and it draws one for each activation."""
    with patch.object(dropout, "draws", lambda _seeds, owner, _place: torch.empty(owner.shape).long()):
        yield


def _bringing(stage: Stage, world: int) -> int:
    """Ranks that have packs of a step: what an objective gathers of the others is next to nothing."""
    return min(stage.packs_per_step, world)


@dataclass(frozen=True, slots=True)
class _Numbers:
    """A tensor of numbers that nobody knows."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _described(collected: Any) -> Any:
    """What was collected, its numbers described."""
    return tree_map_only(FakeTensor, lambda x: _Numbers(tuple(x.shape), x.dtype), collected)


def _packs(described: Any, count: int) -> list[Any]:
    """What is collected of so many packs alike."""
    return [tree_map_only(_Numbers, lambda x: torch.empty(x.shape, dtype=x.dtype), described) for _ in range(count)]


class _Told:
    """An engine's `_told`, of as many packs alike as its rank has in a step, where it is asked of one."""

    def __init__(self, engine: FSDPEngine, held: Held, group: dist.ProcessGroup | None) -> None:
        self.engine, self.held, self.group = engine, held, group
        self.collected: Any = None

    @torch.no_grad()
    def __call__(self, packs: Sequence[Pack]) -> list[Any]:
        engine, objective = self.engine, self.engine.stage.objective
        if not isinstance(objective, Gathered):
            return []
        (found,) = [engine.module(Batch.of(pack, CPU), collect=True) for pack in packs]
        self.collected = _described(found)
        self.held.moment("whole")
        others = accumulation(engine.stage.packs_per_step, engine.world) - 1
        return objective.whole([found, *_packs(self.collected, others)], self.group)


@cache
def _compared(words: str, features: bool, depths: Depths, simulated: int, world: int) -> tuple[float, float]:
    """Bytes that a rank of `world` holds at most while an objective finds what a step's packs are told, and then keeps of it.

    What it collects of a pack is known from the course of the `simulated` world.
    """
    _, collected = _course(words, features, depths, simulated)
    stage = load(words).stages[0]
    objective: Any = stage.objective
    held = Held()
    with _nobody(world, _bringing(stage, world)) as group, FakeTensorMode(allow_non_fake_inputs=True), held:
        packs = _packs(collected, accumulation(stage.packs_per_step, world))
        with _quiet(), _as_mine(), torch.no_grad(), patch.object(aligned, "drawn", _drawn):
            told = objective.whole(packs, group)
        del packs
        bytes_ = np.cumsum([0, *(amount for _, amount in held.changes)])
        del told
    return float(bytes_.max()), float(bytes_[-1])


def _drawn(logits: Tensor, never: Tensor, seeds: Tensor, salt: int) -> Tensor:
    """Of each row the next, in place of another that looks alike, which nobody knows; as much memory goes into it."""
    drawn(logits, never, seeds, salt)
    return (torch.arange(len(seeds)) + 1) % max(len(seeds), 1)


def _graded(optimizer: torch.optim.Optimizer) -> None:
    """Give all that is trained a gradient."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)


def _mark(engine: FSDPEngine, optimizer: torch.optim.Optimizer, held: Held) -> None:
    """Name the moments of a step: which pack, forward or backward, at which end of which stack."""
    model = engine.module.model
    stacks = (
        [("encoder", model.encoder.units()), ("lm", model.lm.units())] if isinstance(model, VisionLanguageModel) else []
    )
    packs = 0

    def begin(*_: object) -> None:
        nonlocal packs
        packs += 1
        held.moment(f"pack {packs}")

    def at(*places: str) -> Callable[..., None]:
        return lambda *_: held.moment(*(f"pack {packs} {place}" for place in places))

    engine.module.register_forward_pre_hook(begin)
    for part, units in stacks:
        for number, unit in enumerate(units):
            ends = [end for end in (number, number - len(units)) if -2 <= end < 2]
            unit.register_forward_pre_hook(at(*(f"forward {part} {end}" for end in ends)))
            unit.register_full_backward_pre_hook(at(*(f"backward {part} {end}" for end in ends)))

    def step(*_: object) -> None:
        states = [state for states in optimizer.state.values() for state in states.values()]
        parameters = list(engine.module.parameters())
        held.share([*parameters, *(p.grad for p in parameters if p.grad is not None), *states])
        held.moment("step", shared=True)

    optimizer.register_step_pre_hook(step)


@contextmanager
def _nobody(world: int, few: int) -> Iterator[dist.ProcessGroup | None]:
    """A process group of `world` ranks that sends nothing, and none afterwards; gives that of the first `few`, None if alone."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        group = dist.group.WORLD if few == world else dist.new_group(list(range(few)))
        assert isinstance(group, dist.ProcessGroup)
        yield group if world > 1 else None
    finally:
        dist.destroy_process_group()
