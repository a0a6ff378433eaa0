"""The selective scan on a GPU in Triton, fused: forward and backward.

    h_t = exp(Δ_t A) h_{t−1} + w(Δ_t A) Δ_t x_t B_t,     y_t = (Σ_n C_t h_t + D x_t) silu(z_t)

with Δ = softplus(dt + bias), as `mamba_tutorial.selective.selective_scan` defines it. The states of
size (batch, length, d_inner, d_state) never leave the chip.

**Forward.** A program is one warp. It takes 32 channels of a sequence, one for each thread, and
goes along the length in tiles of TILE tokens. A tile is a block [TILE, BLOCK_N, BLOCK_D] of decays
and of inputs. Triton spreads the last axis of such a block over the 32 lanes and leaves the other
two to the registers of each thread. So

- what runs along time, and the sum over the states, needs no communication at all;
- B and C, which all channels share, are read by all lanes at once from shared memory, where
  Triton's pipeline has put them while the tiles before were computed;
- nothing waits for another warp.

What is left is what the arithmetic needs: of about 130 instructions per token and warp, 80 are the
five that each of the 16 states takes, and 16 of those are exponentials, for which the chip has the
fewest units.

**Few sequences** give few warps. Then the length is cut into chunks. `_ends` finds what each chunk
but the last adds to the state, and how long it is in units of Δ; the decay over a chunk is
exp(A ΣΔ), so nothing else has to be kept. Each program of the forward pass joins what the chunks
before it give, which is the scan once more, over chunks. This costs nearly every exponential twice.

**Backward.** The forward pass writes down some of the states, and the backward pass computes the
others once more (`_backward`). Sums over channels, for B and C, are written per program and added
up afterwards (`_add_up`), so that two runs give the same bits.

Both passes have a twin in Gluon, for 16 states, B by Euler's rule, and Ampere or later (`_takes`):
`selective_scan_forward` and `selective_scan_backward`.

A short sequence is over as soon as kernels are started. So what is needed before and after, float32
copies of B and C, A turned, and sums, takes one kernel before and two after.
"""

import torch
from torch import Tensor

from mamba_tutorial.kernels import selective_scan_backward as gluon_backward
from mamba_tutorial.kernels import selective_scan_forward as gluon_forward
from mamba_tutorial.kernels._gates import LOG2E, carry, sigmoid, softplus
from mamba_tutorial.kernels._gluon import aligned
from mamba_tutorial.kernels._launch import multiprocessors, on
from mamba_tutorial.kernels._triton import tl, triton

LANES = 32
BACKWARD_D = 8  # channels of a program of `_backward`
RESIDENT = 8  # programs of `_forward` for each multiprocessor, where the length is cut
SECTION, LEAST = gluon_backward.SECTION, 3  # tokens of a section, sections of a chunk


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    dt_softplus: bool,
    exact: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the last state, and some of the states, if the backward pass will ask for them.

    x, dt, z: (batch, length, d_inner), of float16, bfloat16 or float32; A: (d_inner, d_state);
    B, C: (batch, length, d_state); D, dt_bias: (d_inner,); h0: (batch, d_inner, d_state). `exact`
    asks for the zero-order hold of B. The state is float32.
    """
    staged = _takes(gluon_forward, x, A.shape[1], exact)
    x, dt, z = (_rows(tensor, staged) for tensor in (x, dt, z))
    B, C = _rows(B, False), _rows(C, False)
    D, dt_bias, h0 = (_float(tensor) for tensor in (D, dt_bias, h0))
    A, B, C = _prepared(A, B, C)
    every = spacing(x, A.shape[0], exact) if keep else None
    return _run(x, dt, A, B, C, D, z, dt_bias, h0, dt_softplus, exact, every)


def spacing(x: Tensor, d_state: int, exact: bool) -> int:
    """Return of how many tokens the backward pass needs one state."""
    return SECTION if _takes(gluon_backward, x, d_state, exact) else _tile(d_state)


def backward(
    dy: Tensor | None,
    dh_last: Tensor | None,
    starts: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    exact: bool,
) -> tuple[Tensor, ...]:
    """Return the gradients, given those of y and of the last state.

    Of x, of dt and of z, which is empty where there is no z; of B and C, one above the other; of A,
    D and dt_bias, (d_state + 2, d_inner); and of h0.
    """
    dtype = B.dtype if B.dtype == C.dtype else torch.float32
    staged = _takes(gluon_backward, x, A.shape[1], exact)
    x, dt, z = (_rows(tensor, staged) for tensor in (x, dt, z))
    B, C = _rows(B, False), _rows(C, False)
    D, dt_bias = _float(D), _float(dt_bias)
    A, B, C = _prepared(A, B, C)
    dy = torch.zeros_like(x) if dy is None else _rows(dy, staged)
    run = _run_gluon_backward if staged else _run_backward
    given = x, dt, A, B, C, D, z, dt_bias, starts, dy, _transposed(_float(dh_last))
    dx, ddt, dz, shared, own, dh0 = run(*given, dt_softplus, exact)
    shared, own = _sums(shared, own, dtype)
    return dx, ddt, x.new_empty(0) if z is None else dz, shared, own, dh0.mT


def _prepared(A, B, C):
    """Return A turned, (d_state, d_inner), and B and C, all of float32, by one kernel."""
    (d_inner, d_state), (batch, length, _) = A.shape, B.shape
    A, turned = A.contiguous(), A.new_empty(d_state, d_inner, dtype=torch.float32)
    shared = turned.new_empty(2, batch, length, d_state)
    ROWS, BLOCK_N = 128, triton.next_power_of_2(d_state)
    grid = (triton.cdiv(batch * length, ROWS) + triton.cdiv(d_inner, ROWS),)
    with on(A):
        _prepare[grid](
            *(A, B, C, turned, *shared, batch * length, length, d_inner, d_state),
            *_strides(B), *_strides(C), ROWS=ROWS, BLOCK_N=BLOCK_N, num_warps=4,
        )  # fmt: skip
    return turned, *shared


def _sums(shared: Tensor, own: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return shared.sum(0), of this dtype, and own.sum(0), the parts added in their order."""
    first, second = (
        parts.new_empty(parts.shape[1:], dtype=t)
        for parts, t in ((shared, dtype), (own, torch.float32))
    )
    BLOCK = 512
    grid = (triton.cdiv(first.numel(), BLOCK) + triton.cdiv(second.numel(), BLOCK),)
    with on(shared):
        _add_up[grid](
            *(shared, own, first, second, len(shared), len(own), first.numel(), second.numel()),
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return first, second


def _run(x, dt, A, B, C, D, z, dt_bias, h0, dt_softplus, exact, every):
    """Forward; return y, the last state, and the state before every `every` tokens, if asked."""
    batch, length, d_inner = x.shape
    d_state, blocks = A.shape[0], triton.cdiv(d_inner, LANES)
    in_gluon = every in {None, SECTION} and _takes(gluon_forward, x, d_state, exact)
    enough = 1.5 if in_gluon else 3  # by measurement; Gluon gives a row of channels two warps
    chunk = _chunk(x, batch * blocks, length, enough, resident=RESIDENT)
    chunks = triton.cdiv(length, chunk)
    sizes = length, chunk, d_inner, d_state
    config, h0 = _config(d_state, dt_softplus, exact), _transposed(h0)
    y, h_last = x.new_empty(x.shape), A.new_empty(batch, d_state, d_inner)
    starts = A.new_empty(batch, triton.cdiv(length, every), d_state, d_inner) if every else None
    ends = spans = None
    with on(x):
        if chunks > 1:
            ends, spans = _run_ends(x, dt, A, B, None, dt_bias, sizes, config, reverse=False)
        given = x, dt, A, B, C, D, z, dt_bias, h0, ends, spans, y, starts, h_last
        strides = *_strides(x), *_strides(dt), *_strides(z)
        constants = {"HALVES": ends.shape[2] if chunks > 1 else 0, "EVERY": every or length}
        if in_gluon:
            gluon_forward.forward[(batch * chunks * d_inner // gluon_forward.CHANNELS,)](
                *given, length, chunk, d_inner, *strides,
                SOFTPLUS=dt_softplus, **constants, **gluon_forward.CONFIG,
            )  # fmt: skip
        else:
            _forward[(batch * chunks * blocks,)](*given, *sizes, *strides, **constants, **config)
    return y, h_last.mT, starts


def _run_ends(u, dt, A, V, z, dt_bias, sizes, config, reverse):
    """What every chunk but one gives to the chunks after it, in the direction of the pass.

    (batch, chunks − 1, 1 or 2, …): of the whole chunk, or of its head and of its tail.
    """
    batch, (length, chunk, d_inner, d_state) = len(u), sizes
    chunks, blocks = triton.cdiv(length, chunk), triton.cdiv(d_inner, LANES)
    halves, share = _share(chunks, chunk)
    ends = A.new_empty(batch, chunks - 1, halves, d_state, d_inner)
    spans = A.new_empty(batch, chunks - 1, halves, d_inner)
    given = u, dt, A, V, z, dt_bias, ends, spans, share
    strides = *_strides(u), *_strides(dt), *_strides(z)
    whole = reverse and _whole(sizes, config)  # forwards it was slower, by measurement
    _ends[(batch * chunks * blocks,)](
        *given, *sizes, *strides, HALVES=halves, REVERSE=reverse, WHOLE=whole, **config
    )
    return ends, spans


def _share(chunks: int, chunk: int) -> tuple[int, int]:
    """Return in how many parts `_ends` does a chunk, and how many tokens a program takes.

    Two parts give all programs the same share, 1/chunks less than a chunk, and every chunk one more
    part to join, which takes as long as a few tokens.
    """
    if chunks * chunks < chunk // 2:
        return 2, triton.cdiv((chunks - 1) * chunk, 16 * chunks) * 16
    return 1, chunk


def _run_backward(x, dt, A, B, C, D, z, dt_bias, starts, dy, dh_last, dt_softplus, exact):
    batch, length, d_inner = x.shape
    d_state, blocks = A.shape[0], triton.cdiv(d_inner, BACKWARD_D)
    results = _results(x, dt, A, z, slots=batch, blocks=blocks)
    strides = *_strides(x), *_strides(dt), *_strides(z), *_strides(dy)
    given = x, dt, A, B, C, D, z, dt_bias, starts, dy, dh_last
    config = _config(d_state, dt_softplus, exact) | {"BLOCK_D": BACKWARD_D}
    with on(x):
        _backward[(batch * blocks,)](*given, *results, length, d_inner, d_state, *strides, **config)
    return results


def _run_gluon_backward(x, dt, A, B, C, D, z, dt_bias, starts, dy, dh_last, dt_softplus, exact):
    batch, length, d_inner = x.shape
    d_state, groups = A.shape[0], d_inner // gluon_backward.CHANNELS
    chunk = _chunk(x, batch * groups, length, enough=1, resident=2)
    chunks = triton.cdiv(length, chunk)
    # two groups of channels share a part of the sums for B and C, which they add to
    results = _results(x, dt, A, z, slots=batch * chunks, blocks=triton.cdiv(groups, 2))
    results[3].zero_()
    ends = spans = None
    with on(x):
        if chunks > 1:
            sizes, config = (length, chunk, d_inner, d_state), _config(d_state, dt_softplus, exact)
            ends, spans = _run_ends(dy, dt, A, C, z, dt_bias, sizes, config, reverse=True)
        given = x, dt, A, B, C, D, z, dt_bias, starts, dy, dh_last, ends, spans
        strides = *_strides(x), *_strides(dt), *_strides(z), *_strides(dy)
        gluon_backward.backward[(batch * chunks * groups,)](
            *given, *results, length, chunk, d_inner, *strides,
            HALVES=ends.shape[2] if chunks > 1 else 0, SOFTPLUS=dt_softplus,
            **gluon_backward.CONFIG,
        )  # fmt: skip
    return results


def _results(x, dt, A, z, slots, blocks):
    """Return room for the gradients.

    Those of x, dt and z; of B and C, one above the other, one part for each block of channels; of
    A, D and dt_bias likewise, one part for each slot; and of h0.
    """
    batch, length, d_inner = x.shape
    dx, ddt = x.new_empty(x.shape), dt.new_empty(x.shape)
    dz = None if z is None else z.new_empty(x.shape)
    shared = A.new_empty(blocks, 2, batch, length, len(A))
    own = A.new_empty(slots, len(A) + 2, d_inner)
    return dx, ddt, dz, shared, own, A.new_empty(batch, *A.shape)


def _tile(d_state: int) -> int:
    """Return how many tokens make up a tile: 128 numbers for each thread, where possible."""
    return min(16, max(1, 128 // max(4, triton.next_power_of_2(d_state))))


def _config(d_state: int, dt_softplus: bool, exact: bool) -> dict:
    """Return the constants that the kernels share."""
    return {
        "TILE": _tile(d_state),
        "BLOCK_N": max(4, triton.next_power_of_2(d_state)),
        "BLOCK_D": LANES,
        "SOFTPLUS": dt_softplus,
        "EXACT": exact,
        "num_warps": 1,
    }


def _takes(kernel, x: Tensor, d_state: int, exact: bool) -> bool:
    """Say whether a kernel in Gluon, which is written for some sizes and chips, can do this."""
    fits = d_state == 16 and x.shape[-1] % kernel.CHANNELS == 0 and not exact
    return fits and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0)


def _whole(sizes: tuple[int, int, int, int], config: dict) -> bool:
    """Say whether every tile is full, so that nothing has to be masked."""
    length, _, d_inner, d_state = sizes
    over = length % config["TILE"], d_inner % config["BLOCK_D"], d_state % config["BLOCK_N"]
    return not any(over)


def _chunk(x: Tensor, rows: int, length: int, enough: float, resident: int) -> int:
    """Return the tokens of a program, of which there is one for each row and chunk.

    All of them, if there are `enough` rows for each multiprocessor; else as many as make `resident`
    programs for each, but not so few that joining the chunks takes longer than going through one.
    """
    size = multiprocessors(x)
    parts = 1 if rows >= enough * size else max(1, resident * size // rows)
    return max(triton.cdiv(triton.cdiv(length, parts), SECTION), LEAST) * SECTION


def _rows(tensor: Tensor | None, staged: bool) -> Tensor | None:
    """Make neighbouring channels neighbours in memory; the rows may lie anywhere.

    If they are to be staged through shared memory, anywhere at multiples of 16 bytes.
    """
    if tensor is None or (tensor.stride(-1) == 1 and not (staged and not aligned(tensor))):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _transposed(tensor: Tensor | None) -> Tensor | None:
    """Make neighbouring channels neighbours in memory, for (…, d_inner, d_state)."""
    return None if tensor is None else tensor.mT.contiguous()


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else tensor.stride()[:2]


@triton.jit
def _prepare(
    A_ptr, B_ptr, C_ptr, turned_ptr, b_ptr, c_ptr, rows, length, d_inner, d_state,
    B_batch, B_row, C_batch, C_row, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """B and C in float32, without gaps, and after them A turned."""
    n, blocks = tl.arange(0, BLOCK_N)[None, :], tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    if program < blocks:
        row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        inside, at = (row < rows) & (n < d_state), row * d_state + n
        sequence, token = row // length, row % length
        B = tl.load(B_ptr + sequence * B_batch + token * B_row + n, inside)
        C = tl.load(C_ptr + sequence * C_batch + token * C_row + n, inside)
        tl.store(b_ptr + at, B.to(tl.float32), inside)
        tl.store(c_ptr + at, C.to(tl.float32), inside)
    else:
        d = ((program - blocks) * ROWS + tl.arange(0, ROWS))[:, None]
        inside = (d < d_inner) & (n < d_state)
        A = tl.load(A_ptr + d * d_state + n, inside)
        tl.store(turned_ptr + n * d_inner + d, A.to(tl.float32), inside)


@triton.jit
def _add_up(
    shared_ptr, own_ptr, first_ptr, second_ptr, shared_parts, own_parts, first_size, second_size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(first_size, BLOCK)
    if tl.program_id(0) < blocks:
        _add(shared_ptr, first_ptr, tl.program_id(0), shared_parts, first_size, BLOCK)
    else:
        _add(own_ptr, second_ptr, tl.program_id(0) - blocks, own_parts, second_size, BLOCK)


@triton.jit
def _add(parts_ptr, total_ptr, block, parts, size, BLOCK: tl.constexpr):
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in tl.range(parts, loop_unroll_factor=8):
        total += tl.load(parts_ptr + at, at < size, 0.0)
        parts_ptr += size
    tl.store(total_ptr + at, total.to(total_ptr.dtype.element_ty), at < size)


@triton.jit
def _row(tile, k: tl.constexpr):
    """Return tile[k : k + 1]. k is a constant in every thread, so this is a choice of register."""
    here = (tl.arange(0, tile.shape[0]) == k)[:, None, None]
    bits = tile.to(tl.int32, bitcast=True)  # integers: the compiler knows that n + 0 is n
    bits = tl.sum(tl.where(here, bits, 0), axis=0, keep_dims=True)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _with_row(tile, k: tl.constexpr, row):
    """Return the tile with tile[k : k + 1] = row."""
    here = (tl.arange(0, tile.shape[0]) == k)[:, None, None]
    return tl.where(here, row, tile)


@triton.jit
def _step_size(dt, inside, SOFTPLUS: tl.constexpr):
    """Return Δ, zero where there is no token: then the decay is 1 and the input 0."""
    return tl.where(inside, softplus(dt) if SOFTPLUS else dt, 0.0)


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
def _below(index, count, ALWAYS: tl.constexpr):
    """Return index < count, as a constant where it always holds: then the masks vanish."""
    return tl.full(index.shape, True, tl.int1) if ALWAYS else index < count


@triton.jit
def _place(rows, chunks, BLOCK_D: tl.constexpr):
    """Return the block of channels, the chunk and the sequence of this program."""
    blocks = tl.cdiv(rows, BLOCK_D)
    program = tl.program_id(0)
    return program % blocks, program // blocks % chunks, (program // blocks // chunks).to(tl.int64)


@triton.jit
def _forward(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, h0_ptr, ends_ptr, spans_ptr,
    y_ptr, starts_ptr, last_ptr,
    length, chunk, d_inner, d_state, x_batch, x_row, dt_batch, dt_row, z_batch, z_row,
    HALVES: tl.constexpr, EVERY: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A: (d_state, d_inner); h0, ends, starts, last: (batch, …, d_state, d_inner), float32."""
    chunks = tl.cdiv(length, chunk)
    block, part, batch = _place(d_inner, chunks, BLOCK_D)
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
                h = carry(h, span * A2) + tl.load(ends_ptr + slot * size + at, square, 0.0)
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
        step = _step_size(dt + bias, inside, SOFTPLUS)
        a = tl.exp2(step[:, None, :] * A2)  # [TILE, BLOCK_N, BLOCK_D] from here on
        b = (step * x)[:, None, :] * B[:, :, None]
        if EXACT:
            b *= _exprel(step[:, None, :] * A, a)
        hs = b
        for k in tl.static_range(TILE):
            h = _row(a, k) * h + _row(b, k)
            hs = _with_row(hs, k, h)
        y = tl.sum(hs * C[:, :, None], axis=1) + skip * x
        if z_ptr is not None:
            z = tl.load(z_ptr + row * z_row + d[None, :], inside & real, 0.0).to(tl.float32)
            y *= z * sigmoid(z)
        tl.store(y_ptr + row * d_inner + d[None, :], y.to(y_ptr.dtype.element_ty), inside & real)
    if part == chunks - 1:
        tl.store(last_ptr + batch * size + at, h, square)


@triton.jit
def _ends(
    u_ptr, dt_ptr, A_ptr, V_ptr, z_ptr, bias_ptr, ends_ptr, spans_ptr, share,
    length, chunk, d_inner, d_state, u_batch, u_row, dt_batch, dt_row, z_batch, z_row,
    HALVES: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTPLUS: tl.constexpr, EXACT: tl.constexpr, WHOLE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What chunks give to the next, from nothing, and their lengths ΣΔ.

    Forwards u = x, V = B and h ← a h + Δ u V, for all chunks but the last. In reverse u = dy,
    V = C and G ← a (G + u silu(z) V), the gradient of the state before; for all but the first.

    One chunk less than there are programs in `_forward`: some schedulers would have one warp, and
    the others two. So, where it pays, as many programs share the work evenly, `share` tokens each:
    a program does the tail of one chunk and the head of the next.
    """
    chunks = tl.cdiv(length, chunk)
    block, part, batch = _place(d_inner, chunks, BLOCK_D)
    t, n = tl.arange(0, TILE)[:, None], tl.arange(0, BLOCK_N)
    d = block * BLOCK_D + tl.arange(0, BLOCK_D)
    real, states = _below(d[None, :], d_inner, WHOLE), _below(n[None, :], d_state, WHOLE)
    square = states[:, :, None] & real[:, None, :]
    at = tl.multiple_of(n[None, :, None] * d_inner + d[None, None, :], [1, 1, 1])
    A = tl.load(A_ptr + at, square, 0.0)
    A2 = A * LOG2E
    bias = tl.load(bias_ptr + d[None, :], real, 0.0) if bias_ptr is not None else 0.0
    for half in range(2 - HALVES, 2):
        begin, end = part * share, part * chunk  # the tail of the chunk before
        if half == 1:
            begin, end = end, tl.minimum(begin + share, (chunks - 1) * chunk)
        if REVERSE:
            begin, end = chunks * chunk - end, chunks * chunk - begin
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
            inside = _below(start + t, tokens, WHOLE)
            u = tl.load(u_row_ptr + row * u_row + d[None, :], inside & real, 0.0).to(tl.float32)
            dt = tl.load(dt_row_ptr + row * dt_row + d[None, :], inside & real, 0.0)
            V = tl.load(V_row_ptr + row * d_state + n[None, :], inside & states, 0.0)
            step = _step_size(dt.to(tl.float32) + bias, inside, SOFTPLUS)
            span += step
            a = tl.exp2(step[:, None, :] * A2)
            if REVERSE:
                if z_ptr is not None:
                    z = tl.load(z_row_ptr + row * z_row + d[None, :], inside & real, 0.0)
                    z = z.to(tl.float32)
                    u *= z * sigmoid(z)
            else:
                u *= step
            b = u[:, None, :] * V[:, :, None]
            if EXACT and not REVERSE:
                b *= _exprel(step[:, None, :] * A, a)
            for k in tl.static_range(TILE):
                if REVERSE:
                    h = _row(a, k) * (h + _row(b, k))
                else:
                    h = _row(a, k) * h + _row(b, k)
        record = HALVES * part + half - 1
        known = (record >= 0) & (record < HALVES * (chunks - 1))
        slot = batch * HALVES * (chunks - 1) + record
        tl.store(ends_ptr + slot * d_state * d_inner + at, h, known & square)
        span = tl.sum(span, axis=0)[None, :]
        tl.store(spans_ptr + slot * d_inner + d[None, :], span, known & real)


@triton.jit
def _backward(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, starts_ptr, dy_ptr, dlast_ptr,
    dx_ptr, ddt_ptr, dz_ptr, shared_ptr, own_ptr, dh0_ptr, length, d_inner, d_state,
    x_batch, x_row, dt_batch, dt_row, z_batch, z_row, dy_batch, dy_row,
    TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SOFTPLUS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
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
        h_next = tl.load(starts_ptr + at, ahead & square, 0.0)
        if z_ptr is not None:
            z_ptr -= TILE * z_row
            z_next = tl.load(z_ptr + z_at, ahead, 0.0)
        dt = dt.to(tl.float32) + bias
        step = _step_size(dt, inside, SOFTPLUS)
        # the states of the tile, once more
        a = tl.exp2(step[:, None, :] * A2)
        drive = tl.where(real, step * x, 0.0)
        b = drive[:, None, :] * B[:, :, None]
        if EXACT:
            z = step[:, None, :] * A
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
            g = _row(gs, k) + G
            gs = _with_row(gs, k, g)
            G = _row(a, k) * g
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
