"""Two steps of every stage of small forms whose parts reach into the language model, by the engine that trains them."""

from itertools import islice
from typing import Any

import pytest
import torch

from cluster.engines import alone, build_engine
from cluster.site import Site
from mllm.recipes import by_name
from mllm.tiny import tiny
from mllm.tune import apply_tuning
from pipelines.windows import PackWindows


@pytest.mark.parametrize(
    "name",
    [
        "cambrian_1_8b",
        "cogagent_18b",
        "glm4v_9b",
        "qwen_vl_7b",
        "flamingo_3b",
        "openflamingo_4b",
        "openflamingo_9b",
        "internvl_10_13b",
        "lwm_7b",
    ],
)
def test_each_stage_trains_what_it_says_and_nothing_else(name: str, site: Site) -> None:
    recipe = tiny(by_name(name))
    for stage in recipe.stages if name != "lwm_7b" else (recipe.stages[0], recipe.stages[-1]):
        torch.manual_seed(0)
        model: Any = recipe.model.build()
        tuned = recipe.model.build()
        wanted = {name for group in apply_tuning(tuned, stage.tune) for name in group.names}
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        packs = [*islice((p for p in PackWindows(site.stream(recipe, stage)).packs(0) if p.learned), 2)]
        with alone():
            engine = build_engine(model, stage, len(stage.mixture), torch.device("cpu"))
            losses = [engine.train_step([pack], 1.0).loss for pack in packs]
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert len(losses) == 2
        assert all(0 < loss < 20 for loss in losses)
        assert moved <= wanted
        assert moved
