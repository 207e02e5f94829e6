"""ZeRO through DeepSpeed: FSDP's curve at every stage, checkpoints that pass between the two, no rank that waits."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.common import on_ranks
from cluster.engines import build_engine
from mllm.recipe import DDP, FSDP, Full, Parallel, Recipe, Stage, ZeRO
from pipelines.types import Batch, Pack
from pipelines.windows import PackWindows, Stream
from tests.cluster.test_engine import CPU, engine_of, share, train

SHARDS = FSDP(dtype="float32", recompute="none")
PLAIN = [ZeRO(stage=1, dtype="float32", recompute="none"), ZeRO(stage=2, dtype="float32", recompute="none")]
PLAIN += [ZeRO(stage=3, dtype="float32", recompute="none")]
ALL_TRAINED = {"encoder": Full(lr=1e-4), "connector": Full(lr=1e-3), "lm": Full(lr=1e-3)}


def curves(
    recipe: Recipe, stage: Stage, ways: Sequence[Parallel], stream: Stream, steps: int, per_step: int = 2
) -> list[list[tuple[float, float, int]]]:
    """Of each way to train: loss, gradient norm and learned tokens of each step, `per_step` packs a step."""
    windows = PackWindows(stream)
    packs = list(islice(cycle([*windows.packs(0), *windows.packs(1)]), per_step * steps))
    found = []
    for parallel in ways:
        engine = engine_of(recipe, replace(stage, parallel=parallel))
        reports = [engine.train_step(share(packs, per_step, step), 1.0) for step in range(steps)]
        found.append([(report.loss, report.grad_norm, report.learned) for report in reports])
    return found


def test_fifty_steps_of_every_engine_follow_full_shards(small: Recipe, stream: Stream) -> None:
    stage = small.stage("pretrain")
    ways = [SHARDS, DDP(dtype="float32", recompute="none"), replace(SHARDS, context=2), *PLAIN]
    for shards, *others in on_ranks(2, curves, small, stage, ways, stream, 50):
        for reports in others:
            assert reports == [pytest.approx(one, rel=1e-4) for one in shards]
        assert shards[-1][0] < 0.9 * shards[0][0]  # a curve that fell has something to follow


@pytest.mark.parametrize(
    "legs",
    [
        [(PLAIN[1], 2, 2), (SHARDS, 1, 1), (PLAIN[2], 3, 2)],
        [(SHARDS, 2, 1), (PLAIN[0], 3, 2), (PLAIN[2], 1, 1), (PLAIN[1], 3, 1)],
    ],
    ids=["zero2-fsdp-zero3", "fsdp-zero1-zero3-zero2"],
)
def test_a_checkpoint_goes_on_in_the_other_engine_on_any_number_of_ranks(
    small: Recipe, stream: Stream, tmp_path: Path, legs: list[tuple[Parallel, int, int]]
) -> None:
    stage = small.stage("pretrain")
    whole = on_ranks(1, train, small, stage, stream, 5, str(tmp_path / "whole"), False)[0]
    broken: list[tuple[float, float]] = []
    for number, (parallel, world, steps) in enumerate(legs):
        leg = replace(stage, parallel=parallel)
        broken += on_ranks(world, train, small, leg, stream, steps, str(tmp_path / "legs"), number > 0)[0]
    assert broken == [pytest.approx(pair, rel=1e-4) for pair in whole]


def of_kinds(recipe: Recipe, stage: Stage, ways: Sequence[Parallel], stream: Stream) -> list[list[float]]:
    """Of each way: losses of steps with another kind of pack on each rank, and what is read off between them."""
    packs = list(PackWindows(stream).packs(0))
    pictures = next(p for p in packs if len(p.tiles))
    text = next(p for p in packs if not len(p.tiles))
    kinds = [pictures, text, Pack.empty((3, 96, 96))]
    found = []
    for parallel in ways:
        engine = engine_of(recipe, replace(stage, parallel=parallel))
        seen = []
        for step in range(3):
            mine = kinds[(dist.get_rank() + step) % 3]
            seen.append(engine.train_step([mine, kinds[step]], 1.0).loss)
            output = engine.score(Batch.of(mine, CPU))
            logits = engine.next_logits(Batch.of(mine, CPU)).float()
            assert not logits.requires_grad
            read = torch.stack([output.sum, output.weight, logits.abs().sum()]).double()
            dist.all_reduce(read)
            seen += read.tolist()
        found.append(seen)
    return found


@pytest.mark.parametrize("tune", ["align", "all"])
def test_ranks_with_different_kinds_of_packs_never_wait_for_each_other(
    small: Recipe, stream: Stream, tune: str
) -> None:
    stage = small.stage("pretrain")
    stage = replace(stage, tune=ALL_TRAINED if tune == "all" else small.stage(tune).tune)
    ways = [SHARDS, ZeRO(stage=2, dtype="float32"), ZeRO(stage=3, dtype="float32")]
    for shards, *zeros in on_ranks(3, of_kinds, small, stage, ways, stream):
        for seen in zeros:
            assert seen == pytest.approx(shards, rel=1e-4)


def test_recomputing_activations_changes_nothing(small: Recipe, stream: Stream) -> None:
    stage = replace(small.stage("pretrain"), tune=ALL_TRAINED)
    for level in (2, 3):
        ways = [ZeRO(stage=level, dtype="float32", recompute=how) for how in ("selective", "full", "none")]
        selective, full, none = on_ranks(1, curves, small, stage, ways, stream, 2)[0]
        assert selective == [pytest.approx(one, rel=1e-5) for one in none]
        assert full == [pytest.approx(one, rel=1e-5) for one in none]


def test_bfloat16_follows_float32(small: Recipe, stream: Stream) -> None:
    stage = small.stage("pretrain")
    ways: list[Parallel] = [SHARDS, *(ZeRO(stage=level, recompute="selective") for level in (1, 2, 3))]
    for full, *halves in on_ranks(2, curves, small, stage, ways, stream, 4, 3):  # two packs a rank, one of them empty
        for half in halves:
            assert [one[0] for one in half] == pytest.approx([one[0] for one in full], rel=1e-2)
            assert [one[1] for one in half] == pytest.approx([one[1] for one in full], rel=5e-2)


def kept(recipe: Recipe, stage: Stage, cache: str) -> tuple[float, str, list[str]]:
    """How far a bfloat16 engine's weights are from those it was given, what it says to others, what it compiled."""
    os.environ["TORCH_EXTENSIONS_DIR"] = cache
    torch.manual_seed(0)
    given = {name: weight.clone() for name, weight in recipe.vlm.build().named_parameters()}
    engine = engine_of(recipe, stage)
    state = engine.model_state()
    far = max(float((weight.full_tensor() - given[name]).abs().max()) for name, weight in state.items())
    state.pop("connector.layers.0.bias")
    with pytest.raises(ValueError) as error:
        engine.load_model_state(state)
    return far, str(error.value), os.listdir(cache)


@pytest.mark.parametrize("parallel", [ZeRO(stage=1), ZeRO(stage=2), ZeRO(stage=3)])
def test_weights_in_bfloat16_have_masters_in_float32_and_nothing_is_compiled(
    small: Recipe, tmp_path: Path, parallel: ZeRO
) -> None:
    stage = replace(small.stage("align"), parallel=parallel)
    for far, words, compiled in on_ranks(2, kept, small, stage, str(tmp_path)):
        assert far == 0
        assert "lacks ['connector.layers.0.bias']" in words
        assert compiled == []


def deepspeed_is_there() -> bool:
    return "deepspeed" in sys.modules


def test_engines_come_without_deepspeed_and_say_so_when_it_is_asked_for(
    small: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert on_ranks(1, deepspeed_is_there) == [False]  # and cluster.engines is
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    stage = replace(small.stages[0], parallel=ZeRO())
    with pytest.raises(ValueError, match=r"pip install mllm\[zero\]; the nearest choice without it is parallel=FSDP"):
        build_engine(small.vlm.build(), stage, 1, CPU)
