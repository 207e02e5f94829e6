"""Who begins looks for garbage rarely, and who works as usual."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pyarrow as pa

from pipelines.late import Preprocessor, late

SEEN: list[int] = []


class Maker:
    def __init__(self) -> None:
        SEEN.append(gc.get_threshold()[0])

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        SEEN.append(gc.get_threshold()[0])
        yield table


def test_a_preprocessor_begins_without_looking_for_garbage_and_works_as_usual() -> None:
    usual = gc.get_threshold()[0]
    preprocessor = Preprocessor(*late(Maker))
    assert len(list(preprocessor(pa.table({"window": [1]})))) == 1
    assert SEEN[0] > 100 * usual
    assert SEEN[1] == usual
