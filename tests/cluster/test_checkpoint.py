"""Checkpoints: any number of ranks reads what any other wrote, nothing broken is taken for whole, training never waits long."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from benchmarks.common import PRELOAD, on_ranks
from cluster import checkpoint, loading, shards
from cluster.checkpoint import Attempt, CorruptCheckpoint, Manifest, PassedOver, ShardTally, TrainState, removable
from cluster.parts import write_parts
from cluster.saver import SaveFailed, Saver, save
from cluster.schedule import due, stale
from mllm.recipe import Full, LoRA, Recipe, Stage
from pipelines import reach, storage
from pipelines.place import Place
from pipelines.storage import Storage
from pipelines.types import Position
from pipelines.windows import PackWindows, Stream
from tests.cluster.test_engine import engine_of, share
from tests.s3 import BUCKET, Proxy, Server

WORLDS = (1, 2, 3, 4)


def manifest(token: int = 0, final: bool = False) -> Manifest:
    return Manifest(
        run="r",
        stage="s",
        fingerprint="f",
        order="o",
        step=0,
        world=1,
        final=final,
        versions={"torch": "2"},
        token=token,
    )


def at(step: int) -> TrainState:
    tally = {"corpus/shard": ShardTally(seen=9, dropped=1)}
    return TrainState(step=step, tokens=1000 * step, progress=step / 7, position=Position(window=step), shards=tally)


def numbers(value: float = 1.0) -> dict[str, Any]:
    """A state of one process, with every kind of value that optimisers have; half a megabyte."""
    moments = {"exp_avg": torch.full((300, 200), value), "step": torch.tensor(value)}
    group = {
        "lr": 0.1 * value,
        "betas": (0.9, 0.95),
        "params": ["w", "v"],
        "fused": None,
        "amsgrad": False,
        "name": "x",
    }
    return {
        "model": {
            "w": torch.full((300, 200), value),
            "v": torch.arange(7).bfloat16() * value,
            "none": torch.empty(0, 4),
        },
        "optimizer": {"state": {"w": moments}, "param_groups": [group, {**group, "lr": float("inf"), "params": []}]},
    }


def blank(state: Any) -> Any:
    """The same form with other numbers, to be loaded into."""
    if isinstance(state, DTensor | Tensor):
        return torch.zeros_like(state) - 1 if state.dtype != torch.bool else torch.zeros_like(state)
    if isinstance(state, dict):
        return {key: blank(value) for key, value in state.items()}
    return [blank(value) for value in state] if isinstance(state, list) else None


def fingerprints(state: Any, name: str = "") -> dict[str, str]:
    """Each leaf of a state as text; of tensors, whole ones, a digest. A collective where they are sharded."""
    if isinstance(state, Tensor):
        whole = state.full_tensor() if isinstance(state, DTensor) else state
        data = whole.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return {name: f"{whole.dtype} {tuple(whole.shape)} {hashlib.sha256(data).hexdigest()}"}
    if isinstance(state, dict) or (isinstance(state, list) and any(isinstance(each, dict) for each in state)):
        rows = state.items() if isinstance(state, dict) else enumerate(state)
        return {key: text for inner, value in rows for key, text in fingerprints(value, f"{name}.{inner}").items()}
    return {name: repr(state)}


def odd() -> dict[str, Any]:
    """Tensors sharded in ways that models are not: by columns, with fewer rows than ranks, of other types, of many pieces."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(7)
    wholes = {
        "rows": (torch.randn(7, 5), Shard(0)),
        "columns": (torch.randn(6, 11), Shard(1)),
        "middle": (torch.randn(3, 10, 4).bfloat16(), Shard(1)),
        "few": (torch.randn(2, 3).double(), Shard(0)),
        "copies": (torch.arange(12).reshape(3, 4), Replicate()),
        "pieces": (torch.randn(900, 40), Shard(0)),
        "flags": (torch.rand(9) > 0.5, Shard(0)),
    }
    return {name: distribute_tensor(whole, mesh, [how]) for name, (whole, how) in wholes.items()}


def written_and_read(
    recipe: Recipe, stage: Stage, stream: Stream, folder: str, write: bool, read: list[int]
) -> tuple[dict[str, str], list[tuple[TrainState, dict[str, str]]]]:
    """What this world writes, and what it then reads of those that other worlds wrote: leaves of the state."""
    shards.PIECE = 2**14  # so that the least tensors have several
    world = dist.get_world_size()
    engine = engine_of(recipe, stage)
    mine: dict[str, str] = {}
    if write:
        engine.train_step(share(list(PackWindows(stream).packs(0)), 4, 0), 1.0)
        state = {**engine.state(), "odd": odd()}
        mine = fingerprints(state)
        save(Place(folder) / str(world), state, at(world), manifest())
    found = []
    for other in read:
        state = blank({**engine.state(), "odd": odd()})
        place = (Place(folder) / str(other)) / checkpoint.folder_name(other)
        loading.load(place, state)
        engine.load_state(state)
        found.append((checkpoint.read_state(place), fingerprints({**engine.state(), "odd": state["odd"]})))
    return mine, found


def test_any_number_of_ranks_goes_on_from_what_any_other_wrote(small: Recipe, stream: Stream, tmp_path: Path) -> None:
    stage = replace(small.stage("pretrain"), ema=0.9)
    wrote: dict[int, dict[str, str]] = {}
    for world in WORLDS[:-1]:
        wrote[world], _ = on_ranks(world, written_and_read, small, stage, stream, str(tmp_path), True, [])[0]
    for world in reversed(WORLDS):
        last = world == WORLDS[-1]
        ranks = on_ranks(world, written_and_read, small, stage, stream, str(tmp_path), last, list(WORLDS))
        if last:
            wrote[world] = ranks[0][0]
        for _, found in ranks:
            for other, (state, leaves) in zip(WORLDS, found, strict=True):
                assert state == at(other)
                assert leaves == wrote[other]
    assert any("exp_avg" in name for name in wrote[1])
    assert any("averages" in name for name in wrote[1])


def test_values_that_are_no_tensors_come_back_as_they_were_and_others_are_refused_by_name(tmp_path: Path) -> None:
    folder = save(Place(tmp_path), numbers(), at(1), manifest())
    loaded = blank(numbers())
    loading.load(folder, loaded)
    assert fingerprints(loaded) == fingerprints(numbers())
    assert loaded["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.95)
    strange = {**numbers(), "extra": {"when": Path("x")}}
    with pytest.raises(TypeError, match=r"extra\.when is a pathlib.*never pickles"):
        save(Place(tmp_path), strange, at(2), manifest())


class Packed(Tensor):
    """Numbers kept as hundredths in 16 bits, as optimisers keep moments in eight."""

    @staticmethod
    def __new__(cls, packed: Tensor) -> Packed:
        return Tensor._make_wrapper_subclass(cls, packed.shape, dtype=torch.float32)  # type: ignore[attr-defined]

    def __init__(self, packed: Tensor) -> None:
        self.packed = packed

    def dequantize(self) -> Tensor:
        return self.packed.float() / 100

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        match function.overloadpacket:
            case torch.ops.aten.detach:
                return cls(args[0].packed)
            case torch.ops.aten.is_pinned:
                return False
            case torch.ops.aten.copy_:
                args[0].packed.copy_((args[1] * 100).round())
                return args[0]
        raise NotImplementedError(str(function))


def test_moments_that_are_kept_packed_are_saved_as_numbers_and_packed_again(tmp_path: Path) -> None:
    moments = torch.arange(12, dtype=torch.int16).reshape(3, 4)
    folder = save(Place(tmp_path), {"moments": Packed(moments)}, at(1), manifest())
    into, whole = Packed(torch.zeros_like(moments)), torch.zeros(3, 4)
    loading.load(folder, {"moments": into})
    loading.load(folder, {"moments": whole})
    assert torch.equal(into.packed, moments)
    assert torch.equal(whole, moments / 100)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 4
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1024])


def half_written(folder: Path) -> None:
    (folder / "manifest.json").unlink()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (lambda folder: cut(folder / "__0_0.bin"), r"__0_0\.bin has 1,024 of 960,022 bytes"),
    "gone": (lambda folder: (folder / "__0_0.bin").unlink(), r"__0_0\.bin is gone"),
    "no index": (lambda folder: (folder / "index.json").unlink(), r"index\.json is gone"),
    "garbage": (lambda folder: (folder / "manifest.json").write_bytes(b"\0garbage"), "manifest cannot be read"),
    "another file": (lambda folder: (folder / "manifest.json").write_bytes(b"{}"), "manifest cannot be read"),
    "half written": (half_written, "no manifest, so its writing was cut off"),
    "rejected": (lambda folder: checkpoint.reject(Place(folder), "a bit was flipped"), "a bit was flipped"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_is_not_whole_is_passed_over_with_the_reason(tmp_path: Path, damage: str) -> None:
    folders = [save(Place(tmp_path), numbers(step), at(step), manifest()) for step in (8, 9)]
    break_it, words = DAMAGES[damage]
    break_it(folders[1].path)
    told: list[PassedOver] = []
    found = checkpoint.newest(Place(tmp_path), "f", "o", told.append)
    assert found is not None
    assert (found.folder, found.manifest.step) == (folders[0], 8)
    (only,) = told
    assert str(only).startswith("step-000009 is passed over: ")
    assert re.search(words, only.reason)
    assert checkpoint.checkpoints(Place(tmp_path)) == folders[:1]
    break_it(folders[0].path)
    assert checkpoint.newest(Place(tmp_path), "f", "o", told.append) is None
    assert [each.folder.name for each in told[1:]] == ["step-000009", "step-000008"]


def test_another_recipe_or_other_data_is_refused_and_nothing_is_found_in_a_folder_that_is_not_there(
    tmp_path: Path,
) -> None:
    assert checkpoint.newest(Place(tmp_path / "none"), "f", "o") is None
    save(Place(tmp_path), numbers(), at(1), manifest())
    with pytest.raises(ValueError, match="the recipe was changed"):
        checkpoint.newest(Place(tmp_path), "another", "o")
    with pytest.raises(ValueError, match="a shard was changed"):
        checkpoint.newest(Place(tmp_path), "f", "another")


def test_a_checkpoint_of_another_format_is_refused_with_who_wrote_it_and_what_to_do(tmp_path: Path) -> None:
    old = tmp_path / "step-000007"
    old.mkdir()
    (old / "manifest.json").write_text(
        '{"run": "r", "stage": "s", "fingerprint": "f", "order": "o", "step": 7, "world": 1, "final": false, '
        '"versions": {"mllm": "0.1.0", "torch": "2.11.0"}}'
    )
    (old / ".metadata").write_bytes(pickle.dumps("anything"))
    for act in (
        lambda: checkpoint.newest(Place(tmp_path), "f", "o"),
        lambda: loading.load(Place(old), numbers()),
    ):
        with pytest.raises(ValueError, match=r"format 1 by .*mllm 0\.1\.0, torch 2\.11\.0\).*train the stage again"):
            act()


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("evil-was-here",)


def test_no_pickle_is_ever_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = save(Place(tmp_path), numbers(), at(1), manifest())
    for name in (".metadata", "__0_0.distcp", "state.pt", "index.pkl"):
        (folder.path / name).write_bytes(pickle.dumps(Evil()))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was opened")

    for module, names in ((pickle, ("load", "loads", "Unpickler")), (torch, ("load",))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    found = checkpoint.newest(Place(tmp_path), "f", "o")
    assert found is not None
    loaded = blank(numbers())
    loading.load(found.folder, loaded)
    assert checkpoint.read_state(found.folder) == at(1)
    assert fingerprints(loaded) == fingerprints(numbers())
    (folder.path / "index.json").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CorruptCheckpoint, match=r"index\.json has other bytes than were written"):
        loading.load(folder, loaded)
    (folder.path / "manifest.json").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CorruptCheckpoint, match=r"manifest\.json cannot be read"):
        loading.load(folder, loaded)
    assert not (tmp_path / "evil-was-here").exists()


def ranks_together(folder: str) -> dict[str, Any]:
    """What two ranks see of a save while training goes on, of a broken byte in one rank's file, and of a full disk."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    weights = distribute_tensor(torch.arange(4_000_000.0).reshape(1000, 4000), mesh, [Shard(0)])
    state = {"model": {"w": weights}}
    found: dict[str, Any] = {}
    with Saver(Place(folder)) as saver:
        saver.save(state, at(1), manifest())
        saver.settle()
        weights.to_local().zero_()  # the next step
        found["outcomes"] = saver.wait()
        weights.to_local().fill_(2.0)
        saver.save(state, at(2), manifest())  # in the same buffers
        saver.settle()
        weights.to_local().zero_()
        found["outcomes"] += saver.save(state, at(3), manifest(final=True), wait=True)
    loaded = {"model": {"w": blank(weights)}}
    found["kept"] = [place.name for place in checkpoint.checkpoints(Place(folder))]
    two = Place(folder) / "step-000002"
    loading.load(two, loaded)
    found["second"] = loaded["model"]["w"].full_tensor().unique().tolist()
    dist.barrier()
    if rank == 0:
        flip(two.path / "__1_0.bin")
    dist.barrier()
    try:
        loading.load(two, loaded)
    except CorruptCheckpoint as error:
        found["corrupt"] = (error.file, error.tensor, str(error))
    return found


def test_all_ranks_go_on_at_once_and_agree_on_what_became_of_a_save(tmp_path: Path) -> None:
    for found in on_ranks(2, ranks_together, str(tmp_path)):
        assert [(o.step, o.whole, o.trouble) for o in found["outcomes"]] == [(n, True, None) for n in (1, 2, 3)]
        assert all(0 < o.stall <= o.seconds for o in found["outcomes"])
        assert found["kept"] == ["step-000002", "step-000003"]
        assert found["second"] == [2.0]
        file, tensor, words = found["corrupt"]
        assert (file, tensor) == ("__1_0.bin", "model.w")
        assert "step-000002: __1_0.bin, of model.w, has other bytes from" in words


def test_weights_that_change_once_a_save_is_settled_are_saved_as_they_were(tmp_path: Path) -> None:
    state = numbers(3.0)
    before = fingerprints(state)
    saver = Saver(Place(tmp_path))
    for step in (1, 2):
        saver.save(state, at(step), manifest())
        saver.settle()
        state["model"]["w"].zero_()
        state["optimizer"]["param_groups"][0]["lr"] = 7.0
        saver.wait()
        loaded = blank(numbers())
        loading.load(Place(tmp_path) / checkpoint.folder_name(step), loaded)
        assert fingerprints(loaded) == before
        state = numbers(3.0)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of three megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_the_older_checkpoint_and_words(tiny_disk: Path) -> None:
    saver = Saver(Place(tiny_disk))
    assert saver.save(numbers(), at(1), manifest(), wait=True)[0].whole
    large = {"model": {"w": torch.ones(1_000_000)}}
    saver.save(large, at(2), manifest())
    (outcome,) = saver.save(numbers(), at(3), manifest())  # training has gone on
    assert not outcome.whole
    assert re.search(r"step-000002: was not written: .*No space left.* MiB are free .* takes 3\.8 MiB", str(outcome))
    assert saver.wait()[0].whole
    assert sorted(os.listdir(tiny_disk)) == ["step-000001", "step-000003"]
    with pytest.raises(SaveFailed, match="No space left"):
        saver.save(large, at(4), manifest(final=True), wait=True)
    found = checkpoint.newest(Place(tiny_disk), "f", "o")
    assert found is not None
    assert found.manifest.step == 3


@pytest.fixture
def proxy(s3: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    monkeypatch.setattr(reach, "PAUSE", 0.02)
    proxy = Proxy(s3.port)
    storage.use(proxy.storage())
    yield proxy
    proxy.close()
    storage.use(Storage())


def test_storage_that_fails_for_long_costs_a_checkpoint_and_not_the_run(proxy: Proxy, tmp_path: Path) -> None:
    folder = Place(f"s3://{BUCKET}/{tmp_path.name}")
    saver = Saver(folder)
    saver.save(numbers(1), at(1), manifest(), wait=True)
    proxy.faults[:] = ["503"] * 60
    saver.save(numbers(2), at(2), manifest())
    saver._join()
    proxy.faults.clear()
    (outcome,) = saver.save(numbers(3), at(3), manifest())
    assert not outcome.whole
    assert "the storage is at fault" in str(outcome.trouble)
    proxy.faults += ["refuse", "503"]  # what passes is not even noticed
    (third,) = saver.wait()
    assert third.whole
    assert [place.name for place in checkpoint.checkpoints(folder)] == ["step-000001", "step-000003"]


def on_s3(settings: Storage, folder: str) -> list[str]:
    """Save four times on S3, read the last one; which checkpoints are left."""
    storage.use(settings)
    state = {"odd": odd(), "lr": 0.5}
    saver = Saver(Place(folder), keep=2, protected={"step-000001"})
    for step in range(1, 5):
        saver.save(state, at(step), manifest())
    saver.wait()
    loaded = blank(state)
    loading.load(Place(folder) / "step-000004", loaded)
    assert fingerprints(loaded) == fingerprints(state)
    return Place(folder).names()


def test_s3_is_a_disk_like_any_other(s3: Server, tmp_path: Path) -> None:
    folder = f"s3://{BUCKET}/{tmp_path.name}"
    assert on_ranks(3, on_s3, s3.storage, folder) == [["step-000001", "step-000003", "step-000004"]] * 3
    storage.use(s3.storage)
    try:
        found = checkpoint.newest(Place(folder), "f", "o")
        assert found is not None
        bin_file = found.folder / "__1_0.bin"
        data = bytearray(bin_file.read_bytes())
        data[20] ^= 1
        bin_file.write(bytes(data))
        loaded: dict[str, Any] = {"odd": {"rows": torch.empty(7, 5), "columns": torch.empty(6, 11)}}
        with pytest.raises(CorruptCheckpoint, match=r"step-000004: __1_0\.bin, of odd\.rows, has other bytes"):
            loading.load(found.folder, loaded)
        checkpoint.reject(found.folder, "flipped")
        told: list[PassedOver] = []
        found = checkpoint.newest(Place(folder), "f", "o", told.append)
        assert found is not None
        assert (found.folder.name, told[0].reason) == ("step-000003", "flipped")
        loading.load(found.folder, loaded)  # alone, what three ranks wrote
        (found.folder / "manifest.json").write(b"{")
        assert [place.name for place in checkpoint.checkpoints(Place(folder))] == ["step-000001"]
    finally:
        storage.use(Storage())


def begin_and_end(folder: str, port: int) -> None:
    """Begin a save on storage that never answers, and end."""
    storage.use(Storage(endpoint=f"http://127.0.0.1:{port}", region="us-east-1", key="k", secret="s", deadline=60))
    Saver(Place(folder)).save({"w": torch.ones(20_000_000)}, at(1), manifest())


def test_a_process_ends_at_once_though_a_save_is_under_way() -> None:
    silent = Proxy(1, faults=["silent"] * 99)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=begin_and_end, args=("s3://bucket/x", silent.port))
    process.start()
    process.join(20)
    assert process.exitcode == 0
    silent.close()


ATTEMPTS = st.lists(
    st.tuples(st.integers(1, 6), st.integers(0, 3), st.booleans()), max_size=10, unique_by=lambda row: row[:2]
).map(
    lambda rows: [
        Attempt(name=checkpoint.folder_name(step, token), step=step, token=token, whole=whole)
        for step, token, whole in rows
    ]
)


@given(ATTEMPTS, st.integers(1, 3), st.sets(st.integers(0, 9)), st.integers(0, 3))
def test_retention_leaves_what_a_run_may_need(found: list[Attempt], keep: int, chosen: set[int], token: int) -> None:
    protected = {found[n].name for n in chosen if n < len(found)}
    gone = set(removable(found, keep, protected, token))
    ordered = sorted(found, key=lambda each: (each.step, each.token))
    whole = [each.name for each in ordered if each.whole]
    assert not gone & protected
    assert not gone & set(whole[-keep:])
    if any(each.token > token for each in found) or not whole:
        assert not gone
        return
    newest = [each.name for each in ordered].index(whole[-1])
    assert gone == {each.name for each in ordered[:newest]} - protected - set(whole[-keep:])


def test_one_step_under_two_tokens_has_two_folders_and_an_outdated_writer_touches_neither(tmp_path: Path) -> None:
    folder = Place(tmp_path)
    save(folder, numbers(1), at(40), manifest())
    (tmp_path / "step-000041").mkdir()
    (tmp_path / "step-000041" / "__7_0.bin").write_bytes(b"half")
    save(folder, numbers(2), at(40), manifest(token=7))
    assert folder.names() == ["step-000040", "step-000040-7", "step-000041"]
    found = checkpoint.newest(folder, "f", "o")
    assert found is not None
    assert (found.folder.name, found.manifest.token) == ("step-000040-7", 7)
    with pytest.raises(SaveFailed, match="another controller has taken the run over"):
        save(folder, numbers(3), at(42), manifest(token=3))
    assert folder.names() == ["step-000040", "step-000040-7", "step-000041"]
    save(folder, numbers(2), at(41), manifest(token=8))  # and what was cut off goes with the oldest
    assert folder.names() == ["step-000040-7", "step-000041-8"]
    with pytest.raises(ValueError, match="keep one at least"):
        Saver(folder, keep=0)


def test_what_an_earlier_attempt_left_at_a_step_is_no_part_of_the_next(tmp_path: Path) -> None:
    (tmp_path / "step-000001").mkdir()
    (tmp_path / "step-000001" / "__3_0.bin").write_bytes(b"of another world")
    folder = save(Place(tmp_path), numbers(), at(1), manifest())
    written = checkpoint.read_manifest(folder)
    assert sorted(written.files) == ["__0_0.bin", "index.json", "state.json"]
    there = folder.sizes()
    del there["manifest.json"]
    assert there == {name: mark.size for name, mark in written.files.items()}
    assert (written.progress, written.tokens, written.step) == (1 / 7, 1000, 1)
    assert abs(written.time - time.time()) < 60


def test_a_checkpoint_is_due_by_steps_and_by_minutes_whatever_the_wall_clock_says(
    small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = replace(small.stage("pretrain"), save_every=10)
    assert [step for step in range(1, 31) if due(stage, step)] == [10, 20, 30]
    timed = replace(stage, save_minutes=1.5)
    assert [stale(timed, since) for since in (0.0, 89.9, 90.0)] == [False, False, True]
    saver = Saver(Place(tmp_path))
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert saver.since < 60


def tuned(recipe: Recipe, stage: Stage, stream: Stream, folder: str) -> None:
    engine = engine_of(recipe, stage)
    engine.train_step(share(list(PackWindows(stream).packs(0)), 4, 0), 1.0)
    save(Place(folder), engine.state(), at(1), manifest())


def test_a_stage_s_weights_are_read_alone_merged_and_written_as_parts(
    small: Recipe, stream: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = replace(small.stage("pretrain"), tune={"lm": LoRA(lr=1e-2, rank=4), "connector": Full(lr=1e-3)})
    on_ranks(1, tuned, small, stage, stream, str(tmp_path))
    folder = Place(tmp_path) / "step-000001"
    index = shards.parse_index((folder / "index.json").read_bytes())
    asked: list[int] = []
    read = storage.read_into

    def counted(
        uri: str, start: int, buffers: Sequence[memoryview], new: Callable[[], storage.D]
    ) -> tuple[int, list[storage.D]]:
        found = read(uri, start, buffers, new)
        asked.append(found[0])
        return found

    monkeypatch.setattr(storage, "read_into", counted)
    elsewhere = replace(small.vlm, lm=replace(small.vlm.lm, weights="nowhere"))  # which the checkpoint has no need of
    model = loading.read_model(replace(small, model=elsewhere), stage, folder)
    stored = {name: row for name, row in index.tensors.items() if name.startswith("model.")}
    assert sum(asked) == sum(4 * torch.Size(row.shape).numel() for row in stored.values())
    weights = model.state_dict()
    assert not any("lora" in name for name in weights)
    names = write_parts(Place(tmp_path / "parts"), weights, largest=200_000)
    assert {name.split(".")[0].split("-")[0] for name in names[:-1]} == {"encoder", "connector", "lm"}
    assert sum(name.startswith("lm-") for name in names) > 1
    read_back = {k: v for name in names[:-1] for k, v in load_file(tmp_path / "parts" / name).items()}
    assert fingerprints(read_back) == fingerprints(dict(weights))


def test_a_checkpoint_that_is_read_beside_training_is_not_taken_away(
    small: Recipe, stream: Stream, tmp_path: Path
) -> None:
    on_ranks(1, tuned, small, small.stage("pretrain"), stream, str(tmp_path))
    stage = Place(tmp_path)
    first = checkpoint.checkpoints(stage)[0].name
    for step in (2, 3):
        shutil.copytree(tmp_path / first, tmp_path / first.replace("000001", f"{step:06d}"))
    checkpoint.hold(stage, first)
    checkpoint.retain(stage, 1, (), 0)
    assert {place.name for place in checkpoint.attempts(stage)} == {first, first.replace("000001", "000003")}
    checkpoint.hold(stage, "")
    checkpoint.retain(stage, 1, (), 0)
    assert [place.name for place in checkpoint.attempts(stage)] == [first.replace("000001", "000003")]
