"""LWM: text of growing length, and pictures as codes of a second vocabulary."""

from typing import Any

import pytest
import torch

from cluster.site import Site
from mllm.objectives import TwoVocabularies
from mllm.recipe import FSDP, RecipeError, dump, load, override
from mllm.recipes import by_name
from mllm.tiny import tiny
from mllm.tune import apply_tuning, describe
from pipelines.types import Batch, Pack
from pipelines.windows import PackWindows

NAMES = ("lwm_text_7b", "lwm_text_chat_7b", "lwm_7b")


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_llama_with_a_second_table_and_head(name: str) -> None:
    recipe = by_name(name)
    assert recipe.name == name
    assert load(dump(recipe)) == recipe
    found = {one.part: one.trained + one.frozen for one in describe(recipe.model.meta(), {})}
    assert found.pop("lm") == 6_738_415_616
    assert found.pop("encoder") == 0
    assert found.pop("connector") == 2 * 4096  # of a tower that sees nothing
    assert found == ({"fusion": 2 * 8448 * 4096} if name == "lwm_7b" else {})


def test_its_context_and_its_rotary_base_grow_as_in_the_paper() -> None:
    recipe = by_name("lwm_7b")
    bases = [recipe.model_of(stage).lm.arch.rope_theta for stage in recipe.stages]  # type: ignore[union-attr]  # a Llama
    assert bases == [1e6, 1e7, 1e7, 2.5e7, *[5e7] * 6]
    assert [stage.context // 1024 for stage in recipe.stages] == [32, 128, 256, 512, 1024, 8, 8, 32, 128, 1024]
    ranks = [stage.parallel.context for stage in recipe.stages if isinstance(stage.parallel, FSDP)]
    assert ranks == [1, 4, 8, 16, 32, 1, 1, 1, 4, 32]
    (codes,) = recipe.stage("images-1k").annotators
    assert (codes.first, codes.last) == (32_000, 32_000 + 8193)  # type: ignore[union-attr]  # the only one there


def test_objectives_of_whole_documents_are_still_refused_for_shared_packs() -> None:
    recipe = by_name("lwm_7b")
    with pytest.raises(RecipeError, match="cannot be shared between ranks; set context to 1"):
        override(recipe, ['stages.128k.objective={"kind": "sum", "terms": [{"objective": {"kind": "next_token"}}]}'])


@pytest.mark.parametrize("name", ["lwm_text_chat_7b", "lwm_7b"])
def test_gradients_are_exactly_where_each_stage_says(name: str, site: Site) -> None:
    recipe = tiny(by_name(name))
    for stage in (recipe.stages[0], recipe.stages[-1]) if name == "lwm_7b" else recipe.stages[-1:]:
        objective: Any = stage.objective
        model = recipe.vlm.build()
        groups = apply_tuning(model, stage.tune)
        trained = {id(p) for group in groups for p in group.parameters}
        pack = next(iter(PackWindows(site.stream(recipe, stage)).packs(0)))
        for one in (pack, Pack.empty(recipe.model.layout(recipe.tiling).shape)):
            model.zero_grad()
            loss = objective(model, Batch.of(one)).sum
            loss.backward()
            assert torch.isfinite(loss)
            for parameter, value in model.named_parameters():
                assert (value.grad is not None) == (id(value) in trained), (stage.name, parameter)
    assert isinstance(recipe.stages[-1].objective, TwoVocabularies) == (name == "lwm_7b")
