"""The first-order recurrence h_t = a_t h_{t−1} + b_t, one token after the other and in parallel.

A step h ↦ a h + b is a pair (a, b). Two steps in a row are again such a step:

    (a₁, b₁) ⊕ (a₂, b₂) = (a₁ a₂, a₂ b₁ + b₂)        the earlier one on the left

This operation is associative, with the neutral element (1, 0), so all the prefixes
(a₁, b₁) ⊕ … ⊕ (a_t, b_t), whose second parts are the states h_t, may be bracketed at will. That is
a *scan*, and there are several ways to bracket:

    algorithm         applications of ⊕     one after the other
    `sequential`      L − 1                 L − 1
    `hillis_steele`   L log₂ L − L + 1      log₂ L
    `blelloch`        3 L − 2               2 log₂ L + 1
    `chunked`         2 L − 2 √L            2 √L − 1

`linear_scan` is what the rest of the package calls; it chooses, and has a backward pass of its own.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Inexact
from torch import Tensor

from mamba_tutorial._check import (
    HAS_TRITON,
    check_choice,
    check_dtypes,
    check_flag,
    check_length,
    check_memory,
    check_starts,
    check_triton,
)
from mamba_tutorial.ops import register

Elements = tuple[Tensor, ...]
Method = Literal["auto", "sequential", "hillis_steele", "blelloch", "chunked", "triton"]


class Monoid(NamedTuple):
    """An associative operation on tuples of tensors, and its neutral element, number by number."""

    combine: Callable[[Elements, Elements], Elements]
    identity: tuple[float, ...]


def combine(left: Elements, right: Elements) -> Elements:
    """Return (a₁, b₁) ⊕ (a₂, b₂) = (a₁ a₂, a₂ b₁ + b₂): first the step on the left, then the other.

    From the Mamba paper's source, Blelloch (1990), Section 1.4.1, in our order of letters.
    """
    (a1, b1), (a2, b2) = left, right
    return a1 * a2, a2 * b1 + b2


STEPS = Monoid(combine, (1.0, 0.0))

Algorithm = Callable[[Monoid, Elements], Iterator[Elements]]

# Each algorithm scans along axis 1, the length, and is a generator: it yields the elements as they
# were given, and as they are after every parallel step. The last that it yields is the scan.


def sequential(monoid: Monoid, elements: Elements) -> Iterator[Elements]:
    """Scan from left to right: L − 1 applications, each of which waits for the one before."""
    elements = tuple(part.clone() for part in elements)
    yield elements
    for t in range(1, elements[0].shape[1]):
        before, here = slice(t - 1, t), slice(t, t + 1)
        _put(elements, here, monoid.combine(_at(elements, before), _at(elements, here)))
        yield elements


def hillis_steele(monoid: Monoid, elements: Elements) -> Iterator[Elements]:
    """Scan by doubling: every place takes in what the place 1, 2, 4, … to its left has gathered.

    ⌈log₂ L⌉ steps, with L − 1, L − 2, L − 4, … applications (Hillis and Steele 1986; in hardware
    the adder of Kogge and Stone 1973).
    """
    yield elements
    distance, length = 1, elements[0].shape[1]
    while distance < length:
        late = monoid.combine(
            _at(elements, slice(length - distance)), _at(elements, slice(distance, length))
        )
        elements = tuple(
            torch.cat([part[:, :distance], new], 1)
            for part, new in zip(elements, late, strict=True)
        )
        yield elements
        distance *= 2


def blelloch(monoid: Monoid, elements: Elements) -> Iterator[Elements]:
    """Scan by a tree: an up-sweep joins neighbours, a down-sweep hands out what lies before them.

    For L a power of two: L − 1 applications up, L − 1 down, and L to turn "all before me" into "all
    up to me", in 2 log₂ L + 1 steps (Blelloch 1990). Other lengths are filled up with the identity.
    """
    length = elements[0].shape[1]
    size = 1 << (length - 1).bit_length()
    tree = _pad(monoid, elements, size)
    halves = [1 << level for level in range(size.bit_length() - 1)]
    yield _at(tree, slice(length))
    for half in halves:
        left, right = slice(half - 1, None, 2 * half), slice(2 * half - 1, None, 2 * half)
        _put(tree, right, monoid.combine(_at(tree, left), _at(tree, right)))
        yield _at(tree, slice(length))
    for part, neutral in zip(tree, monoid.identity, strict=True):
        part[:, -1] = neutral
    yield _at(tree, slice(length))
    for half in reversed(halves):
        left, right = slice(half - 1, None, 2 * half), slice(2 * half - 1, None, 2 * half)
        total, before = (tuple(p.clone() for p in _at(tree, side)) for side in (left, right))
        _put(tree, left, before)
        _put(tree, right, monoid.combine(before, total))
        yield _at(tree, slice(length))
    yield monoid.combine(_at(tree, slice(length)), elements)


def chunked(monoid: Monoid, elements: Elements, chunk: int | None = None) -> Iterator[Elements]:
    """Scan within chunks, all chunks side by side; then over their ends; then pass the ends on.

    With m = L / c chunks of length c: m (c − 1) + (m − 1) + (m − 1)(c − 1) = 2 L − m − c
    applications in (c − 1) + (m − 1) + 1 = c + m − 1 steps, fewest for c ≈ √L, the default. This is
    what GPU kernels do at their outermost level.
    """
    length = elements[0].shape[1]
    chunk = chunk or max(1, round(length**0.5))
    count = -(-length // chunk)
    padded = _pad(monoid, elements, count * chunk)
    table = tuple(part.unflatten(1, (count, chunk)) for part in padded)

    def step(left: tuple[slice, ...], right: tuple[slice, ...]) -> Elements:
        new = monoid.combine(tuple(p[left] for p in table), tuple(p[right] for p in table))
        for part, value in zip(table, new, strict=True):
            part[right] = value
        return _at(padded, slice(length))

    every, end = slice(None), slice(-1, None)
    yield _at(padded, slice(length))
    for t in range(1, chunk):
        yield step((every, every, slice(t - 1, t)), (every, every, slice(t, t + 1)))
    for c in range(1, count):
        yield step((every, slice(c - 1, c), end), (every, slice(c, c + 1), end))
    if count > 1 and chunk > 1:
        yield step((every, slice(-1), end), (every, slice(1, None), slice(-1)))


ALGORITHMS: dict[str, Algorithm] = {
    "sequential": sequential,
    "hillis_steele": hillis_steele,
    "blelloch": blelloch,
    "chunked": chunked,
}


def scan(algorithm: Algorithm, monoid: Monoid, elements: Elements) -> Elements:
    """Run a scan algorithm to its end: the prefix at t is element 0 ⊕ … ⊕ element t.

    Args:
        algorithm: one of this module's, such as `blelloch`.
        monoid: the operation and its neutral element, such as `STEPS`.
        elements: tensors (batch, length, ...), one for each part of an element.
    """
    return deque(algorithm(monoid, elements), maxlen=1).pop()


def linear_scan(
    a: Inexact[Tensor, "batch length *rest"],
    b: Inexact[Tensor, "batch length *rest"],
    h0: Inexact[Tensor, " batch *rest"] | None = None,
    *,
    starts: Bool[Tensor, "batch length"] | None = None,
    reverse: bool = False,
    method: Method = "auto",
) -> Inexact[Tensor, "batch length *rest"]:
    """Return all states of h_t = a_t h_{t−1} + b_t, elementwise, along the length.

    The backward pass is the same recurrence run the other way. With γ_t the gradient of h_t through
    all that follows, and ∂_t what arrives for h_t from outside,

        γ_t = ∂_t + a_{t+1} γ_{t+1},     ∂b_t = γ_t,     ∂a_t = γ_t h_{t−1},     ∂h_0 = a_1 γ_1.

    Half-precision inputs are scanned in float32, and the states are rounded once, at the end.

    Args:
        a: (batch, length, ...), real or complex.
        b: like a.
        h0: (batch, ...), the state before the first token (after the last, if reversed); zero by
            default.
        starts: (batch, length), true where a new sequence begins: there the state before is zero.
            So sequences can lie one after the other in a row. (If reversed, true where one ends.)
        reverse: run from the last token to the first, h_t = a_t h_{t+1} + b_t.
        method: "sequential" is a loop, the others are the algorithms of this module, but "triton",
            one kernel on a GPU (without a GPU: in Triton's interpreter), which computes in float32.
            "auto" is the kernel on a GPU, for real numbers of at most 32 bits, where Triton is
            installed; else it chooses by the size.

    Returns:
        h: (batch, length, ...).

    Raises:
        TypeError: an argument is no floating or complex tensor, or has another dtype than a; or
            starts is no tensor of bool.
        ValueError: a shape does not fit, the length is zero, devices differ, or there is no such
            method, or the kernel does not fit.
    """
    check_dtypes(a=a, b=b, h0=h0, optional=("h0",))
    check_choice("method", method, ["auto", *ALGORITHMS, "triton"])
    check_flag("reverse", reverse)
    if a.ndim < 2 or a.shape[1] == 0:
        raise ValueError(f"a has shape {tuple(a.shape)}, expected (batch, length, ...), length ≥ 1")
    if b.shape != a.shape:
        raise ValueError(f"b has shape {tuple(b.shape)}, expected {tuple(a.shape)}, the shape of a")
    if h0 is None:
        h0 = b.new_zeros(b[:, 0].shape)
    if h0.shape != a[:, 0].shape:
        needed = f"expected (batch, ...) = {tuple(a[:, 0].shape)}"
        raise ValueError(f"h0 has shape {tuple(h0.shape)}, {needed}")
    if starts is not None:
        check_starts(starts, a)
        a = a.masked_fill(starts.reshape(*starts.shape, *[1] * (a.ndim - 2)), 0)
    small = a.dtype in (torch.float16, torch.bfloat16, torch.float32)
    if method == "triton":
        check_triton(a, "method")
    elif method == "auto" and a.is_cuda and small and HAS_TRITON:
        method = "triton"
    if a.dtype in (torch.float16, torch.bfloat16) and method != "triton":
        h = linear_scan(a.float(), b.float(), h0.float(), reverse=reverse, method=method)
        return h.to(a.dtype)
    return _STATES(a, b, h0, reverse, method)


# The operators' arguments are all positional: (a, b, h0, reverse, method), and for the gradient
# (∂, a, h, h0, reverse, method) with the states h of the scan.


def _run_states(a: Tensor, b: Tensor, h0: Tensor, reverse: bool, method: Method) -> Tensor:
    if method == "triton":
        from mamba_tutorial.kernels.scan import states

        flat = (t.reshape(*t.shape[:2], -1).contiguous() for t in (a, b))
        return states(*flat, h0.reshape(len(h0), -1).contiguous(), reverse).view(b.shape)
    if reverse:
        return _run_states(a.flip(1), b.flip(1), h0, False, method).flip(1)
    h = _states(a, b, h0, _choose(a) if method == "auto" else method)
    # A product of decays may overflow where no state does, and ∞ · 0 is not a number. What follows
    # from it is none either, to the last state; but Hillis and Steele's states do not follow from
    # each other. The loop makes no such products.
    seen = h if method == "hillis_steele" else h[:, -1]
    if method != "sequential" and not seen.isfinite().all():
        return _states(a, b, h0, "sequential")
    return h


def _states(a: Tensor, b: Tensor, h0: Tensor, method: Method) -> Tensor:
    h = b.clone(memory_format=torch.contiguous_format)
    h[:, 0] += a[:, 0] * h0
    if method == "sequential":
        for t in range(1, a.shape[1]):
            h[:, t].addcmul_(a[:, t], h[:, t - 1])
        return h
    return scan(ALGORITHMS[method], STEPS, (a, h))[1]


def _loop(a: Tensor, b: Tensor, h0: Tensor, reverse: bool, method: Method) -> Tensor:
    """The definition."""
    tokens = list(zip(a.unbind(1), b.unbind(1), strict=True))
    states = []
    for a_t, b_t in reversed(tokens) if reverse else tokens:
        h0 = a_t * h0 + b_t
        states.append(h0)
    return torch.stack(states[::-1] if reverse else states, 1)


def _states_gradient(wanted, upstream, inputs, kept) -> tuple:
    a, _, h0, reverse, method = inputs
    return *_GRADIENTS(*upstream, a, *kept, h0, reverse, method), None, None


def _run_gradients(
    d: Tensor, a: Tensor, h: Tensor, h0: Tensor, reverse: bool, method: Method
) -> tuple[Tensor, Tensor, Tensor]:
    if method != "triton":
        return _gradients(d, a, h, h0, reverse, method)
    from mamba_tutorial.kernels.scan import gradients

    flat = (t.reshape(*t.shape[:2], -1).contiguous() for t in (d, a, h))
    da, db, dh0 = gradients(*flat, h0.reshape(len(h0), -1).contiguous(), reverse)
    return da.view(a.shape), db.view(a.shape), dh0.view(h0.shape)


def _gradients(
    d: Tensor, a: Tensor, h: Tensor, h0: Tensor, reverse: bool, method: Method
) -> tuple[Tensor, Tensor, Tensor]:
    """∂a, ∂b and ∂h0 from the gradients d of the states h, by the recurrence in reverse."""
    first, none = (-1 if reverse else 0), torch.zeros_like(a[:, :1])
    if reverse:
        a_next, h_before = torch.cat([none, a[:, :-1]], 1), torch.cat([h[:, 1:], h0[:, None]], 1)
    else:
        a_next, h_before = torch.cat([a[:, 1:], none], 1), torch.cat([h0[:, None], h[:, :-1]], 1)
    g = _STATES(a_next.conj_physical(), d, torch.zeros_like(h0), not reverse, method)
    return g * h_before.conj_physical(), g, a[:, first].conj_physical() * g[:, first]


_STATES = register(
    "linear_scan",
    "(Tensor a, Tensor b, Tensor h0, bool reverse, str method) -> Tensor",
    run=_run_states,
    like=lambda a, b, h0, reverse, method: b.new_empty(b.shape),
    definition=_loop,
    gradient=_states_gradient,
    kept=(0,),
)
_GRADIENTS = register(
    "linear_scan_backward",
    "(Tensor d, Tensor a, Tensor h, Tensor h0, bool reverse, str method)"
    " -> (Tensor, Tensor, Tensor)",
    run=_run_gradients,
    like=lambda d, a, h, h0, *_: (
        *(a.new_empty(a.shape) for _ in range(2)),
        h0.new_empty(h0.shape),
    ),
    definition=_gradients,
)


def _choose(a: Tensor) -> Method:
    """Choose by size; chapter 8 measures where these limits lie.

    To start a step of the loop costs about as much as the multiplications of 4096 numbers. With
    fewer per token a parallel scan wins: the tree while everything fits in the cache, else chunks.
    """
    length, numbers = a.shape[1], a[:, 0].numel()
    if length <= 64 or numbers >= 4096:
        return "sequential"
    return "blelloch" if length * numbers <= 1 << 18 else "chunked"


@dataclass(frozen=True)
class Step:
    """One parallel step of a scan over places 0, …, L − 1.

    Attributes:
        intervals: what each place holds after the step: (first, stop) of the elements combined
            there, stop excluded; (0, 0) for the neutral element.
        joined: the pairs (left place, right place) whose elements were combined in the step.
    """

    intervals: list[tuple[int, int]]
    joined: list[tuple[int, int]]


def trace(algorithm: Algorithm, length: int) -> list[Step]:
    """Return the steps of an algorithm, by letting it scan intervals instead of numbers.

    To combine [i, j) with [j, k) gives [i, k). Anything else than neighbours in order is an error,
    so a trace also proves that the algorithm does not need the operation to be commutative. The
    first step is the beginning, where nothing has been joined.

    Args:
        algorithm: one of this module's.
        length: for `blelloch` a power of two, for `chunked` a square, lest places be filled up.

    Raises:
        TypeError, ValueError: length is not a positive whole number.
        ValueError: the algorithm combines two intervals that do not touch.
    """
    length = check_length(length)
    check_memory("length", length, length)
    joined = []

    def join(left: Elements, right: Elements) -> Elements:
        (start, middle, left_place), (other, stop, right_place) = left, right
        left_empty, right_empty = start == middle, other == stop
        if not ((middle == other) | left_empty | right_empty).all():
            raise ValueError(f"{algorithm.__name__} combines intervals that do not touch")
        joined.extend(_pairs(left_place, right_place))
        start, stop = torch.where(left_empty, other, start), torch.where(right_empty, middle, stop)
        return start, stop, right_place

    places = torch.arange(length)[None]
    steps = []
    for start, stop, place in algorithm(
        Monoid(join, (0, 0, -1)), (places, places + 1, places.clone())
    ):
        steps.append(Step(_pairs(start, stop), joined.copy()))
        place.copy_(places)  # whatever moved, it now belongs where it is
        joined.clear()
    return steps


def _pairs(first: Tensor, second: Tensor) -> list[tuple[int, int]]:
    first, second = torch.broadcast_tensors(first, second)
    return list(zip(first.flatten().tolist(), second.flatten().tolist(), strict=True))


def _at(elements: Elements, places: slice) -> Elements:
    return tuple(part[:, places] for part in elements)


def _put(elements: Elements, places: slice, values: Elements) -> None:
    for part, value in zip(elements, values, strict=True):
        part[:, places] = value


def _pad(monoid: Monoid, elements: Elements, length: int) -> Elements:
    """Copy the elements into a longer row that ends in neutral elements."""
    padded = []
    for part, neutral in zip(elements, monoid.identity, strict=True):
        batch, given, *rest = part.shape
        padded.append(part.new_full((batch, length, *rest), neutral))
        padded[-1][:, :given] = part
    return tuple(padded)
