"""The charts of a report: what they draw, and how; as Vega-Lite specifications over the page's own tables.

Colours are the page's, by number, so that it can follow the reader's light or dark theme.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import altair as alt

from cluster.amounts import flop_words, quantity
from cluster.curves import Rows, chance_of
from cluster.metrics import Evaluation
from cluster.phases import PHASES
from cluster.views import StageView
from pipelines.types import spec


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
    Gauge(column="seconds", title="seconds a step", form=".3~s", words="{:.3g} s".format),
    Gauge(column="wait", title="time waiting for data", form=".1~%", words="{:.1%}".format),
    Gauge(column="fill", title="pack fill", form=".1~%", words="{:.1%}".format),
    Gauge(column="learned", title="tokens with loss", form=".1~%", words="{:.1%}".format),
    Gauge(column="imbalance", title="worst rank by mean", form=".2f", words="{:.3f}".format),
    Gauge(column="lr", title="learning rate", form=".1~e", words="{:.2e}".format, mean=False),
    Gauge(column="grad_norm", title="gradient norm", form=".2~g", words="{:.3g}".format, mean=False),
)


def gauges_of(view: StageView) -> list[Gauge]:
    """The gauges that a stage's steps can fill: FLOPs are not known of every run."""
    known = view.mfu() is not None
    return [gauge for gauge in GAUGES if known or gauge.column not in ("flops", "mfu")]


def charts_of(
    views: Sequence[StageView],
    sources: list[str],
    held_out: list[str],
    evaluations: list[tuple[str, Evaluation]],
    tables: Mapping[str, Rows],
) -> dict[str, Any]:
    """Vega-Lite specifications by the id of the element they are drawn in. Their data stands in `tables`, by name."""
    charts: dict[str, alt.LayerChart] = {}
    for view in views:
        if view.steps:
            charts[f"{view.name}-loss"] = _loss_chart(view.name)
            charts[f"{view.name}-sources"] = _source_chart(view.name, sources)
            if tables[f"{view.name}/phases"]:
                charts[f"{view.name}-phases"] = _phase_chart(view.name)
            for gauge in gauges_of(view):
                charts[f"{view.name}-{gauge.column}"] = _gauge_chart(view.name, gauge)
    if tables["crew"]:
        span = [min(tables["crew"]["time"]), max([*tables["crew"]["time"], *tables["faults"]["time"]])]
        charts["crew-workers"] = _crew_chart(span)
        if tables["faults"]["time"]:
            charts["crew-faults"] = _fault_chart(span, len(set(tables["faults"]["what"])))
    order = [border for border, _ in evaluations]
    if len(order) > 1 and held_out:
        charts["curriculum-loss"] = _held_out_chart(order, held_out)
    chance = chance_of(evaluations)
    if len(order) > 1 and chance is not None:
        charts["curriculum-probe"] = _probe_chart(order, chance)
    return {name: chart.to_dict(validate=False) for name, chart in charts.items()}


def _loss_chart(stage: str) -> alt.LayerChart:
    base = alt.Chart().encode(x=_step_axis())
    band = base.mark_area(opacity=0.22).encode(y=_loss_axis("loss_low"), y2="loss_high:Q")
    faint = base.mark_line(strokeWidth=1, opacity=0.45).encode(y=_loss_axis("loss"))
    strong = base.mark_line(strokeWidth=2.25).encode(y="smooth:Q")
    tips = [
        _tip("step", ",d"),
        _tip("loss", ".4f"),
        _tip("loss_low", ".4f", "lowest"),
        _tip("loss_high", ".4f", "highest"),
    ]
    tips.append(_tip("smooth", ".4f", "smoothed"))
    return _layered(stage, [band, faint, strong, _hover(base, tips)], 250, f"Training loss of {stage}")


def _source_chart(stage: str, sources: list[str]) -> alt.LayerChart:
    base = alt.Chart().encode(x=_step_axis(), color=_colour("source", sources))
    tips = [_tip("source"), _tip("step", ",d"), _tip("loss", ".4f", "loss, smoothed")]
    lines = base.mark_line(strokeWidth=2).encode(y=_loss_axis("loss"))
    points = base.mark_circle(size=140, opacity=0).encode(y="loss:Q", tooltip=tips)
    return _layered(f"{stage}/sources", [lines, points], 250, f"Training loss of {stage} by source")


def _phase_chart(stage: str) -> alt.LayerChart:
    tips = [_tip("phase"), _tip("step", ",d"), _tip("seconds", ".3~g", "seconds a step")]
    axis = alt.Axis(title="seconds a step", tickCount=4)
    areas = alt.Chart().mark_area(opacity=0.85).encode(
        x=_step_axis(), y=alt.Y("seconds:Q", stack=True, axis=axis), color=_colour("phase", list(PHASES)),
        order=alt.Order("order:Q"), tooltip=tips,
    )  # fmt: skip
    return _layered(f"{stage}/phases", [areas], 150, f"Where the time of a step goes, {stage}")


LABELS = 96
"""Pixels left of two charts that share their time, so that one moment stands below the other."""


def _crew_chart(span: list[int]) -> alt.LayerChart:
    base = alt.Chart().encode(x=_time_axis(span))
    axis = alt.Axis(title=None, tickCount=3, tickMinStep=1, format="d", minExtent=LABELS)
    tips = [_tip("workers", "d"), _tip("stage"), alt.Tooltip("time:T", title="since", format="%Y-%m-%d %H:%M:%S")]
    area = base.mark_area(interpolate="step-after", opacity=0.25, line=True).encode(y=alt.Y("workers:Q", axis=axis))
    points = base.mark_circle(size=140, opacity=0).encode(y="workers:Q", tooltip=tips)
    return _layered("crew", [area, points], 90, "Workers over time")


def _fault_chart(span: list[int], kinds: int) -> alt.LayerChart:
    tips = [alt.Tooltip("time:T", title="at", format="%Y-%m-%d %H:%M:%S"), _tip("what"), _tip("stage"), _tip("words")]
    axis = alt.Axis(title=None, domain=False, ticks=False, grid=True, minExtent=LABELS)
    points = alt.Chart().mark_point(filled=True, size=70, opacity=0.9).encode(
        x=_time_axis(span), y=alt.Y("what:N", axis=axis, sort=None),
        color=_colour("kind", ["done about it", "fault"]), shape=alt.Shape("kind:N", legend=None), tooltip=tips,
    )  # fmt: skip
    return _layered("faults", [points], 26 * kinds + 20, "Faults, and what was done about them")


def _time_axis(span: list[int]) -> alt.X:
    axis = alt.Axis(title=None, tickCount=6, grid=False)
    return alt.X("time:T", axis=axis, scale=alt.Scale(domain=span, nice=False, padding=6))


def _gauge_chart(stage: str, gauge: Gauge) -> alt.LayerChart:
    base = alt.Chart().encode(x=_step_axis(ticks=3))
    axis = alt.Axis(title=None, format=gauge.form, tickCount=3)
    scale = alt.Scale(zero=False)
    line = base.mark_line(strokeWidth=1.5).encode(y=alt.Y(f"{gauge.column}:Q", axis=axis, scale=scale))
    low, high = f"{gauge.column}_low", f"{gauge.column}_high"
    band = base.mark_area(opacity=0.22).encode(y=alt.Y(f"{low}:Q", axis=axis, scale=scale), y2=f"{high}:Q")
    tips = [_tip("step", ",d"), _tip(gauge.column, gauge.form, gauge.title)]
    tips += [_tip(low, gauge.form, "lowest"), _tip(high, gauge.form, "highest")]
    return _layered(stage, [band, line, _hover(base, tips)], 92, f"{gauge.title}, {stage}")


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
