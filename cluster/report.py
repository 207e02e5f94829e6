"""The report of a run: one page that needs nothing but a browser, neither a network nor a server.

    journal, steps, evaluations  ->  tables (curves.py), charts (charts.py)  ->  report.html.j2  ->  runs/NAME/report.html

Charts are Altair's, drawn by the scripts that vl-convert carries; the page takes its colours from the reader's light or dark
theme.
"""

from __future__ import annotations

import base64
import io
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from cluster import quarantine
from cluster.amounts import duration, flop_words, quantity
from cluster.charts import charts_of, gauges_of
from cluster.curves import (
    POINTS,
    Rows,
    crew_rows,
    fault_rows,
    held_out_rows,
    phase_rows,
    probe_rows,
    slowest_rank,
    source_rows,
    step_rows,
)
from cluster.evidence import Evidence
from cluster.journal import Decision, Fault, RunState
from cluster.metrics import Evaluation, RunFolder
from cluster.phases import PHASES
from cluster.views import StageView, borders, paired_probes, paired_scores, run_standing, stage_views
from mllm.evaluate import Answer
from mllm.recipe import Recipe, dump
from pipelines.place import Place
from pipelines.types import spec

EXAMPLES = 5
"""Rows shown for each reason of dropping."""
HAPPENED = 20
"""Faults and decisions that the page tells in words, the latest."""
THUMBNAIL = 192
"""Pixels of a sample picture's longer side on the page."""
ANSWERS = 8
"""Answers to one question on the page at most: the first, the newest, and some evenly between."""


@spec
class Picture:
    """A held-out picture, what was asked about it and is expected, and what the model wrote as it learned: (when, words), the
    newest first. `more` answers between those are not shown.
    """

    source: str
    row: str
    image: str
    prompt: str
    expected: str
    written: tuple[tuple[str, str], ...]
    more: int


@spec
class Drop:
    """Rows dropped for one reason, by stage, with examples as (row, detail)."""

    reason: str
    stages: dict[str, int]
    examples: tuple[tuple[str, str], ...]


def write_report(run: RunFolder, recipe: Recipe, state: RunState, evidence: Evidence | None = None) -> Place:
    """Write `run.report` from the run's files, whatever there is of them, and return its path."""
    run.report.write(report_page(run, recipe, state, evidence=evidence).encode())
    return run.report


def report_page(
    run: RunFolder, recipe: Recipe, state: RunState, again: int | None = None, evidence: Evidence | None = None
) -> str:
    """The report as it is now. A browser that is served it asks for it `again` after so many seconds; `evidence` finds pictures
    of dropped rows, which are not shown without.
    """
    views = stage_views(run, recipe, state)
    evaluations = borders(views)
    sources = list(dict.fromkeys(source.corpus.name for stage in recipe.stages for source in stage.mixture))
    held_out = list(dict.fromkeys(score.source for _, evaluation in evaluations for score in evaluation.scores))
    tables = {name: rows for view in views for name, rows in _stage_tables(view, sources).items()}
    tables |= {"held-out": held_out_rows(evaluations), "probe": probe_rows(evaluations)}
    tables |= {"crew": crew_rows(views, state), "faults": fault_rows(state)}
    charts = charts_of(views, sources, held_out, evaluations, tables)
    return render_page(
        "report.html.j2",
        run=run.name,
        again=again,
        recipe=recipe,
        recipe_json=dump(recipe),
        state=state,
        standing=run_standing(state),
        views=views,
        utilised=any(view.mfu() is not None for view in views),
        total=_totals(views, state),
        written=time.time(),
        sources=sources,
        sources_of={view.name: list(dict.fromkeys(tables[f"{view.name}/sources"]["source"])) for view in views},
        held_out=held_out,
        grouped={view.name: -(-len(view.steps) // POINTS) for view in views},
        gauges={view.name: [(gauge, gauge.value(view)) for gauge in gauges_of(view)] for view in views},
        scores={view.name: paired_scores(view.before, view.after) for view in views},
        probes={view.name: paired_probes(view.before, view.after) for view in views},
        drops=_drops(views),
        shown=_shown(run, evidence),
        slowest={view.name: slowest_rank(view.steps) for view in views},
        happened=_happened(state),
        phases=PHASES,
        pictures=_pictures(evaluations),
        shots=list(dict.fromkeys(tables["probe"]["shots"])),
        tables=tables,
        charts=charts,
        scripts=chart_scripts() if charts else "",
    )


def render_page(template: str, **values: Any) -> str:
    """A template of this package as text; everything put into it is escaped."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "quantity": quantity,
        "duration": duration,
        "moment": _moment,
        "second": _second,
        "flop_words": flop_words,
    }
    return environment


@cache
def chart_scripts() -> str:
    """Vega, Vega-Lite and Vega-Embed in one piece, as text that a script element can hold."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed").replace("</script", "<\\/script")


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M %Z")


def _second(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _totals(views: Sequence[StageView], state: RunState) -> dict[str, float | None]:
    """The run in numbers. Wall time goes from its first start to the last moment that its files tell of."""
    steps = [step for view in views for step in view.steps]
    events = (*state.starts, *state.started_stages, *state.finished_stages)
    moments = [event.time for event in events] + [step.time for step in steps]
    return {
        "tokens": sum(step.tokens for step in steps),
        "images": sum(step.images for step in steps),
        "rows": sum(step.rows for step in steps),
        "dropped": sum(view.dropped.total() for view in views),
        "steps": len(steps),
        "seconds": sum(step.seconds for step in steps),
        "started": state.starts[0].time if state.starts else None,
        "wall": max(moments) - state.starts[0].time if state.starts else None,
    }


def _stage_tables(view: StageView, sources: Sequence[str]) -> dict[str, Rows]:
    taken = [step for step in view.steps if step.taken]  # the others' losses are no numbers
    return {
        view.name: step_rows(taken),
        f"{view.name}/sources": source_rows(taken, sources),
        f"{view.name}/phases": phase_rows(taken),
    }


# -- rows and pictures -------------------------------------------------------------------------------------------------


def _drops(views: Sequence[StageView]) -> list[Drop]:
    """Reasons, the commonest first."""
    total = sum((view.dropped for view in views), Counter[str]())
    labels = list(dict.fromkeys(label for view in views for step in view.steps for label in step.dropped))
    return [
        Drop(
            reason=reason,
            stages={view.name: view.dropped[reason] for view in views},
            examples=tuple(_examples(labels, reason))[:EXAMPLES],
        )
        for reason, _ in total.most_common()
    ]


def _shown(run: RunFolder, evidence: Evidence | None) -> dict[str, tuple[str, ...]]:
    """Pictures of the first rows of each reason, by the row's label."""
    if evidence is None or not (run.root / "quarantine").names():
        return {}
    seen: Counter[str] = Counter()
    chosen = []
    for row in quarantine.rows(run):
        reason = str(row.rejected.reason)
        seen[reason] += 1
        if seen[reason] <= EXAMPLES:
            chosen.append(row)
    return evidence.of(chosen)


@spec
class Happening:
    """A fault, or what was done about one, in a line of the page."""

    time: float
    stage: str
    step: int | None
    what: str
    words: str
    fault: bool


def _happened(state: RunState) -> list[Happening]:
    """The last faults and decisions, the latest first."""
    events = sorted((*state.faults, *state.decisions), key=lambda event: event.time, reverse=True)[:HAPPENED]
    return [_happening(event) for event in events]


def _happening(event: Fault | Decision) -> Happening:
    fault = isinstance(event, Fault)
    return Happening(
        time=event.time,
        stage=event.stage,
        step=event.step if isinstance(event, Fault) and event.step >= 0 else None,
        what=event.what.replace("_", " "),
        words=(event.detail if isinstance(event, Fault) else event.why)[:400],
        fault=fault,
    )


def _examples(labels: Sequence[str], reason: str) -> Iterator[tuple[str, str]]:
    """Rows dropped for `reason`, taken apart as `Rejected.label` put them together."""
    for label in labels:
        row, found, detail = label.partition(f": {reason}")
        if found:
            yield row, detail.strip().removeprefix("(").removesuffix(")")


def _pictures(evaluations: Sequence[tuple[str, Evaluation]]) -> list[Picture]:
    """Each held-out question once, with what was written in answer to it before, during and after training."""
    asked: dict[tuple[str, str], list[tuple[str, Answer]]] = defaultdict(list)
    for when, evaluation in evaluations:
        for answer in evaluation.answers:
            asked[answer.source, answer.row].append((when, answer))
    return [_picture(answers) for answers in asked.values()]


def _picture(answers: Sequence[tuple[str, Answer]]) -> Picture:
    """One question, by all its answers in the order in which they were written."""
    last = answers[-1][1]
    image = next((answer.image for _, answer in answers if answer.image), "")
    shown = [answers[place] for place in spread(len(answers), ANSWERS)]
    return Picture(
        source=last.source,
        row=last.row,
        image=_thumbnail(image) if image else "",
        prompt=last.prompt,
        expected=last.expected,
        written=tuple((when, answer.written) for when, answer in reversed(shown)),
        more=len(answers) - len(shown),
    )


def spread(count: int, most: int) -> list[int]:
    """Places of `most` out of `count` things, all where there are no more: the first, the last, and some evenly between."""
    return list(range(count)) if count <= most else [place * (count - 1) // (most - 1) for place in range(most)]


def _thumbnail(png: str) -> str:
    """A smaller copy as a data URI: what the model saw may be far larger than the page needs."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
