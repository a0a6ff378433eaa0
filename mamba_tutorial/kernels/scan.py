"""The first-order recurrence h_t = a_t h_{t−1} + b_t on a GPU in Triton, forward and backward.

Nothing is computed here that costs time: a multiplication and an addition for three numbers that
travel from or to memory. So the one aim is to keep memory busy.

A program takes a block of channels and goes along the length in tiles [TILE, BLOCK_C], the next of
which are on their way through shared memory while one is scanned. `tl.associative_scan` scans a
tile of steps (a, b): over the tokens that one thread holds, one after the other; over the lanes of
a warp, by exchanging registers; over the warps, through shared memory. The states are then what the
tile does to the state before it, and the last of them is carried to the next tile.

With few channels there are few programs, and memory idles. Then the length is cut into chunks, and
a first pass finds what each chunk is as one step h ↦ product · h + end. Every program joins the
steps of the chunks before its own. That pass reads a and b once more: 5 numbers travel, not 3, so
three fifths of the bandwidth are the most that is to be had.

The backward pass is the recurrence in reverse, with the decays shifted by one token:

    g_t = ∂_t + a_{t+1} g_{t+1},    ∂b_t = g_t,    ∂a_t = g_t h_{t−1}
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_tutorial.kernels._launch import multiprocessors, on

# TILE, BLOCK_C, warps and tiles on their way or in use, by measurement on an H200
WIDE, NARROW, HALF = (64, 64, 4, 3), (64, 32, 2, 3), (32, 32, 1, 4)


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
    config, chunk = _config(b)
    blocks, chunks = triton.cdiv(channels, config["BLOCK_C"]), triton.cdiv(length, chunk)
    config["REVERSE"] = reverse
    out, da = torch.empty_like(b), None if h is None else torch.empty_like(a)
    products = ends = None
    with on(b):
        if chunks > 1:
            products, ends = b.new_empty(2, batch, chunks, channels, dtype=torch.float32)
            _chunks[(batch * chunks * blocks,)](
                a, b, products, ends, length, chunk, channels, SHIFTED=h is not None, **config
            )
        _scan[(batch * chunks * blocks,)](
            a, b, h0, products, ends, h, out, da, length, chunk, channels, **config
        )
    return out, da


def _config(b: Tensor) -> tuple[dict, int]:
    """Return the constants of the kernels, and the tokens of a program.

    Of the shapes, that which leaves the fewest multiprocessors idle in the last round of programs.
    If there is hardly one program for each, the length is cut until there are four.
    """
    batch, length, channels = b.shape
    size = multiprocessors(b)

    def programs(shape: tuple[int, ...]) -> int:
        return batch * triton.cdiv(channels, shape[1])

    def filled(shape: tuple[int, ...]) -> float:
        return programs(shape) / (triton.cdiv(programs(shape), size) * size)

    shape = max((WIDE, NARROW), key=filled) if b.dtype == torch.float32 else HALF
    parts = 1
    if 2 * programs(NARROW) < 3 * size:
        shape, parts = NARROW, max(1, 4 * size // programs(NARROW))
    tile, block, warps, stages = shape
    chunk = triton.cdiv(triton.cdiv(length, parts), tile) * tile
    return {"TILE": tile, "BLOCK_C": block, "STAGES": stages, "num_warps": warps}, chunk


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
def _place(length, chunk, channels, BLOCK_C: tl.constexpr):
    """Return the sequence, the chunk and the channels of this program."""
    blocks, chunks = tl.cdiv(channels, BLOCK_C), tl.cdiv(length, chunk)
    program = tl.program_id(0)
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return (program // blocks // chunks).to(tl.int64), program // blocks % chunks, c


@triton.jit
def _chunks(
    a_ptr, b_ptr, products_ptr, ends_ptr, length, chunk, channels,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
    REVERSE: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Each chunk as one step h ↦ product · h + end."""
    batch, part, c = _place(length, chunk, channels, BLOCK_C)
    real, t = c < channels, tl.arange(0, TILE)[:, None]
    first, tokens = part.to(tl.int64) * chunk, tl.minimum(length - part * chunk, chunk)
    # Pointers move from tile to tile; where the numbers lie from there never changes.
    SIGN: tl.constexpr = -1 if REVERSE else 1
    row = batch * length + (length - 1 - first if REVERSE else first)
    a_ptr += (row - SIGN * SHIFTED) * channels
    b_ptr += row * channels
    at = SIGN * t * channels + c
    product = tl.full([1, BLOCK_C], 1.0, tl.float32)
    h = tl.zeros([1, BLOCK_C], tl.float32)
    for start in tl.range(0, tokens, TILE, num_stages=STAGES):
        inside = (start + t < tokens) & real
        known = inside & ((start + t > 0) | (part > 0)) if SHIFTED else inside
        a = tl.load(a_ptr + at, known, 1.0).to(tl.float32)
        b = tl.load(b_ptr + at, inside, 0.0).to(tl.float32)
        a, b = tl.associative_scan((a, b), 0, _join)
        h = _last(a) * h + _last(b)
        product *= _last(a)
        a_ptr += SIGN * TILE * channels
        b_ptr += SIGN * TILE * channels
    slot = (batch * tl.cdiv(length, chunk) + part) * channels
    tl.store(products_ptr + slot + c, product, real)
    tl.store(ends_ptr + slot + c, h, real)


@triton.jit
def _scan(
    a_ptr, b_ptr, h0_ptr, products_ptr, ends_ptr, h_ptr, out_ptr, da_ptr, length, chunk, channels,
    TILE: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The states; or, given those of the scan in the other direction, the gradients of that scan.

    Then b is the gradient that arrives, out is ∂b, and the decay of a token is that of the token
    before it in the order of this scan, whose first state is b alone.
    """
    GRADIENT: tl.constexpr = h_ptr is not None
    batch, part, c = _place(length, chunk, channels, BLOCK_C)
    real, t = c < channels, tl.arange(0, TILE)[:, None]
    h0 = tl.load(h0_ptr + batch * channels + c, real, 0.0).to(tl.float32)
    h = tl.zeros([1, BLOCK_C], tl.float32) if GRADIENT else h0
    if products_ptr is not None:
        for earlier in range(part):
            slot = (batch * tl.cdiv(length, chunk) + earlier) * channels + c
            h = tl.load(products_ptr + slot, real, 1.0) * h + tl.load(ends_ptr + slot, real, 0.0)
    first, tokens = part.to(tl.int64) * chunk, tl.minimum(length - part * chunk, chunk)
    SIGN: tl.constexpr = -1 if REVERSE else 1
    row = batch * length + (length - 1 - first if REVERSE else first)
    a_ptr += (row - SIGN * GRADIENT) * channels
    b_ptr += row * channels
    out_ptr += row * channels
    at = SIGN * t * channels + c
    if GRADIENT:
        h_ptr += (row + SIGN) * channels
        da_ptr += row * channels
    for start in tl.range(0, tokens, TILE, num_stages=STAGES):
        inside = (start + t < tokens) & real
        known = inside & ((start + t > 0) | (part > 0)) if GRADIENT else inside
        a = tl.load(a_ptr + at, known, 1.0).to(tl.float32)
        b = tl.load(b_ptr + at, inside, 0.0).to(tl.float32)
        a, b = tl.associative_scan((a, b), 0, _join)
        states = a * h + b
        h = _last(states)
        tl.store(out_ptr + at, states.to(out_ptr.dtype.element_ty), inside)
        if GRADIENT:
            # the state from which the token's own step started: the next in this order, or h0
            more = part * chunk + start + t < length - 1
            given = tl.load(h_ptr + at, inside & more, 0.0)
            da = states * tl.where(more, given.to(tl.float32), h0)
            tl.store(da_ptr + at, da.to(da_ptr.dtype.element_ty), inside)
            h_ptr += SIGN * TILE * channels
            da_ptr += SIGN * TILE * channels
        a_ptr += SIGN * TILE * channels
        b_ptr += SIGN * TILE * channels
        out_ptr += SIGN * TILE * channels
