"""A failure that trying again cannot mend: written down by whichever rank has it, found by the group that begins next.

Usually all ranks meet it at once: the data ends, a package is missing. They leave without a word then, and the stage is over.
Where one rank alone has it the others wait for it in a collective, so it must fail aloud: Ray Train ends the group and begins
another, whose rank 0 finds what was written and ends the stage with these words.
"""

from __future__ import annotations

import time
import traceback

from cluster.metrics import RunFolder
from pipelines.place import Place

TOGETHER = 5.0
"""Seconds for the other ranks to meet the same failure."""

TICK = 0.2
"""Seconds between two looks for theirs."""


class Failures:
    """Those of a run's stage, a file each rank."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.place: Place = folder.root / "failures"

    def clear(self) -> None:
        self.place.remove()

    def found(self) -> str:
        """What the lowest rank that failed wrote down; an empty word where none did."""
        names = sorted(self.place.names(), key=int)
        return (self.place / names[0]).read_text() if names else ""

    def note(self, rank: int, world: int, error: Exception) -> bool:
        """Write down a rank's failure, with where it came from in the logs; whether all ranks have met one."""
        self.folder.logs.mkdir(parents=True, exist_ok=True)
        (self.folder.logs / f"failure-{rank}.txt").write_text("".join(traceback.format_exception(error)))
        (self.place / str(rank)).write(str(error).encode())
        end = time.monotonic() + TOGETHER
        while len(self.place.names()) < world:
            if time.monotonic() > end:
                return False
            time.sleep(TICK)
        return True
