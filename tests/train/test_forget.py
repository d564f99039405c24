"""A forget set beside the rows: in every batch, in the recipe, exact on resume, and refused where it has no use."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from datasets import Dataset
from torch.utils.data import BatchSampler
from typer.testing import CliRunner

from loratlas import UserError
from loratlas.cli import app
from loratlas.train.beside import InTurn, joined
from loratlas.train.compare import compare
from loratlas.train.data import TaskData
from loratlas.train.progress import Progress
from loratlas.train.recipe import Recipe
from loratlas.train.recipe_file import read_recipe
from loratlas.train.run import RunSpec, run
from loratlas.train.stop import Stop, Stopped
from loratlas.train.work import Work


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    root = tmp_path_factory.mktemp("work")
    keep = [{"text": "the very good film a fine book"} for _ in range(60)]
    forget = [{"text": "not a poor film the very bad book"} for _ in range(22)]
    data, beside = small.write_jsonl(root / "keep.jsonl", keep), small.write_jsonl(root / "forget.jsonl", forget)
    return Work(small.gpt(root / "gpt"), data, task="causal-lm", max_length=8, forget=beside)


def spec(work: Work, out: Path, **settings: Any) -> RunSpec:
    fields = {"steps": 30, "batch_size": 4, "learning_rate": 2e-2, "objective": "loku", "options": {"r": 4}}
    return RunSpec("lora", work.base, str(out), **{**fields, **settings})


def adapter(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


def order(epoch: int, rows: int = 10, others: int = 7) -> list[int]:
    sampler = InTurn(SeedableRandomSampler(range(rows), data_seed=3), rows, others, seed=3)
    sampler.set_epoch(epoch)
    assert len(sampler) == 2 * rows
    return list(sampler)


def test_the_rows_keep_their_order_and_the_others_come_in_turn() -> None:
    epochs = [order(epoch) for epoch in range(7)]
    for epoch, found in enumerate(epochs):
        alone = SeedableRandomSampler(range(10), data_seed=3)
        alone.set_epoch(epoch)
        assert found[::2] == list(alone)
    others = [number for found in epochs for number in found[1::2]]
    for start in range(0, 70, 7):
        assert sorted(others[start : start + 7]) == list(range(10, 17))
    assert others[:7] != others[7:14]
    assert order(4) == epochs[4]


def test_ranks_share_the_order_in_batches_of_both() -> None:
    batches = [
        list(BatchSamplerShard(BatchSampler(InTurn(range(12), 12, 5, 0), 4, False), 2, rank)) for rank in range(2)
    ]
    together = [number for pair in zip(*batches, strict=True) for batch in pair for number in batch]
    assert together == list(InTurn(range(12), 12, 5, 0))
    assert all(sum(number >= 12 for number in batch) == 2 for rank in batches for batch in rank)


def test_the_column_says_which_rows_are_which() -> None:
    found = joined(Dataset.from_dict({"x": [1, 2]}), Dataset.from_dict({"x": [3]}), "forget")
    assert found["forget"] == [False, False, True]


def test_a_run_forgets_the_one_and_keeps_the_other(work: Work, tmp_path: Path) -> None:
    bottomless = {"forget_loss": "ascent"}  # the model knows nothing yet that a hinge could push down
    result = run(spec(work, tmp_path / "run", objective_options=bottomless), work.load())
    assert result.forget["rows"] == len(work.load().forget)
    kept = [row["nll"] for row in result.evals]
    assert result.forget["after"] > result.forget["before"] + 0.2
    assert kept[-1] < result.forget["before"]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["forget"] == result.forget
    recipe = read_recipe(tmp_path / "run" / "config.yaml")
    assert recipe.work() == replace(work, metric="perplexity")
    assert recipe.objective == "loku"


def test_it_goes_on_exactly(work: Work, tmp_path: Path) -> None:
    """Three epochs of rows, and more than one of the others; stopped in the second epoch."""
    whole = run(spec(work, tmp_path / "whole"), work.load())

    class At(Progress):
        def step(self, step: int, loss: float) -> None:
            stop.requested = stop.requested or step == 17

    stop = Stop()
    with pytest.raises(Stopped):
        run(spec(work, tmp_path / "cut"), work.load(), At(), stop=stop)
    again = run(spec(work, tmp_path / "cut"), work.load(), resume=True)
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")
    assert again.forget == whole.forget

    def other() -> TaskData:
        found = work.load()
        found.forget = found.forget.select(range(3))
        return found

    stop.requested = False
    with pytest.raises(UserError, match=r"forget was .* and is .*3 rows"):
        run(spec(work, tmp_path / "cut"), other(), resume=True)


def test_fila_starts_on_both_sets(work: Work, tmp_path: Path) -> None:
    options = {"r": 2, "init_weights": "fila"}
    result = run(spec(work, tmp_path / "run", steps=2, calibrate_steps=2, options=options), work.load())
    assert result.forget["after"] != result.forget["before"]
    alone = replace(work, forget=None).load()
    with pytest.raises(UserError, match="lora needs a forget set beside the training rows: give it with --forget"):
        run(spec(work, tmp_path / "other", objective=None, options=options), alone)


def test_a_comparison_may_hold_runs_without_a_use_for_it(work: Work, tmp_path: Path) -> None:
    plain = spec(work, tmp_path / "both", objective=None, steps=2)
    result = compare(["lora", "lora+loku"], plain, work, seeds=[0], grid=[], noise_floor=False)
    assert [each.forget["rows"] > 0 for each in result.runs] == [True, True]
    with pytest.raises(UserError, match="lora has no use for it"):
        compare(["lora"], replace(plain, output_dir=str(tmp_path / "one")), work, seeds=[0], grid=[])


def test_batches_carry_as_many_of_both(work: Work, tmp_path: Path) -> None:
    task, seen = work.load(), Counter[tuple[int, ...]]()
    collate = task.collator

    def watching(rows: list[dict[str, Any]]) -> Any:
        if "forget" in rows[0]:
            seen[tuple(int(row["forget"]) for row in rows)] += 1
        return collate(rows)

    task.collator = watching
    run(spec(work, tmp_path / "run", steps=5, batch_size=2), task)
    assert set(seen) == {(0, 1, 0, 1)}


REFUSED = {
    "objective alone": (["--objective", "loku"], "loku needs a forget set beside the training rows: give it with --fo"),
    "set alone": (["--forget", "FORGET"], "forget is given, but lora has no use for it"),
    "no texts": (["--objective", "loku", "--forget", "LABELLED", "--task", "causal-lm"], "forget set has no column"),
    "nothing there": (["--objective", "loku", "--forget", "absent.jsonl"], "there is no file or folder absent.jsonl"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused(case: str, work: Work, tmp_path: Path) -> None:
    words, message = REFUSED[case]
    labelled = small.write_jsonl(tmp_path / "labelled.jsonl", [{"review": "good"}] * 20)
    named = [{"FORGET": str(work.forget), "LABELLED": labelled}.get(word, word) for word in words]
    place = ["--model", str(work.model), "--data", str(work.data), "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(app, ["train", "lora", *place, *named], env={"COLUMNS": "300"})
    assert found.exit_code == 2
    assert message in " ".join(found.stderr.split())


def test_a_forget_set_needs_rows_to_keep() -> None:
    found = CliRunner().invoke(app, ["train", "lora", "--objective", "loku", "--model", "m", "--forget", "f.jsonl"])
    assert found.exit_code == 2
    assert "--data missing: --forget is a set beside the rows to keep" in " ".join(found.stderr.split())


def test_a_recipe_without_one_says_none() -> None:
    assert Recipe("lora", "m", "d").work().forget is None
