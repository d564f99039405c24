"""The pictures behind the verdict: differences to the baseline with their intervals, and the learning-rate search."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from loratlas.train.figures import add_line, color, method_groups, styled


def forest_figure(comparison: Mapping[str, Any]) -> go.Figure:
    """One line a method: its difference to the baseline with the 95 % interval; the band is the noise floor."""
    order = list(method_groups(comparison["runs"]))
    rows = [row for row in comparison["rows"] if row["difference"] is not None]
    figure = go.Figure()
    for row in rows:
        found = row["difference"]
        figure.add_scatter(
            x=[found["mean"]],
            y=[html.escape(row["label"])],
            error_x=None if found["half"] is None else {"type": "data", "array": [found["half"]], "thickness": 2},
            mode="markers",
            marker={"color": color(order.index(row["label"])), "size": 11},
            hovertemplate="%{x:+.4f}<extra></extra>",
            showlegend=False,
        )
    figure.add_vline(x=0, line={"dash": "dot", "width": 1, "color": "#888"})
    noise = comparison["noise"]
    if noise is not None:
        band = {"x0": -noise["level"], "x1": noise["level"], "fillcolor": "#888", "opacity": 0.15, "line_width": 0}
        figure.add_vrect(**band, annotation_text="noise floor", annotation_position="top left")
    figure.update_yaxes(autorange="reversed", type="category")
    title = f"{html.escape(str(comparison['metric']))} minus that of {html.escape(str(comparison['baseline']))}"
    return styled(figure, title, None, height=130 + 44 * len(rows))


def search_figure(comparison: Mapping[str, Any]) -> go.Figure:
    """The metric on the held-out training rows over the learning rates; a ring marks the one that was taken."""
    groups = method_groups(comparison["search_runs"])
    order = list(method_groups(comparison["runs"]))
    figure = go.Figure()
    for label, runs in groups.items():
        points = sorted((run["learning_rate"], run["final"]) for run in runs if run["final"] is not None)
        place = order.index(label) if label in order else len(order)
        add_line(figure, place, label, [rate for rate, _ in points], [value for _, value in points], "lines+markers")
        taken = [point for point in points if point[0] == comparison["rates"].get(runs[0]["method"])]
        figure.add_scatter(
            x=[rate for rate, _ in taken],
            y=[value for _, value in taken],
            mode="markers",
            marker={"symbol": "circle-open", "size": 16, "color": color(place), "line": {"width": 2}},
            hoverinfo="skip",
            showlegend=False,
            legendgroup=html.escape(label),
        )
    figure.update_xaxes(type="log")
    return styled(figure, "learning rate", html.escape(str(comparison["metric"])), height=320)
