"""The catalogue is complete, consistent and searchable."""

from __future__ import annotations

import re

import pytest

from loratlas import UserError
from loratlas.catalog import KINDS, baselines, find, load_entry, systems
from loratlas.engine.config import AtlasConfig
from loratlas.engine.parts import Part

SLUGS = """
allora ba-lora block-lora bone break-for-make clora cmlora codyra dct-adamw decor diffora dylora fedsvd fira galore
gamma-mod hydra icm-lora increlora intruder-dimensions lamda lisa loku lolcats loldu lora-ga lora-ggpo lora-lego
lora-limits lora-mixer lora-pro lora-sb loram loraprune lt-sft m2mkd master-asr nlora nola orthogonal-adaptation
peft-reranking pego pela petalface randlora salt sltrain smora soka sora srlora svfit tlora trans-lora triadaptlora wara
"""


def test_it_holds_the_56_systems() -> None:
    assert len(SLUGS.split()) == 56
    assert sorted(row.slug for row in systems()) == sorted(SLUGS.split())
    assert len({row.paper for row in systems()}) == 56
    beside = ["lora", "pissa", "srlora-gradient", "peft-lora", "lora-xs", "miss", "lora-plus"]
    assert [row.slug for row in baselines()] == beside


@pytest.mark.parametrize("row", [*systems(), *baselines()], ids=lambda row: row.slug)
def test_rows_are_complete(row) -> None:
    assert re.fullmatch(r"\d{4}\.\d{5}", row.paper)
    assert 2021 <= row.year <= 2026
    assert row.kind in KINDS
    assert row.summary.endswith(".")
    assert len(row.summary) <= 140
    assert set(row.exports) <= {"lora", "merged", "native", "none"}
    assert row.exports
    assert row.row()["status"] == row.status


@pytest.mark.parametrize("row", [*systems(status="implemented"), *baselines()], ids=lambda row: row.slug)
def test_implemented_entries_build_a_config(row) -> None:
    if row.kind in ("optimizer", "objective", "strategy"):
        part = load_entry(row)(**row.options)
        assert isinstance(part, Part)
        assert part.name == row.slug
        return
    config = load_entry(row)(r=4, target_modules=["q"], **row.options)
    assert config.r == 4
    assert isinstance(config, AtlasConfig) or row.slug == "peft-lora"


def test_filters() -> None:
    assert [row.slug for row in systems("srlora")] == ["srlora"]
    assert {row.slug for row in systems("lora*")} >= {"lora-ga", "lora-sb", "lora-pro", "lora-lego"}
    assert {row.kind for row in systems(kind="optimizer")} == {"optimizer"}
    done = {row.slug for row in systems(status="implemented")}
    assert done >= {"lamda", "loldu", "lora-ga", "lora-sb", "nlora", "srlora", "svfit"}
    assert not {row.slug for row in systems(status="planned") if row.entry}
    with pytest.raises(UserError, match="no kind 'adaptor'"):
        systems(kind="adaptor")


def test_unknown_names_get_a_suggestion_and_planned_ones_a_sentence() -> None:
    with pytest.raises(UserError, match=r"did you mean .*srlora"):
        find("srlroa")
    with pytest.raises(UserError, match="loratlas methods"):
        find("zzzzzzzz")
    with pytest.raises(UserError, match="m2mkd is planned"):
        load_entry(find("m2mkd"))
