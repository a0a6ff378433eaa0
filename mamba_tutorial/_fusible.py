"""The sums of S4 and S4D in real numbers, for `torch.compile` on a GPU.

PyTorch's compiler runs operations on complex numbers one by one. Of the same operations on their
real and imaginary parts it makes one kernel, in which the terms of a sum never reach memory. Here a
complex number is a pair of tensors.
"""

import math

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def parts(z: Tensor) -> Pair:
    """Return the real and the imaginary part."""
    return torch.view_as_real(z).unbind(-1)


def times(a: Pair, b: Pair) -> Pair:
    """Return a b."""
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def inverse(a: Pair) -> Pair:
    """Return 1 / a."""
    size = a[0] * a[0] + a[1] * a[1]
    return a[0] / size, -a[1] / size


def conjugate(a: Pair) -> Pair:
    """Return a*."""
    return a[0], -a[1]


def scaled(a: Pair, by: Tensor) -> Pair:
    """Return a times a real number."""
    return a[0] * by, a[1] * by


def both(a: Pair) -> Pair:
    """Return the modes and their conjugates, along the last axis."""
    return torch.cat([a[0], a[0]], -1), torch.cat([a[1], -a[1]], -1)


def exprel(z: Pair) -> Pair:
    """Return (eᶻ − 1) / z; see `mamba_tutorial.discretize.exprel`."""
    small = z[0] * z[0] + z[1] * z[1] < 0.25
    zero, one = torch.zeros_like(z[0]), torch.ones_like(z[0])
    near = torch.where(small, z[0], zero), torch.where(small, z[1], zero)
    x, y = torch.where(small, one, z[0]), torch.where(small, zero, z[1])
    series = one, zero
    for j in range(15, 1, -1):
        re, im = times(series, near)
        series = 1 + re / j, im / j
    # eᶻ − 1 = (eˣ − 1) cos y − (1 − cos y) + i eˣ sin y, and 1 − cos y = 2 sin²(y/2)
    minus_one = torch.expm1(x) * torch.cos(y) - 2 * torch.sin(y / 2) ** 2, x.exp() * torch.sin(y)
    quotient = times(minus_one, inverse((x, y)))
    return tuple(torch.where(small, s, q) for s, q in zip(series, quotient, strict=True))


def zoh_kernel(A: Tensor, C: Tensor, dt: Tensor, length: int) -> Tensor:
    """Return S4D's kernel 2 Re Σ_n C_n B̄_n exp(l Δ A_n), (…, length); B = 1."""
    z = scaled(parts(A), dt[..., None])
    weight = times(parts(C), scaled(exprel(z), dt[..., None]))
    l = torch.arange(length, device=dt.device).to(dt)[:, None]  # noqa: E741
    (x, y), (re, im) = ([part[..., None, :] for part in pair] for pair in (z, weight))
    return 2 * ((l * x).exp() * (re * torch.cos(l * y) - im * torch.sin(l * y))).sum(-1)


def dplr_kernel(
    Lambda: Tensor, P: Tensor, B: Tensor, C_truncated: Tensor, dt: Tensor, length: int
) -> Tensor:
    """Return S4's kernel, (…, length), of one of each pair of conjugate modes.

    See `mamba_tutorial.s4.dplr_kernel`. With z = exp(−2iα), 1 − z = 2i sin α exp(−iα) and
    1 + z = 2 cos α exp(−iα): the phase comes before all sums, and real factors are left,

        K̂ = exp(iα) (Σ C̃Bq − cos α · Σ C̃Pq · Σ P*Bq / (1 + cos α · Σ P*Pq))

    with q = 1 / ((2i/Δ) sin α − Λ cos α).
    """
    alpha = torch.arange(length // 2 + 1, device=dt.device).to(dt) * (math.pi / length)
    sine, cosine = torch.sin(alpha), torch.cos(alpha)
    Lambda, P, B, C = (both(parts(mode)) for mode in (Lambda, P, B, C_truncated))
    re, im = (part[..., None] for part in Lambda)
    q = inverse((-re * cosine, 2 * sine / dt[..., None, None] - im * cosine))

    def cauchy_sum(a: Pair, b: Pair) -> Pair:
        re, im = times(tuple(part[..., None] for part in times(a, b)), q)
        return re.sum(-2), im.sum(-2)

    row = conjugate(P)
    CB, CP, PB, PP = (cauchy_sum(*pair) for pair in ((C, B), (C, P), (row, B), (row, P)))
    below = 1 + cosine * PP[0], cosine * PP[1]
    taken = times(scaled(times(CP, PB), cosine), inverse(below))
    re, im = times((CB[0] - taken[0], CB[1] - taken[1]), (cosine, sine))
    return torch.fft.irfft(torch.complex(re, im), n=length)
