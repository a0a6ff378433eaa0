"""The selective scan on a GPU in Triton, fused: forward and backward.

    h_t = exp(Δ_t A) h_{t−1} + w(Δ_t A) Δ_t x_t B_t,     y_t = (Σ_n C_t h_t + D x_t) silu(z_t)

with Δ = softplus(dt + bias), as `mamba_tutorial.selective.selective_scan` defines it. The states of
size (batch, length, d_inner, d_state) never leave the chip.

A program is one warp. It takes BLOCK_D channels of a sequence and goes along the length in tiles
of TILE tokens. A tile is a block [TILE, BLOCK_N, BLOCK_D] of pairs (decay, input). Triton spreads
the last axes of such a block over the 32 lanes, BLOCK_D = 8 channels by 4 of the states, and leaves
the first axis to the registers of each thread. So

- what runs along time needs no communication: each thread walks through its own registers;
- a sum over the states takes two exchanges between lanes, a sum over the channels three;
- nothing waits for another warp. (With the states spread over four warps, as one might try first,
  sums meet in the same banks of shared memory; on an H200 it took almost three times as long.)

The forward pass writes down the state before every tile. The backward pass goes through the tiles
in reverse, computes the states of a tile once more, and runs the gradient backwards through them.
Sums over channels, for B and C, are written per program and added up afterwards, so that two runs
give the same bits.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

if not torch.cuda.is_available() and isinstance(tl.sum, triton.JITFunction):
    raise ImportError(
        "there is no GPU, and Triton was imported before its interpreter could be asked for; set "
        "TRITON_INTERPRET=1, or import mamba_tutorial.kernels before triton"
    )

LOG2E = tl.constexpr(1.4426950408889634)  # the GPU has a unit for 2^x; e^x = 2^(x log₂ e)
LN2 = tl.constexpr(0.6931471805599453)
BLOCK_D = 8


class SelectiveScan(torch.autograd.Function):
    """y, h_last = SelectiveScan.apply(x, dt, A, B, C, D, z, dt_bias, h0, dt_softplus, exact).

    x, dt, z: (batch, length, d_inner), of float16, bfloat16 or float32; A: (d_inner, d_state);
    B, C: (batch, length, d_state); D, dt_bias: (d_inner,); h0: (batch, d_inner, d_state). D, z,
    dt_bias and h0 may be None. `exact` asks for the zero-order hold of B. The state is float32.
    """

    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, z, dt_bias, h0, dt_softplus, exact):
        batch, length, d_inner = x.shape
        x, dt, z = (_rows(tensor) for tensor in (x, dt, z))
        A, B, C, D, dt_bias, h0 = (_float(tensor) for tensor in (A, B, C, D, dt_bias, h0))
        config = _config(A.shape[1], dt_softplus, exact)
        blocks, tiles = triton.cdiv(d_inner, BLOCK_D), triton.cdiv(length, config["TILE"])
        starts = (
            A.new_empty(batch, tiles, A.shape[1], d_inner) if any(ctx.needs_input_grad) else None
        )
        y, h_last = x.new_empty(x.shape), A.new_empty(batch, *A.shape)
        sizes = length, d_inner, A.shape[1], *_strides(x), *_strides(dt), *_strides(z)
        given = x, dt, A, B, C, D, z, dt_bias, h0
        with _on(x):
            _forward[(batch * blocks,)](*given, y, starts, h_last, *sizes, **config)
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, h0, starts)
        ctx.config = config
        return y, h_last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh_last):
        x, dt, A, B, C, D, z, dt_bias, h0, starts = ctx.saved_tensors
        batch, length, d_inner = x.shape
        d_state, config = A.shape[1], ctx.config
        dy, dh_last = _rows(dy), _float(dh_last)
        blocks = triton.cdiv(d_inner, BLOCK_D)
        dx, ddt = x.new_empty(x.shape), x.new_empty(x.shape, dtype=dt.dtype)
        dz = None if z is None else x.new_empty(x.shape, dtype=z.dtype)
        dA, dh0 = A.new_empty(batch, *A.shape), A.new_empty(batch, *A.shape)
        dB, dC = A.new_empty(2, blocks, batch, length, d_state).unbind(0)
        dD, dbias = A.new_empty(2, batch, d_inner).unbind(0)
        sizes = length, d_inner, d_state
        strides = (*_strides(x), *_strides(dt), *_strides(z), *_strides(dy))
        given = x, dt, A, B, C, D, z, dt_bias, starts, dy, dh_last
        results = dx, ddt, dA, dB, dC, dD, dz, dbias, dh0
        with _on(x):
            _backward[(batch * blocks,)](*given, *results, *sizes, *strides, **config)
        dD = None if D is None else dD.sum(0)
        dbias = None if dt_bias is None else dbias.sum(0)
        dh0 = None if h0 is None else dh0
        return dx, ddt, dA.sum(0), dB.sum(0), dC.sum(0), dD, dz, dbias, dh0, None, None


def _config(d_state: int, dt_softplus: bool, exact: bool) -> dict:
    """Return the constants of the kernels: 32 numbers of a tile for each thread, where possible."""
    block = max(4, triton.next_power_of_2(d_state))
    return {
        "TILE": min(16, max(1, 128 // block)),
        "BLOCK_N": block,
        "BLOCK_D": BLOCK_D,
        "SOFTPLUS": dt_softplus,
        "EXACT": exact,
        "num_warps": 1,
    }


def _on(tensor: Tensor) -> AbstractContextManager:
    """Launch on the GPU of the tensor, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _rows(tensor: Tensor | None) -> Tensor | None:
    """Make neighbouring channels neighbours in memory; the rows may lie anywhere."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else tensor.stride()[:2]


@triton.jit
def _row(tile, k: tl.constexpr):
    """Return tile[k]. Its index is a constant in every thread, so this is a choice of register."""
    here = (tl.arange(0, tile.shape[0]) == k)[:, None, None]
    bits = tile.to(tl.int32, bitcast=True)  # integers: the compiler knows that n + 0 is n
    return tl.sum(tl.where(here, bits, 0), axis=0).to(tl.float32, bitcast=True)


@triton.jit
def _with_row(tile, k: tl.constexpr, row):
    """Return the tile with tile[k] = row."""
    here = (tl.arange(0, tile.shape[0]) == k)[:, None, None]
    return tl.where(here, row[None, :, :], tile)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp2(-x * LOG2E))


@triton.jit
def _step_size(dt, bias, inside, SOFTPLUS: tl.constexpr):
    """Return dt + bias, and Δ, zero where there is no token: then a is 1 and the input 0."""
    dt = dt.to(tl.float32) + bias
    step = dt
    if SOFTPLUS:
        u = tl.exp2(tl.minimum(dt, 20.0) * LOG2E)
        w = 1 + u
        # ln(1 + u) for small u, where 1 + u has lost its digits: ln w · u / (w − 1) has them again
        few = w == 1
        ratio = tl.where(few, u, tl.log2(w) * LN2 * u / tl.where(few, 1.0, w - 1))
        step = tl.where(dt > 20, dt, ratio)
    return dt, tl.where(inside, step, 0.0)


@triton.jit
def _exprel(z, exp):
    """(e^z − 1)/z, near 0 by its series Σ z^k/(k+1)!, where the difference would cancel."""
    near = tl.abs(z) < 0.6
    s = tl.where(near, z, 0.0)
    p = 1 / 5040 + s * (1 / 40320 + s * (1 / 362880))
    p = 1 / 24 + s * (1 / 120 + s * (1 / 720 + s * p))
    p = 1 + s * (1 / 2 + s * (1 / 6 + s * p))
    return tl.where(near, p, (exp - 1) / tl.where(near, 1.0, z))


@triton.jit
def _exprel_slope(z, exp, exprel):
    """The derivative of `_exprel`, (e^z − exprel(z))/z, near 0 by Σ (k+1) z^k/(k+2)!."""
    near = tl.abs(z) < 0.6
    s = tl.where(near, z, 0.0)
    p = 6 / 5040 + s * (7 / 40320 + s * (8 / 362880))
    p = 4 / 120 + s * (5 / 720 + s * p)
    p = 1 / 2 + s * (2 / 6 + s * (3 / 24 + s * p))
    return tl.where(near, p, (exp - exprel) / tl.where(near, 1.0, z))


@triton.jit
def _forward(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, h0_ptr, y_ptr, starts_ptr, last_ptr,
    length, d_inner, d_state, x_batch, x_row, dt_batch, dt_row, z_batch, z_row,
    TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTPLUS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(d_inner, BLOCK_D)
    block, batch = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    t, n = tl.arange(0, TILE)[:, None], tl.arange(0, BLOCK_N)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    real, states = (d < d_inner)[None, :], (n < d_state)[None, :]
    square = states.T & real  # [BLOCK_N, BLOCK_D], as the state lies in registers
    d = tl.minimum(d, d_inner - 1)[
        None, :
    ]  # channels beyond the last repeat it, and are not stored
    # Where the first tile begins, and where its numbers lie from there. The first is one address
    # that moves from tile to tile, the second never changes.
    x_ptr += batch * x_batch
    dt_ptr += batch * dt_batch
    B_ptr += batch * length * d_state
    C_ptr += batch * length * d_state
    y_ptr += batch * length * d_inner
    if starts_ptr is not None:
        starts_ptr += batch * tl.cdiv(length, TILE) * d_state * d_inner
    x_at, dt_at, y_at = t * x_row + d, t * dt_row + d, t * d_inner + d
    shared_at = t * d_state + n[None, :]
    wide_at, tall_at = n[:, None] * d_inner + d, d * d_state + n[:, None]
    A = tl.load(A_ptr + tall_at, square, 0.0)
    A2 = A * LOG2E
    h = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if h0_ptr is not None:
        h = tl.load(h0_ptr + batch * d_inner * d_state + tall_at, square, 0.0)
    skip = tl.load(D_ptr + d) if D_ptr is not None else 0.0
    bias = tl.load(bias_ptr + d) if bias_ptr is not None else 0.0
    # the tokens of the next tile are fetched while this one is computed
    inside = t < length
    x_next = tl.load(x_ptr + x_at, inside, 0.0)
    dt_next = tl.load(dt_ptr + dt_at, inside, 0.0)
    B_next = tl.load(B_ptr + shared_at, inside & states, 0.0)
    C_next = tl.load(C_ptr + shared_at, inside & states, 0.0)
    z_next = x_next
    if z_ptr is not None:
        z_ptr += batch * z_batch
        z_at = t * z_row + d
        z_next = tl.load(z_ptr + z_at, inside, 0.0)
    for start in range(0, length, TILE):
        x, dt, gate, B, C = x_next.to(tl.float32), dt_next, z_next, B_next, C_next
        inside, ahead = start + t < length, start + TILE + t < length
        x_ptr += TILE * x_row
        dt_ptr += TILE * dt_row
        B_ptr += TILE * d_state
        C_ptr += TILE * d_state
        x_next = tl.load(x_ptr + x_at, ahead, 0.0)
        dt_next = tl.load(dt_ptr + dt_at, ahead, 0.0)
        B_next = tl.load(B_ptr + shared_at, ahead & states, 0.0)
        C_next = tl.load(C_ptr + shared_at, ahead & states, 0.0)
        if z_ptr is not None:
            z_ptr += TILE * z_row
            z_next = tl.load(z_ptr + z_at, ahead, 0.0)
        if starts_ptr is not None:
            tl.store(starts_ptr + wide_at, h, square)
            starts_ptr += d_state * d_inner
        _, step = _step_size(dt, bias, inside, SOFTPLUS)
        a = tl.exp2(step[:, None, :] * A2[None, :, :])  # [TILE, BLOCK_N, BLOCK_D] from here on
        b = (step * x)[:, None, :] * B[:, :, None]
        if EXACT:
            b *= _exprel(step[:, None, :] * A[None, :, :], a)
        hs = b
        for k in tl.static_range(TILE):
            h = _row(a, k) * h + _row(b, k)
            hs = _with_row(hs, k, h)
        y = tl.sum(hs * C[:, :, None], axis=1) + skip * x
        if z_ptr is not None:
            gate = gate.to(tl.float32)
            y *= gate * _sigmoid(gate)
        tl.store(y_ptr + y_at, y.to(y_ptr.dtype.element_ty), inside & real)
        y_ptr += TILE * d_inner
    tl.store(last_ptr + batch * d_inner * d_state + tall_at, h, square)


@triton.jit
def _backward(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, starts_ptr, dy_ptr, dlast_ptr,
    dx_ptr, ddt_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dz_ptr, dbias_ptr, dh0_ptr,
    length, d_inner, d_state,
    x_batch, x_row, dt_batch, dt_row, z_batch, z_row, dy_batch, dy_row,
    TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTPLUS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(d_inner, BLOCK_D)
    block, batch = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    t, n = tl.arange(0, TILE)[:, None], tl.arange(0, BLOCK_N)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    real, states = (d < d_inner)[None, :], (n < d_state)[None, :]
    square = states.T & real
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
    part = block.to(tl.int64) * batches * length + first  # the row, among those of all programs
    dB_ptr += part * d_state
    dC_ptr += part * d_state
    x_at, dt_at, dy_at, own_at = t * x_row + d, t * dt_row + d, t * dy_row + d, t * d_inner + d
    shared_at = t * d_state + n[None, :]
    wide_at, tall_at = n[:, None] * d_inner + d, d * d_state + n[:, None]
    A = tl.load(A_ptr + tall_at, square, 0.0)
    A2 = A * LOG2E
    G = tl.load(dlast_ptr + batch * d_inner * d_state + tall_at, square, 0.0)  # a_{t+1} g_{t+1}
    dA = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
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
    h_next = tl.load(starts_ptr + wide_at, square, 0.0)
    z_next = x_next
    if z_ptr is not None:
        z_ptr += batch * z_batch + start.to(tl.int64) * z_row
        dz_ptr += first * d_inner
        z_at = t * z_row + d
        z_next = tl.load(z_ptr + z_at, inside, 0.0)
    for _ in range(tiles):
        x, dt, dy, gate = x_next.to(tl.float32), dt_next, dy_next.to(tl.float32), z_next
        B, C, h = B_next, C_next, h_next
        inside, ahead = start + t < length, start > 0
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
        h_next = tl.load(starts_ptr + wide_at, ahead & square, 0.0)
        if z_ptr is not None:
            z_ptr -= TILE * z_row
            z_next = tl.load(z_ptr + z_at, ahead, 0.0)
        dt, step = _step_size(dt, bias, inside, SOFTPLUS)
        # the states of the tile, once more
        a = tl.exp2(step[:, None, :] * A2[None, :, :])
        drive = tl.where(real, step * x, 0.0)
        b = drive[:, None, :] * B[:, :, None]
        if EXACT:
            z = step[:, None, :] * A[None, :, :]
            w = _exprel(z, a)
            slope = b * _exprel_slope(z, a, w)
            b *= w
        kept = b  # what is left of the state before, a_t h_{t−1}
        for k in tl.static_range(TILE):
            left = _row(a, k) * h
            h = left + _row(b, k)
            kept = _with_row(kept, k, left)
        hs = kept + b
        # through the gate, and to C: the last uses of the states themselves
        gated = dy
        if z_ptr is not None:
            gate = gate.to(tl.float32)
            s = _sigmoid(gate)
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
            g = _row(gs, k) + G
            gs = _with_row(gs, k, g)
            G = _row(a, k) * g
        dlog = gs * kept  # the gradient of Δ A (h_t − b_t instead would cancel)
        gw = gs
        if EXACT:
            dlog += gs * slope
            gw *= w
        dA += tl.sum(dlog * step[:, None, :], axis=0)
        ddrive = tl.sum(gw * B[:, :, None], axis=1)
        dstep = tl.sum(dlog * A[None, :, :], axis=1) + ddrive * x
        dx = ddrive * step + dy * skip
        dD += dy * x
        if SOFTPLUS:
            dstep *= _sigmoid(dt)
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
    tl.store(dA_ptr + batch * d_inner * d_state + tall_at, dA, square)
    tl.store(dh0_ptr + batch * d_inner * d_state + tall_at, G, square)
    tl.store(dD_ptr + batch * d_inner + d, tl.sum(dD, axis=0)[None, :], real)
    tl.store(dbias_ptr + batch * d_inner + d, tl.sum(dbias, axis=0)[None, :], real)
