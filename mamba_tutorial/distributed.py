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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from mamba_tutorial import selective
from mamba_tutorial._check import (
    check_flag,
    check_ids,
    check_input,
    check_is_tensor,
    check_length,
    check_number,
    check_shape,
    wide,
)
from mamba_tutorial.mamba import CausalConv1d, MambaBlock, MambaLM
from mamba_tutorial.ops import vjp
from mamba_tutorial.scan import linear_scan
from mamba_tutorial.selective import Backend, Discretization, SelectiveSSM, Shared, State, Tokens

# quoted, since PyTorch may have been built without it
Group = "dist.ProcessGroup | None"


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
        inputs = selective.check_scan(**tensors, **rules, h0=_first_only(h0, group))
        settings |= _traits(x, A, {**tensors, "h0": h0})
    except (TypeError, ValueError) as error:
        problem = error
    _agree(settings, problem, group)
    y, last = selective.run_scan(partial(_scan, return_last_state, group), inputs)
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
    pieces = _Pieces(group)
    models = [module for module in model.modules() if isinstance(module, MambaLM)]
    inside = {part for lm in models for part in lm.modules()}
    blocks = [module for module in model.modules() if isinstance(module, MambaBlock)]
    problem = None if blocks else ValueError("model has no MambaBlock, expected one at least")
    _agree(_model_traits(model), problem, group)
    with ExitStack() as stack:
        for root in [*models, *(block for block in blocks if block not in inside)]:
            hook = root.register_forward_pre_hook(pieces.look, with_kwargs=True)
            stack.callback(hook.remove)
        for block in blocks:
            conv, ssm = block.conv1d, block.ssm
            stack.enter_context(_instead(conv, partial(pieces.convolve, conv, conv.forward)))
            stack.enter_context(_instead(ssm, partial(pieces.scan, ssm)))
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
    rank, ranks = _rank(group), dist.get_world_size(group)
    firsts = _gather(ids[:, 0].long(), group)
    after = firsts[rank + 1] if rank + 1 < ranks else torch.full_like(firsts[0], ignore_index)
    targets = torch.cat([ids[:, 1:].long(), after[:, None]], 1)
    given = logits.to(wide(logits.dtype)).flatten(0, 1), targets.flatten()
    own = F.cross_entropy(*given, ignore_index=ignore_index, reduction="sum")
    count = (targets != ignore_index).sum()
    total, count = _gather(torch.stack([own.detach().double(), count.double()]), group).sum(0)
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
    _rank(group)
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            with _heard("the gradients", group):
                dist.all_reduce(parameter.grad, group=group)


# The scan.


def _first_only(h0: Tensor | None, group: Group) -> Tensor | None:
    """Return h0 on the first rank and zeros on the others, which a gradient passes all the same."""
    if h0 is None or _rank(group) == 0:
        return h0
    check_is_tensor("h0", h0)
    return h0.masked_fill(torch.ones_like(h0, dtype=torch.bool), 0)


def _scan(return_last: bool, group: Group, *inputs) -> tuple[Tensor, Tensor | None]:
    """In the place of `selective.scan`: return y of the piece, and the last state of the whole."""
    if inputs[-1] == "sequential":  # a loop whose gradient PyTorch records itself
        return _recorded_scan(return_last, group, *inputs)
    return _Scan.apply(return_last, group, *inputs)[:2]


def _recorded_scan(return_last: bool, group: Group, *inputs) -> tuple[Tensor, Tensor | None]:
    """The same, of parts that can all be differentiated as often as one likes."""
    _, before, last = _joined(return_last, group, *inputs)
    return selective.scan(*inputs[:8], before, *inputs[9:])[0], last


class _Scan(torch.autograd.Function):
    """The three acts; y, the last state, and what is kept: a_r, h_r and states on the way.

    All gradients are those of one scan of the piece from h_r, if the state after it has the
    gradient that comes from later ranks, λ_{r+1}. With ∂_r what y adds to the gradient of h_r,

        λ_r = ∂_r + a_r λ_{r+1},

    so `_Join` finds it, once ∂_r is found alone.
    """

    @staticmethod
    def forward(return_last: bool, group: Group, *inputs) -> tuple[Tensor | None, ...]:
        decay, before, last = _joined(return_last, group, *inputs)
        y, _, states = selective.SCAN(*inputs[:8], before, *inputs[9:])
        return y, last, decay, before, states

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor | None, ...]) -> None:
        ctx.return_last, ctx.group, *given = inputs
        ctx.rules = given[9:]
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)  # zeros for the states would be as large as they are
        ctx.save_for_backward(*given[:9], *output[2:])

    @staticmethod
    def backward(ctx, dy: Tensor | None, dlast: Tensor | None, *_) -> tuple[Tensor | None, ...]:
        *tensors, decay, before, states = ctx.saved_tensors
        (x, dt, A, _, C, _, z, dt_bias, _), (_, *how, _, backend) = tensors, ctx.rules
        # the others wait for this rank, whatever its loss depends on
        dy = torch.zeros_like(x) if dy is None else dy
        if ctx.return_last and dlast is None:
            dlast = torch.zeros_like(before)
        wanted = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # these gradients are to be differentiated, too
            definition = partial(_recorded_scan, ctx.return_last, ctx.group)
            return None, None, *vjp(definition, wanted, (dy, dlast), [*tensors, *ctx.rules])
        own, _ = selective.END(dy, dt, A, C, z, dt_bias, *how, True, backend)
        later = _Join.apply(decay, own, dlast, True, ctx.group)
        later = later[0] if ctx.return_last else later
        inputs = *tensors[:8], before, *ctx.rules
        found = selective.SCAN.gradient(wanted, (dy, later, None), inputs, [states])
        return None, None, *(g if want else None for g, want in zip(found, wanted, strict=True))


def _joined(return_last: bool, group: Group, *inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return a_r and h_r of this rank, and the last state of the whole if asked for."""
    x, dt, A, B, _, _, _, dt_bias, start, _, softplus, exact, _, backend = inputs
    end, span = selective.END(x, dt, A, B, None, dt_bias, softplus, exact, False, backend)
    # that of an unstable model may overflow where the state is zero, and ∞ · 0 is not a number
    decay = torch.exp(span[..., None] * A.to(end.dtype)).clamp(max=torch.finfo(end.dtype).max)
    end = end if start is None else end + decay * start
    if return_last:
        before, last = _Join.apply(decay, end, torch.zeros_like(end), False, group)
    else:
        before, last = _Join.apply(decay, end, None, False, group), None
    return decay, before if start is None else before + start, last


class _Join(torch.autograd.Function):
    """The recurrence over the ranks, h_{r+1} = a_r h_r + b_r: h_r on rank r.

    With a start, which may be None, h_0 is the sum of what the ranks give as start; and the state
    after all ranks is returned as well, everywhere. If reversed, the last rank is the first.

    The backward pass is the same function, the other way round. With λ_r the gradient of h_r
    through all that follows, and ∂_r what arrives for it on rank r,

        λ_r = ∂_r + a_r λ_{r+1},     ∂b_r = λ_{r+1},     ∂a_r = λ_{r+1} h_r,     ∂start = λ_0,

    where λ after the last rank is the sum of what arrives for the last state. So it can be
    differentiated as often as one likes. The a_r of the others are sent again, not kept.
    """

    @staticmethod
    def forward(
        a: Tensor, b: Tensor, start: Tensor | None, reverse: bool, group: Group
    ) -> Tensor | tuple[Tensor, Tensor]:
        rank = _rank(group)
        sent = torch.stack([a, b] if start is None else [a, b, start])
        decays, ends, *starts = _gather(sent, group).unbind(1)  # (ranks, batch, d_inner, d_state)
        first = torch.zeros_like(a) if start is None else starts[0].sum(0)
        given = decays.transpose(0, 1), ends.transpose(0, 1), first
        states = linear_scan(*given, reverse=reverse).unbind(1)
        states = [*states, first] if reverse else [first, *states]
        before = states[rank + 1 if reverse else rank].clone()
        return before if start is None else (before, states[0 if reverse else -1].clone())

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor | tuple[Tensor, Tensor]) -> None:
        a, _, start, ctx.reverse, ctx.group = inputs
        ctx.save_for_backward(a, output if start is None else output[0])

    @staticmethod
    def backward(ctx, upstream: Tensor, upstream_last: Tensor | None = None) -> tuple:
        a, before = ctx.saved_tensors
        found = _Join.apply(a, upstream, upstream_last, not ctx.reverse, ctx.group)
        later, first = (found, None) if upstream_last is None else found
        return later * before, later, first, None, None


def _gather(tensor: Tensor, group: Group) -> Tensor:
    """Return the tensors of all ranks, one above the other."""
    tensor = tensor.contiguous()
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    with _heard("what the others found", group):
        dist.all_gather(found, tensor, group)
    return torch.stack(found)


# A model over the length.


class _Pieces:
    """What the modules of a model are told of the ranks: the group, and the lengths of all pieces.

    Attributes:
        group: the ranks.
        lengths: of the pieces, in the order of the ranks; None before the first call of the model.
    """

    def __init__(self, group: Group):
        self.group, self.rank = group, _rank(group)
        self.lengths: list[int] | None = None

    def look(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before a call of the model: compare the inputs of all ranks, and note the lengths."""
        settings, problem, length = {}, None, None
        try:
            x, settings = _input_traits(module, args, kwargs)
            length = x.shape[1]
        except (TypeError, ValueError) as error:
            problem = error
        self.lengths = _agree(settings, problem, self.group, length)

    def convolve(
        self, conv: CausalConv1d, forward: Callable, x: Tensor, before: None = None
    ) -> tuple[Tensor, None]:
        """In the place of the forward of a `CausalConv1d`."""
        if self.lengths is None or x.shape[1] != self.lengths[self.rank]:
            needed = f"expected a call of the whole model, which saw lengths {self.lengths}"
            raise ValueError(f"x of a convolution has length {x.shape[1]}, {needed}")
        width = conv.kernel_size[0] - 1
        return forward(x, _tokens_before(x, width, self.lengths, self.group))[0], None

    def scan(
        self, ssm: SelectiveSSM, x: Tensor, z: Tensor | None = None, h: None = None
    ) -> tuple[Tensor, None]:
        """In the place of the forward of a `SelectiveSSM`."""
        dt, B, C = ssm.select(x)
        given = x, dt, ssm.A, B, C, ssm.D, z, ssm.dt_bias, True, None, ssm.discretization, "auto"
        return selective.run_scan(partial(_scan, False, self.group), selective.check_scan(*given))


_OVER_LENGTH: WeakKeyDictionary[nn.Module, _Pieces] = WeakKeyDictionary()


@contextmanager
def _instead(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Call this in the place of the module's own forward."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _tokens_before(x: Tensor, width: int, lengths: list[int], group: Group) -> Tensor:
    """Return the `width` tokens before this piece, (batch, width, channels), zeros at the start.

    They come from the rank before, and where its piece is too short from those before it.
    """
    rank = _rank(group)

    def count(holder: int, reader: int) -> int:
        between = sum(lengths[holder + 1 : reader])
        return max(0, min(lengths[holder], width - between)) if holder < reader else 0

    sent = [count(rank, reader) for reader in range(len(lengths))]
    received = [count(holder, rank) for holder in range(len(lengths))]
    # cut off once: the gradient of every cut has the size of x
    last = x[:, x.shape[1] - max(sent) :]
    ends = torch.cat([last[:, last.shape[1] - tokens :] for tokens in sent], 1)
    arrived = _Send.apply(ends.transpose(0, 1), sent, received, group).transpose(0, 1)
    nothing = x.new_zeros(len(x), width - arrived.shape[1], x.shape[2])
    return torch.cat([nothing, arrived], 1)


class _Send(torch.autograd.Function):
    """Send tokens to each rank; their gradients come back the same way.

    The tokens lie along the first axis, in the order of the ranks that they are for or came from;
    `sent` and `received` say how many each rank gets and gave.
    """

    @staticmethod
    def forward(tokens: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
        arrived = tokens.new_empty(sum(received), *tokens.shape[1:])
        with _heard("the tokens before a piece, or their gradients", group):
            dist.all_to_all_single(arrived, tokens.contiguous(), received, sent, group)
        return arrived

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        _, ctx.sent, ctx.received, ctx.group = inputs

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple:
        return _Send.apply(upstream, ctx.received, ctx.sent, ctx.group), None, None, None


# What the ranks must have in common.


def _traits(x: Tensor, A: Tensor, tensors: dict[str, Tensor | None]) -> dict[str, object]:
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    asking = [name for name, tensor in given.items() if tensor.requires_grad]
    return {
        "batch": len(x),
        "d_inner": A.shape[0],
        "d_state": A.shape[1],
        "dtype of x": str(x.dtype),
        "device": x.device.type,
        "which arguments are given": list(given),
        "which arguments ask for a gradient": asking if torch.is_grad_enabled() else [],
    }


def _input_traits(module: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor, dict[str, object]]:
    """Check the input of a model or a block; return it, and what of it must be alike."""
    name = "ids" if isinstance(module, MambaLM) else "x"
    x = args[0] if args else kwargs.get(name)
    if (args[1] if len(args) > 1 else kwargs.get("state")) is not None:
        raise ValueError("state is given, expected None: pieces are read from the start of a whole")
    if (args[2] if len(args) > 2 else kwargs.get("starts")) is not None:
        raise ValueError("starts is given, expected None: pieces are of one sequence each")
    if isinstance(module, MambaLM):
        check_ids(x, module.config.vocab_size, (2,), module.embedding.weight.device)
    else:
        check_input("x", x, module.in_proj)
        check_shape("x", x, "batch length d_model", d_model=module.d_model)
        if x.shape[1] == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected a length of at least 1")
    kind, learning = x.device.type, torch.is_grad_enabled()
    autocast = torch.is_autocast_enabled(kind) and str(torch.get_autocast_dtype(kind))
    return x, {
        "call": type(module).__name__,
        "batch": len(x),
        f"dtype of {name}": str(x.dtype),
        "device": kind,
        "autocast": autocast,
        "recording of gradients": learning,
        f"whether {name} asks for a gradient": learning and x.requires_grad,
    }


def _model_traits(model: nn.Module) -> dict[str, object]:
    traits: dict[str, object] = {"call": "over_length"}
    for name, module in model.named_modules():
        if isinstance(module, MambaLM):
            traits |= {
                f"config.{key} of {name or 'model'}": v for key, v in vars(module.config).items()
            }
        if isinstance(module, SelectiveSSM):
            traits[f"discretization of {name}"] = module.discretization
    for name, parameter in model.named_parameters():
        trained = "trained" if parameter.requires_grad else "frozen"
        traits[name] = f"{tuple(parameter.shape)}, {parameter.dtype}, {trained}"
    return traits


def _agree(
    settings: dict[str, object], problem: Exception | None, group: Group, own: object = None
) -> list:
    """Go on only if the input is right on all ranks, and alike; return `own` of all ranks.

    A rank with a problem says so before it raises: the others would wait for it.
    """
    rank = _rank(group)
    mine = None if problem is None else f"{type(problem).__name__}: {problem}"
    found: list = [None] * dist.get_world_size(group)
    # torch.func would take the exchange for a part of what it transforms
    with _heard("how their calls look", group), temporarily_clear_interpreter_stack():
        dist.all_gather_object(found, (mine, settings, own), group)
    if problem is not None:
        raise problem
    problems, everyone, owns = zip(*found, strict=True)
    for other, text in enumerate(problems):
        if text is not None:
            raise ValueError(f"the call is wrong on rank {other}, not on rank {rank}: {text}")
    for name in dict.fromkeys(name for theirs in everyone for name in theirs):
        values = [theirs.get(name, "missing") for theirs in everyone]
        for other, value in enumerate(values):
            if value != values[0]:
                where = f"{values[0]} on rank 0, {value} on rank {other}"
                raise ValueError(f"{name} differs between ranks, expected the same: {where}")
    return list(owns)


def _rank(group: Group) -> int:
    """Return this process's place in the group, if it has one."""
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group is without this process, expected one that it belongs to")
    return rank


@contextmanager
def _heard(what: str, group: Group) -> Iterator[None]:
    """Say what was waited for if another rank does not do its part."""
    try:
        yield
    except RuntimeError as error:
        ranks = dist.get_world_size(group)
        raise RuntimeError(
            f"rank {dist.get_rank(group)} of {ranks} waited in vain for {what}: another rank has "
            f"stopped, is later than the timeout of the group, or did something else ({error})"
        ) from error


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
