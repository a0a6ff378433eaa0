"""Compiled loops: what PyTorch's operations cannot fuse. They import nothing of the package.

- `cpu`: the selective scan on a CPU, compiled by Numba
- `selective_scan`: the same on a GPU, in Triton; its twins in Gluon, where each thread's numbers
  are laid out by hand, are `selective_scan_forward` and `selective_scan_backward`
- `scan`: the recurrence on a GPU, in Triton, with `look_back`; its twin in Gluon is `scan_staged`
- `conv`, `decode`: the short convolution, and one token of it and of the selective scan
- `lessons`: the first kernels of the book's last chapter

Where there is no GPU, Triton's kernels run in its interpreter: slowly, and with the same results.
Gluon has none.
"""
