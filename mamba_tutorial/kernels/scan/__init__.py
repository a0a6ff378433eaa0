"""The first-order recurrence h_t = a_t h_{t−1} + b_t on a GPU, forward and backward.

Nothing is computed here that costs time: a multiplication and an addition for three numbers that
travel from or to memory. So the one aim is to keep memory busy.

- `in_triton`: a program for a block of channels, tile after tile along the length; or, where there
  are few channels, a program for every tile, which finds its state by looking back (`look_back`).
- `in_gluon`: both, faster, on Ampere and later, where rows start at multiples of 16 bytes.

The backward pass is the recurrence in reverse, with the decays shifted by one token:

    γ_t = ∂_t + a_{t+1} γ_{t+1},    ∂b_t = γ_t,    ∂a_t = γ_t h_{t−1}
"""

import torch
from torch import Tensor

from mamba_tutorial.kernels._gluon import runs_on
from mamba_tutorial.kernels._launch import multiprocessors, on
from mamba_tutorial.kernels._triton import triton
from mamba_tutorial.kernels.scan import in_gluon, in_triton

# For numbers of 4 bytes and of 2, by measurement: staged on an H100, the others on an H200.
ROWS = {4: (64, 32, 2, 3), 2: (32, 32, 1, 4)}  # of `scan`: TILE, BLOCK_C, warps, STAGES
TILES = {4: (64, 32), 2: (32, 64)}  # of `scan_tile`: TILE, BLOCK_C
STAGED_ROWS = {4: (16, 1, 2, 4), 2: (16, 2, 2, 6)}  # TILE, WIDTH, warps, STAGES
STAGED_TILE = 128, 32  # of `in_gluon.scan_tile`, for numbers of 4 bytes and of 2
GROUP, LEVELS = 4, 3  # tiles of a group, and levels of groups


def states(a: Tensor, b: Tensor, h0: Tensor, reverse: bool) -> Tensor:
    """Return all states, in the dtype of b.

    a, b: (batch, length, channels), contiguous, of float16, bfloat16 or float32; h0: (batch,
    channels), the state before the first token, or after the last if reversed. The state is float32
    inside.
    """
    return _run(a, b, h0, None, reverse)[0]


def gradients(
    d: Tensor, a: Tensor, h: Tensor, h0: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a, b and h0 from those of the states h, d; shaped like these."""
    g, da = _run(a, d, h0, h, not reverse)
    first = -1 if reverse else 0
    return da, g, (a[:, first].float() * g[:, first].float()).to(h0.dtype)


def _run(a: Tensor, b: Tensor, h0: Tensor, h: Tensor | None, reverse: bool):
    """Return the states; with the states h of another scan, the gradients (∂b, ∂a) of that scan."""
    batch, _, channels = b.shape
    out, da = torch.empty_like(b), None if h is None else torch.empty_like(a)
    blocks = batch * triton.cdiv(channels, TILES[b.element_size()][1])
    run = _run_tiles if 2 * blocks < 3 * multiprocessors(b) else _run_rows
    with on(b):
        overflow = run(a, b, h0, h, out, da, reverse)
        if overflow is not None:
            in_triton.repair[(batch * triton.cdiv(channels, 32),)](
                a, b, h0, h, out, da, overflow, *b.shape[1:], REVERSE=reverse, num_warps=1
            )
    return out, da


def _run_rows(a, b, h0, h, out, da, reverse: bool) -> Tensor | None:
    batch, length, channels = b.shape
    given = a, b, h0, h, out, da, length, channels
    if runs_on(a, b, h):
        tile, width, warps, stages = STAGED_ROWS[b.element_size()]
        in_gluon.scan[(batch * triton.cdiv(channels, 32 * width * warps),)](
            *given, WIDTH=width, TILE=tile, STAGES=stages, REVERSE=reverse, num_warps=warps
        )
        return None  # step by step, as the definition: nothing to repair
    tile, block, warps, stages = ROWS[b.element_size()]
    overflow = torch.zeros(1, dtype=torch.int64, device=b.device)
    in_triton.scan[(batch * triton.cdiv(channels, block),)](
        *given, overflow, TILE=tile, BLOCK_C=block, STAGES=stages, REVERSE=reverse, num_warps=warps
    )
    return overflow


def _run_tiles(a, b, h0, h, out, da, reverse: bool) -> Tensor:
    batch, length, channels = b.shape
    in_stages = runs_on(a, b, h)
    tile, block = STAGED_TILE if in_stages else TILES[b.element_size()]
    tiles = triton.cdiv(length, tile)
    slots = sum(triton.cdiv(tiles, GROUP**level) for level in range(LEVELS + 1))
    words = torch.zeros(batch * slots * channels + 1, dtype=torch.int64, device=b.device)
    overflow = words[-1:]
    rows = batch * triton.cdiv(channels, block)
    given = a, b, h0, h, out, da, words, overflow, length, tiles, rows, slots
    (in_gluon.scan_tile if in_stages else in_triton.scan_tile)[(tiles * rows,)](
        *given, CHANNELS=channels, TILE=tile, BLOCK_C=block, GROUP=GROUP, LEVELS=LEVELS,
        REVERSE=reverse, num_warps=1,
    )  # fmt: skip
    return overflow
