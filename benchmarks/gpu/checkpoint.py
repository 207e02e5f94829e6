"""Seconds in which `cluster.saver.Saver` holds a run up: weights, and the moments of what is trained,
float32, to the local disk. The copy to the host is what training waits for; the speed is that of the writing beside it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.common import Row, alone, scratch
from benchmarks.gpu.cases import Case, Found
from benchmarks.gpu.device import DEVICE, GROUP
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.training import model_of, pack_of, recipe_of
from cluster.checkpoint import Manifest, TrainState
from cluster.engines import build_engine, finite
from cluster.saver import Saver
from pipelines.place import Place


def cases(sizes: Sizes) -> Iterator[Case]:
    decoder = next(iter(sizes.decoders))
    rows = (
        Row(f"{decoder}, tower frozen: stall of a checkpoint", "s", []),
        Row(f"{decoder}, tower frozen: size of a checkpoint", "GB", []),
        Row(f"{decoder}, tower frozen: speed", "GB/s", []),
    )
    yield Case(rows, partial(checkpoint_stall, sizes, decoder))


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
