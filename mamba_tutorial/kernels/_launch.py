"""What every launch of a kernel needs: the right device, and how large it is."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

if not torch.cuda.is_available() and isinstance(tl.sum, triton.JITFunction):
    raise ImportError(
        "there is no GPU, and Triton was imported before its interpreter could be asked for; set "
        "TRITON_INTERPRET=1, or import mamba_tutorial.kernels before triton"
    )


def on(tensor: Tensor) -> AbstractContextManager:
    """Launch on the GPU of the tensor, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def multiprocessors(tensor: Tensor) -> int:
    """Return how many multiprocessors the tensor's GPU has; 1 in the interpreter."""
    if not tensor.is_cuda:
        return 1
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count
