"""The gradients of the selective scan, in three steps; the fourth is the package's kernel.

With γ_t = ∂y_t C_t + a_{t+1} γ_{t+1} the gradient of the state, for y_t = Σ_n C_t h_t:

    ∂x_t = Δ_t Σ_n γ_t B_t,       ∂Δ_t = Σ_n γ_t (A a_t h_{t−1} + x_t B_t),
    ∂B_t = Σ_d γ_t Δ_t x_t,       ∂C_t = Σ_d ∂y_t h_t,       ∂A = Σ_t γ_t Δ_t a_t h_{t−1}

The third step adds a skip, a gate and a softplus, with their gradients.
"""

import torch
from torch import Tensor

from mamba_tutorial.kernels._gates import sigmoid, softplus
from mamba_tutorial.kernels._launch import on
from mamba_tutorial.kernels._triton import tl, triton
from mamba_tutorial.kernels.lessons.forward import LANES, TILE
from mamba_tutorial.kernels.selective_scan.forward_in_triton import row_of, with_row


def one_state(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, dy: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients of x, dt, A, B and C for rows of one channel with one state.

    A: (rows,); h: (rows, length), all states, which the forward pass has kept; all others alike.
    """
    gradients = tuple(torch.empty_like(given) for given in (x, dt, A, B, C))
    with on(x):
        _one_state[(len(x),)](x, dt, A, B, C, h, dy, *gradients, x.shape[1], num_warps=1)
    return gradients


def in_tiles(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor, dy: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients of x, dt, A, B and C, given the state before every TILE tokens.

    starts: (batch, length / TILE, states, channels). Sums over channels are written in parts, one
    for each program, and added up in their order.
    """
    (batch, length, channels), states = x.shape, A.shape[1]
    dx, ddt, blocks = torch.empty_like(x), torch.empty_like(dt), channels // LANES
    shared = x.new_empty(2, blocks, batch, length, states)
    dA = x.new_empty(batch, states, channels)
    with on(x):
        _in_tiles[(batch * blocks,)](
            *(x, dt, A.T.contiguous(), B, C, starts, dy, dx, ddt, dA, *shared, length, channels),
            STATES=states, LANES=LANES, TILE=TILE, num_warps=1,
        )  # fmt: skip
    return dx, ddt, dA.sum(0).T, *shared.sum(1)


def gated(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    starts: Tensor,
    dy: Tensor,
) -> tuple[Tensor, ...]:
    """Return the gradients of the first eight, of the scan with Δ = softplus(dt + dt_bias)."""
    (batch, length, channels), states = x.shape, A.shape[1]
    dx, ddt, dz, blocks = *(torch.empty_like(x) for _ in range(3)), channels // LANES
    shared = x.new_empty(2, blocks, batch, length, states)
    dA, own = x.new_empty(batch, states, channels), x.new_empty(2, batch, channels)
    given = x, dt, A.T.contiguous(), B, C, D, z, dt_bias, starts, dy
    with on(x):
        _gated[(batch * blocks,)](
            *(*given, dx, ddt, dA, *shared, dz, *own, length, channels),
            STATES=states, LANES=LANES, TILE=TILE, num_warps=1,
        )  # fmt: skip
    dD, dbias = own.sum(1)
    return dx, ddt, dA.sum(0).T, *shared.sum(1), dD, dz, dbias


@triton.jit
def _one_state(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, h_ptr, dy_ptr,
    dx_ptr, ddt_ptr, dA_ptr, dB_ptr, dC_ptr, length,
):  # fmt: skip
    row = tl.program_id(0)
    A = tl.load(A_ptr + row)
    G, dA = 0.0, 0.0  # G: a_{t+1} γ_{t+1}
    for back in range(length):
        t = (row + 1) * length - 1 - back
        x, dt, dy = tl.load(x_ptr + t), tl.load(dt_ptr + t), tl.load(dy_ptr + t)
        B, C, h = tl.load(B_ptr + t), tl.load(C_ptr + t), tl.load(h_ptr + t)
        kept = h - dt * x * B  # a_t h_{t−1}
        gamma = dy * C + G
        tl.store(dC_ptr + t, dy * h)
        tl.store(dB_ptr + t, gamma * dt * x)
        tl.store(dx_ptr + t, gamma * dt * B)
        tl.store(ddt_ptr + t, gamma * (A * kept + x * B))
        dA += gamma * dt * kept
        G = tl.exp(dt * A) * gamma
    tl.store(dA_ptr + row, dA)


@triton.jit
def _in_tiles(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, starts_ptr, dy_ptr,
    dx_ptr, ddt_ptr, dA_ptr, dB_ptr, dC_ptr, length, channels,
    STATES: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    blocks, tiles, size = channels // LANES, length // TILE, STATES * channels
    batch, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    rows = tl.num_programs(0) // blocks * length  # of all sequences
    t, n = tl.arange(0, TILE)[:, None], tl.arange(0, STATES)
    d = block * LANES + tl.arange(0, LANES)
    at = n[None, :, None] * channels + d[None, None, :]
    at = tl.multiple_of(at, [1, 1, 1])
    A = tl.load(A_ptr + at)
    G = tl.zeros([1, STATES, LANES], tl.float32)
    dA = tl.zeros([1, STATES, LANES], tl.float32)
    for back in range(tiles):
        tile = tiles - 1 - back
        row = batch * length + tile * TILE + t
        own, shared = row * channels + d[None, :], row * STATES + n[None, :]
        x, dt = tl.load(x_ptr + own), tl.load(dt_ptr + own)
        dy = tl.load(dy_ptr + own)
        B = tl.load(B_ptr + shared)[:, :, None]
        C = tl.load(C_ptr + shared)[:, :, None]
        h = tl.load(starts_ptr + (batch * tiles + tile) * size + at)
        # the states of the tile, once more
        a, drive = tl.exp(dt[:, None, :] * A), (dt * x)[:, None, :]
        b = drive * B
        kept = b
        for k in tl.static_range(TILE):
            left = row_of(a, k) * h  # a_t h_{t−1}
            kept = with_row(kept, k, left)
            h = left + row_of(b, k)
        # and back
        gammas = dy[:, None, :] * C
        for k in tl.static_range(TILE - 1, -1, -1):
            gamma = row_of(gammas, k) + G
            gammas = with_row(gammas, k, gamma)
            G = row_of(a, k) * gamma
        inner = tl.sum(gammas * B, axis=1)  # over the states: the thread's own
        tl.store(dx_ptr + own, inner * dt)
        tl.store(ddt_ptr + own, tl.sum(gammas * kept * A, axis=1) + inner * x)
        dA += tl.sum(gammas * kept * dt[:, None, :], axis=0, keep_dims=True)
        # over the channels of this program: a part
        dB = tl.sum(gammas * drive, axis=2)
        dC = tl.sum((kept + b) * dy[:, None, :], axis=2)
        tl.store(dB_ptr + block * rows * STATES + shared, dB)
        tl.store(dC_ptr + block * rows * STATES + shared, dC)
    tl.store(dA_ptr + batch * size + at, dA)


@triton.jit
def _gated(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, starts_ptr, dy_ptr,
    dx_ptr, ddt_ptr, dA_ptr, dB_ptr, dC_ptr, dz_ptr, dD_ptr, dbias_ptr, length, channels,
    STATES: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    blocks, tiles, size = channels // LANES, length // TILE, STATES * channels
    batch, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    rows = tl.num_programs(0) // blocks * length  # of all sequences
    t, n = tl.arange(0, TILE)[:, None], tl.arange(0, STATES)
    d = block * LANES + tl.arange(0, LANES)
    at = n[None, :, None] * channels + d[None, None, :]
    at = tl.multiple_of(at, [1, 1, 1])
    A = tl.load(A_ptr + at)
    G = tl.zeros([1, STATES, LANES], tl.float32)
    dA = tl.zeros([1, STATES, LANES], tl.float32)
    skip, bias = tl.load(D_ptr + d)[None, :], tl.load(bias_ptr + d)[None, :]
    dD = tl.zeros([TILE, LANES], tl.float32)
    dbias = tl.zeros([TILE, LANES], tl.float32)
    for back in range(tiles):
        tile = tiles - 1 - back
        row = batch * length + tile * TILE + t
        own, shared = row * channels + d[None, :], row * STATES + n[None, :]
        x, raw = tl.load(x_ptr + own), tl.load(dt_ptr + own) + bias
        dt = softplus(raw)
        dy, z = tl.load(dy_ptr + own), tl.load(z_ptr + own)
        B = tl.load(B_ptr + shared)[:, :, None]
        C = tl.load(C_ptr + shared)[:, :, None]
        h = tl.load(starts_ptr + (batch * tiles + tile) * size + at)
        # the states of the tile, once more
        a, drive = tl.exp(dt[:, None, :] * A), (dt * x)[:, None, :]
        b = drive * B
        kept = b
        for k in tl.static_range(TILE):
            left = row_of(a, k) * h  # a_t h_{t−1}
            kept = with_row(kept, k, left)
            h = left + row_of(b, k)
        # through the gate, for which the output before it is needed
        opened = sigmoid(z)
        out = tl.sum((kept + b) * C, axis=1) + skip * x
        tl.store(dz_ptr + own, dy * out * opened * (1 + z * (1 - opened)))
        dy = dy * z * opened
        dD += dy * x
        # and back
        gammas = dy[:, None, :] * C
        for k in tl.static_range(TILE - 1, -1, -1):
            gamma = row_of(gammas, k) + G
            gammas = with_row(gammas, k, gamma)
            G = row_of(a, k) * gamma
        inner = tl.sum(gammas * B, axis=1)  # over the states: the thread's own
        tl.store(dx_ptr + own, inner * dt + dy * skip)
        ddt = (tl.sum(gammas * kept * A, axis=1) + inner * x) * sigmoid(raw)
        tl.store(ddt_ptr + own, ddt)
        dbias += ddt
        dA += tl.sum(gammas * kept * dt[:, None, :], axis=0, keep_dims=True)
        # over the channels of this program: a part
        dB = tl.sum(gammas * drive, axis=2)
        dC = tl.sum((kept + b) * dy[:, None, :], axis=2)
        tl.store(dB_ptr + block * rows * STATES + shared, dB)
        tl.store(dC_ptr + block * rows * STATES + shared, dC)
    tl.store(dA_ptr + batch * size + at, dA)
    tl.store(dD_ptr + batch * channels + d, tl.sum(dD, axis=0))
    tl.store(dbias_ptr + batch * channels + d, tl.sum(dbias, axis=0))
