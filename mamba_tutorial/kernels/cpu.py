"""The selective scan on a CPU in float32, fused into one loop by Numba: forward and backward.

    h_t = exp(Δ_t A) h_{t−1} + w(Δ_t A) Δ_t x_t B_t,     y_t = Σ_n C_t h_t

for each sequence, channel d and state n, where w(z) = (e^z − 1)/z for the zero-order hold and 1 for
the rule of the released Mamba. Nothing of the size (batch, length, d_inner, d_state) is stored. A
*program* takes BLOCK channels of a sequence and walks along the length; the state stays in the
cache. Every CHUNK tokens the forward pass writes the state down. The backward pass starts from the
last of these, computes the states of its chunk once more, and goes back through them.

The threads are plain Python threads, for the compiled loops do not hold the interpreter's lock.
"""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from numba import njit
from torch import Tensor

BLOCK = 64  # channels of a program: its states fill a few kilobytes
CHUNK = 32  # tokens between saved states; the chunk's states and decays fill half a megabyte
f32 = np.float32

# Sums over the states may be reordered into vectors. NaN and infinity keep their meaning.
FAST = {"contract", "nsz", "reassoc", "arcp"}
LOOP = {"nogil": True, "fastmath": FAST, "error_model": "numpy"}
PIECE = {"inline": "always", "fastmath": FAST}


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor,
    begins: Tensor | None,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the last state, and the states before every CHUNK tokens. All float32 on the CPU.

    x, dt: (batch, length, d_inner); A: (d_inner, d_state); B, C: (batch, length, d_state); h0 and
    the last state: (batch, d_inner, d_state); the others (batch, chunks, d_inner, d_state). begins:
    (batch, length), true where a new sequence begins. `exact` asks for the zero-order hold of B. dt
    must not be negative.
    """
    inputs = [tensor.contiguous() for tensor in (x, dt, A, B, C, h0, _marks(begins, x))]
    batch, length, d_inner = x.shape
    starts = x.new_empty(batch, -(-length // CHUNK), d_inner, A.shape[1])
    y, h_last = x.new_empty(x.shape), h0.new_empty(h0.shape)
    _run(_forward, batch * -(-d_inner // BLOCK), *inputs, exact, y, starts, h_last)
    return y, h_last, starts


def backward(
    dy: Tensor,
    dh_last: Tensor,
    starts: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    begins: Tensor | None,
    exact: bool,
) -> tuple[Tensor, ...]:
    """Return the gradients of x, dt, A, B, C and h0, from those of y and of the last state."""
    given = [tensor.contiguous() for tensor in (x, dt, A, B, C, _marks(begins, x))]
    batch, length, d_inner = x.shape
    blocks, d_state = -(-d_inner // BLOCK), A.shape[1]
    dx, ddt, dh0 = (x.new_empty(like.shape) for like in (x, x, dh_last))
    # Each block of channels and each sequence adds up its own part; no two threads write to
    # one place, so the result does not depend on who comes first.
    dA = x.new_zeros(batch, d_inner, d_state)
    dB, dC = x.new_zeros(2, blocks, batch, length, d_state).unbind(0)
    upstream = dy.contiguous(), dh_last.contiguous()
    results = dx, ddt, dA, dB, dC, dh0
    _run(_backward, batch * blocks, *given, exact, starts, *upstream, *results)
    return dx, ddt, dA.sum(0), dB.sum(0), dC.sum(0), dh0


def _marks(begins: Tensor | None, x: Tensor) -> Tensor:
    return x.new_zeros(x.shape[:2], dtype=torch.bool) if begins is None else begins


def _run(kernel: Callable, programs: int, *arguments: Tensor | bool) -> None:
    """Run all programs of a kernel, on as many threads as PyTorch would use."""
    arrays = [a.detach().numpy() if isinstance(a, Tensor) else a for a in arguments]
    threads = min(torch.get_num_threads(), programs)
    if threads == 1:
        kernel(0, programs, *arrays)
        return
    numbers = itertools.count()  # of programs: a thread that is held up takes fewer

    def work() -> None:
        while (program := next(numbers)) < programs:
            kernel(program, program + 1, *arrays)

    for thread in [_pool().submit(work) for _ in range(threads)]:
        thread.result()


@cache
def _pool() -> ThreadPoolExecutor:
    """The threads of all calls: it starts one when there is work and none has said it is idle."""
    return ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="selective_scan")


MOST_THREADS = os.cpu_count() or 1
if hasattr(os, "register_at_fork"):  # a forked process has none of the threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _compiled(function: Callable) -> Callable:
    """Compile, and keep the result on disk for the next process where that is possible."""
    try:
        return njit(cache=True, **LOOP)(function)
    except RuntimeError:  # nowhere to write: a package that is read-only and a user without a home
        return njit(**LOOP)(function)


@_compiled
def _forward(begin, end, x, dt, A, B, C, h0, begins, exact, y, starts, h_last):
    _, length, d_inner = x.shape
    d_state = A.shape[1]
    blocks = -(-d_inner // BLOCK)
    for program in range(begin, end):
        b, first = program // blocks, program % blocks * BLOCK
        last = min(first + BLOCK, d_inner)
        h = h0[b, first:last].copy()
        for t in range(length):
            if t % CHUNK == 0:
                starts[b, t // CHUNK, first:last] = h
            if begins[b, t]:
                h[:] = f32(0)
            for d in range(first, last):
                step, drive, total = dt[b, t, d], dt[b, t, d] * x[b, t, d], f32(0)
                for n in range(d_state):
                    a = _exp(step * A[d, n])
                    w = _exprel(step * A[d, n], a) if exact else f32(1)
                    state = a * h[d - first, n] + w * drive * B[b, t, n]
                    h[d - first, n] = state
                    total += state * C[b, t, n]
                y[b, t, d] = total
        h_last[b, first:last] = h


@_compiled
def _backward(
    begin, end, x, dt, A, B, C, begins, exact, starts, dy, dh_last, dx, ddt, dA, dB, dC, dh0
):
    _, length, d_inner = x.shape
    d_state = A.shape[1]
    blocks = -(-d_inner // BLOCK)
    for program in range(begin, end):
        b, block = program // blocks, program % blocks
        first, last = block * BLOCK, min(block * BLOCK + BLOCK, d_inner)
        g = dh_last[b, first:last].copy()  # the gradient of the state, through all that follows
        decay = np.empty((CHUNK, BLOCK, d_state), f32)
        h = np.empty((CHUNK + 1, BLOCK, d_state), f32)  # h[k] is the state before token k
        for chunk in range(starts.shape[1] - 1, -1, -1):
            start, stop = chunk * CHUNK, min(chunk * CHUNK + CHUNK, length)
            h[0, : last - first] = starts[b, chunk, first:last]
            for t in range(start, stop):
                kept = f32(0) if begins[b, t] else f32(1)  # of what was before
                for d in range(first, last):
                    k, i = t - start, d - first
                    step, drive = dt[b, t, d], dt[b, t, d] * x[b, t, d]
                    for n in range(d_state):
                        a = _exp(step * A[d, n])
                        w = _exprel(step * A[d, n], a) if exact else f32(1)
                        decay[k, i, n] = kept * a
                        h[k + 1, i, n] = decay[k, i, n] * h[k, i, n] + w * drive * B[b, t, n]
            for t in range(stop - 1, start - 1, -1):
                for d in range(first, last):
                    k, i = t - start, d - first
                    step, drive = dt[b, t, d], dt[b, t, d] * x[b, t, d]
                    ddrive, dstep = f32(0), f32(0)
                    for n in range(d_state):
                        a, z = decay[k, i, n], step * A[d, n]
                        e = _exp(z) if exact else f32(1)
                        w = _exprel(z, e) if exact else f32(1)
                        gh = g[i, n] + dy[b, t, d] * C[b, t, n]
                        dz = gh * a * h[k, i, n]
                        if exact:
                            dz += gh * drive * B[b, t, n] * _exprel_slope(z, e, w)
                        dC[block, b, t, n] += dy[b, t, d] * h[k + 1, i, n]
                        dB[block, b, t, n] += gh * w * drive
                        dA[b, d, n] += dz * step
                        ddrive += gh * w * B[b, t, n]
                        dstep += dz * A[d, n]
                        g[i, n] = gh * a
                    dx[b, t, d] = ddrive * step
                    ddt[b, t, d] = ddrive * x[b, t, d] + dstep
        dh0[b, first:last] = g


# Numba calls the C library's exp one number at a time. Written out as a polynomial, it becomes
# part of the vector loop. The test compares it with numpy at every size of argument.


@njit(**PIECE)
def _exp(z):
    """(2^k e^(r/2))² with k whole and |r| ≤ ln 2; 0 below e^−104 and ∞ above e^89, as it rounds.

    e^(r/2) by the polynomial that it meets at the seven Chebyshev points of |r| ≤ ln 2: within
    3e-9, a degree less than Taylor's. Of the root even the smallest and the largest are ordinary
    numbers, which its square need not be.
    """
    z = f32(-104) if z < f32(-104) else (f32(89) if z > f32(89) else z)
    k = np.floor(z * f32(0.72134752) + f32(0.5))
    r = (z - k * f32(1.38671875)) + k * f32(4.2438888e-4)  # k 2 ln 2 in two parts, the first exact
    p = f32(2.604147e-3) + r * (f32(2.617227e-4) + r * f32(2.178298e-5))
    p = f32(1) + r * (f32(0.5) + r * (f32(0.125) + r * (f32(0.02083302) + r * p)))
    root = p * np.int32((np.int32(k) + np.int32(127)) << np.int32(23)).view(f32)
    return root * root


@njit(**PIECE)
def _exprel(z, exp):
    """(e^z − 1)/z, near 0 by its series Σ z^k/(k+1)!, where the difference would cancel."""
    p = f32(1 / 5040) + z * (f32(1 / 40320) + z * f32(1 / 362880))
    p = f32(1 / 24) + z * (f32(1 / 120) + z * (f32(1 / 720) + z * p))
    p = f32(1) + z * (f32(1 / 2) + z * (f32(1 / 6) + z * p))
    return p if abs(z) < f32(0.6) else (exp - f32(1)) / z


@njit(**PIECE)
def _exprel_slope(z, exp, exprel):
    """The derivative of `_exprel`, (e^z − exprel(z))/z, near 0 by Σ (k+1) z^k/(k+2)!."""
    p = f32(6 / 5040) + z * (f32(7 / 40320) + z * f32(8 / 362880))
    p = f32(4 / 120) + z * (f32(5 / 720) + z * p)
    p = f32(1 / 2) + z * (f32(2 / 6) + z * (f32(3 / 24) + z * p))
    return p if abs(z) < f32(0.6) else (exp - exprel) / z
