"""A Grafana dashboard and Prometheus alert rules, made from the metrics that `cluster/gauges.py` defines.

    mllm dashboard --out DIR        DIR/mllm_grafana_dashboard.json and DIR/mllm_alerts.yml

Ray keeps its own dashboards in the head's session folder, under metrics/grafana/dashboards: a file that is laid there is
shown beside them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster import gauges
from cluster.gauges import Metric

UID = "mllmDashboard"
"""By which Grafana knows the dashboard, as Ray's own are `rayDefaultDashboard` and so on."""

CHOSEN = 'run=~"$run",stage=~"$stage"'
"""What the two choosers at the top of the page put into every query."""

WIDTH, HEIGHT = 12, 8
"""Of a panel, in Grafana's grid of 24 columns."""

Over = Literal["", "rate"]


@dataclass(frozen=True)
class Curve:
    """One query: a metric, and how it is looked at. `by` are the tags that tell its lines apart; a `rate` is per second."""

    metric: Metric
    over: Over = ""
    legend: str = ""

    @property
    def query(self) -> str:
        """In PromQL."""
        name = f"{self.metric.exported}{{{CHOSEN}}}"
        by = ", ".join(self.metric.labels)
        if self.over == "rate":
            return f"sum by ({by}) (rate({self.metric.exported}_total{{{CHOSEN}}}[$__rate_interval]))"
        return f"max by ({by}) ({name})"  # one series where Ray's labels of process and node differ after a restart

    @property
    def name(self) -> str:
        """What the legend says."""
        return self.legend or " ".join(f"{{{{{tag}}}}}" for tag in ("run", "stage", *self.metric.tags))


@dataclass(frozen=True)
class Panel:
    """One chart."""

    title: str
    curves: tuple[Curve, ...]
    unit: str = ""

    @property
    def help(self) -> str:
        return "\n".join(f"{curve.metric.exported}: {curve.metric.help}." for curve in self.curves)


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Learning",
        (
            Panel("Loss", (Curve(gauges.LOSS),)),
            Panel("Loss by source", (Curve(gauges.SOURCE_LOSS),)),
            Panel("Held-out loss", (Curve(gauges.HELD_OUT_LOSS),)),
            Panel("Accuracy by source", (Curve(gauges.SOURCE_ACCURACY),)),
            Panel("Gradient norm", (Curve(gauges.GRAD_NORM),)),
            Panel("Learning rate", (Curve(gauges.LR),)),
        ),
    ),
    (
        "Progress",
        (
            Panel("Share of the stage", (Curve(gauges.PROGRESS),)),
            Panel("Expected end of the stage", (Curve(gauges.END),)),
            Panel("Steps", (Curve(gauges.STEP),)),
            Panel("Goodput", (Curve(gauges.GOODPUT),)),
        ),
    ),
    (
        "Throughput",
        (
            Panel("Tokens a second", (Curve(gauges.TOKENS, "rate"),)),
            Panel("Learned tokens a second", (Curve(gauges.LEARNED, "rate"),)),
            Panel("Pictures a second", (Curve(gauges.IMAGES, "rate"),)),
            Panel("Learned tokens a second, by source", (Curve(gauges.SOURCE_TOKENS, "rate"),)),
            Panel("Model FLOPs utilisation", (Curve(gauges.MFU),)),
            Panel(
                "Step and wait for data",
                (Curve(gauges.STEP_SECONDS, legend="step"), Curve(gauges.DATA_WAIT, legend="wait")),
            ),
            Panel("Phases of each rank", (Curve(gauges.PHASE),)),
            Panel("Memory of each rank", (Curve(gauges.MEMORY),)),
        ),
    ),
    (
        "Data",
        (
            Panel("Fill of packs", (Curve(gauges.FILL),)),
            Panel("Imbalance over ranks", (Curve(gauges.IMBALANCE),)),
            Panel("Rows a second", (Curve(gauges.ROWS, "rate"),)),
            Panel("Rows dropped, by reason", (Curve(gauges.DROPPED),)),
        ),
    ),
    (
        "Faults",
        (
            Panel("Workers", (Curve(gauges.WORLD),)),
            Panel("Restarts", (Curve(gauges.RESTARTS),)),
            Panel("Faults", (Curve(gauges.FAULTS),)),
            Panel("Steps not taken", (Curve(gauges.NOT_TAKEN),)),
            Panel("Checkpoint stall", (Curve(gauges.STALL),)),
        ),
    ),
)


@dataclass(frozen=True)
class Alert:
    """A rule of Prometheus: `when` is true `since` so long."""

    name: str
    when: str
    since: str
    severity: Literal["warning", "critical"]
    summary: str


ALERTS = (
    Alert(
        "MllmNoProgress",
        f"changes({gauges.STEP.exported}[15m]) == 0 and {gauges.PROGRESS.exported} < 1",
        "5m",
        "critical",
        "Run {{ $labels.run }} has made no step of {{ $labels.stage }} for a quarter of an hour; see mllm status",
    ),
    Alert(
        "MllmStepsNotTaken",
        f"delta({gauges.NOT_TAKEN.exported}[30m]) > 3",
        "0m",
        "critical",
        "Steps of run {{ $labels.run }} come out as no number; mllm status names their rows",
    ),
    Alert(
        "MllmRestarts",
        f"delta({gauges.RESTARTS.exported}[1h]) > 3",
        "0m",
        "warning",
        "Workers of run {{ $labels.run }} began again more than three times in an hour; mllm status says why",
    ),
    Alert(
        "MllmWaitsForData",
        f"{gauges.DATA_WAIT.exported} / {gauges.STEP_SECONDS.exported} > 0.2",
        "15m",
        "warning",
        "Run {{ $labels.run }} waits for data a fifth of its time; add preprocessors in the site file",
    ),
    Alert(
        "MllmRowsDropped",
        f"sum by (run, stage) (delta({gauges.DROPPED.exported}[15m])) "
        f"> 0.05 * sum by (run, stage) (increase({gauges.ROWS.exported}_total[15m]))",
        "15m",
        "warning",
        "Run {{ $labels.run }} drops more than one row in twenty; mllm data quarantine {{ $labels.run }} names them",
    ),
    Alert(
        "MllmStraggler",
        f'delta({gauges.FAULTS.exported}{{what="straggler"}}[1h]) > 0',
        "0m",
        "warning",
        "A rank of run {{ $labels.run }} is slower than the others; mllm status names its node",
    ),
)


def dashboard() -> dict[str, Any]:
    """Grafana's model of the dashboard, as its JSON is written."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS:
        panels.append(
            {
                "type": "row",
                "title": title,
                "id": len(panels) + 1,
                "gridPos": _place(0, top, 24, 1),
                "collapsed": False,
                "panels": [],
            }
        )
        top += 1
        for number, panel in enumerate(row):
            place = _place(WIDTH * (number % 2), top + HEIGHT * (number // 2), WIDTH, HEIGHT)
            panels.append(_panel(panel, len(panels) + 1, place))
        top += HEIGHT * ((len(row) + 1) // 2)
    return {
        "uid": UID,
        "title": "mllm",
        "tags": ["ray", "mllm"],
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "schemaVersion": 39,
        "templating": {"list": [_datasource(), _chooser("run", ""), _chooser("stage", 'run=~"$run"')]},
        "panels": panels,
    }


def alerts() -> dict[str, Any]:
    """Prometheus's rules, as its YAML is written."""
    rules = [
        {
            "alert": alert.name,
            "expr": alert.when,
            "for": alert.since,
            "labels": {"severity": alert.severity},
            "annotations": {"summary": alert.summary},
        }
        for alert in ALERTS
    ]
    return {"groups": [{"name": "mllm", "rules": rules}]}


def write(folder: Path) -> list[Path]:
    """Write both to `folder` and return where they are."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    page, rules = folder / "mllm_grafana_dashboard.json", folder / "mllm_alerts.yml"
    page.write_text(json.dumps(dashboard(), indent=1) + "\n", encoding="utf-8")
    rules.write_text(yaml.safe_dump(alerts(), sort_keys=False, width=120), encoding="utf-8")
    return [page, rules]


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    unit = panel.unit or ("none" if any(c.over for c in panel.curves) else panel.curves[0].metric.unit)
    # Grafana counts moments in milliseconds.
    scale = " * 1000" if unit == "dateTimeFromNow" else ""
    return {
        "type": "timeseries",
        "id": number,
        "title": panel.title,
        "description": panel.help,
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "gridPos": place,
        "fieldConfig": {
            "defaults": {"unit": unit, "custom": {"fillOpacity": 0, "showPoints": "never"}},
            "overrides": [],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + at), "expr": curve.query + scale, "legendFormat": curve.name}
            for at, curve in enumerate(panel.curves)
        ],
    }


def _place(x: int, y: int, w: int, h: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": w, "h": h}


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source", "hide": 0}


def _chooser(tag: str, among: str) -> dict[str, Any]:
    return {
        "name": tag,
        "label": tag.capitalize(),
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": f"label_values({gauges.STEP.exported}{{{among}}}, {tag})",
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
        "sort": 1,
    }


def queries() -> Sequence[str]:
    """Every query of the page, with the choosers at "all" and rates over a minute: what a Prometheus must answer."""
    curves = [curve for _, row in ROWS for panel in row for curve in panel.curves]
    return [c.query.replace("$run", ".*").replace("$stage", ".*").replace("$__rate_interval", "1m") for c in curves]
