"""A short causal convolution of every channel, with silu, on a GPU in Triton; channels last.

    y_t = silu(bias + Σ_k weight_k x_{t − width + 1 + k})

PyTorch's convolutions want the length last, so in a Mamba block they cost two transpositions and
more time than the scan. Here a program takes a block [BLOCK_T, BLOCK_C] of tokens and channels and
reads it `width` times, shifted; all but one of these reads find the numbers in the cache.

The backward pass goes through memory twice. First the gradient of what enters silu is computed and
written, and the sums that make up the weights' gradients, one part for each program; the parts are
added up afterwards, so that two runs give the same bits. Then every token of x gathers from the
`width` tokens that it went into.

With `starts`, true where a new sequence begins, a token sees none before its own sequence.
"""

import torch
from torch import Tensor

from mamba_tutorial.kernels._gates import sigmoid
from mamba_tutorial.kernels._launch import on
from mamba_tutorial.kernels._triton import tl, triton

BLOCK_T, BLOCK_C = 32, 64
# Of a program that sums: one warp, whose threads hold all tokens of eight channels each, so that
# nothing has to be exchanged.
SUM_T, SUM_C, TOKENS = 4, 256, 128


def causal_conv(
    x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None
) -> Tensor:
    """Return silu of the convolution of every channel.

    x: (batch, length, channels), of float16, bfloat16 or float32; before: (batch, width − 1,
    channels), the tokens before the first; weight: (channels, width); bias: (channels,) or None;
    starts: (batch, length) or None.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    before, weight = before.contiguous(), weight.contiguous()
    batch, length, channels = x.shape
    y = x.new_empty(x.shape)
    grid = triton.cdiv(length, BLOCK_T), triton.cdiv(channels, BLOCK_C), batch
    with on(x):
        _convolve[grid](
            x, before, weight, bias, _marks(starts), y, length, channels, *x.stride()[:2],
            WIDTH=weight.shape[1], BLOCK_T=BLOCK_T, BLOCK_C=BLOCK_C, num_warps=4,
        )  # fmt: skip
    return y


def gradients(
    dy: Tensor,
    x: Tensor,
    before: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, and those of the weight and of the bias, (width + 1, channels).

    There is none for `before`.
    """
    batch, length, channels = x.shape
    x, dy = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x, dy))
    before, weight, starts = before.contiguous(), weight.contiguous(), _marks(starts)
    parts, width = triton.cdiv(length, TOKENS), weight.shape[1]
    upstream, dx = x.new_empty(x.shape), x.new_empty(x.shape)
    sums = x.new_empty(batch * parts, width + 1, channels, dtype=torch.float32)
    with on(x):
        _upstream[(parts, triton.cdiv(channels, SUM_C), batch)](
            x, before, weight, bias, starts, dy, upstream, sums, length, channels,
            *x.stride()[:2], *dy.stride()[:2],
            TOKENS=TOKENS, WIDTH=width, BLOCK_T=SUM_T, BLOCK_C=SUM_C, num_warps=1,
        )  # fmt: skip
        _gather[(triton.cdiv(length, BLOCK_T), triton.cdiv(channels, BLOCK_C), batch)](
            upstream, weight, starts, dx, length, channels,
            WIDTH=width, BLOCK_T=BLOCK_T, BLOCK_C=BLOCK_C, num_warps=4,
        )  # fmt: skip
    return dx, sums.sum(0)


def _marks(starts: Tensor | None) -> Tensor | None:
    return None if starts is None else starts.contiguous().view(torch.uint8)


@triton.jit
def _token(x_ptr, before_ptr, first, t, c, inside, channels, x_row, WIDTH: tl.constexpr):
    """X at the rows first + t; rows below 0 are the tokens before the first."""
    row = first + t
    at = first.to(tl.int64) * x_row + t * x_row + c
    x = tl.load(x_ptr + at, inside & (row >= 0), 0.0).to(tl.float32)
    if first < 0:
        kept = tl.load(before_ptr + (row + WIDTH - 1) * channels + c, inside & (row < 0), 0.0)
        x += kept.to(tl.float32)
    return x


@triton.jit
def _seen(starts_ptr, first, t, length, WIDTH: tl.constexpr):
    """Whether the rows first + t see the token k − (WIDTH − 1) places from them, for each k."""
    still, seen = first + t < length, ()
    for back in tl.static_range(WIDTH):
        seen = (still,) + seen
        row = first + t - back
        still &= tl.load(starts_ptr + row, (row >= 0) & (row < length), 0) == 0
    return seen


@triton.jit
def _sum(
    x_ptr, before_ptr, weight_ptr, bias_ptr, starts_ptr, first, t, c, inside, real, length,
    channels, x_row, WIDTH: tl.constexpr,
):  # fmt: skip
    """What goes into silu at the rows first + t, and the WIDTH tokens of x that it is made of."""
    if starts_ptr is not None:
        seen = _seen(starts_ptr, first, t, length, WIDTH)
    total = tl.zeros(inside.shape, tl.float32)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + c, real, 0.0).to(tl.float32)
    tokens = ()
    for k in tl.static_range(WIDTH):
        weight = tl.load(weight_ptr + c * WIDTH + k, real, 0.0).to(tl.float32)
        earlier = first - (WIDTH - 1 - k)
        x = _token(x_ptr, before_ptr, earlier, t, c, inside, channels, x_row, WIDTH)
        if starts_ptr is not None:
            x = tl.where(seen[k], x, 0.0)
        total += weight * x
        tokens = tokens + (x,)
    return total, tokens


@triton.jit
def _convolve(
    x_ptr, before_ptr, weight_ptr, bias_ptr, starts_ptr, y_ptr, length, channels, x_batch, x_row,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    first, t = tl.program_id(0) * BLOCK_T, tl.arange(0, BLOCK_T)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    real = c < channels
    inside = (first + t < length) & real
    x_ptr += batch * x_batch
    before_ptr += batch * (WIDTH - 1) * channels
    if starts_ptr is not None:
        starts_ptr += batch * length
    total, _ = _sum(
        x_ptr, before_ptr, weight_ptr, bias_ptr, starts_ptr, first, t, c, inside, real, length,
        channels, x_row, WIDTH,
    )  # fmt: skip
    y = total * sigmoid(total)
    at = (batch * length + first) * channels + t * channels + c
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _upstream(
    x_ptr, before_ptr, weight_ptr, bias_ptr, starts_ptr, dy_ptr, upstream_ptr, sums_ptr, length,
    channels, x_batch, x_row, dy_batch, dy_row,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of what enters silu, and its sums with x, for the weights, and alone."""
    batch = tl.program_id(2).to(tl.int64)
    t, k = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, 8)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    real = c < channels
    x_ptr += batch * x_batch
    dy_ptr += batch * dy_batch
    before_ptr += batch * (WIDTH - 1) * channels
    if starts_ptr is not None:
        starts_ptr += batch * length
    sums = tl.zeros([8, BLOCK_C], tl.float32)
    for step in range(TOKENS // BLOCK_T):
        first = tl.program_id(0) * TOKENS + step * BLOCK_T
        inside = (first + t < length) & real
        total, tokens = _sum(
            x_ptr, before_ptr, weight_ptr, bias_ptr, starts_ptr, first, t, c, inside, real, length,
            channels, x_row, WIDTH,
        )  # fmt: skip
        s = sigmoid(total)
        at = first.to(tl.int64) * dy_row + t * dy_row + c
        dy = tl.load(dy_ptr + at, inside, 0.0).to(tl.float32)
        upstream = dy * s * (1 + total * (1 - s))
        at = (batch * length + first) * channels + t * channels + c
        tl.store(upstream_ptr + at, upstream.to(upstream_ptr.dtype.element_ty), inside)
        sums += tl.where(k == WIDTH, tl.sum(upstream, axis=0, keep_dims=True), 0.0)
        for j in tl.static_range(WIDTH):
            sums += tl.where(k == j, tl.sum(upstream * tokens[j], axis=0, keep_dims=True), 0.0)
    part = batch * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums_ptr + (part * (WIDTH + 1) + k) * channels + c, sums, (k <= WIDTH) & real)


@triton.jit
def _gather(
    upstream_ptr, weight_ptr, starts_ptr, dx_ptr, length, channels,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradient of x: the token went into itself and the WIDTH − 1 tokens after it."""
    batch = tl.program_id(2).to(tl.int64)
    first, t = tl.program_id(0) * BLOCK_T, tl.arange(0, BLOCK_T)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    real = c < channels
    at = (batch * length + first) * channels + t * channels + c
    dx = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    sees = first + t < length
    for shift in tl.static_range(WIDTH):
        weight = tl.load(weight_ptr + c * WIDTH + WIDTH - 1 - shift, real, 0.0).to(tl.float32)
        row = first + t + shift
        if starts_ptr is not None and shift > 0:
            sees &= tl.load(starts_ptr + batch * length + row, row < length, 0) == 0
        inside = sees & (row < length) & real
        later = tl.load(upstream_ptr + at + shift * channels, inside, 0.0).to(tl.float32)
        dx += weight * later
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), (first + t < length) & real)
