"""Recipes by their structure.

What differs in numbers alone is one case, which the first that has it stands for: the layers of a Vicuna of 7B and of one of 13B
are the same, and at toy size so are their numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

from mllm.objectives import OneOf, Sum
from mllm.recipe import Recipe, Stage, dump
from mllm.recipes import RECIPES, by_name
from mllm.tiny import tiny

READING = {"chat", "bos", "eos", "mean", "std", "name", "tokenizer", "cls", "normed", "interpolate", "activation"}
"""Words on how a model is read and spoken to, which change no part of it."""


def structure(value: Any) -> Any:
    """What a value says without its numbers."""
    if isinstance(value, dict):
        return {key: structure(item) for key, item in value.items() if key not in READING}
    if isinstance(value, list):
        return [structure(item) for item in value]
    return None if isinstance(value, int | float) and not isinstance(value, bool) else value


@cache
def small(name: str) -> Recipe:
    """The recipe at toy size. A stage that has one of several objectives in each step has all of them, so that none is missed."""
    recipe = tiny(by_name(name))
    return replace(recipe, stages=tuple(map(_whole, recipe.stages)))


def _whole(stage: Stage) -> Stage:
    one = stage.objective
    return replace(stage, objective=Sum(terms=one.terms)) if isinstance(one, OneOf) else stage


@cache
def words(name: str) -> dict[str, Any]:
    """The same as its record says it."""
    return json.loads(dump(small(name)))


def _stages() -> Iterator[tuple[str, str, str]]:
    """Recipe, stage, and what is the same in others: the model, the parts that are trained, how, and by what objective."""
    for name in RECIPES:
        model = structure(words(name)["model"])
        for stage in words(name)["stages"]:
            how = sorted((key, one["kind"]) for key, one in stage["tune"].items())
            annotators = [one["kind"] for one in stage["annotators"]]
            same = [model, structure(stage["objective"]), how, stage["optimizer"]["kind"], annotators]
            yield name, stage["name"], json.dumps(same)


def new_stages() -> dict[str, list[str]]:
    """Of each recipe the names of those stages whose like none before has had; recipes without any are left out."""
    seen: set[str] = set()
    found: dict[str, list[str]] = {}
    for name, stage, same in _stages():
        if same not in seen:
            found.setdefault(name, []).append(stage)
        seen.add(same)
    return found


def learners() -> list[str]:
    """Recipes whose last stages are unlike in model or objective, however much of the model each of them trains."""
    found: dict[str, str] = {}
    for name in RECIPES:
        same = [structure(words(name)["model"]), structure(words(name)["stages"][-1]["objective"])]
        found.setdefault(json.dumps(same), name)
    return list(found.values())
