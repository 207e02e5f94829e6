"""The sections, in the order in which they are measured. Each is a module, whose docstring stands above its table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from benchmarks.common import Section
from benchmarks.gpu import attention, checkpoint, checks, engine, loss
from benchmarks.gpu.cases import Case
from benchmarks.gpu.sizes import Sizes


class Measured(Protocol):
    """What the module of a section has."""

    def cases(self, sizes: Sizes) -> Iterator[Case]:
        """All that it measures at these sizes, in the order in which it is."""
        ...


SECTIONS: dict[str, Measured] = {
    "checks": checks,
    "attention": attention,
    "loss": loss,
    "engine": engine,
    "checkpoint": checkpoint,
}


def section_of(name: str) -> Section:
    """A section without rows."""
    return Section(name, (SECTIONS[name].__doc__ or "").strip())
