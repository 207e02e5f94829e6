"""What a recipe is, and what a run of it would be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from cluster.commands.words import AnyRecipe, Change, Flag, RecipeName, SiteFile, recipe_of, site_of


@dataclass
class Recipes:
    """List the recipes, or print one, or all whose names begin so."""

    name: AnyRecipe = None
    """A recipe's name, or how names begin; all by default."""
    json: Flag = False
    """Print it as JSON, every default written out."""
    tree: Flag = False
    """Print its model along its axes, and its stages: data, trained parts, token budget."""

    def __call__(self) -> None:
        from rich.console import Console

        from cluster import catalogue
        from mllm.recipe import dump
        from mllm.recipes import RECIPES, by_name

        console = Console()
        if self.name is None:
            console.print(catalogue.listing())
            return
        alike = [name for name in RECIPES if name.startswith(f"{self.name}_")]
        if self.json or self.name in RECIPES or not alike:
            alike = [self.name]
        for recipe in map(by_name, alike):
            if self.json:
                print(dump(recipe))
            elif self.tree:
                console.print(catalogue.tree(recipe))
            else:
                from rich.pretty import Pretty

                console.print(Pretty(recipe, expand_all=False))


@dataclass
class Plan:
    """Tell what a run would be: mixture, trained parts, FLOPs, memory, steps. Needs no GPU and no data."""

    recipe: RecipeName
    s: Change = ()
    """Change the recipe, stages by name: -s stages.pretrain.tune.lm.lr=3e-5"""
    gpu: Annotated[str, arg(metavar="GPU")] = "a100"
    """What GPU-hours are of: a100, h100, h200, b200."""
    mfu: Annotated[str, arg(metavar="SHARES")] = "0.35-0.45"
    """The share of its peak that a GPU reaches, from the least to the most."""
    measured: Annotated[str | None, arg(name="from", metavar="RUN", help_behavior_hint="")] = None
    """Take the speed that this run's steps have reached in place of --gpu and --mfu."""
    price: Annotated[float | None, arg(metavar="MONEY", help_behavior_hint="")] = None
    """Of a GPU-hour, in any money."""
    diff: Annotated[str | None, arg(metavar="OTHER", help_behavior_hint="")] = None
    """Another recipe, or a recipe.json: every value in which they differ, and the numbers that change with it."""
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster import planned

        site = site_of(self.site)
        recipe = recipe_of(self.recipe, self.s)
        speed = planned.speed_of(site, self.gpu, self.mfu, self.measured)
        other = None if self.diff is None else recipe_of(self.diff, ())
        print(*planned.lines(recipe, site, speed, self.price, other), sep="\n")
