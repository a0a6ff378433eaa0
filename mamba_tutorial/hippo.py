"""HiPPO: state matrices whose state is the best summary of the past.

The past of a signal is projected onto N basis functions under a measure, and the coefficients obey
a linear differential equation (Gu et al. 2020). Three measures:

- LegS, `hippo_legs`: the whole past, equally weighted, stretched as time goes by; Legendre basis.
  c'(t) = (1/t) (A c + B x). The S4 models drop the 1/t.
- LegT, `hippo_legt`: the last θ, Legendre basis. c'(t) = A c + B x.
- Fourier, `hippo_fourier`: the last θ, sines and cosines. c'(t) = A c + B x.

`online_memory` runs the equations, `basis` turns coefficients back into a signal, and `nplr` and
`dplr` find the structure in LegS that S4 computes with.

Everywhere A is the stable one: h' = A h + B x with eigenvalues in the left half-plane. The papers
print LegS with the opposite sign and write h' = −A h + B x.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from mamba_tutorial._check import (
    check_choice,
    check_length,
    check_memory,
    check_number,
    check_shape,
    check_tensors,
    wide,
)
from mamba_tutorial.discretize import zoh

Measure = Literal["legs", "legt", "fourier"]


def hippo_legs(n: int) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n 1"]]:
    """Return A and B of LegS, float64.

        A_nk = −√((2n+1)(2k+1)) for n > k,  −(n+1) for n = k,  0 for n < k;   B_n = √(2n+1)

    From Gu et al. (2020), Theorem 2, with the sign of a stable system, as `transition("legs")` of
    the released S4 code. A is lower-triangular, with the eigenvalues −1, …, −n.

    Raises:
        TypeError, ValueError: n is not a positive whole number.
    """
    n = _check_order(n)
    root = _roots(n)
    below = torch.tril(torch.outer(root, root), diagonal=-1)
    return -below - torch.diag(torch.arange(n).double() + 1), root[:, None]


def hippo_legt(n: int, window: float = 1.0) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n 1"]]:
    """Return A and B of LegT for a window of length θ, float64.

        A_nk = −(1/θ) √((2n+1)(2k+1)) · (1 if k ≤ n else (−1)^(n−k));   B_n = (1/θ) √(2n+1)

    From Gu et al. (2020), Theorem 1, in the orthonormal basis of `basis`. What leaves the window,
    x(t − θ), is not remembered; it is taken from the reconstruction itself.

    Raises:
        TypeError, ValueError: n is not a positive whole number.
    """
    n, window = _check_order(n), check_number("window", window, above=0)
    root, index = _roots(n), torch.arange(n)
    alternating = (-1.0) ** (index[:, None] - index).double()
    sign = torch.where(index <= index[:, None], torch.ones(n, n).double(), alternating)
    return -torch.outer(root, root) * sign / window, root[:, None] / window


def hippo_fourier(n: int, window: float = 1.0) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n 1"]]:
    """Return A and B of the truncated Fourier measure for a window of length θ, float64.

    With φ the basis (1, √2 cos 2πτ, √2 sin 2πτ, √2 cos 4πτ, …) and φ(0) its values at the edge,

        A = (1/θ) (−2 φ(0) φ(0)ᵀ + R),   B = (2/θ) φ(0)

    where R turns each pair (cos, sin) with its frequency. At the edge a Fourier series takes the
    mean of x(t − θ) and x(t), which gives the factors 2. From Gu et al. (2020), Appendix D.

    Raises:
        TypeError, ValueError: n is not an odd positive number: one constant, and pairs.
    """
    n, window = _check_order(n), check_number("window", window, above=0)
    if n % 2 == 0:
        raise ValueError(f"n is {n}, expected an odd number: one constant, and pairs")
    edge = basis(torch.zeros(1).double(), n, "fourier")[0]
    A = -2 * torch.outer(edge, edge)
    for frequency in range(1, n // 2 + 1):
        cos, sin = 2 * frequency - 1, 2 * frequency
        A[cos, sin] += 2 * torch.pi * frequency
        A[sin, cos] -= 2 * torch.pi * frequency
    return A / window, 2 * edge[:, None] / window


def basis(
    position: Float[Tensor, " points"], n: int, measure: Measure = "legs"
) -> Float[Tensor, "points n"]:
    """Return the n orthonormal basis functions of a measure at relative positions.

    Position 0 is the far end of what is remembered and 1 is now: s = position · t for LegS, and
    s = t − θ + position · θ for the windows. A signal with coefficients c is `basis(…) @ c` there.
    """
    check_choice("measure", measure, ["legs", "legt", "fourier"])
    check_tensors(position=position)
    if position.is_complex():
        raise TypeError(f"position has dtype {position.dtype}, expected a real one")
    check_shape("position", position, "points")
    n = _check_order(n, len(position))
    if measure == "fourier":
        columns = [torch.ones_like(position)]
        for index in range(1, n):
            angle = 2 * torch.pi * ((index + 1) // 2) * position
            columns.append(2**0.5 * (torch.cos(angle) if index % 2 else torch.sin(angle)))
        return torch.stack(columns, dim=-1)
    z = 2 * position - 1
    columns = [torch.ones_like(z), z]
    for index in range(1, n - 1):  # Bonnet: (i+1) P_{i+1} = (2i+1) z P_i − i P_{i−1}
        following = ((2 * index + 1) * z * columns[-1] - index * columns[-2]) / (index + 1)
        columns.append(following)
    return torch.stack(columns[:n], dim=-1) * _roots(n).to(z)


def online_memory(
    x: Float[Tensor, "*batch length"],
    n: int,
    measure: Measure = "legs",
    window: float | None = None,
) -> Float[Tensor, "*batch length n"]:
    """Read a signal sample by sample and return the n coefficients after each of them.

    Each sample is held for one unit of time, and the equation of the measure is solved exactly.
    For LegS the factor 1/t is no obstacle: with the logarithm of time as the clock it is gone, so
    reading sample k is a zero-order hold over the step Δ = ln((k + 1) / k). Of the first sample
    only the constant is known.

    Args:
        x: (..., length).
        n: the number of coefficients.
        measure: "legs", "legt" or "fourier".
        window: θ in samples, for the last two measures only.

    Returns:
        (..., length, n); `basis` turns the last axis back into a signal.

    Raises:
        TypeError: x has a dtype that is not floating.
        ValueError: x is empty, NaN or infinite, or the window is missing or out of place.
    """
    check_choice("measure", measure, ["legs", "legt", "fourier"])
    check_tensors(x=x)
    if x.is_complex():
        raise TypeError(f"x has dtype {x.dtype}, expected a real one")
    check_shape("x", x, "... length")
    check_length(x.shape[-1], name="the length of x")
    n = _check_order(n, x.numel())
    if (window is None) != (measure == "legs"):
        raise ValueError(f"window is {window}, expected one for legt and fourier, None for legs")
    if measure == "legs":
        clock = torch.arange(1, x.shape[-1]).double()
        A_bar, B_bar = zoh(*hippo_legs(n), torch.log1p(1 / clock))
    else:
        check_number("window", window, above=0)
        system = hippo_legt(n, window) if measure == "legt" else hippo_fourier(n, window)
        A_bar, B_bar = (matrix.expand(x.shape[-1], -1, -1) for matrix in zoh(*system, 1.0))
    # in half precision the coefficients would lose at every step more than it adds
    given, x = x.dtype, x.to(wide(x.dtype))
    c = x.new_zeros(*x.shape[:-1], n)
    states = []
    if measure == "legs":
        c[..., 0] = x[..., 0]
        states, x = [c], x[..., 1:]
    for keep, take, sample in zip(A_bar.to(x), B_bar.to(x), x.unbind(-1), strict=True):
        c = c @ keep.mT + sample[..., None] * take[:, 0]
        states.append(c)
    return torch.stack(states, dim=-2).to(given)


def nplr(n: int) -> tuple[Float[Tensor, "n n"], Float[Tensor, " n"]]:
    """Split LegS into a normal matrix and a rank-one matrix, A = S − P Pᵀ.

    With P_n = √(n + ½), S = A + P Pᵀ is −½ I plus a skew matrix, hence normal (Gu et al. 2022,
    Appendix C.2).

    Returns:
        S: (n, n) and P: (n,), float64.
    """
    A, _ = hippo_legs(n)
    P = torch.sqrt(torch.arange(n).double() + 0.5)
    return A + torch.outer(P, P), P


class DPLR(NamedTuple):
    """Diagonal plus low rank: A = V (diag(Λ) − P P*) V*, and B in the same coordinates."""

    Lambda: Complex[Tensor, " n"]
    P: Complex[Tensor, " n"]
    B: Complex[Tensor, " n"]
    V: Complex[Tensor, "n n"]


def dplr(n: int) -> DPLR:
    """Return LegS in the coordinates that make its normal part diagonal, complex128.

    S + ½ I is skew, so −i (S + ½ I) is Hermitian: a stable eigensolver gives real frequencies w
    and a unitary V, and Λ = −½ + i w. (The eigenvectors of A itself are useless: their condition
    number grows exponentially with n.) Frequencies come in pairs ±w, sorted by size; P and B of a
    pair are conjugate, because V's columns are.

    Raises:
        TypeError, ValueError: n is not an even positive number.
    """
    n = _check_order(n)
    if n % 2:
        raise ValueError(f"n is {n}, expected an even number, for pairs of eigenvalues")
    S, P = nplr(n)
    skew = (S - S.mT) / 2
    w, V = torch.linalg.eigh(-1j * skew.to(torch.complex128))
    half = V[:, n // 2 :]  # eigh sorts ascending: the upper half has w > 0
    w = w[n // 2 :]
    V = torch.cat([half, half.conj()], dim=1)
    Lambda = -0.5 + 1j * torch.cat([w, -w])
    B = hippo_legs(n)[1][:, 0].to(V)
    return DPLR(Lambda, V.mH @ P.to(V), V.mH @ B, V)


def _check_order(n: int, rows: int | None = None) -> int:
    """Check n, and that there is room for n numbers in each of n rows, or of as many as said."""
    n = check_length(n, name="n")
    check_memory("n", n, n * (n if rows is None else rows))
    return n


def _roots(n: int) -> Tensor:
    return torch.sqrt(2 * torch.arange(n).double() + 1)
