"""The words that several commands take, and what they mean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, UseAppendAction, arg

if TYPE_CHECKING:
    from rich.console import Console

    from cluster.site import Site
    from mllm.recipe import Recipe

Change = Annotated[UseAppendAction[tuple[str, ...]], arg(name="s", aliases=["-s"], metavar="KEY=VALUE")]
RecipeName = Annotated[Positional[str], arg(metavar="RECIPE", help="A recipe's name, or a recipe.json.")]
RunName = Annotated[Positional[str], arg(metavar="RUN", help="A run's name.")]
Checkpoint = Annotated[
    Positional[str], arg(metavar="CHECKPOINT", help="A folder that `mllm export` wrote, or a run's name.")
]
AnyRecipe = Annotated[Positional[str | None], arg(metavar="[RECIPE]", help_behavior_hint="")]
AnyRun = Annotated[Positional[str | None], arg(metavar="[RUN]", help_behavior_hint="")]
Corpus = Annotated[Positional[str], arg(metavar="CORPUS")]

# Of these the help says what happens without them, or nothing does: "(default: None)" says less.
Flag = Annotated[bool, arg(help_behavior_hint="")]
Name = Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")]
Number = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
FilePath = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")]
SiteFile = Annotated[
    str | None,
    arg(
        metavar="FILE",
        help="The site file, which says where corpora, runs and the cluster are; by default $MLLM_SITE, site.toml here, or "
        "the example's.",
        help_behavior_hint="",
    ),
]
Workers = Annotated[tuple[int, ...] | None, arg(metavar="N [MOST]", help_behavior_hint="")]
Kind = Annotated[
    str | None,
    arg(
        metavar="KIND",
        help="pairs, interleaved, conversations, ...; by default the first row tells it.",
        help_behavior_hint="",
    ),
]
Option = Annotated[Change, arg(help="Change an option of the corpus: -s max_images=4 -s images=s3://bucket/pictures")]


def plain_console() -> Console:
    """A console that colours no numbers and paths of its own accord."""
    from rich.console import Console

    return Console(highlight=False)


def recipe_of(name: str, changes: tuple[str, ...], small: bool = False) -> Recipe:
    """The recipe of a name or a `recipe.json`, changed, and at toy size if that is asked. Raises RecipeError."""
    from mllm.recipe import RecipeError, load, override
    from mllm.recipes import by_name
    from mllm.tiny import tiny

    if name.endswith(".json"):
        if not Path(name).is_file():
            raise RecipeError(f"no recipe file {name}")
        recipe = override(load(Path(name).read_bytes()), changes)
    else:
        recipe = override(by_name(name), changes)
    if not small:
        return recipe
    recipe = tiny(recipe)
    return replace(recipe, name=f"{recipe.name}-tiny")


def site_of(path: str | None, workers: tuple[int, ...] | None = None) -> Site:
    """The site of a file, or the one that is found without, with so many workers. Raises SiteError, ValueError."""
    from cluster.site import load_site

    site = load_site(path)
    if workers is None:
        return site
    words = " ".join(map(str, workers))
    if not 1 <= len(workers) <= 2 or min(workers) < 1 or workers[0] > workers[-1]:
        raise ValueError(f"--workers {words}: at least one worker trains; give how many, or the fewest and the most")
    return replace(site, workers=workers[0] if len(workers) == 1 else (workers[0], workers[1]))
