"""What the suite found, as it is kept and as it is read: `benchmarks/results/faults.json` and `faults.md`.

A part that is not run keeps its last result. Every ratio lies within one part, so within one run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from pydantic import TypeAdapter

from pipelines.value import spec
from tests.faults.catalogue import LONG_RUN, Death
from tests.faults.suite import Overcome

STAGES = ("align", "pretrain", "sft")
RESIZED = "resized"
PARTS = (*STAGES, RESIZED)


@spec
class Part:
    """One run that went through faults, and what it is set beside.

    `plain` has the seconds that Ray Train took for the same by itself, by the fault's name; `times` is of how many each is the
    median. `marks` says in what the run is not the undisturbed one.
    """

    where: str
    when: str
    seed: int
    steps: int
    times: int
    plain: dict[str, float]
    overcome: tuple[Overcome, ...]
    marks: tuple[str, ...]


_PARTS: TypeAdapter[dict[str, Part]] = TypeAdapter(dict[str, Part])


def read(file: Path) -> dict[str, Part]:
    return _PARTS.validate_json(file.read_bytes()) if file.is_file() else {}


OTHERS = "## Other runs"
"""What stands on the page from here on was written by hand, and stays."""


def write(file: Path, parts: Mapping[str, Part]) -> None:
    """Keep the parts, and write the page of them beside the file."""
    ordered = {name: parts[name] for name in PARTS if name in parts}
    file.write_bytes(_PARTS.dump_json(ordered, indent=1) + b"\n")
    readable = file.with_suffix(".md")
    _, heading, others = readable.read_text().partition(OTHERS) if readable.is_file() else ("", "", "")
    readable.write_text(page(ordered) + (f"\n{heading}{others}" if heading else ""))


HEAD = """# Faults

`make faults`: on a head and three nodes of one machine, everything on S3 (SeaweedFS), two workers train the smoke recipe's three
stages. One run goes through every fault while it is at `align`, one at `pretrain`, one at `sft`, at random steps and in an order
drawn from the seed; another grows and shrinks between 1 and 3 workers. Afterwards each is held against the same run undisturbed:
packs, rates, losses (1e-4) and final weights (1e-3) must be the same, no row lost or repeated.

Seconds are from the beginning of the fault to the end of the next optimiser step of workers that begin again, so they contain
the fault's own duration where it has one; of faults after which nobody need begin again, the longest time between two steps.
*Noticed* is when the journal told of it.

*Plain* is Ray Train by itself on the same cluster, just before: two workers with the same model, batches from an actor of Ray
Data as this run has them, the same thing done to it. Where the driver ends, its command is given again at once. A hang, which
Ray Train does not notice, damaged checkpoints and a worker without memory are set beside the restart after a worker's death, by
as many of them as groups of workers must begin. *By plain* is the median over stages, each by the plain run of the same part; it
leaves out *its own* seconds: those that an outage lasts whatever is done about it, and of a hang those until it was noticed,
since by itself Ray Train waits for ever.
"""


def page(parts: Mapping[str, Part]) -> str:
    """The parts as Markdown."""
    columns = [*(f"{name}, s" for name in STAGES), "noticed, s", "its own, s", "plain, s", "by plain", "redone"]
    lines = [
        HEAD,
        "| part | when | machine | steps | plain restarts, median of | faults overcome | beside the undisturbed run |",
        "|---|---|---|---:|---:|---:|---|",
        *(
            f"| {name} | {part.when} | {part.where} | {part.steps} | {part.times} | {len(part.overcome)} | "
            f"{'; '.join(part.marks[:3]) or 'the same'} |"
            for name, part in parts.items()
        ),
        "",
        f"| fault | {' | '.join(columns)} |",
        "|---|" + "---:|" * len(columns),
        *(_row(what, parts) for what in dict.fromkeys(one.what for part in parts.values() for one in part.overcome)),
    ]
    saved = [one.left for part in parts.values() for one in part.overcome if one.left is not None]
    if saved:
        lines += [
            "",
            f"SIGTERM contains {median(saved):.1f} s until the command had saved and ended, which plain Ray Train does not do: "
            "nothing is done again. It was given again then.",
        ]
    return "\n".join(lines) + "\n"


def _row(what: str, parts: Mapping[str, Part]) -> str:
    mine = [(part, one) for part in parts.values() for one in part.overcome if one.what == what]
    cells = []
    for stage in STAGES:
        found = [f"{one.seconds:.1f}" for _, one in mine if one.stage == stage]
        cells.append(found[0] if found else "-")
    noticed = [one.noticed for _, one in mine if one.noticed is not None]
    cells.append(f"{median(noticed):.1f}" if noticed else "-")
    own = [_own(one) for _, one in mine]
    cells.append(f"{median(own):.1f}")
    beside = [part.plain[what] for part, _ in mine if what in part.plain]
    ratios = [max(0.0, one.seconds - _own(one)) / part.plain[what] for part, one in mine if what in part.plain]
    cells += [f"{median(beside):.1f}", f"{median(ratios):.2f}"] if beside else ["-", "-"]
    return f"| {what} | {' | '.join(cells)} | {', '.join(str(one.redone) for _, one in mine)} |"


def _own(one: Overcome) -> float:
    """Seconds of a fault that are not its recovery."""
    kinds = {fault.what: fault for fault in LONG_RUN}
    fault = kinds.get(one.what)
    if fault is None:
        return 0.0
    return (one.noticed or 0.0) if fault.hides else fault.lasts


def ratios(plain: Mapping[Death, float], faults: Sequence[str]) -> dict[str, float]:
    """What each of these faults is set beside, given the seconds of each kind of death."""
    return {
        fault.what: fault.groups * plain[fault.like]
        for fault in LONG_RUN
        if fault.what in faults and fault.like in plain
    }
