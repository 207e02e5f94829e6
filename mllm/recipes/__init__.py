"""Recipes by name. A recipe is a function that returns a complete value; add yours here and every test will find it."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches

from mllm.recipe import Recipe, RecipeError
from mllm.recipes.clip import clip_b16, clip_b32, clip_l14, openclip_h14
from mllm.recipes.masked import beit_b16, mae_b16, mae_l16
from mllm.recipes.real import vila_real
from mllm.recipes.siglip import siglip_b16, siglip_so400m
from mllm.recipes.smoke import vila_smoke
from mllm.recipes.supervised import (
    alexnet,
    lenet5,
    resnet50,
    resnet101,
    resnet152,
    vgg16,
    vgg19,
    vit_b16,
    vit_l16,
)
from mllm.recipes.vila import vila_7b, vila_13b
from mllm.recipes.vilt import vilt_b32

RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        *(vila_smoke, vila_real, vila_7b, vila_13b),
        *(clip_b32, clip_b16, clip_l14, openclip_h14, siglip_b16, siglip_so400m),
        *(lenet5, alexnet, vgg16, vgg19, resnet50, resnet101, resnet152, vit_b16, vit_l16),
        *(mae_b16, mae_l16, beit_b16),
        *(vilt_b32,),
    )
}


def by_name(name: str) -> Recipe:
    """The recipe called `name`. Raises RecipeError with the nearest names."""
    if name not in RECIPES:
        near = get_close_matches(name, RECIPES, 3)
        raise RecipeError(
            f"no recipe {name!r}; "
            + (f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(RECIPES)}")
        )
    return RECIPES[name]()
