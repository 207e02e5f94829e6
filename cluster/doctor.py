"""`mllm doctor`: what this machine, or the site's cluster, has and lacks for a run, and what to do about it.

    diagnose(recipe, site)         all findings: of this machine, and of the cluster where the site has a `ray_address`
    demand(recipe, site, ...)      the same before a run on a cluster begins: raises Unfit with everything that stands in its way
    doctor(recipe, site, ...)      the same as a table; a cluster that is reached through its job server alone is asked by a job

On this machine everything is quick; a cluster takes some seconds, holds no CPU and no GPU, and never waits for ever.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import gettempdir

from pydantic import TypeAdapter
from rich.console import Console

from cluster.finding import Finding, Unfit, show
from cluster.local import NoCluster, WrongToken, ray_running
from cluster.site import Site, SiteError
from cluster.survey import rights
from cluster.versions import versions
from mllm.recipe import Recipe
from pipelines.place import Place
from pipelines.types import spec

LOGS = Path(gettempdir()) / "mllm" / "doctor"
"""Where Ray's own words go meanwhile."""


@spec
class Diagnosis:
    """All findings, and the versions of the process that made them."""

    versions: dict[str, str]
    findings: tuple[Finding, ...]

    @property
    def unfit(self) -> bool:
        return any(one.fatal for one in self.findings)


def diagnose(recipe: Recipe | None, site: Site) -> Diagnosis:
    """Look at this machine, and at the cluster if the site names its address."""
    found = [*_machine(), *_packages()]
    if recipe is not None:
        found += refused(recipe, site)
    found += _cluster(recipe, site) if site.ray_address else [*_storage(site), *_local_index(recipe, site)]
    return Diagnosis(versions=versions(), findings=tuple(found))


def demand(recipe: Recipe, site: Site, console: Console, logs: Path = LOGS) -> None:
    """Ask the cluster before a run begins there, and say what is worth a word. Raises Unfit, NoCluster or WrongToken."""
    from cluster.checkup import checkup

    with ray_running(site.ray_address, 0, logs, site.ray_token_file):
        found = [*refused(recipe, site), *checkup(recipe, site)]
    if any(one.fatal for one in found):
        raise Unfit(found)
    for one in found:
        if one.advice:
            console.print(f"note: {one.what}: {one.found}; {one.advice}", markup=False, soft_wrap=True)


def doctor(recipe: Recipe | None, site: Site, console: Console, as_json: bool = False) -> int:
    """Print the findings. Returns 1 when one of them would stop a run, else 0."""
    if site.jobs and not site.ray_address:
        from cluster.jobs import asked

        theirs = _adapter().validate_json(asked(recipe, site, ("doctor", "--json"), "{"))
        told = Diagnosis(versions=versions(), findings=(*_compared(theirs.versions), *theirs.findings))
    else:
        told = diagnose(recipe, site)
    if as_json:
        console.print(_adapter().dump_json(told).decode(), markup=False, soft_wrap=True)
    else:
        show(told.findings, console)
    return int(told.unfit)


def demand_of_jobs(recipe: Recipe, site: Site, console: Console) -> None:
    """`demand` of a cluster that is reached through its job server. Raises Unfit or JobError."""
    from cluster.jobs import asked

    theirs = _adapter().validate_json(asked(recipe, site, ("doctor", "--json"), "{"))
    if theirs.unfit:
        raise Unfit(theirs.findings)
    for one in theirs.findings:
        if one.advice:
            console.print(f"note: {one.what}: {one.found}; {one.advice}", markup=False, soft_wrap=True)


def _adapter() -> TypeAdapter[Diagnosis]:
    return TypeAdapter(Diagnosis)


def _compared(theirs: dict[str, str]) -> Iterator[Finding]:
    """Versions of this machine, which only sends the run, beside those of the cluster that trains it."""
    here = versions()
    other = [
        f"{name} {theirs[name]} (here {here[name]})" for name in here if theirs.get(name, here[name]) != here[name]
    ]
    if other:
        advice = "the cluster's count; what this machine says of a recipe may differ from what is trained"
        yield Finding(what="versions of the cluster", found=", ".join(other), advice=advice)


def _cluster(recipe: Recipe | None, site: Site) -> list[Finding]:
    from cluster.checkup import checkup

    try:
        with ray_running(site.ray_address, 0, LOGS, site.ray_token_file):
            return checkup(recipe, site)
    except (NoCluster, WrongToken) as error:
        advice = "mend ray_address or ray_token_file in the site file"
        return [Finding(what="cluster", found=str(error), advice=advice, fatal=True)]


def refused(recipe: Recipe, site: Site) -> Iterator[Finding]:
    """What this machine, and the weights' code, refuse of the recipe."""
    from cluster.preflight import refusals, this_machine, untrusted

    machine = this_machine(site.gpus)
    fewest, most = site.world
    whys = [why for world in range(fewest, most + 1) for why in refusals(recipe, world, machine)]
    whys += untrusted(recipe, site)
    for why in dict.fromkeys(whys):
        yield Finding(what=f"recipe {recipe.name}", found=why, advice="change it with -s, or the site", fatal=True)


def _machine() -> Iterator[Finding]:
    import torch

    cores = os.cpu_count() or 1
    advice = "" if cores > 1 else "two or more make the smoke run bearable"
    yield Finding(what="cores", found=str(cores), advice=advice)
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        yield Finding(what="GPUs here", found=f"{torch.cuda.device_count()} x {', '.join(names)}")
    else:
        advice = "training runs on CPU with gloo: right for the smoke recipe alone"
        yield Finding(what="GPUs here", found="none", advice=advice)
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    advice = "" if shm > 2**30 else "Ray's object store wants 1 GiB or more; in a container pass --shm-size"
    yield Finding(what="shared memory", found=f"{shm / 2**30:.1f} GiB free", advice=advice)


def _packages() -> Iterator[Finding]:
    import torch

    for name, version in versions().items():
        yield Finding(what=name, found=version)
    if importlib.util.find_spec("torchvision") and not torch.cuda.is_available():
        advice = "beside a CPU build of torch it breaks transformers: pip uninstall torchvision timm"
        yield Finding(what="torchvision", found="installed", advice=advice, fatal=True)
    from ops.attention import available, chosen

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reasons = "; ".join(f"{backend} {reason}" for backend, reason in available().items() if reason)
    taken = chosen(device, torch.bfloat16)
    yield Finding(what="attention", found=f"{taken}" + (f" ({reasons})" if reasons else ""))


def _storage(site: Site) -> Iterator[Finding]:
    yield _runs(Place(site.runs))
    for name in site.corpora:
        try:
            shards = site.shards(name)
            missing = [uri for uri in shards[:1] if "://" not in uri and not Path(uri).is_file()]
            advice = f"{missing[0]} is not there; mend [corpora]" if missing else ""
            yield Finding(
                what=f"corpus {name}",
                found=f"{len(shards)} shard{'s' if len(shards) != 1 else ''}",
                advice=advice,
                fatal=bool(missing),
            )
        except SiteError as error:
            yield Finding(what=f"corpus {name}", found="not found", advice=str(error), fatal=True)


def _local_index(recipe: Recipe | None, site: Site) -> Iterator[Finding]:
    """Corpora that the recipe reads and the site does not have."""
    from cluster.indexing import corpora_of

    for corpus in corpora_of(recipe) if recipe else ():
        if corpus.name not in site.corpora:
            advice = "add its address under [corpora] in the site file"
            yield Finding(what=f"corpus {corpus.name}", found="the site does not have it", advice=advice, fatal=True)


def _runs(runs: Place) -> Finding:
    if runs.local:
        nearest = next(folder for folder in (runs.path, *runs.path.parents) if folder.is_dir())
        writable = os.access(nearest, os.W_OK)
        free = shutil.disk_usage(nearest).free / 2**30
        advice = "" if writable else f"nothing can be written under {nearest}; set runs in the site file"
        return Finding(what="runs", found=f"{runs}, {free:.0f} GiB free", advice=advice, fatal=not writable)
    may = rights(runs.uri)
    if may.trouble:
        advice = "nothing can be written there; mend [storage] or runs"
        return Finding(what="runs", found=f"{runs}: {may.trouble}", advice=advice, fatal=True)
    advice = (
        ""
        if may.exclusive
        else "its S3 ignores If-None-Match, which keeps two controllers apart; run only one at a time"
    )
    speeds = f"writes {may.writes / 1e6:,.0f} MB/s, reads {may.reads / 1e6:,.0f} MB/s"
    return Finding(what="runs", found=f"{runs}, writable; {speeds}", advice=advice)
