"""Runs beside each other: their curves on one page, and in what their recipes differ.

    mllm compare RUN RUN [RUN ...]

Stages are compared by name. Of the recipes every value is shown that is not the same in all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table as Lines
from rich.text import Text

from cluster.amounts import duration, quantity
from cluster.curves import smoothed
from cluster.figures import Curves, Line, Section, StatsPage, Table
from cluster.journal import RunState
from cluster.metrics import Evaluation
from cluster.run import open_run
from cluster.site import Site
from cluster.views import StageView, run_standing, stage_views
from mllm.recipe import Recipe, dump
from pipelines.types import spec

POINTS = 400
"""Of a curve, each the mean of its steps."""

NONE = "–"


@spec
class Compared:
    """One of the runs."""

    name: str
    recipe: Recipe
    state: RunState
    stages: tuple[StageView, ...]


def compare(site: Site, names: Sequence[str]) -> StatsPage:
    """The page. Raises RunError for a run that is not there, ValueError where there are not two different ones."""
    if len(set(names)) < 2:
        raise ValueError(f"compare {' '.join(names)}: give the names of two runs or more")
    runs = [_opened(site, name) for name in dict.fromkeys(names)]
    stages = list(dict.fromkeys(view.name for run in runs for view in run.stages))
    return StatsPage(
        title=" and ".join(run.name for run in runs),
        facts=tuple(f"{run.name}: {run_standing(run.state)}, recipe {run.recipe.name}" for run in runs),
        numbers=(),
        sections=(*(_stage(runs, stage) for stage in stages), _recipes(runs)),
    )


def show(page: StatsPage, console: Console) -> None:
    """The page's tables in the terminal."""
    for section in page.sections:
        for table in section.tables:
            lines = Lines(box=None, pad_edge=False, title=section.title, title_justify="left", title_style="bold")
            for number, cell in enumerate(table.head):
                lines.add_column(cell, justify="left" if number < table.left else "right", overflow="fold")
            for row in table.rows:
                lines.add_row(*(Text(cell) for cell in row))
            console.print(lines)
        for fact in section.facts:
            console.print(f"{section.title}: {fact}", markup=False)


def _opened(site: Site, name: str) -> Compared:
    folder, recipe, state = open_run(site, name)
    return Compared(name=folder.name, recipe=recipe, state=state, stages=tuple(stage_views(folder, recipe, state)))


def _stage(runs: Sequence[Compared], stage: str) -> Section:
    views = [(run.name, next((view for view in run.stages if view.name == stage), None)) for run in runs]
    trained = [(name, view) for name, view in views if view is not None and view.steps]
    rows = [
        (
            name,
            f"{len(view.steps):,} of {view.total_words}",
            quantity(view.tokens),
            f"{view.steps[0].loss:.4f}",
            f"{view.steps[-1].loss:.4f}",
            duration(view.seconds),
            quantity(view.rate("tokens")),
            NONE if (mfu := view.mfu()) is None else f"{100 * mfu:.1f} %",
        )
        for name, view in trained
    ]
    head = ("run", "steps", "tokens", "loss, first", "last", "time in steps", "tokens/s", "MFU")
    held_out = _held_out([(name, view.after) for name, view in trained])
    figures = (
        Curves(title="training loss", unit="nats a token, smoothed", across="step", lines=_lines(trained, "loss")),
        Curves(title="throughput", unit="tokens a second", across="step", lines=_lines(trained, "rate")),
    )
    return Section(
        title=stage,
        facts=() if trained else ("none of them has trained it yet",),
        tables=(Table(head=head, rows=tuple(rows)), *held_out) if rows else (),
        figures=figures if trained else (),
    )


def _held_out(runs: Sequence[tuple[str, Evaluation | None]]) -> tuple[Table, ...]:
    """Held-out loss after the stage, a row for each source."""
    scores = [{score.source: score.loss for score in told.scores} if told else {} for _, told in runs]
    sources = list(dict.fromkeys(source for of_run in scores for source in of_run))
    if not sources:
        return ()
    rows = ((source, *(f"{of[source]:.4f}" if source in of else NONE for of in scores)) for source in sources)
    return (Table(head=("held-out loss after it", *(name for name, _ in runs)), rows=tuple(rows)),)


def _lines(runs: Sequence[tuple[str, StageView]], what: str) -> tuple[Line, ...]:
    found = []
    for name, view in runs:
        steps = [step for step in view.steps if step.taken]
        raw = [step.loss if what == "loss" else step.tokens / step.seconds if step.seconds else 0.0 for step in steps]
        values = smoothed(raw, len(raw) / 20)
        every = max(1, -(-len(steps) // POINTS))
        points = [(step.step, float(f"{value:.5g}")) for step, value in zip(steps, values, strict=True)]
        found.append(Line(name=name, points=tuple(points[every - 1 :: every])))
    return tuple(found)


def _recipes(runs: Sequence[Compared]) -> Section:
    rows = differences([run.recipe for run in runs])
    table = Table(head=("value", *(run.name for run in runs)), rows=tuple(rows), left=len(runs) + 1)
    return Section(title="recipes", facts=() if rows else ("they are the same",), tables=(table,) if rows else ())


def differences(recipes: Sequence[Recipe]) -> list[tuple[str, ...]]:
    """Every value that is not the same in all recipes: its name as `-s` takes it, and what it is in each."""
    flat = [dict(_values(json.loads(dump(recipe)), "")) for recipe in recipes]
    names = list(dict.fromkeys(name for values in flat for name in values if name != "name"))
    rows = [(name, *(values.get(name, NONE) for values in flat)) for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def _values(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Leaves of a recipe's JSON by their names; those of a list by their own `name` where they have one."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _values(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(inner, dict) for inner in value):
        for number, inner in enumerate(value):
            key = inner.get("name", number) if isinstance(inner, dict) else number
            yield from _values(inner, f"{name}.{key}")
    else:
        yield name, json.dumps(value, ensure_ascii=False)
