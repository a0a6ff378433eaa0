"""Compiled loops: what PyTorch's operations cannot fuse. They import nothing of the package.

- `cpu`: the selective scan on a CPU, compiled by Numba
- `selective_scan`: the same on a GPU, in Triton and in Gluon, where each thread's numbers are laid
  out by hand; forward and backward
- `scan`: the recurrence on a GPU, in both, with `look_back`
- `conv`, `decode`: the short convolution, and one token of it and of the selective scan
- `lessons`: the kernels of the book's last chapter, from the first one on

Where there is no GPU, Triton's kernels run in its interpreter: slowly, and with the same results.
Gluon has none.
"""
