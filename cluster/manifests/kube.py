"""The words of Kubernetes and of KubeRay (API ray.io/v1) that manifests use; `tree` spells them as the API does.

Each class is the API's object of that name, and says no more of it than is needed here.
"""

from __future__ import annotations

from dataclasses import field
from typing import ClassVar, Literal

from cluster.manifests.words import Toleration
from pipelines.types import spec


@spec
class KeyOf:
    """SecretKeySelector: one key of a Secret, by its name."""

    name: str
    key: str


@spec
class ValueFrom:
    """EnvVarSource: what a variable is taken from."""

    secret_key_ref: KeyOf


@spec
class EnvVar:
    """A variable, whose value stands here or in a Secret."""

    name: str
    value: str | None = None
    value_from: ValueFrom | None = None


@spec
class EmptyDir:
    """A folder of the pod's own, on disk or in memory."""

    medium: Literal["Memory"] | None = None
    size_limit: str | None = None


@spec
class ClaimSource:
    """A PersistentVolumeClaim by its name."""

    claim_name: str
    read_only: bool | None = None


@spec
class HostPathSource:
    """A folder of the node, which must be there."""

    path: str
    type: Literal["Directory"] = "Directory"


@spec
class NfsSource:
    """A folder of a file server."""

    server: str
    path: str
    read_only: bool | None = None


@spec
class ConfigMapSource:
    """The files of a ConfigMap by its name."""

    name: str


@spec
class Volume:
    """A volume by its name, of the one kind that is given."""

    name: str
    empty_dir: EmptyDir | None = None
    persistent_volume_claim: ClaimSource | None = None
    host_path: HostPathSource | None = None
    nfs: NfsSource | None = None
    config_map: ConfigMapSource | None = None


@spec
class VolumeMount:
    """Where a container sees a volume."""

    name: str
    mount_path: str
    read_only: bool | None = None


@spec
class Port:
    """A port of a container, by name."""

    name: str
    container_port: int


@spec
class Exec:
    """A command within a container."""

    command: tuple[str, ...]


@spec
class Handler:
    """What is done at a moment of a container's life."""

    exec: Exec


@spec
class Lifecycle:
    """What runs in a container before it is ended."""

    pre_stop: Handler


@spec
class Resources:
    """Requests and limits, which are the same here: nobody shares what training counts on."""

    requests: dict[str, str]
    limits: dict[str, str]


@spec
class Container:
    """The container of Ray. KubeRay gives it its command, probes and addresses."""

    name: str
    image: str
    env: tuple[EnvVar, ...]
    resources: Resources
    volume_mounts: tuple[VolumeMount, ...]
    lifecycle: Lifecycle
    ports: tuple[Port, ...] = ()


@spec
class Reference:
    """LocalObjectReference: an object of the same namespace."""

    name: str


@spec
class PodSpec:
    """A pod: one container of Ray, its volumes, and the nodes on which it may stand."""

    containers: tuple[Container, ...]
    volumes: tuple[Volume, ...]
    termination_grace_period_seconds: int
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    image_pull_secrets: tuple[Reference, ...] = ()
    service_account_name: str | None = None
    runtime_class_name: str | None = None
    priority_class_name: str | None = None


@spec
class PodTemplate:
    """Pods to be made."""

    spec: PodSpec


@spec
class HeadGroup:
    """headGroupSpec. `ray_start_params` are the options of `ray start`."""

    ray_start_params: dict[str, str]
    template: PodTemplate


@spec
class WorkerGroup:
    """workerGroupSpecs: pods that are alike, from `min_replicas` to `max_replicas` of them."""

    KEPT: ClassVar[tuple[str, ...]] = ("ray_start_params",)

    group_name: str
    replicas: int
    min_replicas: int
    max_replicas: int
    ray_start_params: dict[str, str]
    template: PodTemplate


@spec
class AutoscalerOptions:
    """Ray's autoscaler, beside the head."""

    version: Literal["v2"] = "v2"
    idle_timeout_seconds: int = 600
    resources: Resources = Resources(requests={"cpu": "500m", "memory": "1Gi"}, limits={"cpu": "500m", "memory": "1Gi"})


@spec
class AuthOptions:
    """Who may use the cluster: who has its token. Without a name KubeRay makes a Secret of its own."""

    mode: Literal["token"] = "token"
    secret_name: str | None = None


@spec
class Credential:
    """A password, as a reference."""

    value_from: ValueFrom


@spec
class GcsFaultTolerance:
    """gcsFaultToleranceOptions: where the head writes what the next head reads."""

    redis_address: str
    redis_password: Credential | None = None


@spec
class RayClusterSpec:
    """A head, groups of workers, and who may use them."""

    ray_version: str
    head_group_spec: HeadGroup
    worker_group_specs: tuple[WorkerGroup, ...]
    auth_options: AuthOptions
    enable_in_tree_autoscaling: bool = False
    autoscaler_options: AutoscalerOptions | None = None
    gcs_fault_tolerance_options: GcsFaultTolerance | None = None


@spec
class Metadata:
    """An object's name and place."""

    name: str
    namespace: str
    labels: dict[str, str] = field(default_factory=dict)


@spec
class RayCluster:
    """A cluster that stays until it is deleted."""

    api_version: Literal["ray.io/v1"] = "ray.io/v1"
    kind: Literal["RayCluster"] = "RayCluster"
    metadata: Metadata
    spec: RayClusterSpec


@spec
class RayJobSpec:
    """A command, and the cluster that lives as long as it."""

    entrypoint: str
    ray_cluster_spec: RayClusterSpec
    backoff_limit: int
    shutdown_after_job_finishes: bool = True
    ttl_seconds_after_finished: int = 600
    submission_mode: Literal["K8sJobMode"] = "K8sJobMode"


@spec
class RayJob:
    """A run and its cluster."""

    api_version: Literal["ray.io/v1"] = "ray.io/v1"
    kind: Literal["RayJob"] = "RayJob"
    metadata: Metadata
    spec: RayJobSpec


@spec
class ConfigMap:
    """Files that pods read."""

    api_version: Literal["v1"] = "v1"
    kind: Literal["ConfigMap"] = "ConfigMap"
    metadata: Metadata
    data: dict[str, str]
