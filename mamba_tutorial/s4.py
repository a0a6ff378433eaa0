"""S4: a long convolution whose kernel is cheap because A has structure.

Two structures, two layers:

- `S4`: A is diagonal plus low rank, as LegS is after a change of basis (Gu et al. 2022a). The
  kernel comes from its generating function at the roots of unity, the Woodbury identity and a
  Cauchy sum: `dplr_kernel`.
- `S4D`: A is diagonal (Gu et al. 2022b). The kernel is a sum of exponentials: `diagonal_kernel`.

Both layers hold `d_model` independent state space models of one input and one output, each with
its own step Δ. They run as a convolution (`forward`) and as a recurrence (`step`), with the same
result.
"""

import math
from collections.abc import Iterator
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from mamba_tutorial import _fusible
from mamba_tutorial._check import (
    can_look_at,
    check_choice,
    check_input,
    check_is_tensor,
    check_length,
    check_memory,
    check_range,
    check_room,
    check_shape,
    check_step,
    check_tensors,
    precise,
    wide,
)
from mamba_tutorial.discretize import diagonal_zoh, exprel, exprel_slope
from mamba_tutorial.hippo import dplr
from mamba_tutorial.ops import register, vjp
from mamba_tutorial.ssm import fft_convolution

DiagonalInit = Literal["legs", "lin", "inv", "real"]
INITS = get_args(DiagonalInit)

# Numbers that a block of the Cauchy sum may hold at a time: enough to be quick, little to store. A
# CPU wants them in its cache, a GPU few launches.
CAUCHY_BLOCK = {"cpu": 1 << 18, "cuda": 1 << 23}


def diagonal_init(n: int, kind: DiagonalInit = "legs") -> Complex[Tensor, " half"]:
    """Return n/2 eigenvalues of S4D; with their conjugates they are the n of A. Complex128.

        legs  the eigenvalues of LegS's normal part, −½ + i w
        lin   −½ + i π k
        inv   −½ + i (n/π) (n/(2k+1) − 1)
        real  −(k+1), without an imaginary part

    for k = 0, …, n/2 − 1. From Gu et al. (2022b), Section 4. (The Mamba paper prints "lin" as
    −½ + i k, without the π.)

    Raises:
        TypeError, ValueError: n is not an even positive number, or there is no such kind.
    """
    n = _check_pairs("n", n)
    check_memory("n", n, n)
    check_choice("kind", kind, INITS)
    k = torch.arange(n // 2).double()
    if kind == "legs":
        return dplr(n).Lambda[: n // 2]
    if kind == "real":
        return torch.complex(-(k + 1), torch.zeros_like(k))
    imaginary = math.pi * k if kind == "lin" else n / math.pi * (n / (2 * k + 1) - 1)
    return torch.complex(torch.full_like(k, -0.5), imaginary)


def diagonal_kernel(
    A_bar: Complex[Tensor, "*channels half"], CB_bar: Complex[Tensor, "*channels half"], length: int
) -> Float[Tensor, "*channels length"]:
    """Return K̄_l = 2 Re Σ_n C_n B̄_n Ā_n^l for l = 0, …, length − 1.

    The sum runs over one of each pair of conjugate modes, hence 2 Re. The powers are a Vandermonde
    matrix (Gu et al. 2022b, Section 3.3), built by doubling: Ā^(l + 2^j) = Ā^l Ā^(2^j).

    Raises:
        TypeError: the dtypes are not complex, or differ.
        ValueError: the shapes do not fit, or length is not positive.
    """
    _check_complex(A_bar=A_bar, CB_bar=CB_bar)
    check_shape("A_bar", A_bar, "... half")
    check_shape("CB_bar", CB_bar, "... half", half=A_bar.shape[-1])
    _check_batches(A_bar=A_bar.shape[:-1], CB_bar=CB_bar.shape[:-1])
    length = _kernel_length(length, CB_bar.numel())
    return _sum_of_powers(*torch.broadcast_tensors(A_bar, CB_bar), length)


def _powers(A_bar: Tensor, length: int) -> Tensor:
    """Return Ā^l for l = 0, …, length − 1, (…, length, half)."""
    powers, next_ = torch.ones_like(A_bar)[..., None, :], A_bar[..., None, :]
    while powers.shape[-2] < length:
        powers = torch.cat([powers, powers * next_], dim=-2)
        next_ = next_ * next_
    return powers[..., :length, :]


def _sum_of_powers(A_bar: Tensor, CB_bar: Tensor, length: int) -> Tensor:
    return 2 * (_powers(A_bar, length) @ CB_bar[..., None]).squeeze(-1).real


# S4D's kernel as an operator: (A, C, Δ, length), with A and C (…, half), Δ (…), and B = 1. Its
# backward pass makes the powers again instead of going back through all doublings.


def _zoh_kernel(A: Tensor, C: Tensor, dt: Tensor, length: int) -> Tensor:
    A_bar, B_bar = diagonal_zoh(A, torch.ones_like(A), dt)
    return _sum_of_powers(A_bar, C * B_bar, length)


def _zoh_kernel_gradient(wanted, upstream, inputs, kept) -> tuple[Tensor | None, ...]:
    return *_ZOH_KERNEL_GRADIENTS(*upstream, *inputs[:3]), None


def _run_zoh_kernel_gradients(
    d: Tensor, A: Tensor, C: Tensor, dt: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """By the chain rule, from K̄ to Ā and C B̄, to ΔA and Δ, to A.

    Of a holomorphic function the gradient is multiplied by the conjugate of the derivative:
    2 Σ_l d_l conj(l C B̄ Ā^(l−1)) for Ā, 2 Σ_l d_l conj(Ā^l) for C B̄.
    """
    step = dt[..., None]
    z = step * A
    A_bar, mean = z.exp(), exprel(z)
    B_bar = step * mean
    turned = _powers(A_bar, d.shape[-1]).conj_physical().mT  # [..., half, length]
    counts = torch.arange(d.shape[-1], device=d.device)
    columns = torch.stack([2 * d, 2 * counts * d], dim=-1).to(turned)
    through_C, through_A = (turned @ columns).unbind(-1)  # Ā's share, but for 1/Ā, that of ΔA
    slope = through_C * (step * exprel_slope(z)).conj_physical() + through_A * B_bar.conj_physical()
    dz = C.conj_physical() * slope
    of_step = A.conj_physical() * dz + (C * mean).conj_physical() * through_C
    return step * dz, through_C * B_bar.conj_physical(), of_step.real.sum(-1)


_ZOH_KERNEL = register(
    "diagonal_kernel",
    "(Tensor A, Tensor C, Tensor dt, SymInt length) -> Tensor",
    run=lambda *given: _zoh_kernel(*given).contiguous(),
    like=lambda A, C, dt, length: dt.new_empty(*A.shape[:-1], length),
    definition=_zoh_kernel,
    gradient=_zoh_kernel_gradient,
    fusible=_fusible.zoh_kernel,
)
_ZOH_KERNEL_GRADIENTS = register(
    "diagonal_kernel_backward",
    "(Tensor d, Tensor A, Tensor C, Tensor dt) -> (Tensor, Tensor, Tensor)",
    run=_run_zoh_kernel_gradients,
    like=lambda d, *inputs: tuple(tensor.new_empty(tensor.shape) for tensor in inputs),
    definition=lambda d, *inputs: tuple(
        vjp(_zoh_kernel, (True, True, True, False), (d,), (*inputs, d.shape[-1]))[:3]
    ),
)


def dplr_kernel(
    Lambda: Complex[Tensor, "*#channels n"],
    P: Complex[Tensor, "*#channels n"],
    B: Complex[Tensor, "*#channels n"],
    C_truncated: Complex[Tensor, "*#channels n"],
    dt: Float[Tensor, "*#channels"],
    length: int,
) -> Float[Tensor, "*channels length"]:
    """Return the bilinear kernel of A = diag(Λ) − P P*, in O(n + length) memory.

    The generating function of the kernel, K̂(z) = Σ_l K̄_l z^l, at z = exp(−2πi j / length) is the
    kernel's Fourier transform. There z^length = 1, and the geometric series Σ Ā^l z^l sums to

        K̂(z) = C̃ (I − Ā z)⁻¹ B̄,    C̃ = C (I − Ā^length)    (see `truncate`)

    With the bilinear Ā and B̄, (I − Ā z)⁻¹ B̄ = ((1−z)/Δ · I − (1+z)/2 · A)⁻¹ B. For the diagonal
    part this inverse is q_n(z) = 1 / ((1−z)/Δ − (1+z)/2 · Λ_n), and the Woodbury identity corrects
    for the rank-one part:

        K̂ = Σ C̃Bq − (1+z)/2 · Σ C̃Pq · Σ P*Bq / (1 + (1+z)/2 · Σ P*Pq)

    Each sum over n is a Cauchy sum. From Gu et al. (2022a), Appendix C.3; theirs divides by 1 + z
    and needs care at z = −1, this form does not. The modes come in conjugate pairs, so the kernel
    is real and half of the roots suffice.

    Raises:
        TypeError: the dtypes are not complex, or differ.
        ValueError: the shapes do not fit, length is not positive, or the kernel is not finite: an
            eigenvalue lies on the imaginary axis, or far to the right of it.
    """
    _check_complex(Lambda=Lambda, P=P, B=B, C_truncated=C_truncated)
    given = {"Lambda": Lambda, "P": P, "B": B, "C_truncated": C_truncated}
    check_shape("Lambda", Lambda, "... n")
    for name, tensor in given.items():
        check_shape(name, tensor, "... n", n=Lambda.shape[-1])
    dt = check_step(dt, like=Lambda)
    batches = {name: tensor.shape[:-1] for name, tensor in given.items()}
    channels = _check_batches(dt=dt.shape, **batches)
    length = _kernel_length(length, math.prod(channels))
    kernel = _dplr_kernel(Lambda, P, B, C_truncated, dt, length)
    if can_look_at(kernel) and not kernel.isfinite().all():
        needed = "expected negative real parts and a kernel that does not overflow"
        raise ValueError(f"Lambda has a pole at a root of unity, {needed}")
    return kernel


def _dplr_kernel(
    Lambda: Tensor, P: Tensor, B: Tensor, C_truncated: Tensor, dt: Tensor, length: int
) -> Tensor:
    spectrum = _SPECTRUM(*_cauchy_terms(Lambda, P, B, C_truncated, dt, length))
    return torch.fft.irfft(spectrum, n=length)


def _cauchy_terms(
    Lambda: Tensor, P: Tensor, B: Tensor, C_truncated: Tensor, dt: Tensor, length: int
) -> tuple[Tensor, ...]:
    """Return what `_SPECTRUM` takes."""
    angle = 2 * math.pi * precise(torch.arange(length // 2 + 1, device=P.device)) / length
    # 1 − z and 1 + z from half angles, or small angles would cancel
    minus = torch.complex(2 * torch.sin(angle / 2) ** 2, torch.sin(angle)).to(P)
    plus = torch.complex(torch.cos(angle / 2) ** 2, -torch.sin(angle) / 2).to(P)  # (1 + z) / 2
    row = P.conj_physical()
    products = C_truncated * B, C_truncated * P, row * B, row * P
    *products, Lambda, dt = torch.broadcast_tensors(*products, Lambda, dt[..., None])
    weights = torch.stack(products, dim=-2)
    return Lambda.contiguous(), weights, dt[..., 0].contiguous(), minus, plus


def _kernel_length(length: int, channels: int) -> int:
    length = check_length(length)
    check_memory("length", length, length * channels)
    return length


def _check_pairs(name: str, size: int) -> int:
    size = check_length(size, name)
    if size % 2:
        raise ValueError(f"{name} is {size}, expected an even number, for pairs of eigenvalues")
    return size


def _check_complex(**tensors: Tensor) -> None:
    check_tensors(**tensors)
    for name, tensor in tensors.items():
        if not tensor.is_complex():
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected a complex one")


def _check_batches(**batches: torch.Size) -> torch.Size:
    """Return the channels that the arguments have together."""
    try:
        return torch.broadcast_shapes(*batches.values())
    except RuntimeError:
        given = ", ".join(f"{name} {tuple(batch)}" for name, batch in batches.items())
        raise ValueError(f"channels do not broadcast together: {given}") from None


def truncate(
    C: Complex[Tensor, "*channels n"], A_bar: Complex[Tensor, "*channels n n"], length: int
) -> Complex[Tensor, "*channels n"]:
    """Return C̃ = C (I − Ā^length), with which a generating function of `length` terms is closed.

    Ā^length takes 2 log₂ length products by repeated squaring. (The released S4 learns C̃ itself
    and ties the layer to one length; here C is learned, so any length and `step` agree.)

    Raises:
        TypeError: the dtypes are not complex, or differ.
        ValueError: the shapes do not fit, or length is not positive.
    """
    _check_complex(C=C, A_bar=A_bar)
    check_shape("C", C, "... n")
    check_shape("A_bar", A_bar, "... n n", n=C.shape[-1])
    channels = _check_batches(C=C.shape[:-1], A_bar=A_bar.shape[:-2])
    return _truncate(C, A_bar, _kernel_length(length, math.prod(channels)))


def _truncate(C: Tensor, A_bar: Tensor, length: int) -> Tensor:
    return C - (C.unsqueeze(-2) @ torch.linalg.matrix_power(A_bar, length)).squeeze(-2)


def _bilinear_matrix(Lambda: Tensor, P: Tensor, dt: Tensor) -> Tensor:
    """Return the dense Ā = 2 (I − Δ/2 A)⁻¹ − I, in double precision; see `_bilinear_dplr`."""
    Lambda, P, dt = precise(Lambda), precise(P), precise(dt)
    d, column, row = _bilinear_dplr(Lambda, P, dt)
    return torch.diag_embed(2 * d - 1) - 2 * column[..., None] * row[..., None, :]


def _truncate_dplr(Lambda: Tensor, P: Tensor, C: Tensor, dt: Tensor, length: int) -> Tensor:
    """Return C̃; in double precision inside, for Ā^length has the rounding of Ā length-fold."""
    A_bar = _bilinear_matrix(Lambda, P, dt)
    return _truncate(C.to(A_bar), A_bar, length).to(C)


def _truncate_dplr_gradients(
    d: Tensor, Lambda: Tensor, P: Tensor, C: Tensor, dt: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By the chain rule, from C̃ to Ā^length, through its squarings to Ā, to Δ/2 A, to Λ, P and Δ.

    With R = (I − M)⁻¹ = (Ā + I)/2 and M = Δ/2 A, dĀ = 2 dR = 2 R dM R.
    """
    A_bar = _bilinear_matrix(Lambda, P, dt)
    bits, stages = [int(bit) for bit in f"{length:b}"[1:]], [A_bar]
    for bit in bits:
        squared = stages[-1] @ stages[-1]
        stages += [squared, squared @ A_bar] if bit else [squared]
    d, C, Lambda, column = d.to(A_bar), C.to(A_bar), Lambda.to(A_bar), P.to(A_bar)[..., None]
    dC = d - (_adjoint(stages.pop()).mT @ d[..., None]).squeeze(-1)
    turned = _adjoint(A_bar)
    dpower, dA_bar = -C.conj_physical()[..., None] * d[..., None, :], torch.zeros_like(A_bar)
    for bit in reversed(bits):
        if bit:
            dA_bar += _adjoint(stages.pop()) @ dpower
            dpower = dpower @ turned
        root = _adjoint(stages.pop())
        dpower = dpower @ root + root @ dpower
    identity = torch.eye(turned.shape[-1], dtype=turned.dtype, device=turned.device)
    inverse = (turned + identity) / 2
    dM = 2 * inverse @ (dA_bar + dpower) @ inverse
    diagonal, half = dM.diagonal(dim1=-2, dim2=-1), precise(dt)[..., None] / 2
    dP = -half * ((dM + _adjoint(dM)) @ column).squeeze(-1)
    dhalf = (Lambda.conj_physical() * diagonal).real.sum(-1)
    dhalf -= (_adjoint(column) @ dM @ column).real.sum((-1, -2))
    return (half * diagonal).to(P), dP.to(P), dC.to(P), (dhalf / 2).to(dt)


def _adjoint(matrix: Tensor) -> Tensor:
    return matrix.mT.conj_physical()


# K̂ at the roots of unity as an operator: (Λ, weights, Δ, 1 − z, (1 + z)/2), with Λ (…, n), weights
# (…, 4, n) and Δ (…) of the same channels. A block of roots times all modes is small, lives for a
# moment, and is computed again in the backward pass. The result is written in place: appended
# pieces would be scattered between the freed blocks and keep the allocator from using their memory.


def _spectrum(Lambda: Tensor, weights: Tensor, dt: Tensor, minus: Tensor, plus: Tensor) -> Tensor:
    """Return K̂ at some roots, by the Woodbury identity and four Cauchy sums."""
    q = 1 / (minus / dt[..., None, None] - plus * Lambda[..., None])  # [..., n, roots]
    CB, CP, PB, PP = (weights @ q).unbind(-2)
    return CB - plus * CP * PB / (1 + plus * PP)


def _run_spectrum(
    Lambda: Tensor, weights: Tensor, dt: Tensor, minus: Tensor, plus: Tensor
) -> Tensor:
    spectrum = weights.new_empty(*dt.shape, len(minus))
    for roots in _blocks(len(minus), weights):
        spectrum[..., roots] = _spectrum(Lambda, weights, dt, minus[roots], plus[roots])
    return spectrum


def _spectrum_gradient(wanted, upstream, inputs, kept) -> tuple[Tensor | None, ...]:
    return *_SPECTRUM_GRADIENTS(*upstream, *inputs), None, None


def _run_spectrum_gradients(
    d: Tensor, Lambda: Tensor, weights: Tensor, dt: Tensor, minus: Tensor, plus: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """By the chain rule, from K̂ to the four sums, to q and the weights, to Λ and Δ.

    Of a holomorphic function the gradient is multiplied by the conjugate of the derivative.
    """
    dLambda, dweights = torch.zeros_like(Lambda), torch.zeros_like(weights)
    ddt = torch.zeros_like(dt)
    for roots in _blocks(len(minus), weights):
        m, p = minus[roots] / dt[..., None, None], plus[roots]
        q = 1 / (m - p * Lambda[..., None])
        _, CP, PB, PP = (weights @ q).unbind(-2)
        r = p / (1 + p * PP)
        slopes = torch.stack([torch.ones_like(r), -r * PB, -r * CP, r * r * CP * PB], -2)
        dsums = d[..., None, roots] * slopes.conj_physical()
        dweights += dsums @ q.conj_physical().mT
        dq = weights.conj_physical().mT @ dsums
        # 1/q = m − p Λ, and m is inverse to Δ
        dinverse = -dq * (q * q).conj_physical()
        dLambda -= (dinverse * p.conj_physical()).sum(-1)
        ddt -= (dinverse * m.conj_physical()).real.sum((-1, -2)) / dt
    return dLambda, dweights, ddt


def _spectrum_gradients(d, Lambda, weights, dt, minus, plus) -> tuple[Tensor, ...]:
    wanted = True, True, True, False, False
    return tuple(vjp(_spectrum, wanted, (d,), (Lambda, weights, dt, minus, plus))[:3])


_SPECTRUM = register(
    "dplr_spectrum",
    "(Tensor Lambda, Tensor weights, Tensor dt, Tensor minus, Tensor plus) -> Tensor",
    run=_run_spectrum,
    like=lambda Lambda, weights, dt, minus, plus: weights.new_empty(*dt.shape, len(minus)),
    definition=_spectrum,
    gradient=_spectrum_gradient,
)
_SPECTRUM_GRADIENTS = register(
    "dplr_spectrum_backward",
    "(Tensor d, Tensor Lambda, Tensor weights, Tensor dt, Tensor minus, Tensor plus)"
    " -> (Tensor, Tensor, Tensor)",
    run=_run_spectrum_gradients,
    like=lambda d, *inputs: tuple(tensor.new_empty(tensor.shape) for tensor in inputs[:3]),
    definition=_spectrum_gradients,
)


def _blocks(roots: int, weights: Tensor) -> Iterator[slice]:
    """Cut the roots of unity into blocks of at most CAUCHY_BLOCK pairs of a root and a mode."""
    most = CAUCHY_BLOCK.get(weights.device.type, CAUCHY_BLOCK["cpu"])
    size = max(1, most // (weights.numel() // 4))
    return (slice(start, start + size) for start in range(0, roots, size))


# S4's C̃ as an operator: (Λ, P, C, Δ, length), of each pair of conjugate modes one.


def _half_truncated(Lambda: Tensor, P: Tensor, C: Tensor, dt: Tensor, length: int) -> Tensor:
    both = _truncate_dplr(*(_both(mode) for mode in (Lambda, P, C)), dt, length)
    return both[..., : C.shape[-1]]


def _run_half_truncated_gradients(
    d: Tensor, Lambda: Tensor, P: Tensor, C: Tensor, dt: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d = torch.cat([d, torch.zeros_like(d)], dim=-1)
    modes = (_both(mode) for mode in (Lambda, P, C))
    *found, ddt = _truncate_dplr_gradients(d, *modes, dt, length)
    return *(_folded(gradient) for gradient in found), ddt


_HALF_TRUNCATED = register(
    "dplr_truncate",
    "(Tensor Lambda, Tensor P, Tensor C, Tensor dt, SymInt length) -> Tensor",
    run=lambda *given: _half_truncated(*given).contiguous(),
    like=lambda Lambda, P, C, dt, length: C.new_empty(C.shape),
    definition=_half_truncated,
    gradient=lambda wanted, upstream, inputs, kept: (
        *_HALF_TRUNCATED_GRADIENTS(*upstream, *inputs),
        None,
    ),
)
_HALF_TRUNCATED_GRADIENTS = register(
    "dplr_truncate_backward",
    "(Tensor d, Tensor Lambda, Tensor P, Tensor C, Tensor dt, SymInt length)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    run=_run_half_truncated_gradients,
    like=lambda d, *inputs: tuple(tensor.new_empty(tensor.shape) for tensor in inputs[:4]),
    definition=lambda d, *inputs: tuple(
        vjp(_half_truncated, (True,) * 4 + (False,), (d,), inputs)[:4]
    ),
)


# S4's kernel as an operator: (Λ, P, B, C, Δ, length), of each pair of conjugate modes one. It
# returns K̄ and, for the gradient, C̃.


def _pairs_kernel(
    Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    Lambda, P, B, C = (_both(mode) for mode in (Lambda, P, B, C))
    C_truncated = _truncate_dplr(Lambda, P, C, dt, length)
    return _dplr_kernel(Lambda, P, B, C_truncated, dt, length), C_truncated


def _pairs_kernel_gradient(wanted, upstream, inputs, kept) -> tuple[Tensor | None, ...]:
    return *_PAIRS_KERNEL_GRADIENTS(upstream[0], *kept, *inputs), None


def _run_pairs_kernel_gradients(
    d: Tensor,
    C_truncated: Tensor,
    Lambda: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    dt: Tensor,
    length: int,
) -> tuple[Tensor, ...]:
    """By the chain rule, from K̄ to K̂, to its sums, to C̃, and from each mode to its pair."""
    Lambda, P, B, C = (_both(mode) for mode in (Lambda, P, B, C))
    terms = _cauchy_terms(Lambda, P, B, C_truncated, dt, length)
    spectrum = torch.fft.rfft(d) * (2 / length)
    spectrum[..., 0] /= 2  # the other roots stand for their conjugates, too,
    if length % 2 == 0:
        spectrum[..., -1] /= 2  # but for z = −1
    dLambda, dweights, ddt = _run_spectrum_gradients(spectrum, *terms)
    CB, CP, PB, PP = dweights.unbind(-2)
    row, output = P.conj_physical(), C_truncated.conj_physical()
    dB = CB * output + PB * P
    dP = CP * output + PB.conj_physical() * B + 2 * PP.real * P
    through = _truncate_dplr_gradients(CB * B.conj_physical() + CP * row, Lambda, P, C, dt, length)
    found = dLambda + through[0], dP + through[1], dB, through[2]
    return *(_folded(gradient) for gradient in found), ddt + through[3]


def _fusible_pairs_kernel(
    Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    C_truncated = _HALF_TRUNCATED(Lambda, P, C, dt, length)
    return _fusible.dplr_kernel(Lambda, P, B, C_truncated, dt, length), C_truncated


def _both(half: Tensor) -> Tensor:
    """Return the modes and their conjugates."""
    return torch.cat([half, half.conj_physical()], dim=-1)


def _folded(gradient: Tensor) -> Tensor:
    """Return the gradients of one mode of each pair, given those of both."""
    one, other = gradient.chunk(2, dim=-1)
    return one + other.conj_physical()


_PAIRS_KERNEL = register(
    "dplr_kernel",
    "(Tensor Lambda, Tensor P, Tensor B, Tensor C, Tensor dt, SymInt length) -> (Tensor, Tensor)",
    run=_pairs_kernel,
    like=lambda Lambda, P, B, C, dt, length: (
        dt.new_empty(*dt.shape, length),
        C.new_empty(*C.shape[:-1], 2 * C.shape[-1]),
    ),
    definition=_pairs_kernel,
    gradient=_pairs_kernel_gradient,
    kept=(1,),
    hidden=1,
    fusible=_fusible_pairs_kernel,
)
_PAIRS_KERNEL_GRADIENTS = register(
    "dplr_kernel_backward",
    "(Tensor d, Tensor C_truncated, Tensor Lambda, Tensor P, Tensor B, Tensor C, Tensor dt,"
    " SymInt length) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=_run_pairs_kernel_gradients,
    like=lambda d, C_truncated, *inputs: tuple(
        tensor.new_empty(tensor.shape) for tensor in inputs[:5]
    ),
    definition=lambda d, C_truncated, *inputs: tuple(
        vjp(_pairs_kernel, (True,) * 5 + (False,), (d, None), inputs)[:5]
    ),
)


# The matrices of a recurrence, by the state that it has reached; see `_Layer.step`.
_RECURRENCES = WeakTensorKeyDictionary()


class _Layer(nn.Module):
    """Norm, `d_model` state space models, GELU, a gated mixing of the channels, and a residual.

    y = x + GLU(W · GELU(SSM(norm(x)))). A subclass gives the convolution kernels, the matrices of
    the recurrence, and a step with them. Kernels and states are float32, or float64 if the
    parameters are. The parameters of the state space model are to be trained without weight decay:
    it would pull at time scales and frequencies.

    Raises:
        TypeError, ValueError: a size is not positive, or not 0 < dt_min ≤ dt_max.
    """

    no_weight_decay = frozenset({"log_dt", "log_A_real", "A_imag", "P", "B"})

    def __init__(self, d_model: int, modes: int, dt_min: float, dt_max: float):
        d_model = check_length(d_model, name="d_model")
        check_range(dt_min, dt_max)
        check_room("d_model", d_model, d_model**2)
        check_room("d_state", modes, modes * d_model)
        super().__init__()
        self.modes_kept = modes
        self.norm = nn.LayerNorm(d_model)
        self.mix = nn.Linear(d_model, 2 * d_model)
        self.D = nn.Parameter(torch.randn(d_model))
        log_dt = torch.rand(d_model) * math.log(dt_max / dt_min) + math.log(dt_min)
        self.log_dt = nn.Parameter(log_dt)

    @property
    def dt(self) -> Float[Tensor, " d_model"]:
        """The step of each channel, exp(log_dt); positive whatever is learned."""
        return _wide(self.log_dt).exp()

    def forward(
        self, x: Float[Tensor, "batch length d_model"]
    ) -> Float[Tensor, "batch length d_model"]:
        """Run over a whole sequence by convolution.

        Raises:
            TypeError: x is no floating tensor.
            ValueError: x is not (batch, length, d_model), or empty.
        """
        self._check_input(x, "batch length d_model")
        if x.shape[1] == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected a length of at least 1")
        z = self.norm(x)
        y = fft_convolution(z, self.kernel(x.shape[1]).mT) + self.D * z
        return self._mixed(x, y)

    def initial_state(self, batch: int) -> Complex[Tensor, "batch d_model n"]:
        """Return the state before the first token."""
        batch = check_length(batch, name="batch", least=0)
        shape = batch, len(self.D), self.modes_kept
        check_memory("batch", batch, 2 * math.prod(shape))
        dtype = wide(self.log_dt.dtype).to_complex()
        return torch.zeros(shape, dtype=dtype, device=self.log_dt.device)

    def step(
        self, x: Float[Tensor, "batch d_model"], state: Complex[Tensor, "batch d_model n"]
    ) -> tuple[Float[Tensor, "batch d_model"], Complex[Tensor, "batch d_model n"]]:
        """Read one token by recurrence; return its output and the new state.

        The matrices of the recurrence are made at the first step from a state and kept for the
        states that follow from it, while the parameters are what they were. Where the parameters
        learn, every step makes them anew: a gradient goes through them.

        Raises:
            TypeError: x is no floating tensor, or the state no complex one.
            ValueError: a shape does not fit, or the state lies on another device.
        """
        self._check_input(x, "batch d_model")
        check_is_tensor("state", state)
        if not state.is_complex():
            raise TypeError(f"state has dtype {state.dtype}, expected a complex one")
        sizes = {"batch": len(x), "d_model": len(self.D), "n": self.modes_kept}
        check_shape("state", state, "batch d_model n", **sizes)
        if state.device != x.device:
            raise ValueError(f"state is on device {state.device}, expected {x.device}, that of x")
        z = self.norm(x)
        own = [p for name, p in self.named_parameters(recurse=False) if name != "D"]
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in own)
        if learning or not can_look_at(x):
            state, y = self._advance(_wide(z), state, *self.recurrence())
        else:
            values, recurrence = self._kept_recurrence(own, state)
            state, y = self._advance(_wide(z), state, *recurrence)
            _RECURRENCES[state] = self, values, recurrence
        return self._mixed(x, y.to(z.dtype) + self.D * z), state

    def _kept_recurrence(self, own: list[Tensor], state: Tensor) -> tuple[list[Tensor], tuple]:
        """Return the matrices that led to the state, or new ones; and the parameters' numbers.

        By their numbers, for not everything that writes to a parameter can be noticed otherwise.
        """
        layer, values, recurrence = _RECURRENCES.get(state, (None, [], ()))
        same = layer is self and all(p.dtype == v.dtype for p, v in zip(own, values, strict=True))
        if same and all(map(torch.equal, own, values)):
            return values, recurrence
        return [p.detach().clone() for p in own], self.recurrence()

    def _check_input(self, x: Tensor, axes: str) -> None:
        check_input("x", x, self.norm)
        check_shape("x", x, axes, d_model=len(self.D))

    def _mixed(self, x: Tensor, y: Tensor) -> Tensor:
        return x + F.glu(self.mix(F.gelu(y)))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(wide(tensor.dtype))


def _complex(pairs: Tensor) -> Tensor:
    """Make complex numbers of pairs (…, 2), of float32 at least."""
    return torch.view_as_complex(_wide(pairs))


def _eigenvalues(log_A_real: Tensor, A_imag: Tensor) -> Tensor:
    return torch.complex(-_wide(log_A_real).exp(), _wide(A_imag))


class S4D(_Layer):
    """The S4 layer with a diagonal A, for sequences (batch, length, d_model).

    Each channel has d_state/2 complex modes, which stand for d_state with their conjugates:
    A = −exp(log_A_real) + i A_imag, B = 1 (one complex C per mode is free enough), and K̄ by
    `diagonal_kernel` after a zero-order hold. From Gu et al. (2022b) and `s4d.py` of the released
    S4 code.

    Args:
        d_model: the number of channels.
        d_state: the size of each channel's state, even.
        init: a name for `diagonal_init`, or d_state/2 eigenvalues with negative real parts.
        dt_min: the smallest initial step; the steps start log-uniform.
        dt_max: the largest initial step.

    Raises:
        TypeError, ValueError: a size is not positive, d_state is odd, there is no such init, or an
            eigenvalue is not stable.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int,
        init: DiagonalInit | Complex[Tensor, " half"] = "legs",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ):
        d_state = _check_pairs("d_state", d_state)
        super().__init__(d_model, d_state // 2, dt_min, dt_max)
        d_model = len(self.D)
        if not isinstance(init, Tensor):
            check_choice("init", init, INITS)
        A = init if isinstance(init, Tensor) else diagonal_init(d_state, init)
        _check_complex(init=A)
        if A.is_meta and not self.D.is_meta:
            raise ValueError("init is on device meta, expected one that has numbers")
        check_shape("init", A, "half", half=d_state // 2)
        if can_look_at(A) and (A.real >= 0).any():
            raise ValueError(f"init has a real part of {A.real.max():g}, expected all negative")
        A = A.expand(d_model, -1)
        self.log_A_real = nn.Parameter(torch.log(-A.real).contiguous().to(self.D))
        self.A_imag = nn.Parameter(A.imag.contiguous().to(self.D))
        self.C = nn.Parameter(torch.randn(d_model, d_state // 2, 2) * 0.5**0.5)

    def discrete(self) -> tuple[Complex[Tensor, "d_model half"], Complex[Tensor, "d_model half"]]:
        """Return Ā and B̄ of all channels."""
        A = _eigenvalues(self.log_A_real, self.A_imag)
        return diagonal_zoh(A, torch.ones_like(A), self.dt)

    def kernel(self, length: int) -> Float[Tensor, "d_model length"]:
        """Return the convolution kernel of each channel."""
        length = _kernel_length(length, self.A_imag.numel())
        A = _eigenvalues(self.log_A_real, self.A_imag)
        return _ZOH_KERNEL(A, _complex(self.C), self.dt, length)

    def recurrence(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return Ā, B̄ and C of all channels, (d_model, half) each."""
        return *self.discrete(), _complex(self.C)

    def _advance(
        self, z: Tensor, state: Tensor, A_bar: Tensor, B_bar: Tensor, C: Tensor
    ) -> tuple[Tensor, Tensor]:
        state = A_bar * state + B_bar * z[..., None]
        return state, 2 * (C * state).sum(-1).real


class S4(_Layer):
    """The S4 layer with A diagonal plus low rank, for sequences (batch, length, d_model).

    Starts from LegS in the basis of `mamba_tutorial.hippo.dplr` and learns, in each channel, Λ, P,
    B, C and Δ, of conjugate modes together: A = diag(Λ) − P P*, with the real part of Λ negative as
    −exp(·). K̄ by `dplr_kernel` after the bilinear rule. From Gu et al. (2022a); differences: C is
    learned instead of C̃ (see `truncate`), and the rank is one.

    Args:
        d_model: the number of channels.
        d_state: the size of each channel's state, even.
        dt_min: the smallest initial step; the steps start log-uniform.
        dt_max: the largest initial step.

    Raises:
        TypeError, ValueError: a size is not positive, or d_state is odd.
    """

    def __init__(self, d_model: int, d_state: int, dt_min: float = 1e-3, dt_max: float = 1e-1):
        d_state = _check_pairs("d_state", d_state)
        check_memory("d_state", d_state, d_state**2)
        super().__init__(d_model, d_state, dt_min, dt_max)
        d_model, start, half = len(self.D), dplr(d_state), d_state // 2

        def learned(values: Tensor) -> nn.Parameter:
            one_of_each_pair = torch.view_as_real(values[:half].expand(d_model, -1).clone())
            return nn.Parameter(one_of_each_pair.to(self.D))

        self.log_A_real = nn.Parameter(torch.full((d_model, half), math.log(0.5)))
        imaginary = start.Lambda.imag[:half].expand(d_model, -1).clone()
        self.A_imag = nn.Parameter(imaginary.to(self.D))
        self.P, self.B = learned(start.P), learned(start.B)
        self.C = nn.Parameter(torch.randn(d_model, half, 2) * 0.5**0.5)

    def pairs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return Λ, P, B and C of all channels, (d_model, d_state/2) each, one of every pair."""
        Lambda = _eigenvalues(self.log_A_real, self.A_imag)
        return Lambda, *(_complex(mode) for mode in (self.P, self.B, self.C))

    def modes(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return Λ, P, B and C of all channels, (d_model, d_state) each, both of every pair."""
        return tuple(_both(mode) for mode in self.pairs())

    def discrete(self) -> tuple[Complex[Tensor, "d_model n n"], Complex[Tensor, "d_model n 1"]]:
        """Return the dense Ā and B̄ of all channels, in double precision."""
        Lambda, P, B, _ = (precise(mode) for mode in self.modes())
        A_bar, half = _bilinear_matrix(Lambda, P, self.dt), precise(self.dt)[..., None] / 2
        # B̄ = (I − Δ/2 A)⁻¹ Δ B, and that inverse is (Ā + I)/2
        return A_bar, ((A_bar @ B[..., None]).squeeze(-1) + B)[..., None] * half[..., None]

    def kernel(self, length: int) -> Float[Tensor, "d_model length"]:
        """Return the convolution kernel of each channel."""
        length = _kernel_length(length, len(self.D))
        return _PAIRS_KERNEL(*self.pairs(), self.dt, length)[0]

    def recurrence(self) -> tuple[Tensor, ...]:
        """Return what a step needs, (d_model, n) each: see `_bilinear_dplr`; Δ/2 B; C."""
        Lambda, P, B, C = self.modes()
        return *_bilinear_dplr(Lambda, P, self.dt), self.dt[..., None] / 2 * B, C

    def _advance(
        self, z: Tensor, state: Tensor, d: Tensor, column: Tensor, row: Tensor, B: Tensor, C: Tensor
    ) -> tuple[Tensor, Tensor]:
        v = state + B * z[..., None]
        state = 2 * (d * v - column * (row * v).sum(-1, keepdim=True)) - state
        return state, (C * state).sum(-1).real


def _bilinear_dplr(Lambda: Tensor, P: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the inverse in the bilinear rule of A = diag(Λ) − P P*: 3n numbers, no matrix.

    The rule says h ← R ((I + Δ/2 A) h + Δ B x) with R = (I − Δ/2 A)⁻¹. As I + Δ/2 A = 2 I − R⁻¹,

        h ← 2 R (h + Δ/2 B x) − h

    and with the diagonal d = (1 − Δ/2 Λ)⁻¹ the Woodbury identity inverts

        R = diag(d) − u r,    u = d P · Δ/2 / (1 + Δ/2 P* d P),    r = P* d

    From Gu et al. (2022a), Appendix C.2, which has the same in two products with low-rank matrices.

    Returns:
        d, the column u and the row r, (…, n) each.
    """
    half = dt[..., None] / 2
    d = 1 / (1 - half * Lambda)
    column, row = d * P, P.conj_physical() * d
    return d, column * (half / (1 + half * (row * P).sum(-1, keepdim=True))), row


class SequenceModel(nn.Module):
    """An encoder, a stack of layers, and a decoder.

    Args:
        encoder: maps inputs to (batch, length, d_model): `nn.Linear` for numbers, `nn.Embedding`
            for tokens.
        layers: each maps (batch, length, d_model) to the same shape.
        decoder: maps (…, d_model) to the outputs.
        pool: average over the sequence before the decoder, for one output per sequence.
    """

    def __init__(self, encoder: nn.Module, layers: list[nn.Module], decoder: nn.Module, pool: bool):
        super().__init__()
        self.encoder = encoder
        self.layers = nn.Sequential(*layers)
        self.decoder = decoder
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, outputs) if pooled, else (batch, length, outputs)."""
        h = self.layers(self.encoder(x))
        return self.decoder(h.mean(dim=1) if self.pool else h)
