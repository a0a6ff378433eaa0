"""The selective scan beside the official kernel; what starts cost; how its length is cut."""

import gc
import importlib
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import product
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_tutorial.benchmark.measuring import (
    Row,
    attempt,
    milliseconds,
    no_grad,
    peak_mib,
    relative,
)
from mamba_tutorial.scan import linear_scan
from mamba_tutorial.selective import selective_scan

SCANS = [  # batch, length, d_inner
    (8, 512, 2048),
    (8, 2048, 2048),
    (8, 8192, 2048),
    (2, 32768, 2048),
    (1, 65536, 2048),
    (1, 2048, 1536),
    (1, 131072, 1536),
    (1, 1 << 20, 1536),
]
SWEEP = [  # batch, length, d_inner, d_state, dtype: where few things are many, and where many are
    *(
        (*shape, d_state, torch.bfloat16)
        for d_state in (4, 16, 64, 128)
        for shape in ((1, 2048, 768), (4, 512, 1000), (1, 16384, 768), (64, 128, 768))
    ),
    *((8, 2048, 2048, d_state, torch.bfloat16) for d_state in (4, 8, 32, 64, 128)),
    *((4, 512, 64, d_state, torch.bfloat16) for d_state in (8, 16, 64)),
    (1, 1, 2048, 16, torch.bfloat16),
    (1, 64, 8192, 16, torch.bfloat16),
    (1, 2048, 64, 16, torch.bfloat16),
    (1, 131072, 64, 16, torch.bfloat16),
    (64, 2048, 256, 16, torch.bfloat16),
    (8, 2048, 2048, 16, torch.float16),
    (8, 2048, 2048, 16, torch.float32),
    (1, 2048, 1536, 16, torch.float32),
    (2, 3000, 331, 24, torch.float32),
]


CUT = [  # batch, length, d_inner, d_state: where the length is cut, or nearly
    *((*shape, 16) for shape in ((1, 2048, 64), (1, 2048, 768), (1, 2048, 1536), (4, 512, 64))),
    *((*shape, 16) for shape in ((4, 512, 1000), (1, 16384, 768), (1, 65536, 2048))),
    *((4, 512, 64, d_state) for d_state in (8, 64)),
    (1, 2048, 768, 4),
]
KERNELS = "mamba_tutorial.kernels"
CHUNKS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)


def scan_inputs(
    batch: int,
    length: int,
    d_inner: int,
    d_state: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
) -> list[Tensor]:
    """Return x, dt, A, B, C, D, z, dt_bias as a Mamba block has them at the start."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    tokens, shared = (batch, length, d_inner), (batch, length, d_state)
    A = -torch.arange(1.0, d_state + 1, device=device).repeat(d_inner, 1)
    log_dt = torch.rand(d_inner, generator=generator, device=device) * math.log(100) - math.log(1e3)
    bias = log_dt.exp() + torch.log(-torch.expm1(-log_dt.exp()))  # softplus gives 0.001 … 0.1
    D = torch.ones(d_inner, device=device)
    return [random(*tokens), random(*tokens), A, random(*shared), random(*shared), D,
            random(*tokens), bias]  # fmt: skip


def ours_scan(x, dt, A, B, C, D, z, bias, starts=None) -> Tensor:
    """The kernel of this package."""
    return selective_scan(x, dt, A, B, C, D, z, bias, True, backend="triton", starts=starts)


def plain_scan(*given: Tensor) -> Tensor:
    """The same in plain Triton, while `without_gluon` is in force."""
    return ours_scan(*given)


def without_gluon() -> AbstractContextManager:
    """Keep the selective scan from choosing its kernels with the layouts of Gluon."""
    return mock.patch("mamba_tutorial.kernels.selective_scan._takes", return_value=False)


def unfused_scan(x, dt, A, B, C, D, z, bias) -> Tensor:
    """The same in PyTorch operations around our linear scan: all states go to memory."""
    step = F.softplus(dt.float() + bias)
    a = torch.exp(step[..., None] * A)
    b = (step * x.float())[..., None] * B.float()[:, :, None]
    y = (linear_scan(a, b) @ C.float()[..., None]).squeeze(-1)
    return ((y + D * x) * F.silu(z.float())).to(x.dtype)


def mamba_ssm_scan(*given: Tensor) -> Tensor:
    """The official CUDA kernel; inputs and output with the length last."""
    module = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    return module.selective_scan_fn(*given, delta_softplus=True)


def selective() -> Iterator[Row]:
    """Forward, forward with backward, and memory, bfloat16, 16 states, gate, bias and softplus.

    Before it is timed, all of the output and all gradients are compared with float64.
    """
    for batch, length, d_inner in SCANS:
        gc.collect()
        torch.cuda.empty_cache()  # the last one needs most of the memory
        given = scan_inputs(batch, length, d_inner)
        upstream = torch.randn_like(given[0])
        last = [tensor.mT.contiguous() if tensor.ndim == 3 else tensor for tensor in given]
        candidates = {
            "mamba_tutorial": (ours_scan, given, upstream),
            "mamba_ssm, CUDA": (mamba_ssm_scan, last, upstream.mT.contiguous()),
        }
        if batch * length * d_inner <= 1 << 25:
            candidates["mamba_tutorial, plain Triton"] = (plain_scan, given, upstream)
        if batch * length * d_inner <= 1 << 23:
            candidates["PyTorch, unfused"] = (unfused_scan, given, upstream)
        exact = exact_scan(given, upstream)
        shape = {"batch": batch, "length": length, "d_inner": d_inner}
        for name, (scan, inputs, gradient) in candidates.items():
            row = {**shape, "name": name}
            with without_gluon() if scan is plain_scan else nullcontext():
                row = attempt(row, partial(_selective, scan, inputs, gradient, exact))
            yield row
        del given, last, candidates, upstream, exact


def sweep() -> Iterator[Row]:
    """Sizes of all kinds, of everything whole: ours and the official kernel, one row for both.

    Before it is timed, all of the output and all gradients are compared with float64.
    """
    for batch, length, d_inner, d_state, dtype in SWEEP:
        given = scan_inputs(batch, length, d_inner, d_state, dtype)
        row = {"batch": batch, "length": length, "d_inner": d_inner, "d_state": d_state}
        yield attempt(row | {"dtype": str(dtype)[6:]}, partial(_side_by_side, given))
        del given


def _side_by_side(given: Sequence[Tensor]) -> Row:
    upstream, row = torch.randn_like(given[0]), {}
    exact = exact_scan(given, upstream)
    last = [tensor.mT.contiguous() if tensor.ndim == 3 else tensor for tensor in given]
    for name, scan, inputs, gradient in (
        ("ours", ours_scan, given, upstream),
        ("official", mamba_ssm_scan, last, upstream.mT.contiguous()),
    ):
        found = _selective(scan, inputs, gradient, exact)
        row |= {f"{name}_{key}": value for key, value in found.items()}
    return row


def starts() -> Iterator[Row]:
    """What it costs to read sequences in a row: one every 512 tokens, or but one.

    A row has both, with starts and without: bfloat16, 16 states, gate, bias and softplus; times in
    turns, the median of five each. Before each, all of the output and all gradients are compared
    with float64.
    """
    sizes = (8, 2048, 2048), (1, 65536, 2048)
    for (batch, length, d_inner), alone in product(sizes, (False, True)):
        every = length if alone else 512
        row = {"batch": batch, "length": length, "d_inner": d_inner, "every": every}
        yield attempt(row, partial(_in_turns, *row.values()))


def _in_turns(batch: int, length: int, d_inner: int, every: int) -> Row:
    given = scan_inputs(batch, length, d_inner)
    upstream = torch.randn_like(given[0])
    marks = torch.zeros(batch, length, dtype=torch.bool, device="cuda")
    marks[:, ::every] = True
    kinds = {"without": None, "with": marks}
    exact = {name: exact_scan(given, upstream, starts) for name, starts in kinds.items()}
    row = {}
    for _, (name, starts) in product(range(5), kinds.items()):
        found = _selective(partial(ours_scan, starts=starts), given, upstream, exact[name])
        for key, value in found.items():
            row.setdefault(f"{name}_{key}", []).append(value)
    return {key: values[0] if key.endswith("how") else statistics.median(values)
            for key, values in row.items()}  # fmt: skip


def chunks() -> Iterator[Row]:
    """How long the chunks are, into which the length is cut: our choice and others, bfloat16.

    One row for each size and length of a chunk, in tokens; none is our choice. Chunks that would
    make more than a thousand programs of a row of channels, or fewer than two, are left out; with
    gradients, also those before which no state is kept.
    """
    for batch, length, d_inner, d_state in CUT:
        given = scan_inputs(batch, length, d_inner, d_state)
        leaves = [tensor.detach().requires_grad_() for tensor in given]
        upstream = torch.randn_like(given[0])
        runs = {
            "forward_ms": no_grad(lambda given=given: ours_scan(*given)),
            "both_ms": lambda leaves=leaves, upstream=upstream: torch.autograd.grad(
                ours_scan(*leaves), leaves, upstream
            ),
        }
        size = {"batch": batch, "length": length, "d_inner": d_inner, "d_state": d_state}
        lengths = [chunk for chunk in CHUNKS if length // 1024 < chunk < length]
        every = importlib.import_module(f"{KERNELS}.selective_scan").spacing(
            given[0], d_state, exact=False
        )
        for chunk in (None, *lengths):
            with nullcontext() if chunk is None else _cut_into(chunk):
                times = {
                    key: milliseconds(run, 20)[0]
                    for key, run in runs.items()
                    if chunk is None or key == "forward_ms" or chunk % every == 0
                }
            yield size | {"chunk": chunk} | times


def _cut_into(chunk: int) -> AbstractContextManager:
    """Cut the length into chunks of so many tokens, in both directions."""
    cutting = importlib.import_module(f"{KERNELS}.selective_scan.cutting")
    return mock.patch.object(cutting, "chunk_length", return_value=chunk)


def lessons() -> Iterator[Row]:
    """The steps to the fused scan, float32: batch 8, length 512, d_inner 2048, 16 states."""
    steps = importlib.import_module(f"{KERNELS}.lessons.forward")
    x, dt, A, B, C, D, z, bias = (tensor.float() for tensor in scan_inputs(8, 512, 2048))
    full, bare = (x, dt, A, B, C, D, z, bias), (x, dt.abs(), A, B, C)
    h0 = x.new_zeros(8, 2048, 16)
    runs = {
        "all states of a channel": lambda: steps.all_states(*bare),
        "channels over lanes": lambda: steps.many_channels(*bare),
        "in tiles, none in flight": lambda: steps.in_tiles(*bare, stages=1),
        "in tiles": lambda: steps.in_tiles(*bare),
        "softplus, skip and gate": lambda: steps.gated(*full),
        "any size": lambda: steps.any_size(*full, h0),
        "the package, in Triton": lambda: plain_scan(*full),
        "the package, in Gluon": lambda: ours_scan(*full),
    }
    for name, run in runs.items():

        def measure(run=run) -> Row:
            took, how = milliseconds(no_grad(run))
            return {"forward_ms": took, "how": how}

        with without_gluon() if name.endswith("Triton") else nullcontext():
            yield attempt({"name": name}, measure)


def exact_scan(
    given: Sequence[Tensor], upstream: Tensor, starts: Tensor | None = None
) -> list[Tensor]:
    """Return y and the gradients of all inputs, computed in float64 by PyTorch operations.

    Some channels of one sequence after the other, so that the states have room; kept in float32.
    """
    x, B = given[0], given[4]
    (batch, length, d_inner), d_state = x.shape, B.shape[2]
    width = max(1, min((1 << 27) // length, 4000 // d_state))
    room = x.device if x.numel() < 1 << 30 else "cpu"  # beside a million tokens there is none
    results = [torch.zeros_like(t, dtype=torch.float32, device=room) for t in (x, *given)]
    # larger pieces than those for a CPU: there is room, and to start kernels takes time
    with mock.patch("mamba_tutorial.selective._in_pytorch.CHUNK_NUMBERS", 1 << 25):
        for sequence, first in product(range(batch), range(0, d_inner, width)):
            channels, shared = slice(first, first + width), (slice(sequence, sequence + 1),)
            tokens, own = (*shared, slice(None), channels), (channels,)
            where = tokens, tokens, own, shared, shared, own, tokens, own
            leaves = [
                t[at].detach().double().requires_grad_() for t, at in zip(given, where, strict=True)
            ]
            marks = None if starts is None else starts[shared]
            y = selective_scan(*leaves, True, backend="parallel", starts=marks)
            found = y.detach(), *torch.autograd.grad(y, leaves, upstream[tokens].double())
            for result, at, part in zip(results, (tokens, *where), found, strict=True):
                result[at] += part.to(result)
    return results


def _selective(
    scan: Callable, given: Sequence[Tensor], upstream: Tensor, exact: Sequence[Tensor]
) -> Row:
    leaves = [tensor.detach().requires_grad_() for tensor in given]

    def both() -> tuple[Tensor, ...]:
        y = scan(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, upstream)

    turned = scan is mamba_ssm_scan
    errors = [
        relative(value.mT if turned and value.ndim == 3 else value, right.to(value.device))
        for value, right in zip(both(), exact, strict=True)
    ]
    if not max(errors) < 1e-2:
        raise ValueError("wrong, by " + ", ".join(f"{error:.1e}" for error in errors))
    row = {"error": errors[0], "gradient_error": max(errors[1:]), "peak_mib": peak_mib(both)}
    row["forward_ms"], row["how"] = milliseconds(no_grad(lambda: scan(*given)))
    row["both_ms"], _ = milliseconds(both)
    return row
