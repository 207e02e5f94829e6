"""Typed values as trees of YAML: a field that is None or empty is left out, and its name is spelled as the reader wants it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Literal

import yaml

Tree = dict[str, "Tree"] | list["Tree"] | str | int | float | bool | None
"""What YAML has words for."""

Spelling = Literal["snake", "camel", "pascal"]


def tree(value: object, spelling: Spelling) -> Tree:
    """`value` with its fields spelled so; a class may have a `SPELLING` of its own. Keys of mappings are taken as they are."""
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(key): tree(one, spelling) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [tree(one, spelling) for one in value]
    assert is_dataclass(value), f"{type(value).__name__} has no place in a manifest"
    spelling = getattr(value, "SPELLING", spelling)
    kept = getattr(value, "KEPT", ())
    found: dict[str, Tree] = {}
    for one in fields(value):
        inner = getattr(value, one.name)
        if inner is None or (inner in ((), {}, []) and one.name not in kept):
            continue
        found[_spelled(one.name, spelling)] = tree(inner, spelling)
    return found


def _spelled(name: str, spelling: Spelling) -> str:
    words = name.split("_")
    if spelling == "camel":
        return words[0] + "".join(word.capitalize() for word in words[1:])
    return name if spelling == "snake" else "".join(word.capitalize() for word in words)


class _Dumper(yaml.SafeDumper):
    """Texts of several lines are written as such."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002 -- yaml's word; the same part twice is written twice
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def to_yaml(trees: list[Tree], heading: str) -> str:
    """Documents of one file, under lines that a person reads."""
    above = "".join(f"# {line}".rstrip() + "\n" for line in heading.splitlines())
    return above + yaml.dump_all(trees, Dumper=_Dumper, sort_keys=False, width=120, explicit_start=len(trees) > 1)
