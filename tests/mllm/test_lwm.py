"""LWM: text of growing length, and pictures as codes of a second vocabulary."""

import pytest

from mllm.recipe import FSDP, RecipeError, dump, load, override
from mllm.recipes import by_name
from mllm.tune import describe

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
