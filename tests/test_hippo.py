"""HiPPO against its definition: projections of the past, computed directly."""

import math

import numpy as np
import pytest
import scipy.special
import torch

from mamba_tutorial.hippo import (
    basis,
    dplr,
    hippo_fourier,
    hippo_legs,
    hippo_legt,
    nplr,
    online_memory,
)


def staircase(seed=0, length=120):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, generator=generator, dtype=torch.float64).cumsum(0)


def projection(x, n, measure):
    """Project a staircase on the basis by quadrature, exact for a polynomial times a constant."""
    nodes, weights = np.polynomial.legendre.leggauss(32)
    position = (np.arange(len(x))[:, None] + (nodes + 1) / 2) / len(x)
    values = basis(torch.as_tensor(position.ravel()), n, measure).reshape(len(x), 32, n)
    return torch.einsum("k,kjn,j->n", x, values, torch.as_tensor(weights / 2)) / len(x)


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_legs_matrix(n):
    A, B = hippo_legs(n)
    assert torch.equal(A, torch.tril(A))
    assert torch.equal(A.diagonal(), -torch.arange(1.0, n + 1).double())
    for i in range(n):
        assert math.isclose(B[i, 0], (2 * i + 1) ** 0.5)
        for k in range(i):
            assert math.isclose(A[i, k], -math.sqrt((2 * i + 1) * (2 * k + 1)))


def test_eigenvalues_of_legs():
    eigenvalues = torch.linalg.eigvals(hippo_legs(8)[0]).real.sort().values
    assert torch.allclose(eigenvalues, -torch.arange(8.0, 0, -1).double())


@pytest.mark.parametrize("n", [2, 8, 64, 256])
def test_normal_plus_low_rank(n):
    A, _ = hippo_legs(n)
    S, P = nplr(n)
    assert torch.allclose(S - torch.outer(P, P), A, atol=1e-9)
    assert torch.allclose(S + S.mT, -torch.eye(n).double(), atol=1e-9)
    assert torch.allclose(S @ S.mT, S.mT @ S, atol=1e-6)


@pytest.mark.parametrize("n", [2, 8, 64, 256])
def test_diagonal_plus_low_rank(n):
    A, B = hippo_legs(n)
    Lambda, P, B_modes, V = dplr(n)
    identity = torch.eye(n, dtype=torch.complex128)
    assert torch.allclose(V.mH @ V, identity, atol=1e-11)
    back = V @ (torch.diag(Lambda) - torch.outer(P, P.conj())) @ V.mH
    assert torch.allclose(back, A.to(back), atol=1e-10 * n)
    assert torch.allclose(V @ B_modes, B[:, 0].to(V), atol=1e-10 * n)
    assert torch.equal(Lambda.real, torch.full((n,), -0.5).double())
    for half in (Lambda, P, B_modes):
        assert torch.allclose(half[: n // 2], half[n // 2 :].conj(), atol=1e-10)
    assert (Lambda.imag[: n // 2] > 0).all()


@pytest.mark.parametrize("measure", ["legs", "legt", "fourier"])
def test_basis_is_orthonormal(measure):
    nodes, weights = np.polynomial.legendre.leggauss(100)
    values = basis(torch.as_tensor((nodes + 1) / 2), 21, measure)
    gram = values.mT @ (torch.as_tensor(weights / 2)[:, None] * values)
    assert torch.allclose(gram, torch.eye(21).double(), atol=1e-12)


def test_legendre_basis_agrees_with_scipy():
    position = torch.linspace(0, 1, 50).double()
    values = basis(position, 12)
    for n in range(12):
        expected = (2 * n + 1) ** 0.5 * scipy.special.eval_legendre(n, 2 * position.numpy() - 1)
        np.testing.assert_allclose(values[:, n], expected, atol=1e-12)


def test_legs_memory_is_the_projection_of_the_whole_past():
    x = staircase()
    c = online_memory(x, 16)
    for end in (1, 2, 50, 120):
        assert torch.allclose(c[end - 1], projection(x[:end], 16, "legs"), atol=1e-10)


def test_legs_memory_does_not_know_the_speed():
    """A signal at half the speed leaves the same state: LegS has no time scale."""
    x = staircase()
    fast, slow = online_memory(x, 12), online_memory(x.repeat_interleave(2), 12)
    assert torch.allclose(slow[1::2], fast, atol=1e-10)


@pytest.mark.parametrize(("measure", "n"), [("legt", 16), ("fourier", 17)])
def test_window_memory_is_close_to_the_projection_of_the_window(measure, n):
    """Close, not equal: what leaves the window is taken from the reconstruction."""
    t = torch.arange(400).double()
    x = torch.sin(t / 9) + torch.cos(t / 23)
    c = online_memory(x, n, measure, window=80.0)
    direct = projection(x[-80:], n, measure)
    assert (c[-1] - direct).norm() < 0.2 * direct.norm()
    position = (torch.arange(80).double() + 0.5) / 80
    error = basis(position, n, measure) @ c[-1] - x[-80:]
    assert error.norm() < {"legt": 0.03, "fourier": 0.16}[measure] * x[-80:].norm()


def test_batches_and_single_precision():
    x = torch.stack([staircase(0), staircase(1)])
    c = online_memory(x, 8)
    assert c.shape == (2, 120, 8)
    assert torch.allclose(c[1], online_memory(x[1], 8))
    single = online_memory(x.float(), 8)
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), c, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: hippo_legs(0), ValueError, "n is 0, expected at least 1"),
        (lambda: hippo_legt(2.0), TypeError, "n is a float, expected a whole number"),
        (lambda: hippo_fourier(4), ValueError, "n is 4, expected an odd number"),
        (lambda: dplr(3), ValueError, "n is 3, expected an even number"),
        (
            lambda: basis(torch.ones(2), 3, "laguerre"),
            ValueError,
            "measure is 'laguerre', expected",
        ),
        (lambda: online_memory(torch.ones(5), 3, "legt"), ValueError, "window is None, expected"),
        (
            lambda: online_memory(torch.ones(5), 3, window=2.0),
            ValueError,
            "window is 2.0, expected",
        ),
        (lambda: online_memory(torch.ones(0), 3), ValueError, "the length of x is 0, expected"),
        (lambda: online_memory(torch.ones(5).int(), 3), TypeError, "x has dtype torch.int32"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
