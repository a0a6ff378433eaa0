"""S4: a long convolution whose kernel is cheap because A has structure.

Two structures, two layers:

- `S4`: A is diagonal plus low rank, as LegS is after a change of basis (Gu et al. 2022a). The
  kernel comes from its generating function at the roots of unity, the Woodbury identity and a
  Cauchy sum: `dplr_kernel`.
- `S4D`: A is diagonal (Gu et al. 2022b). The kernel is a sum of exponentials: `diagonal_kernel`.

Both layers hold `d_model` independent state space models of one input and one output, each with
its own step Δ. They run as a convolution (`forward`) and as a recurrence (`step`), with the same
result.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from mamba_tutorial._check import (
    can_look_at,
    check_choice,
    check_input,
    check_is_tensor,
    check_length,
    check_memory,
    check_range,
    check_room,
    check_shape,
    precise,
    wide,
)
from mamba_tutorial.discretize import diagonal_zoh
from mamba_tutorial.hippo import dplr
from mamba_tutorial.s4._checks import check_complex, check_pairs, kernel_length
from mamba_tutorial.s4.diagonal import (
    INITS,
    ZOH_KERNEL,
    DiagonalInit,
    diagonal_init,
    diagonal_kernel,
)
from mamba_tutorial.s4.low_rank import (
    PAIRS_KERNEL,
    bilinear_dplr,
    bilinear_matrix,
    both_of,
    dplr_kernel,
    truncate,
)
from mamba_tutorial.ssm import fft_convolution

__all__ = [
    "S4",
    "S4D",
    "SequenceModel",
    "diagonal_init",
    "diagonal_kernel",
    "dplr_kernel",
    "truncate",
]

# The matrices of a recurrence, by the state that it has reached; see `_Layer.step`.
_RECURRENCES = WeakTensorKeyDictionary()


class _Layer(nn.Module):
    """Norm, `d_model` state space models, GELU, a gated mixing of the channels, and a residual.

    y = x + GLU(W · GELU(SSM(norm(x)))). A subclass gives the convolution kernels, the matrices of
    the recurrence, and a step with them. Kernels and states are float32, or float64 if the
    parameters are. The parameters of the state space model are to be trained without weight decay:
    it would pull at time scales and frequencies.

    Raises:
        TypeError, ValueError: a size is not positive, or not 0 < dt_min ≤ dt_max.
    """

    no_weight_decay = frozenset({"log_dt", "log_A_real", "A_imag", "P", "B"})

    def __init__(self, d_model: int, modes: int, dt_min: float, dt_max: float):
        d_model = check_length(d_model, name="d_model")
        check_range(dt_min, dt_max)
        check_room("d_model", d_model, d_model**2)
        check_room("d_state", modes, modes * d_model)
        super().__init__()
        self.modes_kept = modes
        self.norm = nn.LayerNorm(d_model)
        self.mix = nn.Linear(d_model, 2 * d_model)
        self.D = nn.Parameter(torch.randn(d_model))
        log_dt = torch.rand(d_model) * math.log(dt_max / dt_min) + math.log(dt_min)
        self.log_dt = nn.Parameter(log_dt)

    @property
    def dt(self) -> Float[Tensor, " d_model"]:
        """The step of each channel, exp(log_dt); positive whatever is learned."""
        return _wide(self.log_dt).exp()

    def forward(
        self, x: Float[Tensor, "batch length d_model"]
    ) -> Float[Tensor, "batch length d_model"]:
        """Run over a whole sequence by convolution.

        Raises:
            TypeError: x is no floating tensor.
            ValueError: x is not (batch, length, d_model), or empty.
        """
        self._check_input(x, "batch length d_model")
        if x.shape[1] == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected a length of at least 1")
        z = self.norm(x)
        y = fft_convolution(z, self.kernel(x.shape[1]).mT) + self.D * z
        return self._mixed(x, y)

    def initial_state(self, batch: int) -> Complex[Tensor, "batch d_model n"]:
        """Return the state before the first token."""
        batch = check_length(batch, name="batch", least=0)
        shape = batch, len(self.D), self.modes_kept
        check_memory("batch", batch, 2 * math.prod(shape))
        dtype = wide(self.log_dt.dtype).to_complex()
        return torch.zeros(shape, dtype=dtype, device=self.log_dt.device)

    def step(
        self, x: Float[Tensor, "batch d_model"], state: Complex[Tensor, "batch d_model n"]
    ) -> tuple[Float[Tensor, "batch d_model"], Complex[Tensor, "batch d_model n"]]:
        """Read one token by recurrence; return its output and the new state.

        The matrices of the recurrence are made at the first step from a state and kept for the
        states that follow from it, while the parameters are what they were. Where the parameters
        learn, every step makes them anew: a gradient goes through them.

        Raises:
            TypeError: x is no floating tensor, or the state no complex one.
            ValueError: a shape does not fit, or the state lies on another device.
        """
        self._check_input(x, "batch d_model")
        check_is_tensor("state", state)
        if not state.is_complex():
            raise TypeError(f"state has dtype {state.dtype}, expected a complex one")
        sizes = {"batch": len(x), "d_model": len(self.D), "n": self.modes_kept}
        check_shape("state", state, "batch d_model n", **sizes)
        if state.device != x.device:
            raise ValueError(f"state is on device {state.device}, expected {x.device}, that of x")
        z = self.norm(x)
        own = [p for name, p in self.named_parameters(recurse=False) if name != "D"]
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in own)
        if learning or not can_look_at(x):
            state, y = self._advance(_wide(z), state, *self.recurrence())
        else:
            values, recurrence = self._kept_recurrence(own, state)
            state, y = self._advance(_wide(z), state, *recurrence)
            _RECURRENCES[state] = self, values, recurrence
        return self._mixed(x, y.to(z.dtype) + self.D * z), state

    def _kept_recurrence(self, own: list[Tensor], state: Tensor) -> tuple[list[Tensor], tuple]:
        """Return the matrices that led to the state, or new ones; and the parameters' numbers.

        By their numbers, for not everything that writes to a parameter can be noticed otherwise.
        """
        layer, values, recurrence = _RECURRENCES.get(state, (None, [], ()))
        same = layer is self and all(p.dtype == v.dtype for p, v in zip(own, values, strict=True))
        if same and all(map(torch.equal, own, values)):
            return values, recurrence
        return [p.detach().clone() for p in own], self.recurrence()

    def _check_input(self, x: Tensor, axes: str) -> None:
        check_input("x", x, self.norm)
        check_shape("x", x, axes, d_model=len(self.D))

    def _mixed(self, x: Tensor, y: Tensor) -> Tensor:
        return x + F.glu(self.mix(F.gelu(y)))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(wide(tensor.dtype))


def _complex(pairs: Tensor) -> Tensor:
    """Make complex numbers of pairs (…, 2), of float32 at least."""
    return torch.view_as_complex(_wide(pairs))


def _eigenvalues(log_A_real: Tensor, A_imag: Tensor) -> Tensor:
    return torch.complex(-_wide(log_A_real).exp(), _wide(A_imag))


class S4D(_Layer):
    """The S4 layer with a diagonal A, for sequences (batch, length, d_model).

    Each channel has d_state/2 complex modes, which stand for d_state with their conjugates:
    A = −exp(log_A_real) + i A_imag, B = 1 (one complex C per mode is free enough), and K̄ by
    `diagonal_kernel` after a zero-order hold. From Gu et al. (2022b) and `s4d.py` of the released
    S4 code.

    Args:
        d_model: the number of channels.
        d_state: the size of each channel's state, even.
        init: a name for `diagonal_init`, or d_state/2 eigenvalues with negative real parts.
        dt_min: the smallest initial step; the steps start log-uniform.
        dt_max: the largest initial step.

    Raises:
        TypeError, ValueError: a size is not positive, d_state is odd, there is no such init, or an
            eigenvalue is not stable.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int,
        init: DiagonalInit | Complex[Tensor, " half"] = "legs",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ):
        d_state = check_pairs("d_state", d_state)
        super().__init__(d_model, d_state // 2, dt_min, dt_max)
        d_model = len(self.D)
        if not isinstance(init, Tensor):
            check_choice("init", init, INITS)
        A = init if isinstance(init, Tensor) else diagonal_init(d_state, init)
        check_complex(init=A)
        if A.is_meta and not self.D.is_meta:
            raise ValueError("init is on device meta, expected one that has numbers")
        check_shape("init", A, "half", half=d_state // 2)
        if can_look_at(A) and (A.real >= 0).any():
            raise ValueError(f"init has a real part of {A.real.max():g}, expected all negative")
        A = A.expand(d_model, -1)
        self.log_A_real = nn.Parameter(torch.log(-A.real).contiguous().to(self.D))
        self.A_imag = nn.Parameter(A.imag.contiguous().to(self.D))
        self.C = nn.Parameter(torch.randn(d_model, d_state // 2, 2) * 0.5**0.5)

    def discrete(self) -> tuple[Complex[Tensor, "d_model half"], Complex[Tensor, "d_model half"]]:
        """Return Ā and B̄ of all channels."""
        A = _eigenvalues(self.log_A_real, self.A_imag)
        return diagonal_zoh(A, torch.ones_like(A), self.dt)

    def kernel(self, length: int) -> Float[Tensor, "d_model length"]:
        """Return the convolution kernel of each channel."""
        length = kernel_length(length, self.A_imag.numel())
        A = _eigenvalues(self.log_A_real, self.A_imag)
        return ZOH_KERNEL(A, _complex(self.C), self.dt, length)

    def recurrence(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return Ā, B̄ and C of all channels, (d_model, half) each."""
        return *self.discrete(), _complex(self.C)

    def _advance(
        self, z: Tensor, state: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor
    ) -> tuple[Tensor, Tensor]:
        state = A_bar * state + B_bar * z[..., None]
        return state, 2 * (C * state).sum(-1).real


class S4(_Layer):
    """The S4 layer with A diagonal plus low rank, for sequences (batch, length, d_model).

    Starts from LegS in the basis of `mamba_tutorial.hippo.dplr` and learns, in each channel, Λ, P,
    B, C and Δ, of conjugate modes together: A = diag(Λ) − P P*, with the real part of Λ negative as
    −exp(·). K̄ by `dplr_kernel` after the bilinear rule. From Gu et al. (2022a); differences: C is
    learned instead of C̃ (see `truncate`), and the rank is one.

    Args:
        d_model: the number of channels.
        d_state: the size of each channel's state, even.
        dt_min: the smallest initial step; the steps start log-uniform.
        dt_max: the largest initial step.

    Raises:
        TypeError, ValueError: a size is not positive, or d_state is odd.
    """

    def __init__(self, d_model: int, d_state: int, dt_min: float = 1e-3, dt_max: float = 1e-1):
        d_state = check_pairs("d_state", d_state)
        check_memory("d_state", d_state, d_state**2)
        super().__init__(d_model, d_state, dt_min, dt_max)
        d_model, start, half = len(self.D), dplr(d_state), d_state // 2

        def learned(values: Tensor) -> nn.Parameter:
            one_of_each_pair = torch.view_as_real(values[:half].expand(d_model, -1).clone())
            return nn.Parameter(one_of_each_pair.to(self.D))

        self.log_A_real = nn.Parameter(torch.full((d_model, half), math.log(0.5)))
        imaginary = start.Lambda.imag[:half].expand(d_model, -1).clone()
        self.A_imag = nn.Parameter(imaginary.to(self.D))
        self.P, self.B = learned(start.P), learned(start.B)
        self.C = nn.Parameter(torch.randn(d_model, half, 2) * 0.5**0.5)

    def pairs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return Λ, P, B and C of all channels, (d_model, d_state/2) each, one of every pair."""
        Lambda = _eigenvalues(self.log_A_real, self.A_imag)
        return Lambda, *(_complex(mode) for mode in (self.P, self.B, self.C))

    def modes(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return Λ, P, B and C of all channels, (d_model, d_state) each, both of every pair."""
        return tuple(both_of(mode) for mode in self.pairs())

    def discrete(self) -> tuple[Complex[Tensor, "d_model n n"], Complex[Tensor, "d_model n 1"]]:
        """Return the dense Ā and B̄ of all channels, in double precision."""
        Lambda, P, B, _ = (precise(mode) for mode in self.modes())
        A_bar, half = bilinear_matrix(Lambda, P, self.dt), precise(self.dt)[..., None] / 2
        # B̄ = (I − Δ/2 A)⁻¹ Δ B, and that inverse is (Ā + I)/2
        return A_bar, ((A_bar @ B[..., None]).squeeze(-1) + B)[..., None] * half[..., None]

    def kernel(self, length: int) -> Float[Tensor, "d_model length"]:
        """Return the convolution kernel of each channel."""
        length = kernel_length(length, len(self.D))
        return PAIRS_KERNEL(*self.pairs(), self.dt, length)[0]

    def recurrence(self) -> tuple[Tensor, ...]:
        """Return what a step needs, (d_model, n) each: see `bilinear_dplr`; Δ/2 B; C."""
        Lambda, P, B, C = self.modes()
        return *bilinear_dplr(Lambda, P, self.dt), self.dt[..., None] / 2 * B, C

    def _advance(
        self, z: Tensor, state: Tensor, d: Tensor, column: Tensor, row: Tensor, B: Tensor, C: Tensor
    ) -> tuple[Tensor, Tensor]:
        v = state + B * z[..., None]
        state = 2 * (d * v - column * (row * v).sum(-1, keepdim=True)) - state
        return state, (C * state).sum(-1).real


class SequenceModel(nn.Module):
    """An encoder, a stack of layers, and a decoder.

    Args:
        encoder: maps inputs to (batch, length, d_model): `nn.Linear` for numbers, `nn.Embedding`
            for tokens.
        layers: each maps (batch, length, d_model) to the same shape.
        decoder: maps (…, d_model) to the outputs.
        pool: average over the sequence before the decoder, for one output per sequence.
    """

    def __init__(self, encoder: nn.Module, layers: list[nn.Module], decoder: nn.Module, pool: bool):
        super().__init__()
        self.encoder = encoder
        self.layers = nn.Sequential(*layers)
        self.decoder = decoder
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, outputs) if pooled, else (batch, length, outputs)."""
        h = self.layers(self.encoder(x))
        return self.decoder(h.mean(dim=1) if self.pool else h)
