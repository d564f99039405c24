"""The terms' ranges, extremes and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from loratlas.objectives import regularisers as terms
from loratlas.objectives import schedules


def logits(n: int = 7, v: int = 11, seed: int = 0) -> Tensor:
    return torch.randn(n, v, generator=torch.Generator().manual_seed(seed)).mul(2.0).requires_grad_()


def gradient(term: Tensor, z: Tensor) -> Tensor:
    return torch.autograd.grad(term, z)[0]


def test_consistency_is_zero_with_a_zero_gradient_where_the_two_agree() -> None:
    z = logits()
    for term in (terms.kl_consistency(z, z.detach(), 2.0), terms.cosine_consistency(z, z.detach())):
        assert abs(float(term)) < 1e-6
        assert gradient(term, z).abs().max() < 1e-7
    assert terms.kl_consistency(z, logits(seed=1), 2.0) > 0.1
    assert terms.cosine_consistency(z, 3.0 * z.detach()).abs() < 1e-6  # of lengths it knows nothing


def test_entropy_diversity_lies_between_uniform_and_certain() -> None:
    uniform, certain = torch.zeros(3, 11), torch.eye(11)[:3] * 1e3
    for k in (0, 4, 50):
        size = math.log(4 if k == 4 else 11)
        assert float(terms.entropy_diversity(uniform, k)) == pytest.approx(-size, abs=1e-6)
        assert float(terms.entropy_diversity(certain, k)) == pytest.approx(0.0, abs=1e-6)
        assert -size < float(terms.entropy_diversity(logits(), k)) < 0
    z = logits()
    grad = gradient(terms.entropy_diversity(z, 4), z)
    assert (grad != 0).sum(1).tolist() == [4] * 7


def test_covariance_diversity_is_zero_for_classes_that_do_not_move_together() -> None:
    z = torch.tensor([[1.0, 1.0, 0.0], [-1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [-1.0, -1.0, 0.0]])
    assert float(terms.covariance_diversity(z)) == 0.0
    together = z[:, [0, 0, 2]]
    assert float(terms.covariance_diversity(together)) == pytest.approx(2 * (4 / 3) ** 2 / 3)
    assert float(terms.covariance_diversity(logits(n=1))) == 0.0


@pytest.mark.parametrize("norm", terms.NORMS)
def test_spectral_energy_is_bounded_scale_invariant_and_complete_at_the_rank(norm: str) -> None:
    z = logits()
    value = float(terms.spectral_energy(z, 3, norm))
    assert -(math.sqrt(3) if norm == "fro" else 1.0) <= value < 0
    assert float(terms.spectral_energy(50.0 * z, 3, norm)) == pytest.approx(value, rel=1e-5)
    low = logits(7, 2) @ logits(2, 11)
    assert float(terms.spectral_energy(low, 2, "sum")) == pytest.approx(-1.0, abs=1e-5)
    assert float(terms.spectral_energy(z, 99, "sum")) == pytest.approx(-1.0, abs=1e-6)
    for nothing in (torch.zeros(4, 5), logits(n=1), torch.full((4, 5), torch.nan)):
        assert float(terms.spectral_energy(nothing, 2, norm)) == 0.0


def test_the_leading_sum_has_the_gradient_of_the_singular_values_themselves() -> None:
    z = logits(9, 30)
    ours, theirs = terms.leading_sum(z, 4), torch.linalg.svdvals(z)[:4].sum()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient(ours, z), gradient(theirs, z), rtol=1e-4, atol=1e-5)
    tied = torch.eye(5).requires_grad_()
    assert gradient(terms.leading_sum(tied, 2), tied).norm() == pytest.approx(math.sqrt(2), rel=1e-5)


def test_wide_logits_take_the_randomised_path_and_leave_the_global_generator_alone() -> None:
    u, v = torch.linalg.qr(torch.randn(40, 12)).Q, torch.linalg.qr(torch.randn(terms.WIDE + 4, 12)).Q
    z = (u * 0.5 ** torch.arange(12.0)) @ v.T  # a spectrum that falls, as that of logits does
    before = torch.random.get_rng_state()
    found = [float(terms.spectral_energy(z, 3)) for _ in range(2)]
    assert found[0] == found[1]
    assert found[0] == pytest.approx(-float(torch.linalg.svdvals(z)[:3].sum() / z.norm()), rel=1e-3)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_mixed_precision_does_not_reach_the_products() -> None:
    z = logits(9, 30)
    plain = terms.covariance_diversity(z), terms.spectral_energy(z, 3), terms.spectral_energy(z, 3, "sum")
    with torch.autocast("cpu", torch.bfloat16):
        mixed = terms.covariance_diversity(z), terms.spectral_energy(z, 3), terms.spectral_energy(z, 3, "sum")
    assert mixed == plain


def test_confidence_falls_with_the_teachers_entropy() -> None:
    assert terms.confidence(torch.zeros(3, 11)) == pytest.approx(0.0, abs=1e-6)
    assert terms.confidence(torch.eye(11)[:3] * 1e3) == pytest.approx(1.0, abs=1e-6)
    assert terms.confidence(logits(), 0.5) > terms.confidence(logits(), 2.0)


def test_schedules() -> None:
    assert [schedules.cosine(s, 10) for s in (0, 5, 10)] == pytest.approx([1.0, 0.55, 0.1])
    rise = [schedules.rising("two_phase", s, 40, 0.2, 0.1) for s in (0, 7, 8, 9, 10, 12, 39)]
    assert rise == [0.0, 0.0, 0.0, 0.25, 0.5, 1.0, 1.0]
    assert [schedules.rising("linear_warmup", s, 40, 0.2, 0.1) for s in (0, 4, 8)] == [0.0, 0.5, 1.0]
    assert [schedules.rising("quadratic_warmup", s, 40, 0.2, 0.1) for s in (0, 4, 8)] == [0.0, 0.25, 1.0]
    assert [schedules.rising(name, 0, 3, 0.0, 0.0) for name in schedules.RISING] == [1.0, 0.0, 1.0, 1.0]
