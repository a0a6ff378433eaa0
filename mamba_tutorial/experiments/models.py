"""The models that the experiments compare, each from an entry of plain data.

An entry names a "layer", of which `layers.network` makes a stack, or a "model"; the rest are its
sizes. "sizes" in an entry are the task's, and no concern of this module.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mamba_tutorial.attention import Attention, Places, Transformer, TransformerConfig
from mamba_tutorial.layers import (
    BilinearS4D,
    GRULayer,
    HeldS4,
    LSTMLayer,
    SelectiveLayer,
    SignedLayer,
    network,
)
from mamba_tutorial.mamba import CausalConv1d, MambaConfig, MambaLM
from mamba_tutorial.s4 import S4, S4D, SequenceModel
from mamba_tutorial.selective import SelectiveSSM
from mamba_tutorial.ssm import fft_convolution

LAYERS = {
    "S4D": S4D,
    "S4D, bilinear": BilinearS4D,
    "S4": S4,
    "S4, zero-order hold": HeldS4,
    "selective": SelectiveLayer,
    "signed": SignedLayer,
    "LSTM": LSTMLayer,
    "GRU": GRULayer,
}
D_MODEL, DIGITS_MODEL = 64, 48
GATES = {"none": 1, "H3": 3, "Mamba": 2}  # how many times d_inner numbers come out of in_proj


class Invariant(S4D):
    """The memory of `S4D` alone, without its norm and its mixing: linear and time-invariant."""

    def __init__(self, d_inner: int, d_state: int):
        super().__init__(d_inner, d_state, init="lin")
        del self.norm, self.mix

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of x, (batch, length, d_inner), with the kernel, plus D x."""
        return fft_convolution(x, self.kernel(x.shape[1]).mT) + self.D * x


class Selective(SelectiveSSM):
    """`SelectiveSSM` with a rank of d_inner/32, and its output alone."""

    def __init__(self, d_inner: int, d_state: int):
        super().__init__(d_inner, d_state, max(1, d_inner // 32))

    def forward(self, x: Tensor) -> Tensor:
        """Return the scan of x, (batch, length, d_inner)."""
        return super().forward(x)[0]


class GatedLayer(nn.Module):
    """u + W_out y around one of two memories, with one of three ways to gate it.

        none     y = memory(c(x))                    x       = W_in norm(u)
        H3       y = q ⊙ memory(c(k) ⊙ v)            q, k, v = W_in norm(u)
        Mamba    y = memory(c(x)) ⊙ silu(z)          x, z    = W_in norm(u)

    with c the short causal convolution of a Mamba block, silu included. These are the architectures
    of Table 1 of the Mamba paper, drawn in its Figure 3; H3 (Fu et al. 2023) has a shift where c is
    here.

    Args:
        d_model: the width of the residual stream; d_inner is twice that.
        gate: "none", "H3" or "Mamba".
        memory: `Invariant` or `Selective`.
        d_state: of the memory.
    """

    def __init__(
        self, d_model: int, gate: str, memory: Callable[[int, int], nn.Module], d_state: int
    ):
        super().__init__()
        d_inner = 2 * d_model
        self.gate, self.norm = gate, nn.RMSNorm(d_model)
        self.in_proj = nn.Linear(d_model, GATES[gate] * d_inner, bias=False)
        self.conv1d = CausalConv1d(d_inner, 4, bias=True)
        self.memory = memory(d_inner, d_state)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """Run over a whole sequence, (batch, length, d_model)."""
        x, *gates = self.in_proj(self.norm(u)).chunk(GATES[self.gate], dim=-1)
        x = self.conv1d(x)[0]
        if self.gate == "H3":
            q, v = gates
            y = q * self.memory(x * v)
        else:
            y = self.memory(x)
            y = y * nn.functional.silu(gates[0]) if gates else y
        return u + self.out_proj(y)


class Convolved(nn.Module):
    """attention(c(u)), with c the short causal convolution of a Mamba block, silu included.

    So the tokens just before are seen without being looked for. The code that goes with Arora et
    al. (2023) has one before the attention that it compares with.
    """

    def __init__(self, attention: Attention, d_model: int, width: int):
        super().__init__()
        self.conv1d, self.attention = CausalConv1d(d_model, width, bias=True), attention

    def forward(self, u: Tensor, where: Places, cache: None) -> Tensor:
        """Run over a whole sequence, (batch, length, d_model)."""
        return self.attention(self.conv1d(u)[0], where, cache)


def build(entry: dict, vocab: int | None, seed: int) -> nn.Module:
    """Return the model that an entry describes, as it starts with this seed.

    Without a vocabulary it reads numbers and names one of ten digits.
    """
    sizes = {key: value for key, value in entry.items() if key not in ("shuffled", "sizes")}
    torch.manual_seed(seed)
    if "model" in sizes:
        return MODELS[sizes.pop("model")](vocab=vocab, **sizes)
    kind, layers = LAYERS[sizes.pop("layer")], sizes.pop("layers")
    if sizes.get("init", "").startswith("random"):
        slow = sizes["init"] == "random, slow"
        sizes["init"] = random_eigenvalues(sizes["d_state"], seed, slow=slow)
    if vocab is None:
        stack = [kind(DIGITS_MODEL, **sizes) for _ in range(layers)]
        encoder, decoder = nn.Linear(1, DIGITS_MODEL), nn.Linear(DIGITS_MODEL, 10)
        return SequenceModel(encoder, stack, decoder, pool=False)
    d_model = sizes.pop("d_model", D_MODEL)
    return network(functools.partial(kind, **sizes), d_model, vocab=vocab, layers=layers)


def _mamba(
    vocab: int,
    *,
    selective: list[str] | None = None,
    A: str = "-(n + 1)",
    start: tuple[str, ...] = (),
    **sizes,
) -> MambaLM:
    """Return a `MambaLM`, with the parts that are named selective, and this A at the start.

    All three parts of `start` together make it begin like attention without a softmax, after
    Trockman et al. (2024): y_t = Σ_s (C_t · B_s) x_s, with C_t · B_s large where the tokens t and s
    are alike.

        A        A = −10⁻⁴, so that nothing fades
        dt       Δ = 1 for every token
        alike    C has B's weights; in the paper the two are alike, not equal
    """
    config = MambaConfig(vocab_size=vocab, **sizes)
    model = MambaLM(config)
    for layer in model.layers:
        if selective is not None:
            layer.mixer.ssm = SelectiveSSM(
                config.d_inner, config.d_state, config.rank, selective=selective
            )
        ssm = layer.mixer.ssm
        with torch.no_grad():
            if A == "-1/2":
                ssm.A_log.fill_(0.5).log_()
            elif A == "random":
                ssm.A_log.normal_()
            if "A" in start:
                ssm.A_log.fill_(1e-4).log_()
            if "dt" in start:
                ssm.dt_proj.weight.zero_()
                ssm.dt_bias.fill_(math.log(math.e - 1))  # whose softplus is 1
            if "alike" in start:
                _, B, C = ssm.x_proj.weight.split(list(ssm.sizes.values()))
                C.copy_(B)
    return model


def _transformer(vocab: int, *, conv: int = 0, **sizes) -> Transformer:
    """Return a `Transformer`, whose attention reads a convolution of so many tokens, if any."""
    model = Transformer(TransformerConfig(vocab_size=vocab, **sizes))
    for layer in model.layers if conv else ():
        layer.attention = Convolved(layer.attention, model.config.d_model, conv)
    return model


def _gated(
    vocab: int, *, gate: str, memory: str, d_state: int, d_model: int, n_layer: int
) -> SequenceModel:
    kind = {"invariant": Invariant, "selective": Selective}[memory]
    layer = functools.partial(GatedLayer, gate=gate, memory=kind, d_state=d_state)
    return network(layer, d_model, vocab=vocab, layers=n_layer)


MODELS = {"Mamba": _mamba, "Transformer": _transformer, "gated": _gated}


def random_eigenvalues(d_state: int, seed: int, *, slow: bool) -> torch.Tensor:
    """Return d_state/2 eigenvalues of a large random matrix, moved to the left half-plane.

    Args:
        d_state: the size of the state.
        seed: of the matrix.
        slow: give all of them the real part −½, as those of LegS have, and keep the frequencies.
    """
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(4 * d_state, 4 * d_state, generator=generator)
    values = torch.linalg.eigvals(matrix)
    upper = values[values.imag > 0][: d_state // 2]
    real = torch.full_like(upper.real, 0.5) if slow else upper.real.abs()
    return torch.complex(-real, upper.imag)
