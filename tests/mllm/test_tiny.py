"""Every recipe at toy size: what `mllm train RECIPE --tiny` trains."""

from dataclasses import replace

import pytest

from cluster.site import Site
from mllm.recipe import Steps, dump, load
from mllm.recipes import RECIPES, by_name
from mllm.tiny import tiny
from pipelines.windows import PackWindows


@pytest.mark.parametrize("name", RECIPES)
def test_its_stages_find_rows_that_carry_loss_in_the_example_corpora(name: str, site: Site) -> None:
    recipe = by_name(name)
    small = tiny(recipe)
    assert load(dump(small)) == small
    assert [stage.name for stage in small.stages] == [stage.name for stage in recipe.stages]
    assert small.model.reads == ()
    for stage in small.stages:
        assert stage.duration == Steps(count=2)
        pack = next(iter(PackWindows(replace(site.stream(small, stage), annotators=())).packs(0)))
        assert len(pack.ids)
        assert len(pack.tiles) or pack.learned
    if small.held_out:
        held_out = site.held_out(small, small.stages[-1])
        assert held_out
        assert any(len(pack.ids) for pack in PackWindows(replace(held_out, annotators=())).packs(0))
