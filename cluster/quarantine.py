"""The rows that a run dropped: kept beside it, told by reason, found again in their shards.

    runs/NAME/quarantine/sft.jsonl      one line for every row as it is met, before its share is judged
    runs/NAME/quarantine.parquet        all of them, each row once: corpus, shard, row, piece, epoch, stage, reason, detail, sha

The lines are the truth; the table is made of them at the end of every stage and whenever someone asks.
"""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cache

import pyarrow as pa
import pyarrow.parquet
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from cluster.lines import Lines, read_lines
from cluster.metrics import RunFolder
from mllm.recipe import load
from pipelines.place import Place
from pipelines.types import Rejected, RowId, spec


@spec
class Quarantined:
    """A dropped row, and the stage in which it was first met."""

    stage: str
    rejected: Rejected

    @property
    def key(self) -> tuple[str, str, int, int]:
        row = self.rejected.row
        return row.corpus, row.shard, row.row, row.piece


@cache
def _adapter() -> TypeAdapter[Quarantined]:
    return TypeAdapter(Quarantined)


def append(folder: RunFolder, stage: str, rows: Iterable[Rejected]) -> None:
    """Write dropped rows down. A row that a resumed run meets again is written again, and counts once."""
    lines = Lines(folder.root / "quarantine" / f"{stage}.jsonl")
    lines.append(_adapter().dump_json(Quarantined(stage=stage, rejected=row)) for row in rows)
    lines.flush()


def rows(folder: RunFolder) -> list[Quarantined]:
    """Every dropped row once, in the order of corpora, shards and rows. A line that a kill cut short is passed over."""
    found: dict[tuple[str, str, int, int], Quarantined] = {}
    stages = {f"{stage.name}.jsonl": n for n, stage in enumerate(load(folder.recipe.read_bytes()).stages)}
    there = (folder.root / "quarantine").names()
    for name in sorted(there, key=lambda name: stages.get(name, -1)):
        for line in read_lines(folder.root / "quarantine" / name):
            try:
                row = _adapter().validate_json(line)
            except ValidationError:
                continue
            found.setdefault(row.key, row)
    return [found[key] for key in sorted(found)]


def write_table(folder: RunFolder) -> Place | None:
    """Write the table of all dropped rows; None when there are none."""
    found = rows(folder)
    if not found:
        return None
    columns: dict[str, list[str | int]] = defaultdict(list)
    for row in found:
        at: RowId = row.rejected.row
        for name in ("corpus", "shard", "row", "piece", "epoch"):
            columns[name].append(getattr(at, name))
        columns["stage"].append(row.stage)
        columns["reason"].append(str(row.rejected.reason))
        columns["detail"].append(row.rejected.detail)
        columns["sha"].append(row.rejected.sha)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(dict(columns)), buffer)
    file = folder.root / "quarantine.parquet"
    file.write(buffer.getvalue())
    return file


def show(folder: RunFolder, console: Console, every: bool) -> int:
    """Print dropped rows by corpus and reason, with an example of each, or every one. Returns 1 when there are some, else 0."""
    found = rows(folder)
    if not found:
        console.print(f"run {folder.name} has dropped no row")
        return 0
    if every:
        for row in found:
            console.print(f"{row.rejected.label()}  sha {row.rejected.sha[:16] or '-'}", soft_wrap=True, markup=False)
        return 1
    groups: Counter[tuple[str, str]] = Counter((r.rejected.row.corpus, str(r.rejected.reason)) for r in found)
    example = {(r.rejected.row.corpus, str(r.rejected.reason)): r for r in reversed(found)}
    table = Table(
        "corpus", "reason", "rows", "shards", "for example", title=f"{len(found):,} rows dropped", title_justify="left"
    )
    table.columns[2].justify = table.columns[3].justify = "right"
    for (corpus, reason), count in groups.most_common():
        mine = [r.rejected for r in found if (r.rejected.row.corpus, str(r.rejected.reason)) == (corpus, reason)]
        first = example[corpus, reason].rejected
        words = f"{first.row.shard} row {first.row.row}" + (f": {first.detail}" if first.detail else "")
        table.add_row(corpus, reason, f"{count:,}", f"{len({r.row.shard for r in mine}):,}", words[:120])
    console.print(table)
    console.print(f"each row: mllm data quarantine {folder.name} --rows, or {write_table(folder)}", soft_wrap=True)
    return 1
