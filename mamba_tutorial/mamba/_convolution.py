"""The causal convolution of a Mamba block, as a module and as PyTorch's operators."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_tutorial._check import HAS_TRITON, check_row, wide
from mamba_tutorial.ops import register, vjp


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
