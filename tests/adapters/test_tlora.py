"""TLoRA: rings as defined, the start, what equal slices cost, the paper's parameter counts, what it can represent."""

from __future__ import annotations

import itertools

import pytest
import torch
from peft import get_peft_model
from torch import nn
from toys import TARGETS, Toy, inputs, train, trainable, view

from loratlas import AtlasLoraConfig, TLoraConfig, UserError
from loratlas.linalg import tensor_ring


def cores(sizes: tuple[int, ...], rank: int, *, square: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(n, *([n] if square else []), rank, rank, dtype=torch.float64) for n in sizes]


def test_the_ring_is_the_trace_of_the_cores_first_index_fastest() -> None:
    sizes = (2, 3, 2)
    a = cores(sizes, 2, square=True)
    matrix = tensor_ring.ring_matrix(a)
    for i, j in itertools.product(range(12), repeat=2):
        product, left, right = torch.eye(2, dtype=torch.float64), i, j
        for core, n in zip(a, sizes, strict=True):
            product = product @ core[left % n, right % n]
            left, right = left // n, right // n
        torch.testing.assert_close(matrix[i, j], product.trace())


def test_of_rank_one_the_transform_is_a_kronecker_product() -> None:
    a = cores((2, 3), 1, square=True)
    torch.testing.assert_close(tensor_ring.ring_matrix(a), torch.kron(a[1][..., 0, 0], a[0][..., 0, 0]))


def test_the_products_cores_are_those_of_the_orthogonality_distance() -> None:
    a = cores((2, 3), 2, square=True)
    squares = [torch.einsum("ilrs,jltu->ijrtsu", c, c).reshape(*c.shape[:2], 4, 4) for c in a]
    t = tensor_ring.ring_matrix(a)
    torch.testing.assert_close(tensor_ring.ring_matrix(squares), t @ t.T)


@pytest.mark.parametrize("gauge", [False, True])
def test_the_start_is_the_identity_and_costs_nothing(gauge: bool) -> None:
    start = tensor_ring.identity_cores((4, 3, 2), 3, torch.Generator().manual_seed(0) if gauge else None)
    torch.testing.assert_close(tensor_ring.ring_matrix(start), torch.eye(24, dtype=torch.float64))
    if not gauge:
        assert float(tensor_ring.identity_distance(start)) < 1e-12
        assert float(tensor_ring.orthogonality_distance(start)) < 1e-12


def test_equal_slices_never_part_and_the_gauge_parts_them() -> None:
    for start, parted in (("paper", False), ("gauge", True)):
        model = get_peft_model(Toy(), TLoraConfig(r=2, transform_init=start, target_modules=list(TARGETS)))
        torch.testing.assert_close(model(inputs()), Toy()(inputs()), rtol=1e-5, atol=1e-5)
        train(model, inputs(), 10)
        a = view(model).A1.detach()
        assert torch.equal(a[..., 0, 0], a[..., 1, 1]) != parted


def test_the_residuals_rank() -> None:
    torch.manual_seed(0)
    ups, downs = cores((4, 5), 2, square=False), cores((3, 6), 2, square=False)
    up, down = tensor_ring.ring_factors(ups, downs)
    assert torch.linalg.matrix_rank(up @ down) == 4


def test_parameter_counts_of_the_paper() -> None:
    """Stable Diffusion 1.5: (layers, in) of the attention projections; out is the attention's own width."""
    layers = [(30, 320, 320), (30, 640, 640), (36, 1280, 1280), (4, 768, 320), (4, 768, 640), (4, 768, 1280)]
    factors = {"320": [4, 8, 10], "640": [8, 8, 10], "768": [8, 8, 12], "1280": [8, 10, 16]}
    config = TLoraConfig(r=6, factors=factors)
    transform = sum(4 * sum(n * n for n in config.split(n_in)) * count for count, n_in, _ in layers[:3])
    transform += 4 * sum(n * n for n in config.split(768)) * 32
    assert transform == 144_256


def test_it_learns_a_transform_that_loras_of_its_size_cannot() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 16)
    target = weight @ torch.kron(*(torch.eye(4) + 0.3 * torch.randn(4, 4) for _ in range(2)))
    x, errors = torch.randn(256, 16), {}
    for name, config in {
        "tlora": TLoraConfig(r=1, residual=None, transform_rank=2, num_factors=2, target_modules=["0"]),
        "lora": AtlasLoraConfig(r=4, target_modules=["0"]),
    }.items():
        base = nn.Sequential(nn.Linear(16, 16, bias=False))
        base[0].weight.data.copy_(weight)
        torch.manual_seed(1)
        model = get_peft_model(base, config)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
        for _ in range(600):
            loss = (model(x) - x @ target.T).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        errors[name] = float(loss), sum(p.numel() for p in trainable(model))
    assert errors["tlora"][1] <= errors["lora"][1]
    assert errors["tlora"][0] < 0.1 * errors["lora"][0]


def test_regularisers_join_the_loss() -> None:
    for name in ("identity", "orthogonal"):
        options = {"regulariser": name, "regulariser_weight": 0.5, "target_modules": list(TARGETS)}
        model = get_peft_model(Toy(dtype=torch.float64), TLoraConfig(r=2, **options))
        t = view(model)
        t.A1.data.mul_(1.5)
        terms = t.layer.method.extra_loss([t])
        distance = tensor_ring.identity_distance if name == "identity" else tensor_ring.orthogonality_distance
        torch.testing.assert_close(terms, 0.5 * distance([t.A1, t.A2, t.A3] if t.A3 is not None else [t.A1, t.A2]))
        terms.backward()
        assert t.A1.grad.isfinite().all()


def test_dimensions_split_evenly_or_are_refused() -> None:
    config = TLoraConfig()
    assert config.split(768) == [8, 8, 12]
    assert config.split(2) == [2]
    assert TLoraConfig(num_factors=2).split(4096) == [64, 64]
    with pytest.raises(UserError, match="5087"):
        config.split(30522)
    for wrong in ({"320": [4, 8]}, {"x": [2]}, {"8": [2, 2, 2, 1, 1]}):
        with pytest.raises(UserError, match="factors"):
            TLoraConfig(factors=wrong)
