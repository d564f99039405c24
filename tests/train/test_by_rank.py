"""One adapter at every rank: the table holds what the ranks' exports score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import small

from loratlas import UserError, set_rank
from loratlas.analysis.adapter_folder import read_adapter
from loratlas.engine.export import export_lora
from loratlas.train.adapted import load_adapted
from loratlas.train.by_rank import RankTable
from loratlas.train.measure import measured
from loratlas.train.run import RunSpec, run
from loratlas.train.spec import training_arguments
from loratlas.train.work import Work


def trained(tmp_path: Path, method: str, **options: Any) -> tuple[RunSpec, Any, Any]:
    base = small.bert(tmp_path / "bert", dropout=0.0)
    task = Work(base, small.write_jsonl(tmp_path / "d.jsonl", small.reviews(80))).load()
    spec = RunSpec(method, base, str(tmp_path / "run"), steps=12, batch_size=8, learning_rate=2e-2, options=options)
    run(spec, task)
    return spec, task, read_adapter(tmp_path / "run")


def test_nested_ranks_are_those_that_were_trained(tmp_path: Path) -> None:
    spec, task, folder = trained(tmp_path, "dylora", r=4, eval_rank=2)
    table = RankTable(folder, task, spec)
    rows = list(table.rows())
    assert table.found.nested
    assert [row.rank for row in rows] == [1, 2, 3, 4]
    assert [row.relative_error for row in rows] == [0.0] * 4
    assert [row.bytes for row in rows] == sorted({row.bytes for row in rows})
    model, arguments = load_adapted(folder), training_arguments(spec, task, 1.0)
    for row in rows:
        set_rank(model, row.rank)
        own = measured(model, task, arguments, task.test)
        assert row.metrics == pytest.approx(own, rel=1e-4, abs=1e-5)
    assert len({round(row.metrics["eval_loss"], 5) for row in rows}) == 4


def test_an_export_at_a_rank_is_the_adapter_at_that_rank(tmp_path: Path) -> None:
    _, _, folder = trained(tmp_path, "dylora", r=4)
    model = load_adapted(folder)
    report = export_lora(model, tmp_path / "lora", rank=2, verify=True)
    assert (report.rank, report.exact_rank, report.relative_error) == (2, 2, 0.0)
    assert report.verification.output_difference < 1e-5
    assert export_lora(model, tmp_path / "whole").rank == 4  # the model is at its own rank again


def test_what_cannot_be_evaluated_is_refused(tmp_path: Path) -> None:
    spec, task, folder = trained(tmp_path, "bone", r=4)
    with pytest.raises(UserError, match="has no LoRA form"):
        RankTable(folder, task, spec)
    rows = [{**row, "label": row["label"].upper()} for row in small.reviews(80)]
    other = Work(spec.model, small.write_jsonl(tmp_path / "other.jsonl", rows)).load()
    with pytest.raises(UserError, match="have the classes NO, YES"):
        RankTable(folder, other, spec)
