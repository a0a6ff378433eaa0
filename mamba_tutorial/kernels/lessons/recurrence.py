"""The recurrence h_t = a_t h_{t−1} + b_t, from one step to a row of any length."""

import torch
from torch import Tensor

from mamba_tutorial.kernels._launch import on
from mamba_tutorial.kernels._triton import tl, triton


def step(a: Tensor, h: Tensor, b: Tensor, block: int = 128) -> Tensor:
    """Return a h + b, elementwise."""
    out = torch.empty_like(h)
    with on(h):
        _step[(triton.cdiv(h.numel(), block),)](a, h, b, out, h.numel(), BLOCK=block)
    return out


def scan_block(a: Tensor, b: Tensor) -> Tensor:
    """Return all states of h_t = a_t h_{t−1} + b_t for rows of 2ᵏ tokens."""
    out = torch.empty_like(b)
    with on(b):
        _scan_block[(len(b),)](a, b, out, LENGTH=b.shape[1])
    return out


def scan_row(a: Tensor, b: Tensor, block: int = 64) -> Tensor:
    """Return the same for rows of any length: block after block, with the state carried on."""
    out = torch.empty_like(b)
    with on(b):
        _scan_row[(len(b),)](a, b, out, b.shape[1], BLOCK=block)
    return out


@triton.jit
def _step(a_ptr, h_ptr, b_ptr, out_ptr, size, BLOCK: tl.constexpr):
    # the places of this program
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    a = tl.load(a_ptr + i, inside)
    h = tl.load(h_ptr + i, inside)
    b = tl.load(b_ptr + i, inside)
    tl.store(out_ptr + i, a * h + b, inside)


@triton.jit
def _join(a1, b1, a2, b2):
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _scan_block(a_ptr, b_ptr, out_ptr, LENGTH: tl.constexpr):
    i = tl.program_id(0) * LENGTH + tl.arange(0, LENGTH)
    steps = tl.load(a_ptr + i), tl.load(b_ptr + i)
    _, h = tl.associative_scan(steps, 0, _join)
    tl.store(out_ptr + i, h)


@triton.jit
def _scan_row(a_ptr, b_ptr, out_ptr, length, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * length
    i = tl.arange(0, BLOCK)
    carry = 0.0
    for start in range(0, length, BLOCK):
        inside = start + i < length
        # beyond the end: (1, 0), which does nothing
        a = tl.load(a_ptr + row + start + i, inside, 1.0)
        b = tl.load(b_ptr + row + start + i, inside, 0.0)
        product, h = tl.associative_scan((a, b), 0, _join)
        h += product * carry
        tl.store(out_ptr + row + start + i, h, inside)
        carry = tl.sum(tl.where(i == BLOCK - 1, h, 0.0))
