"""Measures what is asked for: prints each row, and writes it, as soon as it is measured."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import CACHE, HERE, number
from benchmarks.gpu.cases import filled
from benchmarks.gpu.device import CUDA
from benchmarks.gpu.page import header, markdown, unmeasured
from benchmarks.gpu.sections import SECTIONS, section_of
from benchmarks.gpu.sizes import FULL, TOY, Sizes


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(SECTIONS)}; by default all")
    parser.add_argument("--toy", action="store_true", help="toy sizes; the numbers mean little")
    parser.add_argument("--list", action="store_true", help="write the table without measuring anything")
    parser.add_argument("--out", type=Path, help="folder for the table")
    asked = parser.parse_args()
    unknown = sorted(set(asked.names) - set(SECTIONS))
    if unknown:
        parser.error(f"no section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    toy = asked.toy or not (CUDA or asked.list)
    folder: Path = asked.out or (CACHE if toy else HERE / "results")
    folder.mkdir(parents=True, exist_ok=True)
    sizes = TOY if toy else FULL
    if asked.list:
        (folder / "gpu.md").write_text(markdown(unmeasured(sizes)))
        return 0
    device = torch.cuda.get_device_name().replace(" ", "-").lower() if CUDA else "cpu"
    return measure(folder / f"gpu-{device}{'-toy' if toy else ''}.json", sizes, asked.names or list(SECTIONS))


def measure(file: Path, sizes: Sizes, names: Sequence[str]) -> int:
    """Measures these sections into `file` and its page. 1 where a check or a measurement failed, else 0."""
    saved: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    failures = 0
    for name in SECTIONS:
        if name not in names:
            continue
        section = section_of(name)
        print(f"{name}:", flush=True)
        for case in SECTIONS[name].cases(sizes):
            rows, failed = filled(case)
            failures += failed
            section.rows += rows
            for row in rows:
                middle = number(row.median) if row.values else "none"
                print(f"  {row.name}: {middle} {row.unit}  {row.note}", flush=True)
            saved[name] = {"header": header(), **asdict(section)}
            file.write_text(json.dumps(saved, indent=1) + "\n")
            file.with_suffix(".md").write_text(markdown(saved))
    print(f"saved {file.with_suffix('.md')}" + (f"; {failures} failed" if failures else ""))
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
