"""Exports as plain LoRA: what servers accept, what stock PEFT computes, what is refused."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toys import KINDS, TARGETS, Toy, adapted, config, inputs, train, trainable, view
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from loratlas import AtlasLoraConfig, SRLoraConfig, UserError
from loratlas.engine import clean_process, export, reload
from loratlas.engine.config import AtlasConfig
from loratlas.engine.export import export_lora
from loratlas.engine.method import Method, View
from loratlas.engine.registry import adapter
from loratlas.engine.serving import check_folder, max_lora_rank, padded_rank

WEIGHTS = "adapter_model.safetensors"


def moved(model: nn.Module, size: float = 0.1) -> Any:
    """`model` with everything trainable moved away from its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in trainable(model):
            p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * size)
    return model.eval()


def bert(labels: int = 3) -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=labels, **sizes)).eval()


def gpt() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(vocab_size=30, bos_token_id=0, eos_token_id=0, **sizes)).eval()


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def test_ranks_are_padded_to_what_servers_take() -> None:
    sizes = (1, 8, 9, 16, 17, 128, 200, 257, 321, 512, 513)
    assert [padded_rank(r) for r in sizes] == [8, 8, 16, 16, 32, 128, 256, 320, 512, 512, 513]
    assert [max_lora_rank(r) for r in sizes] == [1, 8, 16, 16, 32, 128, 256, 320, 512, 512, None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["lora", "pissa", "srlora"])
def test_the_folder_has_the_form_that_servers_read(name: str, kind: str, tmp_path: Path) -> None:
    model = adapted(name, kind, lora_alpha=3.0, rank_pattern={"second": 2}, alpha_pattern={"second": 5.0})
    train(model, inputs(kind), steps=10)
    report = export_lora(model, tmp_path / "lora", check="vllm")
    assert report.rank <= report.padded_rank == report.max_lora_rank
    written = read_config(tmp_path / "lora")
    assert written["r"] == written["lora_alpha"] == report.padded_rank in (8, 16, 32)
    assert sorted(written["target_modules"]) == TARGETS
    empty = ("rank_pattern", "alpha_pattern", "modules_to_save", "use_rslora", "use_dora", "exclude_modules")
    assert not any(written[field] for field in empty)
    assert written["bias"] == "none"
    tensors = load_file(tmp_path / "lora" / WEIGHTS)
    for key, tensor in tensors.items():
        assert tensor.shape[0 if "A" in key.rpartition("lora_")[2] else 1] == report.padded_rank
    assert check_folder(tmp_path / "lora", "vllm") == check_folder(tmp_path / "lora", "sglang") == []
    stock = PeftModel.from_pretrained(Toy(kind), tmp_path / "lora").eval()
    model.eval()
    torch.testing.assert_close(stock(inputs(kind)), model(inputs(kind)), rtol=1e-4, atol=1e-5)


def test_a_rank_that_no_server_takes_is_kept_and_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(520, 530, bias=False))
    model = moved(get_peft_model(net, AtlasLoraConfig(r=515, target_modules=["0"])))
    report = export_lora(model, tmp_path / "lora")
    assert (report.rank, report.padded_rank, report.max_lora_rank) == (515, 515, None)
    assert any("vLLM refuses rank 515" in remark for remark in report.remarks)
    assert check_folder(tmp_path / "lora", "sglang") == []
    with pytest.raises(UserError, match="r is 515, above the 512"):
        export_lora(model, tmp_path / "lora", check="vllm")
    cut = export_lora(model, tmp_path / "lora", rank=500, check="vllm")
    assert (cut.rank, cut.exact_rank, cut.padded_rank, cut.remarks) == (500, 515, 512, ())


@pytest.mark.parametrize("name", ["lora", "srlora"])
def test_gpt2_with_its_transposed_weights(name: str, tmp_path: Path) -> None:
    cfg = config(name, r=2, target_modules=["c_attn", "c_proj"])
    model, ids = moved(get_peft_model(gpt(), cfg)), torch.arange(12).reshape(2, 6)
    export_lora(model, tmp_path / "lora", check="vllm")
    assert read_config(tmp_path / "lora")["fan_in_fan_out"] is True
    stock = PeftModel.from_pretrained(gpt(), tmp_path / "lora")
    torch.testing.assert_close(stock(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(stock(ids).logits, gpt()(ids).logits, atol=1e-2)


# ------------------------------------------------------------------------------------------- heads and biases


def classifier(**options: Any) -> PeftModel:
    cfg = SRLoraConfig(r=2, r_target=4, target_modules=["query", "value"], task_type="SEQ_CLS", **options)
    return moved(get_peft_model(bert(), cfg))


def test_heads_inside_for_peft_and_beside_for_servers(tmp_path: Path) -> None:
    model, ids = classifier(), torch.arange(5)[None]
    y = model(ids).logits
    inside = export_lora(model, tmp_path / "inside")
    assert any("holds classifier" in remark for remark in inside.remarks)
    stock = PeftModel.from_pretrained(bert(), tmp_path / "inside").eval()
    torch.testing.assert_close(stock(ids).logits, y, rtol=1e-4, atol=1e-5)

    beside = export_lora(model, tmp_path / "beside", heads="beside", check="vllm")
    assert beside.heads == ("classifier",)
    assert beside.remarks == ()
    head = tmp_path / "beside" / "head"
    assert json.loads((head / "head.json").read_text())["modules"] == ["classifier"]
    base = bert()
    outcome = base.load_state_dict(load_file(head / "model.safetensors"), strict=False)
    assert outcome.unexpected_keys == []
    stock = PeftModel.from_pretrained(base, tmp_path / "beside").eval()
    torch.testing.assert_close(stock(ids).logits, y, rtol=1e-4, atol=1e-5)


def test_a_failed_check_writes_nothing_and_says_what_to_do(tmp_path: Path) -> None:
    model = classifier()
    export_lora(model, tmp_path / "lora", heads="beside")
    before = (tmp_path / "lora" / WEIGHTS).read_bytes()
    with pytest.raises(UserError, match=r"3 of its points fail(.|\n)*--heads beside(.|\n)*classifier\.bias"):
        export_lora(model, tmp_path / "lora", check="vllm")
    assert (tmp_path / "lora" / WEIGHTS).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_trained_biases_stay_inside(tmp_path: Path) -> None:
    model, x = moved(adapted("lora", bias="atlas_only")), inputs()
    export_lora(model, tmp_path / "lora")
    torch.testing.assert_close(PeftModel.from_pretrained(Toy(), tmp_path / "lora")(x), model(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="trained biases, which have no place in a served LoRA: export merged"):
        export_lora(model, tmp_path / "served", heads="beside")
    with pytest.raises(UserError, match=r"bias is 'lora_only': trained biases"):
        export_lora(model, tmp_path / "served", check="sglang")
    assert not (tmp_path / "served").exists()


# -------------------------------------------------------------------------------------------- precision and form


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [None, 3])
def test_the_error_of_a_precision_is_measured(rank: int | None, dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted("srlora")
    train(model, inputs(), steps=20)
    report = export_lora(model, tmp_path / "lora", rank=rank, dtype=dtype)
    tensors = load_file(tmp_path / "lora" / WEIGHTS)
    assert {t.dtype for t in tensors.values()} == {dtype}
    lost = total = 0.0
    for name in TARGETS:
        delta = view(model, name).layer.get_delta_weight("default").double()
        down, up = (tensors[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "AB")
        lost, total = lost + (delta - up @ down).square().sum(), total + delta.square().sum()
    assert report.relative_error == pytest.approx(float((lost / total).sqrt()), rel=1e-3)
    assert report.relative_error > 1e-4
    assert report.dtype == str(dtype).removeprefix("torch.")


def test_numbers_that_the_file_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = moved(adapted("lora"))
    with torch.no_grad():
        view(model, "second").B[0, 0] = 1e6
        with pytest.raises(UserError, match=r"module second: .* beyond torch\.float16; export it in torch\.bfloat16"):
            export_lora(model, tmp_path / "lora", dtype=torch.float16)
        view(model, "second").B[0, 0] = float("nan")
    with pytest.raises(UserError, match="module second: the adapter holds NaN"):
        export_lora(model, tmp_path / "lora")


class Gain(Method):
    name = "test-gain"
    kinds = ("linear",)
    params = ("g",)
    additive = False

    def shapes(self, cfg: Any, r: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
        return {"g": (n_out, 1)}

    def init(self, t: View, weight: Any) -> None:
        nn.init.ones_(t.g)

    def merged(self, t: View, weight: Tensor) -> Tensor:
        return weight * t.g.to(weight.dtype)


@adapter(Gain())
@dataclass
class GainConfig(AtlasConfig):
    """W' = g * W."""


def test_a_method_without_a_lora_form_says_which_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(Toy(), GainConfig(target_modules=["first"]))
    with pytest.raises(UserError, match=r"module first: test-gain changes W .*no LoRA form: ship the adapter's own"):
        export_lora(model, tmp_path / "lora")
    monkeypatch.setattr(Gain, "name", "bone")  # the catalogue knows this one
    with pytest.raises(UserError, match=r"bone changes W .*no LoRA form: export it as merged weights"):
        export_lora(model, tmp_path / "lora")


MISTAKES: dict[str, dict[str, Any]] = {
    "rank must be at least 1": {"rank": 0},
    "dtype must be one of": {"dtype": torch.int8},
    "heads must be 'inside' or 'beside'": {"heads": "outside"},
    "component must be one of unet": {"component": "vae"},
    "check must be one of vllm": {"check": "tgi"},
}


@pytest.mark.parametrize("message", MISTAKES)
def test_options_are_checked(message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        export_lora(adapted("lora"), tmp_path / "lora", **MISTAKES[message])


# ------------------------------------------------------------------------------------------------ format checks


def tampered(folder: Path, change: Any) -> Path:
    export_lora(moved(adapted("lora")), folder)
    tensors, fields = load_file(folder / WEIGHTS), read_config(folder)
    change(tensors, fields)
    save_file(tensors, folder / WEIGHTS)
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


A, B = "base_model.model.first.lora_A.weight", "base_model.model.first.lora_B.weight"
TAMPERINGS: dict[str, tuple[Any, str]] = {
    "B is gone": (lambda t, c: t.pop(B), f"{B} is missing beside {A}"),
    "another rank": (lambda t, c: t.update({A: t[A][:3].clone()}), f"{A} has rank 3, but all modules need the rank 8"),
    "not finite": (lambda t, c: t[A].fill_(float("inf")), f"{A} holds numbers that are not finite"),
    "a magnitude": (lambda t, c: t.update({"x.lora_magnitude_vector": t[A][0].clone()}), "x.lora_magnitude_vector is"),
    "not targeted": (lambda t, c: c.update(target_modules=["second"]), f"{A} belongs to no entry of target_modules"),
    "no tensor": (lambda t, c: c["target_modules"].append("third"), "target_modules names third"),
    "rank pattern": (lambda t, c: c.update(rank_pattern={"first": 2}), "rank_pattern is {'first': 2}"),
    "alpha pattern": (lambda t, c: c.update(alpha_pattern={"first": 2}), "alpha_pattern is {'first': 2}"),
    "rslora": (lambda t, c: c.update(use_rslora=True), "use_rslora is True"),
    "dora": (lambda t, c: c.update(use_dora=True), "use_dora is True"),
    "regex": (lambda t, c: c.update(target_modules=".*first"), "target_modules is the pattern '.*first'"),
    "no alpha": (lambda t, c: c.pop("lora_alpha"), "lora_alpha is missing in adapter_config.json"),
    "another method": (lambda t, c: c.update(peft_type="LOHA"), "peft_type is LOHA, not LORA"),
}


@pytest.mark.parametrize("case", TAMPERINGS)
def test_a_check_names_the_tensor_or_the_field(case: str, tmp_path: Path) -> None:
    change, message = TAMPERINGS[case]
    faults = check_folder(tampered(tmp_path / "lora", change), "vllm")
    assert any(fault.startswith(message) for fault in faults), faults


def test_a_check_says_everything_at_once(tmp_path: Path) -> None:
    def everything(tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
        tensors.pop(B)
        fields.update(use_rslora=True, bias="all")

    assert len(check_folder(tampered(tmp_path / "lora", everything), "sglang")) == 3
    with pytest.raises(UserError, match="there is no check for 'tgi'"):
        check_folder(tmp_path / "lora", "tgi")


def test_a_lora_of_stock_peft_can_be_checked(tmp_path: Path) -> None:
    get_peft_model(Toy(), LoraConfig(r=4, target_modules=list(TARGETS))).save_pretrained(tmp_path)
    assert check_folder(tmp_path, "vllm") == []
    get_peft_model(Toy(), LoraConfig(r=4, target_modules=list(TARGETS), use_dora=True)).save_pretrained(tmp_path)
    assert len(check_folder(tmp_path, "vllm")) == 3  # the field and two magnitude vectors


def test_a_component_of_a_diffusion_pipeline(tmp_path: Path) -> None:
    model = moved(adapted("srlora", "conv2d"))
    with pytest.raises(UserError, match=r"pytorch_lora_weights\.safetensors is missing: export with a component"):
        export_lora(model, tmp_path / "lora", check="diffusers")
    export_lora(model, tmp_path / "lora", component="unet", check="diffusers")
    peft = load_file(tmp_path / "lora" / WEIGHTS)
    diffusers = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert set(diffusers) == {name.replace("base_model.model", "unet") for name in peft}
    save_file(peft, tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert len(check_folder(tmp_path / "lora", "diffusers")) == len(peft) + len(TARGETS)


# ---------------------------------------------------------------------------------------------- clean process


class Mixed(nn.Module):
    """One layer of every kind, and a name that ends like an adapted one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(30, 12, padding_idx=0)
        self.mix = nn.ModuleDict({"line": nn.Linear(12, 16), "turned": Conv1D(14, 16)})
        self.image = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.other = nn.ModuleDict({"image": nn.Conv2d(3, 4, 1)})

    def forward(self, ids: Tensor) -> Tensor:
        return self.mix["turned"](self.mix["line"](self.words(ids)))


def mixed() -> PeftModel:
    names = ["words", "line", "turned", "image"]
    model = get_peft_model(Mixed(), AtlasLoraConfig(r=4, target_modules=names, exclude_modules=["other.image"]))
    return moved(model)


def test_a_clean_process_finds_every_layer_as_it_was_exported(tmp_path: Path) -> None:
    found = export_lora(mixed(), tmp_path / "lora", verify=True).verification
    assert found is not None
    assert found.layers == 4
    assert found.layer_difference < 1e-5
    assert (found.output_difference, found.remark) == (None, "Mixed is not a class of transformers")


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work of the clean process without the seconds that a process takes to start."""

    def run(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        clean_process.main(words[-1])
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(reload.subprocess, "run", run)
    monkeypatch.setattr(clean_process, "sys", SimpleNamespace(modules={}))


@pytest.mark.usefixtures("in_this_process")
def test_what_peft_would_compute_otherwise_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(tensors: dict[str, Tensor], file: Path) -> None:
        tensors["base_model.model.image.lora_B.weight"] *= 2
        save_file(tensors, file)

    export_lora(mixed(), tmp_path / "lora")
    before = (tmp_path / "lora" / WEIGHTS).read_bytes()
    monkeypatch.setattr(export, "_save", careless)
    with pytest.raises(UserError, match=r"module image: stock PEFT computes something else .*1\.0e\+00"):
        export_lora(mixed(), tmp_path / "lora", verify=True)
    assert (tmp_path / "lora" / WEIGHTS).read_bytes() == before


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", ["inside", "beside"])
def test_the_whole_model_is_compared_where_its_base_is_on_disk(heads: str, dtype: torch.dtype, tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "base")
    net = BertForSequenceClassification.from_pretrained(tmp_path / "base", dtype=dtype)
    cfg = SRLoraConfig(r=2, r_target=4, target_modules="all-linear", task_type="SEQ_CLS")
    model = moved(get_peft_model(net, cfg)).train()
    found = export_lora(model, tmp_path / "lora", heads=heads, verify=True).verification
    assert found is not None
    assert found.output_difference is not None
    assert found.output_difference < (1e-6 if dtype == torch.float32 else 2e-2)
    assert model.training
    cut = export_lora(model, tmp_path / "cut", heads=heads, rank=1, verify=True).verification
    assert cut is not None
    assert cut.layer_difference < 1e-5
    assert cut.output_difference is not None
    assert cut.output_difference > 1e-2


@pytest.mark.usefixtures("in_this_process")
def test_a_base_that_is_not_the_one_on_disk_is_noticed(tmp_path: Path) -> None:
    gpt().save_pretrained(tmp_path / "base")
    net = GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        net.transformer.ln_f.weight.mul_(1.25)  # the logits on disk are 1 - 1/1.25 = 0.2 off
    model = moved(get_peft_model(net, AtlasLoraConfig(r=2, target_modules=["c_attn"])))
    untouched = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"other outputs .*relative difference 2\.0e-01, allowed are 1e-03"):
        export_lora(model, tmp_path / "lora", verify=True)
    assert not (tmp_path / "lora").exists()
    assert all(torch.equal(value, untouched[name]) for name, value in model.state_dict().items())
    shutil.rmtree(tmp_path / "base")
    found = export_lora(model, tmp_path / "lora", verify=True).verification
    assert found is not None
    assert found.output_difference is None
    assert found.remark.startswith("its base could not be loaded again (OSError")
