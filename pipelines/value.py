"""`spec`, the form of every value here. A room of its own: who reads a journal or a storage address need not import torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def spec(cls: type[T]) -> type[T]:
    """A frozen value with keyword fields: the one form of every configuration and every record here.

    Read from JSON, it refuses fields that it does not have; a number that is none is written so, and read again.
    """
    cls.__pydantic_config__ = {"extra": "forbid", "ser_json_inf_nan": "constants"}  # type: ignore[attr-defined]  # pydantic's own word for a dataclass
    made = dataclass(frozen=True, kw_only=True, slots=True)(cls)
    _pickled_fast(made)
    return made


def _pickled_fast(cls: type) -> None:
    """Pickle `cls` by its slots: dataclasses look their fields up anew for every object, and rows travel by the thousand."""
    names = [field.name for field in fields(cls)]
    slots = [getattr(cls, name) for name in names]

    def state(self: object) -> list[object]:
        return [slot.__get__(self) for slot in slots]

    def restore(self: object, values: list[object]) -> None:
        for slot, value in zip(slots, values, strict=True):
            slot.__set__(self, value)

    for name, method in {"__getstate__": state, "__setstate__": restore}.items():
        setattr(cls, name, method)
