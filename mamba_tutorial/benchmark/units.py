"""What one multiprocessor does in a clock, as `counts.GPU` has it: measured, not looked up."""

import importlib
from collections.abc import Iterator

import torch

from mamba_tutorial.benchmark.measuring import Row, attempt

KERNELS = "mamba_tutorial.benchmark.units_in_gluon"
WARPS = 16  # four for each scheduler
STEPS = {"exponentials": 4096, "reads": 1024}
FIXED = 0.6411857445  # x = 2^(−x)


def units() -> Iterator[Row]:
    """Exponentials, and numbers of 4 bytes from shared memory, in a clock of a multiprocessor.

    Exponentials in float32 and, two by two in a register, in float16. Numbers in pieces of 4, 8 and
    16 bytes; shared: whether all lanes of a warp read the same piece, or each its own. A number
    counts for each lane that gets it.
    """
    for size in (4, 2):
        row = {"what": "exponentials", "bytes": size}
        yield attempt(row, lambda size=size: _exponentials(size))
    for size in (4, 8, 16):
        for shared in (False, True):
            row = {"what": "numbers from shared memory", "bytes": size, "shared": shared}
            yield attempt(row, lambda size=size, shared=shared: _reads(size // 4, shared))


def _exponentials(size: int) -> Row:
    found, clocks = _run("exponentials", PAIRS=size == 2)
    _check(found, FIXED, 1e-6 if size == 4 else 2e-3)
    return {"per_clock": WARPS * 32 * 4 * (4 // size) * STEPS["exponentials"] / clocks}


def _reads(piece: int, shared: bool) -> Row:
    pieces = importlib.import_module(KERNELS).AT_ONCE.value * STEPS["reads"]
    found, clocks = _run("reads", PIECE=piece, SHARED=shared)
    _check(found, piece * (1 if shared else 32) * (pieces + 1), 0)
    return {"per_clock": WARPS * 32 * piece * pieces / clocks}


def _run(name: str, **constants: object) -> tuple[torch.Tensor, float]:
    """Return what a kernel computes, and its clocks: the median of all multiprocessors.

    Each has one program. From the first warp that begins to the last that ends.
    """
    programs = torch.cuda.get_device_properties().multi_processor_count
    clocks = torch.empty(programs, WARPS, 2, dtype=torch.int64, device="cuda")
    found = torch.empty(programs, WARPS, device="cuda")
    kernel = getattr(importlib.import_module(KERNELS), name)
    for _ in range(2):  # the first finds its instructions not yet fetched
        kernel[(programs,)](clocks, found, STEPS[name], num_warps=WARPS, **constants)
    return found, _taken(clocks)


def _taken(clocks: torch.Tensor) -> float:
    """Return the median over programs of a program's clocks: (programs, warps, [begin, end])."""
    began, ended = clocks.unbind(-1)
    return (ended.amax(1) - began.amin(1)).double().median().item()


def _check(found: torch.Tensor, expected: float, tolerance: float) -> None:
    if not (found - expected).abs().max() <= tolerance:
        raise ValueError(f"wrong: {found.flatten()[0].item()} instead of {expected}")
