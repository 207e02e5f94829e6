"""The engine over 1, 2 and 3 ranks: the same packs give the same weights; checkpoints move between world sizes."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.common import on_ranks
from cluster import checkpoint, loading
from cluster.checkpoint import Manifest, TrainState
from cluster.engines import Engine, build_engine, finite
from cluster.mesh import mesh_shape
from cluster.saver import save
from cluster.scoring import empty_pack, evaluation_of
from cluster.site import Site, load_site
from mllm.annotators import DiscreteCodes, FrozenFeatures, Recaption, ScoreFilter
from mllm.recipe import DDP, FSDP, Full, LoRA, Muon, Parallel, Recipe, Stage, ZeRO
from pipelines.place import Place
from pipelines.types import Pack, Position
from pipelines.windows import PackWindows, Stream
from tests.conftest import ROOT

CPU = torch.device("cpu")


def engine_of(recipe: Recipe, stage: Stage) -> Engine:
    torch.manual_seed(0)
    return build_engine(recipe.vlm.build(), stage, len(stage.mixture), CPU)


def share(packs: list[Pack], per_step: int, step: int) -> list[Pack]:
    """This rank's packs of a step, filled up with empty ones."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = packs[step * per_step : (step + 1) * per_step][rank::world]
    return mine + [Pack.empty((3, 96, 96))] * (-(-per_step // world) - len(mine))


def train(
    recipe: Recipe, stage: Stage, stream: Stream, steps: int, folder: str, resume: bool
) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step; begins from `folder`'s checkpoint with `resume`, and leaves one there."""
    windows = PackWindows(stream)
    packs = [*windows.packs(0), *windows.packs(1)]
    engine = engine_of(recipe, stage)
    at = TrainState()
    if resume:
        found = checkpoint.newest(Place(folder), "f", "o")
        assert found is not None
        at = checkpoint.read_state(found.folder)
        state = engine.state()
        loading.load(found.folder, state)
        engine.load_state(state)
    reports = []
    for step in range(at.step, at.step + steps):
        report = engine.train_step(share(packs, 4, step), 1.0)
        reports.append((report.loss, report.grad_norm))
        at = at.advanced(1, 0.0, Position(window=step), {})
    manifest = Manifest(
        run="r", stage=stage.name, fingerprint="f", order="o", step=at.step, world=1, final=False, versions={}
    )
    save(Place(folder), engine.state(), at, manifest)
    return reports


Curve = Callable[[str], list[tuple[float, float]]]


@pytest.fixture(scope="module")
def curve(small: Recipe, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """Loss and gradient norm of four steps of a stage on one rank, reckoned once for all tests."""
    folder = tmp_path_factory.mktemp("curve")
    site = replace(load_site(str(ROOT / "examples" / "site.toml")), runs=str(folder / "runs"))
    stream = site.stream(recipe, recipe.stage("pretrain"))

    @cache
    def of(stage: str) -> list[tuple[float, float]]:
        return on_ranks(1, train, small, small.stage(stage), stream, 4, str(folder / stage), False)[0]

    return of


def test_the_loss_curve_does_not_know_how_many_ranks_there_are(
    small: Recipe, stream: Stream, tmp_path: Path, curve: Curve
) -> None:
    stage = small.stage("pretrain")
    for world in (2, 3):
        for reports in on_ranks(world, train, small, stage, stream, 3, str(tmp_path / str(world)), False):
            assert reports == [pytest.approx(pair, rel=1e-4) for pair in curve("pretrain")[:3]]


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (1, DDP(dtype="float32")),
        (2, DDP(dtype="float32")),
        (3, DDP(dtype="float32")),
        (4, FSDP(dtype="float32", shard=2)),
    ],
)
def test_copies_and_hybrid_shards_give_the_curve_of_full_shards(
    small: Recipe, stream: Stream, tmp_path: Path, world: int, parallel: FSDP | DDP, curve: Curve
) -> None:
    stage = small.stage("pretrain")
    other = replace(stage, parallel=parallel)
    for reports in on_ranks(world, train, small, other, stream, 3, str(tmp_path), False):
        assert reports == [pytest.approx(pair, rel=1e-4) for pair in curve("pretrain")[:3]]
    # Its checkpoint is anybody's: full shards on two ranks go on where it ended.
    for reports in on_ranks(2, train, small, stage, stream, 1, str(tmp_path), True):
        assert reports == [pytest.approx(curve("pretrain")[3], rel=1e-4)]


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (2, FSDP(dtype="float32", context=2)),
        (3, FSDP(dtype="float32", context=3, recompute="selective")),
        (4, FSDP(dtype="float32", context=2, shard=2, recompute="none")),
        (2, FSDP(dtype="float32", context=2, context_by="ulysses")),
        (2, FSDP(dtype="float32", prefetch=2)),  # which shares nothing, and must change nothing
    ],
)
def test_ranks_that_share_packs_or_gather_ahead_give_the_same_curve(
    small: Recipe, stream: Stream, tmp_path: Path, world: int, parallel: FSDP, curve: Curve
) -> None:
    other = replace(small.stage("sft"), parallel=parallel)
    for reports in on_ranks(world, train, small, other, stream, 3, str(tmp_path), False):
        assert reports == [pytest.approx(pair, rel=1e-4) for pair in curve("sft")[:3]]


def trained_with(
    recipe: Recipe, stage: Stage, stream: Stream, steps: int, folder: str, other: str | None = None
) -> list[float]:
    """Losses of steps, the last of them after a checkpoint was written and a fresh engine has read it, or `other`."""
    packs = list(PackWindows(stream).packs(0))
    torch.manual_seed(dist.get_rank())  # only rank 0's weights may count
    engine = build_engine(recipe.vlm.build() if dist.get_rank() == 0 else recipe.vlm.empty(), stage, 2, CPU)
    losses = [engine.train_step(share(packs, 4, step), 1.0).loss for step in range(steps - 1)]
    manifest = Manifest(
        run="r", stage=stage.name, fingerprint="f", order="o", step=1, world=1, final=False, versions={}
    )
    path = save(Place(folder), engine.state(), TrainState(step=1), manifest)
    fresh = build_engine(recipe.vlm.empty(), stage, 2, CPU, restored=True)
    state = fresh.state()
    loading.load(Place(other) / path.name if other else path, state)
    fresh.load_state(state)
    return [*losses, fresh.train_step(share(packs, 4, steps - 1), 1.0).loss]


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": Muon()},
        {"tune": {"lm": LoRA(lr=1e-2, rank=4), "connector": Full(lr=1e-3)}},
        {"ema": 0.9, "tune": {"encoder": Full(lr=1e-3, layer_decay=0.5), "lm.head": Full(lr=1e-2)}},
    ],
    ids=["muon", "lora", "ema"],
)
def test_ways_of_training_know_no_number_of_ranks_either(
    small: Recipe, stream: Stream, tmp_path: Path, changes: dict[str, Any]
) -> None:
    stage = replace(small.stage("pretrain"), **changes)
    folders = str(tmp_path / "one"), str(tmp_path / "two")
    one = on_ranks(1, trained_with, small, stage, stream, 4, folders[0])[0]
    assert one[-1] < one[0]
    # Each reads what the other has left: one rank that has all by itself, and two that share it.
    for losses in on_ranks(2, trained_with, small, stage, stream, 4, folders[1], folders[0]):
        assert losses == pytest.approx(one, rel=1e-3)
    assert on_ranks(1, trained_with, small, stage, stream, 4, folders[0], folders[1])[0] == pytest.approx(one, rel=1e-3)


def averaged(recipe: Recipe, stage: Stage, stream: Stream) -> float:
    """How far the weights that a stage of two steps leaves lie from an average that is kept by hand."""
    packs = list(PackWindows(stream).packs(0))
    engine = engine_of(recipe, stage)
    by_hand = {name: value.full_tensor().clone() for name, value in engine.model_state().items()}
    for step in range(2):
        engine.train_step(share(packs, 4, step), 1.0)
        for name, value in engine.model_state().items():
            by_hand[name] = 0.75 * by_hand[name] + 0.25 * value.full_tensor()
    engine.finish()
    left = {name: value.full_tensor() for name, value in engine.model_state().items()}
    return max(float((value - by_hand[name]).abs().max()) for name, value in left.items())


def test_a_stage_with_averages_ends_as_the_average_of_its_weights(small: Recipe, stream: Stream) -> None:
    stage = replace(small.stage("pretrain"), ema=0.75)
    assert on_ranks(2, averaged, small, stage, stream) == pytest.approx([0.0, 0.0], abs=1e-6)
    without = on_ranks(2, averaged, small, replace(stage, ema=None), stream)
    assert min(without) > 1e-4


def guarded(recipe: Recipe, stage: Stage, stream: Stream) -> list[tuple[bool, bool]]:
    """Of each of three steps whether it was taken and whether weights moved; the second breaks them."""
    packs = list(PackWindows(stream).packs(0))
    engine = engine_of(recipe, stage)
    found = []
    for factor, guard in ((1.0, lambda loss, _: loss > 100), (1e30, finite), (1.0, finite)):
        before = {name: value.full_tensor().clone() for name, value in engine.model_state().items()}
        report = engine.train_step(share(packs, 4, 0), factor, guard)
        now = {name: value.full_tensor() for name, value in engine.model_state().items()}
        found.append((report.taken, any(not torch.equal(now[name], before[name]) for name in before)))
    return found


@pytest.mark.parametrize(
    "parallel",
    [FSDP(dtype="float32"), ZeRO(stage=1, dtype="float32"), ZeRO(stage=3, dtype="float32")],
    ids=["fsdp", "zero1", "zero3"],
)
def test_a_step_that_its_guard_refuses_moves_no_weight_on_any_rank(
    small: Recipe, stream: Stream, parallel: Parallel
) -> None:
    for found in on_ranks(2, guarded, small, replace(small.stage("pretrain"), parallel=parallel), stream):
        assert found == [(False, False), (True, True), (False, False)]  # weights of 1e27 give no finite loss


def test_ranks_that_do_not_divide_into_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="3 ranks cannot be groups of shard=2"):
        mesh_shape(FSDP(dtype="float32", shard=2), 3)


def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_three(
    small: Recipe, stream: Stream, tmp_path: Path, curve: Curve
) -> None:
    stage = small.stage("pretrain")
    on_ranks(2, train, small, stage, stream, 2, str(tmp_path), False)
    then = on_ranks(1, train, small, stage, stream, 1, str(tmp_path), True)[0]
    last = on_ranks(3, train, small, stage, stream, 1, str(tmp_path), True)[0]
    assert then + last == [pytest.approx(pair, rel=1e-4) for pair in curve("pretrain")[2:]]


def steps_of_kinds(recipe: Recipe, stage: Stage, stream: Stream) -> list[float]:
    """Steps in which ranks hold packs of different kinds: pictures here, text there, nothing on a third."""
    packs = list(PackWindows(stream).packs(0))
    pictures = next(p for p in packs if len(p.tiles))
    text = next(p for p in packs if not len(p.tiles))
    kinds = [pictures, text, Pack.empty((3, 96, 96))]
    engine = engine_of(recipe, stage)
    return [engine.train_step([kinds[(dist.get_rank() + step) % 3]], 1.0).loss for step in range(3)]


@pytest.mark.parametrize("stage", ["align", "pretrain"])
def test_ranks_with_different_kinds_of_packs_never_wait_for_each_other(
    small: Recipe, stream: Stream, stage: str
) -> None:
    losses = on_ranks(3, steps_of_kinds, small, small.stage(stage), stream)
    assert losses[0] == losses[1] == losses[2]
    assert all(4 < loss < 9 for loss in losses[0])


def steps_of_features(recipe: Recipe, stage: Stage, stream: Stream) -> list[tuple[float, float]]:
    """Loss and gradient norm of steps in which one rank holds features of pictures, the other text or nothing."""
    packs = list(PackWindows(stream).packs(0))
    assert {len(pack.tiles) for pack in packs} == {0}
    pictures = [pack for pack in packs if len(pack.cuts)]
    text = next(pack for pack in packs if not len(pack.cuts))
    engine = engine_of(recipe, stage)
    others = [empty_pack(stream), text, empty_pack(stream)]
    reports = []
    for step, other in enumerate(others):
        mine = pictures[step] if dist.get_rank() == step % 2 else other
        report = engine.train_step([mine], 1.0)
        reports.append((report.loss, report.grad_norm))
    return reports


def with_features(recipe: Recipe, stream: Stream, folder: Path) -> tuple[Recipe, Stream]:
    """Both with an encoder that has weights, whose features the stream's packs carry."""
    torch.manual_seed(0)
    tower: Any = recipe.vlm.build().encoder.tower
    tower.tower.save_pretrained(folder)
    frozen = replace(recipe.vlm.tower, weights=str(folder))
    named = replace(recipe, model=replace(recipe.vlm, encoder=frozen))
    return named, replace(stream, annotators=(FrozenFeatures(encoder=frozen),))


def test_a_rank_without_packs_never_holds_up_those_with_features(small: Recipe, stream: Stream, tmp_path: Path) -> None:
    named, annotated = with_features(small, stream, tmp_path)
    one, other = on_ranks(2, steps_of_features, named, named.stage("pretrain"), annotated)
    assert one == other
    assert all(4 < loss < 9 and norm > 0 for loss, norm in one)


def evaluated(recipe: Recipe, stage: Stage, held_out: Stream) -> list[float]:
    """Held-out losses of a fresh model."""
    found = evaluation_of(engine_of(recipe, stage), held_out, recipe, stage.name, "before")
    return [score.loss for score in found.scores]


def test_held_out_rows_are_neither_filtered_nor_rewritten_but_take_the_stage_s_form(small: Recipe, site: Site) -> None:
    codes = DiscreteCodes(weights="vq", size=8, first=100)
    annotators = (ScoreFilter(weights="clip", at_least=0.3), Recaption(weights="blip"), codes)
    stage = replace(small.stages[0], annotators=annotators)
    held_out = site.held_out(small, stage)
    assert held_out is not None
    assert held_out.annotators == (codes,)
    assert site.stream(small, stage).annotators == annotators


def test_ranks_with_unlike_numbers_of_held_out_packs_evaluate_features_together(
    small: Recipe, site: Site, tmp_path: Path
) -> None:
    stage = small.stage("align")
    held_out = site.held_out(small, stage)
    assert held_out is not None
    # Shots and answers show tiles, and all ranks see the same ones.
    named, annotated = with_features(replace(small, shots=(0,)), held_out, tmp_path)
    plain = on_ranks(1, evaluated, named, stage, held_out)[0]
    for losses in on_ranks(2, evaluated, named, stage, annotated):
        assert losses == pytest.approx(plain, rel=1e-2)


def test_recomputing_activations_changes_nothing(small: Recipe, stream: Stream, tmp_path: Path, curve: Curve) -> None:
    for how in ("full", "selective"):
        again = replace(small.stage("sft"), parallel=FSDP(dtype="float32", recompute=how))
        assert on_ranks(1, train, small, again, stream, 2, str(tmp_path / how), False) == [curve("sft")[:2]]


@pytest.mark.parametrize("world", [1, 2])
def test_bfloat16_follows_float32(small: Recipe, stream: Stream, tmp_path: Path, world: int, curve: Curve) -> None:
    half = replace(small.stage("pretrain"), parallel=FSDP(dtype="bfloat16", recompute="full"))
    mixed = on_ranks(world, train, small, half, stream, 3, str(tmp_path), False)[0]
    assert [loss for loss, _ in mixed] == pytest.approx([loss for loss, _ in curve("pretrain")[:3]], rel=1e-2)
