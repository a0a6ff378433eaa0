"""The linear state space model, in continuous time and in steps.

Continuous:  h'(t) = A h(t) + B x(t),      y(t) = C h(t) + D x(t)     `StateSpace`
Discrete:    h_k = Ā h_{k−1} + B̄ x_k,      y_k = C h_k + D x_k        `DiscreteStateSpace`
             = a causal convolution,       y = K̄ * x + D x            `causal_convolution`

`StateSpace.discretize` leads from the first to the second.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Inexact
from torch import Tensor

from mamba_tutorial._check import (
    check_all,
    check_choice,
    check_length,
    check_memory,
    check_shape,
    check_square,
    check_step,
    check_tensors,
    wide,
)
from mamba_tutorial.discretize import METHODS, matrix_exp_and_exprel
from mamba_tutorial.ops import register, vjp

Signal = Inexact[Tensor, "*batch length inputs"]
Output = Inexact[Tensor, "*batch length outputs"]
States = Inexact[Tensor, "*batch length state"]


@dataclass(frozen=True, eq=False)
class DiscreteStateSpace:
    """The recurrence h_k = Ā h_{k−1} + B̄ x_k, y_k = C h_k + D x_k.

    h_k is the state *after* sample k has been read. (`scipy.signal.dlsim` takes the output
    before the state is updated, so its y is this one's delayed by one step, but for D.)

    Attributes:
        A_bar: (state, state).
        B_bar: (state, inputs).
        C: (outputs, state).
        D: (outputs, inputs), or None for no skip connection.

    Raises:
        TypeError: a matrix has a dtype that is not floating or complex, or not that of A_bar.
        ValueError: a shape does not fit, a value is NaN or infinite, devices differ.
    """

    A_bar: Inexact[Tensor, "state state"]
    B_bar: Inexact[Tensor, "state inputs"]
    C: Inexact[Tensor, "outputs state"]
    D: Inexact[Tensor, "outputs inputs"] | None = None

    def __post_init__(self):
        _check_system(A_bar=self.A_bar, B_bar=self.B_bar, C=self.C, D=self.D)

    def recur(
        self, x: Signal, h0: Inexact[Tensor, "*batch state"] | None = None
    ) -> tuple[Output, States]:
        """Run the recurrence over a sequence, one sample after the other.

        Args:
            x: (..., length, inputs).
            h0: (..., state), the state before the first sample; zero by default.

        Returns:
            y: (..., length, outputs), and h: (..., length, state), where h[..., -1, :] is the
            state to continue from.

        Raises:
            TypeError: x or h0 has another dtype than A_bar.
            ValueError: a shape does not fit, a value is NaN or infinite, devices differ.
        """
        h0 = _check_run(self.A_bar, self.B_bar, x, h0)
        h = torch.stack(_states(self.A_bar, x @ self.B_bar.mT, h0), dim=-2)
        return _output(self, h, x), h

    def kernel(self, length: int) -> Inexact[Tensor, "length outputs inputs"]:
        """Return K̄ = (C B̄, C Ā B̄, C Ā² B̄, …), what each output remembers of an input.

        K̄_l is the answer of the output to an input of l steps ago; the part of D is left out.
        This is the naive way, one product with the dense Ā after the other:
        length · state² · inputs multiplications, and no two of them at the same time.

        Raises:
            ValueError: length is not a positive number.
        """
        length = check_length(length)
        check_memory("length", length, length * len(self.C) * self.B_bar.shape[1])
        power, kernel = self.B_bar, [self.C @ self.B_bar]
        for _ in range(length - 1):
            power = self.A_bar @ power
            kernel.append(self.C @ power)
        return torch.stack(kernel)

    def convolve(self, x: Signal, method: Literal["fft", "direct"] = "fft") -> Output:
        """Compute the outputs of `recur` from rest, all at once, as K̄ * x + D x.

        Args:
            x: (..., length, inputs).
            method: how `causal_convolution` computes it.

        Returns:
            y: (..., length, outputs).

        Raises:
            TypeError: x has another dtype than A_bar.
            ValueError: a shape does not fit, a value is NaN or infinite, devices differ, or there
                is no such method.
        """
        _check_run(self.A_bar, self.B_bar, x, None)
        kernel = self.kernel(x.shape[-2])
        rows = [causal_convolution(x, row, method).sum(-1) for row in kernel.unbind(1)]
        y = torch.stack(rows, dim=-1)
        return y if self.D is None else y + x @ self.D.mT


@dataclass(frozen=True, eq=False)
class StateSpace:
    """The linear state space model h'(t) = A h(t) + B x(t), y(t) = C h(t) + D x(t).

    Attributes:
        A: (state, state), in 1 / (unit of time).
        B: (state, inputs).
        C: (outputs, state).
        D: (outputs, inputs), the skip connection, or None for none.

    Raises:
        TypeError: a matrix has a dtype that is not floating or complex, or not that of A.
        ValueError: a shape does not fit, a value is NaN or infinite, devices differ.
    """

    A: Inexact[Tensor, "state state"]
    B: Inexact[Tensor, "state inputs"]
    C: Inexact[Tensor, "outputs state"]
    D: Inexact[Tensor, "outputs inputs"] | None = None

    def __post_init__(self):
        _check_system(A=self.A, B=self.B, C=self.C, D=self.D)

    def discretize(
        self,
        dt: float | int | Float[Tensor, ""],
        method: Literal["zoh", "bilinear", "euler"] = "zoh",
    ) -> DiscreteStateSpace:
        """Return the recurrence that advances this system by steps of dt.

        The method is one of `mamba_tutorial.discretize`; C and D are kept as they are.

        Raises:
            TypeError: dt is no number, or a tensor that is not of A's real dtype.
            ValueError: dt is not one positive number, or there is no such method.
        """
        check_choice("method", method, METHODS)
        dt = _check_scalar_step(dt, self.A)
        A_bar, B_bar = METHODS[method](self.A, self.B, dt)
        return DiscreteStateSpace(A_bar, B_bar, self.C, self.D)

    def simulate(
        self,
        x: Signal,
        dt: float | int | Float[Tensor, ""],
        h0: Inexact[Tensor, "*batch state"] | None = None,
        *,
        between: Literal["line", "hold"] = "line",
    ) -> tuple[Output, States]:
        """Solve the differential equation exactly for a signal known at t = 0, Δ, 2Δ, ...

        "Exactly" is up to rounding: variation of constants over each step, no time stepping
        error. What the signal does between two samples must be said:

        - "line": it runs straight from one sample to the next (as `scipy.signal.lsim` assumes);
        - "hold": it keeps each sample until the next one arrives (`lsim` with interp=False).

        Args:
            x: (..., length, inputs), the samples x(0), x(Δ), ...
            dt: the time Δ > 0 between samples, in the unit of time of A.
            h0: (..., state), the state at t = 0; zero by default.
            between: what the signal does between samples.

        Returns:
            y: (..., length, outputs) and h: (..., length, state) at the times of the samples, so
            h[..., 0, :] is h0. A held sample x_k changes h only after its time, at index k + 1.

        Raises:
            TypeError: x or h0 has another dtype than A.
            ValueError: a shape does not fit, a value is NaN or infinite, dt is not one positive
                number, devices differ, or `between` is neither word.
        """
        check_choice("between", between, ["line", "hold"])
        dt = _check_scalar_step(dt, self.A)
        h0 = _check_run(self.A, self.B, x, h0)
        before, change = x[..., :-1, :], x.diff(dim=-2)
        A_bar, hold, ramp = self._step_integrals(dt)
        drive = before @ hold.mT
        if between == "line":
            drive = drive + change @ ramp.mT
        h = torch.stack([h0, *_states(A_bar, drive, h0)], dim=-2)
        return _output(self, h, x), h

    def impulse_response(
        self, t: Float[Tensor, "*times"]
    ) -> Inexact[Tensor, "*times outputs inputs"]:
        """Return K(t) = C exp(t A) B at the times t ≥ 0; the part D δ(t) is left out.

        Raises:
            TypeError: t is no tensor of A's real dtype.
            ValueError: t is NaN, infinite or negative, or lies on another device.
        """
        check_tensors(A=self.A.real, t=t)
        check_all("t", t, t >= 0, "no negative time")
        return self.C @ matrix_exp_and_exprel(t[..., None, None] * self.A)[0] @ self.B

    def _step_integrals(self, dt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return Ā and what a step adds for a held input and for one that rises from 0 to 1.

        A signal that runs straight is the state of a system whose own input, the rise, is held.
        With the step as the unit of time it is (h, x)' = [[Δ A, Δ B], [0, 0]] (h, x) + (0, rise),
        and its zero-order hold has both integrals in it.
        """
        state, inputs = self.B.shape
        row = dt * torch.cat([self.A, self.B], dim=1)
        A_bar, mean = matrix_exp_and_exprel(F.pad(row, (0, 0, 0, inputs)))
        return A_bar[:state, :state], A_bar[:state, state:], mean[:state, state:]


def causal_convolution(
    x: Inexact[Tensor, "*batch length channels"],
    kernel: Inexact[Tensor, "taps channels"],
    method: Literal["fft", "direct"] = "fft",
) -> Inexact[Tensor, "*batch length channels"]:
    """Convolve each channel with its own kernel, looking back only.

        y_k = Σ_{l=0}^{k} K_l x_{k−l}

    "fft" multiplies spectra: O(length log length). A product of spectra is a *circular*
    convolution, so both are padded with zeros to length + taps − 1 at least; then what wraps
    round is zero. "direct" slides the kernel over the sequence: O(length · taps).

    Args:
        x: (..., length, channels).
        kernel: (taps, channels), first the tap for the present; of any number of taps.
        method: "fft" or "direct".

    Returns:
        y: (..., length, channels).

    Raises:
        TypeError: the dtypes are not floating or complex, or differ.
        ValueError: the shapes do not fit, devices differ, or there is no such method.
    """
    check_choice("method", method, ["fft", "direct"])
    check_tensors(x=x, kernel=kernel)
    check_shape("x", x, "... length channels")
    check_shape("kernel", kernel, "taps channels", channels=x.shape[-1])
    for name, tensor, axis in (("x", x, "length"), ("kernel", kernel, "taps")):
        if tensor.shape[-2] == 0:
            given = tuple(tensor.shape)
            raise ValueError(f"{name} has shape {given}, expected at least 1 for {axis}")
    return fft_convolution(x, kernel) if method == "fft" else _direct_convolution(x, kernel)


# `causal_convolution` by spectra as an operator: (x, kernel), without checks. The gradient that
# PyTorch finds by itself goes through complex transforms, twice as large as the real ones.


def _convolve(x: Tensor, kernel: Tensor) -> Tensor:
    length = x.shape[-2]
    transform, inverse = _transforms(x, kernel)
    return inverse(transform(x) * transform(kernel[:length]))[..., :length, :].to(x.dtype)


def _convolve_gradient(wanted, upstream, inputs, kept) -> tuple[Tensor, ...]:
    return _CONVOLVE_GRADIENTS(*upstream, *inputs)


def _run_convolve_gradients(d: Tensor, x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """A delay on the way out is an advance on the way back: the conjugate of its spectrum."""
    length, channels = x.shape[-2:]
    transform, inverse = _transforms(x, kernel)
    of_d = transform(d)
    dx = inverse(of_d * transform(kernel[:length]).conj_physical())[..., :length, :]
    of_kernel = (of_d * transform(x).conj_physical()).reshape(-1, of_d.shape[-2], channels).sum(0)
    dkernel = kernel.new_zeros(kernel.shape)
    dkernel[:length] = inverse(of_kernel)[: len(dkernel[:length])]
    return dx.to(x.dtype).contiguous(), dkernel


def _transforms(x: Tensor, kernel: Tensor) -> tuple[Callable, Callable]:
    """Return the Fourier transform and its inverse, long enough that nothing wraps round."""
    length, dtype = x.shape[-2], wide(x.dtype)
    size = 1 << (length + min(length, len(kernel)) - 2).bit_length()  # a power of two is quick
    forward, inverse = torch.fft.rfft, torch.fft.irfft
    if x.is_complex():
        dtype, forward, inverse = x.dtype, torch.fft.fft, torch.fft.ifft
    return (
        lambda signal: forward(signal.to(dtype), n=size, dim=-2),
        lambda spectrum: inverse(spectrum, n=size, dim=-2),
    )


fft_convolution = register(
    "fft_convolution",
    "(Tensor x, Tensor kernel) -> Tensor",
    run=lambda x, kernel: _convolve(x, kernel).contiguous(),
    like=lambda x, kernel: x.new_empty(x.shape),
    definition=_convolve,
    gradient=_convolve_gradient,
)
_CONVOLVE_GRADIENTS = register(
    "fft_convolution_backward",
    "(Tensor d, Tensor x, Tensor kernel) -> (Tensor, Tensor)",
    run=_run_convolve_gradients,
    like=lambda d, x, kernel: (x.new_empty(x.shape), kernel.new_empty(kernel.shape)),
    definition=lambda d, *inputs: tuple(vjp(_convolve, (True, True), (d,), inputs)),
)


def _direct_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    length, channels = x.shape[-2:]
    kernel = kernel[:length]
    signal = F.pad(x.mT.reshape(-1, channels, length), (len(kernel) - 1, 0))
    y = F.conv1d(signal, kernel.flip(0).mT.unsqueeze(1), groups=channels)
    return y.reshape(x.mT.shape).mT


def _states(A_bar: Tensor, drive: Tensor, h: Tensor) -> list[Tensor]:
    """Return the states h_k = Ā h_{k−1} + drive_k, for drive (..., steps, state).

    In half precision the state is float32: what it forgets at one step, it would never regain.
    """
    dtype = drive.dtype
    if dtype in (torch.float16, torch.bfloat16):
        A_bar, drive, h = A_bar.float(), drive.float(), h.float()
    states = []
    for step in drive.unbind(-2):
        h = h @ A_bar.mT + step
        states.append(h.to(dtype))
    return states


def _output(system: StateSpace | DiscreteStateSpace, h: Tensor, x: Tensor) -> Tensor:
    y = h @ system.C.mT
    return y if system.D is None else y + x @ system.D.mT


def _check_system(**matrices: Tensor | None) -> None:
    """Check the four matrices of a system, given by name in the order A, B, C, D."""
    (a, A), (b, B), (c, C), (d, D) = matrices.items()
    check_tensors(optional=(d,), **matrices)
    check_square(a, A)
    check_shape(a, A, "state state")
    check_shape(b, B, "state inputs", state=A.shape[0])
    check_shape(c, C, "outputs state", state=A.shape[0])
    if D is not None:
        check_shape(d, D, "outputs inputs", outputs=C.shape[0], inputs=B.shape[1])


def _check_run(A: Tensor, B: Tensor, x: Tensor, h0: Tensor | None) -> Tensor:
    """Check a signal and an initial state against A (state, state) and B; return the state."""
    check_tensors(optional=("h0",), A=A, x=x, h0=h0)
    check_shape("x", x, "... length inputs", inputs=B.shape[1])
    if x.shape[-2] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected a length of at least 1")
    expected = (*x.shape[:-2], A.shape[0])
    if h0 is None:
        return x.new_zeros(expected)
    if h0.shape != expected:
        axes = "(..., state) = " + str(expected)
        raise ValueError(f"h0 has shape {tuple(h0.shape)}, expected {axes}")
    return h0


def _check_scalar_step(dt: float | Tensor, A: Tensor) -> Tensor:
    dt = check_step(dt, like=A)
    if dt.ndim:
        raise ValueError(f"dt has shape {tuple(dt.shape)}, expected one number")
    return dt
