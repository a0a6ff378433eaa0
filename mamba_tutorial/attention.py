"""A causal Transformer, the model that Mamba has to be compared with.

    layer      u ← u + W_o attention(rmsnorm(u));   u ← u + W_down (silu(W_gate v) · W_up v)
    attention  softmax(q kᵀ / √size) v, over the tokens up to its own

where v in the first line is rmsnorm(u). So are Llama (Touvron et al. 2023) and the "Transformer++"
of the Mamba paper (Gu and Dao 2023, Appendix E.2): RMSNorm before each part, SwiGLU, no biases.
Attention alone does not see in which order the tokens are. Three codes say it:

- "absolute": a vector for each place, learned, added to the embedding (Vaswani et al. 2017);
- "rope": queries and keys turned by angles that grow with the place (Su et al. 2021);
- "alibi": scores that fall with the distance (Press et al. 2022).

Like `MambaLM`, a `Transformer` reads sequences whole (`forward`), in pieces (`prefill`) and token
by token (`step`). Its state is a cache of all keys and values, of a length fixed beforehand.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mamba_tutorial._check import (
    can_look_at,
    check_choice,
    check_flag,
    check_ids,
    check_is_tensor,
    check_length,
    check_memory,
    check_number,
    check_room,
    check_shape,
    precise,
)

Position = Literal["absolute", "rope", "alibi"]
POSITIONS = get_args(Position)
Ids = Int[Tensor, "batch length"]


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes of a Transformer.

    Attributes:
        d_model: the width of the residual stream.
        n_layer: the number of layers.
        vocab_size: the number of tokens.
        n_head: heads of attention; d_model is a multiple of it, an even one for "rope".
        position: the code of positions.
        max_length: how many places "absolute" has vectors for; the others take any length.
        d_hidden: the width inside SwiGLU; by default 8/3 · d_model, rounded up to a multiple of 8,
            which has as many parameters as 4 · d_model without a gate.
        tie_embeddings: whether the head uses the embedding's matrix.
        norm_eps: added to the mean square in the norms.

    Raises:
        TypeError: a field is of another type.
        ValueError: a size is below 1, n_head does not divide d_model, the size of a head is odd
            with "rope", or there is no such code.
    """

    d_model: int
    n_layer: int
    vocab_size: int
    n_head: int = 8
    position: Position = "rope"
    max_length: int = 2048
    d_hidden: int | None = None
    tie_embeddings: bool = True
    norm_eps: float = 1e-5

    def __post_init__(self):
        sizes = ["d_model", "n_layer", "vocab_size", "n_head", "max_length"]
        sizes += ["d_hidden"] * (self.d_hidden is not None)
        checked = {name: check_length(getattr(self, name), name=name) for name in sizes}
        checked["tie_embeddings"] = check_flag("tie_embeddings", self.tie_embeddings)
        checked["norm_eps"] = float(check_number("norm_eps", self.norm_eps, least=0))
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen
        check_choice("position", self.position, POSITIONS)
        even = self.position == "rope"
        if self.d_model % (self.n_head * (1 + even)):
            needed = f"expected a divisor of d_model / {1 + even} = {self.d_model / (1 + even):g}"
            raise ValueError(f"n_head is {self.n_head}, {needed}")

    @property
    def hidden(self) -> int:
        """The width inside SwiGLU, as a number."""
        return -(-self.d_model // 3) * 8 if self.d_hidden is None else self.d_hidden


class Cache(NamedTuple):
    """The keys and values of all tokens so far, with room for those to come.

    Attributes:
        keys, values: (layers, batch, heads, room, size), written in place.
        length: how many tokens there are, a tensor of one number.
    """

    keys: Tensor
    values: Tensor
    length: Tensor


torch.serialization.add_safe_globals([Cache])  # so that torch.load takes a saved state


def rotary(
    x: Float[Tensor, "*batch length size"], places: Int[Tensor, " length"]
) -> Float[Tensor, "*batch length size"]:
    """Turn the pairs (x_i, x_{i + size/2}) of the token at place t by t · 10000^(−2i/size).

    The product of a query and a key turned so depends on the distance of their places alone. From
    Su et al. (2021), Section 3.2.2, with pairs of both halves as in Llama.

    Raises:
        TypeError: x is no floating tensor, or places holds no whole numbers.
        ValueError: a shape does not fit, or the size is odd.
    """
    check_is_tensor("x", x)
    check_is_tensor("places", places)
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}, expected a floating one")
    if places.is_floating_point() or places.is_complex() or places.dtype == torch.bool:
        raise TypeError(f"places has dtype {places.dtype}, expected whole numbers")
    check_shape("x", x, "... length size")
    check_shape("places", places, "length", length=x.shape[-2])
    if x.shape[-1] % 2:
        raise ValueError(f"x has a size of {x.shape[-1]}, expected an even one")
    if x.device != places.device:
        raise ValueError(f"places is on device {places.device}, expected {x.device}, that of x")
    return _turned(x, *_turns(places, x.shape[-1], x.dtype))


def _turns(places: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (length, size/2) of angles as precise as can be.

    For 100,000 places are 100,000 radians.
    """
    i = precise(torch.arange(size // 2, device=places.device))
    angles = precise(places)[:, None] * 10000.0 ** (-2 * i / size)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def alibi_slopes(n_head: int, device: torch.device | str | None = None) -> Float[Tensor, " n_head"]:
    """Return how fast the scores of each head fall with the distance: 2^(−8h/n), h = 1, …, n.

    From Press et al. (2022), Section 3, whose n is a power of two. They are made on the device, by
    default the CPU.

    Raises:
        TypeError, ValueError: n_head is no positive whole number.
    """
    n_head = check_length(n_head, name="n_head")
    check_memory("n_head", n_head, n_head)
    return 2.0 ** (-8 * torch.arange(1, n_head + 1, device=device) / n_head)


class Places(NamedTuple):
    """Where tokens are in their sequences, and what follows from it for all layers alike.

    Attributes:
        places: (length,), the places.
        turns: for "rope" the cosines and sines of the angles, (length, size/2) each.
        seen: what keeps queries from keys that come later, as arguments for PyTorch's attention.
    """

    places: Tensor
    turns: tuple[Tensor, Tensor] | None
    seen: dict

    @classmethod
    def of(
        cls, config: TransformerConfig, places: Tensor, room: int | None, like: Tensor
    ) -> "Places":
        """Return this for tokens at places, whose keys are their own, or a cache's of such room."""
        turns, size = None, config.d_model // config.n_head
        if config.position == "rope":
            turns = _turns(places, size, like.dtype)
        if room is None and config.position != "alibi":
            # for which there are kernels that never write the scores
            return cls(places, turns, {"is_causal": True})
        keys = places if room is None else torch.arange(room, device=places.device)
        distance = places[:, None] - keys
        if config.position != "alibi":
            return cls(places, turns, {"attn_mask": distance >= 0})
        slopes = alibi_slopes(config.n_head, like.device).to(like)[:, None, None]
        scores = (-slopes * distance).masked_fill(distance < 0, -math.inf)
        return cls(places, turns, {"attn_mask": scores})


class Attention(nn.Module):
    """Causal attention of several heads, without biases.

    Raises:
        ValueError: there is no memory for the parameters.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.heads = config.n_head
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(
        self,
        u: Float[Tensor, "batch length d_model"],
        where: Places,
        cache: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "batch length d_model"]:
        """Return what each token finds in those up to its own.

        Args:
            u: the tokens.
            where: they are in their sequence.
            cache: keys and values (batch, heads, room, size) of the tokens before, to which those
                of u are added, in place; None if there are none.
        """
        parts = self.qkv(u).unflatten(-1, (3, self.heads, -1)).movedim(1, -2)
        q, k, v = parts.unbind(1)  # [batch, heads, length, size]
        if where.turns is not None:
            q, k = (_turned(part, *(t.to(q.dtype) for t in where.turns)) for part in (q, k))
        if cache is not None:
            for old, new in zip(cache, (k, v), strict=True):
                old.index_copy_(2, where.places, new.to(old.dtype))
            k, v = (part.to(q.dtype) for part in cache)
        seen = where.seen
        if "attn_mask" in seen and seen["attn_mask"].is_floating_point():
            seen = {"attn_mask": seen["attn_mask"].to(q.dtype)}
        y = F.scaled_dot_product_attention(q, k, v, **seen)
        return self.out(y.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) · W_up x), from Shazeer (2020)."""

    def __init__(self, d_model: int, d_hidden: int):
        super().__init__()
        self.gate = nn.Linear(d_model, d_hidden, bias=False)
        self.up = nn.Linear(d_model, d_hidden, bias=False)
        self.down = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Return the same of each vector along the last axis."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class _Layer(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(config)
        self.norm2 = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = SwiGLU(config.d_model, config.hidden)

    def forward(self, u: Tensor, where: Places, cache: tuple[Tensor, Tensor] | None) -> Tensor:
        u = u + self.attention(self.norm1(u), where, cache)
        return u + self.mlp(self.norm2(u))


class Transformer(nn.Module):
    """A language model: token ids in, logits of the next token out.

    Starts as GPT-2 does (Radford et al. 2019): all matrices normal with deviation 0.02, those that
    write to the residual stream divided by √(2 n_layer).

    Args:
        config: the sizes.

    Raises:
        TypeError: config is no `TransformerConfig`.
        ValueError: there is no memory for the parameters.
    """

    def __init__(self, config: TransformerConfig):
        if not isinstance(config, TransformerConfig):
            needed = "expected a TransformerConfig"
            raise TypeError(f"config is a {type(config).__name__}, {needed}")
        check_room("vocab_size", config.vocab_size, config.vocab_size * config.d_model)
        layer = config.d_model * (4 * config.d_model + 3 * config.hidden)
        check_room("n_layer", config.n_layer, config.n_layer * layer)
        check_room("max_length", config.max_length, config.max_length * config.d_model)
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        if config.position == "absolute":
            self.places = nn.Embedding(config.max_length, config.d_model)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.n_layer))
        self.norm_f = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        with torch.no_grad():
            for layer in self.layers:
                layer.attention.out.weight /= math.sqrt(2 * config.n_layer)
                layer.mlp.down.weight /= math.sqrt(2 * config.n_layer)

    def num_parameters(self) -> int:
        """Return the number of parameters; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def initial_state(self, batch: int, length: int) -> Cache:
        """Return an empty cache for `batch` sequences with room for `length` tokens.

        Raises:
            TypeError, ValueError: a number is not positive, more than the places of "absolute", or
                there is no memory for the cache.
        """
        batch, length = check_length(batch, name="batch", least=0), check_length(length)
        self._check_places(length)
        config = self.config
        shape = config.n_layer, batch, config.n_head, length, config.d_model // config.n_head
        like = self.embedding.weight
        if like.device.type == "cpu":  # another device says itself when it is full
            size = like.element_size()
            check_memory("length", length, 2 * config.n_layer * length * config.d_model, size)
            check_memory("batch", batch, 2 * math.prod(shape), size)
        keys, values = like.new_zeros(shape), like.new_zeros(shape)
        return Cache(keys, values, torch.zeros((), dtype=torch.long, device=like.device))

    def forward(self, ids: Ids, *, last: bool = False) -> Tensor:
        """Return the logits of the next token after every token.

        Args:
            ids: (batch, length), whole numbers.
            last: return the logits after the last token only, (batch, vocab_size).

        Returns:
            Logits (batch, length, vocab_size).

        Raises:
            TypeError: ids is no tensor of whole numbers.
            ValueError: ids is not (batch, length), is empty, longer than the places of "absolute",
                or has an id outside the vocabulary.
        """
        check_flag("last", last)
        ids = self._check_ids(ids, 2)
        self._check_places(ids.shape[1])
        places = torch.arange(ids.shape[1], device=ids.device)
        u = self._run(ids, places, None)
        return self._logits(u[:, -1] if last else u)

    @torch.no_grad()
    def prefill(self, ids: Ids, state: Cache) -> tuple[Tensor, Cache]:
        """Read a piece of the sequences after others; return its logits and the state after it.

        Without gradients: what is written in place cannot be differentiated later.

        Args:
            ids: (batch, length).
            state: from `initial_state`, `prefill` or `step`. Its keys and values are written to.

        Raises:
            TypeError, ValueError: as `forward`; or the state is of another batch, or full.
        """
        ids = self._check_ids(ids, 2)
        state = self._checked(state, ids)
        places = state.length + torch.arange(ids.shape[1], device=ids.device)
        u = self._run(ids, places, state)
        return self._logits(u), state._replace(length=state.length + ids.shape[1])

    def step(self, ids: Int[Tensor, " batch"], state: Cache) -> tuple[Tensor, Cache]:
        """Read one token of each sequence; return the logits of the next, and the state.

        Without gradients, as `prefill`.

        Raises:
            TypeError, ValueError: as `prefill`, with ids (batch,).
        """
        ids = self._check_ids(ids, 1)
        logits, state = self.prefill(ids[:, None], state)
        return logits[:, 0], state

    def _run(self, ids: Tensor, places: Tensor, state: Cache | None) -> Tensor:
        u = self.embedding(ids)
        if self.config.position == "absolute":
            u = u + self.places(places)
        where = Places.of(self.config, places, None if state is None else state.keys.shape[3], u)
        for k, layer in enumerate(self.layers):
            u = layer(u, where, None if state is None else (state.keys[k], state.values[k]))
        return self.norm_f(u)

    def _logits(self, u: Tensor) -> Tensor:
        head = self.embedding if self.config.tie_embeddings else self.lm_head
        return F.linear(u, head.weight)

    def _check_places(self, length: int, name: str = "length") -> None:
        most = self.config.max_length
        if self.config.position == "absolute" and length > most:
            raise ValueError(f"{name} is {length}, expected at most max_length = {most}")

    def _check_ids(self, ids: Tensor, axes: int) -> Tensor:
        return check_ids(ids, self.config.vocab_size, (axes,), self.embedding.weight.device)

    def _checked(self, state: Cache, ids: Tensor) -> Cache:
        if not isinstance(state, tuple | list) or len(state) != len(Cache._fields):
            raise TypeError(f"state is a {type(state).__name__}, expected a Cache")
        state, config = Cache(*state), self.config
        sizes = {"layers": config.n_layer, "batch": len(ids), "heads": config.n_head}
        sizes["size"] = config.d_model // config.n_head
        for name, tensor in (("keys", state.keys), ("values", state.values)):
            check_is_tensor(f"state.{name}", tensor)
            if not tensor.is_floating_point():
                raise TypeError(f"state.{name} has dtype {tensor.dtype}, expected a floating one")
            check_shape(f"state.{name}", tensor, "layers batch heads room size", **sizes)
            sizes["room"] = tensor.shape[3]
            self._check_places(tensor.shape[3], f"the room of state.{name}")
        check_is_tensor("state.length", state.length)
        if state.length.ndim or state.length.dtype != torch.long:
            given = f"state.length has shape {tuple(state.length.shape)}, {state.length.dtype}"
            raise TypeError(f"{given}, expected one number of torch.int64 without axes")
        for name, tensor in state._asdict().items():
            if tensor.device != ids.device:
                given = f"state.{name} is on device {tensor.device}"
                raise ValueError(f"{given}, expected {ids.device}, that of ids")
        if can_look_at(state.length) and state.length.is_cpu:
            room = sizes["room"] - state.length.item()
            if not ids.shape[1] <= room <= sizes["room"]:
                given = f"ids has {ids.shape[1]} tokens, with state.length = {state.length}"
                raise ValueError(f"{given}, expected at most {room}, the room")
        return state
