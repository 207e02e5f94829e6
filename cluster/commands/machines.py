"""Machines: what there is on them, and what to ask of those that give them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from cluster.commands.words import (
    AnyRecipe,
    Change,
    FilePath,
    Flag,
    Name,
    RecipeName,
    SiteFile,
    Workers,
    plain_console,
    recipe_of,
    site_of,
)


@dataclass
class Manifest:
    """Write what Kubernetes, AWS, machines by ssh or Slurm are asked for to run a recipe: [deploy] of the site says of nodes."""

    recipe: RecipeName
    target: Annotated[str, arg(name="for", metavar="TARGET")]
    """rayjob, raycluster (KubeRay), aws, onprem (Ray's cluster launcher) or slurm."""
    s: Change = ()
    """Change the recipe, stages by name: -s stages.pretrain.tune.lm.lr=3e-5"""
    workers: Workers = None
    """Training workers, or the fewest and the most. The site's by default."""
    run: Name = None
    """The run's name; the recipe's by default."""
    out: FilePath = None
    """The folder that the files go to; manifests/RUN-TARGET by default."""
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.manifests.write import manifest, write

        recipe = recipe_of(self.recipe, self.s)
        run = self.run or recipe.name
        found = manifest(recipe, site_of(self.site, self.workers), self.target, run)
        out = self.out or Path("manifests") / f"{run}-{self.target}"
        for path in write(found, out):
            print(path)
        print(f"\nthen, in {out}:\n")
        for command in found.commands:
            print(f"    {command}")


@dataclass
class Doctor:
    """Tell what this machine, or the site's cluster, has and lacks, for a recipe if one is named, and what to do about it."""

    recipe: AnyRecipe = None
    """A recipe's name, or a recipe.json."""
    s: Change = ()
    """Change the recipe, stages by name: -s stages.pretrain.tune.lm.lr=3e-5"""
    workers: Workers = None
    """Training workers, or the fewest and the most. The site's by default."""
    json: Flag = False
    """Print the findings as JSON, in a line."""
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.doctor import doctor

        recipe = None if self.recipe is None else recipe_of(self.recipe, self.s)
        sys.exit(doctor(recipe, site_of(self.site, self.workers), plain_console(), self.json))
