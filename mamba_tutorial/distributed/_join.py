"""The three acts of a scan over the ranks, and their gradients."""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from mamba_tutorial._check import check_is_tensor
from mamba_tutorial.distributed._agreement import Group, heard, rank_in
from mamba_tutorial.ops import vjp
from mamba_tutorial.scan import linear_scan
from mamba_tutorial.selective._operators import END, SCAN, scan


def first_only(h0: Tensor | None, group: Group) -> Tensor | None:
    """Return h0 on the first rank and zeros on the others, which a gradient passes all the same."""
    if h0 is None or rank_in(group) == 0:
        return h0
    check_is_tensor("h0", h0)
    return h0.masked_fill(torch.ones_like(h0, dtype=torch.bool), 0)


def scan_piece(return_last: bool, group: Group, *inputs) -> tuple[Tensor, Tensor | None]:
    """In the place of the operators' `scan`: return y of the piece, the last state of the whole."""
    if inputs[-1] == "sequential":  # a loop whose gradient PyTorch records itself
        return recorded_scan(return_last, group, *inputs)
    return Scan.apply(return_last, group, *inputs)[:2]


def recorded_scan(return_last: bool, group: Group, *inputs) -> tuple[Tensor, Tensor | None]:
    """The same, of parts that can all be differentiated as often as one likes."""
    _, before, last = joined(return_last, group, *inputs)
    return scan(*inputs[:8], before, *inputs[9:])[0], last


class Scan(torch.autograd.Function):
    """The three acts; y, the last state, and what is kept: a_r, h_r and states on the way.

    All gradients are those of one scan of the piece from h_r, if the state after it has the
    gradient that comes from later ranks, λ_{r+1}. With ∂_r what y adds to the gradient of h_r,

        λ_r = ∂_r + a_r λ_{r+1},

    so `Join` finds it, once ∂_r is found alone.
    """

    @staticmethod
    def forward(return_last: bool, group: Group, *inputs) -> tuple[Tensor | None, ...]:
        decay, before, last = joined(return_last, group, *inputs)
        y, _, states = SCAN(*inputs[:8], before, *inputs[9:])
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
            definition = partial(recorded_scan, ctx.return_last, ctx.group)
            return None, None, *vjp(definition, wanted, (dy, dlast), [*tensors, *ctx.rules])
        own, _ = END(dy, dt, A, C, z, dt_bias, *how, True, backend)
        later = Join.apply(decay, own, dlast, True, ctx.group)
        later = later[0] if ctx.return_last else later
        inputs = *tensors[:8], before, *ctx.rules
        found = SCAN.gradient(wanted, (dy, later, None), inputs, [states])
        return None, None, *(g if want else None for g, want in zip(found, wanted, strict=True))


def joined(return_last: bool, group: Group, *inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return a_r and h_r of this rank, and the last state of the whole if asked for."""
    x, dt, A, B, _, _, _, dt_bias, start, _, softplus, exact, _, backend = inputs
    end, span = END(x, dt, A, B, None, dt_bias, softplus, exact, False, backend)
    # that of an unstable model may overflow where the state is zero, and ∞ · 0 is not a number
    decay = torch.exp(span[..., None] * A.to(end.dtype)).clamp(max=torch.finfo(end.dtype).max)
    end = end if start is None else end + decay * start
    if return_last:
        before, last = Join.apply(decay, end, torch.zeros_like(end), False, group)
    else:
        before, last = Join.apply(decay, end, None, False, group), None
    return decay, before if start is None else before + start, last


class Join(torch.autograd.Function):
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
        rank = rank_in(group)
        sent = torch.stack([a, b] if start is None else [a, b, start])
        decays, ends, *starts = gather(sent, group).unbind(1)  # (ranks, batch, d_inner, d_state)
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
        found = Join.apply(a, upstream, upstream_last, not ctx.reverse, ctx.group)
        later, first = (found, None) if upstream_last is None else found
        return later * before, later, first, None, None


def gather(tensor: Tensor, group: Group) -> Tensor:
    """Return the tensors of all ranks, one above the other."""
    tensor = tensor.contiguous()
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    with heard("what the others found", group):
        dist.all_gather(found, tensor, group)
    return torch.stack(found)
