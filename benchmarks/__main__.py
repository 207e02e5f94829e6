"""`python -m benchmarks [names...] [--quick]`: run, print, and save `benchmarks/results/<machine>.md` and `.json`.

A section that is not run keeps its last result: every ratio lies within one section, so within one run. `--quick` checks that
the benchmarks work; its numbers mean little and go to `benchmarks/.cache/`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.common import CACHE, HEAD, HERE, Section, machine, table

NAMES = ("data", "packing", "train", "start", "checkpoint", "control", "ops")
LONG = ("data",)
"""Sections that run only when they are named."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(NAMES)}; by default all but {', '.join(LONG)}")
    parser.add_argument("--quick", action="store_true", help="check that they work; the numbers mean little")
    asked = parser.parse_args()
    unknown = sorted(set(asked.names) - set(NAMES))
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}")
    console = Console(highlight=False, width=140)
    name, header = machine()
    console.print("\n".join(header))
    folder = CACHE if asked.quick else HERE / "results"
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}{'-quick' if asked.quick else ''}.json"
    saved: dict[str, Any] = json.loads(file.read_text())["sections"] if file.is_file() else {}
    for chosen in [n for n in NAMES if (n in asked.names if asked.names else n not in LONG)]:
        section = run(chosen, asked.quick)
        show(section, console)
        saved[chosen] = {"header": header, **asdict(section)}
        save(file, name, saved)  # after each, so that a failure loses nothing
    console.print(f"saved {file.with_suffix('.md').relative_to(HERE.parent)}")


def run(name: str, quick: bool) -> Section:
    module = importlib.import_module(f"benchmarks.{name}.table" if name == "data" else f"benchmarks.{name}")
    section = Section(name, (module.__doc__ or "").strip())
    started = time.perf_counter()
    module.measure(section, quick)
    section.seconds = time.perf_counter() - started
    return section


def show(section: Section, console: Console) -> None:
    shown = Table(title=f"{section.name} ({section.seconds:.0f} s)", title_justify="left")
    for place, head in enumerate(HEAD):
        shown.add_column(head, justify="right" if place in (1, 3, 4) else "left")
    for row in section.rows:
        shown.add_row(*map(escape, row.cells()))
    console.print(shown)
    for fact in section.facts:
        console.print(f"  {fact}", markup=False)


def save(file: Path, machine_name: str, sections: dict[str, Any]) -> None:
    sections = {name: sections[name] for name in NAMES if name in sections}
    file.write_text(json.dumps({"machine": machine_name, "sections": sections}, indent=1) + "\n")
    lines = [f"# Benchmarks on {machine_name}", "", "`make bench` writes this file. Ratios lie within one run.", ""]
    lines += [line for section in sections.values() for line in table(section)]
    file.with_suffix(".md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
