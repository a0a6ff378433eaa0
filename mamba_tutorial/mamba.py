"""Mamba: the block around the selective state space model, and a language model of such blocks.

    block      x, z = W_in u;   x = silu(conv(x));   y = SSM(x) · silu(z);   u ← W_out y
    model      embedding, then n_layer times u ← u + block(rmsnorm(u)), then rmsnorm and the head

From the Mamba paper (Gu and Dao 2023), Section 3.4, and `Mamba`, `Block` and `MambaLMHeadModel` of
mamba_ssm. The names of the parameters follow the released code, but for those in
`checkpoints.RENAMES`.

A sequence can be read in three ways, with the same result: whole (`forward`), in pieces (`prefill`,
which takes a state and returns one), and token by token (`step`).
"""

import math
from collections.abc import Collection, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mamba_tutorial import checkpoints
from mamba_tutorial._check import (
    HAS_TRITON,
    check_alike,
    check_choice,
    check_flag,
    check_ids,
    check_ids_axes,
    check_input,
    check_length,
    check_memory,
    check_number,
    check_room,
    check_row,
    check_shape,
    wide,
)
from mamba_tutorial.generation import (
    check_sampling,
    end_tokens,
    filled_up,
    lent_graph,
    repeated_less,
    sample,
    starts_of,
)
from mamba_tutorial.ops import register, vjp
from mamba_tutorial.selective import SelectiveSSM

Sequence = Float[Tensor, "batch length d_model"]
Token = Float[Tensor, "batch d_model"]
Ids = Int[Tensor, "batch length"]
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


State = tuple[BlockState, ...]  # one for each block of a model
torch.serialization.add_safe_globals([BlockState])  # so that torch.load takes a saved state


class CausalConv1d(nn.Conv1d):
    """silu of a causal convolution, of each channel by itself; channels last.

        y_t = silu(bias + Σ_k weight_k x_{t − width + 1 + k})

    It reads sequences, or one token of each, after the `width − 1` tokens before them. On a GPU it
    is a kernel.

    Args:
        channels: the number of channels.
        width: the number of tokens that an output depends on.
        bias: whether there is a bias.
    """

    def __init__(self, channels: int, width: int, bias: bool):
        super().__init__(channels, channels, width, groups=channels, bias=bias)

    def forward(
        self, x: Tensor, before: Tensor | None = None, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return y and the last width − 1 tokens, for the next call.

        Those are None after whole sequences that none were given before.

        Args:
            x: (batch, length, channels), or (batch, channels) for one token.
            before: (batch, width − 1, channels), the tokens before; zeros by default.
            starts: (batch, length), true where a new sequence begins, which sees none before it.

        Raises:
            TypeError, ValueError: starts does not fit x, or is given with one token.
        """
        if starts is not None:
            check_row(starts, x, 3)
        width, first = self.kernel_size[0] - 1, before is None
        before = x.new_zeros(x.shape[0], width, x.shape[-1]) if first else before.to(x.dtype)
        given = x, before, self.weight.squeeze(1), self.bias
        has_kernel = x.is_cuda and x.dtype != torch.float64 and width < 7 and HAS_TRITON
        if x.ndim == 2:
            return _CONV_STEP(*given) if has_kernel else _convolve_token(*given)
        y = (_CONV if has_kernel else _convolve)(*given, starts)
        if first:
            return y, None
        end = torch.cat([before, x[:, max(0, x.shape[1] - width) :]], 1)
        end = end[:, end.shape[1] - width :]
        if starts is not None:
            distance = torch.arange(width - 1, -1, -1, device=x.device)
            end = end.masked_fill((_since_start(starts)[:, -1:] < distance)[..., None], 0)
        return y, end


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
        _check_config(config)
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


def _check_config(config: MambaConfig) -> None:
    if not isinstance(config, MambaConfig):
        raise TypeError(f"config is a {type(config).__name__}, expected a MambaConfig")
    projections = 3 * config.d_inner * config.d_model
    check_room("d_model of config", config.d_model, projections // 2)
    check_room("d_conv of config", config.d_conv, config.d_conv * config.d_inner // 2)


# The convolution as an operator: (x, before, weight, bias), with the weight (channels, width).


def _convolve(
    x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None
) -> Tensor:
    """With starts, the window of a token ends at the start of its sequence."""
    window, length, width = torch.cat([before, x], 1), x.shape[1], weight.shape[1]
    taps = [window[:, k : k + length] for k in range(width)]
    if starts is not None:
        since = _since_start(starts)[..., None]
        taps = [tap.masked_fill(since < width - 1 - k, 0) for k, tap in enumerate(taps)]
    return _weighed(taps, weight, bias)


def _convolve_token(
    x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    window = torch.cat([before, x[:, None]], 1)
    return _weighed(window.unbind(1), weight, bias), window[:, 1:]


def _since_start(starts: Tensor) -> Tensor:
    """Return how many tokens ago the sequence of each token began; very many if before this row."""
    t = torch.arange(starts.shape[1], device=starts.device)
    return t - torch.where(starts, t, -(2**40)).cummax(1).values


def _weighed(tokens: Iterable[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return silu(bias + Σ_k weight_k tokens_k), summed in float32 at least."""
    dtype = wide(weight.dtype)
    total = torch.zeros_like(weight[:, 0]) if bias is None else bias
    total = total.to(dtype)
    for k, token in enumerate(tokens):
        total = torch.addcmul(total, token.to(dtype), weight[:, k].to(dtype))
    return F.silu(total).to(token.dtype)


def _run_convolution(*given: Tensor | None) -> Tensor:
    from mamba_tutorial.kernels.conv import causal_conv

    return causal_conv(*given)


def _convolution_gradient(wanted, upstream, inputs, kept) -> Iterable[Tensor | None]:
    dx, sums = _CONV_GRADIENTS(*upstream, *inputs)
    dbefore = _gradient_before(*upstream, *inputs) if wanted[1] else None
    return dx, dbefore, sums[:-1].mT, sums[-1], None


def _gradient_before(dy, x, before, weight, bias, starts) -> Tensor:
    """The kernel knows none for the tokens before. As many tokens after them see them."""
    seeing, wanted = slice(before.shape[1]), (False, True, False, False, False)
    given = x[:, seeing], before, weight, bias, None if starts is None else starts[:, seeing]
    return vjp(_convolve, wanted, (dy[:, seeing],), given)[1]


def _run_convolution_gradients(*given: Tensor | None) -> tuple[Tensor, Tensor]:
    from mamba_tutorial.kernels.conv import gradients

    return gradients(*given)


def _convolution_gradients(dy, x, before, weight, bias, starts) -> tuple[Tensor, Tensor]:
    bias = torch.zeros_like(weight[:, 0]) if bias is None else bias
    wanted, given = (True, False, True, True, False), (x, before, weight, bias, starts)
    dx, _, dweight, dbias, _ = vjp(_convolve, wanted, (dy,), given)
    return dx, torch.cat([dweight.mT, dbias[None]]).float()


def _run_convolution_step(x, before, weight, bias) -> tuple[Tensor, Tensor]:
    from mamba_tutorial.kernels.decode import conv_step

    return conv_step(x, before, weight, bias)


_CONV = register(
    "causal_conv",
    "(Tensor x, Tensor before, Tensor weight, Tensor? bias, Tensor? starts) -> Tensor",
    run=_run_convolution,
    like=lambda x, *_: x.new_empty(x.shape),
    definition=_convolve,
    gradient=_convolution_gradient,
)
_CONV_GRADIENTS = register(
    "causal_conv_backward",
    "(Tensor dy, Tensor x, Tensor before, Tensor weight, Tensor? bias, Tensor? starts)"
    " -> (Tensor, Tensor)",
    run=_run_convolution_gradients,
    like=lambda dy, x, before, weight, *_: (
        x.new_empty(x.shape),
        x.new_empty(weight.shape[1] + 1, weight.shape[0], dtype=torch.float32),
    ),
    definition=_convolution_gradients,
)
_CONV_STEP = register(
    "causal_conv_step",
    "(Tensor x, Tensor before, Tensor weight, Tensor? bias) -> (Tensor, Tensor)",
    run=_run_convolution_step,
    like=lambda x, before, *_: (x.new_empty(x.shape), x.new_empty(before.shape)),
    definition=_convolve_token,
)


class _Layer(nn.Module):
    """u ← u + block(norm(u)), with u in float32 at least, whatever the block computes in."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mixer = MambaBlock(config)

    def forward(
        self, u: Tensor, state: BlockState | None = None, starts: Tensor | None = None
    ) -> Tensor | tuple[Tensor, BlockState]:
        """Read sequences or a token of each; see `MambaBlock.forward`."""
        given = self.norm(u.to(self.norm.weight.dtype))
        row = {} if starts is None else {"starts": starts}
        if state is None:
            return u + self.mixer(given, **row).to(u.dtype)
        y, state = self.mixer(given, state, **row)
        return u + y.to(u.dtype), state


class MambaLM(nn.Module):
    """A language model of Mamba blocks: token ids in, logits of the next token out.

    The start is that of `MambaLMHeadModel`: embeddings normal with deviation 0.02, the weights of
    every out_proj divided by √n_layer, biases zero but for the convolution's and Δ's.

    A_log and D keep float32 under autocast. They should not decay, nor should biases and norms:
    `mamba_tutorial.training.parameter_groups` sorts the parameters for an optimizer.

    Args:
        config: the sizes.
    """

    def __init__(self, config: MambaConfig):
        _check_config(config)
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.rows, config.d_model)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.n_layer))
        self.norm_f = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.rows, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        with torch.no_grad():
            for layer in self.layers:
                layer.mixer.out_proj.weight /= math.sqrt(config.n_layer)

    def num_parameters(self) -> int:
        """Return the number of parameters; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def initial_state(self, batch: int) -> State:
        """Return the state before the first token of `batch` sequences."""
        return tuple(layer.mixer.initial_state(batch) for layer in self.layers)

    def forward(
        self,
        ids: Ids | Int[Tensor, " batch"],
        state: State | None = None,
        *,
        last: bool = False,
        starts: Bool[Tensor, "batch length"] | None = None,
    ) -> Tensor | tuple[Tensor, State]:
        """Return the logits of the next token after every token.

        `prefill` and `step` are this call with a state, and so is generation; whatever is hooked to
        the model or its layers sees them all.

        Args:
            ids: (batch, length), whole numbers; with a state also (batch,), one token of each.
            state: what was read before; None for the start of the sequences.
            last: return the logits after the last token only, (batch, vocab_size).
            starts: (batch, length), true where a new sequence begins: nothing before it is seen. So
                sequences can be packed into rows; and what fills a row up before a sequence, on its
                left, is without effect.

        Returns:
            Logits (batch, length, vocab_size), or (batch, vocab_size) of one token; if a state was
            given, also the state after the tokens.

        Raises:
            TypeError: ids is no tensor of whole numbers; the state is none.
            ValueError: ids is not (batch, length), is empty, or has an id outside the vocabulary
                (on a GPU, where that is not waited for, such an id ends the program); the state is
                of another batch or model.
        """
        check_flag("last", last)
        ids = self._check_ids(ids, (2,) if state is None else (1, 2))
        if state is not None:
            _check_state(state, self.config.n_layer)
        if starts is not None:
            check_row(starts, ids, 2)
        u, state = self._run(ids, state, starts)
        logits = self._logits(u[:, -1] if last and ids.ndim == 2 else u)
        return logits if state is None else (logits, state)

    def hidden_states(self, ids: Ids) -> list[Float[Tensor, "batch length d_model"]]:
        """Return the residual stream: the embedding, what each layer makes of it, and the norm's.

        These are n_layer + 2 tensors; transformers returns the same without the first.

        Raises:
            TypeError, ValueError: as `forward`.
        """
        u = self.embedding(self._check_ids(ids, (2,)))
        stream = [u.to(wide(u.dtype))]
        for layer in self.layers:
            stream.append(layer(stream[-1]))
        return [*stream, self.norm_f(stream[-1].to(self.norm_f.weight.dtype))]

    def prefill(
        self,
        ids: Ids,
        state: State | None = None,
        starts: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Float[Tensor, "batch length vocab_size"], State]:
        """Read a piece of the sequences after others; return its logits and the state after it.

        Args:
            ids: (batch, length).
            state: what `prefill` or `step` returned last; None at the start of the sequences.
            starts: (batch, length), true where a new sequence begins, as in `forward`.

        Raises:
            TypeError, ValueError: as `forward`; or the state is of another batch or model.
        """
        check_ids_axes(ids, (2,))
        state = self.initial_state(len(ids)) if state is None else state
        return self(ids, state, starts=starts)

    def step(
        self, ids: Int[Tensor, " batch"], state: State
    ) -> tuple[Float[Tensor, "batch vocab_size"], State]:
        """Read one token of each sequence; return the logits of the next, and the state.

        Raises:
            TypeError, ValueError: as `prefill`, with ids (batch,).
        """
        check_ids_axes(ids, (1,))
        _check_state(state, self.config.n_layer)
        return self(ids, state)

    @torch.no_grad()
    def stream(
        self,
        ids: Ids,
        max_new_tokens: int,
        temperature: float | int = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | Collection[int] | None = None,
        generator: torch.Generator | None = None,
        state: State | None = None,
        min_p: float | None = None,
        repetition_penalty: float | int = 1.0,
        mask: Bool[Tensor, "batch length"] | None = None,
    ) -> Iterator[Int[Tensor, " batch"]]:
        """Yield the next tokens of each sequence, one after the other, as they are drawn.

        The arguments are those of `generate`. A sequence that has ended goes on with eos; when all
        have ended, so does the stream. Nothing is computed, nor checked, before the first token is
        asked for.

        Raises:
            TypeError, ValueError: as `generate`, at the first token.
        """
        max_new_tokens = check_length(max_new_tokens, name="max_new_tokens")
        check_sampling(temperature, top_k, top_p, generator, min_p)
        check_number("repetition_penalty", repetition_penalty, above=0)
        check_ids_axes(ids, (2,))
        ends = end_tokens(eos, self.config.vocab_size, ids.device)
        starts = None if mask is None else starts_of(mask, ids, state)
        seen = None
        if repetition_penalty != 1:
            ids = self._check_ids(ids, (2,))
            seen = ids.new_zeros(len(ids), self.config.vocab_size, dtype=torch.bool)
            tokens = ids if mask is None else torch.where(mask, ids, ids[:, -1:])
            seen.scatter_(1, tokens, value=True)
        state = self.initial_state(len(ids)) if state is None else state
        logits, state = self(ids, state, last=True, starts=starts)
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        graphed = ids.is_cuda and max_new_tokens > 1 and not torch.is_autocast_enabled("cuda")
        with lent_graph(self, len(ids)) if graphed else nullcontext(self) as advance:
            for count in range(max_new_tokens):
                if seen is not None:
                    logits = repeated_less(logits, seen, repetition_penalty)
                token = sample(logits, temperature, top_k, top_p, generator, min_p)
                if ends is not None:
                    token = torch.where(ended, ends[0], token)
                    ended |= torch.isin(token, ends)
                yield token
                if count == max_new_tokens - 1 or (ends is not None and ended.all()):
                    return
                if seen is not None:
                    seen.scatter_(1, token[:, None], value=True)
                logits, state = advance(token, state)

    def generate(
        self,
        ids: Ids | list[Int[Tensor, " _"]],
        max_new_tokens: int,
        temperature: float | int = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | Collection[int] | None = None,
        generator: torch.Generator | None = None,
        state: State | None = None,
        min_p: float | None = None,
        repetition_penalty: float | int = 1.0,
        mask: Bool[Tensor, "batch length"] | None = None,
    ) -> Int[Tensor, "batch longer"] | list[Int[Tensor, " _"]]:
        """Continue the sequences by tokens drawn from the model.

        Args:
            ids: (batch, length), the prompts; or a list of them, of any lengths.
            max_new_tokens: how many tokens to add at most.
            temperature: the logits are divided by it; 0 takes the most probable token.
            top_k: draw from the k most probable tokens only.
            top_p: draw from the fewest most probable tokens that hold this probability together.
            eos: the token that ends a sequence, or several such; what follows is the first of them.
            generator: the source of randomness, on the device of ids; PyTorch's own by default.
            state: what was read before the prompts, as `prefill` returns it; they have one length.
            min_p: draw from the tokens only that are at least min_p times as probable as the most
                probable one (Nguyen et al. 2024).
            repetition_penalty: logits of tokens that the prompt or the new tokens hold already are
                divided by it if positive, else multiplied (Keskar et al. 2019); 1 for none.
            mask: (batch, length), false for what fills up a prompt, on its left, to the length of
                the longest; transformers calls it attention_mask. Not with a state.

        Returns:
            (batch, length + new): the prompts and what follows, or a list of such rows if a list
            was given. Fewer than max_new_tokens are new if every sequence ended before.

        On a GPU the steps are a CUDA graph (`StepGraph`). It stays for the next call, with the room
        of one state, until the model goes or changes.

        Raises:
            TypeError, ValueError: as `forward`; or an argument is out of its range.
        """
        max_new_tokens = check_length(max_new_tokens, name="max_new_tokens")
        prompts = None
        if isinstance(ids, list):
            if mask is not None:
                raise ValueError("mask is given with a list of ids, expected None")
            prompts, (ids, mask) = ids, filled_up(ids)
            if mask is not None and state is not None:
                lengths = [len(prompt) for prompt in prompts]
                raise ValueError(f"ids have lengths {lengths} after a state, expected one length")
        check_ids_axes(ids, (2,))
        check_memory("max_new_tokens", max_new_tokens, max_new_tokens * len(ids))
        sampling = temperature, top_k, top_p, eos, generator, state, min_p, repetition_penalty
        new = torch.stack(list(self.stream(ids, max_new_tokens, *sampling, mask)), dim=1)
        if prompts is not None:
            return [torch.cat([one.long(), row]) for one, row in zip(prompts, new, strict=True)]
        return torch.cat([ids.long(), new], dim=1)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "MambaLM":
        """Load a trained model, in float32, on the CPU, in evaluation mode.

        Args:
            name: a folder; or, as a str, a name on the hub such as "state-spaces/mamba-130m" or
                "state-spaces/mamba-130m-hf". Both layouts, safetensors and pickles are read; see
                `mamba_tutorial.checkpoints`.

        Raises:
            TypeError: name is no str and no path.
            FileNotFoundError: there is no such folder, or a file is missing in it.
            ImportError: safetensors or huggingface_hub is needed and not installed.
            ValueError: the config is of another model; a tensor is missing, unknown or given twice,
                has another shape, or holds no finite floats; a file is damaged, or holds more than
                tensors. The message names the file.
        """
        config, tensors = checkpoints.load(checkpoints.locate(name), MambaConfig)
        with torch.device("meta"):  # the modules, without numbers that would be thrown away
            model = cls(config)
        model.load_state_dict(tensors, assign=True)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` and transformers' MambaForCausalLM load.

        The rows of the embedding that are no tokens are left out. If anything fails, the folder is
        as it was; if the machine stops half-way, `from_pretrained` notices.

        Raises:
            TypeError: folder is no str and no path.
            ImportError: safetensors is not installed.
            OSError: the folder cannot be written, or the disk is full.
            ValueError: a tensor is not one of the config's, or holds no finite floats.
        """
        tensors = dict(self.state_dict())
        for name in {"embedding.weight", "lm_head.weight"} & set(tensors):
            tensors[name] = tensors[name][: self.config.vocab_size]
        config = replace(self.config, dt_rank=self.config.rank, pad_vocab_size_multiple=1)
        checkpoints.save(checkpoints.as_path("folder", folder), config, tensors)

    def _check_ids(self, ids: Tensor, axes: tuple[int, ...]) -> Tensor:
        return check_ids(ids, self.config.vocab_size, axes, self.embedding.weight.device)

    def _run(
        self, ids: Tensor, state: State | None, starts: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        u = self.embedding(ids)
        u = u.to(wide(u.dtype))
        row = {} if starts is None else {"starts": starts}
        if state is None:
            for layer in self.layers:
                u = layer(u, **row)
            return u, None
        states = []
        for layer, before in zip(self.layers, state, strict=True):
            u, after = layer(u, before, **row)
            states.append(after)
        return u, tuple(states)

    def _logits(self, u: Tensor) -> Tensor:
        u, count = self.norm_f(u.to(self.norm_f.weight.dtype)), self.config.vocab_size
        if self.config.tie_embeddings:
            return F.linear(u, self.embedding.weight[:count])
        return self.lm_head(u)[..., :count]


def _check_state(state: State, blocks: int) -> None:
    if not isinstance(state, tuple | list):
        raise TypeError(f"state is a {type(state).__name__}, expected a tuple of BlockStates")
    if len(state) != blocks:
        raise ValueError(f"state has {len(state)} blocks, expected {blocks}")
    if any(block is None for block in state):
        raise TypeError("state has None for a block, expected a BlockState")
