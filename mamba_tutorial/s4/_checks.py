"""What the kernels of S4 and S4D ask of their arguments alike."""

import torch
from torch import Tensor

from mamba_tutorial._check import check_length, check_memory, check_tensors


def kernel_length(length: int, channels: int) -> int:
    """Return the length, if kernels of so many channels fit into memory."""
    length = check_length(length)
    check_memory("length", length, length * channels)
    return length


def check_pairs(name: str, size: int) -> int:
    """Return a size that is even."""
    size = check_length(size, name)
    if size % 2:
        raise ValueError(f"{name} is {size}, expected an even number, for pairs of eigenvalues")
    return size


def check_complex(**tensors: Tensor) -> None:
    """Raise TypeError unless all are complex; ValueError as `check_tensors`."""
    check_tensors(**tensors)
    for name, tensor in tensors.items():
        if not tensor.is_complex():
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected a complex one")


def check_batches(**batches: torch.Size) -> torch.Size:
    """Return the channels that the arguments have together."""
    try:
        return torch.broadcast_shapes(*batches.values())
    except RuntimeError:
        given = ", ".join(f"{name} {tuple(batch)}" for name, batch in batches.items())
        raise ValueError(f"channels do not broadcast together: {given}") from None
