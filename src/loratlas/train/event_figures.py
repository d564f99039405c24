"""Pictures of a run whose pairs start again: the directions that its slots carry, and its curves around the events."""

from __future__ import annotations

import html
import itertools
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from loratlas.train.figures import Run, color, columns, points, smooth, styled, without_common_start

_TALLEST = 2400  # pixels of the map
_MARKED = 200  # steps with events up to which each has its line


def direction_figure(run: Run) -> go.Figure:
    """A heat map of one run's `recomposition` and `events`: a row a slot, layer by layer, coloured by its direction."""
    layers = [state["layer"] for state in run["recomposition"]]
    steps = sorted({event["step"] for event in run["events"]})
    edges = [0, *steps, max(int(run["steps"]), steps[-1] + 1)]
    numbers: list[list[int | None]] = []
    told: list[list[str]] = []
    middles = []
    for state in run["recomposition"]:
        rows = _carried(state, run["events"], steps)
        middles.append(len(numbers) + (len(rows) - 1) / 2)
        for slot, row in enumerate(rows):
            name = f"{html.escape(state['layer'])}, slot {slot}"
            spans = itertools.pairwise(edges)
            numbers.append(list(row))
            told.append(
                [
                    f"{name}, direction {number}<br>after steps {step} to {end - 1}"
                    for number, (step, end) in zip(row, spans, strict=True)
                ]
            )
        numbers.append([None] * len(edges[1:]))  # a gap between the layers
        told.append([""] * len(edges[1:]))
    hover: dict[str, Any] = {"customdata": told, "hovertemplate": "%{customdata}<extra></extra>", "hoverongaps": False}
    figure = go.Figure(go.Heatmap(x=edges, z=numbers, coloraxis="coloraxis", **hover))
    line = max(2, min(9, _TALLEST // len(numbers)))
    styled(figure, "step", None, height=150 + max(line * len(numbers), 14 * len(layers)))
    short = {"lenmode": "pixels", "len": 300, "y": 1, "yanchor": "top"}
    bar = {"title": {"text": "direction"}, "thickness": 12, "tickformat": "d", **short}
    figure.update_layout(coloraxis={"colorscale": "Viridis", "cmin": 0, "colorbar": bar})
    figure.update_yaxes(autorange="reversed", tickfont={"size": 11}, showgrid=False, tickmode="array")
    figure.update_yaxes(tickvals=middles, ticktext=without_common_start(layers))
    figure.update_xaxes(showgrid=False)
    return figure


def _carried(state: dict[str, Any], events: list[dict[str, Any]], steps: list[int]) -> list[list[int]]:
    """Of every slot of one layer the directions it carried: before the first of `steps`, after it, after the next."""
    now = list(state["slot_directions"])
    moments = [now]
    own = {event["step"]: event for event in events if event["layer"] == state["layer"]}
    for step in reversed(steps):
        now = list(now)
        event = own.get(step, {"slots": [], "old_dirs": []})
        for slot, old in zip(event["slots"], event["old_dirs"], strict=True):
            now[slot] = old
        moments.append(now)
    return [list(row) for row in zip(*reversed(moments), strict=True)]


def event_figure(run: Run) -> go.Figure:
    """Loss, metric and learning rates of one run, one above the other, with the steps of its `events` marked."""
    metric, fresh = str(run["metric"]), _fresh_rates(run)
    titles = ["training loss", html.escape(metric), *(["learning rate"] if fresh else [])]
    figure = make_subplots(rows=len(titles), cols=1, shared_xaxes=True, vertical_spacing=0.05)
    steps, losses = columns(points(run["history"], "loss"))
    faint: dict[str, Any] = {"opacity": 0.3, "hoverinfo": "skip", "showlegend": False, "mode": "lines"}
    figure.add_scatter(x=steps, y=losses, line={"color": color(0), "width": 1}, **faint, row=1, col=1)
    _line(figure, 1, 0, "loss, smoothed", steps, smooth(losses, len(losses) / 40))
    _line(figure, 2, 1, html.escape(metric), *columns(points(run["evals"], metric)), mode="lines+markers")
    if fresh:
        _line(figure, 3, 6, "of the other pairs", *columns(points(run["history"], "learning_rate")))
        _line(figure, 3, 2, "of pairs that have started again", [x for x, _ in fresh], [y for _, y in fresh])
    marked = sorted({event["step"] for event in run["events"]})
    for step in marked[:: -(-len(marked) // _MARKED)]:
        figure.add_vline(x=step, line={"dash": "dot", "width": 1, "color": "#888"})
    styled(figure, None, None, height=160 + 190 * len(titles))
    for row, title in enumerate(titles, start=1):
        figure.update_yaxes(title_text=title, row=row)
    figure.update_xaxes(title_text="step", row=len(titles))
    figure.update_layout(hovermode="x unified")
    return figure


def _fresh_rates(run: Run) -> list[tuple[int, float | None]]:
    """(step, learning rate) of the pairs that the last event started again, with a gap at every event."""
    rates = dict(points(run["history"], "learning_rate"))
    curve: list[tuple[int, float | None]] = []
    for event in run.get("fresh") or ():
        for age, factor in zip(event["ages"], event["factors"], strict=True):
            if event["step"] + age in rates:
                curve.append((event["step"] + age, factor * rates[event["step"] + age]))
        if curve:
            curve.append((curve[-1][0], None))
    return curve


def _line(figure: go.Figure, row: int, index: int, name: str, x: Any, y: Any, mode: str = "lines") -> None:
    line = {"color": color(index), "width": 2}
    figure.add_scatter(x=x, y=y, mode=mode, name=name, line=line, row=row, col=1)
