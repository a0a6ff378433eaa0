"""One token at a time on a GPU in Triton: the step of the convolution and the step of the scan.

To decode is to move memory. A step of the scan reads and writes the state, 128 bytes for each
channel with 16 states, and computes almost nothing; a step of the convolution does the same with
its last tokens. So each is one kernel that touches its state once. Between them lies the projection
that gives Δ, B and C, a matrix product over all channels, so the two cannot be one.

A program takes a block of channels of a sequence, [BLOCK_D, BLOCK_N]. Triton gives each thread four
neighbouring states, which it moves as one access of 16 bytes; the sum over the states is then an
exchange among the four threads of a channel.

At small batches most of the time goes into starting a kernel and into its last programs. A Hopper
GPU can start a kernel while the one before it ends, if the kernel waits for that end by itself.
"""

import torch
from torch import Tensor

from mamba_tutorial.kernels._gates import LOG2E, sigmoid, softplus
from mamba_tutorial.kernels._launch import early, on
from mamba_tutorial.kernels._triton import gdc_launch_dependents, gdc_wait, tl, triton

BLOCK_D = 128


def selective_step(
    h: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y and the state after the token, as `mamba_tutorial.selective.selective_step`.

    The step goes through the softplus.
    h: (batch, d_inner, d_state), float32; x, dt, z: (batch, d_inner); A: (d_inner, d_state); B, C:
    (batch, d_state); D, dt_bias: (d_inner,). No gradients.
    """
    batch, d_inner, d_state = h.shape
    h, x, dt, A, B, C, D, z, dt_bias = (
        tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()
        for tensor in (h.contiguous(), x, dt, A.contiguous(), B, C, D, z, dt_bias)
    )
    y, after = x.new_empty(x.shape), torch.empty_like(h)
    rows = (tensor.stride(0) if tensor is not None else 0 for tensor in (x, dt, B, C, z))
    with on(h):
        _step[(triton.cdiv(d_inner, BLOCK_D), batch)](
            h, x, dt, A, B, C, D, z, dt_bias, y, after, d_inner, d_state, *rows,
            BLOCK_D=BLOCK_D, BLOCK_N=triton.next_power_of_2(d_state),
            num_warps=4, **early(h),
        )  # fmt: skip
    return y, after


def conv_step(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return silu of the causal convolution at the next token, and the tokens to keep.

    x: (batch, channels); state: (batch, width − 1, channels), the tokens before; weight: (channels,
    width), the last column for the token itself; bias: (channels,). No gradients.
    """
    batch, channels = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    state, weight = state.contiguous(), weight.contiguous()
    y, after = x.new_empty(x.shape), x.new_empty(state.shape)
    width, block = weight.shape[1], 128
    with on(x):
        _conv_step[(triton.cdiv(channels, block), batch)](
            x, state, weight, bias, y, after, channels, x.stride(0),
            WIDTH=width, BLOCK=block, num_warps=1, **early(x),
        )  # fmt: skip
    return y, after


@triton.jit
def _step(
    h_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, y_ptr, after_ptr,
    d_inner, d_state, x_row, dt_row, B_row, C_row, z_row,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    batch = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    real, states = d < d_inner, n < d_state
    square = real[:, None] & states[None, :]
    at = d[:, None] * d_state + n[None, :]  # [BLOCK_D, BLOCK_N]
    h = tl.load(h_ptr + batch * d_inner * d_state + at, square, 0.0)
    A = tl.load(A_ptr + at, square, 0.0).to(tl.float32)
    x = tl.load(x_ptr + batch * x_row + d, real, 0.0).to(tl.float32)
    step = tl.load(dt_ptr + batch * dt_row + d, real, 0.0).to(tl.float32)
    B = tl.load(B_ptr + batch * B_row + n, states, 0.0).to(tl.float32)
    C = tl.load(C_ptr + batch * C_row + n, states, 0.0).to(tl.float32)
    if bias_ptr is not None:
        step += tl.load(bias_ptr + d, real, 0.0).to(tl.float32)
    step = softplus(step)
    h = tl.exp2(step[:, None] * (A * LOG2E)) * h + (step * x)[:, None] * B[None, :]
    tl.store(after_ptr + batch * d_inner * d_state + at, h, square)
    y = tl.sum(h * C[None, :], axis=1)
    if D_ptr is not None:
        y += tl.load(D_ptr + d, real, 0.0).to(tl.float32) * x
    if z_ptr is not None:
        z = tl.load(z_ptr + batch * z_row + d, real, 0.0).to(tl.float32)
        y *= z * sigmoid(z)
    tl.store(y_ptr + batch * d_inner + d, y.to(y_ptr.dtype.element_ty), real)


@triton.jit
def _conv_step(
    x_ptr, state_ptr, weight_ptr, bias_ptr, y_ptr, after_ptr, channels, x_row,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    batch = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = c < channels
    x = tl.load(x_ptr + batch * x_row + c, real, 0.0)
    total = x.to(tl.float32) * tl.load(weight_ptr + c * WIDTH + WIDTH - 1, real, 0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + c, real, 0.0)
    before = batch * (WIDTH - 1) * channels + c
    for k in tl.static_range(WIDTH - 1):
        value = tl.load(state_ptr + before + k * channels, real, 0.0).to(tl.float32)
        total += value * tl.load(weight_ptr + c * WIDTH + k, real, 0.0)
        if k > 0:
            kept = value.to(after_ptr.dtype.element_ty)
            tl.store(after_ptr + before + (k - 1) * channels, kept, real)
    if WIDTH > 1:
        tl.store(after_ptr + before + (WIDTH - 2) * channels, x, real)
    y = total * sigmoid(total)
    tl.store(y_ptr + batch * channels + c, y.to(y_ptr.dtype.element_ty), real)
