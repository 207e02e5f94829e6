"""What is measured together, and what comes of it: numbers, the reason why there are none, or a failure."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.common import Row
from benchmarks.gpu.measuring import free

Found = tuple[Sequence[float], str]
"""Values of a row, none where they could not be had, and its note."""


@dataclass(frozen=True)
class Case:
    """Rows that are measured together, still empty, and how."""

    rows: tuple[Row, ...]
    run: Callable[[], Sequence[Found]]


def filled(case: Case) -> tuple[list[Row], bool]:
    """A case's rows, and whether it failed."""
    try:
        found = case.run()
        failed = False
    except torch.OutOfMemoryError:
        found, failed = [([], "out of memory")] * len(case.rows), False
    except Exception as error:  # one that fails must not cost the others their numbers
        traceback.print_exc()
        reason = str(error).strip().splitlines() or [""]
        found, failed = [([], f"failed: {type(error).__name__}: {reason[0][:120]}")] * len(case.rows), True
    free()
    rows = [replace(row, values=list(values), note=note) for row, (values, note) in zip(case.rows, found, strict=True)]
    return rows, failed or any(row.values and not row.met for row in rows)
