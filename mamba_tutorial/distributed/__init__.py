"""One sequence over many processes, cut along its length.

Each process, or *rank*, holds one piece of every sequence, in the order of the ranks: of any length
but zero, and not all alike. A whole piece is one step of the recurrence,

    h_{r+1} = a_r h_r + b_r,     a_r = exp(A Σ_t Δ_t),     b_r = the end of the piece, begun at zero

with h_r the state before the piece of rank r. Pieces are joined as single tokens are,

    (a₁, b₁) ⊕ (a₂, b₂) = (a₁ a₂, a₂ b₁ + b₂)

so of every piece the others need two states, batch · d_inner · d_state numbers each, however long
it is. The scan is then this:

1. every rank finds its (a_r, b_r) alone, and writes nothing as long as the piece;
2. all ranks gather all (a_r, b_r), and each joins them up to its own piece: h_r;
3. every rank scans its piece, from h_r.

Backward is the same from the other side. What y adds to the gradient of h_r is found alone, then
joined, so that each rank has the gradient λ_{r+1} of the state after its piece, and its one
backward pass, of y and of that state, gives all gradients, that of h_r included. A rank waits for
the others once in each direction, and never for another's scan.

- `selective_scan`: `mamba_tutorial.selective.selective_scan` of a whole from its pieces.
- `over_length`: inside this context a `MambaLM` or `MambaBlock` reads pieces so. The convolution is
  given the last d_conv − 1 tokens before its piece.
- `next_token_loss`, `sum_gradients`: the rest of a training step.
- `join_cost`: what the join must cost, for any number of ranks.

Every rank must do the same calls in the same order, the backward pass included. Where one has
stopped or is late, the others raise RuntimeError, with gloo after the timeout of the group at the
latest; NCCL ends the process instead. The group is of no further use then.

From the Mamba-2 paper (Dao and Gu 2024), Section 8.2, "Sequence Parallelism"; there the states go
from rank to rank.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mamba_tutorial._check import check_flag, check_length, check_number, wide
from mamba_tutorial.distributed._agreement import (
    Group,
    agree,
    heard,
    model_traits,
    rank_in,
    traits_of,
)
from mamba_tutorial.distributed._join import first_only, gather, scan_piece
from mamba_tutorial.distributed._pieces import Pieces, instead
from mamba_tutorial.mamba import MambaBlock, MambaLM
from mamba_tutorial.selective import Backend, Discretization, Shared, State, Tokens
from mamba_tutorial.selective._checks import check_scan
from mamba_tutorial.selective._operators import run_scan

_OVER_LENGTH: WeakKeyDictionary[nn.Module, Pieces] = WeakKeyDictionary()


def selective_scan(
    x: Tokens,
    dt: Tokens,
    A: Float[Tensor, "d_inner d_state"],
    B: Shared,
    C: Shared,
    D: Float[Tensor, " d_inner"] | None = None,
    z: Tokens | None = None,
    dt_bias: Float[Tensor, " d_inner"] | None = None,
    dt_softplus: bool = False,
    h0: State | None = None,
    return_last_state: bool = False,
    discretization: Discretization = "mamba",
    backend: Backend = "auto",
    group: Group = None,
) -> Tokens | tuple[Tokens, State]:
    """Run the selective state space model over sequences of which each rank has one piece.

    The arguments are those of `mamba_tutorial.selective.selective_scan`, of this rank's piece. A, D
    and dt_bias are to be the same on all ranks. Gradients are those of the sum of what the ranks
    call backward on: of x, dt, B, C and z they are whole, of A, D and dt_bias each rank has its
    share, to be summed. All ranks must take part in the backward pass, with a loss that depends on
    y.

    Args:
        x: (batch, length of this piece, d_inner).
        dt: like x.
        A: (d_inner, d_state).
        B: (batch, length of this piece, d_state).
        C: like B.
        D: (d_inner,).
        z: like x.
        dt_bias: (d_inner,).
        dt_softplus: as there.
        h0: (batch, d_inner, d_state), the state before the first token of the whole; that of the
            first rank counts, and has the gradient. If one rank gives it, all do.
        return_last_state: return the state after the last token of the whole as well, everywhere.
        discretization: as there.
        backend: as there.
        group: the ranks, in the order of their pieces; all of them by default.

    Returns:
        y: (batch, length of this piece, d_inner); and, if asked for, the last state (batch,
        d_inner, d_state).

    Raises:
        TypeError, ValueError: this rank's arguments are wrong, as there.
        ValueError: those of another rank are, or differ from these in what must be alike: batch,
            d_inner, d_state, dtype, device, settings, and which arguments are given and which ask
            for a gradient. All ranks raise it, and the message says what differs where.
        RuntimeError: another rank has stopped or is late.
    """
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    rules = {"dt_softplus": dt_softplus, "discretization": discretization, "backend": backend}
    inputs = problem = None
    settings = {"call": "selective_scan", **rules, "return_last_state": return_last_state}
    try:
        check_flag("return_last_state", return_last_state)
        inputs = check_scan(**tensors, **rules, h0=first_only(h0, group))
        settings |= traits_of(x, A, {**tensors, "h0": h0})
    except (TypeError, ValueError) as error:
        problem = error
    agree(settings, problem, group)
    y, last = run_scan(partial(scan_piece, return_last_state, group), inputs)
    return (y, last) if return_last_state else y


@contextmanager
def over_length(model: nn.Module, group: Group = None) -> Iterator[None]:
    """Inside this context, each rank gives the model one piece of every sequence.

        with over_length(model, group):
            next_token_loss(model, ids).backward()

    The calls are those of one process; here the convolutions and scans of the model's `MambaBlock`s
    look over the cuts. All else in the model must treat each token by itself. A model may be
    wrapped, in DistributedDataParallel or by fully_shard, and checkpointed: then the backward pass
    belongs in the context too, since it calls the model again.

    Each call of a `MambaLM`, or of a `MambaBlock` outside one, compares the inputs of the ranks:
    one exchange of some hundred bytes. The parameters are compared once, on entering.

    Args:
        model: a `MambaLM`, a `MambaBlock`, or a module with some; the same on all ranks.
        group: the ranks, in the order of their pieces; all of them by default.

    Raises:
        ValueError: there is no `MambaBlock`; the models of the ranks differ in the names, shapes or
            dtypes of their parameters, in which of them are trained, or in a setting. In a call:
            the input is wrong on one rank, or differs in batch or dtype, or a state is given.
        RuntimeError: another rank has stopped or is late.
    """
    pieces = Pieces(group)
    models = [module for module in model.modules() if isinstance(module, MambaLM)]
    inside = {part for lm in models for part in lm.modules()}
    blocks = [module for module in model.modules() if isinstance(module, MambaBlock)]
    problem = None if blocks else ValueError("model has no MambaBlock, expected one at least")
    agree(model_traits(model), problem, group)
    with ExitStack() as stack:
        for root in [*models, *(block for block in blocks if block not in inside)]:
            hook = root.register_forward_pre_hook(pieces.look, with_kwargs=True)
            stack.callback(hook.remove)
        for block in blocks:
            conv, ssm = block.conv1d, block.ssm
            stack.enter_context(instead(conv, partial(pieces.convolve, conv, conv.forward)))
            stack.enter_context(instead(ssm, partial(pieces.scan, ssm)))
        _OVER_LENGTH[model] = pieces
        stack.callback(_OVER_LENGTH.pop, model, None)
        yield


def next_token_loss(
    model: nn.Module, ids: Int[Tensor, "batch length"], ignore_index: int = -100
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy of all next tokens of all ranks, of a model `over_length`.

        loss = − 1/n Σ_t log p(ids_{t+1} | ids_1 … ids_t),     n the number of t, over all ranks

    The token after the last of a piece is the first of the next piece. The number is that of the
    whole on every rank; its gradient is this rank's share, so the gradients of the whole are the
    *sum* over the ranks (`sum_gradients`). Data parallelism that takes the mean over these ranks
    too, as DistributedDataParallel and fully_shard do over all ranks of a device mesh, needs the
    loss times the number of ranks of the length.

    Args:
        model: a `MambaLM`, perhaps wrapped, inside `over_length`.
        ids: (batch, length of this piece).
        ignore_index: a next token of this value is not counted.

    Raises:
        TypeError, ValueError: as the model's call; or it is not inside `over_length`, or no next
            token counts.
        RuntimeError: another rank has stopped or is late.
    """
    if model not in _OVER_LENGTH:
        raise ValueError("model is not inside over_length(model, group), expected it to be")
    group = _OVER_LENGTH[model].group
    logits = model(ids)
    rank, ranks = rank_in(group), dist.get_world_size(group)
    firsts = gather(ids[:, 0].long(), group)
    after = firsts[rank + 1] if rank + 1 < ranks else torch.full_like(firsts[0], ignore_index)
    targets = torch.cat([ids[:, 1:].long(), after[:, None]], 1)
    given = logits.to(wide(logits.dtype)).flatten(0, 1), targets.flatten()
    own = F.cross_entropy(*given, ignore_index=ignore_index, reduction="sum")
    count = (targets != ignore_index).sum()
    total, count = gather(torch.stack([own.detach().double(), count.double()]), group).sum(0)
    if count == 0:
        raise ValueError("ids has no next token that counts, expected one at least")
    share = own / count.to(own.dtype)
    return share + ((total / count).to(own.dtype) - share.detach())


def sum_gradients(model: nn.Module, group: Group = None) -> None:
    """Put the sum over the ranks in the place of every parameter's gradient; none counts as zero.

    Not over ranks of which DistributedDataParallel or fully_shard takes the mean; for these see
    `next_token_loss`.

    Raises:
        ValueError: this process is not in the group.
        RuntimeError: another rank has stopped or is late.
    """
    rank_in(group)
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            with heard("the gradients", group):
                dist.all_reduce(parameter.grad, group=group)


class JoinCost(NamedTuple):
    """What a rank sends for one join, and how long all wait, in bytes and seconds; two ways."""

    gather_bytes: int
    gather_seconds: float
    tree_bytes: int
    tree_seconds: float


def join_cost(
    ranks: int,
    batch: int,
    d_inner: int,
    d_state: int,
    *,
    latency: float,
    bandwidth: float,
    number_bytes: int = 4,
) -> JoinCost:
    """Return what one join of the pieces costs; a backward pass costs the same once more.

    With S the bytes of a state, batch · d_inner · d_state · number_bytes, R ranks, a latency α of
    each message and a bandwidth β:

        gather     every rank gets all others' (a, b), as this module does. By doubling it takes
                   ⌈log₂ R⌉ messages with 2 S (R − 1) together:   α ⌈log₂ R⌉ + 2 S (R − 1) / β
        tree       `mamba_tutorial.scan.hillis_steele` over the ranks: ⌈log₂ R⌉ messages of 2 S,
                   and one of S to the next rank:   α (⌈log₂ R⌉ + 1) + S (2 ⌈log₂ R⌉ + 1) / β

    Neither depends on the length. The gather has one message less, the tree fewer bytes from four
    ranks on. After Thakur, Rabenseifner and Gropp (2005), Section 4.1; computing is left out.

    Args:
        ranks: R.
        batch: the number of sequences.
        d_inner: the number of channels.
        d_state: the numbers that each channel remembers.
        latency: seconds of one message, however short.
        bandwidth: bytes per second that a rank sends.
        number_bytes: of a number of the state, which is float32 unless x is float64.

    Raises:
        TypeError, ValueError: a size is below 1, the latency below 0, the bandwidth not above 0.
    """
    sizes = {"batch": batch, "d_inner": d_inner, "d_state": d_state, "number_bytes": number_bytes}
    state = math.prod(check_length(size, name=name) for name, size in sizes.items())
    check_number("latency", latency, least=0)
    check_number("bandwidth", bandwidth, above=0)
    rounds = (check_length(ranks, name="ranks") - 1).bit_length()  # ⌈log₂ R⌉
    gather, tree = 2 * state * (ranks - 1), state * (2 * rounds + 1) if ranks > 1 else 0
    messages = rounds + 1 if ranks > 1 else 0
    return JoinCost(
        gather, latency * rounds + gather / bandwidth, tree, latency * messages + tree / bandwidth
    )
