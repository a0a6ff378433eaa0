"""How tokens are written: the choice of the next one, and a model's step as one CUDA graph.

`MambaLM.generate` and `MambaLM.stream` put these together.
"""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import chain
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mamba_tutorial._check import (
    can_look_at,
    check_all,
    check_is_tensor,
    check_length,
    check_number,
    check_shape,
    check_starts,
    precise,
)

State = tuple[tuple[Tensor, ...], ...]  # for every layer, the tensors that it keeps


class StepGraph:
    """`MambaLM.step` on a GPU as one CUDA graph: recorded once, then replayed.

    A step is many small kernels for each layer, and each runs for a few microseconds. To start
    them one by one from Python takes longer than to run them. Recorded, they start all at once.

    A graph reads and writes fixed places in memory. So the logits and the state that a call returns
    are overwritten by the next, ids are not checked, and the model's parameters must stay where
    they are.

    Args:
        model: a `MambaLM` on a GPU.
        batch: the number of sequences.

    Raises:
        ValueError: the model is not on a GPU.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, batch: int):
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


# the last graph of a model, while nobody uses it, and what it was recorded from
_IDLE: WeakKeyDictionary[nn.Module, tuple[list, StepGraph]] = WeakKeyDictionary()


@contextmanager
def lent_graph(model: nn.Module, batch: int) -> Iterator[StepGraph]:
    """Lend the graph of the call before, if it would be recorded the same again; else a new one.

    To record one, the step is run three times, kernel by kernel, which short texts would notice.
    Nobody else gets a graph that is lent.
    """
    recipe = _recipe(model, batch)
    before, graph = _IDLE.pop(model, (None, None))
    if recipe is None or before != recipe:
        del graph  # and its memory, before there is room for another
        graph = StepGraph(model, batch)
    try:
        yield graph
    finally:
        if recipe is not None:
            _IDLE[model] = recipe, graph


def _recipe(model: nn.Module, batch: int) -> list | None:
    """Return all that decides what a graph does; None if that cannot be known.

    It cannot if there are hooks, or modules of others, which may hold numbers of their own.
    """
    parts = [batch, torch.is_inference_mode_enabled(), torch.get_float32_matmul_precision()]
    for name, module in model.named_modules():
        known = type(module).__module__.split(".")[0] in {"torch", "mamba_tutorial"}
        if not known or module._forward_hooks or module._forward_pre_hooks:
            return None
        parts.append((name, type(module), module.training))
    for tensor in chain(model.parameters(), model.buffers()):
        parts.append((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype))
    return parts


def sample(
    logits: Float[Tensor, "batch vocab_size"],
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    min_p: float | None = None,
) -> Int[Tensor, " batch"]:
    """Draw a token for each row of logits; the arguments are those of `MambaLM.generate`.

    Raises:
        TypeError, ValueError: logits are not (batch, vocab_size), hold NaN or ∞, or a row is −∞
            everywhere (not looked at on a GPU); or another argument is out of its range.
    """
    check_sampling(temperature, top_k, top_p, generator, min_p)
    check_is_tensor("logits", logits)
    if not logits.is_floating_point():
        raise TypeError(f"logits has dtype {logits.dtype}, expected a floating one")
    check_shape("logits", logits, "batch vocab_size")
    check_length(logits.shape[1], name="the number of tokens of logits")
    if not logits.is_cuda:  # on a GPU the look would wait for the model
        check_all("logits", logits, logits < math.inf, "no infinity above, and no NaN")
        largest = logits.amax(-1, keepdim=True) > -math.inf
        check_all("logits", logits, largest, "one above −inf in each row")
    if temperature == 0:
        return logits.argmax(-1)
    # the largest is taken away first: it may be large, and the temperature very small
    values, tokens = precise(logits).sort(dim=-1, descending=True)
    probabilities = ((values - values[:, :1]) / temperature).softmax(-1).float()
    if top_k is not None:
        probabilities[:, min(top_k, logits.shape[1]) :] = 0
    if min_p is not None:
        probabilities[probabilities < min_p * probabilities[:, :1]] = 0
    if top_p is not None:  # drop a token if those before it hold enough
        share = probabilities / probabilities.sum(-1, keepdim=True)
        probabilities[share.cumsum(-1) - share >= top_p] = 0
    if len(logits) == 0:
        return tokens[:, 0]
    return tokens.gather(1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(1)


def check_sampling(
    temperature: float | int,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
    min_p: float | None,
) -> None:
    """Check the arguments that `sample` has."""
    check_number("temperature", temperature, least=0)
    if min_p is not None:
        check_number("min_p", min_p, least=0, most=1)
    if top_k is not None:
        check_length(top_k, name="top_k")
    if top_p is not None:
        check_number("top_p", top_p, above=0, most=1)
    if not isinstance(generator, torch.Generator | None):
        given = type(generator).__name__
        raise TypeError(f"generator is a {given}, expected a torch.Generator or None")


def end_tokens(
    eos: int | Collection[int] | None, vocab_size: int, device: torch.device
) -> Tensor | None:
    """Check the tokens that end a sequence, and return them as a tensor; None if there are none."""
    if eos is None:
        return None
    several = isinstance(eos, Collection) and not isinstance(eos, str | bytes | Tensor)
    found = [check_length(one, name="eos", least=0) for one in (eos if several else [eos])]
    if not found or max(found) >= vocab_size:
        needed = f"expected token ids below {vocab_size}"
        raise ValueError(f"eos is {eos}, {needed}")
    return torch.tensor(found, device=device)


def filled_up(prompts: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return prompts of any lengths as rows of one length, filled up on their left; and the mask.

    Where nothing had to be filled up there is none.

    Raises:
        TypeError: one is no tensor of whole numbers.
        ValueError: there is none, or one is not (length,), is empty, or lies on another device.
    """
    if not prompts:
        raise ValueError("ids is an empty list, expected prompts")
    for k, prompt in enumerate(prompts):
        check_is_tensor(f"ids[{k}]", prompt)
        if prompt.dtype == torch.bool or prompt.is_floating_point() or prompt.is_complex():
            raise TypeError(f"ids[{k}] has dtype {prompt.dtype}, expected whole numbers")
        if prompt.ndim != 1 or len(prompt) == 0:
            given = tuple(prompt.shape)
            raise ValueError(f"ids[{k}] has shape {given}, expected (length,), length ≥ 1")
        if prompt.device != prompts[0].device:
            needed = f"expected {prompts[0].device}, that of ids[0]"
            raise ValueError(f"ids[{k}] is on device {prompt.device}, {needed}")
    longest = max(map(len, prompts))
    if min(map(len, prompts)) == longest:
        return torch.stack(prompts).long(), None
    rows = [nn.functional.pad(prompt.long(), (longest - len(prompt), 0)) for prompt in prompts]
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=prompts[0].device)
    places = torch.arange(longest, device=lengths.device)
    return torch.stack(rows), places >= longest - lengths[:, None]


def starts_of(mask: Tensor, ids: Tensor, state: object) -> Tensor:
    """Return where the prompts begin that a mask says are filled up on their left.

    Raises:
        TypeError: mask is no tensor of bool.
        ValueError: it is not like ids, a row of it is not false up to a place and true from there
            on, or there is a state, which nothing comes before.
    """
    check_starts(mask, ids, "mask")
    if state is not None:
        raise ValueError("mask is given with a state, expected one of them to be None")
    if can_look_at(mask) and not ((mask[:, 1:] >= mask[:, :-1]).all() and mask[:, -1].all()):
        raise ValueError("mask has a row of another form than false … false true … true")
    return mask & ~nn.functional.pad(mask[:, :-1], (1, 0))


def repeated_less(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return the logits, those of tokens seen before divided by the penalty, or multiplied."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
