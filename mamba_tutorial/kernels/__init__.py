"""Compiled loops: what PyTorch's operations cannot fuse. They import nothing of the package.

- `cpu`: the selective scan on a CPU, compiled by Numba
- `selective_scan`: the selective scan on a GPU, in Triton

Where there is no GPU, Triton's kernels run in its interpreter: slowly, and with the same results.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined
