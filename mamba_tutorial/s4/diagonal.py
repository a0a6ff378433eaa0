"""S4D's kernel: a sum of exponentials, since A is diagonal (Gu et al. 2022b)."""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from mamba_tutorial import _fusible
from mamba_tutorial._check import check_choice, check_memory, check_shape
from mamba_tutorial.discretize import diagonal_zoh, exprel, exprel_slope
from mamba_tutorial.hippo import dplr
from mamba_tutorial.ops import register, vjp
from mamba_tutorial.s4._checks import check_batches, check_complex, check_pairs, kernel_length

DiagonalInit = Literal["legs", "lin", "inv", "real"]
INITS = get_args(DiagonalInit)


def diagonal_init(n: int, kind: DiagonalInit = "legs") -> Complex[Tensor, " half"]:
    """Return n/2 eigenvalues of S4D; with their conjugates they are the n of A. Complex128.

        legs  the eigenvalues of LegS's normal part, −½ + i w
        lin   −½ + i π k
        inv   −½ + i (n/π) (n/(2k+1) − 1)
        real  −(k+1), without an imaginary part

    for k = 0, …, n/2 − 1. From Gu et al. (2022b), Section 4. (The Mamba paper prints "lin" as
    −½ + i k, without the π.)

    Raises:
        TypeError, ValueError: n is not an even positive number, or there is no such kind.
    """
    n = check_pairs("n", n)
    check_memory("n", n, n)
    check_choice("kind", kind, INITS)
    k = torch.arange(n // 2).double()
    if kind == "legs":
        return dplr(n).Lambda[: n // 2]
    if kind == "real":
        return torch.complex(-(k + 1), torch.zeros_like(k))
    imaginary = math.pi * k if kind == "lin" else n / math.pi * (n / (2 * k + 1) - 1)
    return torch.complex(torch.full_like(k, -0.5), imaginary)


def diagonal_kernel(
    A_bar: Complex[Tensor, "*channels half"], CB_bar: Complex[Tensor, "*channels half"], length: int
) -> Float[Tensor, "*channels length"]:
    """Return K̄_l = 2 Re Σ_n C_n B̄_n Ā_n^l for l = 0, …, length − 1.

    The sum runs over one of each pair of conjugate modes, hence 2 Re. The powers are a Vandermonde
    matrix (Gu et al. 2022b, Section 3.3), built by doubling: Ā^(l + 2^j) = Ā^l Ā^(2^j).

    Raises:
        TypeError: the dtypes are not complex, or differ.
        ValueError: the shapes do not fit, or length is not positive.
    """
    check_complex(A_bar=A_bar, CB_bar=CB_bar)
    check_shape("A_bar", A_bar, "... half")
    check_shape("CB_bar", CB_bar, "... half", half=A_bar.shape[-1])
    check_batches(A_bar=A_bar.shape[:-1], CB_bar=CB_bar.shape[:-1])
    length = kernel_length(length, CB_bar.numel())
    return _sum_of_powers(*torch.broadcast_tensors(A_bar, CB_bar), length)


def _powers(A_bar: Tensor, length: int) -> Tensor:
    """Return Ā^l for l = 0, …, length − 1, (…, length, half)."""
    powers, next_ = torch.ones_like(A_bar)[..., None, :], A_bar[..., None, :]
    while powers.shape[-2] < length:
        powers = torch.cat([powers, powers * next_], dim=-2)
        next_ = next_ * next_
    return powers[..., :length, :]


def _sum_of_powers(A_bar: Tensor, CB_bar: Tensor, length: int) -> Tensor:
    return 2 * (_powers(A_bar, length) @ CB_bar[..., None]).squeeze(-1).real


# S4D's kernel as an operator: (A, C, Δ, length), with A and C (…, half), Δ (…), and B = 1. Its
# backward pass makes the powers again instead of going back through all doublings.


def _zoh_kernel(A: Tensor, C: Tensor, dt: Tensor, length: int) -> Tensor:
    A_bar, B_bar = diagonal_zoh(A, torch.ones_like(A), dt)
    return _sum_of_powers(A_bar, C * B_bar, length)


def _zoh_kernel_gradient(wanted, upstream, inputs, kept) -> tuple[Tensor | None, ...]:
    return *_ZOH_KERNEL_GRADIENTS(*upstream, *inputs[:3]), None


def _run_zoh_kernel_gradients(
    d: Tensor, A: Tensor, C: Tensor, dt: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """By the chain rule, from K̄ to Ā and C B̄, to ΔA and Δ, to A.

    Of a holomorphic function the gradient is multiplied by the conjugate of the derivative:
    2 Σ_l d_l conj(l C B̄ Ā^(l−1)) for Ā, 2 Σ_l d_l conj(Ā^l) for C B̄.
    """
    step = dt[..., None]
    z = step * A
    A_bar, mean = z.exp(), exprel(z)
    B_bar = step * mean
    turned = _powers(A_bar, d.shape[-1]).conj_physical().mT  # [..., half, length]
    counts = torch.arange(d.shape[-1], device=d.device)
    columns = torch.stack([2 * d, 2 * counts * d], dim=-1).to(turned)
    through_C, through_A = (turned @ columns).unbind(-1)  # Ā's share, but for 1/Ā, that of ΔA
    slope = through_C * (step * exprel_slope(z)).conj_physical() + through_A * B_bar.conj_physical()
    dz = C.conj_physical() * slope
    of_step = A.conj_physical() * dz + (C * mean).conj_physical() * through_C
    return step * dz, through_C * B_bar.conj_physical(), of_step.real.sum(-1)


ZOH_KERNEL = register(
    "diagonal_kernel",
    "(Tensor A, Tensor C, Tensor dt, SymInt length) -> Tensor",
    run=lambda *given: _zoh_kernel(*given).contiguous(),
    like=lambda A, C, dt, length: dt.new_empty(*A.shape[:-1], length),
    definition=_zoh_kernel,
    gradient=_zoh_kernel_gradient,
    fusible=_fusible.zoh_kernel,
)
_ZOH_KERNEL_GRADIENTS = register(
    "diagonal_kernel_backward",
    "(Tensor d, Tensor A, Tensor C, Tensor dt) -> (Tensor, Tensor, Tensor)",
    run=_run_zoh_kernel_gradients,
    like=lambda d, *inputs: tuple(tensor.new_empty(tensor.shape) for tensor in inputs),
    definition=lambda d, *inputs: tuple(
        vjp(_zoh_kernel, (True, True, True, False), (d,), (*inputs, d.shape[-1]))[:3]
    ),
)
