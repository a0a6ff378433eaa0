"""The block around the selective state space model: sizes, state, and the module."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mamba_tutorial._check import (
    check_alike,
    check_choice,
    check_flag,
    check_input,
    check_length,
    check_memory,
    check_number,
    check_room,
    check_row,
    check_shape,
    wide,
)
from mamba_tutorial.mamba._convolution import CausalConv1d
from mamba_tutorial.selective import SelectiveSSM

Sequence = Float[Tensor, "batch length d_model"]
Token = Float[Tensor, "batch d_model"]
SEQUENCE = "batch length d_model"


@dataclass(frozen=True)
class MambaConfig:
    """The sizes of a Mamba model, and how it starts.

    Attributes:
        d_model: the width of the residual stream.
        n_layer: the number of blocks.
        vocab_size: the number of tokens.
        d_state: the numbers that each channel remembers, N.
        d_conv: the width of the causal convolution.
        expand: d_inner = expand · d_model channels inside the block.
        dt_rank: the rank of the projection to Δ; "auto" is ⌈d_model / 16⌉.
        conv_bias: whether the convolution has a bias.
        bias: whether the projections into and out of the block have one.
        tie_embeddings: whether the head uses the embedding's matrix.
        norm_eps: added to the mean square in the norms.
        pad_vocab_size_multiple: the embedding gets rows up to a multiple of this. They are no
            tokens: logits have vocab_size entries.
        dt_min, dt_max, dt_floor: the range of Δ at the start, as in `SelectiveSSM`.

    Raises:
        TypeError: a field is of another type; whole numbers may be NumPy's, True is no number.
        ValueError: a size is below 1, norm_eps or dt_floor is negative, or not 0 < dt_min ≤ dt_max;
            a number is NaN or infinite.
    """

    d_model: int
    n_layer: int
    vocab_size: int
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | Literal["auto"] = "auto"
    conv_bias: bool = True
    bias: bool = False
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    pad_vocab_size_multiple: int = 8
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_floor: float = 1e-4

    def __post_init__(self):
        if isinstance(self.dt_rank, str):
            check_choice("dt_rank", self.dt_rank, ["auto"])
        sizes = ["d_model", "n_layer", "vocab_size", "d_state", "d_conv", "expand"]
        sizes += ["pad_vocab_size_multiple"] + ["dt_rank"] * (not isinstance(self.dt_rank, str))
        checked = {name: check_length(getattr(self, name), name=name) for name in sizes}
        for name in ("conv_bias", "bias", "tie_embeddings"):
            checked[name] = check_flag(name, getattr(self, name))
        for name, bounds in (
            ("norm_eps", {"least": 0}),
            ("dt_max", {"above": 0}),
            ("dt_min", {"above": 0, "most": self.dt_max}),
            ("dt_floor", {"least": 0}),
        ):
            checked[name] = float(check_number(name, getattr(self, name), **bounds))
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    @property
    def d_inner(self) -> int:
        """The number of channels inside a block."""
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        """The rank of the projection to Δ, as a number."""
        return -(-self.d_model // 16) if self.dt_rank == "auto" else self.dt_rank

    @property
    def rows(self) -> int:
        """The rows of the embedding, padding included."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple


class BlockState(NamedTuple):
    """What a block carries from token to token; its size does not depend on how many there were.

    Attributes:
        conv: (batch, d_conv − 1, d_inner), the last inputs of the convolution.
        h: (batch, d_inner, d_state), the state of the selective state space model.
    """

    conv: Float[Tensor, "batch window d_inner"]
    h: Float[Tensor, "batch d_inner d_state"]


BlockState.__module__ = "mamba_tutorial.mamba"  # what a saved state names
torch.serialization.add_safe_globals([BlockState])  # so that torch.load takes it


class MambaBlock(nn.Module):
    """Project in, convolve, select and scan, gate, project out.

    The width of the convolution, d_conv, is short: by it, Δ, B and C and what is written
    into the state are made of a few tokens instead of one. The state starts at zero.

    Args:
        config: the sizes; n_layer and vocab_size play no part here.

    Raises:
        TypeError: config is no MambaConfig.
    """

    def __init__(self, config: MambaConfig):
        check_config(config)
        super().__init__()
        self.d_model, d_inner = config.d_model, config.d_inner
        self.in_proj = nn.Linear(config.d_model, 2 * d_inner, bias=config.bias)
        self.conv1d = CausalConv1d(d_inner, config.d_conv, config.conv_bias)
        self.ssm = SelectiveSSM(
            d_inner,
            config.d_state,
            config.rank,
            dt_min=config.dt_min,
            dt_max=config.dt_max,
            dt_floor=config.dt_floor,
        )
        self.out_proj = nn.Linear(d_inner, config.d_model, bias=config.bias)
        if config.bias:
            nn.init.zeros_(self.in_proj.bias)
            nn.init.zeros_(self.out_proj.bias)

    def initial_state(self, batch: int) -> BlockState:
        """Return the state before the first token: zeros.

        Raises:
            TypeError, ValueError: batch is no whole number, negative, or more than there is room.
        """
        batch = check_length(batch, name="batch", least=0)
        A_log, weight = self.ssm.A_log, self.conv1d.weight
        conv, h = self._state_shapes(batch)
        check_memory("batch", batch, math.prod(conv) + math.prod(h))
        return BlockState(
            torch.zeros(conv, dtype=weight.dtype, device=weight.device),
            torch.zeros(h, dtype=wide(A_log.dtype), device=A_log.device),
        )

    def forward(
        self,
        x: Sequence | Token,
        state: BlockState | None = None,
        starts: Bool[Tensor, "batch length"] | None = None,
    ) -> Sequence | Token | tuple[Sequence | Token, BlockState]:
        """Run over sequences from their start; or, given a state, go on from there and return it.

        Args:
            x: (batch, length, d_model), or, with a state, (batch, d_model) for one token of each.
            state: what came before, from `initial_state` or an earlier call.
            starts: (batch, length), true where a new sequence begins: nothing before it is seen, by
                the convolution nor by the state. So sequences can lie in a row.

        Returns:
            y, like x; if a state was given, also the state after it.

        Raises:
            TypeError, ValueError: x or the state is of another kind, shape, dtype or device.
        """
        check_input("x", x, self.in_proj)
        self._check_shape(x, "batch d_model" if state is not None and x.ndim == 2 else SEQUENCE)
        conv = h = None
        if state is not None:
            conv, h = self._checked(state, x)
        if starts is not None:
            check_row(starts, x, 3)
        row = () if starts is None else (starts,)
        inner, z = self.in_proj(x).chunk(2, dim=-1)
        mixed, conv = self.conv1d(inner, conv, *row)
        y, h = self.ssm(mixed, z, h, *row)
        y = self.out_proj(y)
        return y if state is None else (y, BlockState(conv, h))

    def prefill(
        self,
        x: Sequence,
        state: BlockState,
        starts: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Sequence, BlockState]:
        """Read a piece of the sequences; return its outputs and the state after it.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        check_input("x", x, self.in_proj)
        self._check_shape(x, SEQUENCE)
        return self(x, self._checked(state, x), starts)

    def step(self, x: Token, state: BlockState) -> tuple[Token, BlockState]:
        """Read one token of each sequence; return its output and the state after it.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        check_input("x", x, self.in_proj)
        self._check_shape(x, "batch d_model")
        return self(x, self._checked(state, x))

    def _check_shape(self, x: Tensor, axes: str) -> None:
        check_shape("x", x, axes, d_model=self.d_model)
        if x.ndim == 3 and x.shape[1] == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected a length of at least 1")

    def _state_shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        d_inner, _, d_conv = self.conv1d.weight.shape
        return (batch, d_conv - 1, d_inner), (batch, *self.ssm.A_log.shape)

    def _checked(self, state: BlockState, x: Tensor) -> BlockState:
        """Return the state, if it fits x, as a BlockState: a pair of tensors will do."""
        if not isinstance(state, tuple) or len(state) != 2:
            given = type(state).__name__
            raise TypeError(f"state is a {given}, expected a BlockState, of conv and h")
        for name, part, shape in zip(
            BlockState._fields, state, self._state_shapes(x.shape[0]), strict=True
        ):
            check_alike(f"state.{name}", part, x)
            if part.shape != shape:
                given = tuple(part.shape)
                raise ValueError(f"state.{name} has shape {given}, expected {tuple(shape)}")
        return BlockState(*state)


def check_config(config: MambaConfig) -> None:
    """Check that a model of these sizes can be made at all."""
    if not isinstance(config, MambaConfig):
        raise TypeError(f"config is a {type(config).__name__}, expected a MambaConfig")
    projections = 3 * config.d_inner * config.d_model
    check_room("d_model of config", config.d_model, projections // 2)
    check_room("d_conv of config", config.d_conv, config.d_conv * config.d_inner // 2)
