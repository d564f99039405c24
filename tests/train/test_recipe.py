"""Recipes: exact to the file and back, every mistake at once with its line, complete, and in step with what runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftType
from transformers import SchedulerType

from loratlas import UserError
from loratlas.catalog import baselines, find, load_entry, systems
from loratlas.train.methods import default_options, option_fields, option_problems, option_values
from loratlas.train.recipe import DEMO, PARTS, SCHEDULERS, Recipe
from loratlas.train.recipe_check import check, make
from loratlas.train.recipe_file import read_recipe, to_yaml
from loratlas.train.roles import cast, with_defaults
from loratlas.train.run import RunSpec
from loratlas.train.work import Work
from loratlas.train.yaml_text import dump_value, parse_value

KINDS = ("adapter", *PARTS)
TRAINABLE = [system.slug for system in (*systems(status="implemented"), *baselines()) if system.kind in KINDS]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("slug", TRAINABLE)
def test_what_init_writes_is_what_a_run_without_options_does(slug: str, tmp_path: Path) -> None:
    recipe = with_defaults(make({"method": slug, "model": DEMO, "data": DEMO}))
    text = to_yaml(recipe, "title\n\nmore")
    assert read_recipe(written(tmp_path, text)) == recipe
    members = cast(recipe).members
    assert slug in {member.system.slug for member in members}
    for system, options, _ in members:
        assert options == default_options(system)
        assert option_problems(system, options) == []
        for field in option_fields(system):
            assert f"  {field.name}: " in text or f"  # {field.name}: null" in text or field.name not in options
    assert max(map(len, text.splitlines())) <= 120


NASTY = [
    1e-5,
    5e-324,
    "1e-3",
    "no",
    "~",
    " a: b # c",
    "x\ny",
    "é",
    [1e-3, "1e3"],
    {"a.b": [1.5, None, True]},
    "",
    "0x1f",
]


@pytest.mark.parametrize("value", NASTY, ids=repr)
def test_values_survive_the_file(value: Any) -> None:
    assert parse_value(dump_value(value)) == value
    assert "\n" not in dump_value(value)


def test_subclasses_are_written_as_what_they_are() -> None:
    assert dump_value([np.float64(1e-3), PeftType.LORA, {"b", "a"}, True, (1,)]) == "[0.001, LORA, [a, b], true, [1]]"


def test_a_recipe_survives_the_file(tmp_path: Path) -> None:
    recipe = Recipe(
        "lora",
        "./m: #1",
        "data, yes.jsonl",
        text_columns=("a b", "null"),
        learning_rate=3e-05,
        report_to=("wandb",),
        max_grad_norm=1.0,
        options={"lora_alpha": None, "target_modules": ["q.*", "v"], "rank_pattern": {"x.1": 2}, "r": 4},
    )
    assert read_recipe(written(tmp_path, to_yaml(recipe, ""))) == recipe


def test_a_recipe_holds_every_setting_of_a_run_and_of_its_data() -> None:
    names = {field.name for field in dataclasses.fields(Recipe)}
    theirs = {field.name for cls in (RunSpec, Work) for field in dataclasses.fields(cls)}
    assert names == theirs - {"output_dir"}
    recipe = Recipe("lora", "m", DEMO, steps=7, text_columns=("t",), options={"r": 2})
    assert recipe.work() == Work("m", None, text_columns=("t",))
    spec = recipe.spec("out", "m")
    assert (spec.method, spec.model, spec.output_dir, spec.steps, spec.options) == ("lora", "m", "out", 7, {"r": 2})
    assert Recipe.resolved(spec, recipe.work()) == recipe


def test_all_mistakes_are_told_at_once_with_their_lines(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "method: srlora\nmodel: demo\nstep: 5\nbatch_size: many\nlr_scheduler: cosin\nwarmup: 2\nlimit: 1\nlimit: 0\n"
        "bf16: 1\noptions:\n  gama: 3\n  r: -1\n  beta1: 7\n  bias: 3\n  schedule: spread\n",
    )
    with pytest.raises(UserError) as error:
        read_recipe(path, {"steps": 0})
    first, *lines = str(error.value).splitlines()
    assert first == "13 mistakes:"
    assert lines == [
        f"  {path}, line 3: there is no field 'step': did you mean steps or test?",
        f"  {path}, line 4: batch_size must be an integer, but it is 'many'.",
        f"  {path}, line 5: lr_scheduler has no value 'cosin': did you mean cosine?",
        f"  {path}, line 6: warmup must be at least 0 and at most 1, but it is 2.",
        f"  {path}, line 8: limit is given twice.",
        f"  {path}, line 8: limit must be at least 1, but it is 0.",
        f"  {path}, line 9: bf16 must be true or false, but it is 1.",
        f"  {path}, line 11: srlora has no option 'gama': did you mean gamma?",
        f"  {path}, line 12: SRLoraConfig: r must be an integer of at least 1, but it is -1.",
        f"  {path}, line 13: SRLoraConfig: beta1 must be in [0, 1), but it is 7.",
        f"  {path}, line 14: srlora: bias must be text, but it is 3.",
        "  command line: steps must be at least 1, but it is 0.",
        f"  {path}: data is missing: give a file, a folder or a dataset of the hub, or demo.",
    ]


def test_the_command_line_comes_before_the_file(tmp_path: Path) -> None:
    path = written(
        tmp_path, "method: lora\nmodel: m\ndata: d\nsteps: 9\ntext_columns: one\noptions:\n  r: 4\n  seed: 3\n"
    )
    recipe = read_recipe(path, {"steps": 5, "options": {"r": 2}})
    assert recipe == Recipe("lora", "m", "d", text_columns=("one",), steps=5, options={"r": 2, "seed": 3})
    assert read_recipe(written(tmp_path, "method: lora\nmodel: m\ndata: d\noptions:\n")).options == {}


CONFLICTS = {
    "demo's test rows": ({"test": "x.csv"}, "test is for data of your own, but data is demo"),
    "demo's task": ({"task": "regression"}, "task is regression, but the texts of demo are for text-classification"),
    "metric of another task": ({"data": "d", "task": "causal-lm", "metric": "f1"}, "choose perplexity, nll"),
    "three texts": ({"data": "d", "text_columns": ["a", "b", "c"]}, "text_columns names 3 columns"),
    "label as text": ({"data": "d", "text_columns": "a", "label_column": "a"}, "is one of text_columns as well"),
    "label without use": ({"data": "d", "task": "causal-lm", "label_column": "a"}, "has no use for causal-lm"),
    "options of each other": ({"options": {"r": 8, "r_target": 4}}, "r_target must be at least r=8"),
    "planned method": ({"method": "m2mkd"}, "m2mkd is planned"),
    "no method": ({"method": "loar"}, "did you mean lora"),
    "not finite": ({"learning_rate": float("nan")}, "learning_rate must be above 0, but it is nan"),
}


@pytest.mark.parametrize("case", CONFLICTS)
def test_conflicts(case: str) -> None:
    values, message = CONFLICTS[case]
    problems = check({"method": "srlora", "model": DEMO, "data": DEMO, **values})
    assert len(problems) == 1
    assert message in problems[0].text


BROKEN = {"method: [": "line 1, column 10", "- a": "NAME: VALUE", "": "NAME: VALUE", "a: 2024-13-45": "month"}


@pytest.mark.parametrize("text", BROKEN)
def test_what_is_no_recipe(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"r.yaml cannot be read as YAML: .*{BROKEN[text]}"):
        read_recipe(written(tmp_path, text))
    with pytest.raises(UserError, match=r"there is no file .*absent\.yaml; `loratlas init METHOD --out"):
        read_recipe(tmp_path / "absent.yaml")


def test_one_mistake_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"^steps must be at least 1, but it is 0\.$"):
        make({"method": "lora", "model": DEMO, "data": DEMO, "steps": 0})


def test_the_schedules_are_ones_that_transformers_has() -> None:
    assert set(SCHEDULERS) <= {schedule.value for schedule in SchedulerType}


def test_options_of_a_configuration_leave_out_what_is_unset() -> None:
    config = load_entry(find("lora"))(lora_alpha=None, target_modules=["b", "a"], modules_to_save=None)
    values = option_values(find("lora"), config)
    assert values["lora_alpha"] is None  # its default is 8, so None says something
    assert values["target_modules"] == ["a", "b"]
    assert not {"modules_to_save", "initialized", "task_type"} & set(values)
