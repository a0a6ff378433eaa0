"""The equations of one token: its step, its decay and input, the state after it, what leaves."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_tutorial.discretize import exprel


def advance(
    h: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, exact: bool
) -> tuple[Tensor, Tensor]:
    """One step of the recurrence, and its output."""
    a, b = discrete(x, dt, A, B, exact)
    h = a * h + b
    return (h @ C[..., None]).squeeze(-1), h


def discrete(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, exact: bool, begins: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return exp(Δ A), but 0 where a sequence begins, and w(Δ A) Δ x B.

    Both are (..., d_inner, d_state).
    """
    z = dt[..., None] * A
    a, b = z.exp(), (dt * x)[..., None] * B[..., None, :]
    a = a if begins is None else a.masked_fill(begins[..., None, None], 0)
    return a, exprel(z) * b if exact else b


def step_size(dt: Tensor, bias: Tensor | None, softplus: bool, dtype: torch.dtype) -> Tensor:
    """Return Δ in a dtype, after bias and softplus."""
    dt = dt.to(dtype) if bias is None else dt.to(dtype) + bias.to(dtype)
    return F.softplus(dt) if softplus else dt


def skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """Return (y + D x) · silu(z), computed in the dtype of y, in that of x."""
    if D is not None:
        y = y + D.to(y.dtype) * x.to(y.dtype)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype)
