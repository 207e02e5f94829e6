"""`make faults`: every fault in every stage, beside the same run undisturbed; the table goes to `benchmarks/results/faults.md`.

    python -m tests.faults [--stages align,sft] [--only WORDS] [--seed 0] [--steps 150] [--restarts 3] [--out FILE]

One run on a cluster of a head and two or three nodes, everything it keeps on a real S3 server, goes through the faults of each
stage in an order drawn from the seed, at random steps. Afterwards its packs, rates and losses must be those of the undisturbed
run, and its final weights too. A plain Ray Train run of the same model on the same cluster tells what a restart costs by itself.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import torch

from cluster.policy import Watch
from cluster.run import trained_model
from cluster.site import Site, load_site
from mllm.recipe import Full, load
from mllm.recipes import by_name
from pipelines import storage
from tests.conftest import ROOT
from tests.faults.catalogue import LONG_RUN, Death
from tests.faults.rig import Rig
from tests.faults.suite import (
    RESTARTS,
    Overcome,
    Resized,
    differences,
    go_through,
    plain_restarts,
    resize,
    rows_lost_and_repeated,
)
from tests.s3 import BUCKET, Proxy, running

RECIPE = "vila_smoke"
STAGES = ("align", "pretrain", "sft")


EACH = 16
"""Steps of a stage for each fault: some pass between two, and many in those that training does not wait for."""

CALM = 0.1
"""Learning rates beside the recipe's own. At those rounding, which is other on one worker than on two, grew to 6e-3 of the loss
by the third stage, and what a fault has done could not be told apart from it.
"""


def changes(steps: int) -> list[str]:
    """A recipe whose steps are short, calm, and as many as the faults need."""
    short = (
        "context=256",
        "tokens_per_step=1024",
        "max_tiles=6",
        "window=24",
        "save_every=5",
        f"duration.count={steps}",
    )
    rates = [
        f"stages.{stage.name}.tune.{part}.lr={CALM * how.lr:g}"
        for stage in by_name(RECIPE).stages
        for part, how in stage.tune.items()
        if isinstance(how, Full)
    ]
    return [f"stages.{stage}.{change}" for stage in STAGES for change in short] + rates + ["held_out=[]"]


def main() -> int:
    """Run the suite; 1 where a fault was not overcome or left a mark."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--only", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--restarts", type=int, default=RESTARTS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "faults.md")
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    faults = [fault for fault in LONG_RUN if asked.only in fault.what]
    steps = asked.steps or 24 + EACH * len(faults)
    rng = random.Random(asked.seed)
    overcome: list[Overcome] = []
    marks: list[str] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch, running(_folder(scratch, "s3")) as server:
        proxy = Proxy(server.port)
        site = load_site(str(ROOT / "examples" / "site.toml"))
        remote = proxy.storage(patience=60)
        storage.use(remote)
        on_s3 = replace(site, runs=f"s3://{BUCKET}/runs", storage=remote, watch=Watch(least=8.0, most=90.0))
        with Rig(Path(scratch) / "rig", on_s3, RECIPE, changes(steps), proxy) as rig:
            for _ in range(3):
                rig.add_node()
            plain = plain_restarts(rig, rng, asked.restarts)
            rig.words = ("--workers", "2")
            rig.train(*rig.words)
            for stage in asked.stages.split(","):
                order = rng.sample(faults, len(faults))
                overcome += go_through(rig, stage, order, rng)
            rig.wait_for_end()
            whole = _undisturbed(rig, site, Path(scratch) / "whole")
            marks += _marks(rig, RECIPE, whole, on_s3)
            print(*marks or ["the run is the undisturbed one"], sep="\n", flush=True)
            resized = resize(rig, "resized", rng, lambda: print("nothing more is timed", flush=True))
            marks += _marks(rig, "resized", whole, on_s3)
        proxy.close()
    table = _table(overcome, resized, plain, marks, asked, steps)
    print(table)
    if not asked.only and asked.stages == ",".join(STAGES):
        asked.out.write_text(table)
    return 1 if marks else 0


def _folder(root: str, name: str) -> Path:
    folder = Path(root) / name
    folder.mkdir()
    return folder


def _undisturbed(rig: Rig, site: Site, folder: Path) -> Rig:
    """The same recipe on two workers and this machine's own disk, with nothing done to it."""
    whole = Rig(folder, replace(site, runs=str(folder / "runs")), rig.recipe, rig.changes)
    whole.port = rig.port
    whole.train("--workers", "2")
    whole.wait_for_end()
    return whole


def _marks(rig: Rig, name: str, whole: Rig, site: Site) -> list[str]:
    """In what the run `name` differs from the undisturbed one."""
    broken = rig.results_of(name)
    found = []
    for stage in STAGES:
        found += [f"{name}, {stage}: {words}" for words in differences(broken.steps(stage), whole.steps(stage))]
        lost, repeated = rows_lost_and_repeated(broken, whole.results, stage)
        if lost or repeated:
            found.append(f"{name}, {stage}: {lost} packs lost, {repeated} repeated")
    storage.use(site.storage)
    recipe = load(broken.recipe.read_bytes())
    ours, theirs = (trained_model(recipe, run) for run in (broken, whole.results))
    for (part, one), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        if not torch.allclose(one, other, rtol=1e-3, atol=1e-4):
            found.append(f"{name}: weights of {part} differ by up to {(one - other).abs().max():.2g}")
    return found


def _table(
    overcome: list[Overcome],
    resized: Resized,
    plain: dict[Death, float],
    marks: list[str],
    asked: argparse.Namespace,
    steps: int,
) -> str:
    seed, times = asked.seed, asked.restarts
    deaths = ", ".join(f"{death} {seconds:.1f} s" for death, seconds in plain.items())
    lines = [
        "# Faults",
        "",
        f"`make faults`, seed {seed}, {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}. One run of three stages of {steps} steps on two workers, a head and three nodes on one "
        "machine, everything on S3 (SeaweedFS); then one of 1 to 3 workers. Seconds are from the beginning of the fault to the "
        "end of the next optimiser step of workers that begin again, so they contain the fault's own duration where it has one; "
        "of faults after which nobody need begin again, the longest time between two steps. *Noticed* is when the journal told "
        "of it.",
        "",
        "*Plain* is Ray Train by itself on the same cluster, just before: two workers with the same model, batches from an actor "
        f"of Ray Data as this run has them, the same thing done to it (medians of {times}: {deaths}). Where the driver ends, "
        "its command is given again at once. A hang, which Ray Train does not notice, damaged checkpoints and a worker without "
        "memory are set beside the restart after a worker's death, by as many of them as groups of workers must begin. *By "
        "plain* leaves out *its own* seconds: those that an outage lasts whatever is done about it, and of a hang those until it "
        "was noticed, since by itself Ray Train waits for ever.",
        "",
        "| fault | "
        + " | ".join(f"{stage}, s" for stage in STAGES)
        + " | noticed, s | its own, s | plain, s | by plain | steps redone |",
        "|---|" + "---:|" * (len(STAGES) + 5),
    ]
    beside = {fault.what: fault.groups * plain[fault.like] for fault in LONG_RUN if plain} | resized.plain
    lasting = {fault.what: fault.lasts for fault in LONG_RUN}
    hidden = {fault.what for fault in LONG_RUN if fault.hides}
    everything = [*overcome, *resized.overcome]
    for what in dict.fromkeys(one.what for one in everything):
        mine = [one for one in everything if one.what == what]
        seconds = [next((f"{one.seconds:.1f}" for one in mine if one.stage == stage), "-") for stage in STAGES]
        noticed = [one.noticed for one in mine if one.noticed is not None]
        told = f"{median(noticed):.1f}" if noticed else "-"
        own = median([one.noticed or 0.0 for one in mine]) if what in hidden else lasting.get(what, 0.0)
        beyond = max(0.0, median(one.seconds for one in mine) - own)
        by_plain = f"{beside[what]:.1f} | {beyond / beside[what]:.2f}" if what in beside else "- | -"
        redone = ", ".join(str(one.redone) for one in mine)
        lines.append(f"| {what} | {' | '.join(seconds)} | {told} | {own:.1f} | {by_plain} | {redone} |")
    lines += ["", f"{len(everything)} faults overcome. Where one ends the command (SIGTERM), it was given again."]
    lines += ["Beside the undisturbed run: " + ("no row lost or repeated, same losses." if not marks else "")]
    lines += [f"- {mark}" for mark in marks[:40]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    started = time.monotonic()
    code = main()
    print(f"{time.monotonic() - started:.0f} s")
    sys.exit(code)
