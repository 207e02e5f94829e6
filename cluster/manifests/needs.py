"""Groups of nodes and their GPUs, from the recipe's and the site's numbers. One trainer has one GPU, or is one CPU node."""

from __future__ import annotations

import math
from dataclasses import replace

from cluster.counted import unpredicted
from cluster.manifests.words import Deploy, Node, bytes_of
from cluster.preflight import Machine, refusals
from cluster.site import Site, SiteError
from mllm.recipe import Recipe
from ops.attention import available
from pipelines.types import spec


@spec
class Group:
    """Nodes that are alike: from `fewest` to `most` of them, of each of which `gpus` are used."""

    name: str
    node: Node
    fewest: int
    most: int
    gpus: int
    spot: bool = False


def deploy_of(site: Site) -> Deploy:
    """The site's words about its cluster. Raises SiteError where there are none."""
    if site.deploy is None:
        raise SiteError(
            "the site says where data lies, and nothing of nodes; add [deploy] with image, head and trainers to the site file "
            "(docs/cluster.md has whole ones)"
        )
    return site.deploy


def annotator_gpus(recipe: Recipe, site: Site) -> tuple[int, int]:
    """GPUs that annotators hold beside the trainers', fewest and most. Several may share one, and none has parts of two."""
    pools = site.pools
    if not pools.gpus or not any(stage.annotators for stage in recipe.stages):
        return 0, 0
    if pools.gpus > 1 and pools.gpus % 1:
        raise SiteError(
            f"annotators.gpus={pools.gpus:g}: Ray gives whole GPUs where it gives more than one; take 0.5, 1 or 2"
        )
    together = max(1, math.floor(1 / pools.gpus + 1e-9))
    fewest, most = (math.ceil(actors / together) * math.ceil(pools.gpus) for actors in pools.annotators)
    return fewest, most


def groups(recipe: Recipe, site: Site) -> tuple[Group, ...]:
    """The groups of a run whose nodes may differ: trainers (on spot nodes too), preprocessors, annotators.

    Raises SiteError where trainers cannot be dealt evenly over nodes, or could not train the recipe there.
    """
    deploy = deploy_of(site)
    _trainable(recipe, site, deploy)
    found = _on_spot(_group("trainers", "workers", deploy.trainers, site.world))
    pools = site.pools
    fewest, most = annotator_gpus(recipe, site)
    if deploy.preprocessors is not None:
        node = deploy.preprocessors
        held = pools.annotators if not most and any(stage.annotators for stage in recipe.stages) else (0, 0)
        # One CPU more than actors hold: exports and evaluations beside training.
        nodes = [math.ceil((pools.preprocessors[n] + held[n] + 1) / node.cpus) for n in (0, 1)]
        found += _on_spot(Group(name="preprocessors", node=node, fewest=nodes[0], most=nodes[1], gpus=node.gpus))
    if most:
        found += _on_spot(
            _group("annotators", "annotators' GPUs", deploy.annotators or deploy.trainers, (fewest, most))
        )
    return found


def alike(recipe: Recipe, site: Site) -> Group:
    """The one group of a run whose nodes are all the same: trainers, and what else needs GPUs. Raises SiteError."""
    deploy = deploy_of(site)
    _trainable(recipe, site, deploy)
    world, beside = site.world, annotator_gpus(recipe, site)
    if beside[1] and not deploy.trainers.gpus:
        raise SiteError(
            f"annotators want {beside[1]} GPUs and deploy.trainers has none; give gpus, or annotators.gpus = 0"
        )
    return _group(
        "trainers", "workers and annotators' GPUs", deploy.trainers, (world[0] + beside[0], world[1] + beside[1])
    )


def _group(name: str, what: str, node: Node, wanted: tuple[int, int]) -> Group:
    if name == "annotators" and not node.gpus:
        raise SiteError(
            f"annotators want {wanted[1]} GPUs and their nodes have none; give deploy.annotators gpus, or set annotators.gpus = 0"
        )
    fewest, most = wanted
    each = node.gpus or 1
    nodes = math.ceil(most / each)
    if most % nodes:
        even = most // nodes * nodes
        raise SiteError(
            f"{most} {what} cannot be dealt evenly over {nodes} nodes of {each} GPUs; take {even} or {even + nodes}, or "
            f"other gpus under [deploy.{name}]"
        )
    used = most // nodes
    return Group(name=name, node=node, fewest=math.ceil(fewest / used), most=nodes, gpus=used if node.gpus else 0)


def _on_spot(group: Group) -> tuple[Group, ...]:
    """The group, or the fewest of it on lasting nodes and the others on spot nodes."""
    if group.node.spot != "extra" or group.fewest == group.most:
        return (replace(group, spot=group.node.spot is True),)
    extra = replace(group, name=f"{group.name}-spot", fewest=0, most=group.most - group.fewest, spot=True)
    return replace(group, most=group.fewest), extra


def _trainable(recipe: Recipe, site: Site, deploy: Deploy) -> None:
    """Refuse what the run itself would refuse when it starts, and models that the site's GPUs cannot hold."""
    fewest, most = site.world
    node = deploy.trainers
    machine = Machine(
        gpu=None,
        packages=frozenset(("deepspeed", "torchao")),
        compiler=True,
        attention=available() if not node.gpus else dict.fromkeys(available(), ""),
        unseen=node.gpus > 0,
    )
    whys = dict.fromkeys(why for world in range(fewest, most + 1) for why in refusals(recipe, world, machine))
    if whys:
        raise SiteError(f"recipe {recipe.name!r} cannot be trained by {_words(fewest, most)}: {'; '.join(whys)}")
    if node.gpu_memory is None:
        return
    from cluster.memory import memory

    for stage in recipe.stages:
        if unpredicted(recipe, stage):
            continue
        peak = memory(recipe, stage, (fewest,)).get(fewest)
        if peak is not None and peak > bytes_of(node.gpu_memory):
            raise SiteError(
                f"stage {stage.name!r} takes {peak / 2**30:.0f} GiB of each GPU with {fewest} workers, and a GPU of the trainers "
                f"has {node.gpu_memory}; take more workers, parallel.recompute, or fewer tokens a pack (mllm plan counts)"
            )


def _words(fewest: int, most: int) -> str:
    return f"{fewest} workers" if fewest == most else f"{fewest} to {most} workers"
