"""What is thought of a cluster, from what its nodes have said: findings, made by functions that ask nobody anything.

silent, differing        nodes that gave no answer, and those with other versions or other code than the driver
cpus, devices            what trainers and those who make packs hold, beside what there is
storages, corpora        what nodes may write and read, and how fast
memory_of, link          a step's memory beside the GPUs', and how fast nodes add numbers together
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from cluster.bandwidth import SIZE, Speed
from cluster.finding import Finding
from cluster.site import Site
from cluster.survey import NodeReport
from mllm.recipe import Recipe

STRICT = ("python", "torch", "ray", "transformers", "tokenizers", "numpy")
"""What must be the same on all nodes: the order of packs and the curve rest on it."""

SLOW = 30e6
"""Bytes a second under which storage is worth a word."""

THIN = 1e9
"""Bytes a second of an all-reduce between GPUs under which their links are worth a word."""

SPARE = 2 * 2**30
"""Bytes of a GPU that a prediction of memory leaves to communicators, workspaces and gaps."""


def silent(reports: Sequence[NodeReport]) -> Iterator[Finding]:
    """Nodes that gave no answer."""
    for report in reports:
        if not report.trouble:
            continue
        lacks = "No module named" in report.trouble
        yield Finding(
            what=f"node {report.node}",
            found=report.trouble,
            advice="install mllm there as it is here"
            if lacks
            else "see its raylet's logs, then drain the node or start Ray on it again",
            fatal=True,
        )


def differing(reports: Sequence[NodeReport], here: Mapping[str, str], source: str) -> Iterator[Finding]:
    """Versions that are not those of the process that drives the run, which are `here`; `source` is its code."""
    answered = [report for report in reports if not report.trouble]
    fine = True
    for report in answered:
        other = {name: report.versions.get(name, "none") for name in STRICT}
        wrong = [name for name in STRICT if _public(other[name]) != _public(here[name])]
        if wrong:
            fine = False
            words = ", ".join(f"{name} {other[name]} (here {here[name]})" for name in wrong)
            advice = "install what constraints.txt says, on all nodes"
            yield Finding(what=f"versions on {report.node}", found=words, advice=advice, fatal=True)
        if report.code != source:
            fine = False
            mine = f"mllm {report.versions.get('mllm')} of other source files ({report.code}, here {source})"
            advice = "bring the same commit to all nodes; mllm submit sends it along"
            yield Finding(what=f"code on {report.node}", found=mine, advice=advice, fatal=True)
    if fine and answered:
        words = ", ".join(f"{name} {here[name]}" for name in STRICT)
        yield Finding(
            what="versions", found=f"the same on all {len(answered)}: {words}, mllm {here['mllm']} ({source})"
        )


def _public(version: str) -> str:
    """A version without the word for its build: `2.13.0` of `2.13.0+cpu`; of Python the first two numbers."""
    return version.partition("+")[0]


GROWS = "; or, where an autoscaler brings nodes, say grows = true in the site file"


def cpus(site: Site, recipe: Recipe | None, gpus: bool, total: Mapping[str, float]) -> Iterator[Finding]:
    """The CPUs that trainers and those who make packs hold, beside those there are; the sum is told."""
    each = 0 if gpus else 1
    fewest, largest = site.world
    annotated = recipe is not None and any(stage.annotators for stage in recipe.stages) and not site.annotators.gpus
    least = [("trainer", fewest, each), ("preprocessor", site.pools.preprocessors[0], 1)]
    all_ = [("trainer", largest, each), ("preprocessor", site.pools.preprocessors[1], 1)]
    if annotated:
        least.append(("annotator", site.pools.annotators[0], 1))
        all_.append(("annotator", site.pools.annotators[1], 1))
    need, could = (sum(count * cpus for _, count, cpus in parts) for parts in (least, all_))
    words = f"{_sum(least)} of the cluster's {total['CPU']:g}"
    wanting = fewest * each - total["CPU"]
    if wanting > 0 and site.grows:
        yield Finding(what="CPUs", found=words, advice="the run waits until nodes have come")
    elif wanting > 0:
        advice = f"take fewer workers, or add nodes: {wanting:g} CPUs are wanting for the trainers alone"
        yield Finding(what="CPUs", found=words, advice=advice + GROWS, fatal=True)
    elif need > total["CPU"] and not site.grows:
        advice = "who makes packs will hold no CPU and share the trainers'; take fewer, or add a node"
        yield Finding(what="CPUs", found=words, advice=advice)
    elif could > total["CPU"] and not site.grows:
        advice = "a run of all workers and preprocessors that the site allows has no room; it takes what there is"
        yield Finding(what="CPUs", found=f"{words}; at most {_sum(all_)}", advice=advice)
    else:
        yield Finding(what="CPUs", found=words)


def _sum(parts: Sequence[tuple[str, int, int]]) -> str:
    """`2 trainers x 1 + 4 preprocessors x 1 = 6 CPUs`."""
    terms = [f"{count} {name}{'s' if count != 1 else ''} x {cpus}" for name, count, cpus in parts]
    return f"{' + '.join(terms)} = {sum(count * cpus for _, count, cpus in parts)} CPUs"


def devices(site: Site, gpus: bool, total: Mapping[str, float]) -> Iterator[Finding]:
    """The GPUs that trainers and annotators hold, beside those there are."""
    fewest, largest = site.world
    if not gpus:
        if total["GPU"]:
            found = f"trainers take none, and the cluster has {total['GPU']:g}"
            yield Finding(what="GPUs", found=found, advice="say gpus = true in the site file, if they should")
        return
    held = site.annotators.gpus * site.pools.annotators[0]
    words = f"{fewest} trainers x 1 + {held:g} for annotators = {fewest + held:g} of the cluster's {total['GPU']:g}"
    wanting = fewest + held - total["GPU"]
    if wanting > 0 and site.grows:
        yield Finding(what="GPUs", found=words, advice="the run waits until nodes have come")
    elif wanting > 0:
        advice = f"take fewer workers, or add nodes with {wanting:g} GPUs"
        yield Finding(what="GPUs", found=words, advice=advice + GROWS, fatal=True)
    elif largest + held > total["GPU"] and not site.grows:
        yield Finding(what="GPUs", found=words, advice=f"there is no room for the most workers, {largest}")
    else:
        yield Finding(what="GPUs", found=words)


def storages(reports: Sequence[NodeReport], site: Site) -> Iterator[Finding]:
    """What nodes may do where the run and the indexes are kept."""
    answered = [report for report in reports if not report.trouble]
    for number, (name, folder) in enumerate((("runs", site.runs), ("cache", site.cache))):
        by = {report.node: report.rights[number] for report in answered}
        for words in dict.fromkeys(right.trouble for right in by.values() if right.trouble):
            where = some(sorted(node for node, right in by.items() if right.trouble == words), len(answered))
            advice = f"let nodes write there: mend [storage] or {name} in the site file, or the rights of the folder"
            yield Finding(what=name, found=f"{folder} from {where}: {words}", advice=advice, fatal=True)
        apart = [node for node, right in by.items() if not right.trouble and not right.shared]
        if apart:
            found = f"{folder} on {some(sorted(apart), len(answered))} is not the one that is here"
            advice = f"{name} must be a disk that all nodes share, or s3://; mend {name} in the site file"
            yield Finding(what=name, found=found, advice=advice, fatal=True)
        good = [right for right in by.values() if not right.trouble and right.shared]
        if not good:
            continue
        speeds = f"writes {_rates([r.writes for r in good])}, reads {_rates([r.reads for r in good])}"
        found = f"{folder}: created, read and removed from {some(sorted(by), len(answered))}; {speeds}"
        advice = ""
        if not all(right.exclusive for right in good):
            advice = "it ignores If-None-Match, which keeps two controllers apart; run only one at a time"
        elif min(min(right.writes, right.reads) for right in good) < SLOW:
            advice = "slow: checkpoints will take long; look at the network between nodes and storage"
        yield Finding(what=name, found=found, advice=advice)


def corpora(reports: Sequence[NodeReport], shards: Mapping[str, str]) -> Iterator[Finding]:
    """Whether nodes read the corpora."""
    answered = [report for report in reports if not report.trouble]
    fine = []
    for number, (corpus, uri) in enumerate(shards.items()):
        by = {report.node: report.corpora[number] for report in answered}
        for words in dict.fromkeys(glance.trouble for glance in by.values() if glance.trouble):
            where = some(sorted(node for node, glance in by.items() if glance.trouble == words), len(answered))
            advice = "mend its address under [corpora], or let nodes read it"
            found = f"{uri} from {where}: {words}"
            yield Finding(what=f"corpus {corpus}", found=found, advice=advice, fatal=True)
        if by and not any(glance.trouble for glance in by.values()):
            fine.append(corpus)
    if fine:
        words = ", ".join(fine[:6]) + (f" and {len(fine) - 6} more" if len(fine) > 6 else "")
        yield Finding(what="corpora", found=f"read from {some([r.node for r in answered], len(answered))}: {words}")


def memory_of(recipe: Recipe, site: Site, gpus: Sequence[int]) -> Iterator[Finding]:
    """What a step is foretold to take beside the smallest GPU's memory."""
    from cluster.counted import unpredicted
    from cluster.memory import memory
    from cluster.stats import bytes_words

    if not gpus:
        return
    fewest, most = site.world
    room = min(gpus)
    for stage in recipe.stages:
        name = f"memory of {stage.name}"
        if why := unpredicted(recipe, stage):
            yield Finding(what=name, found=why)
            continue
        peaks = memory(recipe, stage, (fewest, most))
        worst = max(peaks.values(), default=None)
        if worst is None:
            continue  # which `refusals` tells
        found = f"{bytes_words(worst)} foretold, and the smallest GPU has {bytes_words(room)}"
        if worst > room:
            advice = "take more workers, shards (FSDP), a smaller context, or recompute full"
            yield Finding(what=name, found=found, advice=advice, fatal=True)
        else:
            tight = worst + SPARE > room
            yield Finding(
                what=name, found=found, advice="tight: NCCL and workspaces take 1 to 2 GiB more" if tight else ""
            )


def link(speed: Speed, nodes: int) -> Finding:
    """What an all-reduce between nodes took."""
    if speed.trouble:
        network = "NCCL_SOCKET_IFNAME" if speed.library == "nccl" else "GLOO_SOCKET_IFNAME"
        advice = f"open all ports between the nodes; where they have several networks, name one in {network}"
        found = f"{speed.library} among {nodes} nodes: {speed.trouble}"
        return Finding(what="links", found=found, advice=advice, fatal=True)
    words = (
        f"{speed.rate / 1e9:.2f} GB/s: {SIZE // 2**20} MiB added together by {speed.ranks} processes on {nodes} nodes"
    )
    thin = speed.library == "nccl" and speed.rate < THIN
    advice = "slow for gradients: NCCL_DEBUG=INFO tells what is used" if thin else ""
    return Finding(what="links", found=f"{words} ({speed.library})", advice=advice)


def some(names: Sequence[str], all_: int) -> str:
    """`every node`, or the first of them by name."""
    if len(names) == all_:
        return "every node" if all_ != 1 else "the node"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _rates(values: Sequence[float]) -> str:
    """`120 MB/s`, or `80 to 120 MB/s`."""
    low, high = min(values), max(values)
    return f"{low / 1e6:,.0f} MB/s" if high < 1.2 * low else f"{low / 1e6:,.0f} to {high / 1e6:,.0f} MB/s"
