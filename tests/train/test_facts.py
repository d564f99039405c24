"""What is said before a run is what holds after it; and the run leaves a recipe and a card that are true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from huggingface_hub import metadata_load

from loratlas import UserError
from loratlas.analysis.adapter_folder import read_adapter
from loratlas.catalog import find, systems
from loratlas.engine.export import export_lora
from loratlas.engine.model import atlas_layers
from loratlas.train.adapted import load_adapted
from loratlas.train.facts import Facts
from loratlas.train.progress import Progress
from loratlas.train.recipe_file import read_recipe
from loratlas.train.results import RunResult
from loratlas.train.run import RunSpec, run
from loratlas.train.work import Work

LAYERS = 13  # linear layers of the small encoder


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Work:
    root = tmp_path_factory.mktemp("work")
    return Work(small.bert(root / "bert"), small.write_jsonl(root / "reviews.jsonl", small.reviews(80)))


def train(work: Work, out: Path, method: str, progress: Progress | None = None, **settings: Any) -> RunResult:
    spec = RunSpec(method, work.base, str(out), **{"steps": 10, "batch_size": 4, **settings})
    return run(spec, work.load(), progress)


CASES = {
    "lora": ("lora", {"r": 3}, 3),
    "pissa": ("pissa", {"r": 3}, 6),
    # (12 - 2) / 1 events of one pair, but only 9 multiples of the interval before the end: 2 (2 + 9)
    "srlora": ("srlora", {"r": 2, "r_target": 12}, 22),
    "srlora at the layer's own rank": ("srlora", {"r": 8, "r_target": 32}, 32),
}


@pytest.mark.parametrize("case", CASES)
def test_the_announced_rank_is_that_of_the_export(case: str, work: Work, tmp_path: Path) -> None:
    method, options, rank = CASES[case]
    result = train(work, tmp_path / "run", method, options=options)
    assert result.export_rank == rank
    model = load_adapted(read_adapter(result.adapter_dir), work.base)
    assert export_lora(model, tmp_path / "lora").rank == rank


@pytest.mark.parametrize("slug", [s.slug for s in systems(kind="adapter", status="implemented")])
def test_no_export_needs_more_than_was_announced(slug: str, work: Work, tmp_path: Path) -> None:
    result = train(work, tmp_path / "run", slug, steps=3, options={"r": 2})
    model = load_adapted(read_adapter(result.adapter_dir), work.base)
    try:
        needed = export_lora(model, tmp_path / "lora").rank
    except UserError:
        assert result.export_rank is None
    else:
        assert result.export_rank is not None
        assert needed <= result.export_rank


def test_the_facts_are_told_before_the_first_step(work: Work, tmp_path: Path) -> None:
    told: list[Any] = []

    class Listen(Progress):
        def prepared(self, known: Facts) -> None:
            told.append(known)

        def step(self, step: int, loss: float) -> None:
            told.append(step)

    options = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"query": 2}}
    result = train(work, tmp_path / "run", "lora", Listen(), steps=1, options=options)
    known, first = told
    assert first == 1
    assert known == Facts(LAYERS, (0.5, 2.0), result.trainable_parameters, result.total_parameters, 4)
    assert known.sentences()[0].startswith(f"{LAYERS} modules adapted, scaling s = 0.5 to 2, ")
    assert known.sentences()[1] == "an exact LoRA export will have rank 4 (vLLM: --max-lora-rank 8)"
    peft = train(work, tmp_path / "peft", "peft-lora", steps=1, options={"r": 3, "lora_alpha": 3})
    assert (peft.adapted_modules, peft.scaling, peft.export_rank) == (LAYERS, (1.0, 1.0), 3)


def test_the_written_recipe_repeats_the_run_bit_for_bit(work: Work, tmp_path: Path) -> None:
    first = train(work, tmp_path / "run-a", "srlora", options={"r": 2})
    recipe = read_recipe(tmp_path / "run-a" / "config.yaml")
    assert (recipe.task, recipe.metric, recipe.max_length) == ("text-classification", "accuracy", 128)
    assert (recipe.learning_rate, recipe.eval_every) == (find("srlora").lr, 2)
    assert recipe.options["target_modules"] == "all-linear"
    again = recipe.work()
    second = run(recipe.spec(str(tmp_path / "run-b"), again.base), again.load())
    assert second.history == first.history
    files = [Path(each.adapter_dir) / "adapter_model.safetensors" for each in (first, second)]
    assert files[0].read_bytes() == files[1].read_bytes()
    texts = [(tmp_path / name / "config.yaml").read_text() for name in ("run-a", "run-b")]
    assert texts[0].replace("run-a", "run-b") == texts[1]


def test_the_card_is_complete_and_its_code_works(work: Work, tmp_path: Path) -> None:
    result = train(work, tmp_path / "run", "srlora", options={"r": 2})
    card = Path(result.adapter_dir) / "README.md"
    front, text = metadata_load(card), card.read_text()
    assert front["library_name"] == "peft"
    assert front["tags"] == ["peft", "loratlas", "srlora"]
    assert "base_model" not in front  # a folder here, which the hub would refuse
    assert "More Information Needed" not in text
    for part in ("2505.12433", "| accuracy | ", "exact with rank 16", "`r=2`", "torch 2", "Classes: no, yes"):
        assert part in text
    code = re.search(r"```python\n(.+?)```", text, re.DOTALL)
    assert code is not None
    scope: dict[str, Any] = {}
    exec(code[1].replace("path/to/this/folder", result.adapter_dir), scope)
    inputs = torch.tensor([[2, 4, 8]])
    other = load_adapted(read_adapter(result.adapter_dir))
    with torch.no_grad():
        torch.testing.assert_close(scope["model"].eval()(inputs).logits, other.eval()(inputs).logits, rtol=0, atol=0)


def test_reports_go_where_they_are_asked_to(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    logged: list[dict[str, float]] = []

    class Board(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            logged.append(kwargs["logs"])

    with pytest.raises(UserError, match="transformers reports to no 'tensorbored'"):
        train(work, tmp_path / "a", "lora", report_to=("tensorbored",))
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["wandb"])
    with pytest.raises(UserError, match="--report-to tensorboard needs a package that is not installed"):
        train(work, tmp_path / "b", "lora", report_to=("tensorboard",))
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Board)
    train(work, tmp_path / "c", "lora", steps=3, report_to=("wandb",))
    assert sum("loss" in row for row in logged) == 3


OF_A_RANK = {"increlora": lambda r: r, "triadaptlora": lambda r: 2 * r * r, "sora": lambda r: r, "diffora": lambda r: 0}


@pytest.mark.parametrize("slug", OF_A_RANK)
def test_where_ranks_move_the_ranks_in_use_are_counted_beside_their_room(slug: str, work: Work, tmp_path: Path) -> None:
    """A and B have in + out numbers a rank, and what else a method trains of a rank."""
    result = train(work, tmp_path / "run", slug, options={"r": 2}, steps=12)
    model = load_adapted(read_adapter(result.adapter_dir), work.base)
    used = room = 0
    for _, layer in atlas_layers(model, "default"):
        t = layer.view("default")
        rank = int(t.rank_log[-1, 1])
        used += rank * sum(t.op.shape) + OF_A_RANK[slug](rank)
        room += sum(getattr(t, name).numel() for name in layer.method.params)
    assert result.used_parameters == result.trainable_parameters - room + used
    if slug != "sora":  # whose gates may all stay open in so short a run
        assert result.used_parameters < result.trainable_parameters
    assert f"at the end are {result.used_parameters:,}" in (Path(result.adapter_dir) / "README.md").read_text()


def test_other_methods_and_older_files_say_nothing_of_it(work: Work, tmp_path: Path) -> None:
    result = train(work, tmp_path / "run", "lora", options={"r": 2}, steps=2)
    assert result.used_parameters is None
    older = {name: value for name, value in result.to_dict().items() if name not in ("used_parameters", "forget")}
    assert RunResult.from_dict(older).used_parameters is None
