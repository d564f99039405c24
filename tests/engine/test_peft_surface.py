"""PEFT's surface as users call it: mixed batches, patterns, saved modules, renaming, compile, checkpointing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn
from toys import METHODS, Toy, adapted, config, inputs, train, trainable, view, views
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from loratlas import AtlasLoraConfig, SRLoraConfig, UserError
from loratlas.engine.export import export_lora, export_merged

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def bert(labels: int = 3) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=labels, **SIZES)).eval()


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "embedding"])
@pytest.mark.parametrize("name", METHODS)
def test_every_row_of_a_mixed_batch_takes_its_adapter(name: str, kind: str) -> None:
    model, x = adapted(name, kind), inputs(kind)
    train(model, x, steps=6, total=10)
    model.add_adapter("b", config(name, r=2))
    model.set_adapter("b")
    train(model, x, steps=6, total=10)
    model.eval()
    single = {}
    for adapter in ("default", "b"):
        model.set_adapter(adapter)
        single[adapter] = model(x)
    with model.disable_adapter():
        single["__base__"] = model(x)
    names = ["b", "default", "__base__", "default", "b", "__base__"]
    mixed = model(x, adapter_names=names)
    for row, wanted in enumerate(names):
        torch.testing.assert_close(mixed[row], single[wanted][row], rtol=1e-5, atol=1e-5)


def test_ranks_and_alphas_of_single_modules(tmp_path: Path) -> None:
    options = {"rank_pattern": {"second": 2}, "alpha_pattern": {"second": 8.0}, "r_target": 8}
    model, x = adapted("srlora", **options), inputs()
    assert [t.A.shape[0] for t in views(model)] == [4, 2]
    assert [t.scaling for t in views(model)] == [1.0, 4.0]
    train(model, x, steps=10)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Toy(), tmp_path)
    assert [t.scaling for t in views(again)] == [1.0, 4.0]
    assert torch.equal(again(x), model(x))


def test_a_renamed_adapter_is_the_same_adapter(tmp_path: Path) -> None:
    model, x = adapted("srlora"), inputs()
    train(model, x, steps=10)
    y = model(x)
    model.base_model.rename_adapter("default", "mine")
    model.set_adapter("mine")
    assert torch.equal(model(x), y)
    assert list(model.peft_config) == ["mine"]
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Toy(), tmp_path / "mine")(x), y)


def test_all_linear_leaves_the_head_to_be_saved_whole(tmp_path: Path) -> None:
    model = get_peft_model(bert(), SRLoraConfig(target_modules="all-linear", task_type="SEQ_CLS", r=2))
    adapted_names = {name.split(".base_layer")[0] for name, _ in model.named_modules() if name.endswith(".base_layer")}
    assert not any("classifier" in name for name in adapted_names)
    assert len(adapted_names) == 2 * 6 + 1
    with torch.no_grad():
        model.base_model.model.classifier.weight.add_(1.0)
    ids = torch.randint(0, 40, (3, 5))
    y = model(ids).logits
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(bert(), tmp_path).eval()(ids).logits, y, rtol=0, atol=0)


def test_low_memory_loading_gives_the_same_bits(tmp_path: Path) -> None:
    for name in METHODS:
        model, x = adapted(name), inputs()
        train(model, x, steps=10)
        model.save_pretrained(tmp_path / name)
        again = PeftModel.from_pretrained(Toy(), tmp_path / name, low_cpu_mem_usage=True)
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("name", METHODS)
def test_gradient_checkpointing_changes_no_gradient(name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=16)).eval()
        cfg = config(name, r=2, r_target=4) if name.startswith("srlora") else config(name, r=2)
        cfg.target_modules = {"c_attn", "c_proj", "c_fc"}
        model = get_peft_model(net, cfg)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
            model.train()
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        ids = torch.arange(12).reshape(2, 6)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in trainable(model)])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_compile_without_graph_breaks(name: str) -> None:
    model, x = adapted(name), inputs()
    train(model, x, steps=5, total=10)
    expected = model(x)
    expected.square().mean().backward()
    grads = [p.grad.clone() for p in trainable(model)]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    y.square().mean().backward()
    for p, grad in zip(trainable(model), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)


def test_targets_that_match_nothing_list_what_could_be_meant() -> None:
    with pytest.raises(
        UserError, match=r"target_modules \(thrid\) match no module of Toy .*: first, second\."
    ) as caught:
        get_peft_model(Toy(), SRLoraConfig(target_modules=["thrid"]))
    assert isinstance(caught.value, NoMatchingPeftModuleError)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_layers_that_cannot_be_adapted_are_named() -> None:
    with pytest.raises(UserError, match=r"conv.*grouped convolutions \(groups=2\)"):
        get_peft_model(Grouped(), SRLoraConfig(target_modules=["conv"], r=2))
    bag = nn.ModuleDict({"bag": nn.EmbeddingBag(5, 4)})
    with pytest.raises((UserError, ValueError), match="bag"):
        get_peft_model(bag, AtlasLoraConfig(target_modules=["bag"]))


def saved(tmp_path: Path) -> Path:
    model = adapted("srlora")
    train(model, inputs(), steps=10)
    model.save_pretrained(tmp_path)
    return tmp_path / "adapter_model.safetensors"


def test_a_file_cut_short_is_one_sentence(tmp_path: Path) -> None:
    file = saved(tmp_path)
    content = file.read_bytes()
    for length in [*range(40), *range(40, len(content), len(content) // 60), len(content) - 1]:
        file.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"adapter_model\.safetensors is (cut short|damaged)"):
            PeftModel.from_pretrained(Toy(), tmp_path)
    file.write_bytes(content + b"x")
    with pytest.raises(UserError, match="is damaged"):
        PeftModel.from_pretrained(Toy(), tmp_path)


def test_a_file_for_another_model_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    saved(tmp_path)
    wide = nn.ModuleDict({"first": nn.Linear(20, 30), "second": nn.Linear(30, 10)})
    with pytest.raises(UserError, match=r"first.* has shape \(4, 12\), but this model and config need \(4, 20\)"):
        PeftModel.from_pretrained(wide, tmp_path)
    only = nn.ModuleDict({"first": nn.Linear(12, 16), "other": nn.Linear(16, 14)})
    with pytest.raises(UserError, match=r"tensors have no place in this model, the first is .*second"):
        PeftModel.from_pretrained(only, tmp_path)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "embedding"])
@pytest.mark.parametrize("name", METHODS)
def test_the_exported_lora_is_the_adapter(name: str, kind: str, tmp_path: Path) -> None:
    model, x = adapted(name, kind, lora_alpha=3.0, rank_pattern={"second": 2}), inputs(kind)
    train(model, x, steps=10)
    model.eval()
    report = export_lora(model, tmp_path / "lora")
    assert report.relative_error < 1e-6
    stock = PeftModel.from_pretrained(Toy(kind).eval(), tmp_path / "lora")
    stock_config = stock.peft_config["default"]
    assert stock_config.peft_type == "LORA"
    assert (stock_config.lora_alpha, stock_config.rank_pattern) == (stock_config.r, {})
    torch.testing.assert_close(stock(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_rank_limit_reports_its_error(tmp_path: Path) -> None:
    model, x = adapted("srlora", dtype=torch.float64), inputs(dtype=torch.float64)
    train(model, x, steps=20)
    deltas = [t.layer.get_delta_weight("default") for t in views(model)]
    total = sum(d.square().sum() for d in deltas)
    lost = sum(torch.linalg.svdvals(d)[3:].square().sum() for d in deltas)
    report = export_lora(model, tmp_path / "lora", rank=3, dtype=torch.float64)
    assert report.rank == 3
    assert report.relative_error == pytest.approx(float((lost / total).sqrt()), rel=1e-9)


def test_the_exported_model_needs_nothing(tmp_path: Path) -> None:
    net = bert()
    model = get_peft_model(copy.deepcopy(net), SRLoraConfig(target_modules=["query", "value"], r=2, r_target=6))
    ids = torch.randint(0, 40, (3, 5))
    train_bert(model, ids)
    model.eval()
    y = model(ids).logits
    export_merged(model, tmp_path / "merged")
    plain = BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(plain(ids).logits, y, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(ids).logits, y)
    with pytest.raises(UserError, match=r"no adapter 'other' \(adapters: default\)"):
        export_merged(model, tmp_path / "x", adapter_name="other")


def train_bert(model: PeftModel, ids: Tensor) -> None:
    from loratlas import attach

    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    attach(model, optimizer, total_steps=8)
    for _ in range(8):
        model(ids, labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_view_names_the_tensor_it_lacks() -> None:
    with pytest.raises(AttributeError, match="srlora declares no tensor 'C'"):
        view(adapted("srlora")).layer.store("C")
