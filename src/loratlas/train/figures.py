"""The pictures of a report, as plotly figures made from the JSON of a comparison."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

# Okabe and Ito's palette, made to be told apart with any colour vision; yellow is left out: unreadable on white.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
_DASHES = ("solid", "dash", "dot", "dashdot")  # more methods than colours: the dash tells them apart

Run = dict[str, Any]
Point = tuple[int, float]


def method_groups(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """{label: its runs, one a seed}, in the order of the comparison."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(str(run["label"]), []).append(run)
    return groups


def color(index: int) -> str:
    """Colour of the method at `index`, the same in every picture and in the table."""
    return _PALETTE[index % len(_PALETTE)]


def smooth(values: Sequence[float], span: float) -> list[float]:
    """Exponential moving average with decay 1 - 1 / span, corrected for its start as Adam's moments are."""
    keep = 1.0 - 1.0 / max(1.0, span)
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average = keep * average + (1.0 - keep) * value
        weight = keep * weight + (1.0 - keep)
        result.append(average / weight)
    return result


def loss_figure(runs: Sequence[Run]) -> go.Figure:
    """Training loss over steps: every seed faint, the smoothed mean over seeds strong."""
    figure = go.Figure()
    for index, (label, group) in enumerate(method_groups(runs).items()):
        curves = [_points(run["history"], "loss") for run in group]
        for curve in curves:
            steps, losses = _columns(curve)
            line = {"color": color(index), "width": 1}
            figure.add_scatter(x=steps, y=losses, line=line, opacity=0.25, hoverinfo="skip", **_member(label))
        steps, mean, _, _ = _across_seeds(curves)
        add_line(figure, index, label, steps, smooth(mean, len(mean) / 20), "lines")
    return styled(figure, "step", "training loss")


def metric_figure(runs: Sequence[Run], baseline: str) -> go.Figure:
    """The headline metric at every evaluation: mean over seeds, band from the worst to the best seed.

    baseline: slug of the method whose final value is drawn as a dotted line.
    """
    figure = go.Figure()
    metric = str(runs[0]["metric"])
    for index, (label, group) in enumerate(method_groups(runs).items()):
        steps, mean, low, high = _across_seeds([_points(run["evals"], metric) for run in group])
        if len(group) > 1:
            figure.add_scatter(
                x=[*steps, *reversed(steps)],
                y=[*high, *reversed(low)],
                fill="toself",
                fillcolor=color(index),
                opacity=0.15,
                line={"width": 0},
                hoverinfo="skip",
                **_member(label),
            )
        add_line(figure, index, label, steps, mean, "lines+markers")
    finals = [run["final"] for run in runs if run["method"] == baseline and run["final"] is not None]
    if finals:
        figure.add_hline(
            y=fmean(finals),
            line={"dash": "dot", "width": 1, "color": "#888"},
            annotation={"text": f"{html.escape(baseline)}, final", "font": {"color": "#888"}},
        )
    return styled(figure, "step", html.escape(metric))


def cost_figure(runs: Sequence[Run]) -> go.Figure:
    """Bars beside each other: the final metric, trainable parameters, time of a step; means over seeds."""
    groups = method_groups(runs)
    columns: tuple[tuple[str, Callable[[Run], float]], ...] = (
        (html.escape(str(runs[0]["metric"])), lambda run: run["final"]),
        ("trainable parameters", lambda run: run["trainable_parameters"]),
        ("step time, ms", lambda run: 1000.0 * run["step_seconds"]),
    )
    figure = make_subplots(rows=1, cols=3, subplot_titles=[title for title, _ in columns], shared_yaxes=True)
    for place, (_, value) in enumerate(columns, start=1):
        values = [[value(run) or 0.0 for run in group] for group in groups.values()]
        means = [fmean(each) for each in values]
        figure.add_bar(
            x=means,
            y=[html.escape(label) for label in groups],
            orientation="h",
            marker={"color": [color(index) for index in range(len(groups))]},
            text=[f"{mean:,.0f}" if mean >= 1000 else f"{mean:.4g}" for mean in means],
            error_x=_spread(values, means),
            textposition="auto",
            hoverinfo="skip",
            showlegend=False,
            row=1,
            col=place,
        )
    figure.update_yaxes(autorange="reversed")
    return styled(figure, None, None, height=110 + 44 * len(groups))


def recomposition_figure(run: Run) -> go.Figure:
    """Heat map of one run's `events`: how often each slot (column) of each layer (row) was recomposed."""
    events = run["events"]
    layers = list(dict.fromkeys(event["layer"] for event in events))
    width = 1 + max(slot for event in events for slot in event["slots"])
    told: list[list[list[str]]] = [[[] for _ in range(width)] for _ in layers]
    for event in events:
        row = told[layers.index(event["layer"])]
        for slot, old, new in zip(event["slots"], event["old_dirs"], event["new_dirs"], strict=True):
            row[slot].append(f"step {event['step']}: direction {old} to {new}")
    figure = go.Figure(
        go.Heatmap(
            x=[str(slot) for slot in range(width)],
            y=[html.escape(layer) for layer in layers],
            z=[[len(lines) for lines in row] for row in told],
            customdata=[["<br>".join(lines) or "never recomposed" for lines in row] for row in told],
            hovertemplate="%{y}, slot %{x}<br>%{customdata}<extra></extra>",
            colorscale="Viridis",
            zmin=0,
            xgap=2,
            ygap=2,
            colorbar={"title": {"text": "times"}, "thickness": 12, "tickformat": "d", "dtick": 1},
        )
    )
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_xaxes(type="category")
    return styled(figure, "slot", None, height=140 + 22 * len(layers))


def _points(rows: Sequence[dict[str, Any]], name: str) -> list[Point]:
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def _columns(points: Sequence[Point]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _across_seeds(curves: Sequence[Sequence[Point]]) -> tuple[list[int], list[float], list[float], list[float]]:
    """(steps, mean, lowest, highest) at the steps that every seed has."""
    tables = [dict(curve) for curve in curves]
    steps = [step for step in tables[0] if all(step in table for table in tables)]
    columns = [[table[step] for table in tables] for step in steps]
    return steps, [fmean(c) for c in columns], [min(c) for c in columns], [max(c) for c in columns]


def _spread(values: Sequence[Sequence[float]], means: Sequence[float]) -> dict[str, Any] | None:
    """Error bars from the lowest to the highest seed; None with one seed."""
    if all(len(each) == 1 for each in values):
        return None
    above = [max(each) - mean for each, mean in zip(values, means, strict=True)]
    below = [mean - min(each) for each, mean in zip(values, means, strict=True)]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "color": "#888"}


def add_line(figure: go.Figure, index: int, label: str, x: Sequence[float], y: Sequence[float], mode: str) -> None:
    dash = _DASHES[index // len(_PALETTE) % len(_DASHES)]
    name = html.escape(label)
    line = {"color": color(index), "width": 2.5, "dash": dash}
    figure.add_scatter(x=x, y=y, mode=mode, line=line, name=name, legendgroup=name)


def _member(label: str) -> dict[str, Any]:
    """A curve that comes and goes with its method's entry in the legend."""
    return {"mode": "lines", "name": html.escape(label), "legendgroup": html.escape(label), "showlegend": False}


def styled(figure: go.Figure, x: str | None, y: str | None, height: int = 420) -> go.Figure:
    """Transparent and without a template: the page gives text and grid their colours, for light and dark."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 64, "r": 16, "t": 40, "b": 52},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        hovermode="x unified" if y else "closest",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    figure.update_xaxes(title_text=x, zeroline=False, automargin=True)
    figure.update_yaxes(title_text=y, zeroline=False, automargin=True)
    return figure
