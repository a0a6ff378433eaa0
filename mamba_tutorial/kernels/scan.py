"""The first-order recurrence h_t = a_t h_{t−1} + b_t on a GPU in Triton, forward and backward.

Nothing is computed here that costs time: a multiplication and an addition for three numbers that
travel from or to memory. So the one aim is to keep memory busy.

A program takes a block of channels and goes along the length in tiles [TILE, BLOCK_C], the next of
which are on their way through shared memory while one is scanned. `tl.associative_scan` scans a
tile of steps (a, b): over the tokens that one thread holds, one after the other; over the lanes of
a warp, by exchanging registers; over the warps, through shared memory. The states are then what the
tile does to the state before it, and the last of them is carried to the next tile.

With few channels there are few programs, and memory idles. Then every tile gets a program of its
own (`_scan_tile`), and as many run at once as fit. What a tile does to a state is one step
h ↦ product · h + end. Each program publishes the step of its tile, waits for those of the tiles
before it, and joins them to the state that its tile starts from: it looks back. Nothing is read
twice. So that nobody has to join thousands of steps, some tiles in a row make a group, and some
groups a group of the next level, whose steps are published too, by whoever completes them; beyond
the highest level the state itself is handed on. What is joined, and in which order, depends on the
place of a tile alone and never on who was first, so two runs give the same bits.

The backward pass is the recurrence in reverse, with the decays shifted by one token:

    g_t = ∂_t + a_{t+1} g_{t+1},    ∂b_t = g_t,    ∂a_t = g_t h_{t−1}
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_tutorial.kernels._launch import multiprocessors, on

# of `_scan`: TILE, BLOCK_C, warps and tiles on their way or in use, by measurement on an H200
WIDE, NARROW, HALF = (64, 64, 4, 3), (64, 32, 2, 3), (32, 32, 1, 4)
# of `_scan_tile`: TILE and BLOCK_C, for 32 bits and for 16; tiles of a group, and levels of groups
FULL, PACKED, GROUP, LEVELS = (64, 32), (32, 64), 4, 3

ABSENT = tl.constexpr(-1)  # a word that nobody has written yet
NAN = tl.constexpr(0x7FC000007FC00000)  # a step of NaN, as arithmetic makes it
IDENTITY = tl.constexpr(0x3F80000000000000)  # the step h ↦ 1 · h + 0


class LinearScan(torch.autograd.Function):
    """h = LinearScan.apply(a, b, h0, reverse): all states, in the dtype of b.

    a, b: (batch, length, channels), contiguous, of float16, bfloat16 or float32; h0: (batch,
    channels), the state before the first token, or after the last if reversed. The state is float32
    inside.
    """

    @staticmethod
    def forward(ctx, a, b, h0, reverse):
        h, _ = _run(a, b, h0, None, reverse)
        ctx.save_for_backward(a, h, h0)
        ctx.reverse = reverse
        return h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        a, h, h0 = ctx.saved_tensors
        g, da = _run(a, gradient.contiguous(), h0, h, not ctx.reverse)
        first = -1 if ctx.reverse else 0
        dh0 = a[:, first].float() * g[:, first].float()
        return da, g.to(h.dtype), dh0.to(h0.dtype), None


def _run(a: Tensor, b: Tensor, h0: Tensor, h: Tensor | None, reverse: bool):
    """Return the states; with the states h of another scan, the gradients (∂b, ∂a) of that scan."""
    batch, length, channels = b.shape
    out, da = torch.empty_like(b), None if h is None else torch.empty_like(a)
    size, narrow = multiprocessors(b), batch * triton.cdiv(channels, NARROW[1])
    if 2 * narrow < 3 * size:
        _run_tiles(a, b, h0, h, out, da, reverse)
        return out, da
    tile, block, warps, stages = _shape(b)
    with on(b):
        _scan[(batch * triton.cdiv(channels, block),)](
            a, b, h0, h, out, da, length, channels,
            TILE=tile, BLOCK_C=block, STAGES=stages, REVERSE=reverse, num_warps=warps,
        )  # fmt: skip
    return out, da


def _run_tiles(a, b, h0, h, out, da, reverse: bool) -> None:
    batch, length, channels = b.shape
    tile, block = FULL if b.dtype == torch.float32 else PACKED
    tiles, rows = triton.cdiv(length, tile), batch * triton.cdiv(channels, block)
    slots = sum(triton.cdiv(tiles, GROUP**level) for level in range(LEVELS + 1))
    words = torch.full((batch, slots, channels), -1, dtype=torch.int64, device=b.device)
    with on(b):
        _scan_tile[(tiles * rows,)](
            a, b, h0, h, out, da, words, length, tiles, rows, slots, CHANNELS=channels,
            TILE=tile, BLOCK_C=block, GROUP=GROUP, LEVELS=LEVELS, REVERSE=reverse, num_warps=1,
        )  # fmt: skip


def _shape(b: Tensor) -> tuple[int, int, int, int]:
    """Return the shape with which the last round of programs leaves the fewest places empty."""
    batch, _, channels = b.shape
    size = multiprocessors(b)

    def filled(shape: tuple[int, ...]) -> float:
        programs = batch * triton.cdiv(channels, shape[1])
        return programs / (triton.cdiv(programs, size) * size)

    return max((WIDE, NARROW), key=filled) if b.dtype == torch.float32 else HALF


@triton.jit
def _join(a1, b1, a2, b2):
    """(a₁, b₁) ⊕ (a₂, b₂), the earlier on the left."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _last(tile):
    """Return the last row of a tile."""
    here = (tl.arange(0, tile.shape[0]) == tile.shape[0] - 1)[:, None]
    return tl.sum(tl.where(here, tile, 0.0), axis=0, keep_dims=True)


@triton.jit
def _scan(
    a_ptr, b_ptr, h0_ptr, h_ptr, out_ptr, da_ptr, length, channels,
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
        a, b = tl.associative_scan((a, b), 0, _join)
        states = a * h + b
        h = _last(states)
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


@triton.jit
def _publish(word_ptr, product, end, real):
    """Write a step as one word of 64 bits: whoever sees it sees all of it."""
    high, low = product.to(tl.int32, bitcast=True), end.to(tl.int32, bitcast=True)
    word = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    word = tl.where(word == ABSENT, NAN, word)
    tl.atomic_xchg(word_ptr, word, real, sem="relaxed")


@triton.jit
def _look(words_ptr, wanted):
    return tl.load(words_ptr, wanted, IDENTITY, volatile=True)


@triton.jit
def _await(words, words_ptr, wanted):
    """Return the steps in the words, once all that are wanted are there."""
    while tl.max((words == ABSENT).to(tl.int32)) > 0:
        words = _look(words_ptr, wanted)
    product = (words >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return product, words.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _scan_tile(
    a_ptr, b_ptr, h0_ptr, h_ptr, out_ptr, da_ptr, words_ptr, length, tiles, rows, slots,
    CHANNELS: tl.constexpr, TILE: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr,
    LEVELS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """As `_scan`, but a program is one warp with one tile, every thread with all of its tokens.

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
    products, ends = tl.associative_scan((a.to(tl.float32), b.to(tl.float32)), 0, _join)
    words_ptr += batch * slots * CHANNELS + c
    own, own_end = _last(products), _last(ends)
    h = _look_back(words_ptr, own, own_end, h0, tile, tiles, real, CHANNELS, BLOCK_C, GROUP, LEVELS)
    # Once more through the tile, from the right state. This costs less than keeping the products.
    a, b = a.to(tl.float32), b.to(tl.float32)
    _, states = tl.associative_scan((a, tl.where(t == 0, a * h + b, b)), 0, _join)
    tl.store(out_ptr + token + at, states.to(out_ptr.dtype.element_ty), inside)
    if GRADIENT:
        da = (states * given).to(da_ptr.dtype.element_ty)
        tl.store(da_ptr + token + at, da, inside)


@triton.jit
def _look_back(
    words_ptr, own, own_end, h0, tile, tiles, real, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Return the state before the tile, whose own step is (own, own_end), and publish that step.

    The words lie in LEVELS + 1 lists: steps of tiles, of groups, of groups of groups, …, and last
    the states after the largest groups.
    """
    _publish(words_ptr + tile * CHANNELS, own, own_end, real)
    # All first looks are under way before one is waited for.
    looks = ()
    list_ptr, index, count = words_ptr, tile, tiles
    k = tl.arange(0, GROUP)[:, None]
    for _ in tl.static_range(LEVELS):
        place = index % GROUP  # in its group: so many steps before it
        ptr = list_ptr + tl.multiple_of((index - place + k) * CHANNELS, [1, 1])
        wanted = (k < place) & real
        looks = looks + ((ptr, wanted, _look(ptr, wanted)),)
        list_ptr += count * CHANNELS
        index, count = index // GROUP, tl.cdiv(count, GROUP)
    state_ptr, wanted = list_ptr + (index - 1) * CHANNELS, (index > 0) & real
    state = _look(state_ptr, wanted)

    before = tl.full([1, BLOCK_C], 1.0, tl.float32)
    before_end = tl.zeros([1, BLOCK_C], tl.float32)
    list_ptr, index, count = words_ptr, tile, tiles
    for level in tl.static_range(LEVELS):
        p, e = _await(looks[level][2], looks[level][0], looks[level][1])
        p, e = tl.associative_scan((p, e), 0, _join)
        before, before_end = _join(_last(p), _last(e), before, before_end)
        list_ptr += count * CHANNELS
        index, count = index // GROUP, tl.cdiv(count, GROUP)
        if level < LEVELS - 1:
            if (tile + 1) % GROUP ** (level + 1) == 0:  # the last of its group
                group, group_end = _join(before, before_end, own, own_end)
                _publish(list_ptr + index * CHANNELS, group, group_end, real)
    _, state = _await(state, state_ptr, wanted)
    h = before * tl.where(index > 0, state, h0) + before_end
    if (tile + 1) % GROUP**LEVELS == 0:
        _publish(list_ptr + index * CHANNELS, 0 * own, own * h + own_end, real)
    return h
