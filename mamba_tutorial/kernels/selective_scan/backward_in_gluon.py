"""The backward pass of the selective scan in Gluon.

Four warps share 64 channels and a chunk of the length. A thread holds four states of two
neighbouring channels: so B and C, which belong to states, are read once for two channels, and Δ and
what comes with it, which belong to channels, once for four states. By the count, instructions and
shared memory each fill about half of the time. (That is 16 states; for others see `config`.)

Going backwards needs the states, which the forward pass did not keep. So:

1. G, the gradient that reaches the state at the chunk's end, is joined from what later chunks give.
2. The chunk is cut into sections. The forward pass wrote down the state before each section. Going
   forwards once, the state before every tile of 8 tokens is put into shared memory.
3. Tile by tile, from the last to the first: forwards through the tile, keeping in registers the
   states before each token and all decays but the last token's, 120 numbers; then backwards,

       g_t = dy_t C_t + G,   G ← a_t g_t,   dΔ_t = Σ_n A G h_{t−1} + …,   dx_t = Δ_t Σ_n g_t B_t

Three sums run over the states, for y (which the gate's gradient needs), Δ and x. A thread adds its
four states up, the rest goes through shared memory, to where one thread does everything that
belongs to a channel and a token alone. Two sums run over the channels, for B and C. A thread adds
its two channels up, the rest goes through shared memory, and for the channels of other programs
through memory.

There, two programs share a part of the sum, and add to it at once, in whichever order. With two
addends on top of zero that is no matter: (0 + u) + v = (0 + v) + u to the bit. With three it
would be, so each pair has a part of its own, and a last kernel adds the parts up in their order.

A section is a row of steps, forwards through all tiles but the last and backwards through all of
them. What a step needs is ordered STAGES − 1 steps before, also across the border of two sections.
"""

from mamba_tutorial.kernels._gates import LOG2E
from mamba_tutorial.kernels._gluon import (
    below,
    decay,
    order,
    sigmoid,
    softplus,
    stack,
    words_of,
)
from mamba_tutorial.kernels._triton import async_copy, gl, gluon
from mamba_tutorial.kernels.selective_scan.forward_in_gluon import join, marks

LN2 = gl.constexpr(0.6931471805599453)


def config(d_state: int) -> dict:
    """Return the constants for this many states, a power of two from 4 to 128.

    A thread holds S states of two channels, and L pairs of channels make a program: 64 channels,
    where that takes four warps at most. All registers of a multiprocessor are taken by two programs
    of four warps, or by one of eight.
    """
    S = 4 if d_state >= 16 else 2
    warps = min(8, d_state // S)
    L = 32 * warps // (d_state // S)
    return {"N": d_state, "S": S, "L": L, "TILE": 8, "STAGES": 3, "num_warps": warps}


@gluon.jit
def _order_step(buffers, ptrs, strides, columns, first, index, stop, slot, COUNT: gl.constexpr,
                TILE: gl.constexpr, TILES: gl.constexpr):  # fmt: skip
    """Begin to copy what step `index` needs, of the section from `first` on or of the one before.

    Steps 0 … TILES − 2 are tiles forwards, TILES − 1 … 2 TILES − 2 all tiles backwards.
    """
    over = index >= 2 * TILES - 1
    first = gl.where(over, first - TILES * TILE, first)
    index = gl.where(over, index - (2 * TILES - 1), index)
    tile = gl.where(index < TILES, index, 2 * TILES - 2 - index)
    order(buffers, ptrs, strides, columns, first + tile * TILE, stop, slot, COUNT)


@gluon.jit
def _of_channels(row):
    """Make [L, CH] into [1, 1, L, CH]."""
    return gl.expand_dims(gl.expand_dims(row, 0), 1)


@gluon.jit
def _of_states(row):
    """Make [P, S] into [P, S, 1, 1]."""
    return gl.expand_dims(gl.expand_dims(row, 2), 3)


@gluon.jit
def _by_states(parts, TURNED: gl.constexpr, TILE: gl.constexpr):
    """Put TILE tensors [P, L, CH], sums over a thread's states, into shared memory."""
    P: gl.constexpr = parts[0].shape[0]
    L: gl.constexpr = parts[0].shape[1]
    CH: gl.constexpr = parts[0].shape[2]
    tile = stack(parts, TILE).reshape([P, L, CH, TILE])
    return gl.allocate_shared_memory(gl.float32, [P, L, CH, TILE], TURNED, tile)


@gluon.jit
def _by_channels(parts, SPREAD: gl.constexpr, TILE: gl.constexpr):
    """Put TILE tensors [P, S, L], sums over a thread's channels, into shared memory."""
    P: gl.constexpr = parts[0].shape[0]
    S: gl.constexpr = parts[0].shape[1]
    L: gl.constexpr = parts[0].shape[2]
    tile = stack(parts, TILE).reshape([P, S, L, TILE]).permute([3, 0, 1, 2])
    rows = tile.reshape([TILE * P * S, L])
    return gl.allocate_shared_memory(gl.float32, [TILE * P * S, L], SPREAD, rows)


@gluon.jit
def _over_states(buffer, PARTS: gl.constexpr, CUBE: gl.constexpr):
    """Σ over all states: [TILE, W]."""
    P: gl.constexpr = buffer.shape[0]
    W: gl.constexpr = buffer.shape[1] * buffer.shape[2]
    cube = buffer._reinterpret(gl.float32, [buffer.shape[3], P, W], CUBE)
    return gl.sum(cube.load(PARTS), axis=1)


@gluon.jit
def backward(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, begins_ptr, starts_ptr, dy_ptr,
    dlast_ptr, ends_ptr, spans_ptr,
    dx_ptr, ddt_ptr, dz_ptr, shared_ptr, own_ptr, dh0_ptr, length, chunk, d_inner,
    x_batch, x_row, dt_batch, dt_row, z_batch, z_row, dy_batch, dy_row,
    HALVES: gl.constexpr, SOFTPLUS: gl.constexpr, WHOLE: gl.constexpr, N: gl.constexpr,
    S: gl.constexpr, L: gl.constexpr, TILE: gl.constexpr, SECTION: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A: (d_state, d_inner); starts: (batch, sections, d_state, d_inner), as all states here.

    ends, spans: of `ends`, HALVES for each chunk but the first; shared, own: parts of the
    gradients, as `selective_scan._results` lays them out. Strides of x, dt, z and dy are in pieces
    of 16 bytes: so the compiler knows that rows begin at such. begins: as in
    `forward_in_gluon.forward`. WHOLE: d_inner is a multiple of W.
    """
    X: gl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    DT: gl.constexpr = 128 // dt_ptr.dtype.element_ty.primitive_bitwidth
    DY: gl.constexpr = 128 // dy_ptr.dtype.element_ty.primitive_bitwidth
    CH: gl.constexpr = 2  # channels of a thread
    P: gl.constexpr = N // S  # threads of a channel: neighbouring lanes, in several warps
    W: gl.constexpr = L * CH
    WARPS: gl.constexpr = gl.num_warps()
    NEAR: gl.constexpr = 2 if L >= 16 else 4  # of the P threads, how many are neighbouring lanes
    STATE: gl.constexpr = gl.BlockedLayout(
        [1, S, 1, CH], [NEAR, 1, 32 // NEAR, 1], [P // NEAR, 1, WARPS * NEAR // P, 1], [3, 2, 1, 0]
    )  # [P, S, L, CH]
    OVER_D: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, STATE))
    OVER_N: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, STATE))
    # [TILE, P, W], to sum over P: up to four neighbouring channels of a token in a thread
    MANY: gl.constexpr = TILE * W // (32 * WARPS)
    NEXT: gl.constexpr = 4 if MANY > 4 else (MANY if MANY > 0 else 1)
    ACROSS: gl.constexpr = W // NEXT if W // NEXT < 32 else 32
    PARTS: gl.constexpr = gl.BlockedLayout(
        [1, P, NEXT], [32 // ACROSS, 1, ACROSS], [WARPS, 1, 1], [2, 1, 0]
    )
    PAIR: gl.constexpr = gl.SliceLayout(1, PARTS)  # [TILE, W]
    SUM: gl.constexpr = gl.BlockedLayout([1, L], [32, 1], [WARPS, 1], [1, 0])  # [TILE · N, L]
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    CUBE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    TURNED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0, 3])  # CUBE with TILE last
    # no bank conflicts either way
    SPREAD: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8 if L >= 32 else L // 4, [1, 0])

    groups, chunks = gl.cdiv(d_inner, W), gl.cdiv(length, chunk)
    group = gl.program_id(0) % groups
    part = gl.program_id(0) // groups % chunks
    batch = (gl.program_id(0) // groups // chunks).to(gl.int64)
    batches = gl.num_programs(0) // groups // chunks
    p = gl.arange(0, P, layout=gl.SliceLayout(1, OVER_N))
    s = gl.arange(0, S, layout=gl.SliceLayout(0, OVER_N))
    pair = gl.arange(0, L, layout=gl.SliceLayout(1, OVER_D))
    one = gl.arange(0, CH, layout=gl.SliceLayout(0, OVER_D))
    n, d = p[:, None] * S + s[None, :], group * W + pair[:, None] * CH + one[None, :]
    at, size = _of_states(n) * d_inner + _of_channels(d), N * d_inner
    known = below(d, d_inner, WHOLE)
    square = _of_channels(known) & (_of_states(n) >= 0)

    row = gl.arange(0, TILE, layout=gl.SliceLayout(1, PAIR))[:, None]
    col = group * W + gl.arange(0, W, layout=gl.SliceLayout(0, PAIR))
    there = below(col, d_inner, WHOLE)

    xs = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [STAGES, TILE, W], PLAIN)
    dts = gl.allocate_shared_memory(dt_ptr.dtype.element_ty, [STAGES, TILE, W], PLAIN)
    dys = gl.allocate_shared_memory(dy_ptr.dtype.element_ty, [STAGES, TILE, W], PLAIN)
    Bs = gl.allocate_shared_memory(gl.float32, [STAGES, TILE, N], PLAIN)
    Cs = gl.allocate_shared_memory(gl.float32, [STAGES, TILE, N], PLAIN)
    B_rows = Bs._reinterpret(gl.float32, [STAGES * TILE, P, S], PLAIN)
    C_rows = Cs._reinterpret(gl.float32, [STAGES * TILE, P, S], PLAIN)
    steps = gl.allocate_shared_memory(gl.float32, [TILE, W], PLAIN)
    drives = gl.allocate_shared_memory(gl.float32, [TILE, W], PLAIN)
    upstreams = gl.allocate_shared_memory(gl.float32, [TILE, W], PLAIN)
    step_rows = steps._reinterpret(gl.float32, [TILE, L, CH], PLAIN)
    drive_rows = drives._reinterpret(gl.float32, [TILE, L, CH], PLAIN)
    upstream_rows = upstreams._reinterpret(gl.float32, [TILE, L, CH], PLAIN)
    TILES: gl.constexpr = SECTION // TILE
    KEPT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    kept = gl.allocate_shared_memory(gl.float32, [TILES, P, S, L, CH], KEPT)

    tokens = batch * length
    buffers, strides = (xs, dts, Bs, dys, Cs), (x_row * X, dt_row * DT, N, dy_row * DY, N)
    left = W if WHOLE else d_inner - group * W
    columns = (left, left, N, left, N)
    ptrs = (
        x_ptr + batch * x_batch * X + group * W, dt_ptr + batch * dt_batch * DT + group * W,
        B_ptr + tokens * N, dy_ptr + batch * dy_batch * DY + group * W, C_ptr + tokens * N,
    )  # fmt: skip
    COUNT: gl.constexpr = 5 + (z_ptr is not None) + (begins_ptr is not None)
    if z_ptr is not None:
        zs = gl.allocate_shared_memory(z_ptr.dtype.element_ty, [STAGES, TILE, W], PLAIN)
        Z: gl.constexpr = 128 // z_ptr.dtype.element_ty.primitive_bitwidth
        buffers, strides, columns = buffers + (zs,), strides + (z_row * Z,), columns + (left,)
        ptrs = ptrs + (z_ptr + batch * z_batch * Z + group * W,)
    begin_rows = None
    if begins_ptr is not None:
        begins = gl.allocate_shared_memory(gl.uint8, [STAGES, 1, TILE], PLAIN)
        begin_rows = begins._reinterpret(gl.int32, [STAGES * TILE // 4, 1, 1, 1, 1], KEPT)
        buffers, strides, columns = buffers + (begins,), strides + (1,), columns + (TILE,)
        ptrs = ptrs + (marks(begins_ptr, batch, length),)
    starts_ptr += batch * gl.cdiv(length, SECTION) * size
    rows = (batches * length).to(gl.int64)
    dB_ptr = shared_ptr + (group // 2 * 2 * rows + tokens) * N
    dC_ptr = dB_ptr + rows * N

    dA = gl.zeros([P, S, L, CH], gl.float32, STATE)
    dD, dbias = gl.zeros([TILE, W], gl.float32, PAIR), gl.zeros([TILE, W], gl.float32, PAIR)
    begin, stop = part * chunk, gl.minimum(part * chunk + chunk, length)
    last = (stop - 1) // SECTION * SECTION
    for e in gl.static_range(STAGES - 1):
        _order_step(buffers, ptrs, strides, columns, last, e, stop, e, COUNT, TILE, TILES)

    # while the first tiles are on their way: what reaches the state at the chunk's end
    A2 = gl.load(A_ptr + at, square, 0.0) * LOG2E
    G = gl.zeros([P, S, L, CH], gl.float32, STATE)
    skip, bias = gl.zeros([1, W], gl.float32, PAIR), gl.zeros([1, W], gl.float32, PAIR)
    if D_ptr is not None:
        skip = gl.load(D_ptr + col, there, 0.0)[None, :]
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + col, there, 0.0)[None, :]
    if dlast_ptr is not None:
        G = gl.load(dlast_ptr + batch * size + at, square, 0.0)
    if ends_ptr is not None:
        # of the chunks after this one, the last first
        record, later = HALVES * batch * (chunks - 1), HALVES * (chunks - 1 - part)
        G = join(
            G, A2, ends_ptr, spans_ptr, record, later, size, at, square, d_inner, _of_channels(d),
            _of_channels(known), begins_ptr is not None,
        )  # fmt: skip
    slot = 0
    for first in range(last, begin - 1, -SECTION):
        # forwards: the state before each tile
        h = gl.load(starts_ptr + (first // SECTION).to(gl.int64) * size + at, square, 0.0)
        for i in range(TILES - 1):
            kept.index(i).store(h)
            async_copy.wait_group(STAGES - 2)
            step = dts.index(slot).load(PAIR).to(gl.float32) + bias
            if SOFTPLUS:
                step = softplus(step)
            steps.store(step)
            drives.store(step * xs.index(slot).load(PAIR).to(gl.float32))
            free, ahead = gl.where(slot == 0, STAGES - 1, slot - 1), i + STAGES - 1
            _order_step(
                buffers, ptrs, strides, columns, first, ahead, stop, free, COUNT, TILE, TILES
            )
            words = words_of(begin_rows, slot, A2, TILE)
            for k in gl.static_range(TILE):
                step_k = _of_channels(step_rows.index(k).load(OVER_D))
                drive_k = _of_channels(drive_rows.index(k).load(OVER_D))
                B_k = _of_states(B_rows.index(slot * TILE + k).load(OVER_N))
                a = decay(step_k, A2, words, k)
                h = gl.fma(a, h, drive_k * B_k)
            slot = gl.where(slot + 1 == STAGES, 0, slot + 1)
        kept.index(TILES - 1).store(h)

        # backwards, from the last tile to the first
        for i in range(TILES - 1, 2 * TILES - 1):
            start = first + (2 * TILES - 2 - i) * TILE
            inside = (start + row < stop) & there[None, :]
            async_copy.wait_group(STAGES - 2)
            x = xs.index(slot).load(PAIR).to(gl.float32)
            dy = dys.index(slot).load(PAIR).to(gl.float32)
            step = dts.index(slot).load(PAIR).to(gl.float32) + bias
            if SOFTPLUS:
                step = softplus(step)
            step = gl.where(inside, step, 0.0)
            steps.store(step)
            drives.store(step * x)
            upstream = dy
            if z_ptr is not None:
                z = zs.index(slot).load(PAIR).to(gl.float32)
                gate = sigmoid(z)
                upstream = dy * z * gate
            upstreams.store(upstream)
            free, ahead = gl.where(slot == 0, STAGES - 1, slot - 1), i + STAGES - 1
            _order_step(
                buffers, ptrs, strides, columns, first, ahead, stop, free, COUNT, TILE, TILES
            )

            h = kept.index(2 * TILES - 2 - i).load(STATE)
            before, decays, ys, dCs = (), (), (), ()
            words = words_of(begin_rows, slot, A2, TILE)
            for k in gl.static_range(TILE):
                step_k = _of_channels(step_rows.index(k).load(OVER_D))
                drive_k = _of_channels(drive_rows.index(k).load(OVER_D))
                upstream_k = _of_channels(upstream_rows.index(k).load(OVER_D))
                B_k = _of_states(B_rows.index(slot * TILE + k).load(OVER_N))
                C_k = _of_states(C_rows.index(slot * TILE + k).load(OVER_N))
                a = decay(step_k, A2, words, k)
                before = before + (h,)
                if k < TILE - 1:
                    decays = decays + (a,)
                h = gl.fma(a, h, drive_k * B_k)
                if z_ptr is not None:
                    ys = ys + (gl.sum(h * C_k, axis=1),)
                dCs = dCs + (gl.sum(h * upstream_k, axis=3),)
            out = start.to(gl.int64) * d_inner + row * d_inner + col[None, :] + tokens * d_inner
            line = gl.arange(0, TILE * N, layout=gl.SliceLayout(1, SUM))
            real, line = line < (stop - start) * N, start.to(gl.int64) * N + line
            for_C = _by_channels(dCs, SPREAD, TILE)
            if z_ptr is not None:
                for_y = _by_states(ys, TURNED, TILE)
                y = _over_states(for_y, PARTS, CUBE) + skip * x
                dz = dy * y * gate * (1 + z * (1 - gate))
                gl.store(dz_ptr + out, dz.to(dz_ptr.dtype.element_ty), inside)
            dC = gl.sum(for_C.load(SUM), axis=1)
            gl.atomic_add(dC_ptr + line, dC, real, sem="relaxed")

            dxs, dsteps, dBs = (), (), ()
            for k in gl.static_range(TILE - 1, -1, -1):
                step_k = _of_channels(step_rows.index(k).load(OVER_D))
                drive_k = _of_channels(drive_rows.index(k).load(OVER_D))
                upstream_k = _of_channels(upstream_rows.index(k).load(OVER_D))
                B_k = _of_states(B_rows.index(slot * TILE + k).load(OVER_N))
                C_k = _of_states(C_rows.index(slot * TILE + k).load(OVER_N))
                g = gl.fma(upstream_k, C_k, G)
                # The last decay is needed first. There is no register left for it until then.
                if k < TILE - 1:
                    G = decays[k] * g
                else:
                    G = decay(step_k, A2, words, k) * g
                dlog = G * before[k]  # the gradient of Δ A
                dA = gl.fma(dlog, step_k, dA)
                dxs = (gl.sum(g * B_k, axis=1),) + dxs
                dsteps = (gl.sum(dlog * A2, axis=1),) + dsteps
                dBs = (gl.sum(g * drive_k, axis=3),) + dBs
            for_B = _by_channels(dBs, SPREAD, TILE)
            for_x, for_step = _by_states(dxs, TURNED, TILE), _by_states(dsteps, TURNED, TILE)
            ddrive = _over_states(for_x, PARTS, CUBE)
            dstep = _over_states(for_step, PARTS, CUBE)
            dB = gl.sum(for_B.load(SUM), axis=1)
            gl.atomic_add(dB_ptr + line, dB, real, sem="relaxed")
            # loaded once more, which costs less than keeping them
            x, step = xs.index(slot).load(PAIR).to(gl.float32), steps.load(PAIR)
            upstream = upstreams.load(PAIR)
            dx = ddrive * step + upstream * skip
            dstep = dstep * LN2 + ddrive * x
            if SOFTPLUS:
                dstep *= sigmoid(dts.index(slot).load(PAIR).to(gl.float32) + bias)
            dstep = gl.where(inside, dstep, 0.0)
            dbias += dstep
            dD += upstream * x
            gl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), inside)
            gl.store(ddt_ptr + out, dstep.to(ddt_ptr.dtype.element_ty), inside)
            slot = gl.where(slot + 1 == STAGES, 0, slot + 1)
    async_copy.wait_group(0)
    if part == 0:
        gl.store(dh0_ptr + batch * size + at, G, square)
    own_ptr += (batch * chunks + part) * (N + 2) * d_inner
    gl.store(own_ptr + at, dA, square)
    gl.store(own_ptr + size + col, gl.sum(dD, axis=0), there)
    gl.store(own_ptr + size + d_inner + col, gl.sum(dbias, axis=0), there)
