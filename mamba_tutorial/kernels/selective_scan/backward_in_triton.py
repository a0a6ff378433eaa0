"""The backward pass of the selective scan in Triton, for the sizes that the one in Gluon refuses.

The forward pass writes down the state before every tile. Tile after tile, from the last to the
first, the other states are computed once more, and then the gradients on the way back. Sums over
channels, for B and C, are written per program and added up afterwards, so that two runs give the
same bits.
"""

from mamba_tutorial.kernels._gates import LOG2E, sigmoid
from mamba_tutorial.kernels._triton import tl, triton
from mamba_tutorial.kernels.selective_scan.forward_in_triton import (
    exprel,
    marks,
    row_of,
    step_size,
    with_row,
)


@triton.jit
def exprel_slope(z, exp, exprel):
    """The derivative of `exprel`, (e^z − exprel(z))/z, near 0 by Σ (k+1) z^k/(k+2)!."""
    near = tl.abs(z) < 0.6
    s = tl.where(near, z, 0.0)
    p = 6 / 5040 + s * (7 / 40320 + s * (8 / 362880))
    p = 4 / 120 + s * (5 / 720 + s * p)
    p = 1 / 2 + s * (2 / 6 + s * (3 / 24 + s * p))
    return tl.where(near, p, (exp - exprel) / tl.where(near, 1.0, z))


@triton.jit
def backward(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, begins_ptr, starts_ptr, dy_ptr,
    dlast_ptr, dx_ptr, ddt_ptr, dz_ptr, shared_ptr, own_ptr, dh0_ptr, length, d_inner, d_state,
    x_batch, x_row, dt_batch, dt_row, z_batch, z_row, dy_batch, dy_row,
    TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTPLUS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The gradients, from the last tile to the first; A, states and begins as in `forward`."""
    blocks = tl.cdiv(d_inner, BLOCK_D)
    block, batch = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    t, n = tl.arange(0, TILE)[:, None], tl.arange(0, BLOCK_N)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    real, states = (d < d_inner)[None, :], (n < d_state)[None, :]
    square = states[:, :, None] & real[:, None, :]
    d = tl.minimum(d, d_inner - 1)[None, :]
    # as in the forward pass, but from the last tile to the first
    tiles = tl.cdiv(length, TILE)
    start = (tiles - 1) * TILE
    first = batch * length + start  # the row of the last tile's first token
    x_ptr += batch * x_batch + start.to(tl.int64) * x_row
    dt_ptr += batch * dt_batch + start.to(tl.int64) * dt_row
    dy_ptr += batch * dy_batch + start.to(tl.int64) * dy_row
    B_ptr += first * d_state
    C_ptr += first * d_state
    dx_ptr += first * d_inner
    ddt_ptr += first * d_inner
    starts_ptr += (batch * tiles + tiles - 1) * d_state * d_inner
    batches = tl.num_programs(0) // blocks
    rows = (batches * length).to(tl.int64)
    dB_ptr = shared_ptr + (block * 2 * rows + first) * d_state
    dC_ptr = dB_ptr + rows * d_state
    x_at, dt_at, dy_at, own_at = t * x_row + d, t * dt_row + d, t * dy_row + d, t * d_inner + d
    shared_at = t * d_state + n[None, :]
    at = n[None, :, None] * d_inner + d[:, None, :]
    A = tl.load(A_ptr + at, square, 0.0)
    A2 = A * LOG2E
    G = tl.zeros([1, BLOCK_N, BLOCK_D], tl.float32)  # a_{t+1} g_{t+1}
    if dlast_ptr is not None:
        G = tl.load(dlast_ptr + batch * d_inner * d_state + at, square, 0.0)
    dA = tl.zeros([1, BLOCK_N, BLOCK_D], tl.float32)
    dD = tl.zeros([TILE, BLOCK_D], tl.float32)
    dbias = tl.zeros([TILE, BLOCK_D], tl.float32)
    skip = tl.load(D_ptr + d) if D_ptr is not None else 0.0
    bias = tl.load(bias_ptr + d) if bias_ptr is not None else 0.0
    inside = start + t < length
    x_next = tl.load(x_ptr + x_at, inside, 0.0)
    dt_next = tl.load(dt_ptr + dt_at, inside, 0.0)
    dy_next = tl.load(dy_ptr + dy_at, inside & real, 0.0)
    B_next = tl.load(B_ptr + shared_at, inside & states, 0.0)
    C_next = tl.load(C_ptr + shared_at, inside & states, 0.0)
    h_next = tl.load(starts_ptr + at, square, 0.0)
    z_next = x_next
    if z_ptr is not None:
        z_ptr += batch * z_batch + start.to(tl.int64) * z_row
        dz_ptr += first * d_inner
        z_at = t * z_row + d
        z_next = tl.load(z_ptr + z_at, inside, 0.0)
    for _ in range(tiles):
        x, dt, dy, gate = x_next.to(tl.float32), dt_next, dy_next.to(tl.float32), z_next
        B, C, h = B_next, C_next, h_next
        row = start + t
        inside, ahead = row < length, start > 0
        start -= TILE
        x_ptr -= TILE * x_row
        dt_ptr -= TILE * dt_row
        dy_ptr -= TILE * dy_row
        B_ptr -= TILE * d_state
        C_ptr -= TILE * d_state
        starts_ptr -= d_state * d_inner
        x_next = tl.load(x_ptr + x_at, ahead, 0.0)
        dt_next = tl.load(dt_ptr + dt_at, ahead, 0.0)
        dy_next = tl.load(dy_ptr + dy_at, ahead & real, 0.0)
        B_next = tl.load(B_ptr + shared_at, ahead & states, 0.0)
        C_next = tl.load(C_ptr + shared_at, ahead & states, 0.0)
        h_next = tl.load(starts_ptr + at, ahead & square, 0.0)
        if z_ptr is not None:
            z_ptr -= TILE * z_row
            z_next = tl.load(z_ptr + z_at, ahead, 0.0)
        dt = dt.to(tl.float32) + bias
        step = step_size(dt, inside, SOFTPLUS)
        # the states of the tile, once more
        exponent = step[:, None, :] * A2
        a = tl.exp2(exponent)
        drive = tl.where(real, step * x, 0.0)
        b = drive[:, None, :] * B[:, :, None]
        if EXACT:
            z = step[:, None, :] * A
            w = exprel(z, a)
            slope = b * exprel_slope(z, a, w)
            b *= w
        if begins_ptr is not None:
            barrier = marks(begins_ptr, batch, length, 0, row, row, inside)
            a = tl.exp2(exponent + barrier[:, :, None])
        kept = b  # what is left of the state before, a_t h_{t−1}
        for k in tl.static_range(TILE):
            left = row_of(a, k) * h
            h = left + row_of(b, k)
            kept = with_row(kept, k, left)
        hs = kept + b
        # through the gate, and to C: the last uses of the states themselves
        gated = dy
        if z_ptr is not None:
            gate = gate.to(tl.float32)
            s = sigmoid(gate)
            gated = dy * gate * s
            y = tl.sum(hs * C[:, :, None], axis=1) + skip * x
            dz = dy * y * s * (1 + gate * (1 - s))
            tl.store(dz_ptr + own_at, dz.to(dz_ptr.dtype.element_ty), inside & real)
            dz_ptr -= TILE * d_inner
        dy = gated
        dC = tl.sum(hs * dy[:, None, :], axis=2)  # over the channels of this program: one part
        tl.store(dC_ptr + shared_at, dC, inside & states)
        # the gradient of the states, g_t = dy_t C_t + a_{t+1} g_{t+1}
        gs = dy[:, None, :] * C[:, :, None]
        for k in tl.static_range(TILE - 1, -1, -1):
            g = row_of(gs, k) + G
            gs = with_row(gs, k, g)
            G = row_of(a, k) * g
        dlog = gs * kept  # the gradient of Δ A (h_t − b_t instead would cancel)
        gw = gs
        if EXACT:
            dlog += gs * slope
            gw *= w
        dA += tl.sum(dlog * step[:, None, :], axis=0, keep_dims=True)
        ddrive = tl.sum(gw * B[:, :, None], axis=1)
        dstep = tl.sum(dlog * A, axis=1) + ddrive * x
        dx = ddrive * step + dy * skip
        dD += dy * x
        if SOFTPLUS:
            dstep *= sigmoid(dt)
        dstep = tl.where(inside, dstep, 0.0)
        dbias += dstep
        tl.store(dx_ptr + own_at, dx.to(dx_ptr.dtype.element_ty), inside & real)
        tl.store(ddt_ptr + own_at, dstep.to(ddt_ptr.dtype.element_ty), inside & real)
        dB = tl.sum(gw * drive[:, None, :], axis=2)
        tl.store(dB_ptr + shared_at, dB, inside & states)
        dx_ptr -= TILE * d_inner
        ddt_ptr -= TILE * d_inner
        dB_ptr -= TILE * d_state
        dC_ptr -= TILE * d_state
    tl.store(dh0_ptr + batch * d_inner * d_state + at, G, square)
    own_ptr += batch * (d_state + 2) * d_inner
    tl.store(own_ptr + at, dA, square)
    tl.store(own_ptr + d_state * d_inner + d, tl.sum(dD, axis=0)[None, :], real)
    tl.store(own_ptr + (d_state + 1) * d_inner + d, tl.sum(dbias, axis=0)[None, :], real)
