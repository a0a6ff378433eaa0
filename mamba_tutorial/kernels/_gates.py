"""What the selective scan's kernels in Triton and in Gluon compute alike: gates and decays."""

from mamba_tutorial.kernels._triton import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)  # the GPU has a unit for 2^x; e^x = 2^(x log₂ e)
CLOSED = tl.constexpr(-(2.0**60))  # Σ Δ is below this, if a sequence begins on the way


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


def _mark(word, token):
    """What is added to the exponent of a token's decay: where a sequence begins, −2^65 or less.

    There the decay becomes 2^… = 0, whatever A is, 0 included. word: of four tokens, a byte each,
    the first lowest, 1 where a sequence begins. Times 224 and moved to the top, such a byte is the
    sign and the exponent of a float32, and sums of them stay finite. The bytes below, of tokens
    before, make less than 2^−125 where the top is 0. So all it takes is a shift, at most.
    """
    return (word * 224 << (24 - (token & 3) * 8)).to(tl.float32, bitcast=True)


def _carry(h, span, A2, CUT: tl.constexpr):
    """2^(span A2) h in two halves, for 2^(span A2) alone may be too large for a number.

    If CUT, a span below CLOSED says that a sequence begins in it: then 0.
    """
    if CUT:
        h = tl.where(span < CLOSED, 0.0, h)
        span = tl.where(span < CLOSED, 0.0, span)
    half = tl.exp2(span * 0.5 * A2)
    return tl.where(h == 0, 0.0, half * (half * h))


softplus, sigmoid, mark, carry = map(triton.jit, (_softplus, _sigmoid, _mark, _carry))
