"""Kernels that do nothing but call a part of another and write down what it returns."""

from mamba_tutorial.kernels._triton import gl, gluon, tl, triton
from mamba_tutorial.kernels.selective_scan import forward_in_gluon, forward_in_triton

_in_gluon, _in_triton = forward_in_gluon.reaching, forward_in_triton.reaching


@triton.jit
def reaching_in_triton(begins_ptr, out_ptr, length, begin, end, REVERSE: tl.constexpr):
    """Write begin and end of each sequence, (batch, 2)."""
    batch = tl.program_id(0).to(tl.int64)
    first, last = _in_triton(begins_ptr, batch, length, begin, end, REVERSE)
    tl.store(out_ptr + 2 * batch, first)
    tl.store(out_ptr + 2 * batch + 1, last)


@gluon.jit
def reaching_in_gluon(begins_ptr, out_ptr, length, begin, end, REVERSE: gl.constexpr):
    batch = gl.program_id(0).to(gl.int64)
    first, last = _in_gluon(begins_ptr, batch, length, begin, end, REVERSE)
    gl.store(out_ptr + 2 * batch, first)
    gl.store(out_ptr + 2 * batch + 1, last)
