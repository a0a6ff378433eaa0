"""The recurrence h_t = a_t h_{t−1} + b_t in Gluon, staged through shared memory.

The same two kernels as in `in_triton`, and the same looking back. What is different is who holds
what. A copy from memory is fastest in pieces of 16 bytes, so that neighbouring threads take turns
along a row of channels and then along time. A recurrence is fastest if a thread owns a channel, or
two of 16 bits, and steps through time: a multiplication and an addition per token, and nothing
exchanged. Plain Triton has one layout for both. Here the copy goes into shared memory, and from
there each thread reads its own channels, in whatever pieces it likes.

Also, what is on its way to shared memory needs no registers. So more can be on its way at once,
which is all that counts for a kernel that hardly computes.
"""

from mamba_tutorial.kernels._gluon import fetch, in_gluon
from mamba_tutorial.kernels._triton import async_copy, gl, gluon
from mamba_tutorial.kernels.scan import look_back as plain

*_, look_back = in_gluon(plain.join, plain.publish, plain.pick, plain.await_steps, plain.look_back)


@gluon.jit
def scan(
    a_ptr, b_ptr, h0_ptr, h_ptr, out_ptr, da_ptr, length, channels,
    WIDTH: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """As `in_triton.scan`, a thread for WIDTH neighbouring channels of a sequence."""
    GRADIENT: gl.constexpr = h_ptr is not None
    SIGN: gl.constexpr = -1 if REVERSE else 1
    W: gl.constexpr = 32 * WIDTH * gl.num_warps()
    OWN: gl.constexpr = gl.BlockedLayout([WIDTH], [32], [gl.num_warps()], [0])
    ROW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    blocks = gl.cdiv(channels, W)
    block = gl.program_id(0) % blocks
    batch = (gl.program_id(0) // blocks).to(gl.int64)
    c, left = gl.arange(0, W, layout=OWN), channels - block * W
    real = c < left
    h0 = gl.load(h0_ptr + batch * channels + block * W + c, real, 0.0).to(gl.float32)
    h = gl.zeros([W], gl.float32, OWN) if GRADIENT else h0
    row = batch * length
    if REVERSE:
        row += length - 1
    stride = SIGN * channels
    a_ptr += (row - SIGN * GRADIENT) * channels + block * W
    b_ptr += row * channels + block * W
    out_ptr += row * channels + block * W
    a_s = gl.allocate_shared_memory(a_ptr.dtype.element_ty, [STAGES, TILE, W], PLAIN)
    b_s = gl.allocate_shared_memory(b_ptr.dtype.element_ty, [STAGES, TILE, W], PLAIN)
    a_rows = a_s._reinterpret(a_ptr.dtype.element_ty, [STAGES * TILE, W], ROW)
    b_rows = b_s._reinterpret(b_ptr.dtype.element_ty, [STAGES * TILE, W], ROW)
    if GRADIENT:
        h_ptr += (row + SIGN) * channels + block * W
        da_ptr += row * channels + block * W
        h_s = gl.allocate_shared_memory(h_ptr.dtype.element_ty, [STAGES, TILE, W], PLAIN)
        h_rows = h_s._reinterpret(h_ptr.dtype.element_ty, [STAGES * TILE, W], ROW)
    for e in gl.static_range(STAGES - 1):
        more = length - e * TILE
        # the first decay of a gradient would be that of a token that does not exist
        fetch(a_s.index(e), a_ptr, GRADIENT - e * TILE, more, stride, left)
        fetch(b_s.index(e), b_ptr, 0, more, stride, left)
        a_ptr += TILE * stride
        b_ptr += TILE * stride
        if GRADIENT:
            fetch(h_s.index(e), h_ptr, 0, more - 1, stride, left)
            h_ptr += TILE * stride
        async_copy.commit_group()
    slot = 0
    for start in range(0, length, TILE):
        async_copy.wait_group(STAGES - 2)
        free = gl.where(slot == 0, STAGES - 1, slot - 1)
        more = length - start - (STAGES - 1) * TILE
        fetch(a_s.index(free), a_ptr, 0, more, stride, left)
        fetch(b_s.index(free), b_ptr, 0, more, stride, left)
        a_ptr += TILE * stride
        b_ptr += TILE * stride
        if GRADIENT:
            fetch(h_s.index(free), h_ptr, 0, more - 1, stride, left)
            h_ptr += TILE * stride
        async_copy.commit_group()
        for k in gl.static_range(TILE):
            a = a_rows.index(slot * TILE + k).load(OWN).to(gl.float32)
            h = gl.fma(a, h, b_rows.index(slot * TILE + k).load(OWN).to(gl.float32))
            inside = real & (start + k < length)
            gl.store(out_ptr + k * stride + c, h.to(out_ptr.dtype.element_ty), inside)
            if GRADIENT:
                # the state from which the token's own step started: the next in this order, or h0
                given = h_rows.index(slot * TILE + k).load(OWN).to(gl.float32)
                da = h * gl.where(start + k == length - 1, h0, given)
                gl.store(da_ptr + k * stride + c, da.to(da_ptr.dtype.element_ty), inside)
        out_ptr += TILE * stride
        if GRADIENT:
            da_ptr += TILE * stride
        slot = gl.where(slot + 1 == STAGES, 0, slot + 1)
    async_copy.wait_group(0)


@gluon.jit
def scan_tile(
    a_ptr, b_ptr, h0_ptr, h_ptr, out_ptr, da_ptr, words_ptr, overflow_ptr,
    length, tiles, rows, slots,
    CHANNELS: gl.constexpr, TILE: gl.constexpr, BLOCK_C: gl.constexpr, GROUP: gl.constexpr,
    LEVELS: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """As `in_triton.scan_tile`: one warp, one tile, the state before it found by looking back."""
    GRADIENT: gl.constexpr = h_ptr is not None
    SIGN: gl.constexpr = -1 if REVERSE else 1
    LOOK: gl.constexpr = gl.BlockedLayout([GROUP, BLOCK_C // 32], [1, 32], [1, 1], [1, 0])
    OWN: gl.constexpr = gl.SliceLayout(0, LOOK)
    ROW: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    tile, row = gl.program_id(0) // rows, gl.program_id(0) % rows
    blocks = gl.cdiv(CHANNELS, BLOCK_C)
    batch, block = (row // blocks).to(gl.int64), row % blocks
    first = tile.to(gl.int64) * TILE
    token = batch * length + first
    if REVERSE:
        token = batch * length + length - 1 - first
    corner, left = token * CHANNELS + block * BLOCK_C, CHANNELS - block * BLOCK_C
    c, stride = gl.arange(0, BLOCK_C, layout=OWN), SIGN * CHANNELS
    real, tokens = c < left, length - tile * TILE
    a_s = gl.allocate_shared_memory(a_ptr.dtype.element_ty, [TILE, BLOCK_C], PLAIN)
    b_s = gl.allocate_shared_memory(b_ptr.dtype.element_ty, [TILE, BLOCK_C], PLAIN)
    a_rows = a_s._reinterpret(a_ptr.dtype.element_ty, [TILE, BLOCK_C], ROW)
    b_rows = b_s._reinterpret(b_ptr.dtype.element_ty, [TILE, BLOCK_C], ROW)
    before = gl.where(tile == 0, GRADIENT, 0)  # rows that do not exist
    fetch(a_s, a_ptr + corner - SIGN * GRADIENT * CHANNELS, before, tokens, stride, left)
    fetch(b_s, b_ptr + corner, 0, tokens, stride, left)
    if GRADIENT:
        h_s = gl.allocate_shared_memory(h_ptr.dtype.element_ty, [TILE, BLOCK_C], PLAIN)
        h_rows = h_s._reinterpret(h_ptr.dtype.element_ty, [TILE, BLOCK_C], ROW)
        fetch(h_s, h_ptr + corner + stride, 0, tokens - 1, stride, left)
    async_copy.commit_group()
    h0 = gl.load(h0_ptr + batch * CHANNELS + block * BLOCK_C + c, real, 0.0).to(gl.float32)
    async_copy.wait_group(0)
    product, end = gl.full([BLOCK_C], 1.0, gl.float32, OWN), gl.zeros([BLOCK_C], gl.float32, OWN)
    for k in gl.static_range(TILE):
        a = a_rows.index(k).load(OWN).to(gl.float32)
        end = gl.fma(a, end, b_rows.index(k).load(OWN).to(gl.float32))
        product *= a
    start = gl.zeros([BLOCK_C], gl.float32, OWN) if GRADIENT else h0
    h = look_back(
        gl.expand_dims(words_ptr + batch * slots * CHANNELS + block * BLOCK_C + c, 0),
        gl.expand_dims(product, 0), gl.expand_dims(end, 0),
        gl.expand_dims(start, 0), tile, tiles, gl.expand_dims(real, 0),
        gl.arange(0, GROUP, layout=gl.SliceLayout(1, LOOK))[:, None], CHANNELS, GROUP, LEVELS,
    )  # fmt: skip
    h = gl.sum(h, axis=0)  # of one row
    for k in gl.static_range(TILE):
        a = a_rows.index(k).load(OWN).to(gl.float32)
        h = gl.fma(a, h, b_rows.index(k).load(OWN).to(gl.float32))
        inside = real & (k < tokens)
        gl.store(out_ptr + corner + k * stride + c, h.to(out_ptr.dtype.element_ty), inside)
        if GRADIENT:
            given = h_rows.index(k).load(OWN).to(gl.float32)
            da = h * gl.where(k == tokens - 1, h0, given)
            gl.store(da_ptr + corner + k * stride + c, da.to(da_ptr.dtype.element_ty), inside)
    # for `scan._repair`; a state that is no number stays none to the end of the tile
    gl.store(overflow_ptr + 0 * c, 1, real & ((gl.abs(h) < float("inf")) == 0))
