"""The forward pass of the selective scan, in six steps; the seventh is the package's kernel.

    h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t B_t,     y_t = Σ_n C_t h_t

x, dt: (batch, length, channels); A: (channels, states); B, C: (batch, length, states).
"""

import torch
from torch import Tensor

from mamba_tutorial.kernels._gates import LOG2E, sigmoid, softplus
from mamba_tutorial.kernels._launch import on
from mamba_tutorial.kernels._triton import tl, triton
from mamba_tutorial.kernels.selective_scan.forward_in_triton import row_of, with_row

LANES, TILE = 32, 8


def one_state(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Return y for rows of one channel with one state: A (rows,), all others (rows, length)."""
    y = torch.empty_like(x)
    with on(x):
        _one_state[(len(x),)](x, dt, A, B, C, y, x.shape[1], num_warps=1)
    return y


def all_states(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Return y; a program for each channel of each sequence. The states are a power of two."""
    (batch, length, channels), y = x.shape, torch.empty_like(x)
    with on(x):
        _all_states[(batch * channels,)](
            x, dt, A, B, C, y, length, channels, STATES=A.shape[1], num_warps=1
        )
    return y


def many_channels(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Return y; a program for LANES channels, of which there are a multiple."""
    (batch, length, channels), y = x.shape, torch.empty_like(x)
    with on(x):
        _many_channels[(batch * channels // LANES,)](
            *(x, dt, A.T.contiguous(), B, C, y, length, channels),
            STATES=A.shape[1], LANES=LANES, num_warps=1,
        )  # fmt: skip
    return y


def in_tiles(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, stages: int = 3) -> Tensor:
    """Return y; the length is a multiple of TILE, too. `stages` − 1 tiles are in flight."""
    (batch, length, channels), y = x.shape, torch.empty_like(x)
    with on(x):
        _in_tiles[(batch * channels // LANES,)](
            *(x, dt, A.T.contiguous(), B, C, y, length, channels),
            STATES=A.shape[1], LANES=LANES, TILE=TILE, STAGES=stages, num_warps=1,
        )  # fmt: skip
    return y


def gated(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor
) -> Tensor:
    """Return (y + D x) silu(z), with Δ = softplus(dt + dt_bias)."""
    (batch, length, channels), y = x.shape, torch.empty_like(x)
    with on(x):
        _gated[(batch * channels // LANES,)](
            *(x, dt, A.T.contiguous(), B, C, D, z, dt_bias, y, length, channels),
            STATES=A.shape[1], LANES=LANES, TILE=TILE, num_warps=1,
        )  # fmt: skip
    return y


def any_size(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    h0: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the same and the last state, from h0, (batch, channels, states), and of any size."""
    (batch, length, channels), states, y = x.shape, A.shape[1], torch.empty_like(x)
    last = torch.empty_like(h0.mT, memory_format=torch.contiguous_format)
    with on(x):
        _any_size[(batch * triton.cdiv(channels, LANES),)](
            *(x, dt, A.T.contiguous(), B, C, D, z, dt_bias, h0.mT.contiguous(), y, last),
            *(length, channels, states), STATES=triton.next_power_of_2(states),
            LANES=LANES, TILE=TILE, num_warps=1,
        )  # fmt: skip
    return y, last.mT


@triton.jit
def _one_state(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, y_ptr, length):
    row = tl.program_id(0)
    A = tl.load(A_ptr + row)
    h = 0.0
    for t in range(row * length, (row + 1) * length):
        x, dt = tl.load(x_ptr + t), tl.load(dt_ptr + t)
        B, C = tl.load(B_ptr + t), tl.load(C_ptr + t)
        h = tl.exp(dt * A) * h + dt * x * B
        tl.store(y_ptr + t, C * h)


@triton.jit
def _all_states(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, y_ptr, length, channels, STATES: tl.constexpr
):  # fmt: skip
    batch, d = tl.program_id(0) // channels, tl.program_id(0) % channels
    n = tl.arange(0, STATES)
    A = tl.load(A_ptr + d * STATES + n)
    h = tl.zeros([STATES], tl.float32)
    for t in range(batch * length, (batch + 1) * length):
        x = tl.load(x_ptr + t * channels + d)
        dt = tl.load(dt_ptr + t * channels + d)
        B, C = tl.load(B_ptr + t * STATES + n), tl.load(C_ptr + t * STATES + n)
        h = tl.exp(dt * A) * h + dt * x * B
        tl.store(y_ptr + t * channels + d, tl.sum(C * h))


@triton.jit
def _many_channels(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, y_ptr, length, channels,
    STATES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    blocks = channels // LANES
    batch, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    n = tl.arange(0, STATES)[:, None]
    d = block * LANES + tl.arange(0, LANES)[None, :]
    A = tl.load(A_ptr + n * channels + d)  # (states, channels) in memory
    h = tl.zeros([STATES, LANES], tl.float32)
    for t in range(batch * length, (batch + 1) * length):
        x = tl.load(x_ptr + t * channels + d)
        dt = tl.load(dt_ptr + t * channels + d)
        B, C = tl.load(B_ptr + t * STATES + n), tl.load(C_ptr + t * STATES + n)
        h = tl.exp(dt * A) * h + dt * x * B
        tl.store(y_ptr + t * channels + d, tl.sum(C * h, axis=0, keep_dims=True))


@triton.jit
def _in_tiles(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, y_ptr, length, channels,
    STATES: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    blocks = channels // LANES
    batch, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    t, n = tl.arange(0, TILE)[:, None], tl.arange(0, STATES)
    d = block * LANES + tl.arange(0, LANES)
    at = n[None, :, None] * channels + d[None, None, :]
    at = tl.multiple_of(at, [1, 1, 1])
    A = tl.load(A_ptr + at)  # [1, STATES, LANES]
    h = tl.zeros([1, STATES, LANES], tl.float32)
    first = batch * length
    for start in tl.range(first, first + length, TILE, num_stages=STAGES):
        row = start + t
        x = tl.load(x_ptr + row * channels + d[None, :])  # [TILE, LANES]
        dt = tl.load(dt_ptr + row * channels + d[None, :])
        B = tl.load(B_ptr + row * STATES + n[None, :])  # [TILE, STATES]
        C = tl.load(C_ptr + row * STATES + n[None, :])
        a = tl.exp(dt[:, None, :] * A)  # [TILE, STATES, LANES]
        b = (dt * x)[:, None, :] * B[:, :, None]
        hs = b
        for k in tl.static_range(TILE):
            h = row_of(a, k) * h + row_of(b, k)
            hs = with_row(hs, k, h)
        y = tl.sum(hs * C[:, :, None], axis=1)
        tl.store(y_ptr + row * channels + d[None, :], y)


@triton.jit
def _gated(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, y_ptr,
    length, channels,
    STATES: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    blocks = channels // LANES
    batch, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    t, n = tl.arange(0, TILE)[:, None], tl.arange(0, STATES)
    d = block * LANES + tl.arange(0, LANES)
    at = n[None, :, None] * channels + d[None, None, :]
    at = tl.multiple_of(at, [1, 1, 1])
    A2 = tl.load(A_ptr + at) * LOG2E  # [1, STATES, LANES]
    D = tl.load(D_ptr + d[None, :])
    bias = tl.load(bias_ptr + d[None, :])
    h = tl.zeros([1, STATES, LANES], tl.float32)
    first = batch * length
    for start in tl.range(first, first + length, TILE, num_stages=3):
        row = start + t
        x = tl.load(x_ptr + row * channels + d[None, :])  # [TILE, LANES]
        dt = tl.load(dt_ptr + row * channels + d[None, :])
        B = tl.load(B_ptr + row * STATES + n[None, :])  # [TILE, STATES]
        C = tl.load(C_ptr + row * STATES + n[None, :])
        step = softplus(dt + bias)
        a = tl.exp2(step[:, None, :] * A2)  # [TILE, STATES, LANES]
        b = (step * x)[:, None, :] * B[:, :, None]
        hs = b
        for k in tl.static_range(TILE):
            h = row_of(a, k) * h + row_of(b, k)
            hs = with_row(hs, k, h)
        y = tl.sum(hs * C[:, :, None], axis=1) + D * x
        z = tl.load(z_ptr + row * channels + d[None, :])
        y *= z * sigmoid(z)
        tl.store(y_ptr + row * channels + d[None, :], y)


@triton.jit
def _any_size(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, h0_ptr, y_ptr,
    last_ptr, length, channels, states,
    STATES: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, LANES)
    batch, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    t, n = tl.arange(0, TILE)[:, None], tl.arange(0, STATES)
    d = block * LANES + tl.arange(0, LANES)
    real, known = (d < channels)[None, :], (n < states)[None, :]
    square = known[:, :, None] & real[:, None, :]
    at = n[None, :, None] * channels + d[None, None, :]
    at = tl.multiple_of(at, [1, 1, 1])
    A2 = tl.load(A_ptr + at, square, 0.0) * LOG2E  # [1, STATES, LANES]
    D = tl.load(D_ptr + d[None, :], real, 0.0)
    bias = tl.load(bias_ptr + d[None, :], real, 0.0)
    h = tl.load(h0_ptr + batch * states * channels + at, square, 0.0)
    for start in tl.range(0, length, TILE, num_stages=3):
        inside, row = start + t < length, batch * length + start + t
        own, shared = row * channels + d[None, :], row * states + n[None, :]
        x = tl.load(x_ptr + own, inside & real, 0.0)  # [TILE, LANES]
        dt = tl.load(dt_ptr + own, inside & real, 0.0)
        B = tl.load(B_ptr + shared, inside & known, 0.0)  # [TILE, STATES]
        C = tl.load(C_ptr + shared, inside & known, 0.0)
        step = tl.where(inside, softplus(dt + bias), 0.0)
        a = tl.exp2(step[:, None, :] * A2)  # [TILE, STATES, LANES]
        b = (step * x)[:, None, :] * B[:, :, None]
        hs = b
        for k in tl.static_range(TILE):
            h = row_of(a, k) * h + row_of(b, k)
            hs = with_row(hs, k, h)
        y = tl.sum(hs * C[:, :, None], axis=1) + D * x
        z = tl.load(z_ptr + own, inside & real, 0.0)
        y *= z * sigmoid(z)
        tl.store(y_ptr + own, y, inside & real)
    tl.store(last_ptr + batch * states * channels + at, h, square)
