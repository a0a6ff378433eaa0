"""The linear recurrence beside other libraries'."""

import importlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from mamba_tutorial.benchmark.measuring import (
    Row,
    attempt,
    copy_bandwidth,
    milliseconds,
    no_grad,
    relative,
)
from mamba_tutorial.scan import linear_scan

RECURRENCES = [  # dtype, batch, length, channels
    (torch.float32, 8, 4096, 2048),
    (torch.float32, 8, 16384, 1536),
    (torch.float32, 1, 65536, 1024),
    (torch.float32, 1, 1 << 20, 64),
    (torch.bfloat16, 8, 4096, 2048),
]


def ours_recurrence(a: Tensor, b: Tensor) -> Tensor:
    """(batch, length, channels), as every candidate."""
    return linear_scan(a, b)


def plain_recurrence(a: Tensor, b: Tensor) -> Tensor:
    """The same in plain Triton, without the layouts of Gluon."""
    with mock.patch("mamba_tutorial.kernels.scan.runs_on", return_value=False):
        return linear_scan(a, b)


def accelerated_scan(a: Tensor, b: Tensor) -> Tensor:
    """The Triton kernel of accelerated-scan, which wants the length last; not counted here."""
    scan = importlib.import_module("accelerated_scan.scalar").scan
    return scan(a, b)


def torch_associative_scan(a: Tensor, b: Tensor) -> Tensor:
    """PyTorch's associative_scan, compiled."""
    return _compiled_scan()(a, b)


_COMPILED: list[Callable] = []


def _compiled_scan() -> Callable:
    if not _COMPILED:
        module = importlib.import_module("torch._higher_order_ops.associative_scan")

        def combine(left, right):
            return left[0] * right[0], right[0] * left[1] + right[1]

        def scan(a: Tensor, b: Tensor) -> Tensor:
            return module.associative_scan(combine, (a, b), dim=1, combine_mode="pointwise")[1]

        _COMPILED.append(torch.compile(scan, dynamic=False))
    return _COMPILED[0]


def _jax(a: Tensor, b: Tensor) -> Row:
    """Time jax.lax.associative_scan, compiled, by the clock of the host."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or it takes 3/4 of the GPU
    jax = importlib.import_module("jax")
    a_j, b_j = (jax.dlpack.from_dlpack(tensor) for tensor in (a, b))

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    scan = jax.jit(lambda a, b: jax.lax.associative_scan(combine, (a, b), axis=1)[1])
    result = torch.from_dlpack(scan(a_j, b_j))
    error = relative(result, linear_scan(a, b))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        scan(a_j, b_j).block_until_ready()
        times.append(1e3 * (time.perf_counter() - start))
    return {"forward_ms": statistics.median(times), "how": "called", "error": error}


def recurrence() -> Iterator[Row]:
    """Forward, and forward with backward, against the bandwidth of a copy.

    Bytes counted are the least: three numbers per element forwards, five backwards (a, h and the
    gradient in, two gradients out).
    """
    bandwidth = copy_bandwidth()
    for dtype, batch, length, channels in RECURRENCES:
        a = (torch.rand(batch, length, channels, device="cuda") * 0.5 + 0.5).to(dtype)
        b, upstream = (torch.randn_like(a) for _ in range(2))
        few = slice(0, min(16, channels))
        exact = linear_scan(
            a[:1, :, few].double(), b[:1, :, few].double(), method="chunked"
        )  # fmt: skip
        turned = [tensor.mT.contiguous() for tensor in (a, b, upstream)]
        candidates = {
            "mamba_tutorial": (ours_recurrence, (a, b, upstream), 1),
            "mamba_tutorial, plain Triton": (plain_recurrence, (a, b, upstream), 1),
            "accelerated-scan, Triton": (accelerated_scan, turned, 2),
            "torch, associative_scan compiled": (torch_associative_scan, (a, b, upstream), 1),
        }
        shape = {"dtype": str(dtype)[6:], "batch": batch, "length": length, "channels": channels}
        for name, (scan, given, axis) in candidates.items():
            row = {**shape, "name": name, "copy_tb_per_s": bandwidth / 1e12}
            yield attempt(row, partial(_recurrence, scan, given, axis, exact, few))
        if dtype == torch.float32 and length <= 4096:
            yield attempt({**shape, "name": "jax, associative_scan"}, partial(_jax, a, b))


def _recurrence(scan: Callable, given: Sequence[Tensor], axis: int, exact: Tensor, few: slice):
    a, b, upstream = given
    with torch.no_grad():
        h = scan(a, b)
    h = h if axis == 1 else h.mT
    error = relative(h[:1, :, few], exact)
    if not error < (1e-5 if a.dtype == torch.float32 else 1e-2):
        raise ValueError(f"wrong, by {error:.1e}")
    del h
    forward, how = milliseconds(no_grad(lambda: scan(a, b)))
    row = {"forward_ms": forward, "how": how, "error": error}
    if scan in {plain_recurrence, torch_associative_scan}:
        return row
    leaves = [tensor.detach().requires_grad_() for tensor in (a, b)]
    both, _ = milliseconds(lambda: torch.autograd.grad(scan(*leaves), leaves, upstream))
    return row | {"both_ms": both}
