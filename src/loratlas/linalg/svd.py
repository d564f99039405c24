"""The k largest singular triplets of a matrix: exact, through a Gram matrix, or by a seeded randomised range finder."""

from __future__ import annotations

import torch
from torch import Tensor

from loratlas.errors import UserError
from loratlas.linalg import chebyshev

METHODS = ("auto", "full", "gram", "lowrank")
_MIN_OVERSAMPLE = 8
# columns that are held in float64 at one time, so that a vocabulary-sized matrix is never copied whole
_BLOCK = 8192
# rows of a Gram matrix that are computed together; only the half above its diagonal is
_STRIP = 128


def top_svd(
    weight: Tensor,
    k: int,
    *,
    method: str = "auto",
    niter: int = 8,
    oversample: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest singular triplets: W ~ U diag(S) Vh.

    Args:
        weight: W, (m, n), any real floating dtype and device.
        k: number of triplets, 1 <= k <= min(m, n).
        method: "full" is LAPACK's SVD. "gram" takes the eigenvectors of the smaller Gram matrix in float64, accurate to
            about 1e-7 sigma_1: the leading ones alone where these are few (see `linalg.chebyshev`), which takes a
            quarter of the time of "full" or less, and on any spectrum. "lowrank" is the randomised
            range finder (Halko, Martinsson & Tropp 2011, arXiv 0909.4061, algorithm 4.4): fast, accurate where the
            spectrum decays; on a flat spectrum the *directions* near number k are not the exact ones. "auto" asks
            `choose_method`.
        niter: power iterations of "lowrank", >= 0. Error shrinks as (sigma_(k+oversample+1) / sigma_k)^(2 niter + 1).
        oversample: extra directions that "lowrank" carries, >= 1. None means max(k, 8). On 768x768 with
            sigma_i = i^-0.5, k = 64, that finds sigma to 3e-6; with 16 the error is 2e-3, with 1 it is 3e-2.
        seed: of the private generator of "gram" and "lowrank", drawn on the CPU. The global generator is neither read
            nor moved.

    Returns:
        U (m, k), S (k,) descending, Vh (k, n) on weight's device, detached; float64 for a float64 weight and float32
        for every other. U's columns and Vh's rows are orthonormal even where sigma is 0; signs follow
        `canonical_signs`. The same input, seed, device and thread count give the same bits.

    Raises:
        UserError: not a matrix of finite real numbers, k out of range, unknown method, niter < 0 or oversample < 1.

    Cost for d = min(m, n), l = k + oversample: "full" O(m n d), "gram" O(m n d + d^3) with a far smaller constant,
    "lowrank" O(m n l niter + (m + n) l^2 niter). Extra memory of "gram" and "lowrank": O(d^2) and O((m + n) l). The
    products of the power iteration follow torch's float32 matmul precision (TF32 where the user allowed it); the last
    projection, which sets sigma, is float64 always.
    """
    _check_arguments(weight, k, method, niter, oversample)
    m, n = weight.shape
    dtype = result_dtype(weight)
    matrix = weight.detach().to(device=float64_device(weight.device), dtype=dtype)
    # both extremes are NaN where any entry is; five times as fast as looking at each of them
    if not bool(torch.isfinite(torch.stack(matrix.aminmax())).all()):
        raise UserError(f"The {m}x{n} matrix holds NaN or infinite entries, so it has no SVD; check its source.")
    if method == "auto":
        method = choose_method(m, n, k, dtype)
    with torch.no_grad(), torch.autocast(matrix.device.type, enabled=False):
        if method == "full":
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            u, s, vh = u[:, :k], s[:k], vh[:k]
        else:
            wide = matrix if m <= n else matrix.T
            if method == "gram":
                basis = gram_basis(wide, k, seed)
            else:
                extra = max(k, _MIN_OVERSAMPLE) if oversample is None else oversample
                basis = _range_basis(wide, min(k + extra, m, n), niter, seed)
            u, s, vh = _svd_within(wide, basis, k)
            if m > n:
                u, vh = vh.T, u.T
        # in the result's precision, so that near-ties are judged alike whatever the method
        u, vh = canonical_signs(u.to(dtype), vh.to(dtype))
    home = weight.device
    return u.to(home).contiguous(), s.to(device=home, dtype=dtype).contiguous(), vh.to(home).contiguous()


def choose_method(m: int, n: int, k: int, dtype: torch.dtype = torch.float32) -> str:
    """The method that `top_svd(method="auto")` takes for the top k of an (m, n) matrix; d = min(m, n).

    Measured with `benchmarks/svd.py` on one CPU thread, float32:

    - "lowrank" where d > 1024 and 8 k <= d. At 1536x1536 it is 10x faster than "full" for k = 32, 6x for k = 64, 1.6x
      for k = 192 and level for k = 256. Up to d = 1024 the other two are fast enough not to risk a flat spectrum: with
      sigma_i = i^-0.05, k = 32, sigma is 3 % off and the subspace wrong.
    - "gram" where max(m, n) >= 2 d and 2 k <= d, or 12 k <= d. Against "full" at 384x384 it is 3.0x faster for k = 8
      and 1.5x for k = 32, at 768x768 3.9x and 2.2x, at 384x1536 4.7x and 3.3x, at 768x3072 9x and 8x, and its sigma
      closer to the truth (4e-8 against 8e-7). On the flat spectrum above it is 1.7x and 0.7x at 384x384, 2.4x and 1.0x
      at 768x768. Never for float64, whose user expects more digits than a Gram matrix keeps.
    - "full" for the rest.
    """
    smaller, larger = min(m, n), max(m, n)
    if smaller > 1024 and 8 * k <= smaller:
        return "lowrank"
    rectangular = larger >= 2 * smaller and 2 * k <= smaller
    few = chebyshev.pays(smaller, k) and 12 * k <= smaller
    if dtype != torch.float64 and (rectangular or few):
        return "gram"
    return "full"


def canonical_signs(u: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """Fix the signs that an SVD leaves open: in every row of vh the entry of largest magnitude becomes positive.

    Magnitudes within a relative sqrt(eps) of the largest count as ties, which the lowest index wins: rounding noise
    cannot flip the sign of a vector such as (1, -1)/sqrt(2).

    Args:
        u: (m, k); vh: (k, n). Column i of u is multiplied by the same sign as row i of vh, so u diag(s) vh stays.

    Returns:
        New tensors u (m, k), vh (k, n).
    """
    size = vh.abs()
    largest = size.amax(dim=1, keepdim=True)
    tied = size >= largest * (1.0 - torch.finfo(vh.dtype).eps ** 0.5)
    first = tied.to(torch.uint8).argmax(dim=1, keepdim=True)
    sign = 1.0 - 2.0 * (vh.gather(1, first) < 0).to(vh.dtype)
    return u * sign.T.to(u.dtype), vh * sign


def numerical_rank(s: Tensor, m: int, n: int) -> int:
    """#{i : s_i > max(m, n) eps s_0}, eps of the dtype of s: the usable directions of an (m, n) matrix.

    `s` holds singular values in descending order, (k,). This is the convention of `torch.linalg.matrix_rank`. All zeros
    or no values at all give 0.
    """
    if s.numel() == 0:
        return 0
    return int((s > max(m, n) * torch.finfo(s.dtype).eps * s[0]).sum())


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors is float64, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def float64_device(device: torch.device) -> torch.device:
    """Where float64 work for data on `device` can be done: Apple's MPS has no float64, so there it is the CPU."""
    return torch.device("cpu") if device.type == "mps" else device


def _gram(wide: Tensor) -> Tensor:
    """W W^T for wide W (d, n), in float64."""
    size = wide.shape[0]
    gram = torch.zeros(size, size, dtype=torch.float64, device=wide.device)
    strips = [slice(start, start + _STRIP) for start in range(0, size, _STRIP)]
    for block in wide.split(_BLOCK, dim=1):
        exact = block.double()
        for rows in strips:
            gram[rows, rows.start :].addmm_(exact[rows], exact[rows.start :].T)
    for rows in strips:
        gram[rows.stop :, rows] = gram[rows, rows.stop :].T
    return gram


def gram_basis(wide: Tensor, k: int, seed: int) -> Tensor:
    """The k leading eigenvectors of W W^T for wide W (d, n), in float64: (d, k), orthonormal."""
    gram = _gram(wide)
    leading = chebyshev.leading_eigenvectors(gram, k, seed) if chebyshev.pays(wide.shape[0], k) else None
    # eigh returns ascending eigenvalues
    return torch.linalg.eigh(gram).eigenvectors[:, -k:] if leading is None else leading


def _range_basis(wide: Tensor, width: int, niter: int, seed: int) -> Tensor:
    """Orthonormal (d, width) that spans nearly the leading left singular vectors of wide W (d, n).

    Subspace iteration from a Gaussian start, re-orthonormalised after each product: otherwise every direction but the
    first would sink below the rounding of (W W^T)^niter.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    start = torch.randn(wide.shape[1], width, generator=generator, dtype=wide.dtype).to(wide.device)
    basis = torch.linalg.qr(wide @ start).Q
    for _ in range(niter):
        right = torch.linalg.qr(wide.T @ basis).Q
        basis = torch.linalg.qr(wide @ right).Q
    return basis


def _svd_within(wide: Tensor, basis: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Top k SVD of Q Q^T W for wide W (d, n) and orthonormal Q (d, l), in float64: U (d, k), S (k,), Vh (k, n).

    W^T Q = Z R (QR), R = P S T^T, hence Q Q^T W = (Q T) S (Z P)^T. The Householder Z is orthonormal even where
    W^T Q has zero columns; dividing by sigma instead would not be.
    """
    exact = basis.double()
    projected = torch.cat([block.double().T @ exact for block in wide.split(_BLOCK, dim=1)])
    z, r = torch.linalg.qr(projected)
    p, s, th = torch.linalg.svd(r)
    return exact @ th[:k].T, s[:k], (z @ p[:, :k]).T


def _check_arguments(weight: Tensor, k: int, method: str, niter: int, oversample: int | None) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise UserError(
            f"top_svd needs a real floating-point matrix, but got shape {tuple(weight.shape)} of {weight.dtype}; "
            "reshape it to (out, in) first."
        )
    m, n = weight.shape
    if not 1 <= k <= min(m, n):
        raise UserError(
            f"{k} singular triplets were asked of a {m}x{n} matrix; ask for at least 1 and at most {min(m, n)}."
        )
    if method not in METHODS:
        raise UserError(f"SVD method {method!r} is unknown; choose one of {', '.join(METHODS)}.")
    if niter < 0:
        raise UserError(f"The SVD's niter is {niter}; it must be 0 or more.")
    if oversample is not None and oversample < 1:
        raise UserError(f"The SVD's oversample is {oversample}; it must be 1 or more, or None for max(k, 8).")
