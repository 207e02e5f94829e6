"""What a cluster lacks for a run, asked of its nodes before one of their GPUs is held.

    checkup(recipe, site)      within `ray_running`: versions, CPUs, GPUs, storage, corpora, memory, links and ports, as findings

`cluster/survey.py` and `cluster/bandwidth.py` ask, `cluster/verdicts.py` says what is thought of the answers.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from cluster.bandwidth import between
from cluster.finding import Finding
from cluster.site import Site, SiteError
from cluster.survey import HASTE, Errand, survey
from cluster.verdicts import corpora, cpus, devices, differing, link, memory_of, silent, some, storages
from cluster.versions import code, versions
from mllm.recipe import Recipe
from pipelines import storage
from pipelines.manifest import plan as planned
from pipelines.place import Place

CONNECT = 3.0
"""Seconds within which a port must answer."""


def checkup(recipe: Recipe | None, site: Site) -> list[Finding]:
    """Ask every node that is alive. Without a recipe all of the site's corpora are looked at, and no memory is foretold."""
    with storage.hasty(HASTE):
        return _checked(recipe, site)


def _checked(recipe: Recipe | None, site: Site) -> list[Finding]:
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    total = resources(nodes)
    gpus = on_gpus(site)
    shards, lacking = first_shards(recipe, site)
    with _visible(site) as (seen, mine):
        folders = (site.runs, site.cache)
        reports = survey(nodes, Errand(storage=storage.in_use(), folders=folders, seen=seen, corpora=shards))
    found = [_nodes(nodes, total), *silent(reports), *differing(reports, versions(), code())]
    found += [*cpus(site, recipe, gpus, total), *devices(site, gpus, total)]
    unread = [*lacking, *corpora(reports, shards)]
    found += [*mine, *storages(reports, site), *unread, *_indexed(recipe, site, unread)]
    if gpus and recipe is not None:
        found += memory_of(recipe, site, [gpu.memory for report in reports for gpu in report.gpus])
    if not any(one.fatal and one.what.startswith("node ") for one in found):
        found += _links(nodes, gpus)
    return [*found, *_ports(nodes)]


def on_gpus(site: Site) -> bool:
    """Whether trainers will have GPUs, as the controller decides it."""
    if site.gpus is not None:
        return site.gpus
    import torch

    return torch.cuda.is_available()


def resources(nodes: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """What `nodes` have together, by Ray's names."""
    total: dict[str, float] = {"CPU": 0.0, "GPU": 0.0}
    for node in nodes:
        for name in total:
            total[name] += node["Resources"].get(name, 0.0)
    return total


def first_shards(recipe: Recipe | None, site: Site) -> tuple[dict[str, str], list[Finding]]:
    """The address of each corpus's first shard, and what is said of corpora that have none."""
    from cluster.indexing import corpora_of

    names = site.corpora if recipe is None else dict.fromkeys(corpus.name for corpus in corpora_of(recipe))
    shards: dict[str, str] = {}
    lacking = []
    for name in names:
        try:
            shards[name] = site.shards(name)[0]
        except (SiteError, OSError) as error:
            advice = "mend [corpora] in the site file"
            lacking.append(Finding(what=f"corpus {name}", found=str(error), advice=advice, fatal=True))
    return shards, lacking


def _indexed(recipe: Recipe | None, site: Site, told: Sequence[Finding]) -> Iterator[Finding]:
    """Shards of the recipe's corpora that nobody has indexed yet: a run does it before it begins. Nothing where `told` says that
    a corpus cannot be read.
    """
    from cluster.indexing import corpora_of

    if recipe is None or any(one.fatal for one in told):
        return
    wanting = {}
    try:
        for corpus in corpora_of(recipe):
            uris = site.shards(corpus.name)
            missing = len(planned(corpus, uris, site.homes(uris)).missing)
            if missing:
                wanting[corpus.name] = f"{missing:,} of {len(uris):,} of {corpus.name}"
    except (FileNotFoundError, SiteError) as error:
        yield Finding(what="index", found=str(error), advice="mend [corpora] in the site file", fatal=True)
        return
    except OSError as error:  # storage that does not answer, which is told of each folder
        yield Finding(what="index", found=f"cannot be looked up: {error}", advice="see runs and cache above")
        return
    if wanting:
        found = f"shards that are not indexed yet: {', '.join(wanting.values())}"
        yield Finding(what="index", found=found, advice="a run does it first, or now: mllm data index CORPUS")
    else:
        yield Finding(what="index", found="every shard is known")


def _nodes(nodes: Sequence[Mapping[str, Any]], total: Mapping[str, float]) -> Finding:
    count = f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}"
    return Finding(what="cluster", found=f"{count}, {total['CPU']:g} CPUs, {total['GPU']:g} GPUs")


def _links(nodes: Sequence[Mapping[str, Any]], gpus: bool) -> Iterator[Finding]:
    kind = "GPU" if gpus else "CPU"
    there = [node for node in nodes if node["Resources"].get(kind, 0.0) >= 1]
    each = 2 if gpus and len(there) == 1 and there[0]["Resources"]["GPU"] >= 2 else 1
    if len(there) * each < 2:
        yield Finding(what="links", found=f"one {kind} node: nothing goes between nodes")
        return
    yield link(between([node["NodeID"] for node in there], gpus, each), len(there))


def _ports(nodes: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Whether the dashboard, and what Prometheus asks, can be reached from here."""
    from ray._private import worker

    address = worker.get_dashboard_url()
    if not address:
        advice = "ray start --head --dashboard-host HOST with ray[default] installed; mllm submit needs it"
        yield Finding(what="dashboard", found="there is none", advice=advice)
    elif _open(*_host(address)):
        yield Finding(what="dashboard", found=f"http://{address}")
    else:
        advice = "let this machine reach it, or tunnel: ssh -L"
        yield Finding(what="dashboard", found=f"http://{address} cannot be reached from here", advice=advice)
    shut = [
        f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
        for node in nodes
        if not _open(node["NodeManagerAddress"], node["MetricsExportPort"])
    ]
    first = f"{nodes[0]['NodeManagerAddress']}:{nodes[0]['MetricsExportPort']}"
    if shut:
        advice = "Prometheus gets no metrics from there; give ray start a --metrics-export-port that is open"
        yield Finding(what="metrics", found=f"no answer at {some(shut, len(nodes))}", advice=advice)
    else:
        yield Finding(what="metrics", found=f"every node answers, as {first}")


def _host(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def _open(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=CONNECT):
            return True
    except OSError:
        return False


@contextmanager
def _visible(site: Site) -> Iterator[tuple[tuple[str, str], list[Finding]]]:
    """Files that every node should see as long as this lasts, and what kept this machine from writing them."""
    found, seen, written = [], [], []
    for name, folder in (("runs", site.runs), ("cache", site.cache)):
        place = Place(folder) / f".doctor-{uuid4().hex}"
        if not place.local:
            seen.append("")
            continue
        try:
            place.write(b"seen")
        except OSError as error:
            advice = f"set {name} in the site file to where this machine may write"
            found.append(Finding(what=name, found=f"{folder} from here: {error}", advice=advice, fatal=True))
            seen.append("")
        else:
            written.append(place)
            seen.append(place.uri)
    try:
        yield (seen[0], seen[1]), found
    finally:
        for place in written:
            place.remove()
