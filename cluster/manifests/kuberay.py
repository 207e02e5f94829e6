"""Kubernetes: a RayJob, whose cluster lives as long as the run, or a RayCluster that stays. For KubeRay 1.6 and later."""

from __future__ import annotations

import re
import shlex
from importlib.metadata import version

from cluster.manifests import kube
from cluster.manifests.carried import CREDENTIALS, Carried, carried
from cluster.manifests.needs import Group, deploy_of, groups
from cluster.manifests.words import Claim, Deploy, HostPath, Kubernetes, Node, Redis, Toleration, Volume
from cluster.site import Site, SiteError
from mllm.recipe import Recipe

FILES = "/etc/mllm"
"""Where the head sees recipe.json and site.toml."""

LONGEST = 47
"""Characters of a RayJob's name; KubeRay makes longer ones of it."""

MARGIN = 60
"""Seconds that pods get beyond those in which a run saves."""


def rayjob(recipe: Recipe, site: Site, run: str) -> tuple[kube.ConfigMap, kube.RayJob]:
    """The run as a RayJob. When its cluster is lost, KubeRay starts another one, and the same command goes on.

    Raises SiteError for what a site must say and does not.
    """
    files, cluster = _parts(recipe, site, run)
    job = kube.RayJobSpec(
        entrypoint=command(run),
        ray_cluster_spec=cluster,
        backoff_limit=deploy_of(site).kubernetes.retries,
    )
    return files, kube.RayJob(metadata=_metadata(site, run), spec=job)


def raycluster(recipe: Recipe, site: Site, run: str) -> tuple[kube.ConfigMap, kube.RayCluster]:
    """A cluster of the run's size, on whose head `command` is given by hand. Raises as `rayjob` does."""
    files, cluster = _parts(recipe, site, run)
    return files, kube.RayCluster(metadata=_metadata(site, run), spec=cluster)


def command(run: str, folder: str = FILES) -> str:
    """What is run on the head, wherever that is; the two files lie in `folder`."""
    train = ["mllm", "train", f"{folder}/recipe.json", "--site", f"{folder}/site.toml", "--run", run]
    return shlex.join(train)


def name_of(run: str) -> str:
    """The run's name as Kubernetes takes names. Raises SiteError for one that is too long."""
    name = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    name = name if name[:1].isalpha() else f"run-{name}".rstrip("-")
    if len(name) > LONGEST:
        raise SiteError(
            f"{name!r} has {len(name)} characters, and KubeRay takes {LONGEST} at most; give a shorter --run"
        )
    return name


def _metadata(site: Site, run: str, suffix: str = "") -> kube.Metadata:
    labels = {"app.kubernetes.io/name": "mllm", "app.kubernetes.io/instance": name_of(run)}
    return kube.Metadata(name=name_of(run) + suffix, namespace=deploy_of(site).kubernetes.namespace, labels=labels)


def _parts(recipe: Recipe, site: Site, run: str) -> tuple[kube.ConfigMap, kube.RayClusterSpec]:
    deploy = deploy_of(site)
    _complete(site, deploy)
    found = groups(recipe, site)
    files = carried(recipe, site, deploy.kubernetes.volumes)
    if len(files.recipe) + len(files.site) > 2**20 - 2**12:
        raise SiteError(
            "recipe and site are more than the 1 MiB that a ConfigMap holds; name corpora by ranges, not by lists"
        )
    scaled = any(group.fewest < group.most for group in found)
    cluster = kube.RayClusterSpec(
        ray_version=version("ray"),
        auth_options=kube.AuthOptions(secret_name=deploy.kubernetes.token_secret),
        enable_in_tree_autoscaling=scaled,
        autoscaler_options=kube.AutoscalerOptions() if scaled else None,
        gcs_fault_tolerance_options=_fault_tolerance(deploy.kubernetes.redis),
        head_group_spec=_head(deploy, site, run),
        worker_group_specs=tuple(_workers(group, deploy) for group in found),
    )
    return _config(files, site, run), cluster


def _complete(site: Site, deploy: Deploy) -> None:
    """Say what a cluster would miss before anything is written."""
    kubernetes = deploy.kubernetes
    if deploy.image is None:
        raise SiteError(
            "pods are made of an image, and the site names none; build one (cluster/manifests/Dockerfile) and set "
            "deploy.image to its name"
        )
    if site.storage.key and not kubernetes.storage_secret:
        raise SiteError(
            "the site has keys for storage, and manifests hold none: put AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY into a "
            "Secret (kubectl create secret generic mllm-s3) and name it with deploy.kubernetes.storage_secret"
        )
    if site.ray_token_file and not kubernetes.token_secret:
        raise SiteError(
            "the site has a ray_token_file, and manifests hold no token: kubectl create secret generic mllm-ray-token "
            "--from-file=auth_token=FILE, and name it with deploy.kubernetes.token_secret; or take ray_token_file away, and "
            "KubeRay makes a token of its own"
        )
    if kubernetes.redis and CREDENTIALS.search(kubernetes.redis.address):
        raise SiteError(
            "deploy.kubernetes.redis.address has a password in it; put that into a Secret and name it with redis.secret"
        )


def _config(files: Carried, site: Site, run: str) -> kube.ConfigMap:
    return kube.ConfigMap(
        metadata=_metadata(site, run, "-mllm"), data={"site.toml": files.site, "recipe.json": files.recipe}
    )


def _fault_tolerance(redis: Redis | None) -> kube.GcsFaultTolerance | None:
    if redis is None:
        return None
    password = kube.Credential(value_from=_key(redis.secret, redis.key)) if redis.secret else None
    return kube.GcsFaultTolerance(redis_address=redis.address, redis_password=password)


def _key(secret: str, key: str) -> kube.ValueFrom:
    return kube.ValueFrom(secret_key_ref=kube.KeyOf(name=secret, key=key))


def _head(deploy: Deploy, site: Site, run: str) -> kube.HeadGroup:
    """The head: Ray's own processes and the run's driver, and nothing that trains."""
    notice = max(deploy.grace, int(site.watch.notice))
    # The driver is asked to save and stop, and the head stays until it has: workers need it to save.
    left = "pgrep -f '[m]llm train' > /dev/null || break"
    leave = f"pkill -TERM -f '[m]llm train'; for _ in $(seq {notice}); do {left}; sleep 1; done"
    env = (kube.EnvVar(name="RAY_JOB_STOP_WAIT_TIME_S", value=str(notice)), *_env(deploy))
    mount = kube.VolumeMount(name="mllm", mount_path=FILES, read_only=True)
    volume = kube.Volume(name="mllm", config_map=kube.ConfigMapSource(name=f"{name_of(run)}-mllm"))
    ports = (("gcs", 6379), ("dashboard", 8265), ("client", 10001))
    head = kube.Container(
        name="ray-head",
        image=_image(deploy),
        ports=tuple(kube.Port(name=name, container_port=port) for name, port in ports),
        env=env,
        resources=_resources(deploy.head, 0, deploy.kubernetes),
        volume_mounts=(mount, *_mounts(deploy.kubernetes)),
        lifecycle=_before_end(leave),
    )
    return kube.HeadGroup(
        ray_start_params={"num-cpus": "0", "num-gpus": "0", "object-store-memory": _store(deploy.head)},
        template=_pod(deploy, deploy.head, head, notice + MARGIN, (volume,)),
    )


def _workers(group: Group, deploy: Deploy) -> kube.WorkerGroup:
    """Pods of one group. Before one is ended its node is drained: the run saves at once and goes on elsewhere."""
    if group.spot and deploy.kubernetes.spot is None:
        raise SiteError(
            f"{group.name} are to be on spot nodes, and the site does not say how this cluster marks them; add "
            "[deploy.kubernetes.spot] with selector and tolerations"
        )
    container = kube.Container(
        name="ray-worker",
        image=_image(deploy),
        env=_env(deploy),
        resources=_resources(group.node, group.gpus, deploy.kubernetes),
        volume_mounts=_mounts(deploy.kubernetes),
        lifecycle=_before_end(f"{drain(deploy.grace)}; sleep {deploy.grace}"),
    )
    return kube.WorkerGroup(
        group_name=group.name,
        replicas=group.fewest,
        min_replicas=group.fewest,
        max_replicas=group.most,
        ray_start_params={"object-store-memory": _store(group.node)},
        template=_pod(deploy, group.node, container, deploy.grace + MARGIN, (), group),
    )


def drain(seconds: int) -> str:
    """Tells Ray that the node on which it is given will be gone within so many seconds. When all on it has left, Ray ends it."""
    return (
        "ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message 'the node is taken away' "
        f"--deadline-remaining-seconds {seconds}"
    )


def _before_end(shell: str) -> kube.Lifecycle:
    return kube.Lifecycle(pre_stop=kube.Handler(exec=kube.Exec(command=("/bin/bash", "-c", shell))))


def _image(deploy: Deploy) -> str:
    assert deploy.image, "asked for by `_complete`"
    return deploy.image


def _env(deploy: Deploy) -> tuple[kube.EnvVar, ...]:
    """What every node has in its environment: secrets as references alone."""
    kubernetes = deploy.kubernetes
    plain = {"RAY_AUTH_MODE": "token", **deploy.env}
    secret = []
    if kubernetes.storage_secret:
        secret += [(key, kubernetes.storage_secret, key) for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    if kubernetes.hub_secret:
        secret.append(("HF_TOKEN", kubernetes.hub_secret, "HF_TOKEN"))
    return (
        *(kube.EnvVar(name=name, value=value) for name, value in plain.items()),
        *(kube.EnvVar(name=name, value_from=_key(holder, key)) for name, holder, key in secret),
    )


def _resources(node: Node, gpus: int, kubernetes: Kubernetes) -> kube.Resources:
    wanted = {"cpu": str(node.cpus), "memory": node.memory, **{name: str(n) for name, n in node.resources.items()}}
    if gpus:
        wanted[kubernetes.gpu] = str(gpus)
    return kube.Resources(requests=wanted, limits=wanted)


def _store(node: Node) -> str:
    """Bytes of the object store: nine tenths of shared memory, which NCCL uses too."""
    return str(node.store * 9 // 10)


def _pod(
    deploy: Deploy,
    node: Node,
    container: kube.Container,
    grace: int,
    more: tuple[kube.Volume, ...],
    group: Group | None = None,
) -> kube.PodTemplate:
    kubernetes = deploy.kubernetes
    spot = kubernetes.spot if group and group.spot else None
    gpus = bool(group and group.gpus)
    taint = (Toleration(key=kubernetes.gpu, effect="NoSchedule"),) if gpus else ()
    shm = kube.Volume(name="shm", empty_dir=kube.EmptyDir(medium="Memory", size_limit=f"{node.store // 2**20}Mi"))
    return kube.PodTemplate(
        spec=kube.PodSpec(
            containers=(container,),
            volumes=(shm, *more, *(_volume(f"folder-{n}", one) for n, one in enumerate(kubernetes.volumes.values()))),
            termination_grace_period_seconds=grace,
            node_selector={**node.selector, **(spot.selector if spot else {})},
            tolerations=(*node.tolerations, *(spot.tolerations if spot else ()), *taint),
            image_pull_secrets=tuple(kube.Reference(name=name) for name in kubernetes.pull_secrets),
            service_account_name=kubernetes.service_account,
            runtime_class_name=kubernetes.runtime_class if gpus else None,
            priority_class_name=kubernetes.priority_class,
        )
    )


def _mounts(kubernetes: Kubernetes) -> tuple[kube.VolumeMount, ...]:
    folders = (
        kube.VolumeMount(name=f"folder-{n}", mount_path=path, read_only=volume.read_only or None)
        for n, (path, volume) in enumerate(kubernetes.volumes.items())
    )
    return kube.VolumeMount(name="shm", mount_path="/dev/shm"), *folders


def _volume(name: str, volume: Volume) -> kube.Volume:
    read_only = volume.read_only or None
    if isinstance(volume, Claim):
        source = kube.ClaimSource(claim_name=volume.claim, read_only=read_only)
        return kube.Volume(name=name, persistent_volume_claim=source)
    if isinstance(volume, HostPath):
        return kube.Volume(name=name, host_path=kube.HostPathSource(path=volume.path))
    return kube.Volume(name=name, nfs=kube.NfsSource(server=volume.server, path=volume.path, read_only=read_only))
