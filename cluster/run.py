"""What the commands about runs do: train with a view, show, find what was trained."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from rich.console import Console

from cluster.controller import Controller, RunError
from cluster.indexing import corpora_of, index_missing
from cluster.journal import Journal, RunState, StageFinished
from cluster.leaving import Stopped, asked_to_stop
from cluster.local import quieten, ray_running
from cluster.metrics import RunFolder
from cluster.site import Site
from mllm.model import Model
from mllm.recipe import Recipe, load
from pipelines.garbage import collect_usually
from pipelines.place import Place


def train(recipe: Recipe, site: Site, name: str | None, console: Console, unchecked: bool = False) -> RunFolder:
    """Train `recipe` to its end, from wherever its run stands, and write report and export.

    Everything that can be wrong before a worker starts is said before one does; the nodes of a cluster are asked too, unless the
    run is to begin `unchecked`.
    """
    from cluster.doctor import demand
    from cluster.live import Live
    from cluster.summary import summary
    from cluster.telemetry import Telemetry, sinks_of

    folder = RunFolder(f"{site.runs}/{name or recipe.name}")
    quieten(folder.logs)
    if site.ray_address and not unchecked:
        demand(recipe, site, console, folder.logs)
    live = Live(folder, recipe, console)
    controller = Controller(recipe, site, name, live)
    sinks = sinks_of(site.sinks, folder, recipe)
    index_missing(site, corpora_of(recipe), console, folder.logs)
    state = controller.prepare()
    if state.finished and all(state.finished_stage(mark) for mark in controller.fingerprints.values()):
        console.print(f"run {folder.name} is finished; nothing to do")
        console.print(summary(folder, recipe, state))
        _paths(folder, console)
        return folder
    hurry = False
    with controller.leased():
        try:
            with (
                ray_running(site.ray_address, site.cpus(recipe), folder.logs, site.ray_token_file),
                asked_to_stop(),
                live,
                Telemetry(folder, recipe, sinks, live.say),
            ):
                importlib.import_module("cluster.group")  # which takes long: while Ray's processes start
                collect_usually()
                controller.run()
            console.print("writing export and report")
            _export(site, recipe, folder, console)
            controller.finish()
        except (KeyboardInterrupt, Stopped) as error:
            console.print("stopped; the same command goes on from the last checkpoint")
            hurry = isinstance(error, Stopped)  # a machine that is taken away does not wait for a report
            raise
        finally:
            if not hurry:
                _report(controller, console)
    console.print(summary(folder, recipe, controller.journal.state()))
    _paths(folder, console)
    return folder


def _export(site: Site, recipe: Recipe, folder: RunFolder, console: Console) -> None:
    """Write the export; where it does not compute what was trained, that is told, and the trained weights are there still."""
    from cluster.exporting import export_of
    from mllm.released import NotReleased

    try:
        console.print(export_of(site, recipe, folder, folder.export).words, soft_wrap=True)
    except NotReleased as error:
        console.print(f"not released: {error}", soft_wrap=True)


def _report(controller: Controller, console: Console) -> None:
    """Write the report, whatever became of the run; a fault of the report must not hide the run's own."""
    from cluster.evidence import Evidence
    from cluster.report import write_report

    if controller.lease and controller.lease.lost.is_set():
        return  # the run is another controller's, and so is its report
    try:
        evidence = Evidence(controller.site, controller.recipe)
        write_report(controller.folder, controller.recipe, controller.journal.state(), evidence)
    except Exception as error:
        console.print(f"the report could not be written ({type(error).__name__}: {error}); try: mllm report")


def _paths(folder: RunFolder, console: Console) -> None:
    for what, path in (("report", folder.report), ("export", folder.export), ("logs", folder.logs)):
        console.print(f"{what:<8} {_near(path)}", soft_wrap=True)


def _near(path: Path | Place) -> str:
    """The path as one would type it from here."""
    if isinstance(path, Place) and not path.local:
        return str(path)
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("../..") else relative


def open_run(site: Site, name: str) -> tuple[RunFolder, Recipe, RunState]:
    """A run by name or folder. Raises RunError naming the runs there are."""
    folder = RunFolder(name if (Place(name) / "recipe.json").is_file() else f"{site.runs}/{name}")
    if not folder.recipe.is_file():
        there = ", ".join(runs(site)) or "none"
        raise RunError(f"no run {name!r} in {site.runs}; there are: {there}")
    return folder, load(folder.recipe.read_bytes()), Journal(folder.root).state()


def runs(site: Site) -> list[str]:
    """Names of the site's runs."""
    there = Place(site.runs)
    return [name for name in there.names() if (there / name / "recipe.json").is_file()]


def show_status(site: Site, name: str | None, console: Console) -> None:
    """Print one run's summary, or one line for each run."""
    from cluster.summary import summary
    from cluster.views import run_standing

    if name is None:
        for run in runs(site):
            state = open_run(site, run)[2]
            word = run_standing(state)
            words = (
                f"failed: {state.failure}" if word == "failed" else f"{word} in {state.stage}" if state.stage else word
            )
            console.print(f"{run:<24} {words}", soft_wrap=True)
        return
    folder, recipe, state = open_run(site, name)
    console.print(summary(folder, recipe, state))
    if site.jobs:
        from cluster.jobs import JobError, standing

        try:
            console.print(standing(site, folder.root), soft_wrap=True)
        except JobError as error:  # the journal has told all the same
            console.print(f"note: {error}", soft_wrap=True)


def profile_run(site: Site, name: str, rank: int, steps: int, seconds: float, console: Console) -> None:
    """Have a rank of a run that goes trace its next `steps` steps, and print where the trace and its stacks lie.

    Raises RunError where nobody trains the run, ValueError for no step, NoProfile where none comes.
    """
    from cluster.lease import holder_of
    from cluster.profiling import ask, wait

    if rank < 0 or steps < 1:
        raise ValueError(f"--rank {rank} --steps {steps}: ranks count from 0, and at least one step is traced")
    folder, _, state = open_run(site, name)
    holder = holder_of(folder.root)
    if holder is None or holder.gone() or not state.starts or state.finished or state.stopped or state.failure:
        raise RunError(f"run {name!r} is not being trained, so there is nothing to look into; mllm status {name}")
    answer = wait(folder, ask(folder, rank, steps), rank, seconds)
    console.print(
        f"trace    {_near(answer.trace)} (open it at ui.perfetto.dev, or in chrome://tracing)", soft_wrap=True
    )
    console.print(f"stacks   {_near(answer.stacks)}", soft_wrap=True)


def trained_model(recipe: Recipe, folder: RunFolder) -> Model:
    """The model with the weights of the run's last finished stage, on CPU, float32.

    Raises RunError when no stage is finished.
    """
    from cluster import loading

    last = last_finished(folder)
    stage = recipe.stage(last.stage)
    return loading.read_model(recipe, stage, folder.root / last.checkpoint).eval()


def last_finished(folder: RunFolder) -> StageFinished:
    """The stage that a run finished last. Raises RunError where it has finished none."""
    last = Journal(folder.root).state().finished_stages
    if not last:
        raise RunError(f"run {folder.name!r} has finished no stage yet; train it further first")
    return last[-1]
