"""Checkpoints of `cluster.saver.Saver` and `cluster.loading.load`, beside torch's own and beside bare storage.

Stall: seconds for which training stands still, in the call and at the end of the step after it, where weights must not change
before they are copied; the step is a real one. Beside it, of the same state, `torch.distributed.checkpoint.save` and `torch.save`
followed by fsync, which hold it up until all is written. Bandwidth: of a save until its manifest is there, beside one file of as
many bytes written in 16 MiB pieces and fsynced; of a load that checks every byte, beside reading the same files' bytes in the
same pieces and checking nothing. On S3, a server on loopback that shares the cores, beside `s3fs` by itself: one concurrent
multipart upload, and concurrent reads of ranges.

Fair because each pair takes turns, so that the disk's moods hit both; because all write new files, of bytes from all over the
memory, while the last round's are still there, and are timed until they are on the disk; and because files are dropped from
the page cache before either reads them. Rounds that begin are left out.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from benchmarks.common import Section, alone, cores, in_child, ratios, scratch
from cluster import loading
from cluster.checkpoint import Manifest, TrainState
from cluster.engines import Engine, build_engine, finite
from cluster.saver import Saver
from cluster.site import EXAMPLE, load_site
from mllm.recipe import Recipe
from mllm.recipes import by_name
from pipelines import storage
from pipelines.place import Place
from pipelines.storage import Storage
from pipelines.types import Pack
from pipelines.windows import PackWindows

PIECE = 16 * 2**20

STALL = 0.05
"""Share of a blocking save that ours may hold training up."""

SPEED = 0.8
"""Share of bare storage's bandwidth that a checkpoint should reach."""

MANIFEST = Manifest(run="bench", stage="s", fingerprint="f", order="o", step=0, world=1, final=False, versions={})

Seconds = dict[str, list[float]]


def larger(recipe: Recipe) -> Recipe:
    """The smoke recipe with a language model of about 47 million parameters."""
    lm = recipe.vlm.lm
    arch = replace(lm.arch, vocab_size=16384, hidden_size=512, layers=10, heads=8, kv_heads=8, intermediate_size=1365)
    return replace(recipe, model=replace(recipe.vlm, lm=replace(lm, arch=arch)))


def engine_of(large: bool) -> tuple[Engine, list[Pack]]:
    """An engine that has the weights, and the moments of what pretrain trains, float32; and a step's packs."""
    torch.set_num_threads(cores())
    recipe = larger(by_name("vila_smoke")) if large else by_name("vila_smoke")
    stage = recipe.stage("pretrain")
    with scratch() as cache:
        windows = PackWindows(replace(load_site(str(EXAMPLE)), cache=str(cache)).stream(recipe, stage))
        packs = list(windows.packs(0))[: stage.packs_per_step]
    return build_engine(recipe.vlm.build(), stage, len(stage.mixture), torch.device("cpu")), packs


def timed(act: Callable[..., Any], *arguments: Any, **options: Any) -> float:
    """Seconds that one call takes."""
    started = time.perf_counter()
    act(*arguments, **options)
    return time.perf_counter() - started


def write_plain(file: Path, data: bytes) -> None:
    with file.open("wb", buffering=0) as out:
        for start in range(0, len(data), PIECE):
            out.write(memoryview(data)[start : start + PIECE])
        out.flush()
        os.fsync(out.fileno())


def read_plain(files: list[Path]) -> None:
    buffer = bytearray(PIECE)
    for file in files:
        with file.open("rb", buffering=0) as source:
            while source.readinto(buffer):
                pass


def forget(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def torch_save(state: dict[str, Any], file: Path) -> None:
    with file.open("wb") as out:
        torch.save(state, out)
        out.flush()
        os.fsync(out.fileno())


def on_disk(large: bool, repetitions: int, place: str) -> tuple[int, Seconds]:
    """Bytes of a checkpoint, and seconds of each way by its name."""
    folder, found = Path(place), {}
    with alone():
        engine, packs = engine_of(large)
        saver = Saver(Place(folder / "ours"), keep=1)
        size, data = 0, b""

        def settled(loss: float, grad_norm: float) -> bool:
            saver.settle()
            return finite(loss, grad_norm)

        for step in range(repetitions + 2):  # two rounds that begin: buffers, imports, plans
            now: dict[str, float] = {}
            now["step"] = timed(engine.train_step, packs, 1.0)
            began = time.perf_counter()
            state = engine.state()
            now["state"] = time.perf_counter() - began
            saver.save(state, TrainState(step=step), MANIFEST)
            now["step beside"] = timed(engine.train_step, packs, 1.0, settled)
            outcome = saver.wait()[-1]
            now["stall"] = now["state"] + outcome.stall
            outcome = saver.save(engine.state(), TrainState(step=step), MANIFEST, wait=True)[
                -1
            ]  # with the cores to itself
            size, now["save"] = outcome.size, outcome.seconds
            data = data or os.urandom(size)
            new, old = folder / f"theirs-{step}", folder / f"theirs-{step - 1}"
            new.mkdir()
            now["plain write"] = timed(write_plain, new / "plain.bin", data)
            now["dcp.save"] = timed(dcp_save, state, checkpoint_id=str(new / "dcp"), no_dist=False)
            now["torch.save"] = timed(torch_save, state, new / "torch.pt")
            shutil.rmtree(old, ignore_errors=True)
            files = sorted(outcome.folder.path.glob("*.bin"))
            forget(files)
            now["load"] = timed(loading.load, outcome.folder, state)
            forget(files)
            now["plain read"] = timed(read_plain, files)
            now["cached load"] = timed(loading.load, outcome.folder, state)
            now["cached read"] = timed(read_plain, files)
            for name, seconds in now.items() if step > 1 else ():
                found.setdefault(name, []).append(seconds)
    return size, found


def on_s3(large: bool, repetitions: int, settings: Storage) -> tuple[int, Seconds]:
    """The same on S3, beside s3fs."""
    import fsspec

    found: Seconds = {}
    storage.use(settings)
    bare = fsspec.filesystem("s3", **settings.s3(), skip_instance_cache=True)
    with alone():
        state = engine_of(large)[0].state()
        storage.use(settings)  # whose place the corpus's own have taken
        saver = Saver(Place("s3://corpus/ours"), keep=1)
        size = 0
        for step in range(repetitions + 1):
            now: dict[str, float] = {}
            saver.save(state, TrainState(step=step), MANIFEST)
            outcome = saver.wait()[-1]
            size = outcome.size
            data = os.urandom(PIECE) * -(-size // PIECE)
            data = data[:size]
            now["save"] = outcome.seconds
            now["plain write"] = timed(bare.pipe_file, "corpus/plain.bin", data, chunksize=PIECE)
            starts = range(0, size, 2 * PIECE)
            stops = [min(start + 2 * PIECE, size) for start in starts]
            now["load"] = timed(loading.load, outcome.folder, state)
            paths = ["corpus/plain.bin"] * len(stops)
            now["plain read"] = timed(bare.cat_ranges, paths, list(starts), stops, max_gap=None)
            for name, seconds in now.items() if step else ():
                found.setdefault(name, []).append(seconds)
    return size, found


def measure(section: Section, quick: bool) -> None:
    large = not quick
    repetitions = 1 if quick else 5
    with scratch() as folder:
        size, disk = in_child(on_disk, large, repetitions, str(folder))
    name = f"{size / 1e6:,.0f} MB"

    def speed(seconds: list[float]) -> list[float]:
        return [size / 1e6 / each for each in seconds]

    section.add(f"{name}: stall of a save", "s", disk["stall"], "it is copied while the next step computes")
    slower = ratios(disk["step beside"], disk["step"])
    section.add(f"{name}: step during a save / step", "ratio", slower, "two cores copy, write and train at once")
    for other in ("dcp.save", "torch.save"):
        section.add(f"{name}: blocking {other}", "s", disk[other])
        section.add(f"{name}: stall / {other}", "ratio", ratios(disk["stall"], disk[other]), at_most=STALL)
    section.add(f"{name}: save", "MB/s", speed(disk["save"]), "until the manifest is there")
    section.add(f"{name}: write and fsync", "MB/s", speed(disk["plain write"]), "the limit")
    section.add(f"{name}: save / write", "ratio", ratios(disk["plain write"], disk["save"]), at_least=SPEED)
    section.add(f"{name}: load, every byte checked", "MB/s", speed(disk["load"]), "from the disk")
    section.add(f"{name}: read", "MB/s", speed(disk["plain read"]), "the limit")
    section.add(f"{name}: load / read", "ratio", ratios(disk["plain read"], disk["load"]), at_least=SPEED)
    cached = ratios(disk["cached read"], disk["cached load"])
    section.add(f"{name}: load / read, page cache", "ratio", cached, "digests beside copying in memory")

    from tests.s3 import running

    with scratch() as folder, running(folder) as server:
        size, s3 = in_child(on_s3, large, min(repetitions, 3), server.storage)
    section.add(f"{name}: save to S3", "MB/s", speed(s3["save"]))
    section.add(f"{name}: s3fs writes", "MB/s", speed(s3["plain write"]), "the limit")
    section.add(f"{name}: save / s3fs", "ratio", ratios(s3["plain write"], s3["save"]), at_least=SPEED)
    section.add(f"{name}: load from S3, every byte checked", "MB/s", speed(s3["load"]))
    section.add(f"{name}: s3fs reads", "MB/s", speed(s3["plain read"]), "the limit")
    section.add(f"{name}: load / s3fs", "ratio", ratios(s3["plain read"], s3["load"]), at_least=SPEED)
    section.facts.append("one worker, float32; weights and the moments of what pretrain trains; first rounds left out")
