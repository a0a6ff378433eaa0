"""Measure the kernels on a GPU side by side with others: `make bench`.

Each section measures one thing at several sizes, with every library that is installed, one after
the other on the same inputs, and writes `gpu_<section>.json` with hardware, versions and command.
A candidate is compared before it is timed: with float64 where that can be afforded, else with the
first candidate. One that is wrong is not timed; one that is missing, or that fails, is recorded
with the reason.

Times are medians of CUDA events around the replay of a CUDA graph, so that starting kernels from
Python does not count, with the second-level cache cleared before each. Where a library cannot be
recorded in a graph it is called directly, and the row says so.
"""

import argparse
import copy
import gc
import importlib
import json
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mamba_tutorial.attention import Transformer, TransformerConfig
from mamba_tutorial.compat import patched_transformers
from mamba_tutorial.generation import StepGraph
from mamba_tutorial.layers import LSTMLayer, SelectiveLayer
from mamba_tutorial.mamba import MambaBlock, MambaConfig, MambaLM
from mamba_tutorial.s4 import S4D
from mamba_tutorial.scan import linear_scan
from mamba_tutorial.selective import selective_scan
from mamba_tutorial.training import environment

COMMAND = "python -m mamba_tutorial.benchmark_gpu"
Run = Callable[[], object]
Row = dict[str, object]

RECURRENCES = [  # dtype, batch, length, channels
    (torch.float32, 8, 4096, 2048),
    (torch.float32, 8, 16384, 1536),
    (torch.float32, 1, 65536, 1024),
    (torch.float32, 1, 1 << 20, 64),
    (torch.bfloat16, 8, 4096, 2048),
]
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
SMALL = MambaConfig(d_model=768, n_layer=24, vocab_size=50280)  # the size of mamba-130m
SMALL_TRANSFORMER = TransformerConfig(d_model=768, n_layer=12, vocab_size=50280, n_head=12)
NEW_TOKENS = 64  # that every program writes in `generation`


# how to measure


def milliseconds(run: Run, repeats_ms: int = 60) -> tuple[float, str]:
    """Return the median time of run(), and whether it was replayed as a graph or called."""
    triton = importlib.import_module("triton")
    try:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run()
            run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # other threads, a peer's, may go on calling CUDA meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            kept = run()
        replay, how = graph.replay, "graph"
    except RuntimeError as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        torch.cuda.synchronize()
        replay, how, kept = run, "called", None
    took = triton.testing.do_bench(replay, warmup=25, rep=repeats_ms, return_mode="median")
    del kept
    return took, how


def peak_mib(run: Run) -> float:
    """Return the most memory held during run() beyond what was held before, in MiB."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_bandwidth() -> float:
    """Return the bytes per second, read and written, of a large copy on the device."""
    triton = importlib.import_module("triton")
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    took = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * source.nbytes / took * 1e3


def relative(value: Tensor, exact: Tensor) -> float:
    """Return ‖value − exact‖ / ‖exact‖, added up in float64; ‖value‖ where `exact` is zero."""
    apart, size = (
        torch.linalg.vector_norm(tensor, dtype=torch.float64)
        for tensor in (value.to(exact) - exact, exact)
    )
    return (apart / size if size else apart).item()


def attempt(row: Row, measure: Callable[[], Row]) -> Row:
    """Add what measure() returns to the row, or the reason why there is nothing."""
    try:
        return row | measure()
    except ModuleNotFoundError as error:
        return row | {"passed_over": f"{error.name} is not installed"}
    except Exception as error:  # a peer's, whatever it is, is a result
        lines = str(error).splitlines() or [""]
        return row | {"passed_over": f"{type(error).__name__}: {lines[0][:200]}"}
    finally:
        gc.collect()  # graphs, which hold memory, are parts of cycles
        torch.cuda.empty_cache()


def no_grad(run: Run) -> Run:
    """Return run() without gradients."""
    return torch.no_grad()(run)


# the recurrence


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


# the selective scan


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
    """What it costs to read sequences in a row, one every 512 tokens: with starts and without.

    One row for both, bfloat16, 16 states, gate, bias and softplus; times in turns, the median of
    five each. Before each, all of the output and all gradients are compared with float64.
    """
    for batch, length, d_inner in ((8, 2048, 2048), (1, 65536, 2048)):
        row = {"batch": batch, "length": length, "d_inner": d_inner, "every": 512}
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


def lessons() -> Iterator[Row]:
    """The steps to the fused scan, float32: batch 8, length 512, d_inner 2048, 16 states."""
    steps = importlib.import_module("mamba_tutorial.kernels.lessons.forward")
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
    with mock.patch("mamba_tutorial.selective.CHUNK_NUMBERS", 1 << 25):
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


# attention, for the crossing


def attention() -> Iterator[Row]:
    """Causal attention and the selective scan, width 1024, forward and forward + backward.

    At 65536 tokens in all, and for one sequence. Attention by FlashAttention and by cuDNN, as
    PyTorch brings them, with 16 heads, bfloat16.
    """
    lengths = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
    shapes = [(65536 // length, length) for length in lengths]
    for batch, length in shapes + [(1, length) for length in lengths[:-1]]:
        shape = {"batch": batch, "length": length}
        for kind in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):

            def attend(kind=kind, batch=batch, length=length) -> Row:
                heads = torch.randn(3, batch, 16, length, 64, device="cuda", dtype=torch.bfloat16)
                with only(kind):
                    return _both_ways(
                        partial(F.scaled_dot_product_attention, is_causal=True), list(heads)
                    )

            yield attempt({**shape, "name": kind}, attend)

        def ours(batch=batch, length=length) -> Row:
            return _both_ways(ours_scan, scan_inputs(batch, length, 1024))

        yield attempt({**shape, "name": "mamba_tutorial"}, ours)


def _both_ways(run: Callable, given: Sequence[Tensor]) -> Row:
    """Return the times of run(*given), without and with its gradients."""
    forward, how = milliseconds(no_grad(lambda: run(*given)))
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    upstream = torch.randn_like(run(*leaves))
    both, both_how = milliseconds(lambda: torch.autograd.grad(run(*leaves), leaves, upstream))
    return {"forward_ms": forward, "both_ms": both, "how": how if how == both_how else "called"}


# one token at a time


def decode() -> Iterator[Row]:
    """One step of the scan, d_inner 5120, against the time that its bytes take in a copy."""
    bandwidth = copy_bandwidth()
    kernel = importlib.import_module("mamba_tutorial.kernels.decode").selective_step
    for batch in (1, 16, 64, 128, 256, 512):
        h = torch.randn(batch, 5120, 16, device="cuda")
        x, dt, z = torch.randn(3, batch, 5120, device="cuda").bfloat16()
        B, C = torch.randn(2, batch, 16, device="cuda").bfloat16()
        A, (D, bias) = -torch.rand(5120, 16, device="cuda"), torch.randn(2, 5120, device="cuda")
        least = 2 * h.nbytes + 4 * x.nbytes + A.nbytes
        shape = {"batch": batch, "floor_us": 1e6 * least / bandwidth}

        def repeated(step: Callable, h=h) -> Row:
            """Time many steps in one graph, over states that do not fit into the cache together."""
            count = max(4, min(64, (1 << 28) // h.nbytes))
            states = [h.clone() for _ in range(count)]
            took, how = milliseconds(lambda: [step(state) for state in states])
            return {"us": 1e3 * took / count, "how": how}

        def ours(given=(x, dt, A, B, C, D, z, bias), repeated=repeated) -> Row:
            return repeated(lambda state: kernel(state, *given, True))

        def official(h=h, given=(x, dt, A, B, C, D, z, bias), repeated=repeated) -> Row:
            module = importlib.import_module("mamba_ssm.ops.triton.selective_state_update")
            y = module.selective_state_update(h.clone(), *given, dt_softplus=True)
            error = relative(kernel(h, *given, True)[0], y)
            step = module.selective_state_update
            return repeated(lambda state: step(state, *given, dt_softplus=True)) | {
                "difference": error
            }

        yield attempt({**shape, "name": "mamba_tutorial"}, ours)
        yield attempt({**shape, "name": "mamba_ssm, Triton"}, official)


def generation() -> Iterator[Row]:
    """Tokens per second of whole models of 130 million parameters: 64, greedy, after 16.

    bfloat16. "step alone" is the replayed step of ours without the choice of a token. mamba_ssm's
    writes with its CUDA graph, the Transformer with one, too, that of GPT-NeoX as it comes.
    """
    torch.manual_seed(0)
    model = MambaLM(SMALL).cuda().bfloat16().eval()
    for batch in (1, 8, 32, 128, 512):
        ids = torch.randint(50000, (batch, 16), device="cuda")

        def alone(ids=ids, batch=batch) -> Row:
            step, state = StepGraph(model, batch), model.initial_state(batch)
            _, state = step(ids[:, 0], state)
            took, _ = milliseconds(lambda: step(ids[:, 0], state))
            return {"tokens_per_s": 1e3 * batch / took, "ms_per_token": took}

        candidates = {
            "mamba_tutorial": lambda: partial(
                model.generate, max_new_tokens=NEW_TOKENS, temperature=0
            ),
            "mamba_ssm, CUDA graph": _official_generate,
            "transformers, Mamba": partial(_generate_of_transformers, "Mamba"),
            "Transformer, CUDA graph": partial(_transformer_generate, batch),
            "transformers, GPTNeoX": partial(_generate_of_transformers, "GPTNeoX"),
        }
        yield attempt({"batch": batch, "name": "mamba_tutorial, step alone"}, alone)
        for name, make in candidates.items():
            row = {"batch": batch, "name": name}
            yield attempt(row, lambda m=make, i=ids: _throughput(m(), i))


def _throughput(write: Callable[[Tensor], Tensor], ids: Tensor) -> Row:
    with torch.no_grad():
        write(ids)  # all of it: cuDNN makes a new plan for every length of a cache that grows
        torch.cuda.synchronize()
        start = time.perf_counter()
        written = write(ids)
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    new = written.shape[1] - ids.shape[1]
    if new != NEW_TOKENS:
        raise ValueError(f"{new} tokens were written, expected {NEW_TOKENS}")
    return {"tokens_per_s": len(ids) * new / seconds, "ms_per_token": 1e3 * seconds / new}


@lru_cache
def _official_model() -> torch.nn.Module:
    """Return the model of mamba_ssm, with its fused norms, of the size of ours."""
    models = importlib.import_module("mamba_ssm.models.mixer_seq_simple")
    sizes = importlib.import_module("mamba_ssm.models.config_mamba")
    config = sizes.MambaConfig(d_model=768, n_layer=24, vocab_size=50280)
    return models.MambaLMHeadModel(config, device="cuda")


def _official_generate() -> Callable[[Tensor], Tensor]:
    model = copy.deepcopy(_official_model()).bfloat16().eval()
    return lambda ids: model.generate(ids, ids.shape[1] + NEW_TOKENS, top_k=1, cg=True)


@lru_cache
def _generate_of_transformers(name: str) -> Callable[[Tensor], Tensor]:
    """Return generate of a model of transformers of the same size."""
    library = importlib.import_module("transformers")
    sizes = (
        {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50280, "state_size": 16}
        if name == "Mamba"
        else {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072,
              "num_attention_heads": 12, "vocab_size": 50304, "tie_word_embeddings": False}
    )  # fmt: skip
    config = getattr(library, f"{name}Config")(**sizes)
    model = getattr(library, f"{name}ForCausalLM")(config).cuda().bfloat16().eval()

    def generate(ids: Tensor) -> Tensor:
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0,
        )  # fmt: skip

    return generate


def _transformer_generate(batch: int) -> Callable[[Tensor], Tensor]:
    model = Transformer(SMALL_TRANSFORMER).cuda().bfloat16().eval()
    _, attention = _quickest_token(model, batch, 16)
    with only(attention):
        token = TokenGraph(model, batch, 16 + NEW_TOKENS)

    def generate(ids: Tensor) -> Tensor:
        state = token.state._replace(length=torch.zeros_like(token.state.length))
        logits, state = model.prefill(ids, state)
        token.state.length.copy_(state.length)
        token.ids.copy_(logits[:, -1].argmax(-1))
        written = [ids, token.ids[:, None].clone()]
        for _ in range(NEW_TOKENS - 1):
            token()
            written.append(token.ids[:, None].clone())
        return torch.cat(written, dim=1)

    return generate


def contexts() -> Iterator[Row]:
    """One more token of a model of 130 million parameters, after contexts of several lengths.

    bfloat16, a replayed CUDA graph for both. The Transformer has 12 layers, the same width, a
    cache of fixed size, the quickest attention that PyTorch has for it, and no codes of positions.
    """
    torch.manual_seed(0)
    model = MambaLM(SMALL).cuda().bfloat16().eval()
    for batch in (1, 16, 64):

        def ours(batch=batch) -> Row:
            step, state = StepGraph(model, batch), model.initial_state(batch)
            ids = torch.randint(50000, (batch,), device="cuda")
            _, state = step(ids, state)
            took, _ = milliseconds(lambda: step(ids, state))
            kept = sum(part.nbytes for pair in state for part in pair) / 2**20
            return {"ms_per_token": took, "kept_mib": kept}

        yield attempt({"name": "mamba_tutorial", "batch": batch}, ours)
        for context in (1024, 4096, 16384, 65536):
            row = {"name": "Transformer", "batch": batch, "context": context}
            yield attempt(row, partial(_transformer_token, batch, context))


@torch.no_grad()
def _transformer_token(batch: int, context: int) -> Row:
    """Return the time of a token, by the quickest attention, and the size of the cache."""
    model = LeanTransformer(batch, context).cuda().bfloat16()
    ids = torch.randint(50000, (batch,), device="cuda")
    times = {}
    for kind in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        try:
            with only(kind):
                times[kind] = milliseconds(lambda: model(ids))[0]
        except RuntimeError:  # a backend that cannot do this
            continue
    best = min(times, key=times.get)
    return {"ms_per_token": times[best], "attention": best, "kept_mib": model.cache.nbytes / 2**20}


class LeanTransformer(torch.nn.Module):
    """A Transformer of the size of mamba-130m, for one token after a context of fixed length.

    Without a code of positions and without a mask, which would cost kernels: so it is quicker than
    `attention.Transformer` could be.
    """

    def __init__(self, batch: int, context: int, layers: int = 12, width: int = 768):
        super().__init__()
        self.width, self.heads = width, width // 64
        self.embedding = torch.nn.Embedding(50280, width)
        self.norm = torch.nn.RMSNorm(width)
        sizes = {"qkv": (width, 3), "out": (width, 1), "up": (width, 4)}
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {name: torch.nn.Linear(n, k * n, bias=False) for name, (n, k) in sizes.items()}
                | {"down": torch.nn.Linear(4 * width, width, bias=False)}
                | {"first": torch.nn.RMSNorm(width), "second": torch.nn.RMSNorm(width)}
            )
            for _ in range(layers)
        )
        shape = layers, 2, batch, self.heads, context + 1, 64
        self.register_buffer("cache", torch.randn(shape, dtype=torch.bfloat16, device="cuda"))

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of the next token; ids (batch,)."""
        u = self.embedding(ids)[:, None]
        for layer, (keys, values) in zip(self.layers, self.cache.unbind(0), strict=True):
            q, k, v = (
                part.unflatten(-1, (self.heads, 64)).transpose(1, 2)
                for part in layer["qkv"](layer["first"](u)).chunk(3, dim=-1)
            )
            keys[:, :, -1:], values[:, :, -1:] = k, v
            y = F.scaled_dot_product_attention(q, keys, values)
            u = u + layer["out"](y.transpose(1, 2).flatten(2))
            u = u + layer["down"](F.gelu(layer["up"](layer["second"](u))))
        return self.norm(u[:, 0]) @ self.embedding.weight.T


def _quickest_token(model: Transformer, batch: int, context: int) -> tuple[float, str]:
    """Return the time of a token after `context` others, and the attention that needs the least."""
    times = {}
    for kind in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
        try:
            with only(kind):
                times[kind] = TokenGraph(model, batch, context + 1).milliseconds(context)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:  # a backend that cannot do this
            continue
    best = min(times, key=times.get)
    return times[best], best


def only(kind: str) -> AbstractContextManager:
    """Let PyTorch compute attention in this way alone."""
    return torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, kind))


class TokenGraph:
    """The most probable next token of a Transformer, chosen again and again by one CUDA graph."""

    @torch.no_grad()
    def __init__(self, model: Transformer, batch: int, room: int):
        self.state = model.initial_state(batch, room)
        self.ids = torch.zeros(batch, dtype=torch.long, device="cuda")
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            model.step(self.ids, self.state)
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            logits, after = model.step(self.ids, self.state)
            self.ids.copy_(logits.argmax(-1))
            self.state.length.copy_(after.length)

    def __call__(self) -> None:
        """Replace the ids by those that follow them."""
        self.graph.replay()

    def milliseconds(self, context: int) -> float:
        """Return the time of a token after so many others."""

        def token() -> None:
            self.state.length.fill_(context)
            self.graph.replay()

        triton = importlib.import_module("triton")
        return triton.testing.do_bench(token, warmup=25, rep=60, return_mode="median")


# training


def training() -> Iterator[Row]:
    """One step, forward and backward, of models of 130 million parameters, bfloat16 autocast.

    The Transformer has 12 layers of the same width; "compiled", each layer by `torch.compile`, at
    one shape, for it takes its time. "ms" is as Python calls it, so it depends on the host, too;
    "replayed_ms" is the same as a CUDA graph, where the program can be one.
    """
    for batch, length in ((8, 1024), (8, 2048), (1, 16384)):
        ids = torch.randint(50000, (batch, length), device="cuda")
        for name, make in {
            "mamba_tutorial": lambda: MambaLM(SMALL).cuda(),
            "mamba_tutorial, compiled": lambda: _compiled(MambaLM(SMALL).cuda()),
            "mamba_ssm": lambda: copy.deepcopy(_official_model()),
            "transformers, Mamba": _mamba_of_transformers,
            "Transformer": lambda: Transformer(SMALL_TRANSFORMER).cuda(),
            "Transformer, compiled": lambda: _compiled(Transformer(SMALL_TRANSFORMER).cuda()),
        }.items():
            if length == 2048 or not name.endswith("compiled"):
                row = {"batch": batch, "length": length, "name": name}
                yield attempt(row, lambda make=make, ids=ids: _step(make(), ids))


def _compiled(model: torch.nn.Module) -> torch.nn.Module:
    for layer in model.layers:
        layer.compile(fullgraph=True, dynamic=False)
    return model


def _mamba_of_transformers() -> torch.nn.Module:
    library = importlib.import_module("transformers")
    config = library.MambaConfig(hidden_size=768, num_hidden_layers=24, vocab_size=50280)
    return library.MambaForCausalLM(config).cuda()


def _step(model: torch.nn.Module, ids: Tensor) -> Row:
    model.train()

    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            found = model(ids)
        found = getattr(found, "logits", found)
        F.cross_entropy(found[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        model.zero_grad(set_to_none=True)

    run()
    triton = importlib.import_module("triton")
    peak = peak_mib(run)
    took = triton.testing.do_bench(run, warmup=200, rep=1000, return_mode="median")
    row = {"ms": took, "tokens_per_s": 1e3 * ids.numel() / took, "peak_mib": peak}
    replayed, how = milliseconds(run, 500)  # the same without the host
    return {**row, "replayed_ms": replayed} if how == "graph" else row


def transformers() -> Iterator[Row]:
    """A training step of transformers' Mamba, as it comes and with the scan of this package.

    130 million parameters, 2 × 512 tokens, bfloat16 autocast. As it comes it goes token by token,
    in PyTorch's operations, unless mamba_ssm is installed. Before it is timed, the logits are
    compared with those of the model as it comes, in float32.
    """
    ids = torch.randint(50000, (2, 512), device="cuda")
    for name, way in {
        "transformers, as it comes": nullcontext,
        "mamba_tutorial, in transformers": patched_transformers,
    }.items():
        yield attempt({"batch": 2, "length": 512, "name": name}, partial(_trained, way, ids))


def _trained(way: Callable[[], AbstractContextManager], ids: Tensor) -> Row:
    torch.manual_seed(0)
    model = _mamba_of_transformers().eval()
    with torch.no_grad():
        right = model(ids, use_cache=False).logits
        with way():
            error = relative(model(ids, use_cache=False).logits, right)
    if not error < 1e-3:
        raise ValueError(f"wrong, by {error:.1e}")
    with way():
        return {"error": error} | _step(model, ids)


def layers() -> Iterator[Row]:
    """A training step of one layer of the wall, 64 channels, 65536 tokens in all, float32."""
    kinds = {
        "LSTM": partial(LSTMLayer, hidden=48),
        "S4D": partial(S4D, d_state=128, init="lin"),
        "selective": partial(SelectiveLayer, d_state=16, dt_rank=8),
    }
    for length in (64, 256, 1024, 4096, 16384, 65536):
        batch = 65536 // length
        x = torch.randn(batch, length, 64, device="cuda")
        for name, kind in kinds.items():

            def step(kind=kind, x=x) -> Row:
                torch.manual_seed(0)
                layer = kind(64).cuda()
                weights = list(layer.parameters())
                took, how = milliseconds(
                    lambda: torch.autograd.grad(layer(x).square().mean(), weights)
                )
                return {"both_ms": took, "how": how}

            yield attempt({"batch": batch, "length": length, "name": name}, step)


def block() -> Iterator[Row]:
    """Where the time of a whole block goes, forward and backward, kernel by kernel.

    d_model 1024, batch 8, length 2048, bfloat16 autocast.
    """
    torch.manual_seed(0)
    layer = MambaBlock(MambaConfig(d_model=1024, n_layer=1, vocab_size=1)).cuda()
    x = torch.randn(8, 2048, 1024, device="cuda", requires_grad=True)

    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(x)
        y.float().sum().backward()

    for _ in range(3):
        run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            run()
        torch.cuda.synchronize()
    for event in profile.key_averages():
        yield {"name": event.key[:80], "us": event.self_device_time_total / 5,
               "calls": event.count / 5}  # fmt: skip


SECTIONS = {
    section.__name__: section
    for section in (
        recurrence,
        selective,
        sweep,
        starts,
        lessons,
        attention,
        decode,
        generation,
        contexts,
        training,
        transformers,
        layers,
        block,
    )
}


def hardware() -> Row:
    """Return versions, the GPU and its clocks as they are while it works."""
    query = "name,driver_version,clocks.sm,clocks.mem"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    versions = {}
    for name in ("triton", "mamba_ssm", "accelerated_scan", "transformers", "jax"):
        try:
            versions[name] = getattr(importlib.import_module(name), "__version__", "unknown")
        except ImportError:
            versions[name] = "not installed"
    return environment() | versions | {"cuda": torch.version.cuda, "nvidia_smi": said}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the sections, print a table of each, and write the records."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections alone")
    parser.add_argument("--out", type=Path, help="a folder for the records")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.exit(1, "PyTorch sees no GPU here\n")
    for name in options.only or SECTIONS:
        rows = []
        for row in tqdm(SECTIONS[name](), desc=name, disable=None):
            rows.append(row)
            shown = " ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in row.items()
            )
            tqdm.write(f"{name}: {shown}")
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            record = {"command": f"{COMMAND} --only {name}", "environment": hardware()}
            text = json.dumps(record | {"results": rows}, indent=1)
            (options.out / f"gpu_{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
