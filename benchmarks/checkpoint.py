"""Megabytes a second of `cluster.checkpoint.save` and `load`, beside writing the same bytes to the same disk.

The limit is one file of as many bytes as the checkpoint has, written in 16 MiB pieces and fsynced, in the same folder, right
after each save. Fair because both are timed to the moment when the bytes are on the disk (DCP fsyncs too) and take turns, so
that the disk's moods hit both. Loads read what was just written, from the page cache: they tell DCP's cost, not the disk's.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.common import Section, alone, cores, in_child, ratios, scratch
from cluster import checkpoint
from cluster.checkpoint import Manifest, TrainState
from cluster.engines import build_engine
from mllm.recipe import Recipe
from mllm.recipes import by_name

PIECE = 16 * 2**20


def larger(recipe: Recipe) -> Recipe:
    """The smoke recipe with a language model of about 47 million parameters."""
    lm = recipe.model.lm
    arch = replace(lm.arch, vocab_size=16384, hidden_size=512, layers=10, heads=8, kv_heads=8, intermediate_size=1365)
    return replace(recipe, model=replace(recipe.model, lm=replace(lm, arch=arch)))


def write_plain(file: Path, size: int) -> float:
    data = os.urandom(PIECE)
    started = time.perf_counter()
    with file.open("wb") as out:
        for start in range(0, size, PIECE):
            out.write(memoryview(data)[: min(PIECE, size - start)])
        out.flush()
        os.fsync(out.fileno())
    seconds = time.perf_counter() - started
    file.unlink()
    return seconds


def compare(large: bool, repetitions: int, place: str) -> tuple[float, list[float], list[float], list[float], int]:
    """Megabytes of a checkpoint; MB/s of saving, of plain writing and of loading; parameters."""
    torch.set_num_threads(cores())
    recipe = larger(by_name("vila_smoke")) if large else by_name("vila_smoke")
    stage = recipe.stage("pretrain")
    folder = Path(place)
    speeds: tuple[list[float], list[float], list[float]] = ([], [], [])
    megabytes = 0.0
    with alone():
        model = recipe.model.build()
        parameters = sum(p.numel() for p in model.parameters())
        engine = build_engine(model, stage, len(stage.mixture), torch.device("cpu"))
        state = engine.state()
        for repetition in range(repetitions + 1):
            manifest = Manifest(
                run="bench",
                stage="pretrain",
                fingerprint="f",
                order="o",
                step=repetition,
                world=1,
                final=False,
                versions={},
            )
            started = time.perf_counter()
            saved = checkpoint.save(folder, state, TrainState(step=repetition), manifest, keep=1)
            save = time.perf_counter() - started
            size = sum(file.stat().st_size for file in saved.iterdir())
            plain = write_plain(folder / "plain.bin", size)
            started = time.perf_counter()
            checkpoint.load(saved, state)
            load = time.perf_counter() - started
            megabytes = size / 1e6
            if repetition:  # the first one imports and plans
                for column, seconds in zip(speeds, (save, plain, load), strict=True):
                    column.append(megabytes / seconds)
    return megabytes, *speeds, parameters


def measure(section: Section, quick: bool) -> None:
    for large in (False, True):
        with scratch() as folder:
            repetitions = 1 if quick else 3 if large else 5
            megabytes, saves, plains, loads, parameters = in_child(compare, large, repetitions, str(folder))
        name = f"{megabytes:,.0f} MB"
        section.add(f"{name}: write and fsync", "MB/s", plains, f"{parameters / 1e6:.0f} M parameters; the limit")
        section.add(
            f"{name}: checkpoint.save", "MB/s", saves, f"median {megabytes / sorted(saves)[len(saves) // 2]:.2f} s"
        )
        section.add(f"{name}: save / write", "ratio", ratios(saves, plains))
        section.add(f"{name}: checkpoint.load", "MB/s", loads, "from the page cache")
    section.facts.append("one worker, float32; weights and the moments of what pretrain trains; first round left out")
