"""The fused op: its gradients, its equality with the plain formula, and what it keeps in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys import adapted, config, inputs, train, view
from transformers.pytorch_utils import Conv1D

from loratlas import AtlasLoraConfig
from loratlas.engine import bitmask, fused
from loratlas.engine.factors import Factors
from loratlas.engine.fused import can_fuse, fused_linear
from loratlas.errors import UserError

N_IN, N_OUT, RANK, FROZEN = 9, 7, 3, 2


class Case:
    """Random operands of an update with or without a start, a frozen part and a bias."""

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        frozen: bool,
        bias: bool,
        start: bool = False,
        factor_dtype: torch.dtype | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, as_dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(as_dtype)

        own = factor_dtype or dtype
        self.x = draw(2, 4, N_IN).requires_grad_()
        self.weight = draw(N_OUT, N_IN)
        self.bias = draw(N_OUT).requires_grad_() if bias else None
        self.down, self.up = draw(RANK, N_IN, as_dtype=own).requires_grad_(), draw(N_OUT, RANK, as_dtype=own)
        self.up.requires_grad_()
        frozen_pair = draw(FROZEN, N_IN, as_dtype=own), draw(N_OUT, FROZEN, as_dtype=own)
        start_pair = draw(RANK, N_IN, as_dtype=own), draw(N_OUT, RANK, as_dtype=own)
        self.still = (*(frozen_pair if frozen else (None, None)), *(start_pair if start else (None, None)))
        self.g = draw(2, 4, N_OUT)

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.x, self.bias, self.down, self.up) if t is not None]

    def fused(self, dropout: float = 0.0) -> Tensor:
        return fused_linear(self.x, self.weight, self.bias, Factors(self.down, self.up, *self.still), dropout)

    def plain(self, keep: Tensor | None = None, dropout: float = 0.0) -> Tensor:
        x = self.x if keep is None else self.x * keep / (1 - dropout)
        down, up = Factors(self.down, self.up, *self.still).joined()
        branch = F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))
        return F.linear(self.x, self.weight, self.bias) + branch


CASES = [(frozen, bias, start) for frozen in (False, True) for bias in (False, True) for start in (False, True)]


@pytest.mark.parametrize(("frozen", "bias", "start"), CASES)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(frozen: bool, bias: bool, start: bool, dropout: float) -> None:
    case = Case(torch.float64, frozen=frozen, bias=bias, start=start)

    def function(*leaves: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same mask at every evaluation
        x, rest = leaves[0], leaves[1:]
        b, down, up = rest if bias else (None, *rest)
        return fused_linear(x, case.weight, b, Factors(down, up, *case.still), dropout)

    assert torch.autograd.gradcheck(function, case.leaves(), eps=1e-6, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(("frozen", "bias", "start"), CASES)
@pytest.mark.parametrize(
    ("dtype", "factor_dtype", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-13),
        (torch.float32, torch.float32, 2e-6),
        (torch.bfloat16, torch.float32, 2e-2),
        (torch.bfloat16, torch.bfloat16, 2e-2),
    ],
)
def test_equals_the_plain_formula(
    dtype: torch.dtype, factor_dtype: torch.dtype, tolerance: float, frozen: bool, bias: bool, start: bool
) -> None:
    case = Case(dtype, frozen=frozen, bias=bias, start=start, factor_dtype=factor_dtype)
    y = case.fused()
    assert y.dtype == dtype
    torch.testing.assert_close(y, case.plain(), rtol=tolerance, atol=tolerance * 5)
    ours = torch.autograd.grad(y, case.leaves(), case.g)
    theirs = torch.autograd.grad(case.plain(), case.leaves(), case.g)
    for a, b, leaf in zip(ours, theirs, case.leaves(), strict=True):
        assert a.dtype == leaf.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * 10)


def test_dropout_uses_one_mask_for_forward_and_backward() -> None:
    case, p = Case(torch.float64, frozen=True, bias=True, start=True), 0.4
    torch.manual_seed(3)
    y = case.fused(p)
    torch.manual_seed(3)
    bits, stays = bitmask.draw(case.x.numel(), p, case.x.device)
    expected = case.plain(bitmask.unpack(bits, case.x), 1 - stays)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(y, case.leaves(), case.g)
    theirs = torch.autograd.grad(expected, case.leaves(), case.g)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_dropout_keeps_the_mean() -> None:
    case = Case(torch.float64, frozen=False, bias=False)
    torch.manual_seed(0)
    with torch.no_grad():
        samples = torch.stack([case.fused(0.3) for _ in range(4000)])
    error = samples.std(0) / len(samples) ** 0.5
    assert bool(((samples.mean(0) - case.plain()).abs() < 5 * error).all())


def test_model_dropout_is_off_in_eval() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(12, 16)), AtlasLoraConfig(
        target_modules=["0"], init_weights=False, lora_dropout=0.9))  # fmt: skip
    x = inputs()
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_gradients_that_nobody_wants_are_not_made() -> None:
    case = Case(torch.float32, frozen=True, bias=True)
    case.x.requires_grad_(False)
    case.down.requires_grad_(False)
    case.fused().sum().backward()
    assert case.x.grad is None
    assert case.down.grad is None
    assert case.up.grad is not None


def test_double_backward_is_refused_in_our_words() -> None:
    case = Case(torch.float64, frozen=False, bias=True)
    (grad,) = torch.autograd.grad(case.fused().square().sum(), [case.down], create_graph=True)
    (plain,) = torch.autograd.grad(case.plain().square().sum(), [case.down])
    torch.testing.assert_close(grad, plain)  # asking for a graph alone does no harm
    with pytest.raises(UserError, match=r"no second derivative.*torch\.func"):
        grad.sum().backward()


def test_torch_func_gets_the_second_derivative_from_the_plain_formula(caplog: Any, silence: None) -> None:
    model, x = adapted("pissa", dtype=torch.float64), inputs(dtype=torch.float64)
    point = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad and "second" in name}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (x,)).square().sum()

    hessian = torch.func.hessian(loss)(point)
    first, step = torch.func.grad(loss)(point), 1e-6
    (name, value), *_ = point.items()
    moved = torch.func.grad(loss)({**point, name: value + step})[name]
    expected = hessian[name][name].flatten(len(value.shape)).sum(-1)
    torch.testing.assert_close((moved - first[name]) / step, expected, rtol=1e-4, atol=1e-4)
    assert [record.message.split(":")[0] for record in caplog.records] == ["torch.func transforms the plain formula"]


def test_autocast_computes_in_bf16_and_returns_fp32_gradients() -> None:
    case = Case(torch.float32, frozen=True, bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = case.fused(), case.plain()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=3e-2, atol=1e-1)
    grads = torch.autograd.grad(y, case.leaves(), case.g.bfloat16())
    reference = torch.autograd.grad(case.plain(), case.leaves(), case.g)
    for a, b in zip(grads, reference, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=5e-2, atol=2e-1)


def test_autocast_leaves_fp64_alone() -> None:
    case = Case(torch.float64, frozen=True, bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = case.fused()
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, case.plain(), rtol=1e-13, atol=1e-13)


class Shapes(TorchDispatchMode):
    """Records the shape of every tensor that is made; views of the model's own tensors make none."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in self.own:
                self.seen.add(tuple(value.shape))
        return result


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("name", ["lora", "pissa", "srlora"])
def test_no_out_by_in_matrix_is_ever_made(name: str, kind: str) -> None:
    # 60 rows and r = 5, so that neither an activation nor a factor has the shape of a weight
    model, x = adapted(name, kind, r=5), torch.randn(60, 12)
    if name == "srlora":
        train(model, x, steps=5, total=10)
        assert view(model).HA.shape[0] > 0
    with Shapes(model) as shapes:
        model(x).sum().backward()
    assert (60, 16) in shapes.seen
    assert not shapes.seen & {(16, 12), (12, 16), (14, 16), (16, 14)}


class Saved:
    """Counts the bytes that autograd keeps, parameters and the input itself apart."""

    def __init__(self, known: list[Tensor]) -> None:
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.tensors: dict[int, Tensor] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in self.known:
            self.tensors[pointer] = tensor
        return tensor

    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for t in self.tensors.values())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_bf16_training_keeps_no_copy_of_the_input(dropout: float) -> None:
    rows, width, rank = 512, 64, 4
    net = nn.Sequential(nn.Linear(width, width)).bfloat16()
    options = {"target_modules": ["0"], "r": rank, "lora_dropout": dropout}
    model = get_peft_model(net, config("pissa", **options))
    x = torch.randn(rows, width).bfloat16().requires_grad_()
    saved = Saved([x, *model.parameters(), *model.buffers()])
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        y = model(x)
    hidden, factors = rows * rank * 2, 2 * rank * (width + width) * 2
    mask = rows * width // 8 if dropout else 0
    assert saved.bytes() <= hidden + factors + mask
    assert not any(t.dtype == torch.float32 and t.shape[0] == rows for t in saved.tensors.values())
    y.sum().backward()


def test_q_k_and_v_share_one_saved_input() -> None:
    net = nn.ModuleDict({name: nn.Linear(64, 64) for name in "qkv"}).bfloat16()
    net.forward = lambda x: sum(net[name](x) for name in "qkv")
    model = get_peft_model(net, AtlasLoraConfig(target_modules=["q", "k", "v"], r=4))
    x = torch.randn(512, 64).bfloat16()
    saved = Saved([*model.parameters()])
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        model(x)
    assert sum(t.numel() == x.numel() for t in saved.tensors.values()) == 1


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been said yet."""
    monkeypatch.setattr(fused, "_SAID", set())


def test_torch_compile_takes_the_plain_formula_in_one_graph_and_says_so_once(caplog: Any, silence: None) -> None:
    x = inputs()
    for name in ("lora", "srlora"):
        model = adapted(name, init_weights=False)
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    said = [record.getMessage() for record in caplog.records if record.name == "loratlas.engine.fused"]
    assert len(said) == 1
    assert "torch.compile" in said[0]


def test_a_sharded_weight_takes_the_plain_formula_and_says_so_once(caplog: Any, silence: None) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        layers = [nn.Linear(4, 4).requires_grad_(False) for _ in range(2)]
        for layer in layers:
            layer.weight = nn.Parameter(distribute_tensor(layer.weight, mesh), requires_grad=False)
        assert not any(can_fuse(layer) for layer in layers)
    finally:
        dist.destroy_process_group()
    assert [record.message.split(":")[0] for record in caplog.records] == ["the weight of a base layer is a DTensor"]


def test_kinds_that_the_op_does_not_know_are_no_news(caplog: Any, silence: None) -> None:
    adapted("lora", "conv2d")(inputs("conv2d"))
    adapted("lora", "embedding")(inputs("embedding"))
    assert not caplog.records


@pytest.mark.parametrize("name", ["lora", "srlora"])
def test_a_wrong_shape_is_an_error_as_without_an_adapter(name: str, caplog: Any, silence: None) -> None:
    model, x = adapted(name), torch.randn(6, 13)
    for call in (lambda: model(x), lambda: model.get_base_model()(x)):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            call()
    assert not caplog.records


def test_what_can_be_fused() -> None:
    linear = nn.Linear(4, 4).requires_grad_(False)
    assert can_fuse(linear)
    assert can_fuse(Conv1D(4, 4).requires_grad_(False))
    assert not can_fuse(nn.Linear(4, 4))
    assert not can_fuse(nn.Conv2d(1, 1, 1).requires_grad_(False))
    assert not can_fuse(type("Own", (nn.Linear,), {})(4, 4).requires_grad_(False))
    linear._hf_hook = object()
    assert not can_fuse(linear)
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        hooked = nn.Linear(4, 4).requires_grad_(False)
        handle = getattr(hooked, register)(lambda *args: None)
        assert not can_fuse(hooked), register
        handle.remove()
        assert can_fuse(hooked)
