"""Work that needs a model in the pipeline: what this floor knows of it.

An annotator is a value that travels to an actor and is built there, on its GPU if it has one. One of documents sees a
window's rows before they are measured, and may drop, rewrite or replace them (filters, new captions, codes for pictures); one
of packs sees packs after they are cut, and may add what the trainer would else have to compute (features, log-probabilities).
Either is a pure function of what it is given, so the order stays what it was. `mllm.annotators` has them; `cluster` hands them
to `pipelines.stream`, which never imports a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from pipelines.types import Document, Pack, Rejected

Folder = Callable[[str], str]
"""Finds a folder of weights by its name in the recipe."""

Rows = Sequence[Document | Rejected]


@runtime_checkable
class OfDocuments(Protocol):
    """Changes rows before they are packed."""

    def documents(self, folder: Folder) -> Callable[[Rows], Rows]:
        """Load the model; what is returned maps the rows of a window to as many rows, in their order."""
        ...


@runtime_checkable
class OfPacks(Protocol):
    """Adds to packs."""

    def packs(self, folder: Folder) -> Callable[[Pack], Pack]:
        """Load the model; what is returned maps a pack to one of the same samples."""
        ...

    def empty(self, pack: Pack) -> Pack:
        """An empty pack as this annotator would leave it, told without the model: ranks without a pack fill up with it."""
        ...


Annotator = OfDocuments | OfPacks
