"""A change of a recipe from the command line: `stages.sft.tune.lm.lr=1e-5`, found in the recipe's own words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError


class RecipeError(ValueError):
    """A recipe or an override that cannot be used; the message says where and what was expected."""


def parse(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def assign(words: dict[str, Any], key: str, value: Any) -> None:
    steps = _steps(key)
    node: Any = words
    for depth, step in enumerate(steps[:-1]):
        node = _enter(node, step, steps[:depth])
    last, path = steps[-1], ".".join(steps[:-1])
    if isinstance(node, list):
        node[node.index(_enter(node, last, steps[:-1]))] = value
    elif isinstance(node, dict) and (last in node or steps[-2:-1] == ["tune"]):
        if value is None and steps[-2:-1] == ["tune"]:
            del node[last]
        else:
            node[last] = value
    else:
        raise RecipeError(f"{path or 'recipe'} has no field {last!r}{_near(last, node)}")


def _steps(key: str) -> list[str]:
    """Split at dots; the parts of `tune` keep theirs when a longer name is meant (`tune.lm.head.lr`)."""
    steps = key.split(".")
    if "tune" in steps:
        at = steps.index("tune") + 1
        if len(steps) > at + 1 and steps[at + 1] in (
            "embeddings",
            "layers",
            "head",
            "gates",
            "mark",
            "adapter",
            "experts",
            "samplers",
            "side",
        ):
            steps[at : at + 2] = [".".join(steps[at : at + 2])]
    return steps


def _enter(node: Any, step: str, path: list[str]) -> Any:
    here = ".".join(path)
    if isinstance(node, list):
        if step.isdigit() and int(step) < len(node):
            return node[int(step)]
        named = {
            str(item.get("name") or item.get("corpus", {}).get("name")): item for item in node if isinstance(item, dict)
        }
        if step in named:
            return named[step]
        single = path[-1].rstrip("s") if path else "item"
        raise RecipeError(f"{here}.{step}: no {single} {step!r}; {path[-1] if path else 'items'} are {list(named)}")
    if isinstance(node, dict) and step in node:
        return node[step]
    raise RecipeError(f"{here or 'recipe'} has no field {step!r}{_near(step, node)}")


def _near(name: str, node: Any) -> str:
    if not isinstance(node, dict):
        return f"; it is the value {node!r}"
    near = get_close_matches(name, list(node), 1)
    if near:
        return f"; did you mean {near[0]!r}?"
    kind = f"; of kind {node['kind']!r}" if "kind" in node else ";"
    return f"{kind} its fields are {list(node)}"


def explain(error: ValidationError, words: Any) -> str:
    """One line a fault of `words`, its path as an override would write it."""
    lines = []
    for fault in error.errors():
        path = ".".join(_path(words, fault["loc"])) or "recipe"
        found = "" if isinstance(fault["input"], dict) else f" (found {fault['input']!r})"
        why = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "union_tag_invalid":
            tag, kinds = _kinds(fault)
            near = get_close_matches(tag, kinds, 1)
            why = f"there is no kind {tag!r} of it; there are {', '.join(kinds)}"
            found = f"; did you mean {near[0]!r}?" if near else ""
        lines.append(f"{path}: {why}{found}")
    return "\n".join(lines)


def _path(words: Any, path: Iterable[int | str]) -> Iterator[str]:
    """A fault's path without the kinds of the values that it leads through, which pydantic names too."""
    for step in path:
        if isinstance(words, dict) and words.get("kind") == step and step not in words:
            continue
        within: Any = None
        name = str(step)
        if isinstance(words, list) and isinstance(step, int):
            within = words[step]
            name = str(within.get("name", step)) if isinstance(within, dict) else name
        elif isinstance(words, dict):
            within = words.get(step)
        yield name
        words = within


def respelled(words: dict[str, Any], error: ValidationError) -> bool:
    """Mend kinds in `words` that `error` finds written without their underscores, "qformer" say; whether there were any."""
    mended = False
    for fault in error.errors():
        if fault["type"] != "union_tag_invalid":
            continue
        tag, kinds = _kinds(fault)
        meant = [kind for kind in kinds if kind.replace("_", "") == tag.replace("_", "")]
        node = _at(words, fault["loc"])
        if meant and isinstance(node, dict):
            node["kind"], mended = meant[0], True
    return mended


def _kinds(fault: Any) -> tuple[str, list[str]]:
    """The kind that was written, and those that there are."""
    return fault["ctx"]["tag"], fault["ctx"]["expected_tags"].replace("'", "").split(", ")


def _at(words: Any, path: Iterable[int | str]) -> Any:
    """The value at a fault's path, which names the kinds of the values that it leads through too; None where there is none."""
    for step in path:
        if isinstance(words, list) or (isinstance(words, dict) and step in words):
            words = words[step]  # type: ignore[index]  # of lists paths say the place
        elif not (isinstance(words, dict) and words.get("kind") == step):
            return None
    return words
