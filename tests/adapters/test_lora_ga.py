"""LoRA-GA: the start's shape and size, the first step it is made for, PEFT's variant, and missing gradients."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft import LoraGAConfig as PeftsLoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from toys import Toy, inputs, trainable, view

from loratlas import AtlasLoraConfig, LoraGAConfig, UserError, calibrate
from loratlas.adapters.lora_ga import DIRECTIONS, SCALES, halves
from loratlas.engine.config import AtlasConfig
from loratlas.engine.method import View

M, N, R = 24, 20, 3
DISJOINT = ("ArB2r", "A2rBr", "ArBr", "random")


def gradient(m: int = M, n: int = N, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def started(g: Tensor | None = None, dtype: torch.dtype = torch.float64, **options: Any) -> View:
    """The only layer of a model whose start follows the gradient `g`, by the exact SVD."""
    g = gradient() if g is None else g
    torch.manual_seed(1)
    base = nn.Sequential(nn.Linear(g.shape[1], g.shape[0], bias=False, dtype=dtype))
    cfg = LoraGAConfig(**{"r": R, "svd_method": "full", "target_modules": ["0"], **options})
    cfg.calibration = {"0": {"gradient": g}}
    return view(get_peft_model(base, cfg), "0")


def test_stable_rows_and_columns_have_the_size_that_the_paper_gives() -> None:
    t = started(stable_gamma=9)
    size = M**0.5 / 9.0
    eye = torch.eye(R, dtype=torch.float64)
    torch.testing.assert_close(t.A @ t.A.T, size * eye)
    torch.testing.assert_close(t.B.T @ t.B, size * eye)
    _, _, vh = torch.linalg.svd(gradient())
    torch.testing.assert_close(t.A.T @ t.A / size, vh[:R].T @ vh[:R])
    assert t.scaling == 16 / R**0.5
    assert started(use_rslora=False).scaling == 16 / R


def test_the_other_sizes() -> None:
    weight = started().layer.base_matrix()
    sigma = torch.linalg.svdvals(weight)[:R]
    average = float((sigma / 16 * R**0.5).sqrt().mean())
    for scale, squared in (("unit", 1.0), ("gd", (R**0.5 / 16) ** 2), ("weightS", average**2)):
        t = started(scale=scale)
        torch.testing.assert_close(t.A.square().sum(1), torch.full((R,), squared, dtype=torch.float64))
        torch.testing.assert_close(t.B.square().sum(0), torch.full((R,), squared, dtype=torch.float64))
    t = started(norm_clip=True)
    torch.testing.assert_close((t.scaling * t.B @ t.A).abs().max(), weight.abs().max())
    torch.testing.assert_close(t.A.norm(), t.B.norm())
    assert torch.equal(started(norm_clip=True, stable_gamma=1e6).A, started(stable_gamma=1e6).A)


def first_step(t: View, g: Tensor) -> Tensor:
    """The direction in which an SGD step moves B A, (out, in)."""
    return t.B0 @ t.B0.T @ g + g @ t.A0.T @ t.A0


def miss(step: Tensor, g: Tensor) -> float:
    """min over z of ||z step - G||_F."""
    return float((step * (step * g).sum() / step.square().sum() - g).norm())


def test_the_first_step_is_the_best_that_rank_2r_allows() -> None:
    g = gradient()
    s = torch.linalg.svdvals(g)
    bound = float(s[2 * R :].square().sum().sqrt())
    for direction in DISJOINT:
        step = first_step(started(direction=direction), g)
        assert abs(miss(step, g) - bound) < 1e-8
        cosine = (step * g).sum() / (step.norm() * g.norm())
        torch.testing.assert_close(cosine, s[: 2 * R].square().sum().sqrt() / g.norm())
    same_half = started(direction="random", peft_compat=True, scale="unit")
    assert miss(first_step(same_half, g), g) > 1.2 * bound
    assert miss(first_step(started(peft_compat=True), g), g) > 1.2 * bound


def test_a_real_step_moves_along_the_calibrated_gradient() -> None:
    """From the data to the change of the weight: an SGD step of size eta moves by -eta s^2 (B B^T G + G A^T A)."""
    base, x = Toy(dtype=torch.float64), inputs(dtype=torch.float64)
    cfg = LoraGAConfig(r=4, svd_method="full", target_modules=["first", "second"])

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - 1.0).square().mean()

    found = calibrate(base, cfg, [x], loss=loss)
    model = get_peft_model(base, cfg)
    rate = 1e-7
    optimizer = torch.optim.SGD(trainable(model), lr=rate)
    loss(model, x).backward()
    optimizer.step()
    for name in ("first", "second"):
        t = view(model, name)
        expected = -rate * t.scaling**2 * first_step(t, found[name]["gradient"])
        torch.testing.assert_close(t.layer.method.delta_weight(t), expected, rtol=1e-5, atol=1e-14)


def test_it_learns_faster_than_lora_from_the_same_base() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(N, M, bias=False))
    shift = torch.randn(M, 2) @ torch.randn(2, N) / 10
    x = torch.randn(128, N)
    y = x @ (base[0].weight.detach() + shift).T

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - y).square().mean()

    def losses(cfg: AtlasConfig, calibrated: bool) -> list[float]:
        torch.manual_seed(0)
        own = copy.deepcopy(base)
        if calibrated:
            calibrate(own, cfg, [x], loss=loss)
        model = get_peft_model(own, cfg)
        optimizer = torch.optim.AdamW(trainable(model), lr=2e-3, weight_decay=0.0)
        found = []
        for _ in range(60):
            optimizer.zero_grad()
            value = loss(model, x)
            value.backward()
            optimizer.step()
            found.append(float(value.detach()))
        return found

    lora = losses(AtlasLoraConfig(r=R, lora_alpha=16, use_rslora=True, target_modules=["0"]), False)
    ours = losses(LoraGAConfig(r=R, target_modules=["0"]), True)
    assert ours[0] == lora[0]
    assert ours[30] < 0.6 * lora[30]
    assert ours[-1] < 0.5 * lora[-1]


def test_halves_are_disjoint_and_cover_2r_directions() -> None:
    assert [index.tolist() for index in halves("ArBr", 3, 0)] == [[1, 3, 5], [0, 2, 4]]
    assert [index.tolist() for index in halves("A2rBr", 3, 0)] == [[3, 4, 5], [0, 1, 2]]
    for seed in range(3):
        a, b = halves("random", 8, seed)
        assert sorted([*a.tolist(), *b.tolist()]) == list(range(16))
    assert not torch.equal(halves("random", 8, 0)[0], halves("random", 8, 1)[0])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", [d for d in DIRECTIONS if d != "random"])
def test_peft_compat_starts_as_pefts(direction: str, scale: str) -> None:
    pefts_scale = {"gd": "gd_scale", "weightS": "weight_svd"}.get(scale, scale)
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(N, M, bias=False)), torch.randn(9, N)
    u, _, vh = torch.linalg.svd(base[0].weight.detach(), full_matrices=False)
    base[0].weight.data.copy_((u * 0.5 ** torch.arange(N)) @ vh)  # PEFT's sigma_1 is exact only where they decay

    def loss(model: nn.Module, batch: Tensor | None = None) -> Tensor:
        return (torch.tanh(model(x)) - 1.0).square().sum()

    shared: dict[str, Any] = {"r": R, "lora_alpha": 16, "target_modules": ["0"], "use_rslora": True}
    ours = LoraGAConfig(**shared, peft_compat=True, direction=direction, scale=scale)
    calibrate(base, ours, [x], loss=loss)
    theirs = LoraConfig(
        **shared,
        init_lora_weights="lora_ga",
        lora_ga_config=PeftsLoraGAConfig(direction=direction, scale=pefts_scale),
    )
    other = copy.deepcopy(base)
    preprocess_loraga(other, theirs, lambda: loss(other).backward())
    stock = get_peft_model(other, theirs).base_model.model[0]
    t = view(get_peft_model(base, ours), "0")
    torch.testing.assert_close(t.A.abs(), stock.lora_A["default"].weight.abs(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(t.B.abs(), stock.lora_B["default"].weight.abs(), rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- corners


def test_a_rank_that_needs_more_directions_than_there_are_is_cut() -> None:
    with pytest.warns(UserWarning, match=r"lora-ga: rank 16 exceeds the 10 useful directions of 0 \(24 x 20\)"):
        assert started(r=16).r == 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert started(r=10).r == 10


@pytest.mark.parametrize("g", [torch.zeros(M, N), gradient(1, N).float()], ids=["zero gradient", "one row"])
def test_where_nothing_can_be_chosen_it_starts_as_lora(g: Tensor) -> None:
    t = started(g, torch.float32, r=1)
    assert t.A.abs().min() > 0
    assert torch.equal(t.A, t.A0)
    assert torch.equal(t.B, torch.zeros_like(t.B))
    assert torch.equal(t.B0, torch.zeros_like(t.B))


def test_missing_or_foreign_statistics_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"module first: lora-ga starts from the gradient .* call loratlas.calibrate"):
        get_peft_model(Toy(), LoraGAConfig(target_modules=["first"]))
    cfg = LoraGAConfig(target_modules=["first"])
    cfg.calibration = {"first": {"gradient": torch.ones(3, 3)}}
    with pytest.raises(UserError, match=r"module first: its calibrated gradient is \(3, 3\) instead of \(16, 12\)"):
        get_peft_model(Toy(), cfg)


def test_bad_options_name_the_field() -> None:
    for options, match in (
        ({"direction": "AB"}, "direction must be one of ArB2r"),
        ({"scale": "weight_svd"}, "scale must be one of stable, gd, unit, weightS"),
        ({"stable_gamma": 0}, "stable_gamma must be positive"),
        ({"norm_clip": True, "peft_compat": True}, "norm_clip must be False with peft_compat"),
    ):
        with pytest.raises(UserError, match=match):
            LoraGAConfig(**options)
