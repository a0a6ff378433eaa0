"""The scan, its gradients, its end and its step as PyTorch's operators.

The arguments of the scan, all positional, are the tensors of `selective_scan` up to h0, then
`begins`, its starts, softplus, exact, whether to keep some states for the gradient, and the
backend. Where a sequence begins, the decay is zero, which is all that it takes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_tutorial._check import wide
from mamba_tutorial.discretize import exprel
from mamba_tutorial.ops import register, vjp, without_autocast
from mamba_tutorial.selective._checks import in_numba, may_learn
from mamba_tutorial.selective._in_pytorch import (
    KEPT,
    definition,
    parallel,
    parallel_backward,
    pieces,
    sequential,
)
from mamba_tutorial.selective._token import advance, skip_and_gate, step_size


def run_scan(operator: Callable, inputs: tuple) -> tuple[Tensor, Tensor | None]:
    """Return y and the last state, of what `check_scan` returned.

    The operator is `scan`, or takes its place. On a GPU it does all of it; elsewhere PyTorch does
    bias and softplus before it, skip connection and gate after it.
    """
    x, dt, A, B, C, D, z, dt_bias, h0, begins, softplus, exact, _, backend = inputs
    with without_autocast(x):
        if backend == "triton":
            return operator(*inputs)
        dtype = wide(x.dtype)
        if h0 is None:
            h0 = x.new_zeros(x.shape[0], *A.shape, dtype=dtype)
        step = step_size(dt, dt_bias, softplus, dtype)
        tokens = [tensor.to(dtype) for tensor in (x, step, A, B, C)]
        rest = h0, begins, False, exact, may_learn([*tokens, h0]), backend
        y, h_last = operator(*tokens, None, None, None, *rest)
        return skip_and_gate(y, x, D, z), h_last


def scan(*inputs) -> tuple[Tensor, Tensor]:
    """Return y and the last state."""
    return sequential(*inputs) if inputs[-1] == "sequential" else SCAN(*inputs)[:2]


def _run_scan(
    x, dt, A, B, C, D, z, dt_bias, h0, begins, softplus, exact, keep, backend
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "triton":
        from mamba_tutorial.kernels.selective_scan import forward

        given = x, dt, A, B, C, D, z, dt_bias, h0, begins
        y, h_last, starts = forward(*given, softplus, exact, keep)
    elif in_numba(backend):
        from mamba_tutorial.kernels.cpu import forward

        y, h_last, starts = forward(x, dt, A, B, C, h0, begins, exact)
    else:
        y, h_last, starts = parallel(x, dt, A, B, C, h0, begins, exact)
    return y, h_last, starts if keep else h_last.new_empty(0)


def _like_scan(
    x, dt, A, B, C, D, z, dt_bias, h0, begins, softplus, exact, keep, backend
) -> tuple[Tensor, Tensor, Tensor]:
    y, h_last = x.new_empty(x.shape), _like_state(x, A, backend)
    if not keep:
        return y, h_last, h_last.new_empty(0)
    (batch, length, d_inner), d_state, every = x.shape, A.shape[1], KEPT
    state = d_inner, d_state
    if backend == "triton":
        from mamba_tutorial.kernels.selective_scan import kept_states, spacing

        every, state = spacing(x, d_state, exact), (kept_states(x, d_state, exact), d_inner)
    return y, h_last, h_last.new_empty(batch, -(-length // every), *state)


def _like_state(x: Tensor, A: Tensor, backend: str) -> Tensor:
    """Make room for a state; on a GPU neighbouring channels are neighbours in memory."""
    d_inner, d_state = A.shape
    if backend == "triton":
        return x.new_empty(x.shape[0], d_state, d_inner, dtype=torch.float32).mT
    return x.new_empty(x.shape[0], d_inner, d_state)


def _scan_gradient(wanted, upstream, inputs, kept) -> tuple:
    *given, softplus, exact, _, backend = inputs
    dy, dh_last, _ = upstream
    dx, ddt, dz, shared, own, dh0 = GRADIENTS(*given, dy, dh_last, *kept, softplus, exact, backend)
    (dB, dC), n = shared.unbind(0), given[2].shape[1]
    return dx, ddt, own[:n].mT, dB, dC, own[n], dz, own[n + 1], dh0, *(None,) * 5


# Its gradients: of x, dt and z (empty if there is none); of B and C, one above the other; of A, D
# and dt_bias in the rows of (d_state + 2, d_inner); and of h0.


def _run_gradients(
    x, dt, A, B, C, D, z, dt_bias, h0, begins, dy, dh_last, starts, softplus, exact, backend
) -> tuple[Tensor, ...]:
    if starts.numel() == 0:  # nobody could know that they would be asked for
        given = x, dt, A, B, C, D, z, dt_bias, h0, begins
        starts = _run_scan(*given, softplus, exact, True, backend)[2]
    if backend == "triton":
        from mamba_tutorial.kernels.selective_scan import backward

        given = x, dt, A, B, C, D, z, dt_bias, begins
        return backward(dy, dh_last, starts, *given, softplus, exact)
    dy = torch.zeros_like(x) if dy is None else dy
    dh_last = torch.zeros_like(h0) if dh_last is None else dh_last
    backward = parallel_backward
    if in_numba(backend):
        from mamba_tutorial.kernels.cpu import backward
    dx, ddt, dA, dB, dC, dh0 = backward(dy, dh_last, starts, x, dt, A, B, C, begins, exact)
    own = torch.cat([dA.mT, dA.new_zeros(2, len(dA))])
    return dx, ddt, x.new_empty(0), torch.stack([dB, dC]), own, dh0


def _like_gradients(
    x, dt, A, B, C, D, z, dt_bias, h0, begins, dy, dh_last, starts, softplus, exact, backend
) -> tuple[Tensor, ...]:
    dh0 = _like_state(x, A, backend)
    shared = B.dtype if B.dtype == C.dtype else torch.float32
    return (
        x.new_empty(x.shape),
        dt.new_empty(dt.shape),
        x.new_empty(0) if z is None else z.new_empty(z.shape),
        B.new_empty(2, *B.shape, dtype=shared),
        dh0.new_empty(A.shape[1] + 2, A.shape[0]),
        dh0,
    )


def _gradients_definition(
    x, dt, A, B, C, D, z, dt_bias, h0, begins, dy, dh_last, starts, softplus, exact, backend
) -> tuple[Tensor, ...]:
    given = x, dt, A, B, C, D, z, dt_bias, h0
    wanted = [tensor is not None for tensor in given]
    inputs = *given, begins, softplus, exact, False, backend
    found = vjp(definition, wanted, (dy, dh_last), inputs)
    dx, ddt, dA, dB, dC, dD, dz, dbias, dh0 = found
    none = dA.new_zeros(len(dA))
    own = torch.cat([dA.mT, *((none if row is None else row)[None] for row in (dD, dbias))])
    empty = x.new_empty(0)
    dh0 = torch.zeros_like(_like_state(x, A, backend)) if dh0 is None else dh0
    return dx, ddt, empty if dz is None else dz, torch.stack([dB, dC]), own, dh0


_TENSORS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias"
)
SCAN = register(
    "selective_scan",
    f"({_TENSORS}, Tensor? h0, Tensor? begins, bool softplus, bool exact, bool keep, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    run=_run_scan,
    like=_like_scan,
    definition=definition,
    gradient=_scan_gradient,
    kept=(2,),
    hidden=1,
)
GRADIENTS = register(
    "selective_scan_backward",
    f"({_TENSORS}, Tensor? h0, Tensor? begins, Tensor? dy, Tensor? dh_last, Tensor starts,"
    " bool softplus, bool exact, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=_run_gradients,
    like=_like_gradients,
    definition=_gradients_definition,
)


# The scan without y: what all tokens give, and ΣΔ. Forwards that is the last state, begun at zero,
#     Σ_t exp(A Σ_{s>t} Δ_s) w(Δ_t A) Δ_t u_t V_t,     of u = x and V = B;
# in reverse, what they add to the gradient of h0,
#     Σ_t exp(A Σ_{s≤t} Δ_s) silu(z_t) u_t V_t,     of u = dy and V = C.


def _run_end(u, dt, A, V, z, dt_bias, softplus, exact, reverse, backend) -> tuple[Tensor, Tensor]:
    given = u, dt, A, V, z, dt_bias, softplus, exact, reverse
    if backend == "triton":
        from mamba_tutorial.kernels.selective_scan import end

        return end(*given)
    return _end(*given, backend)


def _end(u, dt, A, V, z, dt_bias, softplus, exact, reverse, backend) -> tuple[Tensor, Tensor]:
    dtype = wide(u.dtype)
    step = step_size(dt, dt_bias, softplus, dtype)
    u, A, V = (tensor.to(dtype) for tensor in (u, A, V))
    if z is not None:
        u = u * F.silu(z.to(dtype))
    total = step.cumsum(1) if reverse else step.flip(1).cumsum(1).flip(1)
    between, drive = (total, u) if reverse else (total - step, step * u)
    end = torch.zeros_like(_like_state(u, A, backend))
    for piece in pieces(u, A):
        # of an unstable model it may overflow where nothing is given, and ∞ · 0 is not a number
        decay = torch.exp(between[:, piece, :, None] * A).clamp(max=torch.finfo(dtype).max)
        if exact and not reverse:
            decay = decay * exprel(step[:, piece, :, None] * A)
        end = end + (decay * drive[:, piece, :, None] * V[:, piece, None]).sum(1)
    return end, step.sum(1)


END = register(
    "selective_scan_end",
    "(Tensor u, Tensor dt, Tensor A, Tensor V, Tensor? z, Tensor? dt_bias, bool softplus,"
    " bool exact, bool reverse, str backend) -> (Tensor, Tensor)",
    run=_run_end,
    like=lambda u, dt, A, *rest: (end := _like_state(u, A, rest[-1]), end.new_empty(u.shape[::2])),
    definition=_end,
)


def _run_step(h, x, dt, A, B, C, D, z, dt_bias) -> tuple[Tensor, Tensor]:
    from mamba_tutorial.kernels.decode import selective_step

    return selective_step(h, x, dt, A, B, C, D, z, dt_bias)


def read_token(
    h, x, dt, A, B, C, D, z, dt_bias, softplus=True, exact=False
) -> tuple[Tensor, Tensor]:
    step = step_size(dt, dt_bias, softplus, h.dtype)
    y, h = advance(h, *(tensor.to(h.dtype) for tensor in (x, step, A, B, C)), exact)
    return skip_and_gate(y, x, D, z), h


STEP = register(
    "selective_step",
    f"(Tensor h, {_TENSORS}) -> (Tensor, Tensor)",
    run=_run_step,
    like=lambda h, x, *_: (x.new_empty(x.shape), h.new_empty(h.shape)),
    definition=read_token,
)
