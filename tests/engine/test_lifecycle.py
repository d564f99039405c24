"""Steps are counted and seen once, whatever loop, scaler or interruption is around them."""

from __future__ import annotations

import copy
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from toys import Toy, adamw, adapted, config, goal, inputs, raw, train, trainable, view, views

from loratlas import Lifecycle, UserError, attach
from loratlas.engine.export import export_lora


def state(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: raw(tensor) for name, tensor in model.state_dict().items() if "ATLAS_" in name}


def test_accumulated_batches_are_one_step() -> None:
    whole, parts = adapted("srlora", dtype=torch.float64), adapted("srlora", dtype=torch.float64)
    x = inputs(dtype=torch.float64)
    y = goal(whole(x))
    for model, batches in ((whole, [slice(0, 6)]), (parts, [slice(0, 3), slice(3, 6)])):
        optimizer = adamw(model)
        attach(model, optimizer, total_steps=10)
        for _ in range(10):
            for rows in batches:
                ((model(x[rows]) - y[rows]).square().mean() / len(batches)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(views(parts), views(whole), strict=True):
        assert int(ours.step) == 10
        assert torch.equal(ours.log, theirs.log)
        torch.testing.assert_close(ours.A, theirs.A, rtol=1e-9, atol=1e-9)


def test_scores_see_unscaled_gradients_and_skipped_steps_do_not_count() -> None:
    scaled, plain, x = adapted("srlora"), adapted("srlora"), inputs()
    optimizer, scaler = adamw(scaled), torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    attach(scaled, optimizer, total_steps=10)
    for step in range(11):
        loss = (scaled(x) - goal(scaled(x))).square().mean()
        scaler.scale(loss * (float("inf") if step == 4 else 1.0)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    train(plain, x, steps=10)
    for ours, theirs in zip(views(scaled), views(plain), strict=True):
        assert int(ours.step) == 10
        assert torch.equal(ours.log, theirs.log)
        torch.testing.assert_close(ours.IA, theirs.IA, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(ours.A, theirs.A, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stop", [3, 4, 7])
@pytest.mark.parametrize("name", ["pissa", "srlora", "srlora-inplace"])
def test_a_plain_loop_resumes_bit_for_bit(name: str, stop: int, tmp_path: Path) -> None:
    x, base = inputs(), Toy()
    whole = get_peft_model(
        copy.deepcopy(base), config(name, optimizer_reset="corrected") if "sr" in name else config(name)
    )
    twin = copy.deepcopy(whole)
    train(whole, x, steps=10)
    optimizer = adamw(twin)
    train(twin, x, steps=stop, total=10, optimizer=optimizer)
    twin.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")

    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    optimizer = adamw(again)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(again, x, steps=10 - stop, total=999, optimizer=optimizer)  # the plan of the first run stands
    assert state(again) == state(whole)
    assert torch.equal(again(x), whole(x))


@pytest.mark.parametrize("name", ["srlora", "srlora-inplace"])
def test_a_checkpoint_of_the_whole_model_brings_grown_buffers(name: str) -> None:
    model, fresh, x = adapted(name), adapted(name), inputs()
    train(model, x, steps=10)
    fresh.load_state_dict(model.state_dict())
    assert state(fresh) == state(model)
    assert torch.equal(fresh(x), model(x))


def test_a_finished_adapter_starts_a_new_stage_on_request(tmp_path: Path) -> None:
    model, x = adapted("srlora"), inputs()
    train(model, x, steps=10)
    assert {int(t.step) for t in views(model)} == {10}
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=50, restart=True)
    assert {(int(t.step), int(t.total_steps)) for t in views(model)} == {(0, 50)}


SCRIPT = """
import hashlib, sys, torch
sys.path.insert(0, sys.argv[1])
from toys import Toy, inputs, raw
from peft import PeftModel
import loratlas
model = PeftModel.from_pretrained(Toy(), sys.argv[2])
print(hashlib.sha256(raw(model(inputs()))).hexdigest())
"""


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("name", ["lora", "srlora", "srlora-inplace"])
def test_a_fresh_process_gives_the_same_bits(name: str, steps: int, tmp_path: Path) -> None:
    model, x = adapted(name), inputs()
    train(model, x, steps=steps, total=20)
    model.save_pretrained(tmp_path)
    tests = str(Path(__file__).parent.parent)
    words = [sys.executable, "-c", SCRIPT, tests, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == hashlib.sha256(raw(model(x))).hexdigest()


def test_stock_peft_loads_the_export_in_a_process_without_us(tmp_path: Path) -> None:
    model, x = adapted("srlora"), inputs()
    train(model, x, steps=20)
    export_lora(model, tmp_path / "lora")
    torch.save({"x": x, "y": model(x).detach(), "base": Toy().state_dict()}, tmp_path / "values.pt")
    script = (
        "import sys, torch\nfrom torch import nn\nfrom peft import PeftModel\n"
        "class Plain(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 14, bias=False)\n"
        "    def forward(self, x):\n        return self.second(torch.tanh(self.first(x)))\n"
        "saved = torch.load(sys.argv[1] + '/values.pt', weights_only=True)\n"
        "base = Plain()\nbase.load_state_dict(saved['base'])\n"
        "y = PeftModel.from_pretrained(base, sys.argv[1] + '/lora')(saved['x'])\n"
        "assert not any(name.startswith('loratlas') for name in sys.modules)\n"
        "torch.testing.assert_close(y, saved['y'], rtol=1e-5, atol=1e-6)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_attach_is_idempotent_and_removable() -> None:
    model, optimizer = adapted("srlora"), None
    optimizer = adamw(model)
    lifecycle = attach(model, optimizer, total_steps=10)
    assert isinstance(lifecycle, Lifecycle)
    assert attach(model, optimizer, total_steps=10) is lifecycle
    train(model, inputs(), steps=2, total=10, optimizer=optimizer)
    assert int(view(model).step) == 2
    lifecycle.remove()
    model(inputs()).sum().backward()
    optimizer.step()
    assert int(view(model).step) == 2
    assert attach(model, optimizer, total_steps=10) is not lifecycle


def test_only_trained_adapters_take_part() -> None:
    model = adapted("srlora")
    model.add_adapter("second", config("srlora", r=2))
    model.set_adapter("second")
    train(model, inputs(), steps=10)
    assert int(view(model, adapter="second").events) > 0
    assert int(view(model, adapter="default").step) == 0


def test_what_cannot_work_is_refused() -> None:
    model = adapted("srlora")
    with pytest.raises(UserError, match=r"pass attach\(\.\.\., total_steps=N\)"):
        attach(model, adamw(model))
    with pytest.raises(UserError, match=r"does not hold the tensors of adapter 'default' in base_model\.model\.first"):
        attach(model, torch.optim.AdamW(trainable(model)[2:]), total_steps=10)
    with pytest.raises(UserError, match=r"needs a torch\.optim\.Optimizer, but got dict"):
        attach(model, {}, total_steps=10)  # type: ignore[arg-type]
    assert attach(Toy(), torch.optim.SGD(Toy().parameters()), total_steps=1).groups == []
