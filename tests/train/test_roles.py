"""Who takes part in a run: named in one way or another it is the same run, and what cannot work is refused early."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from safetensors.torch import load_file
from toy_parts import catalogued
from transformers import AutoModelForSequenceClassification

from loratlas import UserError
from loratlas.analysis.adapter_folder import find_adapter
from loratlas.train.answer import Answerer
from loratlas.train.compare import compare
from loratlas.train.facts import Facts
from loratlas.train.progress import Progress
from loratlas.train.recipe import DEMO, Recipe
from loratlas.train.recipe_check import check, make, merged, placed
from loratlas.train.recipe_file import read_recipe, to_yaml
from loratlas.train.roles import cast, complete, with_defaults
from loratlas.train.run import RunSpec, run
from loratlas.train.work import Work


@pytest.fixture(autouse=True, scope="module")
def toys() -> Iterator[None]:
    with catalogued():
        yield


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    root = tmp_path_factory.mktemp("work")
    return Work(small.bert(root / "bert"), small.write_jsonl(root / "reviews.jsonl", small.reviews(80)))


def recipe(**values: Any) -> Recipe:
    return make({"model": DEMO, "data": DEMO, **values})


def spec(work: Work, out: Path, method: str, **settings: Any) -> RunSpec:
    return RunSpec(method, work.base, str(out), **{"steps": 6, "batch_size": 8, "learning_rate": 1e-2, **settings})


SAME = {
    "plus": {"method": "lora+toy-pairs+toy-scaled"},
    "fields": {"method": "lora", "optimizer": "toy-pairs", "objective": "toy-scaled"},
    "plain LoRA": {"method": "toy-scaled", "optimizer": "toy-pairs"},
    "any order": {"method": "toy-pairs+toy-scaled+lora"},
}


@pytest.mark.parametrize("how", SAME)
def test_one_cast_has_several_names(how: str) -> None:
    made = recipe(**SAME[how])
    assert (made.method, made.optimizer, made.objective, made.strategy) == ("lora", "toy-pairs", "toy-scaled", None)
    assert cast(made).name == "lora+toy-pairs+toy-scaled"
    assert cast(made).label == "LoRA + Toy-Pairs + Toy-Scaled"
    assert recipe(**{f: getattr(made, f) for f in ("method", "optimizer", "objective")}) == made


def test_pairs_are_known_without_a_model() -> None:
    assert cast(recipe(method="peft-lora+toy-pairs")).name == "peft-lora+toy-pairs"
    assert recipe(method="srlora+toy-pairs").optimizer == "toy-pairs"
    for slug in ("svfit", "nlora", "soka"):
        assert check({"model": DEMO, "data": DEMO, "method": f"{slug}+toy-pairs"})


def test_parts_that_train_the_base_are_methods() -> None:
    alone = recipe(method="toy-heavy", options={"momentum": 0.5})
    assert (alone.method, alone.optimizer, cast(alone).adapter) == ("toy-heavy", None, None)
    assert cast(alone).optimizer.options == {"momentum": 0.5}
    both = recipe(method="toy-scaled", strategy="toy-first", optimizer="toy-heavy", optimizer_options={"momentum": 0.1})
    assert (both.method, both.optimizer, both.strategy) == ("toy-heavy", None, "toy-first")
    assert both.options == {"momentum": 0.1}
    assert cast(both).name == "toy-heavy+toy-scaled+toy-first"
    assert cast(recipe(method="lora+toy-heavy")).adapter is not None  # an optimizer takes what there is to train


REFUSED = {
    "a strategy of the base": (
        {"method": "lora+toy-first"},
        "strategy",
        "toy-first trains the base model's own weights",
    ),
    "no pairs": ({"method": "svfit+toy-pairs"}, "optimizer", "which svfit does not train"),
    "no adapter": ({"method": "toy-first+toy-pairs"}, "optimizer", "but toy-first trains no adapter"),
    "two optimizers": ({"method": "toy-heavy", "optimizer": "toy-pairs"}, "optimizer", "both of kind optimizer"),
    "two adapters": ({"method": "lora+srlora"}, "method", "both of kind adapter"),
    "another kind": ({"method": "lora", "optimizer": "toy-scaled"}, "optimizer", "of kind objective"),
    "unknown": ({"method": "lora", "objective": "toy-scale"}, "objective", "did you mean toy-scaled"),
    "planned": ({"method": "lora+toy-planned"}, "method", "toy-planned is planned"),
    "option": (
        {"method": "toy-pairs", "optimizer_options": {"momentun": 1}},
        "optimizer_options.momentun",
        "did you mean momentum?",
    ),
    "value": ({"method": "toy-heavy", "options": {"momentum": 2.0}}, "options.momentum", "must be in [0, 1)"),
    "type": ({"method": "toy-heavy", "options": {"momentum": "x"}}, "options.momentum", "must be a number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_loaded(case: str) -> None:
    values, field, message = REFUSED[case]
    problems = check({"model": DEMO, "data": DEMO, **values})
    assert [problem.name for problem in problems] == [field]
    assert message in problems[0].text


def test_options_go_where_their_slug_is() -> None:
    named = {"method": "srlora", "optimizer": "toy-pairs", "options": {"r": 4}}
    own = {"srlora": {"gamma": 0.5}, "toy-pairs": {"momentum": 0.2}}
    values = merged(named, placed(named, own))
    assert values["options"] == {"r": 4, "gamma": 0.5}
    assert values["optimizer_options"] == {"momentum": 0.2}
    assert placed({"method": "toy-pairs"}, {"lora": {"r": 2}}) == {"options": {"r": 2}}
    with pytest.raises(UserError, match=r"--set lora\.r: lora is not among the methods srlora, toy-pairs"):
        placed(named, {"lora": {"r": 2}})


def test_a_recipe_with_parts_survives_the_file(tmp_path: Path) -> None:
    made = with_defaults(recipe(method="srlora", optimizer="toy-pairs", objective="toy-scaled"))
    assert made.optimizer_options == {"momentum": 0.9}
    file = tmp_path / "r.yaml"
    file.write_text(to_yaml(made, "title"))
    assert read_recipe(file) == made
    changed = read_recipe(file, {"options": {"r": 2}}, {"toy-pairs": {"momentum": 0.0}})
    assert (changed.options["r"], changed.optimizer_options) == (2, {"momentum": 0.0})
    file.write_text("method: toy-heavy\nmodel: demo\ndata: demo\noptions:\n  momentum: 5\n")
    with pytest.raises(UserError, match=r"r\.yaml, line 5: HeavyConfig: momentum must be in"):
        read_recipe(file)


class Kill(Progress):
    """Ends a run in its fourth step, and keeps what was said before it."""

    facts: Facts | None = None

    def prepared(self, known: Facts) -> None:
        self.facts = known

    def step(self, step: int, loss: float) -> None:
        if step == 4:
            raise KeyboardInterrupt


CASTS = {
    "adapter, optimizer, objective": ("srlora+toy-pairs+toy-scaled", {"options": {"r": 2, "r_target": 8}}),
    "an optimizer of the base": ("toy-heavy", {"options": {"momentum": 0.5}, "weight_decay": 0.01}),
    "a strategy of the base": ("toy-first", {"gradient_accumulation": 2, "batch_size": 4}),
}


@pytest.mark.parametrize("case", CASTS)
def test_runs_are_whole_and_resume_bit_for_bit(case: str, work: Work, tmp_path: Path) -> None:
    method, settings = CASTS[case]
    loaded = work.load()
    whole = run(spec(work, tmp_path / "whole", method, **settings), loaded)
    broken = spec(work, tmp_path / "broken", method, save_every=3, **settings)
    with pytest.raises(KeyboardInterrupt):
        run(broken, loaded, Kill())
    resumed = run(broken, loaded, resume=True)
    assert resumed.history == whole.history
    folder = "adapter" if whole.adapter_dir else "model"
    files = list((tmp_path / "whole" / folder).glob("*.safetensors"))
    assert files
    for file in files:
        assert file.read_bytes() == (tmp_path / "broken" / folder / file.name).read_bytes()
    assert whole.method == cast(complete(broken)).name
    assert json.loads((tmp_path / "whole" / "result.json").read_text())["parts"] == whole.parts
    again = read_recipe(tmp_path / "whole" / "config.yaml")
    assert run(again.spec(str(tmp_path / "again"), work.base), loaded).history == whole.history
    other = spec(work, tmp_path / "broken", method, save_every=3, objective="toy-scaled", **settings)
    other.objective_options = {"factor": 2.0}
    with pytest.raises(UserError, match=r"objective(_options\.factor)? was "):
        run(other, loaded, resume=True)


def test_the_optimizer_and_the_objective_are_those_of_the_run(work: Work, tmp_path: Path) -> None:
    loaded = work.load()
    tripled = run(spec(work, tmp_path / "a", "lora+toy-heavy+toy-scaled", max_grad_norm=1e9), loaded)
    faster = run(spec(work, tmp_path / "b", "lora+toy-heavy", max_grad_norm=1e9, learning_rate=3e-2), loaded)
    assert tripled.history[0]["loss"] == pytest.approx(3 * faster.history[0]["loss"], rel=1e-6)
    # a tripled loss moves gradient descent as a tripled rate does; evaluations show the task's own loss
    ours, theirs = ([row["eval_loss"] for row in result.evals] for result in (tripled, faster))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert tripled.parts == {"toy-heavy": {"momentum": 0.9}, "toy-scaled": {"factor": 3.0}}
    card = (tmp_path / "a" / "adapter" / "README.md").read_text()
    for part in ("LoRA + Toy-Heavy + Toy-Scaled adapter of", "Optimizer: [Toy-Heavy", "of toy-scaled: `factor=3.0`"):
        assert part in card


def test_a_run_of_the_base_leaves_a_whole_model(work: Work, tmp_path: Path) -> None:
    heard = Kill()
    result = run(spec(work, tmp_path / "run", "toy-first", steps=3), work.load(), heard)
    assert heard.facts is not None
    assert heard.facts.sentences()[0].startswith("the base model's own weights train (")
    assert heard.facts.sentences()[1] == "the first half of 41 tensors trains"
    assert result.remarks == ["the first half has trained"]
    assert (result.adapter_dir, result.model_dir) == ("", str(tmp_path / "run" / "model"))
    base, trained = (load_file(Path(f) / "model.safetensors") for f in (work.base, result.model_dir))
    moved = [name for name in base if name in trained and not torch.equal(base[name], trained[name])]
    assert any("embeddings" in name for name in moved)
    assert not any("layer.1.output" in name for name in moved)
    model = AutoModelForSequenceClassification.from_pretrained(result.model_dir)
    assert model.config.id2label == {0: "no", 1: "yes"}
    with pytest.raises(UserError, match=r"run/model is a whole model, not an adapter: from_pretrained"):
        find_adapter(tmp_path / "run")
    answerer = Answerer(Path(result.model_dir))
    before, after = answerer.answer("a very good film")
    assert before is None or before.label in ("no", "yes")
    assert after.label in ("no", "yes")


def test_they_are_compared_with_each_other(work: Work, tmp_path: Path) -> None:
    template = spec(work, tmp_path, "", steps=2)
    methods = ["lora", "toy-pairs", "toy-heavy", "srlora+toy-scaled"]
    options = {"toy-heavy": {"momentum": 0.1}, "lora": {"r": 2}, "srlora": {"r": 2, "r_target": 4}}
    found = compare(methods, template, work, seeds=[0], options=options, grid=())
    assert [each.method for each in found.runs] == ["lora", "lora+toy-pairs", "toy-heavy", "srlora+toy-scaled"]
    assert [each.options for each in found.runs[:3]] == [{"r": 2}, {"r": 2}, {"momentum": 0.1}]
    assert found.baseline == "lora"
    assert found.to_dict()["rows"][1]["label"] == "LoRA + Toy-Pairs"
    times = [(tmp_path / name / "result.json").stat().st_mtime_ns for name in ("lora+toy-pairs", "toy-heavy")]
    compare(methods, template, work, seeds=[0], options=options, grid=(), resume=True)
    assert times == [(tmp_path / name / "result.json").stat().st_mtime_ns for name in ("lora+toy-pairs", "toy-heavy")]
    with pytest.raises(UserError) as error:
        compare(["svfit+toy-pairs", "lora+toy-first"], template, work, options={"loldu": {}}, overwrite=True)
    for message in ("which svfit does not train", "leaves frozen", "options are given for loldu"):
        assert message in str(error.value)
