"""Softplus and the logistic function as the kernels compute them, in Triton and in Gluon."""

from mamba_tutorial.kernels._triton import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)  # the GPU has a unit for 2^x; e^x = 2^(x log₂ e)


def _softplus(x):
    """max(x, 0) + ln(1 + u) with u = e^−|x| ≤ 1.

    ln(1 + u)/u is a polynomial through Chebyshev nodes, off by 1.4e-7 at most: one exponential, no
    logarithm, all digits for every x.
    """
    u = tl.exp2(tl.abs(x) * -LOG2E)
    p = u * -0.003256378462538123 + 0.019907161593437195
    p = p * u - 0.057064201682806015
    p = p * u + 0.10614264756441116
    p = p * u - 0.15311862528324127
    p = p * u + 0.19678117334842682
    p = p * u - 0.24954558908939362
    p = p * u + 0.33330005407333374
    p = p * u - 0.4999990463256836
    p = p * u + 1.0
    return tl.maximum(x, 0.0) + u * p


def _sigmoid(x):
    """1/(1 + u) or u/(1 + u) with u = e^−|x|.

    The reciprocal is the inverse root of the square, which is one instruction.
    """
    u = tl.exp2(tl.abs(x) * -LOG2E)
    w = 1 + u
    r = tl.rsqrt(w * w)
    return tl.where(x >= 0, r, u * r)


def _carry(h, exponent):
    """2^exponent h in two halves, for 2^exponent alone may be too large for a number."""
    half = tl.exp2(exponent * 0.5)
    return tl.where(h == 0, 0.0, half * (half * h))


softplus, sigmoid, carry = triton.jit(_softplus), triton.jit(_sigmoid), triton.jit(_carry)
