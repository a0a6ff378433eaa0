"""The recurrence h_t = a_t h_{t−1} + b_t in Triton.

A program takes a block of channels and goes along the length in tiles [TILE, BLOCK_C], the next of
which are on their way through shared memory while one is scanned. `tl.associative_scan` scans a
tile of steps (a, b): over the tokens that one thread holds, one after the other; over the lanes of
a warp, by exchanging registers; over the warps, through shared memory. The states are then what the
tile does to the state before it, and the last of them is carried to the next tile.

With few channels there are few programs, and memory idles. Then every tile gets a program of its
own (`scan_tile`), as many run at once as fit, and each finds the state that its tile starts from
by looking back (`look_back`). Nothing is read twice.
"""

from mamba_tutorial.kernels._triton import tl, triton
from mamba_tutorial.kernels.scan.look_back import join, look_back, pick


@triton.jit
def note(overflow_ptr, h):
    """Note that a state is no number, so that `repair` looks after it."""
    tl.store(overflow_ptr + tl.zeros(h.shape, tl.int32), 1, (tl.abs(h) < float("inf")) == 0)


@triton.jit
def repair(
    a_ptr, b_ptr, h0_ptr, h_ptr, out_ptr, da_ptr, overflow_ptr, length, channels,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """Go through all tokens one by one, if a state was noted.

    A product of decays may overflow where no state does, and ∞ · 0 is not a number. The recurrence
    itself makes no such products.
    """
    if tl.load(overflow_ptr) == 0:
        return
    GRADIENT: tl.constexpr = h_ptr is not None
    SIGN: tl.constexpr = -1 if REVERSE else 1
    blocks, program = tl.cdiv(channels, 32), tl.program_id(0)
    batch = (program // blocks).to(tl.int64)
    c = program % blocks * 32 + tl.arange(0, 32)
    real = c < channels
    h0 = tl.load(h0_ptr + batch * channels + c, real, 0.0).to(tl.float32)
    h = tl.zeros([32], tl.float32) if GRADIENT else h0
    at = (batch * length + (length - 1 if REVERSE else 0)) * channels + c
    for t in range(0, length):
        known = real & (t > 0) if GRADIENT else real
        a = tl.load(a_ptr + at - SIGN * GRADIENT * channels, known, 0.0).to(tl.float32)
        h = a * h + tl.load(b_ptr + at, real, 0.0).to(tl.float32)
        tl.store(out_ptr + at, h.to(out_ptr.dtype.element_ty), real)
        if GRADIENT:
            before = tl.load(h_ptr + at + SIGN * channels, real & (t < length - 1), 0.0)
            da = h * tl.where(t < length - 1, before.to(tl.float32), h0)
            tl.store(da_ptr + at, da.to(da_ptr.dtype.element_ty), real)
        at += SIGN * channels


@triton.jit
def scan(
    a_ptr, b_ptr, h0_ptr, h_ptr, out_ptr, da_ptr, length, channels, overflow_ptr,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The states; or, given those of the scan in the other direction, the gradients of that scan.

    Then b is the gradient that arrives, out is ∂b, and the decay of a token is that of the token
    before it in the order of this scan, whose first state is b alone.
    """
    GRADIENT: tl.constexpr = h_ptr is not None
    SIGN: tl.constexpr = -1 if REVERSE else 1
    blocks, program = tl.cdiv(channels, BLOCK_C), tl.program_id(0)
    batch = (program // blocks).to(tl.int64)
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    real, t = c < channels, tl.arange(0, TILE)[:, None]
    h0 = tl.load(h0_ptr + batch * channels + c, real, 0.0).to(tl.float32)
    h = tl.zeros([1, BLOCK_C], tl.float32) if GRADIENT else h0
    # Pointers move from tile to tile; where the numbers lie from there never changes.
    row = batch * length + (length - 1 if REVERSE else 0)
    a_ptr += (row - SIGN * GRADIENT) * channels
    b_ptr += row * channels
    out_ptr += row * channels
    at = SIGN * t * channels + c
    if GRADIENT:
        h_ptr += (row + SIGN) * channels
        da_ptr += row * channels
    for start in tl.range(0, length, TILE, num_stages=STAGES):
        inside = (start + t < length) & real
        known = inside & (start + t > 0) if GRADIENT else inside
        a = tl.load(a_ptr + at, known, 1.0).to(tl.float32)
        b = tl.load(b_ptr + at, inside, 0.0).to(tl.float32)
        a, b = tl.associative_scan((a, b), 0, join)
        states = a * h + b
        h = pick(states, t == TILE - 1)
        tl.store(out_ptr + at, states.to(out_ptr.dtype.element_ty), inside)
        if GRADIENT:
            # the state from which the token's own step started: the next in this order, or h0
            more = inside & (start + t < length - 1)
            given = tl.load(h_ptr + at, more, 0.0)
            da = states * tl.where(more, given.to(tl.float32), h0)
            tl.store(da_ptr + at, da.to(da_ptr.dtype.element_ty), inside)
            h_ptr += SIGN * TILE * channels
            da_ptr += SIGN * TILE * channels
        a_ptr += SIGN * TILE * channels
        b_ptr += SIGN * TILE * channels
        out_ptr += SIGN * TILE * channels
    note(overflow_ptr, h)


@triton.jit
def scan_tile(
    a_ptr, b_ptr, h0_ptr, h_ptr, out_ptr, da_ptr, words_ptr, overflow_ptr,
    length, tiles, rows, slots,
    CHANNELS: tl.constexpr, TILE: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr,
    LEVELS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """As `scan`, but a program is one warp with one tile, every thread with all of its tokens.

    CHANNELS is a constant, so that all addresses of a thread are one address and constants.
    Programs are started in the order of their numbers: what one waits for is running or done.
    """
    GRADIENT: tl.constexpr = h_ptr is not None
    SIGN: tl.constexpr = -1 if REVERSE else 1
    program, blocks = tl.program_id(0), tl.cdiv(CHANNELS, BLOCK_C)
    tile, row = program // rows, program % rows
    batch = (row // blocks).to(tl.int64)
    c = row % blocks * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    real, t = c < CHANNELS, tl.arange(0, TILE)[:, None]
    first = tile.to(tl.int64) * TILE
    token = (batch * length + (length - 1 - first if REVERSE else first)) * CHANNELS
    # Claiming no alignment beyond this keeps all 32 lanes on channels.
    at = tl.multiple_of(SIGN * t * CHANNELS + c, [1, BLOCK_C // 32])
    inside = t < length - first
    if CHANNELS % BLOCK_C != 0:
        inside = inside & real
    known = inside & ((t > 0) | (tile > 0)) if GRADIENT else inside
    a = tl.load(a_ptr + token - SIGN * GRADIENT * CHANNELS + at, known, 1.0)
    b = tl.load(b_ptr + token + at, inside, 0.0)
    h0 = tl.load(h0_ptr + batch * CHANNELS + c, real, 0.0).to(tl.float32)
    if GRADIENT:
        more = inside & (t < length - 1 - first)
        given = tl.load(h_ptr + token + SIGN * CHANNELS + at, more, 0.0)
        given = tl.where(more, given.to(tl.float32), h0)
        h0 = tl.zeros_like(h0)
    products, ends = tl.associative_scan((a.to(tl.float32), b.to(tl.float32)), 0, join)
    words_ptr += batch * slots * CHANNELS + c
    own, own_end = pick(products, t == TILE - 1), pick(ends, t == TILE - 1)
    k = tl.arange(0, GROUP)[:, None]
    h = look_back(words_ptr, own, own_end, h0, tile, tiles, real, k, CHANNELS, GROUP, LEVELS)
    # Once more through the tile, from the right state. This costs less than keeping the products.
    a, b = a.to(tl.float32), b.to(tl.float32)
    _, states = tl.associative_scan((a, tl.where(t == 0, a * h + b, b)), 0, join)
    tl.store(out_ptr + token + at, states.to(out_ptr.dtype.element_ty), inside)
    note(overflow_ptr, pick(states, t == TILE - 1))
    if GRADIENT:
        da = (states * given).to(da_ptr.dtype.element_ty)
        tl.store(da_ptr + token + at, da, inside)
