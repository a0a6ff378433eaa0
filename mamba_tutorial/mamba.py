"""Mamba: the block around the selective state space model, and a language model of such blocks.

    block      x, z = W_in u;   x = silu(conv(x));   y = SSM(x) · silu(z);   u ← W_out y
    model      embedding, then n_layer times u ← u + block(rmsnorm(u)), then rmsnorm and the head

From the Mamba paper (Gu and Dao 2023), Section 3.4, and `Mamba`, `Block` and `MambaLMHeadModel` of
mamba_ssm. The names of the parameters follow the released code.

A sequence can be read in three ways, with the same result: whole (`forward`), in pieces (`prefill`,
which takes a state and returns one), and token by token (`step`).
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mamba_tutorial import checkpoints
from mamba_tutorial._check import check_length, installed
from mamba_tutorial.selective import SelectiveSSM

Sequence = Float[Tensor, "batch length d_model"]
Token = Float[Tensor, "batch d_model"]
Ids = Int[Tensor, "batch length"]


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
        TypeError, ValueError: a size is not a positive whole number.
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
        sizes = ["d_model", "n_layer", "vocab_size", "d_state", "d_conv", "expand"]
        sizes += ["pad_vocab_size_multiple"] + ["dt_rank"] * (self.dt_rank != "auto")
        for name in sizes:
            check_length(getattr(self, name), name=name)

    @property
    def d_inner(self) -> int:
        """The number of channels inside a block."""
        return self.expand * self.d_model

    @property
    def rank(self) -> int:
        """The rank of the projection to Δ, as a number."""
        return math.ceil(self.d_model / 16) if self.dt_rank == "auto" else self.dt_rank

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


class MambaBlock(nn.Module):
    """Project in, convolve, select and scan, gate, project out.

    The width of the convolution, d_conv, is short: it lets Δ, B and C depend on a few tokens
    instead of one. The state starts at zero.

    Args:
        config: the sizes; n_layer and vocab_size play no part here.
    """

    def __init__(self, config: MambaConfig):
        super().__init__()
        d_inner = config.d_inner
        self.in_proj = nn.Linear(config.d_model, 2 * d_inner, bias=config.bias)
        self.conv1d = nn.Conv1d(
            d_inner, d_inner, config.d_conv, groups=d_inner, bias=config.conv_bias
        )
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
        """Return the state before the first token: zeros."""
        check_length(batch, name="batch")
        d_inner, _, d_conv = self.conv1d.weight.shape
        conv = self.in_proj.weight.new_zeros(batch, d_conv - 1, d_inner)
        return BlockState(conv, self.ssm.A_log.new_zeros(batch, *self.ssm.A_log.shape).float())

    def forward(self, x: Sequence) -> Sequence:
        """Run over whole sequences."""
        return self.prefill(x, self.initial_state(len(x)))[0]

    def prefill(self, x: Sequence, state: BlockState) -> tuple[Sequence, BlockState]:
        """Read a piece of the sequences; return its outputs and the state after it."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        before = state.conv.to(x.dtype)
        if self._has_kernel(x, state.conv):
            from mamba_tutorial.kernels.conv import causal_conv

            mixed = causal_conv(x, before, self.conv1d.weight.squeeze(1), self.conv1d.bias)
        else:
            window = torch.cat([before, x], dim=1)
            mixed = F.silu(self.conv1d(window.mT).mT)
        y, h = self.ssm(mixed, z, state.h)
        width = before.shape[1]
        end = torch.cat([before, x[:, max(0, x.shape[1] - width) :]], dim=1)
        kept = end[:, end.shape[1] - width :]
        return self.out_proj(y), BlockState(kept, h)

    def step(self, x: Token, state: BlockState) -> tuple[Token, BlockState]:
        """Read one token of each sequence; return its output and the state after it."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        before, weight = state.conv.to(x.dtype), self.conv1d.weight.squeeze(1)
        if self._has_kernel(x, state.conv) and not torch.is_grad_enabled():
            from mamba_tutorial.kernels.decode import conv_step

            mixed, kept = conv_step(x, before, weight, self.conv1d.bias)
        else:
            window = torch.cat([before, x[:, None]], dim=1)
            mixed, kept = (window * weight.mT).sum(1), window[:, 1:]
            if self.conv1d.bias is not None:
                mixed = mixed + self.conv1d.bias
            mixed = F.silu(mixed)
        y, h = self.ssm.step(mixed, state.h, z)
        return self.out_proj(y), BlockState(kept, h)

    def _has_kernel(self, x: Tensor, before: Tensor) -> bool:
        """Say whether the convolution has kernels; they know no gradient of `before`."""
        wide = self.conv1d.kernel_size[0] > 7
        return (
            x.is_cuda
            and x.dtype != torch.float64
            and not (wide or before.requires_grad)
            and installed("triton")
        )


class _Layer(nn.Module):
    """u ← u + block(norm(u)), with u in float32 whatever the block computes in."""

    def __init__(self, config: MambaConfig):
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mixer = MambaBlock(config)

    def run(self, u: Tensor, state: BlockState) -> tuple[Tensor, BlockState]:
        """Read a piece (batch, length, d_model) or a token (batch, d_model)."""
        read = self.mixer.step if u.ndim == 2 else self.mixer.prefill
        y, state = read(self.norm(u.to(self.norm.weight.dtype)), state)
        return u + y.float(), state


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

    def forward(self, ids: Ids) -> Float[Tensor, "batch length vocab_size"]:
        """Return the logits of the next token after every token.

        Raises:
            TypeError: ids is no tensor of whole numbers.
            ValueError: ids is not (batch, length), is empty, or has an id outside the vocabulary.
        """
        return self.prefill(ids)[0]

    def prefill(
        self, ids: Ids, state: State | None = None
    ) -> tuple[Float[Tensor, "batch length vocab_size"], State]:
        """Read a piece of the sequences after others; return its logits and the state after it.

        Args:
            ids: (batch, length).
            state: what `prefill` or `step` returned last; None at the start of the sequences.

        Raises:
            TypeError, ValueError: as `forward`; or the state is of another batch or model.
        """
        u, state = self._read(ids, state)
        return self._logits(u), state

    def step(
        self, ids: Int[Tensor, " batch"], state: State
    ) -> tuple[Float[Tensor, "batch vocab_size"], State]:
        """Read one token of each sequence; return the logits of the next, and the state.

        Raises:
            TypeError, ValueError: as `prefill`, with ids (batch,).
        """
        u, state = self._read(ids, state)
        return self._logits(u), state

    @torch.no_grad()
    def stream(
        self,
        ids: Ids,
        max_new_tokens: int,
        temperature: float | int = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Int[Tensor, " batch"]]:
        """Yield the next tokens of each sequence, one after the other, as they are drawn.

        The arguments are those of `generate`. A sequence that has ended goes on with eos; when all
        have ended, so does the stream.
        """
        check_length(max_new_tokens, name="max_new_tokens")
        _check_sampling(temperature, top_k, top_p)
        u, state = self._read(ids, None)
        logits = self._logits(u[:, -1])
        ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        advance = self.step
        if ids.is_cuda and max_new_tokens > 1 and not torch.is_autocast_enabled("cuda"):
            advance = StepGraph(self, len(ids))
        for count in range(max_new_tokens):
            token = sample(logits, temperature, top_k, top_p, generator)
            if eos is not None:
                token = token.masked_fill(ended, eos)
                ended |= token == eos
            yield token
            if count == max_new_tokens - 1 or (eos is not None and ended.all()):
                return
            logits, state = advance(token, state)

    def generate(
        self,
        ids: Ids,
        max_new_tokens: int,
        temperature: float | int = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "batch longer"]:
        """Continue the sequences by tokens drawn from the model.

        Args:
            ids: (batch, length), the prompts.
            max_new_tokens: how many tokens to add at most.
            temperature: the logits are divided by it; 0 takes the most probable token.
            top_k: draw from the k most probable tokens only.
            top_p: draw from the fewest most probable tokens that hold this probability together.
            eos: the token that ends a sequence; what follows it is eos again.
            generator: the source of randomness, on the device of ids; PyTorch's own by default.

        Returns:
            (batch, length + new): the prompts and what follows. Fewer than max_new_tokens are new
            if every sequence ended before.

        Raises:
            TypeError, ValueError: as `forward`; or an argument is out of its range.
        """
        sampling = (temperature, top_k, top_p, eos, generator)
        tokens = list(self.stream(ids, max_new_tokens, *sampling))
        return torch.cat([ids, torch.stack(tokens, dim=1)], dim=1)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "MambaLM":
        """Load a trained model, in float32, on the CPU, in evaluation mode.

        Args:
            name: a folder, or a name on the hub such as "state-spaces/mamba-130m" or
                "state-spaces/mamba-130m-hf". Both layouts, safetensors and pickles are read; see
                `mamba_tutorial.checkpoints`.

        Raises:
            FileNotFoundError: there is no such folder, or a file is missing in it.
            ImportError: safetensors or huggingface_hub is needed and not installed.
            ValueError: the config is of another model; a tensor is missing, unknown or has another
                shape; a file is damaged, or holds more than tensors.
        """
        config, tensors = checkpoints.load(checkpoints.locate(name))
        config = MambaConfig(**config)
        with torch.device("meta"):  # the shapes, without numbers that would be thrown away
            model = cls(config)
        tensors = _checked(tensors, model)
        model.load_state_dict({name: t.float() for name, t in tensors.items()}, assign=True)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` and transformers' MambaForCausalLM load.

        The rows of the embedding that are no tokens are left out.

        Raises:
            ImportError: safetensors is not installed.
        """
        tensors = dict(self.state_dict())
        for name in {"embedding.weight", "lm_head.weight"} & set(tensors):
            tensors[name] = tensors[name][: self.config.vocab_size]
        config = asdict(self.config) | {"dt_rank": self.config.rank}
        checkpoints.save(Path(folder), config, tensors)

    def _read(self, ids: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Check; return what enters the head, and the state."""
        _check_ids(ids, self.config.vocab_size)
        if state is None:
            state = self.initial_state(len(ids))
        _check_state(state, len(ids), self.config)
        return self._run(ids, state)

    def _run(self, ids: Tensor, state: State) -> tuple[Tensor, State]:
        u = self.embedding(ids).float()
        states = []
        for layer, before in zip(self.layers, state, strict=True):
            u, after = layer.run(u, before)
            states.append(after)
        return u, tuple(states)

    def _logits(self, u: Tensor) -> Tensor:
        head = self.embedding if self.config.tie_embeddings else self.lm_head
        u = self.norm_f(u.to(self.norm_f.weight.dtype))
        return F.linear(u, head.weight[: self.config.vocab_size])


class StepGraph:
    """`MambaLM.step` on a GPU as one CUDA graph: recorded once, then replayed.

    A step is some fifteen kernels for each layer, and each runs for a few microseconds. To start
    them one by one from Python takes longer than to run them. Recorded, they start all at once.

    A graph reads and writes fixed places in memory. So the logits and the state that a call returns
    are overwritten by the next, ids are not checked, and the model's parameters must stay where
    they are.

    Args:
        model: on a GPU.
        batch: the number of sequences.

    Raises:
        ValueError: the model is not on a GPU.
    """

    @torch.no_grad()
    def __init__(self, model: MambaLM, batch: int):
        device = model.embedding.weight.device
        if device.type != "cuda":
            raise ValueError(f"model is on {device}, expected a GPU")
        self.ids = torch.zeros(batch, dtype=torch.long, device=device)
        self.state = model.initial_state(batch)
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):  # kernels are compiled and libraries set up beforehand
            for _ in range(2):
                model._logits(model._run(self.ids, self.state)[0])
        torch.cuda.current_stream(device).wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            u, after = model._run(self.ids, self.state)
            self.logits = model._logits(u)
            self._copy(after)

    def __call__(
        self, ids: Int[Tensor, " batch"], state: State
    ) -> tuple[Float[Tensor, "batch vocab_size"], State]:
        """Read one token of each sequence; see `MambaLM.step`."""
        self.ids.copy_(ids)
        if state is not self.state:
            self._copy(state)
        self.graph.replay()
        return self.logits, self.state

    def _copy(self, state: State) -> None:
        """Write a state where the graph reads it."""
        torch._foreach_copy_([*chain.from_iterable(self.state)], [*chain.from_iterable(state)])


def sample(
    logits: Float[Tensor, "batch vocab_size"],
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " batch"]:
    """Draw a token for each row of logits; the arguments are those of `MambaLM.generate`."""
    _check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    values, tokens = (logits.float() / temperature).sort(dim=-1, descending=True)
    probabilities = values.softmax(-1)
    if top_k is not None:
        probabilities[:, top_k:] = 0
    if top_p is not None:  # drop a token if those before it hold enough
        share = probabilities / probabilities.sum(-1, keepdim=True)
        probabilities[share.cumsum(-1) - share >= top_p] = 0
    return tokens.gather(1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(1)


def _check_sampling(temperature: float | int, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, expected a number ≥ 0")
    if top_k is not None:
        check_length(top_k, name="top_k")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, expected 0 < top_p ≤ 1")


def _check_ids(ids: Tensor, vocab_size: int) -> None:
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex():
        given = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"ids is a {given}, expected a tensor of whole numbers")
    if ids.ndim not in (1, 2) or ids.numel() == 0:
        needed = "expected (batch, length) with at least one token"
        raise ValueError(f"ids has shape {tuple(ids.shape)}, {needed}")
    least, most = ids.min().item(), ids.max().item()
    if least < 0 or most >= vocab_size:
        wrong = least if least < 0 else most
        raise ValueError(f"ids holds {wrong}, expected token ids from 0 to {vocab_size - 1}")


def _check_state(state: State, batch: int, config: MambaConfig) -> None:
    conv, h = (batch, config.d_conv - 1, config.d_inner), (batch, config.d_inner, config.d_state)
    given = {(tuple(block.conv.shape), tuple(block.h.shape)) for block in state}
    if len(state) != config.n_layer or given != {(conv, h)}:
        raise ValueError(
            f"state has {len(state)} blocks of shapes {', '.join(map(str, given))}, expected "
            f"{config.n_layer} blocks of shapes {(conv, h)}, for a batch of {batch}"
        )


def _checked(tensors: dict[str, Tensor], model: MambaLM) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint if they are those of the model, each of its shape."""
    hf_name = checkpoints.hf_name
    if model.config.tie_embeddings and "lm_head.weight" in tensors:
        tensors = dict(tensors)
        head = tensors.pop("lm_head.weight")
        if "embedding.weight" in tensors and not torch.equal(head, tensors["embedding.weight"]):
            embedding = hf_name("embedding.weight")
            raise ValueError(
                f"lm_head.weight differs from {embedding}, though the config ties them"
            )
    expected = model.state_dict()
    for problem, names in (
        ("misses", expected.keys() - tensors.keys()),
        ("has unknown", tensors.keys() - expected.keys()),
    ):
        if names:
            listed = ", ".join(sorted(map(hf_name, names)))
            raise ValueError(f"the checkpoint {problem} tensors: {listed}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            needed = f"expected {tuple(expected[name].shape)} by its config"
            given = f"{hf_name(name)} has shape {tuple(tensor.shape)} in the checkpoint"
            raise ValueError(f"{given}, {needed}")
    return tensors
