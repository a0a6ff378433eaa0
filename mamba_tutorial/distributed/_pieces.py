"""What stands in the place of a model's convolutions and scans while it reads pieces."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mamba_tutorial.distributed._agreement import Group, agree, heard, input_traits, rank_in
from mamba_tutorial.distributed._join import scan_piece
from mamba_tutorial.mamba import CausalConv1d
from mamba_tutorial.selective import SelectiveSSM
from mamba_tutorial.selective._checks import check_scan
from mamba_tutorial.selective._operators import run_scan


class Pieces:
    """What the modules of a model are told of the ranks: the group, and the lengths of all pieces.

    Attributes:
        group: the ranks.
        lengths: of the pieces, in the order of the ranks; None before the first call of the model.
    """

    def __init__(self, group: Group):
        self.group, self.rank = group, rank_in(group)
        self.lengths: list[int] | None = None

    def look(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before a call of the model: compare the inputs of all ranks, and note the lengths."""
        settings, problem, length = {}, None, None
        try:
            x, settings = input_traits(module, args, kwargs)
            length = x.shape[1]
        except (TypeError, ValueError) as error:
            problem = error
        self.lengths = agree(settings, problem, self.group, length)

    def convolve(
        self, conv: CausalConv1d, forward: Callable, x: Tensor, before: None = None
    ) -> tuple[Tensor, None]:
        """In the place of the forward of a `CausalConv1d`."""
        if self.lengths is None or x.shape[1] != self.lengths[self.rank]:
            needed = f"expected a call of the whole model, which saw lengths {self.lengths}"
            raise ValueError(f"x of a convolution has length {x.shape[1]}, {needed}")
        width = conv.kernel_size[0] - 1
        return forward(x, tokens_before(x, width, self.lengths, self.group))[0], None

    def scan(
        self, ssm: SelectiveSSM, x: Tensor, z: Tensor | None = None, h: None = None
    ) -> tuple[Tensor, None]:
        """In the place of the forward of a `SelectiveSSM`."""
        dt, B, C = ssm.select(x)
        given = x, dt, ssm.A, B, C, ssm.D, z, ssm.dt_bias, True, None, ssm.discretization, "auto"
        return run_scan(partial(scan_piece, False, self.group), check_scan(*given))


@contextmanager
def instead(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Call this in the place of the module's own forward."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def tokens_before(x: Tensor, width: int, lengths: list[int], group: Group) -> Tensor:
    """Return the `width` tokens before this piece, (batch, width, channels), zeros at the start.

    They come from the rank before, and where its piece is too short from those before it.
    """
    rank = rank_in(group)

    def count(holder: int, reader: int) -> int:
        between = sum(lengths[holder + 1 : reader])
        return max(0, min(lengths[holder], width - between)) if holder < reader else 0

    sent = [count(rank, reader) for reader in range(len(lengths))]
    received = [count(holder, rank) for holder in range(len(lengths))]
    # cut off once: the gradient of every cut has the size of x
    last = x[:, x.shape[1] - max(sent) :]
    ends = torch.cat([last[:, last.shape[1] - tokens :] for tokens in sent], 1)
    arrived = Send.apply(ends.transpose(0, 1), sent, received, group).transpose(0, 1)
    nothing = x.new_zeros(len(x), width - arrived.shape[1], x.shape[2])
    return torch.cat([nothing, arrived], 1)


class Send(torch.autograd.Function):
    """Send tokens to each rank; their gradients come back the same way.

    The tokens lie along the first axis, in the order of the ranks that they are for or came from;
    `sent` and `received` say how many each rank gets and gave.
    """

    @staticmethod
    def forward(tokens: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
        arrived = tokens.new_empty(sum(received), *tokens.shape[1:])
        with heard("the tokens before a piece, or their gradients", group):
            dist.all_to_all_single(arrived, tokens.contiguous(), received, sent, group)
        return arrived

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        _, ctx.sent, ctx.received, ctx.group = inputs

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple:
        return Send.apply(upstream, ctx.received, ctx.sent, ctx.group), None, None, None
