"""Recipes as a person reads them: a list, a tree, and the page `docs/recipes.md`.

    python -m cluster.catalogue > docs/recipes.md      writes the page anew; a test says when that is due

All of it is told from the recipes' own values and docstrings: the first line says what it is, the rest what deviates from the
paper and what is not certain.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text
from rich.tree import Tree

from mllm.encoders import Encoders
from mllm.recipe import Epochs, Frozen, Full, LoRA, Recipe, Source, Stage, Steps, Tokens, Tuning
from mllm.recipes import RECIPES


def listing() -> RenderableType:
    """Every recipe: its paper, its stages with what each trains, its kinds of data; those alike in all three together."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, function in RECIPES.items():
        recipe = function()
        alike.setdefault(
            (recipe.paper, "; ".join(_stage_words(recipe)), f"data: {', '.join(kinds(recipe))}"), []
        ).append(name)
    lines: list[RenderableType] = []
    for (paper, *told), names in alike.items():
        lines.append(Text.assemble((" ".join(names), "bold"), f"  {paper}"))
        for words in told:
            lines.append(Padding(Text(words), (0, 0, 0, 4)))
    return Group(*lines)


def tree(recipe: Recipe) -> RenderableType:
    """A recipe's model along its axes, then its stages: data, trained parts, token budget."""
    root = Tree(Text(recipe.name, "bold"))
    _branch(root, Text(f"model: {recipe.model.kind}"), [f"{axis:<10} {words}" for axis, words in axes(recipe)])
    for stage in recipe.stages:
        branch = root.add(Text.assemble((stage.name, "bold"), f"  {duration(stage)}"))
        _branch(branch, Text("data"), map(_source, stage.mixture))
        _branch(branch, Text("trained"), (f"{part:<14} {_tuning(how)}" for part, how in stage.tune.items()))
        tokens = (
            f"{stage.tokens_per_step:,} tokens a step in packs of {stage.context:,} tokens and {stage.max_tiles} tiles"
        )
        for word, value in (
            ("objective", _value(stage.objective)),
            ("budget", tokens),
            ("optimizer", f"{_value(stage.optimizer)}, {_value(stage.schedule)}; {_value(stage.parallel)}"),
        ):
            branch.add(Text(f"{word:<10} {value}"))
        if stage.tiling is not None:
            branch.add(Text(f"{'tiling':<10} {_value(stage.tiling)}"))
    return root


def _branch(tree: Tree, title: Text, lines: Iterable[str]) -> None:
    branch = tree.add(title)
    for line in lines:
        branch.add(Text(line))


def page() -> str:
    """The page of all recipes, in Markdown."""
    lines = [
        "# Recipes",
        "",
        "Written by `python -m cluster.catalogue` from the recipes' own values; `mllm recipes NAME --tree` prints one, "
        "`mllm plan NAME` counts its parameters, memory and steps, and `-s` changes any of its axes.",
        "",
        "| recipe | stages (trained parts) | data | paper |",
        "|---|---|---|---|",
    ]
    for name, function in RECIPES.items():
        recipe = function()
        cells = (f"[{name}](#{name})", "; ".join(_stage_words(recipe)), ", ".join(kinds(recipe)), recipe.paper)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    for name, function in RECIPES.items():
        recipe = function()
        lines += ["", f"## {name}", "", *notes(function), ""]
        lines += [f"- {axis}: {words}" for axis, words in axes(recipe)]
        for stage in recipe.stages:
            sources = ", ".join(_source(source) for source in stage.mixture)
            trained = ", ".join(f"{part} ({_tuning(how)})" for part, how in stage.tune.items())
            lines.append(
                f"- **{stage.name}**, {duration(stage)}, {stage.tokens_per_step:,} tokens a step in packs of {stage.context:,}"
                + (": " if stage.tiling is None else f", pictures by {_value(stage.tiling)}: ")
                + f"trains {trained}; {_value(stage.objective)}; reads {sources}"
            )
    return "\n".join(lines) + "\n"


def notes(function: Callable[[], Recipe]) -> list[str]:
    """What the docstrings of a recipe and of its family say: what it is, what deviates, what is not certain."""
    own = inspect.cleandoc(function.__doc__ or "")
    family = inspect.cleandoc(inspect.getmodule(function).__doc__ or "")  # type: ignore[union-attr]  # every recipe has a file
    return [own, *([] if own == family else ["", family])]


def kinds(recipe: Recipe) -> list[str]:
    """The kinds of corpora that its stages read, each once, in order."""
    return list(dict.fromkeys(source.corpus.kind for stage in recipe.stages for source in stage.mixture))


def axes(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The parts of the model and the tiling, each in a line."""
    for field in fields(recipe.model):
        value = getattr(recipe.model, field.name)
        if isinstance(value, Encoders):
            for number, (tower, size) in enumerate(zip(value.towers, value.sizes, strict=True)):
                yield f"tower {number}", f"{_value(tower)}, at {size} pixels"
        elif field.name != "kind" and value is not None:
            yield field.name, _value(value)
    yield "tiling", _value(recipe.tiling)


def duration(stage: Stage) -> str:
    match stage.duration:
        case Epochs(count=count):
            return f"{count:g} epoch" + ("" if count == 1 else "s")
        case Steps(count=count):
            return f"{count:,} steps"
        case Tokens(count=count):
            return f"{count:,} tokens"


def _stage_words(recipe: Recipe) -> Iterator[str]:
    for stage in recipe.stages:
        yield f"{stage.name} ({', '.join(_trained(stage))})"


def _trained(stage: Stage) -> list[str]:
    """The parts that a stage trains. Patterns that only keep decay off some weights of these are left out."""
    trained = {part: how for part, how in stage.tune.items() if not isinstance(how, Frozen)}
    whole = [replace(how, weight_decay=0.0) for how in trained.values() if isinstance(how, Full) and how.weight_decay]

    def aside(part: str) -> bool:
        return isinstance(stage.tune.get(part.split(".")[0]), Frozen)

    return [
        part.removesuffix(".*")
        for part, how in trained.items()
        if not part.startswith("*") and (not set("*[") & set(part) or aside(part) or how not in whole)
    ]


def _source(source: Source) -> str:
    weight = "" if source.weight is None else f", weight {source.weight:g}"
    return f"{source.corpus.name} ({source.corpus.kind}{weight})"


def _tuning(how: Tuning) -> str:
    match how:
        case Full(lr=lr):
            return f"lr {lr:g}"
        case LoRA(lr=lr, rank=rank):
            return f"LoRA of rank {rank}, lr {lr:g}"
        case Frozen():
            return "frozen"


def _value(value: Any) -> str:
    """A value in a line: its kind, and what of it is not the default of its kind."""
    if isinstance(value, tuple):
        return ", ".join(map(_value, value)) or "none"
    if not is_dataclass(value):
        return str(value)
    said = []
    for field in fields(value):
        item = getattr(value, field.name)
        if field.name == "kind" or item == field.default or item is None:
            continue
        said.append(f"{field.name} {_value(item)}" if not isinstance(item, bool) else field.name)
    kind = getattr(value, "kind", "")
    return " ".join(filter(None, [kind, f"({', '.join(said)})" if said and kind else ", ".join(said)]))


if __name__ == "__main__":
    print(page(), end="")
