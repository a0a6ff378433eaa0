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
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor, nn

from mamba_tutorial._check import check_choice, check_length, check_shape, check_tensors
from mamba_tutorial.discretize import bilinear, zoh
from mamba_tutorial.hippo import dplr
from mamba_tutorial.ssm import causal_convolution

DiagonalInit = Literal["legs", "lin", "inv", "real"]

# Numbers that a block of the Cauchy sum may hold at a time: enough to be quick, little to store.
CAUCHY_BLOCK = 1 << 18


def diagonal_init(n: int, kind: DiagonalInit = "legs") -> Complex[Tensor, " half"]:
    """Return n/2 eigenvalues of S4D; with their conjugates they are the n of A. Complex128.

        legs  the eigenvalues of LegS's normal part, −½ + i w
        lin   −½ + i π k
        inv   −½ + i (n/π) (n/(2k+1) − 1)
        real  −(k+1), without an imaginary part

    for k = 0, …, n/2 − 1. From Gu et al. (2022b), Section 4. (The Mamba paper prints "lin" as
    −½ + i k, without the π.)

    Raises:
        TypeError, ValueError: n is not an even positive number, or there is no such kind.
    """
    check_length(n, name="n")
    check_choice("kind", kind, ["legs", "lin", "inv", "real"])
    if n % 2:
        raise ValueError(f"n is {n}, expected an even number, for pairs of eigenvalues")
    k = torch.arange(n // 2).double()
    if kind == "legs":
        return dplr(n).Lambda[: n // 2]
    if kind == "real":
        return torch.complex(-(k + 1), torch.zeros_like(k))
    imaginary = math.pi * k if kind == "lin" else n / math.pi * (n / (2 * k + 1) - 1)
    return torch.complex(torch.full_like(k, -0.5), imaginary)


def diagonal_kernel(
    A_bar: Complex[Tensor, "*channels half"], CB_bar: Complex[Tensor, "*channels half"], length: int
) -> Float[Tensor, "*channels length"]:
    """Return K̄_l = 2 Re Σ_n C_n B̄_n Ā_n^l for l = 0, …, length − 1.

    The sum runs over one of each pair of conjugate modes, hence 2 Re. The powers are a Vandermonde
    matrix (Gu et al. 2022b, Section 3.3), built by doubling: Ā^(l + 2^j) = Ā^l Ā^(2^j).

    Raises:
        TypeError: the dtypes are not complex, or differ.
        ValueError: the shapes do not fit, or length is not positive.
    """
    check_tensors(A_bar=A_bar, CB_bar=CB_bar)
    check_length(length)
    check_shape("CB_bar", CB_bar, "half", half=A_bar.shape[-1])
    terms, power = CB_bar.unsqueeze(-2), A_bar.unsqueeze(-2)
    while terms.shape[-2] < length:
        terms = torch.cat([terms, terms * power], dim=-2)
        power = power * power
    return 2 * terms[..., :length, :].sum(-1).real


def dplr_kernel(
    Lambda: Complex[Tensor, "*#channels n"],
    P: Complex[Tensor, "*#channels n"],
    B: Complex[Tensor, "*#channels n"],
    C_truncated: Complex[Tensor, "*#channels n"],
    dt: Float[Tensor, "*#channels"],
    length: int,
) -> Float[Tensor, "*channels length"]:
    """Return the bilinear kernel of A = diag(Λ) − P P*, in O(n + length) memory.

    The generating function of the kernel, K̂(z) = Σ_l K̄_l z^l, at z = exp(−2πi j / length) is the
    kernel's Fourier transform. There z^length = 1, and the geometric series Σ Ā^l z^l sums to

        K̂(z) = C̃ (I − Ā z)⁻¹ B̄,    C̃ = C (I − Ā^length)    (see `truncate`)

    With the bilinear Ā and B̄, (I − Ā z)⁻¹ B̄ = ((1−z)/Δ · I − (1+z)/2 · A)⁻¹ B. For the diagonal
    part this inverse is q_n(z) = 1 / ((1−z)/Δ − (1+z)/2 · Λ_n), and the Woodbury identity corrects
    for the rank-one part:

        K̂ = Σ C̃Bq − (1+z)/2 · Σ C̃Pq · Σ P*Bq / (1 + (1+z)/2 · Σ P*Pq)

    Each sum over n is a Cauchy sum. From Gu et al. (2022a), Appendix C.3; theirs divides by 1 + z
    and needs care at z = −1, this form does not. The modes come in conjugate pairs, so the kernel
    is real and half of the roots suffice.

    Raises:
        TypeError: the dtypes are not complex, or differ.
        ValueError: the shapes do not fit, or length is not positive.
    """
    check_tensors(Lambda=Lambda, P=P, B=B, C_truncated=C_truncated)
    check_length(length)
    for name, tensor in (("P", P), ("B", B), ("C_truncated", C_truncated)):
        check_shape(name, tensor, "n", n=Lambda.shape[-1])
    angle = 2 * math.pi * torch.arange(length // 2 + 1, device=P.device).double() / length
    # 1 − z and 1 + z from half angles, or small angles would cancel
    minus = torch.complex(2 * torch.sin(angle / 2) ** 2, torch.sin(angle)).to(P)
    plus = torch.complex(torch.cos(angle / 2) ** 2, -torch.sin(angle) / 2).to(P)  # (1 + z) / 2
    weights = torch.stack(
        torch.broadcast_tensors(C_truncated * B, C_truncated * P, P.conj() * B, P.conj() * P),
        dim=-2,
    )
    return torch.fft.irfft(_Spectrum.apply(Lambda, weights, dt, minus, plus), n=length)


def truncate(
    C: Complex[Tensor, "*channels n"], A_bar: Complex[Tensor, "*channels n n"], length: int
) -> Complex[Tensor, "*channels n"]:
    """Return C̃ = C (I − Ā^length), with which a generating function of `length` terms is closed.

    Ā^length takes 2 log₂ length products by repeated squaring. (The released S4 learns C̃ itself
    and ties the layer to one length; here C is learned, so any length and `step` agree.)
    """
    return C - (C.unsqueeze(-2) @ torch.linalg.matrix_power(A_bar, length)).squeeze(-2)


class _Spectrum(torch.autograd.Function):
    """K̂ at the roots of unity, block by block, forward and backward.

    A block of roots times all modes is small, lives for a moment, and is computed again in the
    backward pass. The result is written in place: appended pieces would be scattered between the
    freed blocks and keep the allocator from using their memory again.
    """

    @staticmethod
    def forward(ctx, Lambda, weights, dt, minus, plus):
        ctx.save_for_backward(Lambda, weights, dt, minus, plus)
        channels = torch.broadcast_shapes(weights.shape[:-2], dt.shape, Lambda.shape[:-1])
        spectrum = weights.new_empty(*channels, len(minus))
        for roots in _blocks(len(minus), weights):
            spectrum[..., roots] = _spectrum(Lambda, weights, dt, minus[roots], plus[roots])
        return spectrum

    @staticmethod
    def backward(ctx, gradient):
        *inputs, minus, plus = ctx.saved_tensors
        total = [torch.zeros_like(tensor) for tensor in inputs]
        for roots in _blocks(len(minus), inputs[1]):
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            with torch.enable_grad():
                spectrum = _spectrum(*leaves, minus[roots], plus[roots])
            for sum_, part in zip(
                total, torch.autograd.grad(spectrum, leaves, gradient[..., roots]), strict=True
            ):
                sum_ += part
        return *total, None, None


def _blocks(roots: int, weights: Tensor) -> list[slice]:
    """Cut the roots of unity into blocks of at most CAUCHY_BLOCK pairs of a root and a mode."""
    size = max(1, CAUCHY_BLOCK // (weights.numel() // 4))
    return [slice(start, start + size) for start in range(0, roots, size)]


def _spectrum(Lambda: Tensor, weights: Tensor, dt: Tensor, minus: Tensor, plus: Tensor) -> Tensor:
    """Return K̂ at some roots, by the Woodbury identity and four Cauchy sums."""
    q = 1 / (minus / dt[..., None, None] - plus * Lambda[..., None])  # [..., n, roots]
    CB, CP, PB, PP = (weights @ q).unbind(-2)
    return CB - plus * CP * PB / (1 + plus * PP)


class _Layer(nn.Module):
    """Norm, `d_model` state space models, GELU, a gated mixing of the channels, and a residual.

    y = x + GLU(W · GELU(SSM(norm(x)))). A subclass gives the convolution kernels and the matrices
    of the recurrence.
    """

    def __init__(self, d_model: int, dt_min: float, dt_max: float):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.mix = nn.Linear(d_model, 2 * d_model)
        self.D = nn.Parameter(torch.randn(d_model))
        log_dt = torch.rand(d_model) * math.log(dt_max / dt_min) + math.log(dt_min)
        self.log_dt = nn.Parameter(log_dt)

    @property
    def dt(self) -> Float[Tensor, " d_model"]:
        """The step of each channel, exp(log_dt); positive whatever is learned."""
        return self.log_dt.exp()

    def forward(
        self, x: Float[Tensor, "batch length d_model"]
    ) -> Float[Tensor, "batch length d_model"]:
        """Run over a whole sequence by convolution."""
        check_shape("x", x, "batch length d_model", d_model=len(self.D))
        z = self.norm(x)
        y = causal_convolution(z, self.kernel(x.shape[1]).mT) + self.D * z
        return self._mixed(x, y)

    def step(
        self, x: Float[Tensor, "batch d_model"], state: Complex[Tensor, "batch d_model n"]
    ) -> tuple[Float[Tensor, "batch d_model"], Complex[Tensor, "batch d_model n"]]:
        """Read one token by recurrence; return its output and the new state."""
        check_shape("x", x, "batch d_model", d_model=len(self.D))
        check_shape("state", state, "batch d_model n", batch=len(x), d_model=len(self.D))
        z = self.norm(x)
        state, y = self._advance(z, state)
        return self._mixed(x, y + self.D * z), state

    def _mixed(self, x: Tensor, y: Tensor) -> Tensor:
        return x + F.glu(self.mix(F.gelu(y)))


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
        check_length(d_model, name="d_model")
        super().__init__(d_model, dt_min, dt_max)
        A = init if isinstance(init, Tensor) else diagonal_init(d_state, init)
        check_tensors(init=A)
        check_shape("init", A, "half", half=d_state // 2)
        if (A.real >= 0).any():
            raise ValueError(f"init has a real part of {A.real.max():g}, expected all negative")
        A = A.to(torch.complex64).expand(d_model, -1)
        self.log_A_real = nn.Parameter(torch.log(-A.real).contiguous())
        self.A_imag = nn.Parameter(A.imag.contiguous())
        self.C = nn.Parameter(torch.randn(d_model, d_state // 2, 2) * 0.5**0.5)

    def discrete(self) -> tuple[Complex[Tensor, "d_model half"], Complex[Tensor, "d_model half"]]:
        """Return Ā and B̄ of all channels."""
        A = torch.complex(-self.log_A_real.exp(), self.A_imag)
        return zoh(A, torch.ones_like(A), self.dt, diagonal=True)

    def kernel(self, length: int) -> Float[Tensor, "d_model length"]:
        """Return the convolution kernel of each channel."""
        A_bar, B_bar = self.discrete()
        return diagonal_kernel(A_bar, torch.view_as_complex(self.C) * B_bar, length)

    def initial_state(self, batch: int) -> Complex[Tensor, "batch d_model half"]:
        """Return the state before the first token."""
        check_length(batch, name="batch")
        C = torch.view_as_complex(self.C)
        return C.new_zeros(batch, *C.shape)

    def _advance(self, z: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        A_bar, B_bar = self.discrete()
        state = A_bar * state + B_bar * z[..., None]
        return state, 2 * (torch.view_as_complex(self.C) * state).sum(-1).real


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
        check_length(d_model, name="d_model")
        super().__init__(d_model, dt_min, dt_max)
        start = dplr(d_state)
        half = d_state // 2

        def learned(values: Tensor) -> nn.Parameter:
            one_of_each_pair = values[:half].to(torch.complex64).expand(d_model, -1)
            return nn.Parameter(torch.view_as_real(one_of_each_pair.clone()))

        self.log_A_real = nn.Parameter(torch.full((d_model, half), math.log(0.5)))
        self.A_imag = nn.Parameter(start.Lambda.imag[:half].float().expand(d_model, -1).clone())
        self.P, self.B = learned(start.P), learned(start.B)
        self.C = nn.Parameter(torch.randn(d_model, half, 2) * 0.5**0.5)

    def modes(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return Λ, P, B and C of all channels, (d_model, d_state) each, both of every pair."""
        Lambda = torch.complex(-self.log_A_real.exp(), self.A_imag)
        halves = [Lambda, *(torch.view_as_complex(t) for t in (self.P, self.B, self.C))]
        return tuple(torch.cat([half, half.conj()], dim=-1) for half in halves)

    def discrete(self) -> tuple[Complex[Tensor, "d_model n n"], Complex[Tensor, "d_model n 1"]]:
        """Return the dense Ā and B̄ of all channels, in double precision."""
        Lambda, P, B, _ = (mode.to(torch.complex128) for mode in self.modes())
        A = torch.diag_embed(Lambda) - P[..., :, None] * P.conj()[..., None, :]
        return bilinear(A, B[..., None], self.dt.double())

    def kernel(self, length: int) -> Float[Tensor, "d_model length"]:
        """Return the convolution kernel of each channel."""
        Lambda, P, B, C = self.modes()
        A_bar, _ = self.discrete()
        C_truncated = truncate(C.to(A_bar), A_bar, length).to(C)
        return dplr_kernel(Lambda, P, B, C_truncated, self.dt, length)

    def initial_state(self, batch: int) -> Complex[Tensor, "batch d_model n"]:
        """Return the state before the first token."""
        check_length(batch, name="batch")
        C = self.modes()[-1]
        return C.new_zeros(batch, *C.shape)

    def _advance(self, z: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        A_bar, B_bar = (matrix.to(state) for matrix in self.discrete())
        state = (A_bar @ state[..., None] + B_bar * z[..., None, None]).squeeze(-1)
        return state, (self.modes()[-1] * state).sum(-1).real


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
