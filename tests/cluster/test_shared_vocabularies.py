"""Words and codes count half each of a whole step, also where two ranks hold half of each pack's positions."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from benchmarks.common import on_ranks
from cluster.engines import build_engine
from mllm.fusion import UnifiedVocabulary
from mllm.objectives import TwoVocabularies
from mllm.recipe import FSDP, Full, Source, Stage
from pipelines.corpora import TextOnly
from pipelines.types import Pack
from tests.mllm.toys import PICTURE, Doc, pack_of, toy

CODES: list[Doc] = [[5, 128, 140, 167, 6], [7, 8, 9, 10], [130, 131, PICTURE, 20]]


def losses(context: int) -> list[tuple[float, float]]:
    """Of two steps, whose packs ranks hold whole or share."""
    vlm: Any = toy(UnifiedVocabulary(rows=40))
    stage = Stage(
        name="stage",
        mixture=(Source(corpus=TextOnly(name="any")),),
        tune={"lm": Full(lr=1e-2), "fusion": Full(lr=1e-2)},
        context=64,
        tokens_per_step=128,
        objective=TwoVocabularies(),
        parallel=FSDP(dtype="float32", recompute="none", context=context),
    )
    torch.manual_seed(0)
    engine = build_engine(vlm.build(), stage, 1, torch.device("cpu"))
    packs = [pack_of(vlm, CODES[:1]), pack_of(vlm, CODES[1:])]
    mine = packs[dist.get_rank() :: dist.get_world_size()]
    empty = Pack.empty(packs[0].tiles.shape[1:])
    assert np.array_equal(empty.input_ids, [])
    reports = [engine.train_step(mine, 1.0) for _ in range(2)]
    return [(report.loss, report.grad_norm) for report in reports]


def test_shared_packs_give_the_same_steps() -> None:
    whole = on_ranks(2, losses, 1)
    shared = on_ranks(2, losses, 2)
    for one in (*whole, *shared):
        for found, expected in zip(one, whole[0], strict=True):
            assert found == pytest.approx(expected, rel=1e-4)
