"""The forward pass of the selective scan in Gluon.

`forward_in_triton.forward` gives a thread one channel with all 16 states. So 8 sequences of 2048
channels make no more than one warp for each scheduler, which then waits whenever that warp does.
Here two warps share 32 channels, with eight states of each channel in a thread. So there are twice
as many warps, and what belongs to a channel alone, Δ, Δ x and the gate, is computed once, by one
thread for both warps. It goes through shared memory, and so do the two halves of y. (That is 16
states. More of them have more warps, down to eight states in a thread; fewer have two warps all the
same. Up to 16 states, programs that are alone on their multiprocessor have four warps, with half as
many states in a thread.)

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
    mark,
    order,
    sigmoid,
    softplus,
    stack,
    words_of,
)
from mamba_tutorial.kernels._triton import async_copy, gl, gluon

CHANNELS = gl.constexpr(32)  # of a program


def config(d_state: int) -> dict:
    """Return the constants for this many states, a power of two from 4 to 128."""
    return {"N": d_state, "TILE": 16, "STAGES": 3, "num_warps": max(2, d_state // 8)}


def ends_config(d_state: int) -> dict:
    """Return those of `ends`, of which a program takes 16 states at most, four in a thread."""
    N = min(16, d_state)
    return {"N": N, "TILE": 16, "STAGES": 3, "num_warps": min(4, N // 2)}


@gluon.jit
def place(length, chunk, d_inner):
    """Return the group of channels, the chunk and the sequence of this program."""
    groups, chunks = gl.cdiv(d_inner, CHANNELS), gl.cdiv(length, chunk)
    program = gl.program_id(0)
    return program % groups, program // groups % chunks, (program // groups // chunks).to(gl.int64)


@gluon.jit
def marks(begins_ptr, batch, length):
    """Return where the bytes of this sequence are that say where others begin in it."""
    return begins_ptr.to(gl.pointer_type(gl.uint8)) + batch * (gl.cdiv(length, 16) * 16)


@gluon.jit
def reaching(begins_ptr, batch, length, begin, end, REVERSE: gl.constexpr):
    """As `forward_in_triton.reaching`; begins as in `forward`."""
    WORDS: gl.constexpr = 128 * gl.num_warps()
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    words_ptr = marks(begins_ptr, batch, length).to(gl.pointer_type(gl.int32))
    stop = gl.minimum(gl.cdiv(end, 4), gl.cdiv(length, 16) * 4)
    none = end // 4 if REVERSE else begin // 4
    found = gl.full([WORDS], 0, gl.int32, LAYOUT) + none
    for first in range(begin // 4, stop, WORDS):
        word = first + gl.arange(0, WORDS, layout=LAYOUT)
        starts = gl.load(words_ptr + word, word < stop, 0) != 0
        here = gl.where(starts, word, none)
        found = gl.minimum(found, here) if REVERSE else gl.maximum(found, here)
    if REVERSE:
        end = gl.minimum(end, gl.min(found, 0) // 4 * 16 + 16)
    else:
        begin = gl.max(found, 0) // 4 * 16
    return begin, end


@gluon.jit
def step_size(dt, inside, SOFTPLUS: gl.constexpr):
    """Return Δ, zero where there is no token: then the decay is 1 and the input 0."""
    return gl.where(inside, softplus(dt) if SOFTPLUS else dt, 0.0)


@gluon.jit
def decays_and_inputs(steps, drives, rows, slot, A2, begins, TILE: gl.constexpr):
    """Return a tile's 2^(Δ A2) and Δ x B, as many tensors [P, S, W] each as it has tokens.

    steps: Δ, [TILE, W]; drives: Δ x; rows: B, a tile after the other, [STAGES · TILE, P, S]; begins
    likewise, as `words_of` takes it.
    """
    OVER_N: gl.constexpr = gl.SliceLayout(2, A2.type.layout)
    OVER_D: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, A2.type.layout))
    decays, inputs = (), ()
    words = words_of(begins, slot, A2, TILE)
    for k in gl.static_range(TILE):
        step = gl.expand_dims(gl.expand_dims(steps.index(k).load(OVER_D), 0), 1)
        drive = gl.expand_dims(gl.expand_dims(drives.index(k).load(OVER_D), 0), 1)
        B = gl.expand_dims(rows.index(slot * TILE + k).load(OVER_N), 2)
        decays = decays + (decay(step, A2, words, k),)
        inputs = inputs + (drive * B,)
    return decays, inputs


@gluon.jit
def join(h, A2, ends_ptr, spans_ptr, first, count, size, at, square, d_inner, d, known,
         CUT: gl.constexpr):  # fmt: skip
    """Carry a state through `count` chunks or parts of chunks, which `ends` has gone through.

    Not the arithmetic takes long but the way to memory and back. So four are fetched at once; more
    would take registers from the programs that run side by side.
    """
    AT_ONCE: gl.constexpr = 4
    for start in range(0, count, AT_ONCE):
        spans, ends = (), ()
        for i in gl.static_range(AT_ONCE):
            there, record = start + i < count, first + start + i
            spans = spans + (gl.load(spans_ptr + record * d_inner + d, known & there, 0.0),)
            ends = ends + (gl.load(ends_ptr + record * size + at, square & there, 0.0),)
        for i in gl.static_range(AT_ONCE):
            h = carry(h, spans[i], A2, CUT) + ends[i]
    return h


@gluon.jit
def forward(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, h0_ptr, begins_ptr, ends_ptr,
    spans_ptr, y_ptr, starts_ptr, last_ptr,
    length, chunk, d_inner, x_batch, x_row, dt_batch, dt_row, z_batch, z_row,
    HALVES: gl.constexpr, EVERY: gl.constexpr, SOFTPLUS: gl.constexpr, WHOLE: gl.constexpr,
    N: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `forward_in_triton.forward`; B and C without gaps; WHOLE: d_inner is a multiple of W.

    Strides of x, dt and z are in pieces of 16 bytes: so the compiler knows that rows begin at such.
    begins: (batch, length), a byte for each token, 1 where a sequence begins; rows being filled up
    to whole 16 tokens.
    """
    X: gl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    DT: gl.constexpr = 128 // dt_ptr.dtype.element_ty.primitive_bitwidth
    W: gl.constexpr = CHANNELS
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

    chunks = gl.cdiv(length, chunk)
    group, part, batch = place(length, chunk, d_inner)
    p = gl.arange(0, P, layout=gl.SliceLayout(1, OVER_N))
    s = gl.arange(0, S, layout=gl.SliceLayout(0, OVER_N))
    n = gl.expand_dims(p[:, None] * S + s[None, :], 2)
    d = gl.expand_dims(gl.expand_dims(group * W + gl.arange(0, W, layout=OVER_D), 0), 1)
    at, size = n * d_inner + d, N * d_inner
    known = below(d, d_inner, WHOLE)
    real = known & (n >= 0)
    row = gl.arange(0, TILE, layout=gl.SliceLayout(1, PAIR))[:, None]
    col = group * W + gl.arange(0, W, layout=gl.SliceLayout(0, PAIR))[None, :]
    there = below(col, d_inner, WHOLE)

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
    COUNT: gl.constexpr = 4 + (z_ptr is not None) + (begins_ptr is not None)
    if z_ptr is not None:
        zs = gl.allocate_shared_memory(z_ptr.dtype.element_ty, [STAGES, TILE, W], PLAIN)
        Z: gl.constexpr = 128 // z_ptr.dtype.element_ty.primitive_bitwidth
        buffers, strides, columns = buffers + (zs,), strides + (z_row * Z,), columns + (left,)
        ptrs = ptrs + (z_ptr + (batch * z_batch + first * z_row) * Z + group * W,)
    begin_rows = None
    if begins_ptr is not None:
        begins = gl.allocate_shared_memory(gl.uint8, [STAGES, 1, TILE], PLAIN)
        begin_rows = begins._reinterpret(gl.int32, [STAGES * TILE // 4, 1, 1, 1], CUBE)
        buffers, strides, columns = buffers + (begins,), strides + (1,), columns + (TILE,)
        ptrs = ptrs + (marks(begins_ptr, batch, length) + first,)
    y_ptr += token * d_inner
    if starts_ptr is not None:
        starts_ptr += (batch * gl.cdiv(length, EVERY) + first // EVERY) * size
    for i in gl.static_range(STAGES - 1):
        order(buffers, ptrs, strides, columns, gl.to_tensor(i * TILE), tokens, i, COUNT)

    # while the first tiles are on their way: the state before the chunk
    A2 = gl.load(A_ptr + at, real, 0.0) * LOG2E
    h = gl.zeros([P, S, W], gl.float32, STATE)
    skip, bias = gl.zeros([1, W], gl.float32, PAIR), gl.zeros([1, W], gl.float32, PAIR)
    if D_ptr is not None:
        skip = gl.load(D_ptr + col, there, 0.0)
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + col, there, 0.0)
    if h0_ptr is not None:
        h = gl.load(h0_ptr + batch * size + at, real, 0.0)
    if ends_ptr is not None:
        record = HALVES * batch * (chunks - 1)
        h = join(
            h, A2, ends_ptr, spans_ptr, record, HALVES * part, size, at, real, d_inner, d, known,
            begins_ptr is not None,
        )  # fmt: skip
    slot = 0
    for start in range(0, tokens, TILE):
        async_copy.wait_group(STAGES - 2)
        x = xs.index(slot).load(PAIR).to(gl.float32)
        inside = (start + row < tokens) & there
        step = step_size(dts.index(slot).load(PAIR).to(gl.float32) + bias, inside, SOFTPLUS)
        steps.store(step)
        drives.store(step * x)
        if z_ptr is not None:
            z = zs.index(slot).load(PAIR).to(gl.float32)
        free = gl.where(slot == 0, STAGES - 1, slot - 1)
        order(buffers, ptrs, strides, columns, start + (STAGES - 1) * TILE, tokens, free, COUNT)
        if starts_ptr is not None:
            if start % EVERY == 0:
                gl.store(starts_ptr + (start // EVERY).to(gl.int64) * size + at, h, real)

        decays, inputs = decays_and_inputs(
            step_rows, drive_rows, B_rows, slot, A2, begin_rows, TILE
        )
        ys = ()
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


@gluon.jit
def _start(i, tiles, TILE: gl.constexpr, REVERSE: gl.constexpr):
    """Return the first token of the i-th tile in the direction of the pass."""
    return (tiles - 1 - i) * TILE if REVERSE else i * TILE


@gluon.jit
def ends(
    u_ptr, dt_ptr, A_ptr, V_ptr, z_ptr, bias_ptr, begins_ptr, ends_ptr, spans_ptr, share,
    length, chunk, d_inner, u_batch, u_row, dt_batch, dt_row, z_batch, z_row,
    HALVES: gl.constexpr, SOFTPLUS: gl.constexpr, WHOLE: gl.constexpr, REVERSE: gl.constexpr,
    N: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What chunks give to the next, from nothing, and their lengths ΣΔ, in either direction.

    Forwards u = x, V = B and h ← a h + Δ u V, as in `forward_in_triton.ends`, whose docstring says
    what HALVES and share are. In reverse u = dy, V = C and G ← a (G + u silu(z) V), the gradient of
    the state before, for all chunks but the first. Strides, begins and WHOLE are as in `forward`.

    A program takes N states, its number along the second axis. Sums over states there are none, so
    more warps cost less here than in `forward`: four, with four states of a channel in a thread.
    """
    U: gl.constexpr = 128 // u_ptr.dtype.element_ty.primitive_bitwidth
    DT: gl.constexpr = 128 // dt_ptr.dtype.element_ty.primitive_bitwidth
    W: gl.constexpr = CHANNELS
    P: gl.constexpr = gl.num_warps()
    S: gl.constexpr = N // P
    STATE: gl.constexpr = gl.BlockedLayout([1, S, 1], [1, 1, 32], [P, 1, 1], [2, 1, 0])
    OVER_D: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, STATE))
    OVER_N: gl.constexpr = gl.SliceLayout(2, STATE)
    PAIR: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [P, 1], [1, 0])  # [TILE, W]
    ROW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    CUBE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])

    chunks, d_state = gl.cdiv(length, chunk), N * gl.num_programs(1)
    group, part, batch = place(length, chunk, d_inner)
    skipped = N * gl.program_id(1)  # states that other programs take
    p = gl.arange(0, P, layout=gl.SliceLayout(1, OVER_N))
    s = gl.arange(0, S, layout=gl.SliceLayout(0, OVER_N))
    n = gl.expand_dims(skipped + p[:, None] * S + s[None, :], 2)
    d = gl.expand_dims(gl.expand_dims(group * W + gl.arange(0, W, layout=OVER_D), 0), 1)
    at, size = n * d_inner + d, d_state * d_inner
    real = below(d, d_inner, WHOLE) & (n >= 0)
    row = gl.arange(0, TILE, layout=gl.SliceLayout(1, PAIR))[:, None]
    col = group * W + gl.arange(0, W, layout=gl.SliceLayout(0, PAIR))
    there = below(col, d_inner, WHOLE)

    us = gl.allocate_shared_memory(u_ptr.dtype.element_ty, [STAGES, TILE, W], PLAIN)
    dts = gl.allocate_shared_memory(dt_ptr.dtype.element_ty, [STAGES, TILE, W], PLAIN)
    Vs = gl.allocate_shared_memory(gl.float32, [STAGES, TILE, N], PLAIN)
    V_rows = Vs._reinterpret(gl.float32, [STAGES * TILE, P, S], PLAIN)
    steps = gl.allocate_shared_memory(gl.float32, [TILE, W], PLAIN)
    drives = gl.allocate_shared_memory(gl.float32, [TILE, W], PLAIN)
    step_rows = steps._reinterpret(gl.float32, [TILE, W], ROW)
    drive_rows = drives._reinterpret(gl.float32, [TILE, W], ROW)
    buffers, strides = (us, dts, Vs), (u_row * U, dt_row * DT, d_state)
    left = W if WHOLE else d_inner - group * W
    columns = (left, left, N)
    COUNT: gl.constexpr = 3 + (z_ptr is not None) + (begins_ptr is not None)
    if z_ptr is not None:
        zs = gl.allocate_shared_memory(z_ptr.dtype.element_ty, [STAGES, TILE, W], PLAIN)
        Z: gl.constexpr = 128 // z_ptr.dtype.element_ty.primitive_bitwidth
        buffers, strides, columns = buffers + (zs,), strides + (z_row * Z,), columns + (left,)
    begin_rows = None
    if begins_ptr is not None:
        begins = gl.allocate_shared_memory(gl.uint8, [STAGES, 1, TILE], PLAIN)
        begin_rows = begins._reinterpret(gl.int32, [STAGES * TILE // 4, 1, 1, 1], CUBE)
        begin_bytes = begins._reinterpret(gl.uint8, [STAGES, TILE], ROW)
        buffers, strides, columns = buffers + (begins,), strides + (1,), columns + (TILE,)

    for half in range(2 - HALVES, 2):
        begin, end = part * share, part * chunk  # the tail of the chunk before
        if half == 1:
            begin, end = end, gl.minimum(begin + share, (chunks - 1) * chunk)
        if REVERSE:
            begin, end = chunks * chunk - end, chunks * chunk - begin
        if begins_ptr is not None:
            begin, end = reaching(begins_ptr, batch, length, begin, end, REVERSE)
        first, tokens = begin.to(gl.int64), gl.minimum(end, length) - begin
        tiles = gl.cdiv(tokens, TILE)
        ptrs = (
            u_ptr + (batch * u_batch + first * u_row) * U + group * W,
            dt_ptr + (batch * dt_batch + first * dt_row) * DT + group * W,
            V_ptr + (batch * length + first) * d_state + skipped,
        )  # fmt: skip
        if z_ptr is not None:
            ptrs = ptrs + (z_ptr + (batch * z_batch + first * z_row) * Z + group * W,)
        if begins_ptr is not None:
            ptrs = ptrs + (marks(begins_ptr, batch, length) + first,)
        for i in gl.static_range(STAGES - 1):
            start = _start(gl.to_tensor(i), tiles, TILE, REVERSE)
            order(buffers, ptrs, strides, columns, start, tokens, i, COUNT)
        A2 = gl.load(A_ptr + at, real, 0.0) * LOG2E
        bias = gl.zeros([W], gl.float32, gl.SliceLayout(0, PAIR))
        if bias_ptr is not None:
            bias = gl.load(bias_ptr + col, there, 0.0)
        h, span = gl.zeros([P, S, W], gl.float32, STATE), gl.zeros([TILE, W], gl.float32, PAIR)
        slot = 0
        for i in range(tiles):
            start = _start(i, tiles, TILE, REVERSE)
            async_copy.wait_group(STAGES - 2)
            u = us.index(slot).load(PAIR).to(gl.float32)
            dt = dts.index(slot).load(PAIR).to(gl.float32)
            step = step_size(dt + bias[None, :], start + row < tokens, SOFTPLUS)
            span += step
            if begins_ptr is not None:
                bytes = begin_bytes.index(slot).load(gl.SliceLayout(1, PAIR))
                span += mark(bytes.to(gl.int32), 0)[:, None]
            if not REVERSE:
                u *= step
            if z_ptr is not None:
                z = zs.index(slot).load(PAIR).to(gl.float32)
                u *= z * sigmoid(z)
            steps.store(step)
            drives.store(u)
            free = gl.where(slot == 0, STAGES - 1, slot - 1)
            ahead = _start(i + STAGES - 1, tiles, TILE, REVERSE)
            order(buffers, ptrs, strides, columns, ahead, tokens, free, COUNT)
            decays, inputs = decays_and_inputs(
                step_rows, drive_rows, V_rows, slot, A2, begin_rows, TILE
            )
            for k in gl.static_range(TILE):
                if REVERSE:
                    h = decays[TILE - 1 - k] * (h + inputs[TILE - 1 - k])
                else:
                    h = gl.fma(decays[k], h, inputs[k])
            slot = gl.where(slot + 1 == STAGES, 0, slot + 1)
        async_copy.wait_group(0)
        record = HALVES * part + half - 1
        kept = (record >= 0) & (record < HALVES * (chunks - 1))
        record += HALVES * batch * (chunks - 1)
        gl.store(ends_ptr + record * size + at, h, real & kept)
        gl.store(spans_ptr + record * d_inner + col, gl.sum(span, axis=0), there & kept)
