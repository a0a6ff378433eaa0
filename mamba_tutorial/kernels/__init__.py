"""Compiled loops: what PyTorch's operations cannot fuse. They import nothing of the package.

- `cpu`: the selective scan on a CPU, compiled by Numba
"""
