"""`[deploy]` of the site file: what nodes have and where they stand. Names of secrets may stand here, secrets may not.

[deploy]
image = "registry.local/mllm:0.1.0"

[deploy.trainers]
cpus = 96
gpus = 8
memory = "900Gi"

[deploy.kubernetes]
storage_secret = "mllm-s3"
"""

from __future__ import annotations

import re
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from pipelines.types import spec

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Bytes = Annotated[str, Field(pattern=r"^[1-9][0-9]*(Mi|Gi|Ti)$")]
"""Bytes as Kubernetes writes them: 64Gi."""

Label = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
"""A name of an object of Kubernetes."""

Folder = Annotated[str, Field(pattern=r"^/[^\s:]*[^/\s:]$")]
"""An absolute path below the root."""


SECRET = re.compile(r"(SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE)", re.IGNORECASE)

_UNITS = {"Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def bytes_of(quantity: str) -> int:
    """64Gi as a number."""
    return int(quantity[:-2]) * _UNITS[quantity[-2:]]


@spec
class Toleration:
    """A taint of nodes that pods put up with, in Kubernetes' words."""

    key: str
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


@spec
class Node:
    """One kind of node, or of pod: all of it is used.

    `shm` is Ray's object store, in shared memory, and a part of `memory`: three tenths where it is not given. `gpu_memory` is
    what one GPU has: where it is given, models that are too large for it are refused. `spot` nodes may be taken away: all of a
    group, or, with "extra", those above the fewest. `instance` is AWS's type; `selector`, `tolerations` and `resources` (a
    network card, say) are Kubernetes'.
    """

    cpus: Positive = 8
    memory: Bytes = "32Gi"
    gpus: Count = 0
    gpu_memory: Bytes | None = None
    shm: Bytes | None = None
    spot: bool | Literal["extra"] = False
    instance: str | None = None
    selector: dict[str, str] = field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    resources: dict[str, Positive] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.store >= bytes_of(self.memory):
            raise ValueError(
                f"shm={self.shm} is a part of memory={self.memory}, and leaves nothing of it; take less shm"
            )

    @property
    def store(self) -> int:
        """Bytes of Ray's object store."""
        return bytes_of(self.shm) if self.shm else bytes_of(self.memory) * 3 // 10


@spec
class Claim:
    """A PersistentVolumeClaim that is there already."""

    kind: Literal["claim"] = "claim"
    claim: Label
    read_only: bool = False


@spec
class HostPath:
    """A folder that every node has at the same place."""

    kind: Literal["path"] = "path"
    path: Folder
    read_only: bool = False


@spec
class Nfs:
    """A folder of a file server."""

    kind: Literal["nfs"] = "nfs"
    server: str
    path: Folder
    read_only: bool = False


Volume = Annotated[Claim | HostPath | Nfs, Field(discriminator="kind")]


@spec
class Redis:
    """Where the head keeps what it knows, so that another one can go on with it. `secret` is a Secret, `key` one of its keys."""

    address: str
    secret: Label | None = None
    key: str = "password"


@spec
class Spot:
    """How a cluster marks its spot nodes, and what keeps other pods off them."""

    selector: dict[str, str]
    tolerations: tuple[Toleration, ...] = ()


@spec
class Kubernetes:
    """A cluster with KubeRay 1.6 or later. Secrets are named: `storage_secret` has AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY,
    `token_secret` has auth_token, `hub_secret` has HF_TOKEN. `volumes` are what pods see, by the path at which they see it.

    `retries` is how often another cluster is started for a job that failed; it goes on where the one before was.
    """

    namespace: Label = "default"
    service_account: Label | None = None
    pull_secrets: tuple[Label, ...] = ()
    storage_secret: Label | None = None
    token_secret: Label | None = None
    hub_secret: Label | None = None
    redis: Redis | None = None
    volumes: dict[Folder, Volume] = field(default_factory=dict)
    gpu: str = "nvidia.com/gpu"
    runtime_class: str | None = None
    priority_class: str | None = None
    spot: Spot | None = None
    retries: Count = 3


@spec
class Aws:
    """EC2 by Ray's cluster launcher. Nodes reach S3 by `profile`, the ARN of their instance profile, and by no keys."""

    region: str
    zones: tuple[str, ...] = ()
    subnets: tuple[str, ...] = ()
    ami: str | None = None
    key_name: str | None = None
    profile: str | None = None
    user: str = "ubuntu"
    disk: Positive = 256
    """GiB of each node's disk."""


@spec
class OnPrem:
    """Machines that are there already, reached by ssh. The head trains nothing; `workers` are alike."""

    head: str
    workers: tuple[str, ...]
    user: str
    key: str | None = None
    """Path of the ssh key, on the machine that starts the cluster."""


@spec
class Slurm:
    """A batch job of whole nodes; the first one is also the head. `notice` seconds before its time is over a job is told."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: Annotated[str, Field(pattern=r"^(\d+-)?\d+(:\d\d){0,2}$")] = "1-00:00:00"
    notice: Positive = 180
    """Seconds."""


@spec
class Deploy:
    """What `mllm manifest` needs to know of a cluster. `grace` is the seconds for which a node that is taken away may save.

    `image` has mllm in it (`cluster/manifests/Dockerfile`); `activate` is a line of shell that brings it where there is no
    image. `shared` are folders that all VMs, or all nodes of Slurm, see at the same path. `env` is set on every node.
    """

    image: Annotated[str, Field(pattern=r"^\S+$")] | None = None
    activate: Annotated[str, Field(pattern=r"^[^\n]+$")] | None = None
    grace: Positive = 120
    shared: tuple[Folder, ...] = ()
    env: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = field(default_factory=dict)
    head: Node = Node()
    trainers: Node = Node()
    preprocessors: Node | None = None
    annotators: Node | None = None
    kubernetes: Kubernetes = Kubernetes()
    aws: Aws | None = None
    onprem: OnPrem | None = None
    slurm: Slurm = Slurm()

    def __post_init__(self) -> None:
        secret = [name for name in self.env if SECRET.search(name)]
        if secret:
            raise ValueError(
                f"env names {', '.join(secret)}, which are secrets by their names, and what stands here is written into "
                "manifests; put them into a Secret, or into the nodes' own environment"
            )
        if self.head.gpus:
            raise ValueError(f"head has gpus={self.head.gpus}, and nothing is trained on it; give them to trainers")
