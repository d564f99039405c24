"""Terms on a batch of logits: closeness to a teacher, diversity, and energy in few singular directions.

Z: student logits, P: teacher logits, (n, V), one row a token or a sample. All are scalars, computed in fp32.
covariance_diversity and spectral_energy belong to a batch as a whole: over micro-batches or ranks they do not average
to the value of all together.

| term | formula | published in |
|---|---|---|
| kl_consistency | T^2 mean_i KL(softmax(P_i / T) \\|\\| softmax(Z_i / T)) | BA-LoRA v6 |
| entropy_diversity | -mean_i H(softmax over the top K of Z_i) | BA-LoRA v6, text |
| covariance_diversity | (1 / V) sum_{a != b} C_ab^2, C the covariance of Z's columns | BA-LoRA, classification |
| spectral_energy | -sum_{j <= k} sigma_j(Z) / norm(Z) | BA-LoRA |
| cosine_consistency | mean over n V of (Z_i / \\|Z_i\\| - P_i / \\|P_i\\|)^2 | BA-LoRA v1, classification |
| summed_kl | (1 / batch) sum over tokens of KL(softmax(P_i) \\|\\| softmax(Z_i)) | BA-LoRA's first code, text |
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from loratlas.linalg.svd import top_svd

NORMS = ("fro", "sum")
WIDE = 4096  # columns from which the singular directions are sought by a randomised method
_TINY = 1e-8  # norm under which a matrix has no directions worth naming
_LOG_EPS = 1e-10  # inside the logarithm of BA-LoRA's first code


def kl_consistency(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 mean_i KL(teacher || student) at temperature T; 0 with a zero gradient where they agree."""
    log_z = (student.float() / temperature).log_softmax(-1)
    log_p = (teacher.float() / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(log_z, log_p, reduction="batchmean", log_target=True)


def cosine_consistency(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the rows of unit length."""
    return F.mse_loss(F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1))


def summed_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) summed over the tokens of a sample, (B, T, V), mean over samples."""
    return F.kl_div(student.float().log_softmax(-1), teacher.float().softmax(-1), reduction="batchmean")


def entropy_diversity(logits: Tensor, top_k: int = 0) -> Tensor:
    """-mean_i H_i, in [-ln K, 0]; H_i is the entropy of the softmax over the K largest logits, 0: over all."""
    rows = logits.float()
    if 0 < top_k < rows.shape[-1]:
        rows = rows.topk(top_k, dim=-1).values
    log_p = rows.log_softmax(-1)
    return (log_p.exp() * log_p).sum(-1).mean()


def eps_entropy_diversity(logits: Tensor) -> Tensor:
    """mean_i sum_v p log(p + 1e-10) over every position, as BA-LoRA's first code has it."""
    p = logits.float().softmax(-1)
    return (p * (p + _LOG_EPS).log()).sum(-1).mean()


def covariance_diversity(logits: Tensor) -> Tensor:
    """(1 / V) sum of the squared covariances between different classes; 0 for a batch of one sample."""
    n, classes = logits.shape
    if n < 2:
        return logits.new_zeros((), dtype=torch.float32)
    centred = logits.float() - logits.float().mean(0)
    with torch.autocast(logits.device.type, enabled=False):
        covariance = centred.T @ centred / (n - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / classes


def spectral_energy(logits: Tensor, k: int, norm: str = "fro") -> Tensor:
    """-(sigma_1 + ... + sigma_k) / norm(Z), norm "fro": sqrt(sum sigma^2), "sum": sum sigma. Scale invariant.

    In [-sqrt(k), 0) and [-1, 0). k is clipped to the number of singular values. With more than 4096 columns the
    directions come from a seeded randomised SVD with k + 5 of them, and the norm is Frobenius' always. 0 for a single
    row or column, and where the norm is at most 1e-8 or not finite.
    """
    z = logits.float()
    frobenius = torch.linalg.matrix_norm(z)
    size = float(frobenius.detach())
    if min(z.shape) < 2 or not _TINY < size < float("inf"):
        return z.new_zeros(())
    k = min(k, *z.shape)
    if norm == "sum" and z.shape[1] <= WIDE:
        sigma = torch.linalg.svdvals(z)
        return -sigma[:k].sum() / sigma.sum()
    return -leading_sum(z, k) / frobenius


def leading_sum(z: Tensor, k: int) -> Tensor:
    """sigma_1 + ... + sigma_k of Z as tr(U_k^T Z V_k), with the gradient U_k V_k^T.

    U_k and V_k are found without gradient: at the maximum over orthonormal U_k, V_k, which this sum is, their own
    change does not count (envelope theorem). No gradient through an SVD, and none that ties could break.
    """
    wide = z.shape[1] > WIDE
    u, _, vh = top_svd(z, k, method="lowrank" if wide else "auto", niter=2, oversample=5)
    with torch.autocast(z.device.type, enabled=False):
        return ((u.T @ z) * vh).sum()


def confidence(teacher: Tensor, temperature: float = 1.0) -> float:
    """1 - (mean entropy of the teacher's softmax at temperature T) / ln V, in [0, 1]."""
    log_p = (teacher.detach().float() / temperature).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    largest = torch.tensor(float(teacher.shape[-1])).log()
    return 1.0 - min(max(float(entropy) / float(largest), 0.0), 1.0)
