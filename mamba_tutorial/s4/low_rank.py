"""S4's kernel: from its generating function, since A is diagonal plus low rank (Gu et al. 2022a).

At the roots of unity the Woodbury identity makes four Cauchy sums of it, and an FFT the kernel.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from mamba_tutorial import _fusible
from mamba_tutorial._check import can_look_at, check_shape, check_step, precise
from mamba_tutorial.ops import register, vjp
from mamba_tutorial.s4._checks import check_batches, check_complex, kernel_length

# Numbers that a block of the Cauchy sum may hold at a time: enough to be quick, little to store. A
# CPU wants them in its cache, a GPU few launches.
CAUCHY_BLOCK = {"cpu": 1 << 18, "cuda": 1 << 23}


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
    check_complex(Lambda=Lambda, P=P, B=B, C_truncated=C_truncated)
    given = {"Lambda": Lambda, "P": P, "B": B, "C_truncated": C_truncated}
    check_shape("Lambda", Lambda, "... n")
    for name, tensor in given.items():
        check_shape(name, tensor, "... n", n=Lambda.shape[-1])
    dt = check_step(dt, like=Lambda)
    batches = {name: tensor.shape[:-1] for name, tensor in given.items()}
    channels = check_batches(dt=dt.shape, **batches)
    length = kernel_length(length, math.prod(channels))
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
    check_complex(C=C, A_bar=A_bar)
    check_shape("C", C, "... n")
    check_shape("A_bar", A_bar, "... n n", n=C.shape[-1])
    channels = check_batches(C=C.shape[:-1], A_bar=A_bar.shape[:-2])
    return _truncate(C, A_bar, kernel_length(length, math.prod(channels)))


def _truncate(C: Tensor, A_bar: Tensor, length: int) -> Tensor:
    return C - (C.unsqueeze(-2) @ torch.linalg.matrix_power(A_bar, length)).squeeze(-2)


def bilinear_matrix(Lambda: Tensor, P: Tensor, dt: Tensor) -> Tensor:
    """Return the dense Ā = 2 (I − Δ/2 A)⁻¹ − I, in double precision; see `bilinear_dplr`."""
    Lambda, P, dt = precise(Lambda), precise(P), precise(dt)
    d, column, row = bilinear_dplr(Lambda, P, dt)
    return torch.diag_embed(2 * d - 1) - 2 * column[..., None] * row[..., None, :]


def _truncate_dplr(Lambda: Tensor, P: Tensor, C: Tensor, dt: Tensor, length: int) -> Tensor:
    """Return C̃; in double precision inside, for Ā^length has the rounding of Ā length-fold."""
    A_bar = bilinear_matrix(Lambda, P, dt)
    return _truncate(C.to(A_bar), A_bar, length).to(C)


def _truncate_dplr_gradients(
    d: Tensor, Lambda: Tensor, P: Tensor, C: Tensor, dt: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By the chain rule, from C̃ to Ā^length, through its squarings to Ā, to Δ/2 A, to Λ, P and Δ.

    With R = (I − M)⁻¹ = (Ā + I)/2 and M = Δ/2 A, dĀ = 2 dR = 2 R dM R.
    """
    A_bar = bilinear_matrix(Lambda, P, dt)
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
    C_truncated = _truncate_dplr(*(both_of(mode) for mode in (Lambda, P, C)), dt, length)
    return C_truncated[..., : C.shape[-1]]


def _run_half_truncated_gradients(
    d: Tensor, Lambda: Tensor, P: Tensor, C: Tensor, dt: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d = torch.cat([d, torch.zeros_like(d)], dim=-1)
    modes = (both_of(mode) for mode in (Lambda, P, C))
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
    Lambda, P, B, C = (both_of(mode) for mode in (Lambda, P, B, C))
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
    Lambda, P, B, C = (both_of(mode) for mode in (Lambda, P, B, C))
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


def both_of(half: Tensor) -> Tensor:
    """Return the modes and their conjugates."""
    return torch.cat([half, half.conj_physical()], dim=-1)


def _folded(gradient: Tensor) -> Tensor:
    """Return the gradients of one mode of each pair, given those of both."""
    one, other = gradient.chunk(2, dim=-1)
    return one + other.conj_physical()


PAIRS_KERNEL = register(
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


def bilinear_dplr(Lambda: Tensor, P: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
