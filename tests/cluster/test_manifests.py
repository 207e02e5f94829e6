"""Manifests are what Kubernetes, Ray and EC2 take, count the GPUs that the run holds, and hold no secret.

`kuberay/crds.json.gz` has KubeRay's schemas of RayCluster and RayJob (Apache-2.0), from its tag v1.7.0, without descriptions.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jsonschema.validators import Draft7Validator, extend

from cluster.cli import main
from cluster.manifests.words import Aws, Claim, Deploy, HostPath, Kubernetes, Nfs, Node, OnPrem, Redis, Spot, Toleration
from cluster.manifests.write import TARGETS, Manifest, manifest
from cluster.site import Annotators, Site, SiteError, load_site
from mllm.annotators import FrozenFeatures
from mllm.encoders import Encoder
from mllm.recipe import FSDP, Recipe
from mllm.recipes import by_name
from pipelines.storage import Storage

Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
CRDS = json.loads(gzip.decompress((Path(__file__).parent / "kuberay" / "crds.json.gz").read_bytes()))


def closed(schema: Any) -> Any:
    """The schema without room for fields it does not name, which an API server would drop without a word."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    if isinstance(found.get("properties"), dict) and found.get("type") == "object":
        found.setdefault("additionalProperties", False)
    return found


def unique(_: Any, keys: list[str], items: list[dict[str, Any]], __: Any) -> Iterator[jsonschema.ValidationError]:
    """x-kubernetes-list-map-keys: items of a list that is a map have keys of their own."""
    names = [tuple(item.get(key) for key in keys) for item in items]
    if len(names) != len(set(names)):
        yield jsonschema.ValidationError(f"{names} are not unique by {keys}")


Kube = extend(Draft7Validator, {"x-kubernetes-list-map-keys": unique})
SCHEMAS = {kind: Kube(closed(schema)) for kind, schema in CRDS["schemas"].items()}

SITE = Site(
    runs="s3://bucket/runs",
    cache="s3://bucket/cache",
    workers=(8, 32),
    preprocessors=(8, 64),
    weights={"lmsys/vicuna-7b-v1.5": "/models/vicuna-7b-v1.5"},
    deploy=Deploy(
        image="registry.local/mllm:0.1.0",
        shared=("/models",),
        head=Node(instance="m6i.2xlarge"),
        trainers=Node(cpus=96, gpus=8, memory="900Gi", instance="p4d.24xlarge"),
        kubernetes=Kubernetes(volumes={"/models": Claim(claim="models")}),
        aws=Aws(region="us-east-1"),
        onprem=OnPrem(head="10.0.0.1", workers=tuple(f"10.0.1.{n}" for n in range(128)), user="ray"),
    ),
)


def with_corpora(site: Site, recipe: Recipe) -> Site:
    """The site with an address for each corpus of the recipe."""
    names = {source.corpus.name for stage in recipe.stages for source in stage.mixture}
    names |= {corpus.name for corpus in recipe.held_out}
    weights = {**site.weights, "example-bpe": "/models/bpe"}
    return replace(site, corpora={name: f"s3://bucket/{name}/*.tar" for name in names}, weights=weights)


def deployed(site: Site, **changes: Any) -> Site:
    assert site.deploy
    return replace(site, deploy=replace(site.deploy, **changes))


def kubernetes(site: Site, **changes: Any) -> Site:
    assert site.deploy
    return deployed(site, kubernetes=replace(site.deploy.kubernetes, **changes))


def trainers(site: Site, **changes: Any) -> Site:
    assert site.deploy
    return deployed(site, trainers=replace(site.deploy.trainers, **changes))


def objects(found: Manifest) -> dict[str, Any]:
    """The objects of a manifest for Kubernetes, by kind."""
    (text,) = (text for name, text in found.files.items() if name.endswith(".yaml"))
    return {one["kind"]: one for one in yaml.load_all(text, Loader)}


def cluster_of(found: Manifest) -> dict[str, Any]:
    by_kind = objects(found)
    return by_kind["RayJob"]["spec"]["rayClusterSpec"] if "RayJob" in by_kind else by_kind["RayCluster"]["spec"]


def gpus_of(target: str, found: Manifest) -> tuple[int, int, int]:
    """GPUs that a manifest asks for, fewest and most, and how many of them one node has at most."""
    if target in ("rayjob", "raycluster"):
        groups = [
            (
                group["minReplicas"],
                group["maxReplicas"],
                int(group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0)),
            )
            for group in cluster_of(found)["workerGroupSpecs"]
        ]
    elif target == "aws":
        types = yaml.load(found.files["cluster.yaml"], Loader)["available_node_types"].values()
        groups = [(one["min_workers"], one["max_workers"], one["resources"]["GPU"]) for one in types]
    elif target == "onprem":
        words = yaml.load(found.files["cluster.yaml"], Loader)
        each = int(words["worker_start_ray_commands"][1].partition("--num-gpus=")[2].split()[0])
        groups = [(len(words["provider"]["worker_ips"]), len(words["provider"]["worker_ips"]), each)]
    else:
        lines = [
            line.removeprefix("#SBATCH --") for line in found.files["job.sbatch"].splitlines() if "#SBATCH" in line
        ]
        said = {line.partition("=")[0]: line.partition("=")[2] for line in lines}
        fewest, _, most = said["nodes"].partition("-")
        groups = [(int(fewest), int(most or fewest), int(said.get("gpus-per-node", 0)))]
    return (
        sum(fewest * each for fewest, _, each in groups),
        sum(most * each for _, most, each in groups),
        max(each for *_, each in groups),
    )


SITES = {
    "plain": SITE,
    "one number": replace(SITE, workers=16),
    "a group for packs": deployed(SITE, preprocessors=Node(cpus=32, memory="64Gi", instance="c6i.8xlarge")),
    "spot": kubernetes(
        trainers(SITE, spot="extra", selector={"zone": "a"}, tolerations=(Toleration(key="gpu", effect="NoExecute"),)),
        spot=Spot(selector={"spot": "true"}, tolerations=(Toleration(key="spot", operator="Equal", value="true"),)),
    ),
    "cpus": trainers(replace(SITE, workers=(1, 4)), gpus=0, instance="c6i.8xlarge"),
    "secrets": kubernetes(
        replace(SITE, ray_address="auto", ray_token_file="/secrets/ray"),
        storage_secret="mllm-s3",
        token_secret="mllm-ray-token",
        hub_secret="hub",
        redis=Redis(address="redis:6379", secret="redis"),
        service_account="trainer",
        pull_secrets=("registry",),
        runtime_class="nvidia",
        priority_class="high",
    ),
    "volumes": kubernetes(
        replace(SITE, runs="/shared/runs", cache="/shared/cache"),
        volumes={
            "/models": HostPath(path="/mnt/models", read_only=True),
            "/shared": Nfs(server="files.local", path="/export"),
        },
    ),
}
FITTING = [
    (target, name) for target in TARGETS for name in SITES if target in ("rayjob", "raycluster") or name != "volumes"
]


@pytest.mark.parametrize(
    ("target", "site", "recipe"),
    [
        *(("rayjob", site, "vila_7b") for site in SITES),
        *(("raycluster", site, "vila_smoke") for site in ("spot", "secrets")),
        ("rayjob", "cpus", "clip_b16"),
        ("raycluster", "plain", "vilt_b32"),
    ],
)
def test_kuberay_takes_it_to_the_letter(target: str, site: str, recipe: str) -> None:
    of = by_name(recipe)
    made = manifest(of, with_corpora(SITES[site], of), target, "a_run")
    found = objects(made)
    config = found.pop("ConfigMap")
    ((kind, what),) = found.items()
    SCHEMAS[kind].validate(what)
    assert what["metadata"]["name"] == "a-run"
    head = cluster_of(made)["headGroupSpec"]
    named = [volume.get("configMap", {}).get("name") for volume in head["template"]["spec"]["volumes"]]
    assert config["metadata"]["name"] in named
    assert set(config["data"]) == {"site.toml", "recipe.json"}


def test_the_schemas_would_notice() -> None:
    """What a typing error would become is refused by them, so that the test above means something."""
    recipe = by_name("vila_7b")
    job = objects(manifest(recipe, with_corpora(SITE, recipe), "rayjob", "run"))["RayJob"]
    worker = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    container = worker["template"]["spec"]["containers"][0]
    for where, key, value in (
        (worker, "minReplica", 1),
        (worker, "minReplicas", "1"),
        (container["resources"]["limits"], "memory", "900 Gigabytes"),
        (container, "env", [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]),
        (job["spec"], "submissionMode", 3),
    ):
        before = where.get(key)
        where[key] = value
        assert not SCHEMAS["RayJob"].is_valid(job), key
        where[key] = before
        if before is None:
            del where[key]
    SCHEMAS["RayJob"].validate(job)


def test_a_pod_that_ends_drains_its_node_first_and_the_head_waits_for_the_run() -> None:
    recipe = by_name("vila_7b")
    site = with_corpora(SITES["spot"], recipe)
    cluster = cluster_of(manifest(recipe, site, "rayjob", "run"))
    head = cluster["headGroupSpec"]
    for group in cluster["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        shell = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
        assert "ray drain-node" in shell
        assert "--deadline-remaining-seconds 120" in shell
        assert pod["terminationGracePeriodSeconds"] > 120
        assert head["template"]["spec"]["terminationGracePeriodSeconds"] >= pod["terminationGracePeriodSeconds"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    lasting, extra = cluster["workerGroupSpecs"]
    assert (lasting["minReplicas"], lasting["maxReplicas"]) == (1, 1)
    assert (extra["minReplicas"], extra["maxReplicas"]) == (0, 3)
    assert "spot" not in lasting["template"]["spec"]["nodeSelector"]
    assert extra["template"]["spec"]["nodeSelector"] == {"zone": "a", "spot": "true"}
    assert {one["key"] for one in extra["template"]["spec"]["tolerations"]} == {"gpu", "spot", "nvidia.com/gpu"}
    assert cluster["autoscalerOptions"]["version"] == "v2"
    fixed = cluster_of(manifest(recipe, with_corpora(SITES["one number"], recipe), "rayjob", "run"))
    assert fixed["enableInTreeAutoscaling"] is False
    assert "autoscalerOptions" not in fixed


def test_shared_memory_holds_the_object_store_within_the_pods_memory() -> None:
    recipe = by_name("vila_7b")
    cluster = cluster_of(manifest(recipe, with_corpora(trainers(SITE, shm="200Gi"), recipe), "rayjob", "run"))
    (group,) = cluster["workerGroupSpecs"]
    (shm,) = (one["emptyDir"] for one in group["template"]["spec"]["volumes"] if one["name"] == "shm")
    assert shm == {"medium": "Memory", "sizeLimit": f"{200 * 1024}Mi"}
    assert int(group["rayStartParams"]["object-store-memory"]) <= 200 * 2**30
    with pytest.raises(ValueError, match="leaves nothing of it"):
        Node(memory="64Gi", shm="64Gi")


@pytest.mark.parametrize("site", [name for name in SITES if name != "volumes"])
@pytest.mark.parametrize("target", ["aws", "onprem"])
def test_rays_launcher_takes_it(target: str, site: str) -> None:
    recipe = by_name("vila_7b")
    found = manifest(recipe, with_corpora(SITES[site], recipe), target, "a_run")
    words = yaml.load(found.files["cluster.yaml"], Loader)
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_bytes())
    jsonschema.validate(words, schema)
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(words))
    for local in words["file_mounts"].values():
        assert local in found.files or local == "/secrets/ray"


def test_ec2_takes_the_nodes() -> None:
    """By EC2's own description of `RunInstances`; `SubnetIds` is a word of Ray's, which it turns into EC2's."""
    from botocore.session import Session
    from botocore.validate import ParamValidator

    asked = Session().get_service_model("ec2").operation_model("RunInstances").input_shape
    recipe = by_name("vila_7b")
    words = {
        "subnets": ("subnet-1",),
        "ami": "ami-1",
        "key_name": "key",
        "profile": "arn:aws:iam::1:instance-profile/x",
    }
    site = deployed(SITES["spot"], aws=Aws(region="us-east-1", zones=("us-east-1a",), **words))  # type: ignore[arg-type]  # they fit
    types = yaml.load(manifest(recipe, with_corpora(site, recipe), "aws", "run").files["cluster.yaml"], Loader)
    for node in types["available_node_types"].values():
        config = node["node_config"]
        assert config.pop("SubnetIds") == ["subnet-1"]
        assert not ParamValidator().validate({**config, "MinCount": 1, "MaxCount": 1}, asked).has_errors()
    assert types["available_node_types"]["trainers-spot"]["node_config"]["InstanceMarketOptions"] == {
        "MarketType": "spot"
    }


@given(
    workers=st.tuples(st.integers(1, 40), st.integers(0, 40)),
    each=st.integers(1, 8),
    actors=st.tuples(st.integers(1, 6), st.integers(0, 4)),
    share=st.sampled_from([0.0, 0.25, 0.3, 0.5, 1.0, 2.0]),
    annotated=st.booleans(),
    spot=st.sampled_from([False, True, "extra"]),
    target=st.sampled_from(TARGETS),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_a_manifest_asks_for_the_gpus_that_the_run_holds(
    workers: tuple[int, int],
    each: int,
    actors: tuple[int, int],
    share: float,
    annotated: bool,
    spot: Any,
    target: str,
) -> None:
    """One for each trainer, and those of annotators, where several may share one GPU and none has parts of two."""
    fewest, most = workers[0], workers[0] + workers[1]
    least, greatest = actors[0], actors[0] + actors[1]
    recipe = by_name("vila_7b")
    if annotated:
        encoder = recipe.vlm.encoder
        assert isinstance(encoder, Encoder)
        features = FrozenFeatures(encoder=encoder)
        recipe = replace(recipe, stages=(replace(recipe.stages[0], annotators=(features,)),))
    site = replace(SITE, workers=(fewest, most), annotators=Annotators(actors=(least, greatest), gpus=share))
    site = trainers(kubernetes(site, spot=Spot(selector={"spot": "true"})), gpus=each, spot=spot)
    try:
        found = manifest(recipe, with_corpora(site, recipe), target, "run")
    except SiteError as error:
        if "cannot be dealt evenly" not in str(error):
            raise
        assume(False)  # such nodes cannot hold them with as many GPUs each
        return
    together = math.floor(1 / share) if 0 < share < 1 else 1
    beside = [math.ceil(n / together) * math.ceil(share) for n in (least, greatest)] if annotated else [0, 0]
    low, high, node = gpus_of(target, found)
    assert high == most + beside[1]
    assert node <= each
    if target == "onprem":  # whose machines are all there from the beginning
        return
    assert low >= fewest + beside[0]
    assert low < fewest + beside[0] + (2 if annotated else 1) * each


@pytest.mark.parametrize(("target", "name"), FITTING)
def test_no_secret_stands_in_a_manifest(target: str, name: str, tmp_path: Path) -> None:
    """Keys of storage and the token's content stay where they are, and an address that has some is refused without saying it."""
    planted = "Zq9planted7secretX"
    (tmp_path / "token").write_text(planted)
    recipe = by_name("vila_7b")
    site = with_corpora(SITES[name], recipe)
    site = replace(
        site, storage=Storage(key=planted, secret=planted), ray_address="auto", ray_token_file=str(tmp_path / "token")
    )
    site = kubernetes(site, storage_secret="s3", token_secret="token")
    found = manifest(recipe, site, target, "run")
    assert not [file for file, text in found.files.items() if planted in text]
    address = f"https://user:{planted}@host/x.tar"
    leaky = [
        replace(site, corpora={**site.corpora, "coyo-25m": address}),
        replace(site, corpora={**site.corpora, "coyo-25m": [f"s3://bucket/x.tar?X-Amz-Signature={planted}"]}),
        replace(site, runs=f"s3://key:{planted}@bucket/runs"),
        replace(site, storage=Storage(endpoint=f"http://key:{planted}@storage")),
    ]
    for leak in leaky:
        with pytest.raises(SiteError, match="has credentials in its address") as error:
            manifest(recipe, leak, target, "run")
        assert planted not in str(error.value)
    if target in ("rayjob", "raycluster"):
        with pytest.raises(SiteError, match="has a password in it"):
            manifest(recipe, kubernetes(site, redis=Redis(address=f"redis://:{planted}@redis:6379")), target, "run")


@pytest.mark.parametrize(("target", "name"), FITTING)
def test_the_site_that_travels_is_the_site(target: str, name: str, tmp_path: Path) -> None:
    """As nodes read it, it says what the one it was made of says of this recipe."""
    recipe = by_name("vila_7b")
    site = with_corpora(replace(SITES[name], weights={**SITE.weights, "unused": "/models/unused"}), recipe)
    found = manifest(recipe, site, target, "run")
    files = objects(found)["ConfigMap"]["data"] if "site.toml" not in found.files else found.files
    (tmp_path / "site.toml").write_text(files["site.toml"])
    there = load_site(str(tmp_path / "site.toml"))
    assert site.deploy
    token = str(tmp_path / "ray-token") if site.ray_token_file and target in ("aws", "onprem") else None
    kept = dict(site.weights)
    del kept["unused"], kept["example-bpe"]
    expected = replace(site, deploy=None, ray_address="auto", ray_token_file=token, gpus=site.deploy.trainers.gpus > 0)
    assert there == replace(expected, weights=kept, grows=True)


FAULTS: list[tuple[str, Site, str]] = [
    ("nowhere", SITE, "nothing is written for 'nowhere'; --for takes rayjob, raycluster, aws, onprem, slurm"),
    ("rayjob", replace(SITE, deploy=None), r"nothing of nodes; add \[deploy\]"),
    ("rayjob", deployed(SITE, image=None), "pods are made of an image, and the site names none; build one"),
    ("aws", deployed(SITE, image=None), "set deploy.image"),
    ("aws", trainers(SITE, gpus=16), "has gpus=16, and an instance p4d.24xlarge has 8; set gpus to 8 at most"),
    ("aws", trainers(SITE, instance=None), "deploy.trainers names no instance of EC2"),
    ("aws", deployed(SITE, aws=None), r"add \[deploy.aws\] with region"),
    ("rayjob", replace(SITE, workers=11), "11 workers cannot be dealt evenly over 2 nodes of 8 GPUs; take 10 or 12"),
    ("rayjob", trainers(SITE, spot=True), "does not say how this cluster marks them"),
    (
        "rayjob",
        replace(SITE, runs="/home/me/runs"),
        "runs is /home/me/runs, which is on this machine, and nodes see /models",
    ),
    ("slurm", replace(SITE, cache="/home/me/cache"), "cache is /home/me/cache, which is on this machine"),
    ("rayjob", replace(SITE, storage=Storage(key="k", secret="s")), "name it with deploy.kubernetes.storage_secret"),
    ("rayjob", replace(SITE, ray_address="auto", ray_token_file="/t"), "name it with deploy.kubernetes.token_secret"),
    ("onprem", replace(SITE, workers=2048), "2048 GPUs take 256 machines of 8, and deploy.onprem.workers names 128"),
    ("onprem", deployed(SITE, activate="source x"), "the site says both or neither"),
]


@pytest.mark.parametrize(("target", "site", "told"), FAULTS)
def test_what_a_site_lacks_is_said_with_its_mend(target: str, site: Site, told: str) -> None:
    recipe = by_name("vila_7b")
    with pytest.raises(SiteError, match=told):
        manifest(recipe, with_corpora(site, recipe), target, "run")


def test_a_model_that_the_gpus_cannot_hold_is_refused(small: Recipe) -> None:
    recipe = replace(small, stages=small.stages[:1])
    site = with_corpora(replace(SITE, workers=1), recipe)
    with pytest.raises(
        SiteError, match="of each GPU with 1 workers, and a GPU of the trainers has 1Mi; take more workers"
    ):
        manifest(recipe, trainers(site, gpu_memory="1Mi"), "rayjob", "run")
    manifest(recipe, trainers(site, gpu_memory="80Gi"), "rayjob", "run")


def test_what_the_run_would_refuse_is_refused_now() -> None:
    recipe = by_name("vila_7b")
    ring = replace(recipe, stages=tuple(replace(stage, parallel=FSDP(context=4)) for stage in recipe.stages))
    with pytest.raises(SiteError, match=r"8 to 32 workers.*9 workers are no groups of context=4"):
        manifest(ring, with_corpora(SITE, recipe), "rayjob", "run")
    manifest(ring, with_corpora(replace(SITE, workers=32), recipe), "rayjob", "run")
    with pytest.raises(SiteError, match="the recipe reads corpus 'coyo-25m'"):
        manifest(recipe, SITE, "rayjob", "run")
    with pytest.raises(SiteError, match="KubeRay takes 47 at most; give a shorter --run"):
        manifest(recipe, with_corpora(SITE, recipe), "rayjob", "a" * 48)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ('[deploy]\nenv = {MY_TOKEN = "x"}', "MY_TOKEN, which are secrets by their names"),
        ('[deploy.trainers]\nmemory = "64 GB"', "deploy.trainers.memory"),
        ("[deploy.head]\ngpus = 1", "nothing is trained on it"),
        ('[deploy]\nimages = "x"', "deploy.images"),
    ],
)
def test_a_deploy_that_does_not_hold_is_told_when_the_site_is_read(words: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(words)
    with pytest.raises(SiteError, match=told):
        load_site(str(tmp_path / "site.toml"))


def test_the_command_writes_files_and_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = 'workers = 8\nruns = "s3://b/r"\ncache = "s3://b/c"\n[deploy]\nimage = "i"\n[deploy.trainers]\ngpus = 4\n'
    corpora = "".join(f'{name} = "s3://b/{name}"\n' for name in with_corpora(SITE, by_name("vila_7b")).corpora)
    (tmp_path / "site.toml").write_text(f"{site}[corpora]\n{corpora}")
    words = ["manifest", "vila_7b", "--site", str(tmp_path / "site.toml"), "--out", str(tmp_path / "out")]
    main([*words, "--for", "rayjob", "--workers", "4", "16", "-s", "seed=7", "--run", "mine"])
    said = capsys.readouterr().out
    assert "kubectl apply -f rayjob.yaml" in said
    found = Manifest(files={"rayjob.yaml": (tmp_path / "out" / "rayjob.yaml").read_text()}, commands=())
    assert gpus_of("rayjob", found) == (4, 16, 4)
    assert json.loads(objects(found)["ConfigMap"]["data"]["recipe.json"])["seed"] == 7
    assert objects(found)["RayJob"]["spec"]["entrypoint"].endswith("--run mine")
    with pytest.raises(SystemExit) as end:
        main([*words, "--for", "k8s"])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: nothing is written for 'k8s'; --for takes rayjob")
