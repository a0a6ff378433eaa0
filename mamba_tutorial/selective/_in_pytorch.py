"""The scan in PyTorch's operations: its definitions, and some tokens at a time."""

import torch
from torch import Tensor

from mamba_tutorial._check import wide
from mamba_tutorial.discretize import exprel, exprel_slope
from mamba_tutorial.scan import linear_scan
from mamba_tutorial.selective._token import advance, discrete, skip_and_gate, step_size

KEPT = 32  # tokens between two states that are kept for the backward pass, here and by Numba
# Numbers of (batch, tokens, d_inner, d_state) that are held at a time.
CHUNK_NUMBERS = 1 << 20


def sequential(
    x, dt, A, B, C, D, z, dt_bias, h, begins, softplus, exact, keep, backend
) -> tuple[Tensor, Tensor]:
    """Return y and the last state by the recurrence, token by token."""
    outputs = []
    for t, token in enumerate(zip(*(part.unbind(1) for part in (x, dt, B, C)), strict=True)):
        x_t, dt_t, B_t, C_t = token
        if begins is not None:
            h = h.masked_fill(begins[:, t, None, None], 0)
        y_t, h = advance(h, x_t, dt_t, A, B_t, C_t, exact)
        outputs.append(y_t)
    return torch.stack(outputs, 1), h


def definition(
    x, dt, A, B, C, D, z, dt_bias, h0, begins, softplus, exact, keep, backend
) -> tuple[Tensor, Tensor]:
    """What the operator computes, without a kernel: all states at once."""
    dtype = wide(x.dtype)
    step = step_size(dt, dt_bias, softplus, dtype)
    a, b = discrete(x.to(dtype), step, A.to(dtype), B.to(dtype), exact, begins)
    states = linear_scan(a, b, h0)
    y = (states * C.to(dtype)[:, :, None]).sum(-1)
    return skip_and_gate(y, x, D, z), states[:, -1]


def pieces(x: Tensor, A: Tensor) -> list[slice]:
    """Cut the length into pieces of CHUNK_NUMBERS numbers, and of whole multiples of KEPT."""
    size = KEPT * max(1, CHUNK_NUMBERS // (KEPT * len(x) * A.numel()))
    return [slice(start, start + size) for start in range(0, x.shape[1], size)]


def _discrete_piece(piece, x, dt, A, B, exact, begins) -> tuple[Tensor, Tensor]:
    x, dt, B = (part[:, piece] for part in (x, dt, B))
    return discrete(x, dt, A, B, exact, None if begins is None else begins[:, piece])


def parallel(x, dt, A, B, C, h, begins, exact) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the last state, and the states before every KEPT tokens."""
    outputs, starts = [], []
    for piece in pieces(x, A):
        a, b = _discrete_piece(piece, x, dt, A, B, exact, begins)
        states = linear_scan(a, b, h)
        outputs.append((states @ C[:, piece, :, None]).squeeze(-1))
        starts += [h[:, None], states[:, KEPT - 1 : -1 : KEPT]]
        h = states[:, -1].clone()
    return torch.cat(outputs, 1), h, torch.cat(starts, 1)


def parallel_backward(dy, G, starts, x, dt, A, B, C, begins, exact) -> tuple[Tensor, ...]:
    """Return the gradients of x, dt, A, B, C and h0.

    With γ_t = dy_t C_t + a_{t+1} γ_{t+1} the gradient of the state, what arrives at z = Δ A is
    γ_t (a_t h_{t−1} + w'(z) Δ x B), and A and Δ get theirs from there. G is that of the last state.
    """
    dA, results = torch.zeros_like(A), []
    for piece in reversed(pieces(x, A)):
        x_, dt_, B_, C_, dy_ = (part[:, piece] for part in (x, dt, B, C, dy))
        h = starts[:, piece.start // KEPT]
        a, b = _discrete_piece(piece, x, dt, A, B, exact, begins)
        states = linear_scan(a, b, h)
        before = torch.cat([h[:, None], states[:, :-1]], 1)
        arriving = dy_[..., None] * C_[:, :, None]
        arriving[:, -1] += G
        later = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1)
        g = linear_scan(later, arriving, reverse=True)
        z, drive = dt_[..., None] * A, (dt_ * x_)[..., None]
        dz, weighed = g * a * before, g
        if exact:
            dz = dz + g * drive * B_[:, :, None] * exprel_slope(z)
            weighed = g * exprel(z)
        dA += (dz * dt_[..., None]).sum((0, 1))
        ddrive = (weighed * B_[:, :, None]).sum(-1)
        results.append(
            (
                ddrive * dt_,
                ddrive * x_ + (dz * A).sum(-1),
                (weighed * drive).sum(2),
                (states * dy_[..., None]).sum(2),
            )
        )
        G = a[:, 0] * g[:, 0]
    dx, ddt, dB, dC = (torch.cat(parts[::-1], 1) for parts in zip(*results, strict=True))
    return dx, ddt, dA, dB, dC, G
