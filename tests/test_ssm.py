"""StateSpace against scipy and by the properties of a linear time-invariant system."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.signal
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_tutorial import DiscreteStateSpace, StateSpace, causal_convolution, zoh


def random_system(seed, state=4, inputs=2, outputs=3, skip=True):
    generator = torch.Generator().manual_seed(seed)

    def draw(rows, columns):
        return torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    A = draw(state, state)
    A = A - (torch.linalg.eigvals(A).real.max() + 0.1) * torch.eye(state, dtype=A.dtype)
    D = draw(outputs, inputs) if skip else None
    return StateSpace(A, draw(state, inputs), draw(outputs, state), D)


def matrices(system):
    D = torch.zeros(len(system.C), system.B.shape[1]) if system.D is None else system.D
    return [matrix.numpy() for matrix in (system.A, system.B, system.C, D)]


def signal(seed, length, inputs=2):
    return torch.randn(
        length, inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


@pytest.mark.parametrize("between", ["line", "hold"])
@pytest.mark.parametrize("dt", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("skip", [True, False])
def test_simulate_agrees_with_scipy(between, dt, skip):
    system, x = random_system(seed=1, skip=skip), signal(2, 200)
    h0 = torch.ones(4, dtype=torch.float64)
    y, h = system.simulate(x, dt, h0, between=between)
    _, y_scipy, h_scipy = scipy.signal.lsim(
        matrices(system), x.numpy(), dt * np.arange(200), h0.numpy(), interp=between == "line"
    )
    np.testing.assert_allclose(y, y_scipy, atol=1e-11 * np.abs(y_scipy).max())
    np.testing.assert_allclose(h, h_scipy, atol=1e-11 * np.abs(h_scipy).max())


def test_simulate_solves_the_differential_equation():
    """A general solver, which knows no matrix exponential, finds the same states."""
    system, x = random_system(seed=3), signal(4, 9)
    _, h = system.simulate(x, 0.5)
    A, B, *_ = matrices(system)
    times = 0.5 * np.arange(9)

    def slope(t, h):
        return A @ h + B @ np.array([np.interp(t, times, column) for column in x.numpy().T])

    reference = scipy.integrate.solve_ivp(
        slope, (0, 4), np.zeros(4), t_eval=times, rtol=1e-10, atol=1e-12, max_step=0.05
    )
    np.testing.assert_allclose(h, reference.y.T, atol=1e-8)


def test_recurrence_is_the_held_solution():
    system, x = random_system(seed=5), signal(6, 100)
    _, h_held = system.simulate(x, 0.2, between="hold")
    _, h = system.discretize(0.2).recur(x)
    assert torch.allclose(h[:-1], h_held[1:], atol=1e-13)


def test_recurrence_agrees_with_dlsim():
    """Scipy's output comes before the update: without D it is ours, one step late."""
    system, x = random_system(seed=7, skip=False).discretize(0.3, "bilinear"), signal(8, 50)
    A_bar, B_bar, C = (matrix.numpy() for matrix in (system.A_bar, system.B_bar, system.C))
    _, y_scipy, _ = scipy.signal.dlsim((A_bar, B_bar, C, np.zeros((3, 2)), 0.3), x.numpy())
    np.testing.assert_allclose(system.recur(x)[0][:-1], y_scipy[1:], atol=1e-12)


@given(split=st.integers(1, 19), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_recurrence_can_be_continued(split, seed):
    system, x = random_system(seed).discretize(0.1), signal(seed, 20)
    y, h = system.recur(x)
    first, h_first = system.recur(x[:split])
    second, h_second = system.recur(x[split:], h_first[-1])
    assert torch.allclose(torch.cat([first, second]), y, atol=1e-13)
    assert torch.allclose(h_second[-1], h[-1], atol=1e-13)


def test_batches():
    system, x = random_system(seed=9), torch.stack([signal(i, 30) for i in range(3)])
    h0 = signal(10, 3, inputs=4)
    y, h = system.simulate(x, 0.1, h0)
    assert y.shape == (3, 30, 3)
    assert h.shape == (3, 30, 4)
    for entry in range(3):
        assert torch.allclose(y[entry], system.simulate(x[entry], 0.1, h0[entry])[0], atol=1e-13)


def test_one_sample():
    system, x = random_system(seed=11), signal(12, 1)
    y, h = system.simulate(x, 0.1)
    assert torch.equal(h, torch.zeros(1, 4, dtype=torch.float64))
    assert torch.allclose(y, x @ system.D.mT)


def test_impulse_response_is_the_answer_to_a_short_kick():
    system = random_system(seed=13, inputs=1, outputs=1, skip=False)
    dt = 1e-5
    kick = torch.zeros(50_001, 1, dtype=torch.float64)
    kick[0] = 1 / dt
    y, _ = system.simulate(kick, dt, between="hold")
    t = torch.tensor([0.1, 0.5], dtype=torch.float64)
    K = system.impulse_response(t)
    assert K.shape == (2, 1, 1)
    assert torch.allclose(K[:, 0], y[[10_000, 50_000]], rtol=1e-3)
    at_zero = system.impulse_response(torch.zeros((), dtype=torch.float64))
    assert torch.allclose(at_zero, system.C @ system.B)


def test_a_system_of_complex_modes():
    """A real system in the coordinates of its eigenvectors gives the same real output."""
    system, x = random_system(seed=15), signal(16, 40)
    eigenvalues, V = torch.linalg.eig(system.A)
    modes = StateSpace(
        torch.diag(eigenvalues), torch.linalg.solve(V, system.B.to(V)), system.C.to(V) @ V
    )
    y, _ = modes.simulate(x.to(V), 0.1)
    plain = StateSpace(system.A, system.B, system.C)
    assert y.imag.abs().max() < 1e-10
    assert torch.allclose(y.real, plain.simulate(x, 0.1)[0], atol=1e-10)


def test_gradients_reach_everything():
    def run(A, B, C, D, dt, x, h0):
        return StateSpace(A, B, C, D).discretize(dt).recur(x, h0)

    system = random_system(seed=17, state=2, inputs=1, outputs=1)
    dt = torch.tensor(0.3, dtype=torch.float64)
    tensors = [system.A, system.B, system.C, system.D, dt, signal(18, 5, 1), signal(19, 1, 2)[0]]
    assert torch.autograd.gradcheck(run, [t.clone().requires_grad_() for t in tensors])


@pytest.mark.parametrize("method", ["zoh", "bilinear", "euler"])
def test_discretize_keeps_the_eyes(method):
    system = random_system(seed=21)
    steps = system.discretize(torch.tensor(0.1, dtype=torch.float64), method)
    assert steps.C is system.C
    assert steps.D is system.D
    if method == "zoh":
        assert torch.equal(steps.A_bar, zoh(system.A, system.B, 0.1)[0])


def stable_system(seed, state=4):
    return random_system(seed, state=state).discretize(0.3)


@given(seed=st.integers(0, 10**6), length=st.integers(1, 70), state=st.integers(1, 6))
@settings(deadline=None, max_examples=40)
def test_convolution_is_the_recurrence(seed, length, state):
    system, x = stable_system(seed, state), signal(seed + 1, length)
    y = system.recur(x)[0]
    for method in ("fft", "direct"):
        assert torch.allclose(system.convolve(x, method), y, atol=1e-10)


def test_kernel_is_the_answer_to_a_kick():
    system = stable_system(23)
    kernel = system.kernel(12)
    for column, kick in enumerate(torch.eye(2, dtype=torch.float64)):
        x = torch.zeros(12, 2, dtype=torch.float64)
        x[0] = kick
        y = system.recur(x)[0] - x @ system.D.mT
        assert torch.allclose(kernel[:, :, column], y, atol=1e-13)


def test_convolution_of_batches_and_complex_numbers():
    system = stable_system(25)
    x = torch.stack([signal(i, 20) for i in range(3)])
    assert torch.allclose(system.convolve(x)[1], system.convolve(x[1]), atol=1e-12)
    modes = StateSpace(
        torch.diag(torch.tensor([-0.1 + 2j, -0.3 - 1j])).to(torch.complex128),
        torch.ones(2, 2, dtype=torch.complex128),
        torch.ones(1, 2, dtype=torch.complex128),
    ).discretize(0.2)
    z = x.to(torch.complex128)
    for method in ("fft", "direct"):
        assert torch.allclose(modes.convolve(z, method), modes.recur(z)[0], atol=1e-12)


@given(length=st.integers(1, 40), taps=st.integers(1, 60), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_causal_convolution_agrees_with_numpy(length, taps, seed):
    x, kernel = signal(seed, length), signal(seed + 1, taps)
    expected = [
        np.convolve(a, b)[:length] for a, b in zip(x.numpy().T, kernel.numpy().T, strict=True)
    ]
    for method in ("fft", "direct"):
        y = causal_convolution(x, kernel, method)
        np.testing.assert_allclose(y, np.stack(expected, axis=1), atol=1e-12)


@pytest.mark.parametrize("method", ["fft", "direct"])
def test_gradients_of_the_convolution(method):
    tensors = [signal(1, 6).requires_grad_(), signal(2, 4).requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, k: causal_convolution(x, k, method), tensors)


@pytest.mark.usefixtures("as_a_user")
class TestBadInput:
    A, B, C = torch.eye(2), torch.ones(2, 1), torch.ones(1, 2)
    system = StateSpace(-A, B, C)
    steps = DiscreteStateSpace(0.5 * A, B, C)

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda s: StateSpace(s.B, s.B, s.C), ValueError, r"A has shape \(2, 1\), expected sq"),
            (lambda s: StateSpace(s.A, s.C, s.C), ValueError, r"B has shape \(1, 2\), expected"),
            (lambda s: StateSpace(s.A, s.B, s.B), ValueError, r"C has shape \(2, 1\), expected"),
            (lambda s: StateSpace(s.A, s.B, s.C, s.A), ValueError, r"D has shape \(2, 2\), exp"),
            (
                lambda s: StateSpace(s.A[None], s.B, s.C),
                ValueError,
                "A has shape .*, expected \\(state, state\\)",
            ),
            (lambda s: StateSpace(s.A.int(), s.B, s.C), TypeError, "A has dtype torch.int32"),
            (lambda s: StateSpace(s.A, s.B.double(), s.C), TypeError, "B has dtype torch.float64"),
            (lambda s: StateSpace(s.A, s.B, s.C / 0), ValueError, "C holds inf"),
            (lambda s: DiscreteStateSpace(s.B, s.B, s.C), ValueError, "A_bar has shape"),
            (lambda s: s.system.discretize(0.1, "tustin"), ValueError, "method is 'tustin', exp"),
            (lambda s: s.system.discretize(0.0), ValueError, "dt holds 0"),
            (lambda s: s.system.discretize(torch.ones(2)), ValueError, r"dt has shape \(2,\), exp"),
            (lambda s: s.system.simulate(torch.ones(5), 0.1), ValueError, r"x has shape \(5,\)"),
            (lambda s: s.system.simulate(torch.ones(5, 2), 0.1), ValueError, r"length, 1\)"),
            (lambda s: s.system.simulate(s.B, 0.1, between="dots"), ValueError, "between is 'do"),
            (lambda s: s.system.simulate(s.B.long(), 0.1), TypeError, "x has dtype torch.int64"),
            (lambda s: s.system.simulate(s.B * math.nan, 0.1), ValueError, "x holds nan"),
            (lambda s: s.system.simulate(s.B.to("meta"), 0.1), ValueError, "x is on device meta"),
            (lambda s: s.steps.recur(torch.ones(0, 1)), ValueError, "length of at least 1"),
            (lambda s: s.steps.recur(s.B, torch.ones(3)), ValueError, r"h0 has shape \(3,\), exp"),
            (lambda s: s.steps.kernel(0), ValueError, "length is 0, expected at least 1"),
            (lambda s: s.steps.kernel(2.0), TypeError, "length is a float, expected a whole"),
            (lambda s: s.steps.convolve(s.B, "slow"), ValueError, "method is 'slow', expected"),
            (lambda s: s.steps.convolve(s.A), ValueError, r"x has shape \(2, 2\), expected"),
            (lambda s: causal_convolution(s.A, s.B), ValueError, r"kernel has shape \(2, 1\), exp"),
            (lambda s: causal_convolution(s.A, s.A.double()), TypeError, "kernel has dtype"),
            (lambda s: s.system.impulse_response(-torch.ones(1)), ValueError, "t holds -1"),
            (lambda s: s.system.impulse_response(1.0), TypeError, "t is a float, expected a torch"),
        ],
    )
    def test_message(self, call, error, message):
        with pytest.raises(error, match=message):
            call(self)
