"""`make faults`: every fault in every stage, beside the same run undisturbed; see `benchmarks/results/faults.md`.

    python -m tests.faults [--parts align,pretrain,sft,resized] [--only WORDS] [--seed 0] [--steps N] [--restarts 2] [--out FILE]

Each part is one run on a cluster of its own, a head and three nodes, everything it keeps on a real S3 server. It goes through the
faults while it is at one stage, in an order drawn from the seed, at random steps; the last one's workers become fewer and more.
Afterwards its packs, rates and losses must be those of the undisturbed run, and its final weights too. A plain Ray Train run of
the same model on the same cluster tells what a restart costs by itself. A part that is not asked for keeps its last result.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from cluster.policy import Watch
from cluster.run import trained_model
from cluster.site import Site, load_site
from mllm.recipe import Full, load
from mllm.recipes import by_name
from pipelines import storage
from tests.conftest import ROOT
from tests.faults import page
from tests.faults.catalogue import LONG_RUN, Fault
from tests.faults.page import PARTS, RESIZED, STAGES, Part
from tests.faults.rig import Rig
from tests.faults.suite import (
    RESTARTS,
    Overcome,
    differences,
    go_through,
    plain_restarts,
    resize,
    rows_lost_and_repeated,
)
from tests.s3 import BUCKET, Proxy, running

RECIPE = "vila_smoke"

EACH = 16
"""Steps of a stage for each fault: some pass between two, and many in those that training does not wait for."""

BRIEF = 8
"""Steps of a stage in which nothing happens."""

CALM = 0.1
"""Learning rates beside the recipe's own. At those rounding, which is other on one worker than on two, grew to 6e-3 of the loss
by the third stage, and what a fault has done could not be told apart from it.
"""


def changes(steps: Mapping[str, int]) -> list[str]:
    """A recipe whose steps are short, calm, and so many in each stage."""
    short = ("context=256", "tokens_per_step=1024", "max_tiles=6", "window=24", "save_every=5")
    found = [f"stages.{stage}.{change}" for stage in STAGES for change in short]
    found += [f"stages.{stage}.duration.count={count}" for stage, count in steps.items()]
    found += [
        f"stages.{stage.name}.tune.{part}.lr={CALM * how.lr:g}"
        for stage in by_name(RECIPE).stages
        for part, how in stage.tune.items()
        if isinstance(how, Full)
    ]
    return [*found, "held_out=[]"]


def main() -> int:
    """Run the suite; 1 where a fault was not overcome or left a mark."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--only", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=0, help="of the stage in which something happens")
    parser.add_argument("--restarts", type=int, default=RESTARTS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "faults.json")
    asked = parser.parse_args()
    unknown = set(asked.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"no part {sorted(unknown)[0]!r}; there are {', '.join(PARTS)}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    faults = [fault for fault in LONG_RUN if asked.only in fault.what]
    found: dict[str, Part] = {}
    for name in asked.parts.split(","):
        print(f"-- {name}", flush=True)
        found[name] = part(name, faults, asked.seed, asked.steps, asked.restarts)
        print(*found[name].marks or ["the run is the undisturbed one"], sep="\n", flush=True)
        if len(faults) == len(LONG_RUN):  # after each, so that a failure loses nothing
            page.write(asked.out, page.read(asked.out) | {name: found[name]})
    print(page.page(found))
    return int(any(one.marks for one in found.values()))


def part(name: str, faults: Sequence[Fault], seed: int, wanted: int, restarts: int) -> Part:
    """One run, put through what the part's name says."""
    rng = random.Random(f"{seed} {name}")
    count = wanted or (RESIZING if name == RESIZED else 24 + EACH * len(faults))
    steps = {stage: count if name in (stage, RESIZED) else BRIEF for stage in STAGES}
    overcome: list[Overcome] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch, running(_folder(scratch, "s3")) as server:
        proxy = Proxy(server.port)
        site = load_site(str(ROOT / "examples" / "site.toml"))
        remote = proxy.storage(patience=60)
        storage.use(remote)
        on_s3 = replace(site, runs=f"s3://{BUCKET}/runs", storage=remote, watch=Watch(least=8.0, most=90.0))
        with Rig(Path(scratch) / "rig", on_s3, RECIPE, changes(steps), proxy) as rig:
            for _ in range(3):
                rig.add_node()
            if name == RESIZED:
                resized = resize(rig, RECIPE, rng, lambda: print("nothing more is timed", flush=True))
                overcome, plain, times = resized.overcome, resized.plain, 1
            else:
                plain = page.ratios(plain_restarts(rig, rng, restarts), [fault.what for fault in faults])
                times = restarts
                rig.words = ("--workers", "2")
                rig.train(*rig.words)
                overcome = go_through(rig, name, rng.sample(list(faults), len(faults)), rng)
                rig.wait_for_end()
            whole = _undisturbed(rig, site, Path(scratch) / "whole")
            marks = _marks(rig, RECIPE, whole, on_s3)
        proxy.close()
    return Part(
        where=f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}",
        when=f"{datetime.now(UTC):%Y-%m-%d}",
        seed=seed,
        steps=count,
        times=times,
        plain=plain,
        overcome=tuple(overcome),
        marks=tuple(marks),
    )


RESIZING = 96
"""Steps of each stage of the run that changes its size: a group of other workers is there before they are over."""


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


if __name__ == "__main__":
    started = time.monotonic()
    code = main()
    print(f"{time.monotonic() - started:.0f} s")
    sys.exit(code)
