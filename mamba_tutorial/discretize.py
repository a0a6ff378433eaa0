"""From continuous time to steps of length Δ: (A, B, Δ) → (Ā, B̄).

The continuous system h'(t) = A h(t) + B x(t) becomes the recurrence h_k = Ā h_{k−1} + B̄ x_k.
Three rules, one signature:

- `zoh`, the zero-order hold: exact for an input that is constant during each step.
  Used by S4D and, for Ā, by Mamba.
- `bilinear`, or Tustin: the trapezoidal rule. Used by the original S4.
- `euler`: one step along the tangent. Mamba's released code uses it for B̄ alone.

Each takes dense matrices or, with `diagonal=True`, the diagonals only. Each broadcasts over
leading batch axes, works in float32, float64 and complex, and is differentiable in A, B and Δ.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from mamba_tutorial._check import (
    can_look_at,
    check_dtypes,
    check_flag,
    check_shape,
    check_square,
    check_step,
    check_tensors,
    precise,
)

Step = float | int | Float[Tensor, "*#batch"]
Matrix = Inexact[Tensor, "*#batch state state"] | Inexact[Tensor, "*#batch state"]
Inputs = Inexact[Tensor, "*#batch state inputs"] | Inexact[Tensor, "*#batch state"]


def zoh(A: Matrix, B: Inputs, dt: Step, *, diagonal: bool = False) -> tuple[Tensor, Tensor]:
    r"""Discretise with a zero-order hold: the input is constant during each step.

        Ā = exp(Δ A),    B̄ = (∫₀^Δ exp(s A) ds) B  [= A⁻¹ (Ā − I) B  when A can be inverted]

    The integral is Δ · exprel(Δ A), see `exprel` and `matrix_exp_and_exprel`. It is never
    computed through A⁻¹, so a singular A is as exact as any other.

    Args:
        A: (..., state, state), or (..., state) when diagonal. In 1 / (unit of Δ).
        B: (..., state, inputs), or (..., state) when diagonal; of A's dtype and device.
        dt: the step Δ > 0, a number or a real tensor of the batch shape (...).
        diagonal: A and B are the diagonal of A and the one column of B.

    Returns:
        Ā and B̄, shaped like A and B with the batch axes of A, B and dt broadcast together.

    Raises:
        TypeError: an argument has a dtype that is not floating or complex, or not that of A.
        ValueError: a shape does not fit, a value is NaN or infinite, Δ ≤ 0, devices differ.
    """
    return _discretize((dense_zoh, diagonal_zoh), A, B, dt, diagonal)


def bilinear(A: Matrix, B: Inputs, dt: Step, *, diagonal: bool = False) -> tuple[Tensor, Tensor]:
    r"""Discretise with the bilinear (Tustin, trapezoidal) rule.

        Ā = (I − Δ/2 A)⁻¹ (I + Δ/2 A),    B̄ = (I − Δ/2 A)⁻¹ Δ B

    The slope over a step is the mean of the slopes at its two ends, with the input held. Maps
    the left half-plane onto the unit disc, so a stable system stays stable for every Δ. This is
    the rule of S4 (Gu et al. 2022, equation 3).

    Args, Returns and Raises are those of `zoh`; in addition:

    Raises:
        ValueError: Δ A has an eigenvalue of exactly 2, where the rule is undefined.
    """
    A_bar, B_bar = _discretize((dense_bilinear, diagonal_bilinear), A, B, dt, diagonal)
    if can_look_at(A_bar) and not A_bar.isfinite().all():
        needed = "expected I - dt/2 A to be invertible; choose another dt or use zoh"
        raise ValueError(f"dt makes 2 an eigenvalue of dt A, {needed}")
    return A_bar, B_bar


def euler(A: Matrix, B: Inputs, dt: Step, *, diagonal: bool = False) -> tuple[Tensor, Tensor]:
    r"""Discretise with the forward Euler rule: follow the tangent for one step.

        Ā = I + Δ A,    B̄ = Δ B

    A stable mode λ stays stable only while |1 + Δ λ| < 1.

    Args, Returns and Raises are those of `zoh`.
    """
    return _discretize((dense_euler, diagonal_euler), A, B, dt, diagonal)


METHODS = {"zoh": zoh, "bilinear": bilinear, "euler": euler}


# The rules themselves, without checks, for those that apply them again and again. dt: (...).


def diagonal_zoh(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Return Ā and B̄ of diagonals (..., state)."""
    z = dt[..., None] * A
    return torch.exp(z), dt[..., None] * exprel(z) * B


def dense_zoh(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Return Ā and B̄ of matrices."""
    dt = dt[..., None, None]
    A_bar, mean = matrix_exp_and_exprel(dt * A)
    return A_bar, dt * mean @ B


def diagonal_bilinear(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Return Ā and B̄ of diagonals (..., state); not finite where the rule is undefined."""
    half = dt[..., None] / 2 * A
    return (1 + half) / (1 - half), dt[..., None] * B / (1 - half)


def dense_bilinear(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Return Ā and B̄ of matrices; not finite where the rule is undefined."""
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    dt = dt[..., None, None]
    left = identity - dt / 2 * A
    factors, pivots, _ = torch.linalg.lu_factor_ex(left)
    A_bar = torch.linalg.lu_solve(factors, pivots, (identity + dt / 2 * A).expand_as(left))
    return A_bar, torch.linalg.lu_solve(factors, pivots, dt * B)


def diagonal_euler(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Return Ā and B̄ of diagonals (..., state)."""
    return 1 + dt[..., None] * A, dt[..., None] * B


def dense_euler(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """Return Ā and B̄ of matrices."""
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    dt = dt[..., None, None]
    return identity + dt * A, dt * B


def exprel(z: Inexact[Tensor, "*shape"]) -> Inexact[Tensor, "*shape"]:
    """Return (eᶻ − 1) / z, elementwise, with the value 1 at z = 0.

    The relative exponential, as in `scipy.special.exprel`; here also complex, and with exact
    derivatives. Where eᶻ overflows (z > 88 in float32) so does this, in scipy a little later; a
    stable model has Re z ≤ 0. Near 0 both the quotient and its derivative cancel, so for |z| < ½ it
    is the Taylor series Σ zʲ / (j + 1)!, whose 15 terms reach the last bit of float64.

    Raises:
        TypeError: z is no floating or complex tensor.
    """
    check_dtypes(z=z)
    small = z.abs() < 0.5
    near = torch.where(small, z, torch.zeros_like(z))  # each branch sees only its own range,
    far = torch.where(small, torch.ones_like(z), z)  # or NaN would leak into the gradient
    series = torch.ones_like(z)
    for j in range(15, 1, -1):
        series = 1 + series * near / j
    return torch.where(small, series, torch.expm1(far) / far)


def exprel_slope(z: Inexact[Tensor, "*shape"]) -> Inexact[Tensor, "*shape"]:
    """Return the derivative of `exprel`, (eᶻ − exprel(z)) / z, elementwise; ½ at z = 0.

    For |z| < ½ by its series Σ (j + 1) zʲ / (j + 2)!. The errors are those of `exprel`.
    """
    check_dtypes(z=z)
    small = z.abs() < 0.5
    near = torch.where(small, z, torch.zeros_like(z))
    far = torch.where(small, torch.ones_like(z), z)
    series = torch.zeros_like(z)
    for j in range(14, -1, -1):
        series = (j + 1) / math.factorial(j + 2) + series * near
    return torch.where(small, series, (torch.exp(far) - torch.expm1(far) / far) / far)


def matrix_exp_and_exprel(
    Z: Inexact[Tensor, "*batch state state"],
) -> tuple[Inexact[Tensor, "*batch state state"], Inexact[Tensor, "*batch state state"]]:
    """Return exp(Z) and exprel(Z) = ∫₀¹ exp(s Z) ds of square matrices.

    Near 0, where Z is halved to, exprel is its Taylor series Σ Zʲ / (j + 1)!. From there, with
    E = exp(Z) − I = Z exprel(Z), both are doubled back:

        exprel(2Z) = exprel(Z) + E exprel(Z) / 2,    exp(2Z) − I = 2 E + E²

    (after the modified squaring of Skaflestad and Wright 2009). To square exp(Z) itself, as
    `torch.matrix_exp` does, would lose of a slow mode beside a fast one what 1 + small rounds away:
    of diag(−10⁶, −1) six digits. E keeps them where Z has them, as diagonal and triangular matrices
    do; each entry of a dense one is itself rounded to a share of the fastest mode.

    Computed in double precision.

    Raises:
        TypeError: Z is no floating or complex tensor.
        ValueError: Z is not (..., state, state), or holds a NaN or an infinity.
    """
    check_tensors(Z=Z)
    check_square("Z", Z)
    given = Z.dtype
    Z = precise(Z)
    halvings = _halvings(Z)
    Z, identity = Z * 0.5**halvings, torch.eye(Z.shape[-1], dtype=Z.dtype, device=Z.device)
    mean = identity.expand_as(Z)
    for j in range(15, 1, -1):
        mean = identity + Z @ mean / j
    E = Z @ mean
    for _ in range(halvings):
        mean, E = mean + E @ mean / 2, 2 * E + E @ E
    return (identity + E).to(given), mean.to(given)


def _halvings(Z: Tensor) -> int:
    """Return how often to halve Z, so that no row sums to more than ½."""
    if not can_look_at(Z):
        return 64  # for as large ones as double precision knows modes of; too many do no harm
    rows = Z.detach().abs().sum(-1)
    return max(0, math.frexp(rows.max().item())[1] + 1) if rows.numel() else 0


def _discretize(
    rules: tuple[Callable, Callable], A: Tensor, B: Tensor, dt: Step, diagonal: bool
) -> tuple[Tensor, Tensor]:
    """Check what the three rules share, and apply one, given for matrices and for diagonals.

    Half precision is computed in float32.
    """
    rule = rules[check_flag("diagonal", diagonal)]
    check_tensors(A=A, B=B)
    if diagonal:
        check_shape("A", A, "... state")
        check_shape("B", B, "... state", state=A.shape[-1])
    else:
        check_square("A", A)
        check_shape("B", B, "... state inputs", state=A.shape[-1])
    dt = check_step(dt, like=A)
    axes = 1 if diagonal else 2
    batches = [A.shape[:-axes], B.shape[:-axes], dt.shape]
    try:
        torch.broadcast_shapes(*batches)
    except RuntimeError:
        given = ", ".join(f"{n} {tuple(b)}" for n, b in zip(("A", "B", "dt"), batches, strict=True))
        raise ValueError(f"batch axes do not broadcast together: {given}") from None
    if A.dtype in (torch.float16, torch.bfloat16):
        A_bar, B_bar = rule(A.float(), B.float(), dt.float())
        return A_bar.to(A.dtype), B_bar.to(A.dtype)
    return rule(A, B, dt)
