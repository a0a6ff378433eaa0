"""Layers to compare, of one build: x + GLU(W · GELU(memory(norm(x)))), each with another memory.

`S4` and `S4D` in `mamba_tutorial.s4` are built so, and `SelectiveLayer` is; `LSTMLayer` has what an
LSTM needs instead, which is less; so has `GRULayer`. `SignedLayer` has decays that may be negative.
`BilinearS4D` and `HeldS4` are S4D and S4 with the other one's rule of discretisation. `network`
stacks layers between an embedding and a decoder.
"""

from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor, nn

from mamba_tutorial.discretize import bilinear, zoh
from mamba_tutorial.s4 import S4, S4D, SequenceModel, diagonal_kernel
from mamba_tutorial.scan import linear_scan
from mamba_tutorial.selective import Discretization, SelectiveSSM

Tokens = Float[Tensor, "batch length d_model"]


class SelectiveLayer(nn.Module):
    """The build of `S4D` around a `SelectiveSSM`; the arguments are its."""

    def __init__(
        self,
        d_model: int,
        d_state: int,
        dt_rank: int,
        *,
        selective: Collection[str] = ("dt", "B", "C"),
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        discretization: Discretization = "mamba",
    ):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.ssm = SelectiveSSM(
            d_model,
            d_state,
            dt_rank,
            selective=selective,
            dt_min=dt_min,
            dt_max=dt_max,
            discretization=discretization,
        )
        self.mix = nn.Linear(d_model, 2 * d_model)

    def forward(self, x: Tokens) -> Tokens:
        """Run over a whole sequence."""
        y, _ = self.ssm(self.norm(x))
        return x + F.glu(self.mix(F.gelu(y)))


class LSTMLayer(nn.Module):
    """x + W · LSTM(norm(x)), with an LSTM of `hidden` cells (Hochreiter and Schmidhuber 1997).

    It begins with an open memory: the forget gates start at σ(2) = 0.88.
    """

    def __init__(self, d_model: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.lstm = nn.LSTM(d_model, hidden, batch_first=True)
        self.out = nn.Linear(hidden, d_model)
        with torch.no_grad():
            self.lstm.bias_hh_l0[hidden : 2 * hidden] = 2.0

    def forward(self, x: Tokens) -> Tokens:
        """Run over a whole sequence."""
        return x + self.out(self.lstm(self.norm(x))[0])


class GRULayer(nn.Module):
    """x + W · GRU(norm(x)), with a GRU of `hidden` cells (Cho et al. 2014)."""

    def __init__(self, d_model: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.gru = nn.GRU(d_model, hidden, batch_first=True)
        self.out = nn.Linear(hidden, d_model)

    def forward(self, x: Tokens) -> Tokens:
        """Run over a whole sequence."""
        return x + self.out(self.gru(self.norm(x))[0])


class SignedLayer(nn.Module):
    """The same build around h_t = tanh(W_a x) h_{t−1} + W_b x, of one number a channel.

    What is new is that the factor may be negative: a token can turn the sign of what is kept. With
    decays between 0 and 1, as those of a selective state space model, no token can (Grazzi et al.
    2025, "Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues").
    """

    def __init__(self, d_model: int):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.recurrence = nn.Linear(d_model, 2 * d_model)
        self.mix = nn.Linear(d_model, 2 * d_model)

    def forward(self, x: Tokens) -> Tokens:
        """Run over a whole sequence."""
        a, b = self.recurrence(self.norm(x)).chunk(2, dim=-1)
        return x + F.glu(self.mix(F.gelu(linear_scan(torch.tanh(a), b))))


class BilinearS4D(S4D):
    """S4D by the bilinear rule instead of the zero-order hold."""

    def discrete(self) -> tuple[Complex[Tensor, "d_model half"], Complex[Tensor, "d_model half"]]:
        """Return Ā and B̄ of all channels."""
        A = torch.complex(-self.log_A_real.exp(), self.A_imag)
        return bilinear(A, torch.ones_like(A), self.dt, diagonal=True)

    def kernel(self, length: int) -> Float[Tensor, "d_model length"]:
        """Return the convolution kernel of each channel."""
        A_bar, B_bar, C = self.recurrence()
        return diagonal_kernel(A_bar, C * B_bar, length)


class HeldS4(S4):
    """S4 by the zero-order hold instead of the bilinear rule.

    The rule needs the exponential of a dense matrix for each channel, and the kernel its powers.
    """

    def discrete(self) -> tuple[Complex[Tensor, "d_model n n"], Complex[Tensor, "d_model n 1"]]:
        """Return the dense Ā and B̄ of all channels."""
        Lambda, P, B, _ = self.modes()
        A = torch.diag_embed(Lambda) - P[..., None] * P.conj()[..., None, :]
        return zoh(A, B[..., None], self.dt)

    def recurrence(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return Ā, (d_model, n, n), B̄ and C, (d_model, n) each."""
        A_bar, B_bar = self.discrete()
        return A_bar, B_bar[..., 0], self.modes()[-1]

    def kernel(self, length: int) -> Float[Tensor, "d_model length"]:
        """Return the convolution kernel of each channel."""
        A_bar, h, C = self.recurrence()
        taps = []
        for _ in range(length):
            taps.append((C * h).sum(-1).real)
            h = (A_bar @ h[..., None])[..., 0]
        return torch.stack(taps, dim=-1)

    def _advance(
        self, z: Tensor, state: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor
    ) -> tuple[Tensor, Tensor]:
        state = (A_bar @ state[..., None])[..., 0] + B_bar * z[..., None]
        return state, (C * state).sum(-1).real


def network(
    layer: Callable[[int], nn.Module], d_model: int, *, vocab: int, layers: int = 1
) -> SequenceModel:
    """Return an embedding, so many layers made by `layer(d_model)`, and a linear decoder."""
    encoder, decoder = nn.Embedding(vocab, d_model), nn.Linear(d_model, vocab)
    stack = [layer(d_model) for _ in range(layers)]
    return SequenceModel(encoder, stack, decoder, pool=False)
