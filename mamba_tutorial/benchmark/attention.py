"""The selective scan beside the best attention, for the length from which it is quicker."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_tutorial.benchmark.measuring import Row, attempt, milliseconds, no_grad, only
from mamba_tutorial.benchmark.scans import ours_scan, scan_inputs


def attention() -> Iterator[Row]:
    """Causal attention and the selective scan, width 1024, forward and forward + backward.

    At 65536 tokens in all, and for one sequence. Attention by FlashAttention and by cuDNN, as
    PyTorch brings them, with 16 heads, bfloat16.
    """
    lengths = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
    shapes = [(65536 // length, length) for length in lengths]
    for batch, length in shapes + [(1, length) for length in lengths[:-1]]:
        shape = {"batch": batch, "length": length}
        for kind in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):

            def attend(kind=kind, batch=batch, length=length) -> Row:
                heads = torch.randn(3, batch, 16, length, 64, device="cuda", dtype=torch.bfloat16)
                with only(kind):
                    return _both_ways(
                        partial(F.scaled_dot_product_attention, is_causal=True), list(heads)
                    )

            yield attempt({**shape, "name": kind}, attend)

        def ours(batch=batch, length=length) -> Row:
            return _both_ways(ours_scan, scan_inputs(batch, length, 1024))

        yield attempt({**shape, "name": "mamba_tutorial"}, ours)


def _both_ways(run: Callable, given: Sequence[Tensor]) -> Row:
    """Return the times of run(*given), without and with its gradients."""
    forward, how = milliseconds(no_grad(lambda: run(*given)))
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    upstream = torch.randn_like(run(*leaves))
    both, both_how = milliseconds(lambda: torch.autograd.grad(run(*leaves), leaves, upstream))
    return {"forward_ms": forward, "both_ms": both, "how": how if how == both_how else "called"}
