"""The backward pass of the selective scan in Gluon, where each thread's registers are laid out.

Plain Triton decides by itself which thread holds which number. For the backward pass that choice is
worth a factor of three: sums over the states should stay within a thread, sums over the channels
should go through shared memory, and Triton's own layout does neither. Gluon is the same compiler
with the layouts written down. It has no interpreter, so `selective_scan` keeps a plain Triton
backward pass for everything that this one does not take (see `takes`); tests hold them together.

A program takes 32 channels per warp and a chunk of the length; a thread owns one channel with all
16 states. Going backwards needs the states, which the forward pass did not keep. So:

1. G, the gradient that reaches the state at the chunk's end, is joined from what later chunks give.
2. The chunk is cut into sections. The forward pass wrote down the state before each section.
   Going forwards once, the state before every tile of 4 tokens is written to a scratch buffer,
   small enough to stay in the cache.
3. Tile by tile, from the last to the first: forwards through the tile, keeping in registers the
   4 · 16 decays and the 4 · 16 states before each token; then backwards,

       g_t = dy_t C_t + G,   G ← a_t g_t,   dΔ_t = Σ_n A G h_{t−1} + …,   dx_t = Δ_t Σ_n g_t B_t

   What B and C receive, g_t Δ_t x_t and h_t dy_t, is summed over the channels of the program
   through shared memory, and written as one part per program. Adding the parts up is left to
   PyTorch, so that two runs give the same bits.

Copies of the next tiles run while one is computed (`cp.async`, three tiles deep).
"""

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from mamba_tutorial.kernels._gates import LOG2E, gluon_sigmoid, gluon_softplus

D_STATE = 16
TILE = 4  # tokens whose decays and states lie in registers
SECTION = 64  # tokens between two states that the forward pass keeps
STAGES = 3  # tiles on their way or in use
WARPS = 2
CHANNELS = 32 * WARPS  # of a program

LN2 = tl.constexpr(0.6931471805599453)


def takes(x: torch.Tensor, rows: list[torch.Tensor | None], d_state: int, exact: bool) -> bool:
    """Say whether this kernel can run: on Ampere or later, with the sizes it is written for.

    Copies move four numbers of a row at a time, so rows must start where that is allowed.
    """
    aligned = all(
        row is None
        or (row.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in row.stride()[:2]))
        for row in rows
    )
    return (
        x.is_cuda
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and d_state == D_STATE
        and not exact
        and x.shape[-1] % CHANNELS == 0
        and aligned
    )


@gluon.jit
def _step_size(dt, SOFTPLUS: gl.constexpr):
    return gluon_softplus(dt) if SOFTPLUS else dt


@gluon.jit
def _fetch(buffer, ptr, row, low, high, stride):
    """Begin to copy rows row, row + 1, … into the buffer; rows outside [low, high) become zero."""
    ROWS: gl.constexpr = buffer.shape[0]
    COLUMNS: gl.constexpr = buffer.shape[1]
    LANES: gl.constexpr = 32 if COLUMNS > 128 else COLUMNS // 4
    LAYOUT: gl.constexpr = gl.BlockedLayout(
        [1, 4], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0]
    )
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    c = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    inside = ((r >= low - row) & (r < high - row))[:, None] & (c >= 0)
    at = ptr + row * stride + r[:, None] * stride + c
    async_copy.async_copy_global_to_shared(buffer, at, mask=inside)


@gluon.jit
def backward(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, starts_ptr, dy_ptr, dlast_ptr,
    ends_ptr, spans_ptr, scratch_ptr,
    dx_ptr, ddt_ptr, dz_ptr, shared_ptr, own_ptr, dh0_ptr, length, chunk, d_inner,
    x_batch, x_row, dt_batch, dt_row, z_batch, z_row, dy_batch, dy_row,
    HALVES: gl.constexpr, SOFTPLUS: gl.constexpr, TILE: gl.constexpr, SECTION: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A: (d_state, d_inner); starts: (batch, sections, d_state, d_inner), as all states here.

    ends, spans: of `selective_scan._ends`, HALVES for each chunk but the first; scratch: a section
    per program; shared, own: parts of the gradients, as `selective_scan._results` lays them out.
    """
    N: gl.constexpr = 16
    W: gl.constexpr = 32 * gl.num_warps()
    # a thread's registers run along the states, lanes and warps along the channels
    STATE: gl.constexpr = gl.BlockedLayout([N, 1], [1, 32], [1, gl.num_warps()], [0, 1])
    OVER_N: gl.constexpr = gl.SliceLayout(0, STATE)  # a number per channel
    OVER_D: gl.constexpr = gl.SliceLayout(1, STATE)  # a number per state, the same in all lanes
    # to sum over the channels: a thread's registers along the channels of two rows
    SUM: gl.constexpr = gl.BlockedLayout([1, W], [32, 1], [gl.num_warps(), 1], [0, 1])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    SPREAD: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])  # no bank conflicts either way

    groups, chunks = d_inner // W, gl.cdiv(length, chunk)
    group = gl.program_id(0) % groups
    part = gl.program_id(0) // groups % chunks
    batch = (gl.program_id(0) // groups // chunks).to(gl.int64)
    batches = gl.num_programs(0) // groups // chunks
    n = gl.arange(0, N, layout=OVER_D)
    own = gl.arange(0, W, layout=OVER_N)
    d = group * W + own
    at = n[:, None] * d_inner + d[None, :]
    here = n[:, None] * W + own[None, :]

    A2 = gl.load(A_ptr + at) * LOG2E
    G = gl.zeros([N, W], gl.float32, STATE)
    if dlast_ptr is not None:
        G = gl.load(dlast_ptr + batch * N * d_inner + at)
    if ends_ptr is not None:
        for later in range(chunks - 1 - part):  # of the chunks after this one, the last first
            for half in gl.static_range(HALVES):
                slot = HALVES * (batch * (chunks - 1) + later) + half
                span = gl.load(spans_ptr + slot * d_inner + d)
                G = gl.exp2(span[None, :] * A2) * G + gl.load(ends_ptr + slot * N * d_inner + at)
    skip = 0.0
    if D_ptr is not None:
        skip = gl.load(D_ptr + d)
    bias = 0.0
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + d)

    xs = gl.allocate_shared_memory(x_ptr.dtype.element_ty, [STAGES, TILE, W], PLAIN)
    dts = gl.allocate_shared_memory(dt_ptr.dtype.element_ty, [STAGES, TILE, W], PLAIN)
    dys = gl.allocate_shared_memory(dy_ptr.dtype.element_ty, [STAGES, TILE, W], PLAIN)
    Bs = gl.allocate_shared_memory(gl.float32, [STAGES, TILE, N], PLAIN)
    Cs = gl.allocate_shared_memory(gl.float32, [STAGES, TILE, N], PLAIN)
    hs = gl.allocate_shared_memory(gl.float32, [STAGES, N, W], PLAIN)
    to_B = gl.allocate_shared_memory(gl.float32, [TILE * N, W], SPREAD)
    to_C = gl.allocate_shared_memory(gl.float32, [TILE * N, W], SPREAD)
    # the same memory, row by row
    x_rows = xs._reinterpret(x_ptr.dtype.element_ty, [STAGES * TILE, W], LINE)
    dt_rows = dts._reinterpret(dt_ptr.dtype.element_ty, [STAGES * TILE, W], LINE)
    dy_rows = dys._reinterpret(dy_ptr.dtype.element_ty, [STAGES * TILE, W], LINE)
    B_rows = Bs._reinterpret(gl.float32, [STAGES * TILE, N], LINE)
    C_rows = Cs._reinterpret(gl.float32, [STAGES * TILE, N], LINE)
    if z_ptr is not None:
        zs = gl.allocate_shared_memory(z_ptr.dtype.element_ty, [STAGES, TILE, W], PLAIN)
        z_rows = zs._reinterpret(z_ptr.dtype.element_ty, [STAGES * TILE, W], LINE)

    dA = gl.zeros([N, W], gl.float32, STATE)
    dD = gl.zeros([W], gl.float32, OVER_N)
    dbias = gl.zeros([W], gl.float32, OVER_N)
    scratch = scratch_ptr + gl.program_id(0).to(gl.int64) * (SECTION // TILE * N * W)
    sections = gl.cdiv(length, SECTION)
    begin, stop = part * chunk, gl.minimum(part * chunk + chunk, length)
    for section in range((stop - 1) // SECTION, begin // SECTION - 1, -1):
        # Everything below counts tokens from the section's first, in 32 bits.
        first = section.to(gl.int64) * SECTION
        token = batch * length + first
        x, dt = x_ptr + batch * x_batch + group * W, dt_ptr + batch * dt_batch + group * W
        x, dt = x + first * x_row, dt + first * dt_row
        dy = dy_ptr + batch * dy_batch + first * dy_row + group * W
        B, C = B_ptr + token * N, C_ptr + token * N
        dx, ddt = dx_ptr + token * d_inner, ddt_ptr + token * d_inner
        rows = (batches * length).to(gl.int64)
        dB = shared_ptr + (group * 2 * rows + token) * N
        dC = dB + rows * N
        if z_ptr is not None:
            z = z_ptr + batch * z_batch + first * z_row + group * W
            dz = dz_ptr + token * d_inner
        tokens = gl.minimum(stop - section * SECTION, SECTION)
        tiles = gl.cdiv(tokens, TILE)

        # forwards: the state before each tile
        h = gl.load(starts_ptr + (batch * sections + section) * N * d_inner + at)
        for i in gl.static_range(STAGES - 1):
            _fetch(xs.index(i), x, i * TILE, 0, tokens, x_row)
            _fetch(dts.index(i), dt, i * TILE, 0, tokens, dt_row)
            _fetch(Bs.index(i), B, i * TILE, 0, tokens, N)
            async_copy.commit_group()
        for i in range(tiles - 1):
            gl.store(scratch + i * N * W + here, h)
            async_copy.wait_group(STAGES - 2)
            slot, ahead = (i + STAGES - 1) % STAGES, (i + STAGES - 1) * TILE
            _fetch(xs.index(slot), x, ahead, 0, tokens, x_row)
            _fetch(dts.index(slot), dt, ahead, 0, tokens, dt_row)
            _fetch(Bs.index(slot), B, ahead, 0, tokens, N)
            async_copy.commit_group()
            slot = (i % STAGES) * TILE
            for k in gl.static_range(TILE):
                step = dt_rows.index(slot + k).load(OVER_N).to(gl.float32) + bias
                step = _step_size(step, SOFTPLUS)
                drive = step * x_rows.index(slot + k).load(OVER_N).to(gl.float32)
                a = gl.exp2(step[None, :] * A2)
                h = a * h + drive[None, :] * B_rows.index(slot + k).load(OVER_D)[:, None]
        gl.store(scratch + (tiles - 1) * N * W + here, h)
        async_copy.wait_group(0)  # and a barrier, so that other threads' copies see the scratch

        # backwards, from the last tile to the first
        for i in gl.static_range(STAGES - 1):
            tile = tiles - 1 - i
            _fetch(hs.index(i), scratch, tile * N, 0, SECTION // TILE * N, W)
            _fetch(xs.index(i), x, tile * TILE, 0, tokens, x_row)
            _fetch(dts.index(i), dt, tile * TILE, 0, tokens, dt_row)
            _fetch(dys.index(i), dy, tile * TILE, 0, tokens, dy_row)
            _fetch(Bs.index(i), B, tile * TILE, 0, tokens, N)
            _fetch(Cs.index(i), C, tile * TILE, 0, tokens, N)
            if z_ptr is not None:
                _fetch(zs.index(i), z, tile * TILE, 0, tokens, z_row)
            async_copy.commit_group()
        for i in range(tiles):
            row = (tiles - 1 - i) * TILE
            async_copy.wait_group(STAGES - 2)
            slot, ahead = (i + STAGES - 1) % STAGES, row - (STAGES - 1) * TILE
            _fetch(hs.index(slot), scratch, ahead // TILE * N, 0, SECTION // TILE * N, W)
            _fetch(xs.index(slot), x, ahead, 0, tokens, x_row)
            _fetch(dts.index(slot), dt, ahead, 0, tokens, dt_row)
            _fetch(dys.index(slot), dy, ahead, 0, tokens, dy_row)
            _fetch(Bs.index(slot), B, ahead, 0, tokens, N)
            _fetch(Cs.index(slot), C, ahead, 0, tokens, N)
            if z_ptr is not None:
                _fetch(zs.index(slot), z, ahead, 0, tokens, z_row)
            async_copy.commit_group()
            h = hs.index(i % STAGES).load(STATE)
            slot = (i % STAGES) * TILE
            before, decays, steps, upstream = (), (), (), ()
            for k in gl.static_range(TILE):
                inside = row + k < tokens
                step = dt_rows.index(slot + k).load(OVER_N).to(gl.float32) + bias
                step = gl.where(inside, _step_size(step, SOFTPLUS), 0.0)
                x_k = x_rows.index(slot + k).load(OVER_N).to(gl.float32)
                dy_k = dy_rows.index(slot + k).load(OVER_N).to(gl.float32)
                B_k = B_rows.index(slot + k).load(OVER_D)[:, None]
                C_k = C_rows.index(slot + k).load(OVER_D)[:, None]
                a = gl.exp2(step[None, :] * A2)
                before, decays = before + (h,), decays + (a,)
                h = a * h + (step * x_k)[None, :] * B_k
                if z_ptr is not None:
                    z_k = z_rows.index(slot + k).load(OVER_N).to(gl.float32)
                    s = gluon_sigmoid(z_k)
                    y = gl.sum(h * C_k, axis=0) + skip * x_k
                    dz_k = dy_k * y * s * (1 + z_k * (1 - s))
                    mask = (own >= 0) & inside
                    gl.store(dz + (row + k) * d_inner + d, dz_k.to(dz.dtype.element_ty), mask)
                    dy_k *= z_k * s
                steps, upstream = steps + (step,), upstream + (dy_k,)
                dD += dy_k * x_k
                to_C.slice(k * N, N, 0).store(h * dy_k[None, :])
            for k in gl.static_range(TILE - 1, -1, -1):
                step, dy_k = steps[k], upstream[k]
                x_k = x_rows.index(slot + k).load(OVER_N).to(gl.float32)
                B_k = B_rows.index(slot + k).load(OVER_D)[:, None]
                C_k = C_rows.index(slot + k).load(OVER_D)[:, None]
                g = dy_k[None, :] * C_k + G
                G = decays[k] * g
                dlog = G * before[k]  # the gradient of Δ A
                dA += dlog * step[None, :]
                ddrive = gl.sum(g * B_k, axis=0)
                dstep = gl.sum(dlog * A2, axis=0) * LN2 + ddrive * x_k
                to_B.slice(k * N, N, 0).store(g * (step * x_k)[None, :])
                if SOFTPLUS:
                    dstep *= gluon_sigmoid(
                        dt_rows.index(slot + k).load(OVER_N).to(gl.float32) + bias
                    )
                mask = (own >= 0) & (row + k < tokens)
                dstep = gl.where(mask, dstep, 0.0)
                dbias += dstep
                dx_k = ddrive * step + dy_k * skip
                gl.store(dx + (row + k) * d_inner + d, dx_k.to(dx.dtype.element_ty), mask)
                gl.store(ddt + (row + k) * d_inner + d, dstep.to(ddt.dtype.element_ty), mask)
            line = gl.arange(0, TILE * N, layout=gl.SliceLayout(1, SUM))
            mask = row * N + line < tokens * N
            gl.store(dC + row * N + line, gl.sum(to_C.load(SUM), axis=1), mask)
            gl.store(dB + row * N + line, gl.sum(to_B.load(SUM), axis=1), mask)
        async_copy.wait_group(0)
    if part == 0:
        gl.store(dh0_ptr + batch * N * d_inner + at, G)
    own_ptr += (batch * chunks + part) * (N + 2) * d_inner
    gl.store(own_ptr + at, dA)
    gl.store(own_ptr + N * d_inner + d, dD)
    gl.store(own_ptr + (N + 1) * d_inner + d, dbias)
