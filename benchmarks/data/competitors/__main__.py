"""`python -m benchmarks.data.competitors NAME prepare|run FOLDER ROWS` in the competitors' environment; `run` prints one line."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from benchmarks.data.work import consumed, counted, tell


def main() -> None:
    name, word, folder, rows = sys.argv[1:]
    module = importlib.import_module(f"benchmarks.data.competitors.{name}")
    if word == "prepare":
        if hasattr(module, "prepare"):
            module.prepare(Path(folder), int(rows))
        tell({})
    tell(consumed(counted(module.batches(Path(folder))), int(rows)))


if __name__ == "__main__":
    main()
