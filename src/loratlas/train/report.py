"""`report.html`: a comparison as one self-contained page that opens offline."""

from __future__ import annotations

import html
import importlib.util
import os
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from loratlas.errors import UserError
from loratlas.files import write_text
from loratlas.train.wording import headings, ranked, row_cells

Run = dict[str, Any]
# with this the browser itself refuses whatever is not in the page
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def write_report(comparison: dict[str, Any], path: str | os.PathLike[str], command: str = "") -> Path:
    """Write the report of `comparison` to `path`, atomically.

    Args:
        comparison: a JSON-able dictionary with task (one line), metric, greater_is_better, baseline (slug), notes,
            rows (see `wording`) and runs. A run has method, label, seed, metric, greater_is_better, final, history
            ([{"step", "loss"}]), evals ([{"step", <metric>}]), trainable_parameters, step_seconds, learning_rate,
            batch_size, steps, seconds, options, versions, and perhaps setup_seconds and events (see
            `analysis.recomposition`).
        command: the command line that produced it.

    The page holds the leaderboard, loss and metric curves, costs, a heat map of recompositions for runs that carry
    `events`, the command that produced it, versions and notes. It loads nothing: plotly is inside.

    Raises:
        UserError: plotly is not installed, or the comparison has no runs.
    """
    check_plotly()
    from plotly.io import to_html

    from loratlas.train import figures

    runs = comparison["runs"]
    if not runs:
        raise UserError("the comparison holds no finished run, so there is nothing to report.")
    labels = list(figures.method_groups(runs))
    colors = {label: figures.color(index) for index, label in enumerate(labels)}
    pictures = [
        ("Training loss", "Faint: every batch. Strong: smoothed mean.", figures.loss_figure(runs)),
        (_metric_title(runs), _metric_hint(runs), figures.metric_figure(runs, comparison["baseline"])),
        ("Result and cost", "Means over seeds.", figures.cost_figure(runs)),
        *_recompositions(runs, figures.recomposition_figure),
    ]
    blocks = []
    for index, (title, hint, figure) in enumerate(pictures):
        plot = to_html(
            figure,
            full_html=False,
            include_plotlyjs=index == 0,
            default_height=f"{figure.layout.height}px",
            config={"displaylogo": False, "responsive": True, "modeBarButtons": [["toImage", "resetScale2d"]]},
        )
        blocks.append(_section(title, f'<p class="hint">{_text(hint)}</p><figure>{plot}</figure>'))
    return write_text(path, _page(comparison, labels, colors, blocks, command))


def check_plotly() -> None:
    """Raise `UserError` unless plotly is installed; worth calling before hours of training."""
    if importlib.util.find_spec("plotly") is None:
        raise UserError('report.html needs plotly: pip install "loratlas[report]".')


def _page(
    comparison: dict[str, Any], labels: list[str], colors: dict[str, str], blocks: Iterable[str], command: str
) -> str:
    title = " vs ".join(labels) if len(labels) < 6 else f"{len(labels)} methods compared"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>{_resource("report.css")}</style>
</head>
<body>
<h1>{_text(title)}</h1>
<p class="lead">{_text(comparison["task"])}</p>
{_section("Leaderboard", _leaderboard(comparison, colors) + _notes(comparison["notes"]))}
{"".join(blocks)}
{_section("How this was made", _making(comparison["runs"], command))}
<footer>Written by LoRAtlas. This page is complete in itself and loads nothing from the network.</footer>
<script>{_resource("report.js")}</script>
</body>
</html>
"""


def _leaderboard(comparison: dict[str, Any], colors: dict[str, str]) -> str:
    head = "".join(f'<th scope="col">{_text(title)}</th>' for title in headings(comparison))
    body = []
    for place, row in enumerate(ranked(comparison)):
        first, *cells = row_cells(row)
        swatch = f'<span class="swatch" style="background:{colors[row["label"]]}" aria-hidden="true"></span>'
        columns = "".join(f"<td>{_text(cell)}</td>" for cell in cells)
        mark = ' class="best"' if place == 0 else ""
        body.append(f'<tr{mark}><th scope="row">{swatch}{_text(first)}</th>{columns}</tr>')
    caption = "Best first. Every method had the same data in the same order and the same number of steps."
    return (
        f'<div class="scroll"><table><caption>{caption}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _notes(notes: Sequence[str]) -> str:
    return f'<ul class="hint">{"".join(f"<li>{_text(note)}</li>" for note in notes)}</ul>' if notes else ""


def _metric_title(runs: Sequence[Run]) -> str:
    return f"{str(runs[0]['metric']).capitalize()} on the test data"


def _metric_hint(runs: Sequence[Run]) -> str:
    better = "Higher is better." if runs[0]["greater_is_better"] else "Lower is better."
    seeds = len({run["seed"] for run in runs})
    return f"{better} Line: mean of {seeds} seeds, band: worst to best." if seeds > 1 else f"{better} One seed."


def _recompositions(runs: Sequence[Run], draw: Any) -> list[tuple[str, str, Any]]:
    """One picture for each method whose runs carry events; the first seed stands for all."""
    shown: dict[str, Run] = {}
    for run in runs:
        if run.get("events"):
            shown.setdefault(run["label"], run)
    hint = (
        "Pairs (slots) that were fused into the frozen part and started again on a new direction of W: left how often "
        "in all, right which of them at which step, coloured by how often it was by then. Point at a field for the "
        "directions."
    )
    return [(f"Recomposed pairs: {label}, seed {run['seed']}", hint, draw(run)) for label, run in shown.items()]


def _making(runs: Sequence[Run], command: str) -> str:
    made_by = f"<p>Command</p><pre>{_text(command)}</pre>" if command else ""
    titles = ("method", "seed", "learning rate", "batch size", "steps", "seconds", "set-up", "options")
    rows = [
        (
            run["label"],
            run["seed"],
            f"{run['learning_rate']:g}",
            run["batch_size"],
            run["steps"],
            f"{run['seconds']:.0f}",
            f"{run['setup_seconds']:.1f} s" if "setup_seconds" in run else "-",
            ", ".join(f"{key}={value}" for key, value in run["options"].items()) or "defaults",
        )
        for run in runs
    ]
    versions = sorted(runs[0]["versions"].items())
    return f"{made_by}{_details('Every run', titles, rows)}{_details('Versions', ('package', 'version'), versions)}"


def _details(summary: str, titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f'<th scope="col">{_text(title)}</th>' for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<details><summary>{_text(summary)}</summary><div class="scroll"><table class="plain">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{content}</section>"


def _text(value: Any) -> str:
    return html.escape(str(value))


def _resource(name: str) -> str:
    return resources.files("loratlas.train").joinpath(name).read_text(encoding="utf-8")
