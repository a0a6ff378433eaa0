"""The compiled loops: their pieces against numpy and scipy, the whole against the definition.

The Triton kernels run on a GPU where there is one, else in Triton's interpreter.
"""

import importlib
import importlib.util
import math
import re
import subprocess
import sys
from functools import partial
from unittest import mock

import numba
import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F

from mamba_tutorial import counts
from mamba_tutorial.benchmark import measuring, scans
from mamba_tutorial.generation import StepGraph
from mamba_tutorial.kernels import cpu
from mamba_tutorial.mamba import MambaConfig, MambaLM
from mamba_tutorial.ops import OPERATORS
from mamba_tutorial.scan import linear_scan
from mamba_tutorial.selective import selective_scan, selective_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton exists for Linux only"
)


@numba.njit
def apply(z):
    """exp, exprel and its derivative, as the loops use them."""
    out = np.empty((3, len(z)), np.float32)
    for i in range(len(z)):
        e = cpu._exp(z[i])
        w = cpu._exprel(z[i], e)
        out[0, i], out[1, i], out[2, i] = e, w, cpu._exprel_slope(z[i], e, w)
    return out


def slope(z):
    """(e^z − exprel(z))/z in float64, by its series near 0."""
    series = sum((k + 1) * z**k / scipy.special.factorial(k + 2) for k in range(12))
    with np.errstate(all="ignore"):
        far = (np.exp(z) - scipy.special.exprel(z)) / z
    return np.where(abs(z) < 0.5, series, far)


def test_exp_and_exprel_to_float32_rounding():
    z = np.concatenate([-np.logspace(-8, 1.9, 20000), np.logspace(-8, 1.9, 20000), [0.0]])
    z = z.astype(np.float32)
    given = z.astype(np.float64)
    exact = np.exp(given), scipy.special.exprel(given), slope(given)
    for value, reference, digits in zip(apply(z), exact, (2, 6, 16), strict=True):
        error = np.abs(value / reference - 1).max() / np.finfo(np.float32).eps
        assert error < digits


def test_exp_at_its_ends_and_at_nan():
    low, high, nan = apply(np.array([-1e30, 1e30, np.nan], np.float32))[0]
    assert low == 0
    assert high == np.inf
    assert np.isnan(nan)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_programs_are_shared_out_among_the_threads_of_pytorch(threads, monkeypatch):
    monkeypatch.setattr(cpu.torch, "get_num_threads", lambda: threads)
    ranges = []
    cpu._run(lambda begin, end: ranges.append((begin, end)), 5)
    assert len(ranges) == (1 if threads == 1 else 5)
    assert sorted(p for begin, end in ranges for p in range(begin, end)) == list(range(5))


# the fused kernels in Triton

SHAPES = {  # batch, length, d_inner, d_state
    "one of everything": (1, 1, 1, 1),
    "odd": (2, 37, 11, 5),
    "whole tiles": (1, 32, 16, 16),
    "a wide state": (1, 9, 3, 70),
    "released state, odd rest": (3, 21, 9, 16),
    "three chunks": (1, 150, 2, 4),
    "eight chunks, too many for halves": (1, 500, 2, 4),
    "whole groups of channels, three chunks": (1, 150, 64, 16),
}
WITHOUT = [(), ("D",), ("z",), ("dt_bias",), ("h0",), ("D", "z", "dt_bias", "h0")]


def problem(batch, length, d_inner, d_state, without=(), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    tokens, shared = (batch, length, d_inner), (batch, length, d_state)
    inputs = {
        "x": random(*tokens, dtype=dtype),
        "dt": random(*tokens, dtype=dtype) - 2,
        "A": -3 * random(d_inner, d_state).abs(),
        "B": random(*shared, dtype=dtype),
        "C": random(*shared, dtype=dtype),
        "D": random(d_inner),
        "z": random(*tokens, dtype=dtype),
        "dt_bias": random(d_inner),
        "h0": random(batch, d_inner, d_state),
    }
    return {name: tensor for name, tensor in inputs.items() if name not in without}


def run(inputs, upstream, **options):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    outputs = selective_scan(**leaves, return_last_state=True, **options)
    upstream = [g.to(out.dtype) for g, out in zip(upstream, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return dict(zip(["y", "last", *leaves], [*outputs, *gradients], strict=True))


def compare(inputs, tolerance, **options):
    """All outputs and gradients against the definition in float64."""
    batch, length, d_inner = inputs["x"].shape
    generator = torch.Generator().manual_seed(1)
    upstream = [
        torch.randn(shape, generator=generator).to(DEVICE)
        for shape in ((batch, length, d_inner), (batch, *inputs["A"].shape))
    ]
    double = {name: tensor.double() for name, tensor in inputs.items()}
    exact = run(double, upstream, backend="sequential", **options)
    for name, value in run(inputs, upstream, backend="triton", **options).items():
        assert value.dtype == (inputs["x"].dtype if name == "y" else inputs.get(name, value).dtype)
        scale = exact[name].abs().max() + 1e-3
        assert ((value.double() - exact[name]).abs().max() / scale).item() < tolerance, name


def rounding(length):
    """How far off a result may be, relative to the largest.

    The GPU's exponential is off by up to 2⁻²² (`ex2.approx` in the PTX manual), four times as much
    as rounding. In a state that forgets nothing, the errors of all tokens add up, as the steps of
    a random walk do. The official kernel uses the same exponential and is off as much.
    """
    return 2e-6 if DEVICE == "cpu" else max(2e-6, 3 * 2**-22 * math.sqrt(length))


@needs_triton
@pytest.mark.parametrize("rule", ["mamba", "zoh"])
@pytest.mark.parametrize("name", SHAPES)
def test_triton_is_the_definition_with_all_its_gradients(name, rule):
    off = rounding(SHAPES[name][1])
    compare(problem(*SHAPES[name], seed=1), off, dt_softplus=True, discretization=rule)


@needs_triton
@pytest.mark.parametrize("backend", ["parallel", "triton"])
@pytest.mark.parametrize("rule", ["mamba", "zoh"])
@pytest.mark.parametrize("without", [("h0",), ("h0", "z", "dt_bias")])
@pytest.mark.parametrize("name", SHAPES)
def test_ends_alone_are_the_last_state_and_the_gradient_of_the_first(name, without, rule, backend):
    """Of the definition in float64: the last state from zero, and what y gives to h0."""
    inputs = problem(*SHAPES[name], without, seed=1)
    double = {key: tensor.double() for key, tensor in inputs.items()}
    zero = torch.zeros(len(inputs["x"]), *inputs["A"].shape, dtype=torch.float64, device=DEVICE)
    settings = {"dt_softplus": True, "discretization": rule, "backend": "sequential"}
    given = {"h0": zero.requires_grad_(), "return_last_state": True, **settings}
    y, last = selective_scan(**double, **given)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    exact = last, *torch.autograd.grad(y, zero, dy)
    if backend == "triton":
        double, dy = inputs, dy.float()
    z, bias = double.get("z"), double.get("dt_bias")
    steps = F.softplus(double["dt"] if bias is None else double["dt"] + bias)
    for u, V, gate, reverse, expected in (
        (double["x"], double["B"], None, False, exact[0]),
        (dy, double["C"], z, True, exact[1]),
    ):
        rules = True, rule == "zoh", reverse, backend
        tensors = u, double["dt"], double["A"], V, gate, bias
        end, span = OPERATORS["selective_scan_end"](*tensors, *rules)
        off = 1e-12 if backend == "parallel" else rounding(SHAPES[name][1])
        assert ((end - expected).abs().max() / (expected.abs().max() + 1e-3)).item() < off
        torch.testing.assert_close(span, steps.sum(1))


@needs_triton
@pytest.mark.parametrize("without", WITHOUT)
def test_triton_without_optional_inputs(without):
    compare(problem(2, 11, 5, 4, without), 2e-6, dt_softplus=True)


@needs_triton
@pytest.mark.parametrize("d_inner", [3, 64])
def test_gradients_of_the_last_state_alone(d_inner):
    inputs = problem(1, 70, d_inner, 16)
    found = []
    for backend, dtype in (("triton", torch.float32), ("sequential", torch.float64)):
        leaves = {name: t.to(dtype, copy=True).requires_grad_() for name, t in inputs.items()}
        _, last = selective_scan(
            **leaves, dt_softplus=True, return_last_state=True, backend=backend
        )
        found.append(
            torch.autograd.grad(last.square().sum(), list(leaves.values()), allow_unused=True)
        )
    for name, value, exact in zip(inputs, *found, strict=True):
        if exact is not None:
            error = (value - exact).abs().max() / (exact.abs().max() + 1e-3)
            assert error < 2e-6, name


@needs_triton
def test_triton_without_softplus():
    inputs = problem(1, 11, 5, 4, ("dt_bias",))
    compare(inputs | {"dt": inputs["dt"].abs()}, 2e-6)


@needs_triton
@pytest.mark.parametrize("shift", [-25, -12, -6, 10, 30])
def test_triton_keeps_the_digits_of_small_and_large_steps(shift):
    inputs = problem(1, 9, 4, 2, ("h0",))
    compare(inputs | {"dt": inputs["dt"] + shift}, 3e-6, dt_softplus=True)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_in_half_precision(dtype):
    compare(problem(2, 20, 9, 4, dtype=dtype), 2 * torch.finfo(dtype).eps, dt_softplus=True)


@needs_triton
def test_triton_takes_rows_that_lie_apart():
    """x and z as halves of one projection, and a transposed dt."""
    inputs = problem(2, 11, 8, 4)
    both = torch.cat([inputs["x"], inputs["z"]], dim=-1)
    apart = inputs | dict(zip("xz", both.chunk(2, dim=-1), strict=True))
    apart["dt"] = inputs["dt"].mT.contiguous().mT
    assert not apart["x"].is_contiguous()
    compare(apart, 2e-6, dt_softplus=True)


@needs_triton
@pytest.mark.parametrize("shape", [(2, 20, 20, 16), (1, 70, 64, 16)])
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter runs one program after the other")
def test_triton_is_repeatable_to_the_bit(shape):
    inputs = problem(*shape)
    upstream = torch.ones_like(inputs["x"]), torch.ones_like(inputs["h0"])
    first, second = (run(inputs, upstream, dt_softplus=True, backend="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


GLUON = {  # batch, length, d_inner, d_state: so many that an H100 or H200 runs it uncut, and few
    "whole": (8, 100, 2048, 16),
    "cut, an odd number of groups": (1, 700, 192, 16),
    "cut, the last group not full": (2, 300, 328, 16),
    "rows that have to be filled up": (2, 300, 331, 16),
    "4 states": (2, 700, 300, 4),
    "8 states": (1, 300, 264, 8),
    "24 of 32 states": (2, 300, 72, 24),
    "64 states": (2, 300, 80, 64),
    "128 states": (1, 300, 520, 128),
    "128 states, whole": (9, 70, 2048, 128),
}


@needs_triton
@pytest.mark.skipif(DEVICE == "cpu", reason="Gluon has no interpreter")
@pytest.mark.parametrize("name", GLUON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gluon_is_the_definition_with_all_its_gradients(name, dtype):
    inputs = problem(*GLUON[name], dtype=dtype)
    off = 5e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    compare(inputs, off, dt_softplus=True)
    upstream = torch.ones_like(inputs["x"]), torch.ones_like(inputs["h0"])
    first, second = (run(inputs, upstream, dt_softplus=True, backend="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@needs_triton
@pytest.mark.skipif(DEVICE == "cpu", reason="Gluon has no interpreter; test_packing has the rest")
@pytest.mark.parametrize("name", GLUON)
@pytest.mark.parametrize("share", [0.002, 0.1, 1.0])
def test_gluon_reads_rows_sequence_by_sequence(name, share):
    """A token begins a sequence with this probability; the last row has no start at all."""
    inputs = problem(*GLUON[name])
    inputs["A"][0, 0] = 0  # a state that never forgets by itself
    generator = torch.Generator().manual_seed(2)
    starts = torch.rand(inputs["x"].shape[:2], generator=generator).to(DEVICE) < share
    starts[-1] &= len(starts) == 1
    compare(inputs, 5e-6, dt_softplus=True, starts=starts)


ENDS = {  # batch, length, d_inner, d_state, tokens of a chunk
    "three chunks, in halves": (2, 700, 64, 16, 256),
    "many chunks, the last group not full": (2, 1001, 40, 8, 64),
    "rows that have to be filled up": (1, 333, 331, 4, 64),
    "states of two programs, in halves": (2, 300, 72, 32, 128),
    "the last chunk of one token": (1, 257, 32, 16, 128),
}


@needs_triton
@pytest.mark.skipif(DEVICE == "cpu", reason="Gluon has no interpreter; test_packing has the twin")
@pytest.mark.parametrize("share", [None, 0.01, 1.0])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ENDS)
def test_ends_in_gluon_joined(name, reverse, share):
    """States before the last chunk, or gradients of states after the first, by the definition."""
    kernel = importlib.import_module("mamba_tutorial.kernels.selective_scan")
    *shape, chunk = ENDS[name]
    length = shape[1]
    given = problem(*shape, ("D", "h0"))
    generator = torch.Generator().manual_seed(3)
    dy = torch.randn(shape[:3], generator=generator).to(DEVICE)
    h = torch.randn(shape[0], *given["A"].shape, generator=generator).to(DEVICE)
    starts = None
    if share is not None:
        starts = (torch.rand(shape[:2], generator=generator) < share).to(DEVICE)

    border = chunk if reverse else (length - 1) // chunk * chunk
    part = slice(border, None) if reverse else slice(border)
    cut = {name: t[:, part] if t.ndim == 3 else t for name, t in given.items()}
    before = torch.zeros_like(h, dtype=torch.float64, requires_grad=True) if reverse else h.double()
    y, right = selective_scan(
        **{name: t.double() for name, t in cut.items()}, h0=before, dt_softplus=True,
        starts=None if starts is None else starts[:, part], return_last_state=True,
        backend="sequential",
    )  # fmt: skip
    if reverse:
        upstream = [dy[:, part].double(), h.double()]
        (right,) = torch.autograd.grad([y, right], before, upstream)

    A, B, C = kernel._prepared(given["A"], given["B"], given["C"])
    begins = kernel._words(starts)
    u, V, z = (dy, C, given["z"]) if reverse else (given["x"], B, None)
    u, dt, z = (kernel._rows(tensor, True) for tensor in (u, given["dt"], z))
    sizes, rules = (length, chunk, *shape[2:]), (True, False)
    ends, spans = kernel._run_ends(u, dt, A, V, z, given["dt_bias"], begins, sizes, *rules, reverse)
    h, spans = h.mT.double(), spans.unsqueeze(3).double()
    for end, span in zip(ends.flatten(1, 2).unbind(1), spans.flatten(1, 2).unbind(1), strict=True):
        h = torch.where(span < 0, 0, torch.exp(A.double() * span.clamp(min=0)) * h) + end
    assert measuring.relative(h.mT, right) < 5e-6


@needs_triton
@pytest.mark.skipif(DEVICE == "cpu", reason="the same as above")
@pytest.mark.parametrize("name", SHAPES)
def test_triton_on_a_gpu_that_gluon_is_not_for(name, monkeypatch):
    monkeypatch.setattr("mamba_tutorial.kernels.selective_scan._takes", lambda *given: False)
    compare(problem(*SHAPES[name], seed=1), rounding(SHAPES[name][1]), dt_softplus=True)


@needs_triton
@pytest.mark.skipif(DEVICE == "cpu", reason="Gluon has no interpreter")
@pytest.mark.parametrize("without", WITHOUT)
def test_gluon_without_optional_inputs(without):
    compare(problem(8, 70, 2048, 16, without), 5e-6, dt_softplus=True)


@needs_triton
@pytest.mark.skipif(
    DEVICE == "cpu" or importlib.util.find_spec("mamba_ssm") is None,
    reason="compares with mamba_ssm, on a GPU",
)
@pytest.mark.parametrize("shape", [(2, 1000, 128, 16), (4, 300, 320, 16), (1, 500, 64, 8)])
def test_errors_are_not_above_those_of_the_official_kernel(shape):
    """In float32, of the output and of all gradients: at most 1.2 times as large, or 3e-7."""
    inputs = problem(*shape, ("h0",))
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(shape[:3], generator=generator).to(DEVICE)

    def results(scan, dtype=torch.float32):
        leaves = {name: t.to(dtype, copy=True).requires_grad_() for name, t in inputs.items()}
        y = scan(**leaves)
        gradients = torch.autograd.grad(y, list(leaves.values()), upstream.to(dtype))
        return dict(zip(["y", *leaves], [y, *gradients], strict=True))

    def official(x, dt, A, B, C, D, z, dt_bias):
        x, dt, B, C, z = (tensor.mT.contiguous() for tensor in (x, dt, B, C, z))
        return scans.mamba_ssm_scan(x, dt, A, B, C, D, z, dt_bias).mT

    exact = results(partial(selective_scan, dt_softplus=True, backend="sequential"), torch.float64)
    theirs = results(official)
    ours = results(partial(selective_scan, dt_softplus=True, backend="triton"))
    for name, reference in exact.items():
        found, limit = (measuring.relative(result[name], reference) for result in (ours, theirs))
        assert found < max(1.2 * limit, 3e-7), name


@needs_triton
def test_one_program_for_all_lengths(monkeypatch):
    """What is a constant of the forward pass is compiled once more whenever it changes."""
    kernel = importlib.import_module("mamba_tutorial.kernels.selective_scan")
    seen = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *given, **constants: seen.append(constants)

    monkeypatch.setattr(kernel, "_takes", lambda *given: False)
    monkeypatch.setattr(kernel.forward_in_triton, "forward", Recorder())
    monkeypatch.setattr(kernel, "multiprocessors", lambda tensor: 1)
    for length in (70, 71, 130):
        with torch.no_grad():
            selective_scan(**problem(30, length, 3, 4), dt_softplus=True, backend="triton")
    assert len(seen) == 3
    assert seen[0] == seen[1] == seen[2]


@needs_triton
def test_triton_without_gradients_gives_the_same():
    inputs = problem(2, 20, 9, 4)
    with torch.no_grad():
        y = selective_scan(**inputs, dt_softplus=True, backend="triton")
    inputs["x"].requires_grad_()
    assert torch.equal(y, selective_scan(**inputs, dt_softplus=True, backend="triton"))


@needs_triton
@pytest.mark.parametrize("rule", ["mamba", "zoh"])
def test_triton_stays_finite_at_extreme_decays(rule):
    x = torch.ones(1, 20, 2, device=DEVICE, requires_grad=True)
    A = torch.tensor([[-1e4, -1e-6], [0.0, -1.0]], device=DEVICE, requires_grad=True)
    B = torch.ones(1, 20, 2, device=DEVICE)
    dt = torch.full((1, 20, 2), 50.0, device=DEVICE, requires_grad=True)
    y = selective_scan(x, dt, A, B, B, discretization=rule, backend="triton")
    gradients = torch.autograd.grad(y.sum(), [x, dt, A])
    assert all(torch.isfinite(tensor).all() for tensor in (y, *gradients))
    kept, forgotten = 50 * torch.arange(1.0, 21), 50.0 if rule == "mamba" else 1.0
    torch.testing.assert_close(y[0, :, 1].cpu(), kept + forgotten)


@needs_triton
@pytest.mark.skipif(DEVICE == "cpu", reason="where no GPU is, the interpreter would take hours")
def test_triton_on_long_sequences():
    """Decays near 1 − 1e-4: each is off by up to 2 units in the last place, for 10⁴ tokens."""
    inputs = problem(1, 1 << 16, 40, 16)
    off = 1e4 * torch.finfo(torch.float32).eps
    compare(inputs | {"dt": inputs["dt"] - 8}, off, dt_softplus=True)


@needs_triton
def test_the_rows_of_a_chunk_can_be_counted_in_32_bits():
    from mamba_tutorial.kernels.selective_scan import _within_reach

    near, far = (torch.empty(1 << 20, 64, device="meta").as_strided((1, 9, 8), (0, row, 1))
                 for row in (64, 1 << 22))  # fmt: skip
    assert _within_reach(4096, 16, near, near, None) == 4096
    assert _within_reach(4096, 16, near, far, near) == 496  # times 2²² is below 2³¹; 512 is not


@needs_triton
@pytest.mark.usefixtures("as_a_user")
def test_triton_says_what_it_cannot_do():
    double = {name: tensor.double() for name, tensor in problem(1, 3, 2, 2).items()}
    with pytest.raises(ValueError, match=r"computes in float32 on a GPU, not torch\.float64"):
        selective_scan(**double, dt_softplus=True, backend="triton")
    with pytest.raises(ValueError, match="dt holds -"):
        selective_scan(**problem(1, 3, 2, 2), backend="triton")


@needs_triton
@pytest.mark.skipif(DEVICE != "cpu", reason="with a GPU nothing is interpreted")
def test_triton_imported_too_early_is_named():
    code = """
import os
os.environ.pop("TRITON_INTERPRET", None)
import triton.language
import mamba_tutorial.kernels.selective_scan
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "ImportError: there is no GPU, and Triton was imported before" in result.stderr


# the recurrence


@needs_triton
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 37, 5), (1, 300, 33), (2, 16, 3, 4), (3, 20)])
def test_scan_kernel_is_the_recurrence_with_all_its_gradients(shape, reverse):
    generator = torch.Generator().manual_seed(0)
    first = shape[:1] + shape[2:]
    a = torch.rand(shape, generator=generator).to(DEVICE)
    b, upstream = (torch.randn(shape, generator=generator).to(DEVICE) for _ in range(2))
    h0 = torch.randn(first, generator=generator).to(DEVICE)
    found = []
    for method, dtype in (("triton", torch.float32), ("sequential", torch.float64)):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (a, b, h0)]
        h = linear_scan(*leaves, reverse=reverse, method=method)
        found.append([h, *torch.autograd.grad(h, leaves, upstream.to(dtype))])
    for value, exact in zip(*found, strict=True):
        assert (value - exact).abs().max() / exact.abs().max() < 2e-6


@needs_triton
@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("reverse", [False, True])
def test_scan_kernel_looks_back(levels, reverse, monkeypatch):
    """As on a GPU with many processors and few channels; 19 tiles, two of which make a group."""
    kernel = importlib.import_module("mamba_tutorial.kernels.scan")
    monkeypatch.setattr(kernel, "multiprocessors", lambda tensor: 1000)
    monkeypatch.setitem(kernel.TILES, 4, (4, 32))
    monkeypatch.setattr(kernel, "GROUP", 2)
    monkeypatch.setattr(kernel, "LEVELS", levels)
    test_scan_kernel_is_the_recurrence_with_all_its_gradients((2, 75, 3), reverse)


@needs_triton
def test_scan_kernel_passes_nan_on(monkeypatch):
    """Also one with the bits of a word that nobody has written."""
    kernel = importlib.import_module("mamba_tutorial.kernels.scan")
    monkeypatch.setattr(kernel, "multiprocessors", lambda tensor: 1000)
    monkeypatch.setitem(kernel.TILES, 4, (1, 32))
    a = torch.full((1, 5, 1), 0.5, device=DEVICE)
    a[0, 2] = torch.tensor(-1, dtype=torch.int32, device=DEVICE).view(torch.float32)
    h = linear_scan(a, a, method="triton")
    assert h.isnan().flatten().tolist() == [False, False, True, True, True]


@needs_triton
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter would take minutes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 300, 1000), (1, 70000, 40), (2, 5000, 64)])
def test_scan_kernel_at_length(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    a, b, upstream = (torch.rand(shape, generator=generator).to(DEVICE, dtype) for _ in range(3))
    found = []
    for method, precision in (("triton", dtype), ("chunked", torch.float64)):
        leaves = [tensor.to(precision, copy=True).requires_grad_() for tensor in (a, b)]
        h = linear_scan(*leaves, method=method)
        gradients = torch.autograd.grad(h, leaves, upstream.to(precision))
        again = torch.autograd.grad(
            linear_scan(*leaves, method=method), leaves, upstream.to(precision)
        )
        assert all(torch.equal(one, two) for one, two in zip(gradients, again, strict=True))
        found.append([h, *gradients])
    for value, exact in zip(*found, strict=True):
        off = (value.double() - exact).abs().max() / exact.abs().max()
        assert off < (2e-6 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps)


@needs_triton
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter would take hours")
def test_a_million_tokens_that_hardly_forget():
    """Decays within 1e-6 of 1: the states are right but for a rounding at each token."""
    shape = (1, 1 << 20, 64)
    generator = torch.Generator().manual_seed(0)
    a = (1 - 1e-6 * torch.rand(shape, generator=generator)).to(DEVICE).requires_grad_()
    b = torch.randn(shape, generator=generator).to(DEVICE).requires_grad_()
    h = linear_scan(a, b, method="triton")
    with torch.no_grad():
        exact = linear_scan(a.double(), b.double(), method="chunked")
    off = math.sqrt(shape[1]) * torch.finfo(torch.float32).eps
    assert (h.double() - exact).abs().max() < off * exact.abs().max()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(h.sum(), [a, b]))
    inputs = problem(*shape, 16)
    inputs["dt"] -= 12
    upstream = torch.ones_like(inputs["x"]), torch.ones_like(inputs["h0"])
    results = run(inputs, upstream, dt_softplus=True, backend="triton")
    assert all(torch.isfinite(tensor).all() for tensor in results.values())


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scan_kernel_rounds_half_precision_once(dtype):
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(2, 40, 3, generator=generator).to(DEVICE, dtype)
    b = torch.randn(2, 40, 3, generator=generator).to(DEVICE, dtype)
    h = linear_scan(a, b, method="triton")
    assert h.dtype == dtype
    exact = linear_scan(a.double(), b.double(), method="sequential")
    torch.testing.assert_close(h, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


@needs_triton
@pytest.mark.usefixtures("as_a_user")
def test_scan_kernel_says_what_it_cannot_do():
    a = torch.rand(1, 3, 2, dtype=torch.complex64, device=DEVICE)
    with pytest.raises(ValueError, match=r"method is 'triton', .* not torch\.complex64"):
        linear_scan(a, a, method="triton")


# the short convolution, and one token at a time


def sequence_by_sequence(x, before, weight, bias, starts):
    """conv1d and silu of every sequence of a row by itself; only the first has tokens before."""
    rows = []
    for row, first, begins in zip(x, before, starts, strict=True):
        borders = [k for k in begins.nonzero().flatten().tolist() if k > 0]
        zeros = torch.zeros_like(first)
        firsts = [zeros if begins[0] else first] + [zeros] * len(borders)
        parts = row.tensor_split(borders)
        windows = [torch.cat(both).mT for both in zip(firsts, parts, strict=True)]
        channels = len(weight)
        parts = [F.conv1d(w, weight[:, None], bias, groups=channels).mT for w in windows]
        rows.append(F.silu(torch.cat(parts)))
    return torch.stack(rows)


@needs_triton
@pytest.mark.parametrize("share", [0, 0.2, 1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("batch", "length", "channels", "width"),
    [(1, 1, 1, 4), (2, 37, 9, 4), (1, 300, 3, 2), (1, 5, 3, 1)],
)
def test_convolution_kernels_are_conv1d_and_silu(
    batch, length, channels, width, bias, share, monkeypatch
):
    convolve, convolve_token = OPERATORS["causal_conv"], OPERATORS["causal_conv_step"]
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    x, before = (
        random(batch, length, 2 * channels).chunk(2, -1)[0],
        random(batch, width - 1, channels),
    )
    given = [x, before, random(channels, width)] + [random(channels)] * bias
    upstream = random(batch, length, channels)
    starts = (torch.rand(batch, length, generator=generator) < share).to(DEVICE)
    found, gradients = [], OPERATORS["causal_conv_backward"]
    kernel = mock.Mock(wraps=gradients.run)
    monkeypatch.setattr(gradients, "run", kernel)
    for exact in (False, True):
        leaves = [(t.double() if exact else t).detach().requires_grad_() for t in given]
        x, before, weight, *rest = leaves
        rest = *rest, *[None] * (1 - bias)
        if exact:
            y = sequence_by_sequence(x, before, weight, *rest, starts)
        else:
            y = convolve(x, before, weight, *rest, starts if share else None)
        upstream = upstream.to(y.dtype)
        found.append([y, *torch.autograd.grad(y, leaves, upstream, materialize_grads=True)])
    kernel.assert_called_once()  # also where the tokens before have a gradient
    for value, exact in zip(*found, strict=True):
        assert (value - exact).norm() <= 2e-6 * exact.norm()
    with torch.no_grad():
        y, after = convolve_token(given[0][:, 0], *given[1:], *[None] * (1 - bias))
    if not share:
        torch.testing.assert_close(y, found[0][0][:, 0])
    assert torch.equal(after, torch.cat([given[1], given[0]], 1)[:, 1:width])


@needs_triton
@pytest.mark.parametrize("without", WITHOUT[:4])
@pytest.mark.parametrize("name", SHAPES)
def test_decode_kernel_is_the_step(name, without):
    decode = importlib.import_module("mamba_tutorial.kernels.decode")
    batch, _, *sizes = SHAPES[name]
    given = problem(batch, 1, *sizes, without)
    given = {
        key: value[:, 0] if key in {"x", "dt", "B", "C", "z"} else value
        for key, value in given.items()
    }
    given = [given.get(key) for key in ("h0", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")]
    exact = selective_step(*(t if t is None else t.double() for t in given), dt_softplus=True)
    for value, reference in zip(decode.selective_step(*given), exact, strict=True):
        torch.testing.assert_close(value.double(), reference, rtol=2e-6, atol=2e-6)


@pytest.mark.skipif(DEVICE == "cpu", reason="a GPU chooses these kernels by itself")
def test_a_model_on_a_gpu_is_the_model_on_a_cpu():
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(d_model=64, n_layer=2, vocab_size=50))
    ids = torch.randint(50, (3, 40))
    exact = model(ids)
    F.cross_entropy(exact.flatten(0, 1), ids.flatten()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    model = model.cuda()
    logits = model(ids.cuda())
    torch.testing.assert_close(logits.cpu(), exact, rtol=1e-4, atol=1e-4)
    F.cross_entropy(logits.flatten(0, 1), ids.cuda().flatten()).backward()
    for name, p in model.named_parameters():
        error = (p.grad.cpu() - gradients[name]).abs().max()
        assert error < 1e-4 * gradients[name].abs().max() + 1e-7, name
    # one token at a time, started kernel by kernel and as a graph
    with torch.no_grad():
        state = model.initial_state(3)
        for t in range(5):
            step, state = model.step(ids.cuda()[:, t], state)
            torch.testing.assert_close(step, logits[:, t], rtol=1e-4, atol=1e-4)
    graph, state = StepGraph(model, 3), model.initial_state(3)
    for t in range(5):
        step, state = graph(ids.cuda()[:, t], state)
        torch.testing.assert_close(step, logits[:, t], rtol=1e-4, atol=1e-4)
    prompt = ids[:, :5].cuda()
    written = model.generate(prompt, 10, temperature=0)
    for t in range(5, 15):
        best = model(written[:, :t])[:, -1]
        chosen = best.gather(1, written[:, t : t + 1])
        assert (best.max(-1, keepdim=True).values - chosen).max() < 1e-4


@pytest.mark.skipif(DEVICE == "cpu", reason="needs 2³¹ numbers in one tensor")
def test_offsets_beyond_32_bits():
    """One channel of the last sequence, alone and among 2³¹ numbers."""
    shape = (2, 1 << 15, (1 << 15) + 64)
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    A = -torch.ones(shape[2], 16, device=DEVICE)
    B, C = torch.randn(2, *shape[:2], 16, generator=generator, device=DEVICE)
    with torch.no_grad():
        y = selective_scan(x, x, A, B, C, dt_softplus=True)
        part = x[1:, :, -64:].contiguous()
        alone = selective_scan(part, part, A[:64], B[1:], C[1:], dt_softplus=True)
    # the number of programs, so the way the sums are bracketed, differs
    torch.testing.assert_close(y[1:, :, -64:], alone, rtol=2e-2, atol=2e-2)


COMPILE = """
import os, re, subprocess, sys, tempfile
os.environ["TRITON_INTERPRET"] = "0"
import torch
torch.cuda.is_available = lambda: True  # to compile for a GPU, none is needed
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from mamba_tutorial.kernels import conv, decode, scan
from mamba_tutorial.kernels import selective_scan as plain
from mamba_tutorial.kernels.selective_scan import backward_in_gluon, forward_in_gluon

half = {"u_ptr", "x_ptr", "dt_ptr", "z_ptr", "y_ptr", "dy_ptr", "dx_ptr", "ddt_ptr", "dz_ptr"}
common = plain._config(16, dt_softplus=True, exact=False) | {"begins_ptr": None}
softplus = {"SOFTPLUS": True, "HALVES": 2, "begins_ptr": None}
cut = {"CHANNELS": 2048, "GROUP": scan.GROUP, "LEVELS": scan.LEVELS, "REVERSE": True}
cut |= {"num_warps": 1}
tile = dict(zip(("TILE", "BLOCK_C"), scan.TILES[4]))
staged_tile = dict(zip(("TILE", "BLOCK_C"), scan.STAGED_TILE))
rows = {"REVERSE": True} | dict(zip(("TILE", "WIDTH", "num_warps", "STAGES"), scan.STAGED_ROWS[4]))
no_gradient = {"h_ptr": None, "da_ptr": None}
kernels = {
    "forward": (plain.forward_in_triton.forward, common | {"EVERY": 64, "HALVES": 2}),
    "bare": (plain.forward_in_triton.forward, common | {"EVERY": 64, "HALVES": 0}),
    "ends": (plain.forward_in_triton.ends, common | {"HALVES": 2, "REVERSE": False}),
    "plain": (plain.backward_in_triton.backward, common | {"BLOCK_D": plain.BACKWARD_D}),
    "gluon forward": (
        forward_in_gluon.forward,
        forward_in_gluon.config(16) | softplus | {"EVERY": 64, "WHOLE": True},
    ),
    "gluon ends": (
        forward_in_gluon.ends,
        forward_in_gluon.ends_config(16) | softplus | {"WHOLE": True, "REVERSE": False},
    ),
    "few states ends": (
        forward_in_gluon.ends,
        forward_in_gluon.ends_config(4) | softplus | {"WHOLE": False, "REVERSE": True},
    ),
    "gluon backward": (
        backward_in_gluon.backward,
        backward_in_gluon.config(16) | softplus | {"WHOLE": True, "SECTION": 64},
    ),
    "few states": (
        backward_in_gluon.backward,
        backward_in_gluon.config(4) | softplus | {"WHOLE": False, "SECTION": 32},
    ),
    "many states": (
        forward_in_gluon.forward,
        forward_in_gluon.config(128) | softplus | {"EVERY": 64, "WHOLE": False},
    ),
    "many states backward": (
        backward_in_gluon.backward,
        backward_in_gluon.config(128) | softplus | {"WHOLE": False, "SECTION": 64},
    ),
    "tile": (scan.in_triton.scan_tile, cut | tile | no_gradient),
    "staged tile": (scan.in_gluon.scan_tile, cut | staged_tile | no_gradient),
    "staged rows": (scan.in_gluon.scan, rows | no_gradient),
}
kernels |= {
    f"{name} with starts": (kernel, {k: v for k, v in constants.items() if k != "begins_ptr"})
    for name, (kernel, constants) in kernels.items() if "begins_ptr" in constants
}
tools = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin")
backend, chip = sys.argv[1].split(":")
chip = int(chip) if chip.isdigit() else chip
target = GPUTarget(backend, chip, 64 if str(chip).startswith("gfx9") else 32)
without = {"D_ptr", "z_ptr", "bias_ptr", "h0_ptr", "ends_ptr", "spans_ptr", "starts_ptr"}
marked = conv._convolve, conv._upstream, conv._gather


def build(kernel, constants):
    warps = constants["num_warps"]
    constants = {name: v for name, v in constants.items() if name in kernel.arg_names}
    signature = {
        name: "constexpr" if name in constants
        else "*bf16" if name in half
        else "*u8" if kernel in marked and name == "starts_ptr"
        else "*i64" if name == "words_ptr"
        else "*i32" if name == "begins_ptr"
        else "*fp32" if name.endswith("_ptr")
        else "i32"
        for name in kernel.arg_names
    }
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name not in constants
        and name not in {"length", "chunk"}
        and (name.endswith("_ptr") or constants.get("WHOLE", True) or not kernel.is_gluon())
    }
    make = GluonASTSource if kernel.is_gluon() else ASTSource
    source = make(kernel, signature=signature, constexprs=values, attrs=aligned)
    return triton.compile(source, target=target, options={"num_warps": warps}).asm


def tool(content, *command):
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        command = [os.path.join(tools, command[0]), *command[1:], file.name]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


block = {"WIDTH": 4, "BLOCK_T": 4, "BLOCK_C": 32, "num_warps": 1}
early = {"EARLY": backend == "cuda" and chip >= 90}
more = [
    (plain.around.prepare, {"ROWS": 128, "BLOCK_N": 16, "ZEROS": 4096, "num_warps": 4}),
    (plain.around.add_up, {"BLOCK": 512, "num_warps": 4}),
    (scan.in_triton.scan, tile | {"STAGES": 3, "REVERSE": True, "num_warps": 2}),
    (conv._convolve, block),
    (conv._upstream, block | {"TOKENS": 8}),
    (conv._gather, block),
    (decode._step, {"BLOCK_D": 128, "BLOCK_N": 16, "num_warps": 4} | early),
    (decode._conv_step, {"WIDTH": 4, "BLOCK": 128, "num_warps": 1} | early),
]
if chip not in {80, 90}:  # whether there is a program at all
    every = [given for given in kernels.values() if not given[0].is_gluon()] + more
    built = [build(kernel, constants) for kernel, constants in every]
    print("built:", *(len(asm["cubin" if backend == "cuda" else "hsaco"]) for asm in built))
    sys.exit()

for name, (kernel, constants) in kernels.items():
    if name.startswith("bare"):
        constants |= {name: None for name in kernel.arg_names if name in without}
    ptx = build(kernel, constants)["ptx"].encode()
    arch = f"-arch=sm_{chip}" + "a" * (chip == 90)
    print("kernel", name, tool(ptx, "ptxas", "-v", arch, "-o", os.devnull))

def loops(name, **others):
    # how many instructions each loop has, the longest first: from a label to the jump back to it
    kernel, constants = kernels[name]
    place, labels, found = 0, {}, []
    code = build(kernel, constants | others)["cubin"]
    for line in tool(code, "nvdisasm", "-c").splitlines():
        if label := re.match(r"\\s*(\\.L_x_\\d+):", line):
            labels[label[1]] = place
        elif line.lstrip().startswith("/*"):
            place += 1
            if (jump := re.search(r"BRA.*`\\((\\.L_x_\\d+)\\)", line)) and jump[1] in labels:
                found.append(place - labels[jump[1]])
    return sorted(found, reverse=True)


print("instructions per token:", loops("forward", starts_ptr=None)[0] / common["TILE"])
# of all warps, for a pair of a token and a channel; 32 lanes do an instruction together
there, back = (kernels[f"gluon {way}"][1] for way in ("forward", "backward"))
print("per pair, forward:", loops("gluon forward")[0] * there["num_warps"] / there["TILE"])
section, tile_back, tile_there = loops("gluon backward")[:3]  # it holds each of the two once
tiles = 64 // back["TILE"]
section += (tiles - 1) * tile_back + (tiles - 2) * tile_there
print("per pair, backward:", section * back["num_warps"] * 32 / (64 * 64))

# Triton turns an integer argument that is 1 into a Python integer, which has no methods: for all
# chips alike, so one shows it.
small = 0
for kernel, constants in [*kernels.values(), *more] if chip == 90 else []:
    if not kernel.is_gluon() or kernel.__name__.startswith("scan"):  # the others have more
        small += 1
        names = [name for name in kernel.arg_names if name.islower() and "_ptr" not in name]
        build(kernel, dict.fromkeys(names, 1) | constants)
print("sizes of one:", small)
"""

SPILLS = {  # bytes
    "forward": 8,
    "bare": 0,
    "ends": 8,
    "plain": 1024,
    "gluon forward": 0,
    "gluon ends": 0,
    "few states ends": 32,
    "gluon backward": 128,
    "few states": 64,
    "many states": 64,
    "many states backward": 128,
    "tile": 256,
    "staged tile": 0,
    "staged rows": 0,
}
SCANS = [name for name in SPILLS if not name.endswith(("tile", "rows"))]
SPILLS |= {f"{name} with starts": SPILLS[name] for name in SCANS}


@needs_triton
@pytest.mark.parametrize("chip", [80, 90])
def test_triton_compiles_for_two_generations_of_gpus_and_hardly_spills(chip):
    """Without a GPU: the bundled assembler says how many bytes of registers go to memory."""
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, f"cuda:{chip}"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    numbers = r"^kernel ([\w ]+?)  *ptxas.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    found = re.findall(numbers, result.stdout, re.M | re.S)
    assert [name for name, *_ in found] == list(SPILLS)
    for name, spilled, registers in found:
        assert int(spilled) <= SPILLS[name], name
        # eight programs of two warps, or four of four, have room on a multiprocessor
        assert name not in {"gluon forward", "gluon ends"} or int(registers) <= 128
    assert "Used 255 registers" in result.stdout  # the backward pass in Gluon
    count = float(re.search(r"instructions per token: (\S+)", result.stdout)[1])
    assert 5 * 16 < count < 140
    if chip == 90:
        for way, expected in counts.COMPILED.items():
            count = float(re.search(rf"per pair, {way}: (\S+)", result.stdout)[1])
            assert count == pytest.approx(expected, rel=0.03)
    assert f"sizes of one: {19 if chip == 90 else 0}\n" in result.stdout


@needs_triton
@pytest.mark.parametrize("chip", ["cuda:100", "cuda:120", "hip:gfx942", "hip:gfx1100"])
def test_triton_compiles_for_chips_that_are_not_here(chip):
    """Two more generations of NVIDIA's, and AMD's in servers and at home, with 64 and 32 lanes."""
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, chip], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    sizes = re.search(r"built: ([\d ]+)", result.stdout)[1].split()
    assert len(sizes) == 17
    assert min(map(int, sizes)) > 500


def test_amds_chips_are_not_taken_for_nvidias(monkeypatch):
    from mamba_tutorial.kernels import _launch

    class OnAGPU:
        is_cuda, device = True, "cuda:0"

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(torch.version, "hip", None)
    assert _launch.early(OnAGPU)["EARLY"]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert _launch.generation(OnAGPU) == (0, 0)
    assert _launch.early(OnAGPU) == {"EARLY": False}
