"""Hydra beyond the golden vectors: what each branch can do, biases through merging and export, several adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from toys import TARGETS, Toy, base_bytes, distance, inputs, train, trainable, view, views
from transformers import LlamaConfig, LlamaForCausalLM

from loratlas import AtlasLoraConfig, HydraConfig, UserError
from loratlas.engine.export import export_lora, export_merged

FP64 = torch.float64


def hydra(dtype: torch.dtype = FP64, steps: int = 8, **options: object) -> PeftModel:
    options = {"r": 2, "target_modules": list(TARGETS), **options}
    torch.manual_seed(1)
    model = get_peft_model(Toy(dtype=dtype), HydraConfig(**options))
    train(model, inputs(dtype=dtype), steps=steps)
    return model


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FP64)


OPTIONS = [
    {"branch_bias": True, "scaling": 1.5},
    {"r_parallel": 1, "r_sequential": 3, "lora_alpha": 4},
    {"learnable_scale": True, "init": "xavier"},
    {"r_parallel": 0, "branch_bias": True},
    {"r_sequential": 0, "init": "normal"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_merging_takes_the_bias_along_and_brings_it_back(options: dict[str, object]) -> None:
    model, x = hydra(**options), inputs(dtype=FP64)
    y, before = model(x), base_bytes(model)
    second = model.base_model.model.second
    assert second.get_base_layer().bias is None
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    assert (second.get_base_layer().bias is None) != bool(options.get("branch_bias"))
    model.unmerge_adapter()
    assert base_bytes(model) == before
    assert second.get_base_layer().bias is None
    plain = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(plain(x), y, rtol=1e-12, atol=1e-12)


def test_parameters_rank_and_the_learned_scale() -> None:
    model = hydra(r_parallel=1, r_sequential=3, branch_bias=True, learnable_scale=True)
    sizes = [1 * (n_in + n_out) + 2 * 3 * n_out + 1 + 3 + 2 * n_out + 1 for n_out, n_in in ((16, 12), (14, 16))]
    assert sum(p.numel() for p in trainable(model)) == sum(sizes)
    t = view(model)
    assert torch.linalg.matrix_rank(t.layer.method.delta_weight(t)) == 4
    assert float(t.gain) != 1.0


def test_without_a_sequential_branch_it_is_lora() -> None:
    ours = hydra(r_sequential=0, lora_alpha=4)
    theirs = get_peft_model(Toy(dtype=FP64), AtlasLoraConfig(r=2, lora_alpha=4, target_modules=list(TARGETS)))
    for t, u in zip(views(ours), views(theirs), strict=True):
        with torch.no_grad():
            u.A.copy_(t.A_par)
            u.B.copy_(t.B_par)
    x = inputs(dtype=FP64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_the_sequential_branch_reads_the_frozen_output() -> None:
    model, x, g = hydra(r=2, target_modules=["first"]), inputs(dtype=FP64), draw(6, 16)
    t = view(model)
    (t.layer(x) * g).sum().backward()
    h = t.layer.get_base_layer()(x)
    torch.testing.assert_close(t.A_seq.grad, (g @ t.B_seq).T @ h)
    torch.testing.assert_close(t.B_seq.grad, g.T @ (h @ t.A_seq.T))
    torch.testing.assert_close(t.A_par.grad, (g @ t.B_par).T @ x)


def test_what_each_branch_can_reach() -> None:
    weight = draw(16, 12, seed=1) @ draw(12, 16, seed=2) / 4  # its rows span 12 of 16 dimensions
    low = draw(16, 2, seed=3) @ draw(2, 16, seed=4) / 16
    outside = torch.linalg.svd(weight).Vh[12:14]
    within, beyond = weight + low @ weight, weight + draw(16, 2, seed=5) @ outside
    both = {"target_modules": ["0"]}
    parallel = HydraConfig(r_parallel=2, r_sequential=0, **both)
    sequential = HydraConfig(r_parallel=0, r_sequential=2, **both)
    assert distance(1500, sequential, within, weight) < 1e-4
    assert distance(1500, parallel, within, weight) < 1e-4
    assert distance(1500, parallel, beyond, weight) < 1e-4
    assert distance(300, sequential, beyond, weight) > 0.99


def test_several_adapters_all_read_the_frozen_output() -> None:
    model, x = hydra(branch_bias=True), inputs(dtype=FP64)
    model.add_adapter("second", HydraConfig(r=3, init_weights=False, target_modules=list(TARGETS)))
    model.base_model.set_adapter(["default", "second"])
    y, t = model.base_model.model.first(x), view(model)
    h = t.layer.get_base_layer()(x)
    one, other = (v.layer.method.branch(v, x, h, lambda z: z) for v in (t, view(model, adapter="second")))
    torch.testing.assert_close(y, h + one + other)
    every = model(x)
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    torch.testing.assert_close(model(x), every, rtol=1e-12, atol=1e-12)


def test_a_batch_may_mix_adapters() -> None:
    model, x = hydra(branch_bias=True), inputs(dtype=FP64)
    model.add_adapter("second", HydraConfig(r=3, init_weights=False, target_modules=list(TARGETS)))
    model.eval()
    mixed = model(x, adapter_names=["default", "second", "__base__"] * 2)
    torch.testing.assert_close(mixed[0::3], model(x[0::3]))
    model.set_adapter("second")
    torch.testing.assert_close(mixed[1::3], model(x[1::3]))
    torch.testing.assert_close(mixed[2::3], Toy(dtype=FP64)(x[2::3]))


def test_dropout_falls_between_down_and_up() -> None:
    model, x = hydra(lora_dropout=0.5, r_sequential=0, target_modules=["first"]), inputs(dtype=FP64)
    t = view(model)
    torch.manual_seed(3)
    y = t.layer(x)
    torch.manual_seed(3)
    hidden = nn.functional.dropout(x @ t.A_par.T, 0.5)
    torch.testing.assert_close(y, t.layer.get_base_layer()(x) + hidden @ t.B_par.T)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_exports_as_a_lora_with_biases_where_it_has_some(options: dict[str, object], tmp_path: Path) -> None:
    model, x = hydra(torch.float32, **options), inputs()
    report = export_lora(model, tmp_path / "lora")
    assert report.relative_error == 0.0
    stock = PeftModel.from_pretrained(Toy(), tmp_path / "lora")
    torch.testing.assert_close(stock(x), model(x), rtol=1e-5, atol=1e-5)
    biased = "r_sequential" not in options or options["r_sequential"] != 0
    assert stock.peft_config["default"].lora_bias is biased
    assert any("lora_bias" in remark for remark in report.remarks) is biased
    if biased:
        with pytest.raises(UserError, match="lora_bias is True"):
            export_lora(model, tmp_path / "served", check="vllm")


def test_a_clean_process_confirms_the_bias_and_a_cut_keeps_it(tmp_path: Path) -> None:
    model, x = hydra(torch.float32, branch_bias=True), inputs()
    assert export_lora(model, tmp_path, verify=True).relative_error == 0.0
    report = export_lora(model, tmp_path, rank=3, verify=True)
    assert 0.0 < report.relative_error < 1.0
    stock = PeftModel.from_pretrained(Toy(), tmp_path)
    bias = stock.base_model.model.first.lora_B["default"].bias
    torch.testing.assert_close(bias, view(model).layer.bias_delta(["default"]))
    assert (stock(x) - model(x)).abs().max() < 1.0


def llama(**options: object) -> PeftModel:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
    return get_peft_model(base, HydraConfig(r=2, init_weights=False, target_modules=["o_proj"], **options))


def test_merged_weights_that_would_lose_a_bias_are_not_written(tmp_path: Path) -> None:
    ids = torch.arange(8)[None]
    model = llama()
    export_merged(model, tmp_path / "merged")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match=r"o_proj has no bias, but the adapter adds one"):
        export_merged(llama(branch_bias=True), tmp_path / "biased")
    assert not (tmp_path / "biased").exists()


def test_only_a_sequential_branch_ties_it_to_its_base(tmp_path: Path) -> None:
    hydra(torch.float32).save_pretrained(tmp_path / "both")
    with pytest.raises(UserError, match=r"^module first: its weight is not the one that this adapter was trained on"):
        PeftModel.from_pretrained(Toy(seed=1), tmp_path / "both")
    hydra(torch.float32, r_sequential=0).save_pretrained(tmp_path / "parallel")
    PeftModel.from_pretrained(Toy(seed=1), tmp_path / "parallel")


def test_bad_input_is_named() -> None:
    for field, value in {"r_parallel": -1, "r_sequential": 0.5, "scaling": 0.0, "init": "zeros"}.items():
        with pytest.raises(UserError, match=f"^HydraConfig: {field} must be "):
            HydraConfig(**{field: value})
    with pytest.raises(UserError, match=r"^HydraConfig: r_sequential must be at least 1 where r_parallel is 0"):
        HydraConfig(r_parallel=0, r_sequential=0)
