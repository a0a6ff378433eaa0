"""The selective scan on a GPU, fused: forward and backward.

    h_t = exp(Δ_t A) h_{t−1} + w(Δ_t A) Δ_t x_t B_t,     y_t = (Σ_n C_t h_t + D x_t) silu(z_t)

with Δ = softplus(dt + bias), as `mamba_tutorial.selective.selective_scan` defines it. The states of
size (batch, length, d_inner, d_state) never leave the chip.

- `forward_in_triton`, `backward_in_triton`: for all sizes and rules.
- `forward_in_gluon`, `backward_in_gluon`: for up to 128 states, B by Euler's rule, and Ampere or
  later (`_takes`).
- `cutting`: into how many chunks the length is cut.
- `around`: what is needed before and after. A short sequence is over as soon as kernels are
  started; so float32 copies of B and C, A turned, and zeros, take one kernel, and all sums another.

**Few sequences** give few warps. Then the length is cut into chunks. `ends` finds what each chunk
but the last adds to the state, and how long it is in units of Δ; the decay over a chunk is
exp(A ΣΔ), so nothing else has to be kept. Each program of the forward pass joins what the chunks
before it give, which is the scan once more, over chunks. This costs nearly every exponential twice.
`ends` is in both languages as well; forwards, for long chunks, the one that is sooner done is taken
(`cutting.of_ends`). What a whole sequence gives, to others than the chunks of one kernel, `end`
says.

**Sequences in a row.** Where one begins, the decay is zero, in both directions. So a number that
makes 2^… zero is added to the exponent (`_gates.mark`), in the same instruction that multiplies Δ
and A. ΣΔ gets it too, which says over a chunk that nothing goes through.

**Backward.** The forward pass writes down some of the states, and the backward pass computes the
others once more. Sums over channels, for B and C, are written per program and added up afterwards,
so that two runs give the same bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_tutorial.kernels._gluon import aligned
from mamba_tutorial.kernels._launch import generation, multiprocessors, on
from mamba_tutorial.kernels._triton import triton
from mamba_tutorial.kernels.selective_scan import (
    around,
    backward_in_gluon,
    backward_in_triton,
    cutting,
    forward_in_gluon,
    forward_in_triton,
)
from mamba_tutorial.kernels.selective_scan.cutting import Kernel

LANES = 32
BACKWARD_D = 8  # channels of a program of `backward`
# tokens between two states that are kept; half as many where the length is SHORT at most and the
# backward pass has few programs for each chunk, one for FEW multiprocessors or more
SECTION = 64
SHORT, FEW = 64 * SECTION, 8
STATES = 16  # of a program of `ends` in Triton, at most


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    begins: Tensor | None,
    dt_softplus: bool,
    exact: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the last state, and some of the states, if the backward pass will ask for them.

    x, dt, z: (batch, length, d_inner), of float16, bfloat16 or float32; A: (d_inner, d_state);
    B, C: (batch, length, d_state); D, dt_bias: (d_inner,); h0: (batch, d_inner, d_state); begins:
    (batch, length), true where a new sequence begins. `exact` asks for the zero-order hold of B.
    The state is float32.
    """
    d_state, staged = A.shape[1], _takes(x, A.shape[1], exact)
    if staged and d_state != (padded := kept_states(x, d_state, exact)):
        A, B, C, h0 = (_padded(tensor, padded) for tensor in (A, B, C, h0))
        given = x, dt, A, B, C, D, z, dt_bias, h0, begins, dt_softplus, exact, keep
        y, h_last, starts = forward(*given)
        return y, h_last.mT[:, :d_state].contiguous().mT, starts
    x, dt, z = (_rows(tensor, staged) for tensor in (x, dt, z))
    B, C = _rows(B, False), _rows(C, False)
    D, dt_bias, h0 = _float(D), _float(dt_bias), _transposed(_float(h0))
    (A, B, C), begins = _prepared(A, B, C), _words(begins)
    every = spacing(x, d_state, exact) if keep else None
    return _run(x, dt, A, B, C, D, z, dt_bias, h0, begins, dt_softplus, exact, every)


def spacing(x: Tensor, d_state: int, exact: bool) -> int:
    """Return of how many tokens the backward pass needs one state.

    Sizes may be symbols, which can be compared: so this does not depend on the length of a chunk.
    """
    if not _takes(x, d_state, exact):
        return _tile(d_state)
    rows = _backward_kernel(x, kept_states(x, d_state, exact)).programs
    few = FEW * rows <= multiprocessors(x)
    return SECTION // 2 if few and x.shape[1] <= SHORT else SECTION


def kept_states(x: Tensor, d_state: int, exact: bool) -> int:
    """Return the states of a channel as the kernels have them: in Gluon a power of two."""
    return max(4, triton.next_power_of_2(d_state)) if _takes(x, d_state, exact) else d_state


def backward(
    dy: Tensor | None,
    dh_last: Tensor | None,
    starts: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    begins: Tensor | None,
    dt_softplus: bool,
    exact: bool,
) -> tuple[Tensor, ...]:
    """Return the gradients, given those of y and of the last state.

    Of x, of dt and of z, which is empty where there is no z; of B and C, one above the other; of A,
    D and dt_bias, (d_state + 2, d_inner); and of h0.
    """
    dtype = B.dtype if B.dtype == C.dtype else torch.float32
    n, staged = A.shape[1], _takes(x, A.shape[1], exact)
    if staged and n != (padded := kept_states(x, n, exact)):
        A, B, C, dh_last = (_padded(tensor, padded) for tensor in (A, B, C, dh_last))
        given = dy, dh_last, starts, x, dt, A, B, C, D, z, dt_bias, begins, dt_softplus, exact
        *of_tokens, shared, own, dh0 = backward(*given)
        own = torch.cat([own[:n], own[padded:]])
        return *of_tokens, shared[..., :n].contiguous(), own, dh0.mT[:, :n].contiguous().mT
    x, dt, z = (_rows(tensor, staged) for tensor in (x, dt, z))
    B, C = _rows(B, False), _rows(C, False)
    D, dt_bias, dh_last = _float(D), _float(dt_bias), _transposed(_float(dh_last))
    dy = torch.zeros_like(x) if dy is None else _rows(dy, staged)
    run = _run_gluon_backward if staged else _run_backward
    given = x, dt, A, B, C, D, z, dt_bias, begins, starts, dy, dh_last
    dx, ddt, dz, shared, own, dh0 = run(*given, dt_softplus, exact)
    shared, own = _sums(shared, own, dtype)
    return dx, ddt, x.new_empty(0) if z is None else dz, shared, own, dh0.mT


def end(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    V: Tensor,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    exact: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return what the tokens give to what is after them, in the direction of the pass, and ΣΔ.

    Forwards, of u = x and V = B, the last state, begun at zero: (batch, d_inner, d_state). In
    reverse, of the gradient u = dy and V = C, what it adds to that of h0. ΣΔ: (batch, d_inner).
    """
    batch, length, d_inner = u.shape
    u, dt, z = (_rows(tensor, False) for tensor in (u, dt, z))
    A, V, dt_bias = _transposed(_float(A)), _float(V), _float(dt_bias)
    chunk = _forward_chunk(u, dt, z, len(A), in_gluon=False, step=cutting.TILE)
    sizes, chunks = (length, chunk, d_inner, len(A)), triton.cdiv(length, chunk)
    ends, spans = A.new_empty(batch, chunks, *A.shape), A.new_empty(batch, chunks, d_inner)
    with on(u):
        given = u, dt, A, V, z, dt_bias, None, ends, spans, chunks, chunk
        _run_triton_ends(*given, sizes, 1, dt_softplus, exact, reverse)
    after = spans.flip(1).cumsum(1).flip(1) - spans  # ΣΔ over the chunks that follow
    # the decay of an unstable model may overflow where the state is zero
    decay = torch.exp(after[:, :, None] * A).clamp(max=torch.finfo(A.dtype).max)
    return (decay * ends).sum(1).mT, spans.sum(1)


def _words(begins: Tensor | None) -> Tensor | None:
    """Return it in words of four bytes, rows being filled up to whole 16 tokens.

    So 16 bytes can be copied at a time.
    """
    if begins is None:
        return None
    length = begins.shape[1]
    begins = begins.contiguous()
    if length % 16 or begins.data_ptr() % 16:
        begins = F.pad(begins, (0, -length % 16))
    return begins.view(torch.int32)


def _prepared(A, B, C, zeros=None):
    """Return A turned, (d_state, d_inner), B and C, in float32 and without gaps.

    One kernel makes them. It also fills `zeros`, if given.
    """
    (d_inner, d_state), (batch, length, _) = A.shape, B.shape
    A, turned = A.contiguous(), A.new_empty(d_state, d_inner, dtype=torch.float32)
    shared = turned.new_empty(2, batch, length, d_state)
    ROWS, ZEROS, count = 128, 4096, 0 if zeros is None else zeros.numel()
    programs = triton.cdiv(batch * length, ROWS) + triton.cdiv(d_inner, ROWS)
    programs += triton.cdiv(count, ZEROS)
    with on(A):
        around.prepare[(programs,)](
            *(A, B, C, turned, *shared, zeros),
            *(batch * length, length, d_inner, d_state, count), *_strides(B), *_strides(C),
            ROWS=ROWS, BLOCK_N=triton.next_power_of_2(d_state), ZEROS=ZEROS, num_warps=4,
        )  # fmt: skip
    return turned, *shared


def _sums(shared: Tensor, own: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return shared.sum(0), of this dtype, and own.sum(0), the parts added in their order."""
    first, second = (
        parts.new_empty(parts.shape[1:], dtype=t)
        for parts, t in ((shared, dtype), (own, torch.float32))
    )
    BLOCK = 512
    grid = (triton.cdiv(first.numel(), BLOCK) + triton.cdiv(second.numel(), BLOCK),)
    with on(shared):
        around.add_up[grid](
            *(shared, own, first, second, len(shared), len(own), first.numel(), second.numel()),
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return first, second


def _run(x, dt, A, B, C, D, z, dt_bias, h0, begins, dt_softplus, exact, every):
    """Forward; return y, the last state, and the state before every `every` tokens, if asked."""
    batch, length, d_inner = x.shape
    d_state, in_gluon = A.shape[0], _takes(x, A.shape[0], exact)
    chunk = _forward_chunk(x, dt, z, d_state, in_gluon, step=max(every or 0, cutting.TILE))
    chunks = triton.cdiv(length, chunk)
    sizes = length, chunk, d_inner, d_state
    config = _config(d_state, dt_softplus, exact)
    y, h_last = x.new_empty(x.shape), A.new_empty(batch, d_state, d_inner)
    starts = A.new_empty(batch, triton.cdiv(length, every), d_state, d_inner) if every else None
    ends = spans = None
    with on(x):
        if chunks > 1:
            given = x, dt, A, B, None, dt_bias, begins
            ends, spans = _run_ends(*given, sizes, dt_softplus, exact, reverse=False)
        given = x, dt, A, B, C, D, z, dt_bias, h0, begins, ends, spans, y, starts, h_last
        how = {"HALVES": ends.shape[2] if chunks > 1 else 0, "EVERY": every or 1}
        rows = batch * triton.cdiv(d_inner, LANES)
        grid = (rows * chunks,)
        if in_gluon:
            forms = _forward_kernel(rows, d_state)
            form = cutting.soonest(forms, chunks, multiprocessors(x))
            forward_in_gluon.forward[grid](
                *given, length, chunk, d_inner,
                *_pieces(x), *_pieces(dt), *_pieces(z),
                SOFTPLUS=dt_softplus, WHOLE=d_inner % LANES == 0, **how,
                **forward_in_gluon.config(d_state) | {"num_warps": form.warps},
            )  # fmt: skip
        else:
            strides = *_strides(x), *_strides(dt), *_strides(z)
            forward_in_triton.forward[grid](*given, *sizes, *strides, **how, **config)
    return y, h_last.mT, starts


def _run_ends(u, dt, A, V, z, dt_bias, begins, sizes, dt_softplus, exact, reverse):
    """What every chunk but one gives to the chunks after it, in the direction of the pass.

    (batch, chunks − 1, 1 or 2, …): of the whole chunk, or of its head and of its tail.
    """
    batch, (length, chunk, d_inner, d_state) = len(u), sizes
    chunks = triton.cdiv(length, chunk)
    halves, share = _share(chunks, chunk)
    ends = A.new_empty(batch, chunks - 1, halves, d_state, d_inner)
    spans = A.new_empty(batch, chunks - 1, halves, d_inner)
    given = u, dt, A, V, z, dt_bias, begins, ends, spans
    rows, in_gluon = batch * triton.cdiv(d_inner, LANES), _takes(u, d_state, exact)
    if in_gluon:
        kinds = _gluon_ends(rows, d_state, reverse)
        soonest = cutting.of_ends(kinds, chunk, chunks, multiprocessors(u))
        # the weights are those without borders, which cost the one in Triton more
        in_gluon = begins is not None or soonest is kinds[0]
    if in_gluon:
        constants = forward_in_gluon.ends_config(d_state)
        forward_in_gluon.ends[rows * chunks, d_state // constants["N"]](
            *given, share, length, chunk, d_inner, *_pieces(u), *_pieces(dt), *_pieces(z),
            HALVES=halves, SOFTPLUS=dt_softplus, WHOLE=d_inner % LANES == 0, REVERSE=reverse,
            **constants,
        )  # fmt: skip
    else:
        how = chunks - 1, share, sizes, halves, dt_softplus, exact, reverse
        _run_triton_ends(*given, *how)
    return ends, spans


def _run_triton_ends(
    u, dt, A, V, z, dt_bias, begins, ends, spans, kept, share, sizes, halves, dt_softplus, exact,
    reverse,
):  # fmt: skip
    """Write what the first or, in reverse, the last `kept` chunks give to those after them."""
    batch, (length, chunk, d_inner, d_state) = len(u), sizes
    programs = batch * triton.cdiv(length, chunk) * triton.cdiv(d_inner, LANES)
    forward_in_triton.ends[programs, triton.cdiv(d_state, STATES)](
        u, dt, A, V, z, dt_bias, begins, ends, spans, kept, share, *sizes,
        *_strides(u), *_strides(dt), *_strides(z),
        HALVES=halves, REVERSE=reverse, **_config(min(d_state, STATES), dt_softplus, exact),
    )  # fmt: skip


def _share(chunks: int, chunk: int) -> tuple[int, int]:
    """Return in how many parts `ends` does a chunk, and how many tokens a program takes.

    Two parts give all programs the same share, 1/chunks less than a chunk, and every chunk one more
    part to join, which takes as long as a few tokens.
    """
    if chunks * chunks < chunk // 2:
        return 2, triton.cdiv((chunks - 1) * chunk, 16 * chunks) * 16
    return 1, chunk


def _run_backward(x, dt, A, B, C, D, z, dt_bias, begins, starts, dy, dh_last, dt_softplus, exact):
    batch, length, d_inner = x.shape
    d_state, blocks = A.shape[1], triton.cdiv(d_inner, BACKWARD_D)
    results = _results(x, dt, z, d_state, slots=batch, blocks=blocks)
    (A, B, C), begins = _prepared(A, B, C), _words(begins)
    strides = *_strides(x), *_strides(dt), *_strides(z), *_strides(dy)
    given = x, dt, A, B, C, D, z, dt_bias, begins, starts, dy, dh_last
    config = _config(d_state, dt_softplus, exact) | {"BLOCK_D": BACKWARD_D}
    with on(x):
        backward_in_triton.backward[(batch * blocks,)](
            *given, *results, length, d_inner, d_state, *strides, **config
        )
    return results


def _run_gluon_backward(
    x, dt, A, B, C, D, z, dt_bias, begins, starts, dy, dh_last, dt_softplus, exact
):
    batch, length, d_inner = x.shape
    d_state, constants = A.shape[1], backward_in_gluon.config(A.shape[1])
    channels = 2 * constants["L"]
    groups, chunk = triton.cdiv(d_inner, channels), _backward_chunk(dy, dt, z, d_state)
    chunks = triton.cdiv(length, chunk)
    # two groups of channels share a part of the sums for B and C, which they add to
    results = _results(x, dt, z, d_state, slots=batch * chunks, blocks=triton.cdiv(groups, 2))
    (A, B, C), begins = _prepared(A, B, C, zeros=results[3]), _words(begins)
    ends = spans = None
    with on(x):
        if chunks > 1:
            sizes = length, chunk, d_inner, d_state
            given = dy, dt, A, C, z, dt_bias, begins
            ends, spans = _run_ends(*given, sizes, dt_softplus, exact, reverse=True)
        given = x, dt, A, B, C, D, z, dt_bias, begins, starts, dy, dh_last, ends, spans
        strides = *_pieces(x), *_pieces(dt), *_pieces(z), *_pieces(dy)
        backward_in_gluon.backward[(batch * chunks * groups,)](
            *given, *results, length, chunk, d_inner, *strides,
            HALVES=ends.shape[2] if chunks > 1 else 0, SOFTPLUS=dt_softplus,
            WHOLE=d_inner % channels == 0, SECTION=spacing(x, d_state, exact), **constants,
        )  # fmt: skip
    return results


def _results(x, dt, z, d_state, slots, blocks):
    """Return room for the gradients.

    Those of x, dt and z; of B and C, one above the other, one part for each block of channels; of
    A, D and dt_bias likewise, one part for each slot; and of h0.
    """
    batch, length, d_inner = x.shape
    dx, ddt, dz = (None if tensor is None else tensor.new_empty(x.shape) for tensor in (x, dt, z))
    parts = (blocks, 2, batch, length, d_state), (slots, d_state + 2, d_inner)
    shapes = (*parts, (batch, d_state, d_inner))
    return dx, ddt, dz, *(x.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _tile(d_state: int) -> int:
    """Return how many tokens make up a tile: 128 numbers for each thread, where possible."""
    return min(16, max(1, 128 // max(4, triton.next_power_of_2(d_state))))


def _config(d_state: int, dt_softplus: bool, exact: bool) -> dict:
    """Return the constants that the kernels share."""
    return {
        "TILE": _tile(d_state),
        "BLOCK_N": max(4, triton.next_power_of_2(d_state)),
        "BLOCK_D": LANES,
        "SOFTPLUS": dt_softplus,
        "EXACT": exact,
        "num_warps": 1,
    }


def _takes(x: Tensor, d_state: int, exact: bool) -> bool:
    """Say whether the kernels in Gluon, which have limits, can do this."""
    return d_state <= 128 and not exact and generation(x) >= (8, 0)


def _forward_chunk(
    x: Tensor, dt: Tensor, z: Tensor | None, d_state: int, in_gluon: bool, step: int
) -> int:
    """Return the tokens of a chunk of the forward pass, a multiple of `step`.

    Also of `end`, as if a forward pass followed.
    """
    batch, length, d_inner = x.shape
    rows = batch * triton.cdiv(d_inner, LANES)
    kernel, ends = (Kernel(rows, 1, 4),), (_triton_ends(rows, d_state),)
    if in_gluon:
        kernel, ends = _forward_kernel(rows, d_state), _gluon_ends(rows, d_state, reverse=False)
    chunk = cutting.chunk_length(length, step, kernel, ends, multiprocessors(x))
    return _within_reach(chunk, step, x, dt, z)


def _within_reach(chunk: int, step: int, *tensors: Tensor | None) -> int:
    """Return the tokens of a chunk whose rows Triton can count in 32 bits."""
    row = max(1, *(tensor.stride(1) for tensor in tensors if tensor is not None))
    return min(chunk, max(step, (2**31 - 1) // row // step * step))


def _forward_kernel(rows: int, d_state: int) -> tuple[Kernel, ...]:
    """Return `forward` in Gluon; where it has two warps also with four, for programs alone."""
    warps = forward_in_gluon.config(d_state)["num_warps"]
    return Kernel(rows, warps, 2), *([Kernel(rows, 2 * warps, 1.6)] if warps == 2 else [])


def _backward_chunk(dy: Tensor, dt: Tensor, z: Tensor | None, d_state: int) -> int:
    """Return the tokens of a chunk of the backward pass in Gluon."""
    batch, length, d_inner = dy.shape
    ends = _gluon_ends(batch * triton.cdiv(d_inner, LANES), d_state, reverse=True)
    step, kernel = spacing(dy, d_state, exact=False), _backward_kernel(dy, d_state)
    chunk = cutting.chunk_length(length, step, (kernel,), ends, multiprocessors(dy))
    return _within_reach(chunk, step, dy, dt, z)


def _backward_kernel(x: Tensor, d_state: int) -> Kernel:
    constants = backward_in_gluon.config(d_state)
    groups = triton.cdiv(x.shape[2], 2 * constants["L"])
    return Kernel(x.shape[0] * groups, constants["num_warps"], 8)


def _triton_ends(rows: int, d_state: int) -> Kernel:
    weight = 1 + 0.16 * min(d_state, STATES)
    return Kernel(rows * triton.cdiv(d_state, STATES), 1, weight)


def _gluon_ends(rows: int, d_state: int, reverse: bool) -> tuple[Kernel, ...]:
    """Return `ends` in Gluon and, for long chunks forwards, in Triton; backwards in Gluon alone."""
    constants = forward_in_gluon.ends_config(d_state)
    ends = Kernel(rows * (d_state // constants["N"]), constants["num_warps"], 1)
    return (ends,) if reverse else (ends, _triton_ends(rows, d_state))


def _rows(tensor: Tensor | None, staged: bool) -> Tensor | None:
    """Make neighbouring channels neighbours in memory; the rows may lie anywhere.

    If they are to be staged through shared memory, they lie at multiples of 16 bytes, and have full
    pieces of 16 bytes, of zeros beyond the last channel.
    """
    if tensor is None:
        return None
    piece = 16 // tensor.element_size()
    odd = tensor.shape[-1] % piece if staged else 0
    if odd:
        return F.pad(tensor, (0, piece - odd))[..., : tensor.shape[-1]]
    if tensor.stride(-1) == 1 and not (staged and not aligned(tensor)):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _padded(tensor: Tensor | None, states: int) -> Tensor | None:
    """Add states that do nothing: zeros along the last axis."""
    return None if tensor is None else F.pad(tensor, (0, states - tensor.shape[-1]))


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _transposed(tensor: Tensor | None) -> Tensor | None:
    """Make neighbouring channels neighbours in memory, for (…, d_inner, d_state)."""
    return None if tensor is None else tensor.mT.contiguous()


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else tensor.stride()[:2]


def _pieces(tensor: Tensor | None) -> tuple[int, ...]:
    """Return the strides in pieces of 16 bytes, at whose multiples all rows lie."""
    size = 16 if tensor is None else tensor.element_size()
    return tuple(stride * size // 16 for stride in _strides(tensor))
