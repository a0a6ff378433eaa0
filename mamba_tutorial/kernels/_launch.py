"""What every launch of a kernel needs: the right device, and how large it is."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on(tensor: Tensor) -> AbstractContextManager:
    """Launch on the GPU of the tensor, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def generation(tensor: Tensor) -> tuple[int, int]:
    """Return the compute capability of the tensor's GPU, if it is NVIDIA's; else (0, 0).

    All that only NVIDIA's chips have is asked for here: PyTorch calls AMD's "cuda", too.
    """
    if not tensor.is_cuda or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(tensor.device)


def early(tensor: Tensor) -> dict[str, bool]:
    """Return the options of a kernel that may be started before the kernel before it has ended.

    From Hopper on a GPU can do so. Then the kernel, whose constant EARLY this sets, has to wait
    before it touches memory.
    """
    can = generation(tensor) >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if can else {"EARLY": False}


def multiprocessors(tensor: Tensor) -> int:
    """Return how many multiprocessors the tensor's GPU has; 1 in the interpreter."""
    if not tensor.is_cuda:
        return 1
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count
