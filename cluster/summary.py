"""A run in a few lines of a terminal: its stages, held-out losses, dropped rows, what went wrong."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.amounts import duration, quantity
from cluster.journal import Fault, RunState
from cluster.metrics import Evaluation, RunFolder
from cluster.views import StageView, Standing, borders, run_standing, stage_views
from mllm.recipe import Recipe

MARKS: dict[Standing, str] = {"done": "✓", "running": "●", "stopped": "■", "failed": "✗", "waiting": "○"}
COLOURS: dict[Standing, str] = {
    "done": "green",
    "running": "bold cyan",
    "stopped": "bold yellow",
    "failed": "bold red",
    "waiting": "dim",
}


def summary(run: RunFolder, recipe: Recipe, state: RunState, now: float | None = None) -> RenderableType:
    """A run in a few lines: its stages, held-out losses through the curriculum, and the rows that were dropped.

    A run that was killed cannot say so; of one that is not over, the time since its last step (until `now`) is told.
    """
    views = stage_views(run, recipe, state)
    latest = max((view.last.time for view in views if view.last), default=None)
    silence = None if latest is None else (time.time() if now is None else now) - latest
    parts: list[RenderableType] = [_heading(run, state, silence), Text(""), _stage_table(views)]
    evaluations = borders([replace(view, during=[] if view.after else view.during[-1:]) for view in views])
    if evaluations:  # of those during a stage only where it stands now: a terminal is not wide enough for all
        parts += [Text(""), _held_out_table(evaluations)]
    dropped = sum((view.dropped for view in views), Counter[str]())
    if dropped:
        parts += [Text(""), Text(f"{dropped.total():,} rows dropped", style="dim")]
        parts += [Text(f"{count:>8,}  {reason}") for reason, count in dropped.most_common()]
    return Group(*parts, *_gates(state), *_faults(state), Text(""))


def _gates(state: RunState) -> Iterator[RenderableType]:
    """The last judgement of each gate: what it looked at, and whether the stage behind it may begin."""
    latest = {(event.stage, event.gate.partition(", after step")[0]): event for event in state.gates}
    if latest:
        yield Text("")
    for event in latest.values():
        word = Text("open", style="green") if event.open else Text("closed", style="yellow")
        yield Text.assemble(f"entry of {event.stage}: ", word, f", {event.value:.4g} ({event.gate})")


TOLD = 8
"""Faults and decisions of a run that its summary tells, the latest."""


def _faults(state: RunState) -> Iterator[RenderableType]:
    """What went wrong and what was done about it; nothing where nothing did."""
    again = Counter(group.stage for group in state.groups)
    restarts = sum(count - 1 for count in again.values())
    if not state.faults and not restarts:
        return
    kinds = Counter(fault.what.replace("_", " ") for fault in state.faults)
    words = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
    yield Text("")
    yield Text(
        f"{restarts:,} restart{'' if restarts == 1 else 's'}" + (f"; faults: {words}" if words else ""), style="dim"
    )
    for event in sorted((*state.faults, *state.decisions), key=lambda event: event.time)[-TOLD:]:
        moment = time.strftime("%m-%d %H:%M:%S", time.localtime(event.time))
        what = event.what.replace("_", " ")
        if isinstance(event, Fault):
            step = f" after step {event.step}" if event.step >= 0 else ""
            yield Text(f"  {moment}  {event.stage}{step}: {what}: {event.detail.splitlines()[0][:160]}")
        else:
            yield Text(f"  {moment}    -> {what}: {event.why[:160]}")


def _heading(run: RunFolder, state: RunState, silence: float | None) -> Text:
    word = run_standing(state)
    style = {"finished": "bold green", "failed": "bold red", "stopped": "bold yellow"}.get(word, "bold cyan")
    more = f": {state.failure}" if word == "failed" else f" by {state.stopped}" if word == "stopped" else ""
    if word == "running" and silence is not None:
        more = f", last step {duration(silence)} ago"
    return Text.assemble((run.name, "bold"), "  ", (word, style), more)


def _stage_table(views: Iterable[StageView]) -> Table:
    table = _table("stage", "", "steps", "tokens", "loss", "time", "tokens/s")
    for view in views:
        words: list[str] = [""] * 5
        if view.last:
            steps = f"{len(view.steps):,}" + ("" if view.standing == "done" else f" of {view.total_words}")
            loss = f"{view.steps[0].loss:.3f} → {view.last.loss:.3f}"
            words = [steps, quantity(view.tokens), loss, duration(view.seconds), quantity(view.rate("tokens"))]
        mark = Text(f"{MARKS[view.standing]} {view.standing}", style=COLOURS[view.standing])
        table.add_row(view.name, mark, *words)
    return table


def _held_out_table(evaluations: list[tuple[str, Evaluation]]) -> Table:
    """Held-out loss, one row a source and one column a border: each stage's before stands left of its after.

    Headings have two lines, so that four columns and the names of sources fit 80 letters.
    """
    table = _table("held-out loss", *(label.replace(" ", "\n", 1) for label, _ in evaluations))
    losses = [{score.source: score.loss for score in evaluation.scores} for _, evaluation in evaluations]
    for source in {source: None for column in losses for source in column}:
        cells = []
        for number, column in enumerate(losses):
            old, new = losses[number - 1].get(source) if number else None, column.get(source)
            style = "" if old is None or new is None else "green" if new < old else "yellow"
            cells.append(Text("" if new is None else f"{new:.3f}", style=style))
        table.add_row(source, *cells)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 or not column else "right", no_wrap=True)
    return table
