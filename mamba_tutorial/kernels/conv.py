"""A short causal convolution of every channel, with silu, on a GPU in Triton; channels last.

    y_t = silu(bias + Σ_k weight_k x_{t − width + 1 + k})

PyTorch's convolutions want the length last, so in a Mamba block they cost two transpositions and
more memory traffic than the scan. Here a program takes a block [BLOCK_T, BLOCK_C] of tokens and
channels and reads it `width` times, shifted; all but one of these reads find the numbers in the
cache. The backward pass computes what goes into silu once more. The weights' gradients are summed
over the tokens of a program and added up afterwards, so that two runs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_tutorial.kernels._gates import sigmoid
from mamba_tutorial.kernels._launch import on

BLOCK_T = 16
BLOCK_C = 64
TOKENS = 256  # of a program of the backward pass


class CausalConv(torch.autograd.Function):
    """y = CausalConv.apply(x, before, weight, bias), with silu.

    x: (batch, length, channels), of float16, bfloat16 or float32; before: (batch, width − 1,
    channels), the tokens before the first; weight: (channels, width); bias: (channels,) or None.
    There is no gradient for `before`.
    """

    @staticmethod
    def forward(ctx, x, before, weight, bias):
        x = x if x.stride(-1) == 1 else x.contiguous()
        before, weight = before.contiguous(), weight.contiguous()
        batch, length, channels = x.shape
        y = x.new_empty(x.shape)
        grid = triton.cdiv(length, BLOCK_T), triton.cdiv(channels, BLOCK_C), batch
        with on(x):
            _forward[grid](
                x, before, weight, bias, y, length, channels, *x.stride()[:2],
                WIDTH=weight.shape[1], BLOCK_T=BLOCK_T, BLOCK_C=BLOCK_C, num_warps=4,
            )  # fmt: skip
        ctx.save_for_backward(x, before, weight, bias)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, before, weight, bias = ctx.saved_tensors
        batch, length, channels = x.shape
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        parts, width = triton.cdiv(length, TOKENS), weight.shape[1]
        dx = x.new_empty(x.shape)
        sums = x.new_empty(batch * parts, width + 1, channels, dtype=torch.float32)
        with on(x):
            _backward[(parts, triton.cdiv(channels, BLOCK_C), batch)](
                x, before, weight, bias, dy, dx, sums, length, channels,
                *x.stride()[:2], *dy.stride()[:2],
                WIDTH=width, TOKENS=TOKENS, BLOCK_T=BLOCK_T, BLOCK_C=BLOCK_C, num_warps=4,
            )  # fmt: skip
        sums = sums.sum(0)
        dbias = None if bias is None else sums[width].to(bias.dtype)
        return dx, None, sums[:width].T.to(weight.dtype), dbias


def causal_conv(x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply `CausalConv`."""
    return CausalConv.apply(x, before, weight, bias)


@triton.jit
def _token(x_ptr, before_ptr, row, c, inside, channels, x_row, WIDTH: tl.constexpr):
    """X at a row; rows below 0 are the tokens before the first."""
    x = tl.load(x_ptr + row.to(tl.int64) * x_row + c, inside & (row >= 0), 0.0).to(tl.float32)
    early = inside & (row < 0)
    return x + tl.load(before_ptr + (row + WIDTH - 1) * channels + c, early, 0.0).to(tl.float32)


@triton.jit
def _sum(
    x_ptr, before_ptr, weight_ptr, bias_ptr, row, c, inside, real, channels, x_row,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """What goes into silu at a row."""
    total = tl.load(bias_ptr + c, real, 0.0).to(tl.float32) if bias_ptr is not None else 0.0
    for k in tl.static_range(WIDTH):
        weight = tl.load(weight_ptr + c * WIDTH + k, real, 0.0).to(tl.float32)
        earlier = row - (WIDTH - 1 - k)
        total += weight * _token(x_ptr, before_ptr, earlier, c, inside, channels, x_row, WIDTH)
    return total


@triton.jit
def _forward(
    x_ptr, before_ptr, weight_ptr, bias_ptr, y_ptr, length, channels, x_batch, x_row,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    real = c < channels
    inside = (row < length) & real
    x_ptr += batch * x_batch
    before_ptr += batch * (WIDTH - 1) * channels
    total = _sum(
        x_ptr, before_ptr, weight_ptr, bias_ptr, row, c, inside, real, channels, x_row, WIDTH
    )
    y = total * sigmoid(total)
    at = (batch * length + row) * channels + c
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def _backward(
    x_ptr, before_ptr, weight_ptr, bias_ptr, dy_ptr, dx_ptr, sums_ptr, length, channels,
    x_batch, x_row, dy_batch, dy_row,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    t, c = tl.arange(0, BLOCK_T)[:, None], tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    k, c = tl.arange(0, 8)[:, None], c[None, :]
    real = c < channels
    x_ptr += batch * x_batch
    dy_ptr += batch * dy_batch
    before_ptr += batch * (WIDTH - 1) * channels
    sums = tl.zeros([8, BLOCK_C], tl.float32)  # of the weights, then of the bias
    first = tl.program_id(0) * TOKENS
    for start in range(first, tl.minimum(first + TOKENS, length), BLOCK_T):
        row = start + t
        dx = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for shift in tl.static_range(WIDTH):
            # y at this row takes x at `row` with weight WIDTH − 1 − shift
            later = row + shift
            inside = (later < length) & real
            total = _sum(
                x_ptr, before_ptr, weight_ptr, bias_ptr, later, c, inside, real, channels, x_row,
                WIDTH,
            )  # fmt: skip
            s = sigmoid(total)
            dy = tl.load(dy_ptr + later.to(tl.int64) * dy_row + c, inside, 0.0).to(tl.float32)
            upstream = dy * s * (1 + total * (1 - s))
            weight = tl.load(weight_ptr + c * WIDTH + WIDTH - 1 - shift, real, 0.0)
            dx += weight.to(tl.float32) * upstream
            if shift == 0:
                here = tl.where(k == WIDTH, tl.sum(upstream, axis=0, keep_dims=True), 0.0)
                for j in tl.static_range(WIDTH):
                    earlier = row - (WIDTH - 1 - j)
                    x = _token(x_ptr, before_ptr, earlier, c, inside, channels, x_row, WIDTH)
                    here += tl.where(k == j, tl.sum(upstream * x, axis=0, keep_dims=True), 0.0)
                sums += here
        inside = (row < length) & real
        at = (batch * length + row) * channels + c
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), inside)
    part = batch * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums_ptr + (part * (WIDTH + 1) + k) * channels + c, sums, (k <= WIDTH) & real)
