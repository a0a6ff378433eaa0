"""The three rules against scipy, against each other, and by the properties that define them."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_tutorial import bilinear, euler, zoh
from mamba_tutorial.discretize import METHODS, exprel, matrix_exp_and_exprel

RULES = [pytest.param(rule, id=name) for name, rule in METHODS.items()]


def random_system(seed, state=4, inputs=2, batch=(), dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(*batch, state, state, generator=generator, dtype=dtype) / state**0.5
    return A, torch.randn(*batch, state, inputs, generator=generator, dtype=dtype)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dt", [1e-4, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("state", [1, 2, 8, 64])
def test_agrees_with_scipy(rule, dt, state):
    A, B = random_system(seed=state, state=state)
    C, D = np.zeros((1, state)), np.zeros((1, 2))
    name = rule.__name__
    expected = scipy.signal.cont2discrete((A.numpy(), B.numpy(), C, D), dt, method=name)[:2]
    for got, want in zip(rule(A, B, dt), expected, strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-14 * np.abs(want).max())


@pytest.mark.parametrize("dt", np.logspace(-8, 1, 28).tolist())
def test_zoh_is_accurate_for_every_step(dt):
    """Small steps too, where torch.matrix_exp alone would lose digits."""
    A, B = random_system(seed=0)
    block = np.zeros((6, 6))
    block[:4] = np.hstack([A.numpy(), B.numpy()])
    expected = scipy.linalg.expm(dt * block)
    A_bar, B_bar = zoh(A, B, dt)
    np.testing.assert_allclose(A_bar, expected[:4, :4], atol=1e-13 * np.abs(expected).max())
    np.testing.assert_allclose(B_bar, expected[:4, 4:], atol=1e-13 * np.abs(B_bar.numpy()).max())


@pytest.mark.parametrize("state", [2, 8, 64])
@pytest.mark.parametrize("fastest", [1e1, 1e3, 1e6, 1e9])
def test_slow_modes_beside_fast_ones(state, fastest):
    """Triangular matrices, whose exponentials SciPy has to the last digits."""
    generator = torch.Generator().manual_seed(state)
    A = -torch.diag(torch.logspace(0, math.log10(fastest), state, dtype=torch.float64))
    A += torch.randn(state, state, generator=generator, dtype=torch.float64).triu(1)
    block = np.block([[A.numpy(), np.eye(state)], [np.zeros((state, 2 * state))]])
    expected = np.split(scipy.linalg.expm(block)[:state], 2, axis=1)
    for result, exact in zip(zoh(A, torch.eye(state, dtype=A.dtype), 1.0), expected, strict=True):
        np.testing.assert_allclose(result, exact, rtol=0, atol=1e-14 * np.abs(exact).max())


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3, 1e8])
def test_a_tracer_halves_more_often_and_finds_the_same(scale):
    Z = scale * random_system(seed=3, state=5, batch=(3,))[0]
    Z = Z - 3 * scale * torch.eye(5, dtype=Z.dtype)
    results = matrix_exp_and_exprel(Z)
    for result, mapped in zip(results, torch.vmap(matrix_exp_and_exprel)(Z), strict=True):
        torch.testing.assert_close(mapped, result, rtol=1e-12, atol=1e-14)


def test_zoh_of_a_singular_matrix():
    """The free mass: position and velocity after a constant push, from school."""
    A = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    B = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    A_bar, B_bar = zoh(A, B, 0.5)
    assert torch.allclose(A_bar, A_bar.new_tensor([[1.0, 0.5], [0.0, 1.0]]), atol=1e-15)
    assert torch.allclose(B_bar, B_bar.new_tensor([[0.125], [0.5]]), atol=1e-15)


@given(seed=st.integers(0, 10**6), first=st.floats(1e-3, 2), second=st.floats(1e-3, 2))
@settings(deadline=None, max_examples=30)
def test_two_held_steps_are_one(seed, first, second):
    A, B = random_system(seed)
    (A1, B1), (A2, B2), (A12, B12) = zoh(A, B, first), zoh(A, B, second), zoh(A, B, first + second)
    assert torch.allclose(A2 @ A1, A12, atol=1e-12 * A12.abs().max().item())
    assert torch.allclose(A2 @ B1 + B2, B12, atol=1e-12 * B12.abs().max().item())


@given(seed=st.integers(0, 10**6), dt=st.floats(1e-3, 10))
@settings(deadline=None, max_examples=30)
def test_stable_stays_stable_with_zoh_and_bilinear(seed, dt):
    A, B = random_system(seed)
    A = A - (torch.linalg.eigvals(A).real.max() + 0.1) * torch.eye(4, dtype=A.dtype)
    for rule in (zoh, bilinear):
        assert torch.linalg.eigvals(rule(A, B, dt)[0]).abs().max() < 1


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_diagonal_equals_dense(rule, dtype):
    A, B = random_system(seed=3, state=5, inputs=5, dtype=dtype)
    a, b = A[0], B[0]
    dense_A, dense_B = rule(torch.diag(a), b[:, None], 0.3)
    diagonal_A, diagonal_B = rule(a, b, 0.3, diagonal=True)
    assert torch.allclose(dense_A, torch.diag(diagonal_A), atol=1e-14)
    assert torch.allclose(dense_B[:, 0], diagonal_B, atol=1e-14)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("diagonal", [False, True])
def test_broadcasts_over_batches(rule, diagonal):
    """A and B of two channels, a step for each of three batch entries and two channels."""
    A, B = random_system(seed=5, batch=(2,))
    if diagonal:
        A, B = A[..., 0], B[..., 0]
    dt = torch.rand(3, 2, dtype=torch.float64) + 0.1
    A_bar, B_bar = rule(A, B, dt, diagonal=diagonal)
    assert A_bar.shape == (3, *A.shape)
    assert B_bar.shape == (3, *B.shape)
    one_A, one_B = rule(A[1], B[1], dt[2, 1], diagonal=diagonal)
    assert torch.allclose(A_bar[2, 1], one_A, atol=1e-14)
    assert torch.allclose(B_bar[2, 1], one_B, atol=1e-14)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("diagonal", [False, True])
def test_gradients(rule, dtype, diagonal):
    A, B = random_system(seed=7, state=3, dtype=dtype)
    if diagonal:
        A, B = torch.cat([A[0], A.new_zeros(1)]), torch.cat([B[:, 0], A.new_ones(1)])  # A = 0 too
    dt = torch.tensor(0.7, dtype=torch.float64)
    arguments = [tensor.clone().requires_grad_() for tensor in (A, B, dt)]
    assert torch.autograd.gradcheck(lambda A, B, dt: rule(A, B, dt, diagonal=diagonal), arguments)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("dtype", "double"),
    [(torch.float32, torch.float64), (torch.complex64, torch.complex128)],
)
def test_single_precision(rule, dtype, double):
    A, B = random_system(seed=9, state=16, dtype=double)
    single = rule(A.to(dtype), B.to(dtype), 0.1)
    for got, want in zip(single, rule(A, B, 0.1), strict=True):
        assert got.dtype == dtype
        assert (got - want).abs().max() < 1e-6 * max(1.0, want.abs().max().item())


@given(re=st.floats(-30, 3), im=st.floats(-30, 30))
def test_exprel(re, im):
    z = complex(re, im)
    exact = sum(z**j / math.factorial(j + 1) for j in range(40)) if abs(z) < 1 else None
    got = exprel(torch.tensor(z, dtype=torch.complex128)).item()
    want = exact if exact is not None else (np.exp(z) - 1) / z
    assert abs(got - want) < 1e-14 * max(1.0, abs(want))


def test_exprel_of_real_numbers_agrees_with_scipy():
    z = torch.cat([torch.linspace(-50, 5, 1001), torch.tensor([0.0, 1e-300, -1e-9])]).double()
    np.testing.assert_allclose(exprel(z), scipy.special.exprel(z.numpy()), rtol=1e-14)


@pytest.mark.usefixtures("as_a_user")
class TestBadInput:
    A = torch.eye(2, dtype=torch.float64)
    B = torch.ones(2, 1, dtype=torch.float64)

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ((A[:, :1], B, 0.1), ValueError, r"A has shape \(2, 1\), expected square"),
            ((A, B[:1], 0.1), ValueError, r"B has shape \(1, 1\), expected .*\(\.\.\., 2, inputs"),
            ((A, B[:, 0], 0.1), ValueError, r"B has shape \(2,\), expected"),
            ((A, B, 0.0), ValueError, "dt holds 0, expected every step to be positive"),
            ((A, B, -1.0), ValueError, "dt holds -1, expected"),
            ((A, B, math.nan), ValueError, "dt holds nan"),
            ((A, B, "0.1"), TypeError, "dt is a str, expected a positive number or tensor"),
            ((A, B, True), TypeError, "dt is a bool"),
            (
                (A, B, torch.tensor(1)),
                TypeError,
                "dt has dtype torch.int64, expected torch.float64",
            ),
            (
                (A, B, torch.ones(3)),
                TypeError,
                "dt has dtype torch.float32, expected torch.float64",
            ),
            ((A * math.nan, B, 0.1), ValueError, r"A holds nan at index \(0, 0\)"),
            ((A, B / 0, 0.1), ValueError, r"B holds inf at index \(0, 0\)"),
            (
                (A.int(), B, 0.1),
                TypeError,
                "A has dtype torch.int32, expected a floating or complex",
            ),
            ((A, B.float(), 0.1), TypeError, "B has dtype torch.float32, expected torch.float64"),
            ((A.tolist(), B, 0.1), TypeError, "A is a list, expected a torch.Tensor"),
            ((A, B.to("meta"), 0.1), ValueError, "B is on device meta, expected cpu"),
            (
                (A.expand(2, 2, 2), B, torch.ones(3).double()),
                ValueError,
                r"batch axes do not broadcast together: A \(2,\), B \(\), dt \(3,\)",
            ),
        ],
    )
    def test_message(self, rule, arguments, error, message):
        with pytest.raises(error, match=message):
            rule(*arguments)

    @pytest.mark.parametrize("rule", RULES)
    def test_diagonal_shapes(self, rule):
        with pytest.raises(ValueError, match=r"B has shape \(3,\), expected \(\.\.\., state\)"):
            rule(torch.ones(2), torch.ones(3), 0.1, diagonal=True)

    def test_bilinear_without_an_inverse(self):
        with pytest.raises(ValueError, match="dt makes 2 an eigenvalue of dt A"):
            bilinear(2 * self.A, self.B, 1.0)
        with pytest.raises(ValueError, match="dt makes 2 an eigenvalue of dt A"):
            bilinear(torch.tensor([2.0]), torch.ones(1), 1.0, diagonal=True)


def test_euler_is_the_tangent():
    A, B = random_system(seed=11)
    A_bar, B_bar = euler(A, B, 0.25)
    assert torch.equal(A_bar, torch.eye(4, dtype=A.dtype) + 0.25 * A)
    assert torch.equal(B_bar, 0.25 * B)
