"""Operations as a dispatch mode sees them, many thousands in a step: what they are asked, in words that can be looked up.

Layers ask alike over and over. A mode that remembers what shapes came of what need not find them again, which takes long.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import Tensor


def tensors(*values: Any) -> list[Tensor]:
    """The tensors among an operation's arguments, or what it gives; lists of them are looked into."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors(*value)
    return found


@cache
def makes(func: Any) -> bool:
    """Whether what an operation gives is, by its schema, no view of what it was given, nor that itself."""
    return not any(x.alias_info for x in (*func._schema.arguments, *func._schema.returns))


def signs(values: Iterable[Any]) -> tuple[Any, ...]:
    """All of an operation's arguments that the shape of its result can hang on; equal where they are alike."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append((value.shape, value.stride(), value.dtype))
        elif isinstance(value, list | tuple):
            found.append(signs(value))
        else:
            found.append((type(value), value))
    return tuple(found)
