"""The structured kernels against the naive one, and the layers' two views against each other."""

import math
import os
import subprocess
import sys

import pytest
import torch

from mamba_tutorial import StateSpace, bilinear, zoh
from mamba_tutorial.hippo import dplr, hippo_legs
from mamba_tutorial.s4 import (
    S4,
    S4D,
    SequenceModel,
    diagonal_init,
    diagonal_kernel,
    dplr_kernel,
    truncate,
)


def legs_in_both_forms(n, length, seed=0):
    """The naive kernel of LegS, float64, and the arguments of `dplr_kernel` for the same system."""
    A, B = hippo_legs(n)
    generator = torch.Generator().manual_seed(seed)
    C = torch.randn(1, n, generator=generator, dtype=torch.float64)
    dt = torch.tensor(1 / max(length, 16), dtype=torch.float64)
    naive = StateSpace(A, B, C).discretize(dt, "bilinear").kernel(length)[:, 0, 0]
    Lambda, P, B_modes, V = dplr(n)
    dense = torch.diag(Lambda) - torch.outer(P, P.conj())
    A_bar, _ = bilinear(dense, B_modes[:, None], dt)
    return naive, (Lambda, P, B_modes, truncate((C.to(V) @ V)[0], A_bar, length), dt)


@pytest.mark.parametrize("n", [2, 16, 64, 256])
@pytest.mark.parametrize("length", [1, 2, 3, 17, 1024, 16384])
def test_dplr_kernel_is_the_naive_kernel(n, length):
    naive, arguments = legs_in_both_forms(n, length)
    kernel = dplr_kernel(*arguments, length)
    assert (kernel - naive).norm() < 1e-10 * naive.norm()
    single = [a.to(torch.complex64) if a.is_complex() else a.float() for a in arguments]
    assert (dplr_kernel(*single, length) - naive).norm() < 1e-3 * naive.norm()


def test_dplr_kernel_of_many_channels():
    systems = [legs_in_both_forms(8, 50, seed) for seed in range(3)]
    arguments = [torch.stack(column) for column in zip(*(a for _, a in systems), strict=True)]
    kernels = dplr_kernel(*arguments, 50)
    for kernel, (naive, _) in zip(kernels, systems, strict=True):
        assert torch.allclose(kernel, naive, atol=1e-10)


@pytest.mark.skipif(os.name == "nt", reason="Windows does not tell how much memory was used")
def test_memory_of_the_dplr_kernel_is_the_sum_and_not_the_product():
    """Forward and backward, in a fresh process: the Cauchy matrix must never exist."""
    code = """
import resource, sys, torch
from mamba_tutorial.hippo import dplr
from mamba_tutorial.s4 import dplr_kernel
n, length = int(sys.argv[1]), 1 << 18
Lambda, P, B, _ = dplr(n)
dplr_kernel(Lambda, P, B, torch.ones_like(B), torch.tensor(1e-6).double(), 1 << 10)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
C = torch.ones_like(B).requires_grad_()
dplr_kernel(Lambda, P, B, C, torch.tensor(1e-6).double(), length).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    unit = 1 if sys.platform == "darwin" else 1024
    few, many = (
        unit
        * int(
            subprocess.run([sys.executable, "-c", code, n], capture_output=True, check=True).stdout
        )
        for n in ("16", "256")
    )
    product = 256 * (1 << 17) * 16  # bytes of a Cauchy matrix of all modes and roots
    assert many < 0.2 * product
    assert many < 4 * max(few, 1 << 26)


@pytest.mark.parametrize("n", [2, 16, 64])
@pytest.mark.parametrize("length", [1, 2, 5, 64, 1000])
def test_diagonal_kernel_is_the_naive_kernel(n, length):
    generator = torch.Generator().manual_seed(n)
    A = diagonal_init(n, "lin")
    C = torch.randn(n // 2, generator=generator, dtype=torch.complex128)
    A_bar, B_bar = zoh(A, torch.ones_like(A), 0.05, diagonal=True)
    both = [torch.cat([half, half.conj()]) for half in (A, torch.ones_like(A), C)]
    system = StateSpace(torch.diag(both[0]), both[1][:, None], both[2][None])
    naive = system.discretize(0.05).kernel(length)[:, 0, 0]
    assert naive.imag.abs().max() < 1e-12
    assert torch.allclose(diagonal_kernel(A_bar, C * B_bar, length), naive.real, atol=1e-11)


def test_diagonal_inits():
    n = 8
    assert torch.equal(diagonal_init(n, "real").real, -torch.arange(1.0, 5).double())
    lin, inv = diagonal_init(n, "lin"), diagonal_init(n, "inv")
    assert torch.equal(lin.real, torch.full((4,), -0.5).double())
    assert torch.allclose(lin.imag, math.pi * torch.arange(4.0).double())
    assert math.isclose(inv[0].imag.item(), n / math.pi * (n - 1))
    assert math.isclose(inv[3].imag.item(), n / math.pi * (n / 7 - 1))
    assert torch.equal(diagonal_init(n, "legs"), dplr(n).Lambda[:4])


def test_gradients():
    _, arguments = legs_in_both_forms(4, 6)
    leaves = [a.clone().requires_grad_() for a in arguments]
    assert torch.autograd.gradcheck(lambda *a: dplr_kernel(*a, 6), leaves)
    A_bar, CB_bar = (torch.randn(2, 3, dtype=torch.complex128) * 0.5 for _ in range(2))
    leaves = [A_bar.requires_grad_(), CB_bar.requires_grad_()]
    assert torch.autograd.gradcheck(lambda a, c: diagonal_kernel(a, c, 5), leaves)


LAYERS = [
    pytest.param(lambda: S4(6, 8), id="S4"),
    *(
        pytest.param(lambda k=k: S4D(6, 8, k), id=f"S4D-{k}")
        for k in ("legs", "lin", "inv", "real")
    ),
]


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("length", [1, 2, 33, 200])
def test_step_by_step_is_the_convolution(make, length):
    torch.manual_seed(0)
    layer, x = make(), torch.randn(2, length, 6)
    y = layer(x)
    assert y.shape == x.shape
    state, outputs = layer.initial_state(2), []
    for token in x.unbind(1):
        output, state = layer.step(token, state)
        outputs.append(output)
    assert torch.allclose(torch.stack(outputs, dim=1), y, atol=1e-4)


@pytest.mark.parametrize("make", LAYERS)
def test_step_by_step_is_the_convolution_after_training(make):
    torch.manual_seed(0)
    layer = make()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    for _ in range(20):
        x = torch.randn(4, 30, 6)
        loss = ((layer(x) - x.roll(3, dims=1)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
        optimizer.step()
    with torch.no_grad():
        y, state = layer(x), layer.initial_state(4)
        for k, token in enumerate(x.unbind(1)):
            output, state = layer.step(token, state)
            assert torch.allclose(output, y[:, k], atol=1e-4)


def test_layers_are_causal():
    torch.manual_seed(0)
    layer, x = S4D(6, 8), torch.randn(1, 20, 6)
    changed = x.clone()
    changed[:, 12:] += 1
    assert torch.allclose(layer(x)[:, :12], layer(changed)[:, :12], atol=1e-5)


def test_eigenvalues_can_be_given():
    A = torch.tensor([-1.0 + 2j, -0.5 + 0j])
    layer = S4D(3, 4, init=A)
    assert torch.allclose(torch.complex(-layer.log_A_real.exp(), layer.A_imag)[2], A)


def test_sequence_model():
    torch.manual_seed(0)
    layers = [S4D(8, 4), S4D(8, 4)]
    pooled = SequenceModel(torch.nn.Linear(1, 8), layers, torch.nn.Linear(8, 3), pool=True)
    assert pooled(torch.randn(5, 11, 1)).shape == (5, 3)
    tokens = SequenceModel(torch.nn.Embedding(7, 8), layers, torch.nn.Linear(8, 7), pool=False)
    assert tokens(torch.randint(7, (5, 11))).shape == (5, 11, 7)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: S4(0, 8), ValueError, "d_model is 0, expected at least 1"),
        (lambda: S4(4, 7), ValueError, "d_state is 7, expected an even number"),
        (lambda: S4D(4, 7), ValueError, "d_state is 7, expected an even number"),
        (lambda: S4D(4, 8, "hippo"), ValueError, "init is 'hippo', expected one of 'legs'"),
        (
            lambda: S4D(4, 8, torch.ones(4) + 0j),
            ValueError,
            "real part of 1, expected all negative",
        ),
        (lambda: S4D(4, 8, -torch.ones(3) + 0j), ValueError, r"init has shape \(3,\), expected"),
        (lambda: S4D(4, 8)(torch.ones(2, 5, 3)), ValueError, r"x has shape \(2, 5, 3\), expected"),
        (lambda: S4D(4, 8).initial_state(-1), ValueError, "batch is -1, expected at least 0"),
        (
            lambda: S4D(4, 8).step(torch.ones(2, 4), torch.zeros(3, 4, 4) + 0j),
            ValueError,
            r"state has shape \(3, 4, 4\), expected",
        ),
        (
            lambda: diagonal_kernel(torch.ones(2) + 0j, torch.ones(3) + 0j, 5),
            ValueError,
            r"CB_bar has shape \(3,\), expected",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
