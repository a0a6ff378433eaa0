"""The compiled loops: their pieces against numpy and scipy, the whole against the definition.

The Triton kernels run on a GPU where there is one, else in Triton's interpreter.
"""

import importlib.util
import re
import subprocess
import sys

import numba
import numpy as np
import pytest
import scipy.special
import torch

from mamba_tutorial.kernels import cpu
from mamba_tutorial.selective import selective_scan

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
    assert 0 < low < 2e-38
    assert 1e38 < high < np.inf
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


@needs_triton
@pytest.mark.parametrize("rule", ["mamba", "zoh"])
@pytest.mark.parametrize("name", SHAPES)
def test_triton_is_the_definition_with_all_its_gradients(name, rule):
    compare(problem(*SHAPES[name], seed=1), 2e-6, dt_softplus=True, discretization=rule)


@needs_triton
@pytest.mark.parametrize("without", WITHOUT)
def test_triton_without_optional_inputs(without):
    compare(problem(2, 11, 5, 4, without), 2e-6, dt_softplus=True)


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
def test_triton_is_repeatable_to_the_bit():
    inputs = problem(2, 20, 20, 16)
    upstream = torch.ones_like(inputs["x"]), torch.ones_like(inputs["h0"])
    first, second = (run(inputs, upstream, dt_softplus=True, backend="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


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
@pytest.mark.usefixtures("as_a_user")
def test_triton_says_what_it_cannot_do():
    double = {name: tensor.double() for name, tensor in problem(1, 3, 2, 2).items()}
    with pytest.raises(ValueError, match=r"computes in float32 on a GPU, not torch\.float64"):
        selective_scan(**double, dt_softplus=True, backend="triton")
    with pytest.raises(ValueError, match="dt has minimum -"):
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


COMPILE = """
import os, subprocess, sys, tempfile
os.environ["TRITON_INTERPRET"] = "0"
import torch
torch.cuda.is_available = lambda: True  # to compile for a GPU, none is needed
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from mamba_tutorial.kernels import selective_scan as plain
from mamba_tutorial.kernels import selective_scan_backward as gluon

half = {"u_ptr", "x_ptr", "dt_ptr", "z_ptr", "y_ptr", "dy_ptr", "dx_ptr", "ddt_ptr", "dz_ptr"}
common = plain._config(16, dt_softplus=True) | {"EXACT": False}
layout = {"SOFTPLUS": True, "TILE": 4, "SECTION": 64, "STAGES": 3, "num_warps": gluon.WARPS}
kernels = {
    "forward": (plain._forward, common | {"EVERY": 64}),
    "bare": (plain._forward, common | {"EVERY": 64}),
    "ends": (plain._ends, common | {"REVERSE": True}),
    "plain": (plain._backward, common | {"BLOCK_D": plain.BACKWARD_D}),
    "gluon": (gluon.backward, layout),
}
ptxas = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/ptxas")
chip = int(sys.argv[1])
without = {"D_ptr", "z_ptr", "bias_ptr", "h0_ptr", "ends_ptr", "spans_ptr", "starts_ptr"}
for name, (kernel, constants) in kernels.items():
    if name == "bare":
        constants |= {name: None for name in kernel.arg_names if name in without}
    warps = constants.pop("num_warps")
    signature = {
        name: "constexpr" if name in constants
        else "*bf16" if name in half
        else "*fp32" if name.endswith("_ptr")
        else "i32"
        for name in kernel.arg_names
    }
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name not in constants and name not in {"length", "chunk"}
    }
    make = GluonASTSource if kernel.is_gluon() else ASTSource
    source = make(kernel, signature=signature, constexprs=values, attrs=aligned)
    target = GPUTarget("cuda", chip, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        arch = f"-arch=sm_{chip}" + "a" * (chip == 90)
        command = [ptxas, "-v", arch, file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    print("kernel", name, said)
"""

SPILLS = {"forward": 8, "bare": 0, "ends": 0, "plain": 512, "gluon": 256}  # bytes at most


@needs_triton
@pytest.mark.parametrize("chip", [80, 90])
def test_triton_compiles_for_two_generations_of_gpus_and_hardly_spills(chip):
    """Without a GPU: the bundled assembler says how many bytes of registers go to memory."""
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, str(chip)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    found = re.findall(r"^kernel (\w+) .*?(\d+) bytes spill stores", result.stdout, re.M | re.S)
    assert [name for name, _ in found] == list(SPILLS)
    for name, spilled in found:
        assert int(spilled) <= SPILLS[name], name
