"""Recipes as a person reads them."""

import pytest

from cluster import catalogue
from cluster.cli import main
from mllm.recipes import RECIPES, by_name
from tests.conftest import ROOT


def test_the_readme_counts_the_recipes() -> None:
    assert f"lists {len(RECIPES)} recipes" in (ROOT / "README.md").read_text()


def test_the_page_of_recipes_is_what_the_recipes_say() -> None:
    """Written anew by `python -m cluster.catalogue > docs/recipes.md`."""
    assert (ROOT / "docs" / "recipes.md").read_text() == catalogue.page()


def test_every_recipe_is_listed_with_its_stages_data_and_paper(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    main(["recipes"])
    told = capsys.readouterr().out
    assert all(name in told for name in RECIPES)
    words = " ".join(told.split())
    assert (
        "vila_7b vila_13b arXiv:2312.07533 align (connector); pretrain (connector, lm); sft (connector, lm) data:"
        in words
    )
    assert "clip_l14 arXiv:2103.00020 contrast (vision, text, head) data: pairs" in words, "decay is nothing a part is"
    assert "minigpt4_7b arXiv:2304.10592 align (connector.project);" in words


def test_a_recipe_is_printed_as_a_tree(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes", "vila_7b", "--tree"])
    told = capsys.readouterr().out
    for stage in by_name("vila_7b").stages:
        assert stage.name in told
        assert f"{stage.tokens_per_step:,} tokens a step" in told
        assert all(source.corpus.name in told for source in stage.mixture)
    assert "lr 5e-05" in told
