"""Ray's cluster launcher (`ray up`): nodes of EC2, or machines that are there already and reached by ssh."""

from __future__ import annotations

import shlex
from dataclasses import field
from typing import ClassVar, Literal

from cluster.manifests.carried import carried
from cluster.manifests.kuberay import command, drain, name_of
from cluster.manifests.needs import alike, deploy_of, groups
from cluster.manifests.tree import Spelling
from cluster.manifests.words import Aws, Deploy, Node
from cluster.site import Site, SiteError
from mllm.recipe import Recipe
from pipelines.types import spec

GPUS = {
    "g4dn.xlarge": 1, "g4dn.12xlarge": 4, "g4dn.metal": 8,
    "g5.xlarge": 1, "g5.2xlarge": 1, "g5.4xlarge": 1, "g5.8xlarge": 1, "g5.16xlarge": 1,
    "g5.12xlarge": 4, "g5.24xlarge": 4, "g5.48xlarge": 8,
    "g6.xlarge": 1, "g6.12xlarge": 4, "g6.24xlarge": 4, "g6.48xlarge": 8,
    "g6e.xlarge": 1, "g6e.12xlarge": 4, "g6e.24xlarge": 4, "g6e.48xlarge": 8,
    "p3.2xlarge": 1, "p3.8xlarge": 4, "p3.16xlarge": 8, "p3dn.24xlarge": 8,
    "p4d.24xlarge": 8, "p4de.24xlarge": 8,
    "p5.4xlarge": 1, "p5.48xlarge": 8, "p5e.48xlarge": 8, "p5en.48xlarge": 8, "p6-b200.48xlarge": 8,
}  # fmt: skip
"""GPUs of instances that train; of others nothing is checked."""

TOKEN = "ray-token"
"""Name of the file with the cluster's token, beside the site file."""


@spec
class Docker:
    """The container in which all commands run."""

    image: str
    container_name: str = "mllm"
    run_options: tuple[str, ...] = ()


@spec
class AwsProvider:
    """Where EC2's nodes are."""

    type: Literal["aws"] = "aws"
    region: str
    availability_zone: str | None = None
    cache_stopped_nodes: bool = False


@spec
class LocalProvider:
    """Machines by their addresses."""

    type: Literal["local"] = "local"
    head_ip: str
    worker_ips: tuple[str, ...]


@spec
class Auth:
    """How the launcher reaches nodes."""

    ssh_user: str
    ssh_private_key: str | None = None


@spec
class Profile:
    """IamInstanceProfile."""

    SPELLING: ClassVar[Spelling] = "pascal"
    arn: str


@spec
class Market:
    """InstanceMarketOptions."""

    SPELLING: ClassVar[Spelling] = "pascal"
    market_type: Literal["spot"] = "spot"


@spec
class Ebs:
    """A disk, in GiB."""

    SPELLING: ClassVar[Spelling] = "pascal"
    volume_size: int
    volume_type: Literal["gp3"] = "gp3"


@spec
class Mapping:
    """BlockDeviceMappings: a disk and its name."""

    SPELLING: ClassVar[Spelling] = "pascal"
    device_name: str = "/dev/sda1"
    ebs: Ebs


@spec
class Ec2:
    """What EC2 is asked for, in the words of its `create_instances`."""

    SPELLING: ClassVar[Spelling] = "pascal"
    instance_type: str
    image_id: str | None = None
    key_name: str | None = None
    subnet_ids: tuple[str, ...] = ()
    iam_instance_profile: Profile | None = None
    instance_market_options: Market | None = None
    block_device_mappings: tuple[Mapping, ...] = ()


@spec
class NodeType:
    """Nodes that are alike, and what Ray counts of them."""

    resources: dict[str, int]
    node_config: Ec2
    min_workers: int = 0
    max_workers: int = 0


@spec
class Launcher:
    """A file for `ray up`."""

    cluster_name: str
    max_workers: int
    upscaling_speed: float = 1.0
    idle_timeout_minutes: int = 10
    provider: AwsProvider | LocalProvider
    auth: Auth
    docker: Docker | None = None
    head_node_type: str | None = None
    available_node_types: dict[str, NodeType] = field(default_factory=dict)
    file_mounts: dict[str, str]
    setup_commands: tuple[str, ...] = ()
    head_start_ray_commands: tuple[str, ...]
    worker_start_ray_commands: tuple[str, ...]


@spec
class Launched:
    """A launcher's file and the files that it takes to the head."""

    launcher: Launcher
    recipe: str
    site: str
    start: str
    """A script for the head: the run, as a job of Ray's."""


def aws(recipe: Recipe, site: Site, run: str) -> Launched:
    """Nodes of EC2, as many as the autoscaler finds needed. Raises SiteError for what a site must say and does not."""
    deploy = deploy_of(site)
    if deploy.aws is None:
        raise SiteError("the site does not say where in AWS; add [deploy.aws] with region")
    if deploy.image is None:
        raise SiteError(
            "nodes of EC2 run an image, and the site names none; set deploy.image (cluster/manifests/Dockerfile)"
        )
    found = groups(recipe, site)
    instances = {"head": deploy.head, **{group.name: group.node for group in found}}
    for name, node in instances.items():
        _checked(name, node)
    head = NodeType(resources={"CPU": 0, "GPU": 0}, node_config=_ec2(deploy.aws, deploy.head, False))
    types = {
        group.name: NodeType(
            resources={"CPU": group.node.cpus, "GPU": group.gpus},
            node_config=_ec2(deploy.aws, group.node, group.spot),
            min_workers=group.fewest,
            max_workers=group.most,
        )
        for group in found
    }
    spot = any(group.spot for group in found)
    return _launched(
        recipe,
        site,
        run,
        "/etc/mllm",
        provider=AwsProvider(region=deploy.aws.region, availability_zone=",".join(deploy.aws.zones) or None),
        auth=Auth(ssh_user=deploy.aws.user),
        most=sum(group.most for group in found),
        types={"head": head, **types},
        watch=_watch_spot(deploy.grace) if spot else "",
    )


def onprem(recipe: Recipe, site: Site, run: str) -> Launched:
    """Machines that are there already, the first ones of the site's list. Raises SiteError as `aws` does, and for too few."""
    deploy = deploy_of(site)
    if deploy.onprem is None:
        raise SiteError("the site names no machines; add [deploy.onprem] with head, workers and user")
    if (deploy.image is None) == (deploy.activate is None):
        raise SiteError(
            "machines get mllm by an image or by a line of shell, and the site says both or neither; set deploy.image, or "
            "deploy.activate (source /opt/mllm/bin/activate)"
        )
    group = alike(recipe, site)
    workers = deploy.onprem.workers
    if group.most > len(workers):
        raise SiteError(
            f"{group.most * group.gpus or group.most} {'GPUs' if group.gpus else 'workers'} take {group.most} machines of "
            f"{group.gpus or 1}, and deploy.onprem.workers names {len(workers)}; name more, or take fewer workers"
        )
    return _launched(
        recipe,
        site,
        run,
        "/etc/mllm" if deploy.image else "~/mllm",
        provider=LocalProvider(head_ip=deploy.onprem.head, worker_ips=workers[: group.most]),
        auth=Auth(ssh_user=deploy.onprem.user, ssh_private_key=deploy.onprem.key),
        most=group.most,
        counted=f" --num-cpus={group.node.cpus} --num-gpus={group.gpus}",
    )


def _launched(
    recipe: Recipe,
    site: Site,
    run: str,
    folder: str,
    *,
    provider: AwsProvider | LocalProvider,
    auth: Auth,
    most: int,
    types: dict[str, NodeType] | None = None,
    counted: str = "",
    watch: str = "",
) -> Launched:
    deploy = deploy_of(site)
    files = carried(recipe, site, deploy.shared, token_file=TOKEN if site.ray_token_file else None)
    env = _env(deploy, site, folder)
    before = f"{deploy.activate}; " if deploy.activate else ""
    before += "".join(f"export {name}={_quoted(value)}; " for name, value in env.items())
    nothing = "--num-cpus=0 --num-gpus=0 --dashboard-host=127.0.0.1"
    head = f"--head --port=6379 {nothing} --autoscaling-config=~/ray_bootstrap_config.yaml"
    mounts = {
        f"{folder}/recipe.json": "recipe.json",
        f"{folder}/site.toml": "site.toml",
        f"{folder}/start.sh": "start.sh",
    }
    if site.ray_token_file:
        mounts[f"{folder}/{TOKEN}"] = site.ray_token_file
    launcher = Launcher(
        cluster_name=name_of(run),
        max_workers=most,
        provider=provider,
        auth=auth,
        docker=_docker(deploy) if deploy.image else None,
        head_node_type="head" if types else None,
        available_node_types=types or {},
        file_mounts=mounts,
        head_start_ray_commands=(f"{before}ray stop", f"{before}ulimit -n 65536; ray start {head}"),
        worker_start_ray_commands=(
            f"{before}ray stop",
            f"{before}ulimit -n 65536; ray start --address=$RAY_HEAD_IP:6379{counted}{watch}",
        ),
    )
    submit = f"ray job submit --address http://127.0.0.1:8265 --no-wait -- {_home(command(run, folder))}"
    start = f"#!/bin/bash\n# The run, as a job of Ray's; its output: ray job logs -f ID.\nset -euo pipefail\n{before}\n{submit}\n"
    return Launched(launcher=launcher, recipe=files.recipe, site=files.site, start=start)


def _env(deploy: Deploy, site: Site, folder: str) -> dict[str, str]:
    asked = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"{folder}/{TOKEN}"}
    stop = {"RAY_JOB_STOP_WAIT_TIME_S": str(int(site.watch.notice) + 60)}
    return {**(asked if site.ray_token_file else {"RAY_AUTH_MODE": "disabled"}), **stop, **deploy.env}


def _quoted(value: str) -> str:
    return f"$HOME{shlex.quote(value[1:])}" if value.startswith("~/") else shlex.quote(value)


def _home(words: str) -> str:
    """The command with its files under $HOME, where it was quoted so that the shell would not find them."""
    return words.replace("'~/mllm/recipe.json'", "~/mllm/recipe.json").replace("'~/mllm/site.toml'", "~/mllm/site.toml")


def _docker(deploy: Deploy) -> Docker:
    assert deploy.image, "only where there is an image"
    folders = tuple(f"--volume={folder}:{folder}" for folder in deploy.shared)
    return Docker(image=deploy.image, run_options=("--ulimit=nofile=65536:65536", *folders))


def _checked(name: str, node: Node) -> None:
    if node.instance is None:
        raise SiteError(
            f'deploy.{name.removesuffix("-spot")} names no instance of EC2; set instance = "p4d.24xlarge", say'
        )
    there = GPUS.get(node.instance)
    if there is not None and node.gpus > there:
        raise SiteError(
            f"deploy.{name.removesuffix('-spot')} has gpus={node.gpus}, and an instance {node.instance} has {there}; set gpus to "
            f"{there} at most, or take a larger instance"
        )


def _ec2(cloud: Aws, node: Node, spot: bool) -> Ec2:
    assert node.instance, "asked for by `_checked`"
    return Ec2(
        instance_type=node.instance,
        image_id=cloud.ami,
        key_name=cloud.key_name,
        subnet_ids=cloud.subnets,
        iam_instance_profile=Profile(arn=cloud.profile) if cloud.profile else None,
        instance_market_options=Market() if spot else None,
        block_device_mappings=(Mapping(ebs=Ebs(volume_size=cloud.disk)),),
    )


def _watch_spot(grace: int) -> str:
    """Asks EC2, every five seconds, whether this node is about to be taken away, and tells Ray. EC2 gives two minutes."""
    where = "http://169.254.169.254/latest"
    token = f'$(curl -sf -X PUT -H "X-aws-ec2-metadata-token-ttl-seconds: 60" {where}/api/token)'
    told = f'curl -sf -H "X-aws-ec2-metadata-token: {token}" {where}/meta-data/spot/instance-action'
    loop = f"until {told}; do sleep 5; done; {drain(min(grace, 110))}"
    return f"; nohup bash -c {shlex.quote(loop)} > /dev/null 2>&1 &"
