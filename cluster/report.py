"""The report of a run: one page that needs nothing but a browser, neither a network nor a server.

    journal, steps, evaluations  ->  figures and charts (here)  ->  report.html.j2  ->  runs/NAME/report.html

Charts are Altair's, drawn by the scripts that vl-convert carries; the page takes its colours from the reader's light or dark
theme. However long the run, each curve has at most `POINTS` points, each the mean of its steps.
"""

from __future__ import annotations

import base64
import io
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from cluster.journal import RunState
from cluster.live import (
    StageView,
    borders,
    duration,
    flop_words,
    paired_probes,
    paired_scores,
    quantity,
    run_standing,
    stage_views,
)
from cluster.metrics import Evaluation, RunFolder, StepRecord, utilisation
from mllm.recipe import Recipe, dump
from pipelines.place import Place
from pipelines.types import spec

POINTS = 300
EXAMPLES = 5
"""Rows shown for each reason of dropping."""
THUMBNAIL = 192
"""Pixels of a sample picture's longer side on the page."""

Rows = dict[str, list[Any]]
"""A table by columns: a third of the size of one by rows."""


@spec
class Picture:
    """A held-out picture and what the model wrote about it at each border of the curriculum, the latest first."""

    source: str
    row: str
    image: str
    prompt: str
    expected: str
    written: tuple[tuple[str, str], ...]


@spec
class Drop:
    """Rows dropped for one reason, by stage, with examples as (row, detail)."""

    reason: str
    stages: dict[str, int]
    examples: tuple[tuple[str, str], ...]


def write_report(run: RunFolder, recipe: Recipe, state: RunState) -> Place:
    """Write `run.report` from the run's files, whatever there is of them, and return its path."""
    run.report.write(report_page(run, recipe, state).encode())
    return run.report


def report_page(run: RunFolder, recipe: Recipe, state: RunState, again: int | None = None) -> str:
    """The report as it is now. A browser that is served it asks for it `again` after so many seconds."""
    views = stage_views(run, recipe, state)
    evaluations = borders(views)
    sources = list(dict.fromkeys(source.corpus.name for stage in recipe.stages for source in stage.mixture))
    held_out = list(dict.fromkeys(score.source for _, evaluation in evaluations for score in evaluation.scores))
    charts = _charts(views, sources, held_out, evaluations)
    tables = {name: rows for view in views for name, rows in _stage_tables(view, sources).items()}
    tables |= {"held-out": _held_out_rows(evaluations), "probe": _probe_rows(evaluations)}
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
    environment.filters |= {"quantity": quantity, "duration": duration, "moment": _moment, "flop_words": flop_words}
    return environment


@cache
def chart_scripts() -> str:
    """Vega, Vega-Lite and Vega-Embed in one piece, as text that a script element can hold."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed").replace("</script", "<\\/script")


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M %Z")


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


# -- what the charts show ----------------------------------------------------------------------------------------------


def _stage_tables(view: StageView, sources: Sequence[str]) -> dict[str, Rows]:
    taken = [step for step in view.steps if step.taken]  # the others' losses are no numbers
    return {view.name: _step_rows(taken), f"{view.name}/sources": _source_rows(taken, sources)}


def _step_rows(steps: Sequence[StepRecord]) -> Rows:
    """The curves of a stage. `smooth` is the loss's moving average over a twentieth of the stage."""
    smooth = dict(zip((s.step for s in steps), smoothed([s.loss for s in steps], len(steps) / 20), strict=True))
    rows: Rows = defaultdict(list)
    for group in _groups(steps):
        last = group[-1]
        seconds = sum(step.seconds for step in group) or 1.0
        learned = sum(step.learned for step in group) or 1
        values = {
            "step": last.step,
            "loss": sum(step.loss * step.learned for step in group) / learned,
            "smooth": smooth[last.step],
            "tokens": sum(step.tokens for step in group) / seconds,
            "images": sum(step.images for step in group) / seconds,
            "wait": sum(step.data_wait for step in group) / seconds,
            "learned": learned / (sum(step.tokens for step in group) or 1),
            "fill": sum(step.fill for step in group) / len(group),
            "imbalance": sum(step.imbalance for step in group) / len(group),
            "lr": last.lr,
            "grad_norm": sum(step.grad_norm for step in group) / len(group),
            "flops": sum(step.flops for step in group) / seconds,
            "mfu": utilisation(group) or 0.0,
        }
        for name, value in values.items():
            rows[name].append(_short(value))
    return dict(rows)


def _source_rows(steps: Sequence[StepRecord], sources: Sequence[str]) -> Rows:
    """Smoothed training loss by source."""
    rows: Rows = {"step": [], "source": [], "loss": []}
    for source in sources:
        points = []
        for group in _groups(steps):
            found = [loss for step in group for loss in step.sources if loss.source == source]
            tokens = sum(loss.tokens for loss in found)
            if tokens:
                points.append((group[-1].step, sum(loss.loss * loss.tokens for loss in found) / tokens))
        for (step, _), loss in zip(points, smoothed([loss for _, loss in points], len(points) / 20), strict=True):
            rows["step"].append(step)
            rows["source"].append(source)
            rows["loss"].append(_short(loss))
    return rows


def _groups(steps: Sequence[StepRecord]) -> list[Sequence[StepRecord]]:
    size = max(1, -(-len(steps) // POINTS))
    return [steps[i : i + size] for i in range(0, len(steps), size)]


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """Exponential moving average over about `span` values, at least 7, its start corrected as Adam corrects its moments."""
    keep = 1 - 2 / (max(span, 7.0) + 1)
    out: list[float] = []
    mean = weight = 0.0
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.5g}")


def _held_out_rows(evaluations: Sequence[tuple[str, Evaluation]]) -> Rows:
    found = [(border, score) for border, evaluation in evaluations for score in evaluation.scores if score.tokens]
    return {
        "border": [border for border, _ in found],
        "source": [score.source for _, score in found],
        "loss": [_short(score.loss) for _, score in found],
        "accuracy": [_short(score.accuracy) for _, score in found],
    }


def _probe_rows(evaluations: Sequence[tuple[str, Evaluation]]) -> Rows:
    found = [(border, score) for border, evaluation in evaluations for score in evaluation.probe if score.questions]
    return {
        "border": [border for border, _ in found],
        "shots": [f"{score.shots}-shot" for _, score in found],
        "accuracy": [_short(score.accuracy) for _, score in found],
    }


def _chance(evaluations: Sequence[tuple[str, Evaluation]]) -> float | None:
    return next((1 / score.choices for _, evaluation in evaluations for score in evaluation.probe), None)


# -- the charts --------------------------------------------------------------------------------------------------------


@spec
class Gauge:
    """A small chart of a stage: a column of its table, and its mean over the stage (or where it ended) in words."""

    column: str
    title: str
    form: str
    words: Callable[[float], str]
    mean: bool = True

    def value(self, view: StageView) -> str:
        if not view.steps:
            return ""
        match self.column:
            case "tokens" | "images" | "flops":
                value = view.rate(self.column)
            case "wait":
                value = view.wait()
            case "mfu":
                value = view.mfu() or 0.0
            case "learned":
                value = sum(step.learned for step in view.steps) / max(1, view.tokens)
            case column:
                values = [getattr(step, column) for step in (view.steps if self.mean else view.steps[-1:])]
                value = sum(values) / len(values)
        return f"{'mean' if self.mean else 'last'} {self.words(value)}"


GAUGES = (
    Gauge(column="tokens", title="tokens a second", form=".3~s", words=quantity),
    Gauge(column="images", title="images a second", form=".3~s", words=quantity),
    Gauge(column="flops", title="model FLOP/s", form=".3~s", words=lambda value: f"{flop_words(value)}/s"),
    Gauge(column="mfu", title="model FLOPs utilisation", form=".1~%", words="{:.1%}".format),
    Gauge(column="wait", title="time waiting for data", form=".1~%", words="{:.1%}".format),
    Gauge(column="fill", title="pack fill", form=".1~%", words="{:.1%}".format),
    Gauge(column="learned", title="tokens with loss", form=".1~%", words="{:.1%}".format),
    Gauge(column="imbalance", title="worst rank by mean", form=".2f", words="{:.3f}".format),
    Gauge(column="lr", title="learning rate", form=".1~e", words="{:.2e}".format, mean=False),
    Gauge(column="grad_norm", title="gradient norm", form=".2~g", words="{:.3g}".format, mean=False),
)


def gauges_of(view: StageView) -> list[Gauge]:
    """The gauges that a stage's steps can fill: FLOPs are not known of every run."""
    return [gauge for gauge in GAUGES if gauge.column not in ("flops", "mfu") or view.mfu() is not None]


def _charts(
    views: Sequence[StageView], sources: list[str], held_out: list[str], evaluations: list[tuple[str, Evaluation]]
) -> dict[str, Any]:
    """Vega-Lite specifications by the id of the element they are drawn in. Their data stands in `tables`, by name."""
    charts: dict[str, alt.LayerChart] = {}
    for view in views:
        if view.steps:
            charts[f"{view.name}-loss"] = _loss_chart(view.name)
            charts[f"{view.name}-sources"] = _source_chart(view.name, sources)
            for gauge in gauges_of(view):
                charts[f"{view.name}-{gauge.column}"] = _gauge_chart(view.name, gauge)
    order = [border for border, _ in evaluations]
    if len(order) > 1 and held_out:
        charts["curriculum-loss"] = _held_out_chart(order, held_out)
    chance = _chance(evaluations)
    if len(order) > 1 and chance is not None:
        charts["curriculum-probe"] = _probe_chart(order, chance)
    return {name: chart.to_dict(validate=False) for name, chart in charts.items()}


def _loss_chart(stage: str) -> alt.LayerChart:
    base = alt.Chart().encode(x=_step_axis())
    faint = base.mark_line(strokeWidth=1, opacity=0.45).encode(y=_loss_axis("loss"))
    strong = base.mark_line(strokeWidth=2.25).encode(y="smooth:Q")
    tips = [_tip("step", ",d"), _tip("loss", ".4f"), _tip("smooth", ".4f", "smoothed")]
    return _layered(stage, [faint, strong, _hover(base, tips)], 250, f"Training loss of {stage}")


def _source_chart(stage: str, sources: list[str]) -> alt.LayerChart:
    base = alt.Chart().encode(x=_step_axis(), color=_colour("source", sources))
    tips = [_tip("source"), _tip("step", ",d"), _tip("loss", ".4f", "loss, smoothed")]
    lines = base.mark_line(strokeWidth=2).encode(y=_loss_axis("loss"))
    points = base.mark_circle(size=140, opacity=0).encode(y="loss:Q", tooltip=tips)
    return _layered(f"{stage}/sources", [lines, points], 250, f"Training loss of {stage} by source")


def _gauge_chart(stage: str, gauge: Gauge) -> alt.LayerChart:
    base = alt.Chart().encode(x=_step_axis(ticks=3))
    axis = alt.Axis(title=None, format=gauge.form, tickCount=3)
    line = base.mark_line(strokeWidth=1.5).encode(y=alt.Y(f"{gauge.column}:Q", axis=axis, scale=alt.Scale(zero=False)))
    tips = [_tip("step", ",d"), _tip(gauge.column, gauge.form, gauge.title)]
    return _layered(stage, [line, _hover(base, tips)], 92, f"{gauge.title}, {stage}")


def _held_out_chart(order: list[str], held_out: list[str]) -> alt.LayerChart:
    base = alt.Chart().encode(x=_border_axis(order), color=_colour("source", held_out))
    line = base.mark_line(strokeWidth=2).encode(y=_loss_axis("loss"))
    tips = [_tip("source"), _tip("border", None, "when"), _tip("loss", ".4f"), _tip("accuracy", ".1%")]
    points = base.mark_circle(size=60, opacity=1).encode(y="loss:Q", tooltip=tips)
    return _layered("held-out", [line, points], 220, "Held-out loss through the curriculum")


def _probe_chart(order: list[str], chance: float) -> alt.LayerChart:
    base = alt.Chart().encode(x=_border_axis(order), color=_colour("shots", None))
    axis = alt.Axis(title="answered right", format=".0%", tickCount=5)
    line = base.mark_line(strokeWidth=2).encode(y=alt.Y("accuracy:Q", axis=axis, scale=alt.Scale(domain=[0, 1])))
    tips = [_tip("shots"), _tip("border", None, "when"), _tip("accuracy", ".1%")]
    points = base.mark_circle(size=60, opacity=1).encode(y="accuracy:Q", tooltip=tips)
    rule = alt.Chart().mark_rule(strokeDash=[4, 4]).encode(y=alt.datum(chance))
    return _layered("probe", [rule, line, points], 220, "Few-shot probe through the curriculum")


def _step_axis(ticks: int = 6) -> alt.X:
    axis = alt.Axis(title=None, format="~s", tickCount=ticks, tickMinStep=1, grid=False)
    return alt.X("step:Q", axis=axis, scale=alt.Scale(zero=False, nice=False))


def _border_axis(order: list[str]) -> alt.X:
    return alt.X(
        "border:N", sort=order, scale=alt.Scale(domain=order, padding=0.15), axis=alt.Axis(title=None, labelAngle=0)
    )


def _loss_axis(column: str) -> alt.Y:
    axis = alt.Axis(title="nats a token", tickCount=5)
    return alt.Y(f"{column}:Q", axis=axis, scale=alt.Scale(zero=False))


def _colour(column: str, domain: list[str] | None) -> alt.Color:
    """Colours by place in `domain`, as the page's own legends give them."""
    return alt.Color(f"{column}:N", legend=None, scale=alt.Scale(domain=domain) if domain else alt.Undefined)


def _tip(column: str, form: str | None = None, title: str | None = None) -> alt.Tooltip:
    kind = "N" if form is None else "Q"
    return alt.Tooltip(f"{column}:{kind}", title=title or column, format=form or alt.Undefined)


def _hover(base: alt.Chart, tips: list[alt.Tooltip]) -> alt.Chart:
    """A line that follows the pointer from step to step."""
    nearest = alt.selection_point(nearest=True, on="pointerover", fields=["step"], empty=False, clear="pointerout")
    opacity = alt.when(nearest).then(alt.value(0.4)).otherwise(alt.value(0))
    return base.mark_rule(strokeWidth=1).encode(opacity=opacity, tooltip=tips).add_params(nearest)


def _layered(table: str, layers: list[alt.Chart], height: int, description: str) -> alt.LayerChart:
    """Layers over one table of the page, as wide as their place on it."""
    data = alt.NamedData(table)
    return alt.LayerChart(data=data, layer=layers, width="container", height=height, description=description)


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


def _examples(labels: Sequence[str], reason: str) -> Iterator[tuple[str, str]]:
    """Rows dropped for `reason`, taken apart as `Rejected.label` put them together."""
    for label in labels:
        row, found, detail = label.partition(f": {reason}")
        if found:
            yield row, detail.strip().removeprefix("(").removesuffix(")")


def _pictures(evaluations: Sequence[tuple[str, Evaluation]]) -> list[Picture]:
    """Each held-out picture once, with all that was ever written about it."""
    written: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    answers = {}
    for border, evaluation in evaluations:
        for answer in evaluation.answers:
            written[answer.source, answer.row].append((border, answer.written))
            answers[answer.source, answer.row] = answer
    return [
        Picture(
            source=answer.source,
            row=answer.row,
            image=_thumbnail(answer.image),
            prompt=answer.prompt,
            expected=answer.expected,
            written=tuple(reversed(written[key])),
        )
        for key, answer in answers.items()
    ]


def _thumbnail(png: str) -> str:
    """A smaller copy as a data URI: what the model saw may be far larger than the page needs."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
