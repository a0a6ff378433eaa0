"""The forward pass of the selective scan in Gluon.

`forward_in_triton.forward` gives a thread one channel with all 16 states. It spends as much time on
reading B and C from shared memory as on exponentials, and 8 sequences of 2048 channels make no more
than one warp for each scheduler, which then waits whenever that warp does. Here two warps share 32
channels, with eight states of each channel in a thread. So there are twice as many warps, and what
belongs to a channel alone, Δ, Δ x and the gate, is computed once, by one thread for both warps. It
goes through shared memory, and so do the two halves of y. (That is 16 states. More of them have
more warps, down to eight states in a thread; fewer have two warps all the same.)

A tile of TILE tokens takes three steps, with a barrier after each:

1. Δ and Δ x of the tile, from the copies that have arrived, and an order for the tile STAGES − 1
   further on;
2. all decays first, so that many exponentials are under way at once, then the recurrence;
3. y = Σ_n C h + D x, gated.
"""

from mamba_tutorial.kernels._gates import LOG2E
from mamba_tutorial.kernels._gluon import (
    below,
    carry,
    decay,
    marks,
    order,
    sigmoid,
    softplus,
    stack,
)
from mamba_tutorial.kernels._triton import async_copy, gl, gluon

CHANNELS = 32  # of a program


def config(d_state: int) -> dict:
    """Return the constants for this many states, a power of two from 4 to 128."""
    return {"N": d_state, "TILE": 16, "STAGES": 3, "num_warps": max(2, d_state // 8)}


@gluon.jit
def forward(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, h0_ptr, begins_ptr, ends_ptr,
    spans_ptr, y_ptr, starts_ptr, last_ptr,
    length, chunk, d_inner, x_batch, x_row, dt_batch, dt_row, z_batch, z_row, begins_batch,
    HALVES: gl.constexpr, EVERY: gl.constexpr, SOFTPLUS: gl.constexpr, WHOLE: gl.constexpr,
    N: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `forward_in_triton.forward`; B and C without gaps; WHOLE: d_inner is a multiple of W.

    Strides of x, dt and z are in pieces of 16 bytes: so the compiler knows that rows begin at such.
    begins: in words of eight bytes, a byte for each token, up to a whole section.
    """
    X: gl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    DT: gl.constexpr = 128 // dt_ptr.dtype.element_ty.primitive_bitwidth
    W: gl.constexpr = 32
    S: gl.constexpr = N // gl.num_warps()  # states of a thread
    P: gl.constexpr = gl.num_warps()
    # [P, S, W]: warps along P, registers along S, lanes along the channels
    STATE: gl.constexpr = gl.BlockedLayout([1, S, 1], [1, 1, 32], [P, 1, 1], [2, 1, 0])
    OVER_D: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, STATE))
    OVER_N: gl.constexpr = gl.SliceLayout(2, STATE)
    # [TILE, P, W], to sum over P: four neighbouring channels of a token in a thread
    PARTS: gl.constexpr = gl.BlockedLayout([1, P, 4], [4, 1, 8], [P, 1, 1], [2, 1, 0])
    PAIR: gl.constexpr = gl.SliceLayout(1, PARTS)  # [TILE, W]
    ROW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    CUBE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    TURNED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0, 2])  # CUBE with TILE last

    groups, chunks = gl.cdiv(d_inner, W), gl.cdiv(length, chunk)
    group = gl.program_id(0) % groups
    part = gl.program_id(0) // groups % chunks
    batch = (gl.program_id(0) // groups // chunks).to(gl.int64)
    p = gl.arange(0, P, layout=gl.SliceLayout(1, OVER_N))
    s = gl.arange(0, S, layout=gl.SliceLayout(0, OVER_N))
    n = gl.expand_dims(p[:, None] * S + s[None, :], 2)
    d = gl.expand_dims(gl.expand_dims(group * W + gl.arange(0, W, layout=OVER_D), 0), 1)
    at, size = n * d_inner + d, N * d_inner
    known = below(d, d_inner, WHOLE)
    real = known & (n >= 0)
    A2 = gl.load(A_ptr + at, real, 0.0) * LOG2E
    h = gl.zeros([P, S, W], gl.float32, STATE)
    if h0_ptr is not None:
        h = gl.load(h0_ptr + batch * size + at, real, 0.0)
    if ends_ptr is not None:
        for earlier in range(part):
            for half in gl.static_range(HALVES):
                record = HALVES * (batch * (chunks - 1) + earlier) + half
                span = gl.load(spans_ptr + record * d_inner + d, known, 0.0)
                h = carry(h, span, A2, begins_ptr is not None)
                h += gl.load(ends_ptr + record * size + at, real, 0.0)
    row = gl.arange(0, TILE, layout=gl.SliceLayout(1, PAIR))[:, None]
    col = group * W + gl.arange(0, W, layout=gl.SliceLayout(0, PAIR))[None, :]
    there = below(col, d_inner, WHOLE)
    skip, bias = gl.zeros([1, W], gl.float32, PAIR), gl.zeros([1, W], gl.float32, PAIR)
    if D_ptr is not None:
        skip = gl.load(D_ptr + col, there, 0.0)
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + col, there, 0.0)

    xs = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [STAGES, TILE, W], PLAIN)
    dts = gl.allocate_shared_memory(dt_ptr.dtype.element_ty, [STAGES, TILE, W], PLAIN)
    Bs = gl.allocate_shared_memory(gl.float32, [STAGES, TILE, N], PLAIN)
    Cs = gl.allocate_shared_memory(gl.float32, [STAGES, TILE, N], PLAIN)
    B_rows = Bs._reinterpret(gl.float32, [STAGES * TILE, P, S], PLAIN)
    C_rows = Cs._reinterpret(gl.float32, [STAGES * TILE, P, S], PLAIN)
    steps = gl.allocate_shared_memory(gl.float32, [TILE, W], PLAIN)
    drives = gl.allocate_shared_memory(gl.float32, [TILE, W], PLAIN)
    step_rows = steps._reinterpret(gl.float32, [TILE, W], ROW)
    drive_rows = drives._reinterpret(gl.float32, [TILE, W], ROW)
    parts = gl.allocate_shared_memory(gl.float32, [P, W, TILE], TURNED)

    # tokens are counted from the first of the chunk
    first = part.to(gl.int64) * chunk
    token, tokens = batch * length + first, gl.minimum(length - part * chunk, chunk)
    buffers, strides = (xs, dts, Bs, Cs), (x_row * X, dt_row * DT, N, N)
    left = W if WHOLE else d_inner - group * W
    columns = (left, left, N, N)
    ptrs = (
        x_ptr + (batch * x_batch + first * x_row) * X + group * W,
        dt_ptr + (batch * dt_batch + first * dt_row) * DT + group * W,
        B_ptr + token * N, C_ptr + token * N,
    )  # fmt: skip
    COUNT: gl.constexpr = 4 if z_ptr is None else 5
    if z_ptr is not None:
        zs = gl.allocate_shared_memory(z_ptr.dtype.element_ty, [STAGES, TILE, W], PLAIN)
        Z: gl.constexpr = 128 // z_ptr.dtype.element_ty.primitive_bitwidth
        buffers, strides, columns = buffers + (zs,), strides + (z_row * Z,), columns + (left,)
        ptrs = ptrs + (z_ptr + (batch * z_batch + first * z_row) * Z + group * W,)
    y_ptr += token * d_inner
    if begins_ptr is not None:
        begins_ptr += batch * begins_batch + first // 8
    if starts_ptr is not None:
        starts_ptr += (batch * gl.cdiv(length, EVERY) + first // EVERY) * size
    for i in gl.static_range(STAGES - 1):
        order(buffers, ptrs, strides, columns, gl.to_tensor(i * TILE), tokens, i, COUNT)
    slot = 0
    for start in range(0, tokens, TILE):
        async_copy.wait_group(STAGES - 2)
        x = xs.index(slot).load(PAIR).to(gl.float32)
        step = dts.index(slot).load(PAIR).to(gl.float32) + bias
        if SOFTPLUS:
            step = softplus(step)
        inside = (start + row < tokens) & there
        step = gl.where(inside, step, 0.0)  # beyond the end: decay 1, input 0
        steps.store(step)
        drives.store(step * x)
        if z_ptr is not None:
            z = zs.index(slot).load(PAIR).to(gl.float32)
        free = gl.where(slot == 0, STAGES - 1, slot - 1)
        order(buffers, ptrs, strides, columns, start + (STAGES - 1) * TILE, tokens, free, COUNT)
        if starts_ptr is not None:
            if start % EVERY == 0:
                gl.store(starts_ptr + (start // EVERY).to(gl.int64) * size + at, h, real)

        words = marks(begins_ptr, start, TILE)
        decays, inputs, ys = (), (), ()
        for k in gl.static_range(TILE):
            step_k = gl.expand_dims(gl.expand_dims(step_rows.index(k).load(OVER_D), 0), 1)
            drive_k = gl.expand_dims(gl.expand_dims(drive_rows.index(k).load(OVER_D), 0), 1)
            B_k = gl.expand_dims(B_rows.index(slot * TILE + k).load(OVER_N), 2)
            decays = decays + (decay(step_k * A2, begins_ptr, words, k),)
            inputs = inputs + (drive_k * B_k,)
        for k in gl.static_range(TILE):
            C_k = gl.expand_dims(C_rows.index(slot * TILE + k).load(OVER_N), 2)
            h = gl.fma(decays[k], h, inputs[k])
            ys = ys + (gl.sum(h * C_k, axis=1),)
        parts.store(stack(ys, TILE).reshape([P, W, TILE]))

        y = gl.sum(parts._reinterpret(gl.float32, [TILE, P, W], CUBE).load(PARTS), axis=1)
        y += skip * x
        if z_ptr is not None:
            y *= z * sigmoid(z)
        out = y_ptr + start.to(gl.int64) * d_inner + row * d_inner + col
        gl.store(out, y.to(y_ptr.dtype.element_ty), inside)
        slot = gl.where(slot + 1 == STAGES, 0, slot + 1)
    async_copy.wait_group(0)
    if part == chunks - 1:
        gl.store(last_ptr + batch * size + at, h, real)
