"""Moving B A as close as its factors can to where its product should go.

A change (dA, dB) of the factors moves s B A by T = s B dA + s dB A. Of all such moves the one nearest to a matrix G is
the projection onto the tangent space of the matrices of rank r,

    T = P_B G + G P_A - P_B G P_A,      P_B, P_A: orthogonal projectors on the columns of B and the rows of A,

and it follows from the gradients of the factors, gA = s B^T G and gB = s G A^T, without G (LoRA-Pro, arXiv 2407.18242):

    dA = (B^T B)^-1 gA / s^2 + X A
    dB = (I - P_B) gB (A A^T)^-1 / s^2 - B X

T is the same for every X (r, r), which only divides the move between A and B:

| x_mode | X |
|---|---|
| "sylvester" | that with the least ||dA - gA||^2 + ||dB - gB||^2: B^T B X + X A A^T = -(B^T B)^-1 gA A^T / s^2 |
| "zero" | 0: the part of G that both could make is made by A |
| "symmetry" | -1/2 (B^T B)^-1 gA A^T (A A^T)^-1 / s^2: each makes half of it |
"""

from __future__ import annotations

from torch import Tensor

from loratlas.linalg.sylvester import Spectrum, solve_sylvester

X_MODES = ("sylvester", "zero", "symmetry")


def tangent_factors(
    a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, s: Tensor, *, x_mode: str = "sylvester", jitter: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(dA (n, r, in), dB (n, out, r)) of n pairs at once, in float64; a function for `stacks.in_stacks`.

    Args:
        a, grad_a: A and gA, (n, r, in). b, grad_b: B and gB, (n, out, r). s: (n,), none of them 0.
        x_mode: how the move is divided, see above.
        jitter: added to B^T B and A A^T, relative to the mean of their eigenvalues. It bounds how far noise in the
            gradients is blown up where B is nearly singular; directions that are numerically zero are left out.

    Raises:
        torch.linalg.LinAlgError: a factor is not finite.
    """
    left, right = Spectrum.of(b.mT @ b), Spectrum.of(a @ a.mT)
    inverse_left, inverse_right = left.inverse(jitter), right.inverse(jitter)
    scale = (s * s)[:, None, None]
    grad_a, grad_b = grad_a / scale, grad_b / scale

    d_a, d_b = inverse_left @ grad_a, grad_b @ inverse_right
    inside = inverse_left @ (b.mT @ d_b)  # what of d_b lies in the columns of B, in their coordinates
    if x_mode == "sylvester":
        x = solve_sylvester(left, right, -(d_a @ a.mT))
    elif x_mode == "symmetry":
        x = -0.5 * (d_a @ a.mT) @ inverse_right
    else:
        return d_a, d_b - b @ inside
    return d_a + x @ a, d_b - b @ (inside + x)
