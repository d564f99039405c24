"""The report is one file, complete, escaped, and shows every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loratlas import UserError
from loratlas.train import event_figures, figures, verdict_figures
from loratlas.train.report import write_report
from loratlas.train.wording import headings, ranked, row_cells, verdict_line


def run(method: str, label: str, seed: int, final: float, **more: Any) -> dict[str, Any]:
    steps = range(1, 11)
    return {
        "method": method,
        "label": label,
        "seed": seed,
        "metric": "accuracy",
        "greater_is_better": True,
        "final": final,
        "history": [{"step": step, "loss": 3.0 / step, "learning_rate": 0.1 * step} for step in steps],
        "evals": [{"step": 5, "accuracy": final / 2}, {"step": 10, "accuracy": final}],
        "trainable_parameters": 12345,
        "step_seconds": 0.25,
        "learning_rate": 1e-3,
        "batch_size": 8,
        "steps": 10,
        "seconds": 4.0,
        "options": {"r": 2},
        "versions": {"torch": "2"},
        **more,
    }


def verdict(why: str, **more: Any) -> dict[str, Any]:
    found = {"winner": None, "leader": "srlora", "runner_up": None, "lead": None, "better": ["srlora"], "worse": []}
    return {**found, "why": why, **more}


def comparison() -> dict[str, Any]:
    event = {"step": 4, "layer": "a.query", "slots": [0, 3], "old_dirs": [0, 3], "new_dirs": [4, 5]}
    later = {**event, "step": 7, "slots": [0], "old_dirs": [4], "new_dirs": [6]}
    state = {"layer": "a.query", "events": 2, "directions_used": 7, "directions_total": 7}
    state["slot_directions"] = [6, 1, 2, 5]
    fresh = [{"step": 4, "ages": [1, 2, 3], "factors": [0.5, 1.0, 1.0]}, {"step": 7, "ages": [1], "factors": [0.5]}]
    runs = [
        run("lora", "LoRA", 0, 0.5),
        run("lora", "LoRA", 1, 0.6),
        run("srlora", "SR<b>LoRA", 0, 0.7, events=[event, later], recomposition=[state], fresh=fresh),
        run("srlora", "SR<b>LoRA", 1, 0.8, events=[event]),
    ]
    shared = {"trainable_parameters": 12345, "relative_step_time": 1.0, "peak_memory_bytes": 3 * 2**30}
    row = {**shared, "learning_rate": 1e-3, "forgetting": None}
    gain = {"mean": 0.2, "half": 0.05, "n": 2, "p": 0.01, "p_holm": 0.01}
    rows = [
        {**row, "method": "lora", "label": "LoRA", "values": [0.5, 0.6], "steps_to_baseline": 10}
        | {"interval": {"mean": 0.55, "half": 0.6, "n": 2}, "difference": None},
        {**row, "method": "srlora", "label": "SR<b>LoRA", "values": [0.7, 0.8], "steps_to_baseline": None}
        | {"interval": {"mean": 0.75, "half": 0.6, "n": 2}, "difference": gain},
    ]
    searched = [run("lora", "LoRA", 2000, 0.4, learning_rate=rate) for rate in (1e-3, 1e-2)]
    return {
        "task": "reviews & more",
        "metric": "accuracy",
        "greater_is_better": True,
        "baseline": "lora",
        "notes": ["One <note>."],
        "rows": rows,
        "runs": runs,
        "search_runs": searched,
        "noise_runs": [run("lora", "LoRA", 1000, 0.51)],
        "rates": {"lora": 1e-3, "srlora": 1e-3},
        "noise": {"level": 0.03, "difference": {"mean": 0.01, "half": 0.2, "n": 2}},
        "verdict": verdict("winner", winner="srlora"),
    }


def test_the_page_is_complete_and_loads_nothing(tmp_path: Path) -> None:
    path = write_report(comparison(), tmp_path / "report.html", "loratlas compare 'a b'")
    page = path.read_text()
    assert "<script src=" not in page
    assert "<link" not in page
    assert page.count("<h2>") == 9
    assert "<summary>Learning-rate search</summary>" in page
    assert "Winner: SR&lt;b&gt;LoRA (+0.2000 ± 0.0500) beats LoRA." in page
    assert "SR<b>LoRA" not in page.replace("\\u003c", "<!")
    assert "SR&lt;b&gt;LoRA" in page
    assert "One &lt;note&gt;." in page
    assert "loratlas compare &#x27;a b&#x27;" in page
    assert page.index("SR&lt;b&gt;LoRA</th>") < page.index("LoRA</th><td>0.5500")


def test_where_ranks_move_the_leaderboard_says_what_is_used() -> None:
    value = comparison()
    value["rows"][1]["used_parameters"] = 4321
    place = headings(value).index("trainable parameters (used / room)")
    assert [row_cells(value, row)[place] for row in ranked(value)] == ["4,321 / 12,345", "12,345"]


def test_the_words_of_the_leaderboard() -> None:
    value = comparison()
    assert headings(value) == [
        "method",
        "accuracy",
        "difference to lora",
        "learning rate",
        "trainable parameters",
        "steps to the final accuracy of lora",
        "step time (LoRA = 1)",
        "peak memory",
    ]
    best, second = ranked(value)
    cells = ["SR<b>LoRA", "0.7500 ± 0.6000", "+0.2000 ± 0.0500", "0.001", "12,345", "not reached", "1.00", "3.00 GiB"]
    assert row_cells(value, best) == cells
    single = {"interval": {"mean": 0.5, "half": None}, "relative_step_time": None, "peak_memory_bytes": None}
    cells = ["0.5000", "-", "0.001", "12,345", "10", "-", "-"]
    assert row_cells(value, {**second, **single})[1:] == cells
    lost = {**best, "values": [0.9, None]}
    assert ranked({**value, "rows": [lost, second]})[1] is lost
    assert row_cells(value, lost)[1] == "not finite"
    assert [row["method"] for row in ranked({**value, "greater_is_better": False})] == ["lora", "srlora"]
    assert "learning rate" not in headings({**value, "rates": {}})
    forgot = {"metric": "spearman", "before": 0.8, "after": 0.7, "change": {"mean": -0.1, "half": 0.02}}
    value["rows"][1]["forgetting"] = forgot
    assert headings(value)[-1] == "forgetting (spearman)"
    assert row_cells(value, best)[-1] == "0.8000 to 0.7000 (-0.1000 ± 0.0200)"


def test_every_verdict_is_a_sentence() -> None:
    value = comparison()
    assert verdict_line(value) == "Winner: SR<b>LoRA (+0.2000 ± 0.0500) beats LoRA."
    third = {**value["rows"][1], "method": "pissa", "label": "PiSSA"}
    three = {**value, "rows": [*value["rows"], third]}
    lead = {"mean": 0.01, "half": 0.05}
    gain = "SR<b>LoRA (+0.2000 ± 0.0500)"
    said = {
        "one method": "",
        "one seed": "No winner: one seed gives no interval. Three seeds or more do.",
        "incomplete": "No winner: no run of the baseline LoRA came to an end.",
        "no difference": "No winner: no method is better than LoRA beyond what other seeds explain.",
        "noise": f"No winner: the gain of {gain} over LoRA is not above the noise floor of 0.0300.",
        "tie": f"No winner: {gain} beats LoRA, but is not told apart from PiSSA (+0.0100 ± 0.0500).",
    }
    for why, words in said.items():
        assert verdict_line({**three, "verdict": verdict(why, runner_up="pissa", lead=lead)}) == words
    won = {**three, "noise": None, "verdict": verdict("winner", runner_up="pissa", lead=lead, worse=["pissa"])}
    assert verdict_line(won) == (
        f"Winner: {gain} beats LoRA and PiSSA, the next best (+0.0100 ± 0.0500). The noise floor is "
        "unknown: the baseline was not run again. Worse than LoRA: PiSSA (+0.2000 ± 0.0500)."
    )


def test_the_forest_and_the_search() -> None:
    value = comparison()
    (point,) = verdict_figures.forest_figure(value).data
    assert (list(point.x), list(point.error_x.array), list(point.y)) == ([0.2], [0.05], ["SR&lt;b&gt;LoRA"])
    band = next(shape for shape in verdict_figures.forest_figure(value).layout.shapes if shape.type == "rect")
    assert (band.x0, band.x1) == (-0.03, 0.03)
    curve, ring = verdict_figures.search_figure(value).data
    assert (list(curve.x), list(curve.y)) == ([1e-3, 1e-2], [0.4, 0.4])
    assert list(ring.x) == [1e-3]


def test_figures_show_what_the_runs_hold() -> None:
    runs = comparison()["runs"]
    assert figures.smooth([1.0, 3.0], 2) == pytest.approx([1.0, (0.25 * 1 + 0.5 * 3) / 0.75])
    metric = figures.metric_figure(runs, "lora")
    lines = {trace.name: list(trace.y) for trace in metric.data if trace.mode == "lines+markers"}
    assert lines == {"LoRA": pytest.approx([0.275, 0.55]), "SR&lt;b&gt;LoRA": pytest.approx([0.375, 0.75])}
    often, when = figures.recomposition_figure(runs[2]).data
    assert [list(row) for row in often.z] == [[2, 0, 0, 1]]
    assert often.customdata[0][0] == "a.query, slot 0<br>step 4: direction 0 to 4<br>step 7: direction 4 to 6"
    # a block of four slots and a gap for each of the steps 4 and 7; the number is the how-manieth time it is
    assert [list(row) for row in when.z] == [[1, None, None, 1, None, 2, None, None, None, None]]
    assert when.customdata[0][5] == "a.query, slot 0<br>step 7: direction 4 to 6"


def test_directions_are_drawn_from_the_start_on() -> None:
    (heat,) = event_figures.direction_figure(comparison()["runs"][2]).data
    assert list(heat.x) == [0, 4, 7, 10]
    assert [list(row) for row in heat.z[:4]] == [[0, 4, 6], [1, 1, 1], [2, 2, 2], [3, 5, 5]]
    assert heat.customdata[0][1] == "a.query, slot 0, direction 4<br>after steps 4 to 6"


def test_events_are_marked_and_fresh_pairs_have_their_rate() -> None:
    chosen = comparison()["runs"][2]
    figure = event_figures.event_figure(chosen)
    assert {shape.x0 for shape in figure.layout.shapes} == {4, 7}
    rates = {trace.name: trace for trace in figure.data}["of pairs that have started again"]
    assert list(rates.x) == [5, 6, 7, 7, 8, 8]
    assert list(rates.y) == [0.25, pytest.approx(0.6), pytest.approx(0.7), None, 0.4, None]
    plain = event_figures.event_figure({**chosen, "fresh": []})
    assert {trace.name for trace in plain.data} == {None, "loss, smoothed", "accuracy"}


def test_ranks_are_drawn_for_as_long_as_they_lasted(tmp_path: Path) -> None:
    moved = [
        {"layer": "a.0.query", "steps": [0, 3, 7], "ranks": [1, 3, 4]},
        {"layer": "a.1.<b>", "steps": [0, 7], "ranks": [1, 2]},
    ]
    grown = run("increlora", "IncreLoRA", 0, 0.6, ranks=moved)
    (heat,) = figures.rank_figure(grown).data
    assert list(heat.x) == [0, 3, 7, 10]
    assert [list(row) for row in heat.z] == [[1, 3, 4], [1, 1, 2]]
    assert heat.customdata[0][1] == "a.0.query, rank 3<br>after steps 3 to 6"
    value = comparison()
    plain = write_report(value, tmp_path / "plain.html").read_text()
    page = write_report({**value, "runs": [*value["runs"], grown]}, tmp_path / "grown.html").read_text()
    assert "<h2>Rank of each layer: IncreLoRA, seed 0</h2>" in page
    assert "a.1.<b>" not in page.replace("\\u003c", "<!")
    assert "Rank of each layer" not in plain


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished run"):
        write_report({**comparison(), "runs": []}, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())
