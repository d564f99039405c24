"""The pictures of a report, as plotly figures made from the JSON of a comparison."""

from __future__ import annotations

import html
import itertools
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from loratlas.analysis.ranks import rank_at

# Okabe and Ito's palette, made to be told apart with any colour vision; yellow is left out: unreadable on white.
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
_ON_COLOR = ("#fff", "#fff", "#fff", "#111", "#111", "#111", "#fff")  # text on bars of that colour
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
        curves = [points(run["history"], "loss") for run in group]
        for curve in curves:
            steps, losses = columns(curve)
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
        steps, mean, low, high = _across_seeds([points(run["evals"], metric) for run in group])
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
            annotation_position="top left",  # where the curves seldom are at that height
        )
    return styled(figure, "step", html.escape(metric))


def cost_figure(runs: Sequence[Run]) -> go.Figure:
    """Bars beside each other: the final metric, trainable parameters, time of a step; means over seeds."""
    groups = method_groups(runs)
    columns: tuple[tuple[str, Callable[[Run], float]], ...] = (
        (html.escape(str(runs[0]["metric"])), lambda run: run["final"]),
        ("parameters", lambda run: run["trainable_parameters"]),
        ("ms a step", lambda run: 1000.0 * run["step_seconds"]),
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
            insidetextanchor="start",  # the other end is where the error bars are
            insidetextfont={"color": [_ON_COLOR[index % len(_PALETTE)] for index in range(len(groups))]},
            hoverinfo="skip",
            showlegend=False,
            row=1,
            col=place,
        )
    figure.update_yaxes(autorange="reversed")
    figure.update_xaxes(tickangle=0, nticks=4)
    return styled(figure, None, None, height=110 + 44 * len(groups))


def recomposition_figure(run: Run) -> go.Figure:
    """Two heat maps of one run's `events`, a row a layer: how often each slot was recomposed, and at which step."""
    events = sorted(run["events"], key=lambda event: event["step"])
    layers = list(dict.fromkeys(event["layer"] for event in run["events"]))
    steps = list(dict.fromkeys(event["step"] for event in events))
    slots = range(1 + max(slot for event in events for slot in event["slots"]))
    told: dict[tuple[str, int], list[str]] = {(layer, slot): [] for layer in layers for slot in slots}
    moments: dict[tuple[str, int, int], tuple[int, str]] = {}
    for event in events:
        for slot, old, new in zip(event["slots"], event["old_dirs"], event["new_dirs"], strict=True):
            lines = told[event["layer"], slot]
            lines.append(f"step {event['step']}: direction {old} to {new}")
            moments[event["layer"], event["step"], slot] = len(lines), f"slot {slot}<br>{lines[-1]}"
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.03, column_widths=[0.35, 0.65])
    often = [
        [(len(told[layer, slot]), f"slot {slot}<br>{'<br>'.join(told[layer, slot])}") for slot in slots]
        for layer in layers
    ]
    figure.add_trace(_heat(layers, often), row=1, col=1)
    # one column a slot for every step, and an empty one between the steps
    columns = [(step, slot) for step in steps for slot in (*slots, -1)]
    when = [[moments.get((layer, *column), (None, "")) for column in columns] for layer in layers]
    figure.add_trace(_heat(layers, when), row=1, col=2)
    styled(figure, None, None, height=150 + 22 * len(layers))
    bar = {"title": {"text": "times"}, "thickness": 12, "tickformat": "d", "dtick": 1}
    figure.update_layout(coloraxis={"colorscale": "Viridis", "cmin": 0, "colorbar": bar})
    figure.update_yaxes(autorange="reversed", tickfont={"size": 11}, showgrid=False, tickmode="array")
    figure.update_yaxes(tickvals=list(range(len(layers))), ticktext=without_common_start(layers))
    figure.update_yaxes(ticks="", col=2)
    figure.update_xaxes(showgrid=False, tickangle=0, tickmode="array")
    figure.update_xaxes(title_text="slot", **_ticks(list(slots), 1, 0), col=1)
    figure.update_xaxes(title_text="step", **_ticks(steps, len(slots) + 1, len(slots) // 2), col=2)
    return figure


def rank_figure(run: Run) -> go.Figure:
    """A heat map of one run's `ranks`: a row a layer, from its start to its end, coloured by the rank."""
    layers = [entry["layer"] for entry in run["ranks"]]
    moves = sorted({step for entry in run["ranks"] for step in entry["steps"]} | {0})
    edges = [*moves, max(int(run["steps"]), moves[-1] + 1)]  # a field is as wide as its rank has lasted
    cells = []
    for entry in run["ranks"]:
        held = [(rank_at(entry, step), step, end) for step, end in itertools.pairwise(edges)]
        cells.append([(rank, f"rank {rank}<br>after steps {step} to {end - 1}") for rank, step, end in held])
    figure = go.Figure(_heat(layers, cells).update(x=edges, xgap=0))
    styled(figure, "step", None, height=150 + 22 * len(layers))
    bar = {"title": {"text": "rank"}, "thickness": 12, "tickformat": "d"}
    figure.update_layout(coloraxis={"colorscale": "Viridis", "cmin": 0, "colorbar": bar})
    figure.update_yaxes(autorange="reversed", tickfont={"size": 11}, showgrid=False, tickmode="array")
    figure.update_yaxes(tickvals=list(range(len(layers))), ticktext=without_common_start(layers))
    figure.update_xaxes(showgrid=False)
    return figure


def _heat(layers: Sequence[str], cells: Sequence[Sequence[tuple[int | None, str]]]) -> go.Heatmap:
    """A row a layer; each cell has its number, None for none, and what it says when pointed at."""
    return go.Heatmap(
        z=[[number for number, _ in row] for row in cells],
        customdata=[
            [f"{html.escape(layer)}, {text}" for _, text in row] for layer, row in zip(layers, cells, strict=True)
        ],
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
    )


def _ticks(labels: Sequence[int], distance: int, first: int) -> dict[str, Any]:
    """At most a dozen of the labels, the one at position i standing at first + i * distance."""
    every = -(-len(labels) // 12)
    shown = range(0, len(labels), every)
    return {"tickvals": [first + i * distance for i in shown], "ticktext": [str(labels[i]) for i in shown]}


def without_common_start(names: Sequence[str]) -> list[str]:
    """The dotted names without the parts that they all begin with, for HTML."""
    parts = [name.split(".") for name in names]
    first, last = min(parts), max(parts)  # what these two share, all share
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    return [html.escape(".".join(each[same:])) for each in parts]


def points(rows: Sequence[dict[str, Any]], name: str) -> list[Point]:
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def columns(points: Sequence[Point]) -> tuple[list[int], list[float]]:
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
        margin={"l": 64, "r": 36, "t": 40, "b": 52},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        modebar={"orientation": "v", "bgcolor": "rgba(0,0,0,0)"},
        hovermode="x unified" if y else "closest",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    figure.update_xaxes(title_text=x, zeroline=False, automargin=True)
    figure.update_yaxes(title_text=y, zeroline=False, automargin=True)
    return figure
