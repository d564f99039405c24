"""`report.html`: a comparison as one self-contained page that opens offline."""

from __future__ import annotations

import html
import importlib.util
import os
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from loratlas.errors import UserError
from loratlas.files import write_text
from loratlas.train.wording import headings, noise_line, ranked, row_cells, verdict_line

Run = dict[str, Any]
# with this the browser itself refuses whatever is not in the page
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_RECOMPOSED = (
    "Pairs (slots) that were fused into the frozen part and started again on a new direction of W: left how often in "
    "all, right which of them at which step, coloured by how often it was by then. Point at a field for the directions."
)
_DIRECTIONS = (
    "One line a slot, layer below layer, from the start of the run to its end, coloured by the number of the direction "
    "that it carries: a singular direction of W where pairs start again on those, else a running number."
)
_EVENTS = (
    "Dotted: the steps after which pairs start again. Below, the learning rate with which they then move, with their "
    "warm-up and Adam's young moments, beside that of the others; it follows from the options and is not measured."
)
_RANKS = "Training decides which layers get rank and when. Left to right: the steps of the run; the brighter, the more."
_RUN_TITLES = ("method", "seed", "learning rate", "batch size", "steps", "result", "seconds", "set-up", "options")


class Picture(NamedTuple):
    title: str
    hint: str
    figure: Any
    folded: bool = False


def write_report(comparison: dict[str, Any], path: str | os.PathLike[str], command: str = "") -> Path:
    """Write the report of `comparison` to `path`, atomically.

    Args:
        comparison: what `results.Comparison.to_dict` gives.
        command: the command line that produced it.

    The page holds the leaderboard with its verdict, differences to the baseline, loss and metric curves, costs, the
    learning-rate search, the command that produced it, versions and notes; for runs that carry `events` also heat maps
    of recompositions, directions over time and the curves around the events, and ranks over time for those that carry
    `ranks`. It loads nothing: plotly is inside.

    Raises:
        UserError: plotly is not installed, or the comparison has no runs.
    """
    check_plotly()
    from plotly.io import to_html

    from loratlas.train import event_figures, figures, verdict_figures

    runs = comparison["runs"]
    if not runs:
        raise UserError("the comparison holds no finished run, so there is nothing to report.")
    labels = list(figures.method_groups(runs))
    colors = {label: figures.color(index) for index, label in enumerate(labels)}
    pictures = [
        *_differences(comparison, verdict_figures.forest_figure),
        Picture("Training loss", "Faint: every batch. Strong: smoothed mean.", figures.loss_figure(runs)),
        Picture(_metric_title(runs), _metric_hint(runs), figures.metric_figure(runs, comparison["baseline"])),
        Picture("Result and cost", "Means over seeds.", figures.cost_figure(runs)),
        *_moved(runs, "events", "Recomposed pairs", _RECOMPOSED, figures.recomposition_figure),
        *_moved(runs, "recomposition", "Directions over time", _DIRECTIONS, event_figures.direction_figure),
        *_moved(runs, "events", "Around the events", _EVENTS, event_figures.event_figure),
        *_moved(runs, "ranks", "Rank of each layer", _RANKS, figures.rank_figure),
    ]
    if comparison["search_runs"]:
        hint = "Every method had the same grid, on rows held out of the training rows. A ring marks the rate taken."
        pictures.append(Picture("Learning-rate search", hint, verdict_figures.search_figure(comparison), folded=True))
    blocks = []
    for index, picture in enumerate(pictures):
        plot = to_html(
            picture.figure,
            full_html=False,
            include_plotlyjs=index == 0,
            default_height=f"{picture.figure.layout.height}px",
            config={"displaylogo": False, "responsive": True, "modeBarButtons": [["toImage", "resetScale2d"]]},
        )
        content = f'<p class="hint">{_text(picture.hint)}</p><figure>{plot}</figure>'
        blocks.append((_folded if picture.folded else _section)(picture.title, content))
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
{_section("Leaderboard", _leaderboard(comparison, colors) + _verdict(comparison) + _notes(comparison["notes"]))}
{"".join(blocks)}
{_section("How this was made", _making(comparison, command))}
<footer>Written by LoRAtlas. This page is complete in itself and loads nothing from the network.</footer>
<script>{_resource("report.js")}</script>
</body>
</html>
"""


def _leaderboard(comparison: dict[str, Any], colors: dict[str, str]) -> str:
    head = "".join(f'<th scope="col">{_text(title)}</th>' for title in headings(comparison))
    body = []
    for row in ranked(comparison):
        first, *cells = row_cells(comparison, row)
        swatch = f'<span class="swatch" style="background:{colors[row["label"]]}" aria-hidden="true"></span>'
        columns = "".join(f"<td>{_text(cell)}</td>" for cell in cells)
        mark = ' class="best"' if row["method"] == comparison["verdict"]["winner"] else ""
        body.append(f'<tr{mark}><th scope="row">{swatch}{_text(first)}</th>{columns}</tr>')
    caption = "Best mean first. Every method had the same data in the same order."
    return (
        f'<div class="scroll"><table><caption>{caption}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _verdict(comparison: dict[str, Any]) -> str:
    lines = [("verdict", verdict_line(comparison)), ("hint", noise_line(comparison))]
    return "".join(f'<p class="{name}">{_text(line)}</p>' for name, line in lines if line)


def _differences(comparison: dict[str, Any], draw: Any) -> list[Picture]:
    found = [row["difference"] for row in comparison["rows"] if row["difference"] is not None]
    if not found:
        return []
    better = "Right is better." if comparison["greater_is_better"] else "Left is better."
    pairs = "One seed, so no interval." if found[0]["half"] is None else "Lines: 95 % interval, paired by seed."
    return [Picture("Difference to the baseline", f"{better} {pairs}", draw(comparison))]


def _notes(notes: Sequence[str]) -> str:
    return f'<ul class="hint">{"".join(f"<li>{_text(note)}</li>" for note in notes)}</ul>' if notes else ""


def _metric_title(runs: Sequence[Run]) -> str:
    return f"{str(runs[0]['metric']).capitalize()} on the test data"


def _metric_hint(runs: Sequence[Run]) -> str:
    better = "Higher is better." if runs[0]["greater_is_better"] else "Lower is better."
    seeds = len({run["seed"] for run in runs})
    return f"{better} Line: mean of {seeds} seeds, band: worst to best." if seeds > 1 else f"{better} One seed."


def _moved(runs: Sequence[Run], field: str, title: str, hint: str, draw: Any) -> list[Picture]:
    """One picture for each method whose runs carry `field`; the first seed stands for all."""
    shown: dict[str, Run] = {}
    for run in runs:
        if run.get(field) and (field != "recomposition" or run.get("events")):
            shown.setdefault(run["label"], run)
    return [Picture(f"{title}: {label}, seed {run['seed']}", hint, draw(run)) for label, run in shown.items()]


def _making(comparison: dict[str, Any], command: str) -> str:
    runs = [*comparison["runs"], *comparison["noise_runs"]]
    made_by = f"<p>Command</p><pre>{_text(command)}</pre>" if command else ""
    searched = comparison["search_runs"]
    tables = _details("Every run", _RUN_TITLES, _run_rows(runs))
    if searched:
        tables += _details("Every run of the learning-rate search", _RUN_TITLES, _run_rows(searched))
    versions = sorted(runs[0]["versions"].items())
    return f"{made_by}{tables}{_details('Versions', ('package', 'version'), versions)}"


def _run_rows(runs: Sequence[Run]) -> list[tuple[Any, ...]]:
    return [
        (
            run["label"],
            run["seed"],
            f"{run['learning_rate']:g}",
            run["batch_size"],
            run["steps"],
            "not finite" if run["final"] is None else f"{run['final']:.4f}",
            f"{run['seconds']:.0f}",
            f"{run['setup_seconds']:.1f} s" if "setup_seconds" in run else "-",
            ", ".join(f"{key}={value}" for key, value in run["options"].items()) or "defaults",
        )
        for run in runs
    ]


def _details(summary: str, titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f'<th scope="col">{_text(title)}</th>' for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<details><summary>{_text(summary)}</summary><div class="scroll"><table class="plain">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{content}</section>"


def _folded(title: str, content: str) -> str:
    return f"<section><details><summary>{_text(title)}</summary>{content}</details></section>"


def _text(value: Any) -> str:
    return html.escape(str(value))


def _resource(name: str) -> str:
    return resources.files("loratlas.train").joinpath(name).read_text(encoding="utf-8")
