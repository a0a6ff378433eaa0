"""The forward pass of the selective scan in Triton, and the ends of its chunks.

A program is one warp. It takes 32 channels of a sequence, one for each thread, and goes along the
length in tiles of TILE tokens. A tile is a block [TILE, BLOCK_N, BLOCK_D] of decays and of inputs.
Triton spreads the last axis of such a block over the 32 lanes and leaves the other two to the
registers of each thread. So

- what runs along time, and the sum over the states, needs no communication at all;
- B and C, which all channels share, are read by all lanes at once from shared memory, where
  Triton's pipeline has put them while the tiles before were computed;
- nothing waits for another warp.

What is left is what the arithmetic needs: of about 130 instructions per token and warp, 80 are the
five that each of the 16 states takes, and 16 of those are exponentials, for which the chip has the
fewest units.
"""

from mamba_tutorial.kernels._gates import LOG2E, carry, mark, sigmoid, softplus
from mamba_tutorial.kernels._triton import tl, triton


@triton.jit
def row_of(tile, k: tl.constexpr):
    """Return tile[k : k + 1]. k is a constant in every thread, so this is a choice of register."""
    here = (tl.arange(0, tile.shape[0]) == k)[:, None, None]
    bits = tile.to(tl.int32, bitcast=True)  # integers: the compiler knows that n + 0 is n
    bits = tl.sum(tl.where(here, bits, 0), axis=0, keep_dims=True)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def with_row(tile, k: tl.constexpr, row):
    """Return the tile with tile[k : k + 1] = row."""
    here = (tl.arange(0, tile.shape[0]) == k)[:, None, None]
    return tl.where(here, row, tile)


@triton.jit
def step_size(dt, inside, SOFTPLUS: tl.constexpr):
    """Return Δ, zero where there is no token: then the decay is 1 and the input 0."""
    return tl.where(inside, softplus(dt) if SOFTPLUS else dt, 0.0)


@triton.jit
def marks(begins_ptr, batch, length, first, row, k, inside):
    """Return what to add to the exponents of the decays of these rows after the first (`mark`).

    begins: (batch, length) in words of four tokens, filled up to whole 16 tokens, of which `first`
    begins some. k: as row in a word; a constant, if possible, for then so is what `mark` does.
    """
    begins_ptr += batch * (tl.cdiv(length, 16) * 4) + first // 4
    return mark(tl.load(begins_ptr + row // 4, inside, 0), k)


@triton.jit
def reaching(begins_ptr, batch, length, begin, end, REVERSE: tl.constexpr):
    """Return the part of the tokens [begin, end), or a little more, that what is beyond can notice.

    Forwards that is what is after them, and nothing reaches it from before the last start among
    them; in reverse it is what is before them, and nothing reaches it from after the first. Both
    ends stay multiples of 16. begins: as `marks` takes it.
    """
    WORDS: tl.constexpr = 512
    begins_ptr += batch * (tl.cdiv(length, 16) * 4)
    stop = tl.minimum(tl.cdiv(end, 4), tl.cdiv(length, 16) * 4)
    none = end // 4 if REVERSE else begin // 4
    found = tl.full([WORDS], 0, tl.int32) + none
    for first in range(begin // 4, stop, WORDS):
        word = first + tl.arange(0, WORDS)
        starts = tl.load(begins_ptr + word, word < stop, 0) != 0
        here = tl.where(starts, word, none)
        found = tl.minimum(found, here) if REVERSE else tl.maximum(found, here)
    if REVERSE:
        end = tl.minimum(end, tl.min(found, 0) // 4 * 16 + 16)
    else:
        begin = tl.max(found, 0) // 4 * 16
    return begin, end


@triton.jit
def exprel(z, exp):
    """(e^z − 1)/z, near 0 by its series Σ z^k/(k+1)!, where the difference would cancel."""
    near = tl.abs(z) < 0.6
    s = tl.where(near, z, 0.0)
    p = 1 / 5040 + s * (1 / 40320 + s * (1 / 362880))
    p = 1 / 24 + s * (1 / 120 + s * (1 / 720 + s * p))
    p = 1 + s * (1 / 2 + s * (1 / 6 + s * p))
    return tl.where(near, p, (exp - 1) / tl.where(near, 1.0, z))


@triton.jit
def place(rows, chunks, BLOCK_D: tl.constexpr):
    """Return the block of channels, the chunk and the sequence of this program."""
    blocks = tl.cdiv(rows, BLOCK_D)
    program = tl.program_id(0)
    return program % blocks, program // blocks % chunks, (program // blocks // chunks).to(tl.int64)


@triton.jit
def forward(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, h0_ptr, begins_ptr, ends_ptr,
    spans_ptr, y_ptr, starts_ptr, last_ptr,
    length, chunk, d_inner, d_state, x_batch, x_row, dt_batch, dt_row, z_batch, z_row,
    HALVES: tl.constexpr, EVERY: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A: (d_state, d_inner); h0, ends, starts, last: (batch, …, d_state, d_inner), float32.

    begins: as `marks` takes it.
    """
    chunks = tl.cdiv(length, chunk)
    block, part, batch = place(d_inner, chunks, BLOCK_D)
    t, n = tl.arange(0, TILE)[:, None], tl.arange(0, BLOCK_N)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    real, states = (d < d_inner)[None, :], (n < d_state)[None, :]
    square = states[:, :, None] & real[:, None, :]  # [1, BLOCK_N, BLOCK_D], as the state is held
    # Claiming no alignment keeps Triton from loading four channels at once, which would put the
    # states on lanes, here and in all that follows.
    at = tl.multiple_of(n[None, :, None] * d_inner + d[None, None, :], [1, 1, 1])
    size = d_state * d_inner
    A = tl.load(A_ptr + at, square, 0.0)
    A2 = A * LOG2E
    h = tl.zeros([1, BLOCK_N, BLOCK_D], tl.float32)
    if h0_ptr is not None:
        h = tl.load(h0_ptr + batch * size + at, square, 0.0)
    if ends_ptr is not None:
        for earlier in range(part):
            for half in tl.static_range(HALVES):
                slot = HALVES * (batch * (chunks - 1) + earlier) + half
                span = tl.load(spans_ptr + slot * d_inner + d[None, None, :], real[:, None, :], 0.0)
                h = carry(h, span, A2, begins_ptr is not None)
                h += tl.load(ends_ptr + slot * size + at, square, 0.0)
    skip = tl.load(D_ptr + d[None, :], real, 0.0) if D_ptr is not None else 0.0
    bias = tl.load(bias_ptr + d[None, :], real, 0.0) if bias_ptr is not None else 0.0
    # Tokens are counted from the first of the chunk, so that offsets fit 32 bits.
    first = part.to(tl.int64) * chunk
    token = batch * length + first
    x_ptr += batch * x_batch + first * x_row
    dt_ptr += batch * dt_batch + first * dt_row
    B_ptr += token * d_state
    C_ptr += token * d_state
    y_ptr += token * d_inner
    if z_ptr is not None:
        z_ptr += batch * z_batch + first * z_row
    if starts_ptr is not None:
        starts_ptr += batch * tl.cdiv(length, EVERY) * size
    tokens = tl.minimum(length - part * chunk, chunk)
    for start in tl.range(0, tokens, TILE, num_stages=3):
        row = start + t
        inside = row < tokens
        x = tl.load(x_ptr + row * x_row + d[None, :], inside & real, 0.0).to(tl.float32)
        dt = tl.load(dt_ptr + row * dt_row + d[None, :], inside & real, 0.0).to(tl.float32)
        B = tl.load(B_ptr + row * d_state + n[None, :], inside & states, 0.0)
        C = tl.load(C_ptr + row * d_state + n[None, :], inside & states, 0.0)
        if starts_ptr is not None:
            if start % EVERY == 0:
                tl.store(starts_ptr + (first + start) // EVERY * size + at, h, square)
        step = step_size(dt + bias, inside, SOFTPLUS)
        exponent = step[:, None, :] * A2  # [TILE, BLOCK_N, BLOCK_D] from here on
        a = tl.exp2(exponent)
        b = (step * x)[:, None, :] * B[:, :, None]
        if EXACT:
            b *= exprel(step[:, None, :] * A, a)
        if begins_ptr is not None:
            barrier = marks(begins_ptr, batch, length, first, row, row, inside)
            a = tl.exp2(exponent + barrier[:, :, None])
        hs = b
        for k in tl.static_range(TILE):
            h = row_of(a, k) * h + row_of(b, k)
            hs = with_row(hs, k, h)
        y = tl.sum(hs * C[:, :, None], axis=1) + skip * x
        if z_ptr is not None:
            z = tl.load(z_ptr + row * z_row + d[None, :], inside & real, 0.0).to(tl.float32)
            y *= z * sigmoid(z)
        tl.store(y_ptr + row * d_inner + d[None, :], y.to(y_ptr.dtype.element_ty), inside & real)
    if part == chunks - 1:
        tl.store(last_ptr + batch * size + at, h, square)


@triton.jit
def ends(
    u_ptr, dt_ptr, A_ptr, V_ptr, z_ptr, bias_ptr, begins_ptr, ends_ptr, spans_ptr, kept, share,
    length, chunk, d_inner, d_state, u_batch, u_row, dt_batch, dt_row, z_batch, z_row,
    HALVES: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTPLUS: tl.constexpr, EXACT: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What chunks give to the next, from nothing, and their lengths ΣΔ.

    Forwards u = x, V = B and h ← a h + Δ u V, for the first `kept` chunks. In reverse u = dy, V = C
    and G ← a (G + u silu(z) V), the gradient of the state before; for the last `kept`. Where a
    sequence begins in between, nothing goes through, and ΣΔ is below CLOSED. So then only a part of
    the chunk is gone through (`reaching`).

    The states do not meet, so a program takes BLOCK_N of them: its number along the second axis.

    Mostly that is one chunk less than there are programs in `forward`: some schedulers would have
    one warp, and the others two. So, where it pays, as many programs share the work evenly, `share`
    tokens each: a program does the tail of one chunk and the head of the next.
    """
    chunks = tl.cdiv(length, chunk)
    block, part, batch = place(d_inner, chunks, BLOCK_D)
    t, n = tl.arange(0, TILE)[:, None], tl.arange(0, BLOCK_N)
    skipped = tl.program_id(1) * BLOCK_N  # states that other programs take
    A_ptr += skipped * d_inner
    V_ptr += skipped
    ends_ptr += skipped * d_inner
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    real, states = (d < d_inner)[None, :], (n < d_state - skipped)[None, :]
    square = states[:, :, None] & real[:, None, :]
    at = tl.multiple_of(n[None, :, None] * d_inner + d[None, None, :], [1, 1, 1])
    A = tl.load(A_ptr + at, square, 0.0)
    A2 = A * LOG2E
    bias = tl.load(bias_ptr + d[None, :], real, 0.0) if bias_ptr is not None else 0.0
    for half in range(2 - HALVES, 2):
        begin, end = part * share, part * chunk  # the tail of the chunk before
        if half == 1:
            begin, end = end, tl.minimum(begin + share, kept * chunk)
        if REVERSE:
            begin, end = chunks * chunk - end, chunks * chunk - begin
        if begins_ptr is not None:
            begin, end = reaching(begins_ptr, batch, length, begin, end, REVERSE)
        first = begin.to(tl.int64)
        u_row_ptr = u_ptr + batch * u_batch + first * u_row
        dt_row_ptr = dt_ptr + batch * dt_batch + first * dt_row
        V_row_ptr = V_ptr + (batch * length + first) * d_state
        if z_ptr is not None:
            z_row_ptr = z_ptr + batch * z_batch + first * z_row
        h = tl.zeros([1, BLOCK_N, BLOCK_D], tl.float32)
        span = tl.zeros([TILE, BLOCK_D], tl.float32)
        tokens = tl.minimum(end, length) - begin
        for start in tl.range(0, tokens, TILE, num_stages=3):
            row = start + t
            if REVERSE:
                row = tokens - 1 - start - t
            inside = start + t < tokens
            u = tl.load(u_row_ptr + row * u_row + d[None, :], inside & real, 0.0).to(tl.float32)
            dt = tl.load(dt_row_ptr + row * dt_row + d[None, :], inside & real, 0.0)
            V = tl.load(V_row_ptr + row * d_state + n[None, :], inside & states, 0.0)
            step = step_size(dt.to(tl.float32) + bias, inside, SOFTPLUS)
            span += step
            exponent = step[:, None, :] * A2
            a = tl.exp2(exponent)
            if REVERSE:
                if z_ptr is not None:
                    z = tl.load(z_row_ptr + row * z_row + d[None, :], inside & real, 0.0)
                    z = z.to(tl.float32)
                    u *= z * sigmoid(z)
            else:
                u *= step
            b = u[:, None, :] * V[:, :, None]
            if EXACT and not REVERSE:
                b *= exprel(step[:, None, :] * A, a)
            if begins_ptr is not None:
                barrier = marks(
                    begins_ptr, batch, length, first, row, row if REVERSE else t, inside
                )
                a = tl.exp2(exponent + barrier[:, :, None])
                span += barrier
            for k in tl.static_range(TILE):
                if REVERSE:
                    h = row_of(a, k) * (h + row_of(b, k))
                else:
                    h = row_of(a, k) * h + row_of(b, k)
        record = HALVES * part + half - 1
        known = (record >= 0) & (record < HALVES * kept)
        slot = batch * HALVES * kept + record
        tl.store(ends_ptr + slot * d_state * d_inner + at, h, known & square)
        span = tl.sum(span, axis=0)[None, :]
        tl.store(spans_ptr + slot * d_inner + d[None, :], span, known & real)
