"""The files of one target, and what to do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from cluster.manifests.kuberay import command, name_of, raycluster, rayjob
from cluster.manifests.launcher import Launched, aws, onprem
from cluster.manifests.needs import deploy_of
from cluster.manifests.slurm import slurm
from cluster.manifests.tree import to_yaml, tree
from cluster.site import Site, SiteError
from mllm.recipe import Recipe
from pipelines.types import spec

Target = Literal["rayjob", "raycluster", "aws", "onprem", "slurm"]
TARGETS: tuple[Target, ...] = get_args(Target)


@spec
class Manifest:
    """Files by name, and the commands that begin the run with them, given in their folder."""

    files: dict[str, str]
    commands: tuple[str, ...]


def manifest(recipe: Recipe, site: Site, target: str, run: str) -> Manifest:
    """What `target` is asked for to train `recipe` as run `run`. Raises SiteError for what a site must say and does not."""
    if target not in TARGETS:
        raise SiteError(f"nothing is written for {target!r}; --for takes {', '.join(TARGETS)}")
    if target == "rayjob":
        return _kubernetes(rayjob(recipe, site, run), recipe, site, run, "rayjob.yaml")
    if target == "raycluster":
        return _kubernetes(raycluster(recipe, site, run), recipe, site, run, "raycluster.yaml")
    if target == "slurm":
        script, files = slurm(recipe, site, run)
        return Manifest(
            files={"job.sbatch": script, "recipe.json": files.recipe, "site.toml": files.site},
            commands=("sbatch job.sbatch",),
        )
    return _launcher((aws if target == "aws" else onprem)(recipe, site, run), recipe, run)


def write(found: Manifest, folder: Path) -> list[Path]:
    """Write the files into `folder`, which is made. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in found.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in found.files]


def _heading(recipe: Recipe, run: str, commands: tuple[str, ...]) -> str:
    lines = "\n".join(f"    {one}" for one in commands)
    return f"Run {run!r} of recipe {recipe.name!r}, written by `mllm manifest`. No secret stands in it.\n\n{lines}\n"


def _kubernetes(objects: tuple[object, ...], recipe: Recipe, site: Site, run: str, file: str) -> Manifest:
    name, space = name_of(run), deploy_of(site).kubernetes.namespace
    commands = (f"kubectl apply -f {file}",)
    if file == "rayjob.yaml":
        commands += (f"kubectl -n {space} get rayjob {name}", f"kubectl -n {space} delete rayjob {name}")
    else:
        pods = f"kubectl -n {space} get pods -l ray.io/cluster={name},ray.io/node-type=head -o name"
        commands += (f"kubectl -n {space} exec -it $({pods}) -c ray-head -- {command(run)}",)
    return Manifest(
        files={file: to_yaml([tree(one, "camel") for one in objects], _heading(recipe, run, commands))},
        commands=commands,
    )


def _launcher(found: Launched, recipe: Recipe, run: str) -> Manifest:
    start = next(path for path, local in found.launcher.file_mounts.items() if local == "start.sh")
    commands = ("ray up -y cluster.yaml", f"ray exec cluster.yaml 'bash {start}'", "ray dashboard cluster.yaml")
    text = to_yaml([tree(found.launcher, "snake")], _heading(recipe, run, commands))
    files = {"cluster.yaml": text, "recipe.json": found.recipe, "site.toml": found.site, "start.sh": found.start}
    return Manifest(files=files, commands=commands)
