"""Training: begun, submitted, followed, stopped."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.commands.words import (
    AnyRun,
    Change,
    Flag,
    Name,
    RecipeName,
    RunName,
    SiteFile,
    Workers,
    plain_console,
    recipe_of,
    site_of,
)


@dataclass
class Trained:
    """What `train` and `submit` are told of a run."""

    recipe: RecipeName
    s: Change = ()
    """Change the recipe, stages by name: -s stages.pretrain.tune.lm.lr=3e-5"""
    workers: Workers = None
    """Training workers, or the fewest and the most: the run grows and shrinks with the cluster. The site's by default."""
    run: Name = None
    """The run's name; the recipe's by default."""
    site: SiteFile = None
    tiny: Flag = False
    """The same structure at toy size, two steps a stage over the example corpora: whether a recipe's parts fit together."""
    unchecked: Flag = False
    """Do not ask the cluster's nodes first what stands in the way (mllm doctor)."""


@dataclass
class Train(Trained):
    """Train a recipe here, or on the Ray cluster that the site names; go on where it stopped."""

    def __call__(self) -> None:
        from pipelines.garbage import collect_rarely

        collect_rarely()
        from cluster.run import train
        from cluster.supervisor import is_first

        recipe = recipe_of(self.recipe, self.s, self.tiny)
        unchecked = self.unchecked or not is_first()  # a cluster that was lost is being waited for
        train(recipe, site_of(self.site, self.workers), self.run, plain_console(), unchecked)


@dataclass
class Submit(Trained):
    """Train a recipe as a job of the cluster whose job server the site names; given again, the run goes on."""

    def __call__(self) -> None:
        from cluster.jobs import submit

        recipe = recipe_of(self.recipe, self.s, self.tiny)
        site = site_of(self.site, self.workers)
        submit(recipe, site, self.run or recipe.name, plain_console(), self.site, self.unchecked)


@dataclass
class Logs:
    """Print what a run's newest job has printed."""

    run: RunName
    follow: Flag = False
    """Go on until the job ends."""
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.jobs import logs

        logs(site_of(self.site), self.run, self.follow, plain_console())


@dataclass
class Stop:
    """Have a run save and stop, and wait until it has; the command that began it goes on with it."""

    run: RunName
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.jobs import stop

        stop(site_of(self.site), self.run, plain_console())


@dataclass
class Status:
    """Show where a run stands: stages, losses, dropped rows. Without a name, list the runs."""

    run: AnyRun = None
    """A run's name; all by default."""
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.run import show_status

        show_status(site_of(self.site), self.run, plain_console())
