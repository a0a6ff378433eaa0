"""Every way to scan gives the states of the loop, and each does the work that it says."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_tutorial import scan
from mamba_tutorial.scan import ALGORITHMS, STEPS, combine, linear_scan

METHODS = ["auto", *ALGORITHMS]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.complex64: 1e-5}


def problem(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, *shape, dtype=dtype, generator=generator).unbind(0)
    h0 = torch.randn(shape[0], *shape[2:], dtype=dtype, generator=generator)
    return a / (1e-6 + a.abs()) * 0.9, b, h0  # |a| near 0.9: the states neither vanish nor explode


def loop(a, b, h0):
    """The definition."""
    states = []
    for t in range(a.shape[1]):
        h0 = a[:, t] * h0 + b[:, t]
        states.append(h0)
    return torch.stack(states, 1)


def in_pieces(a, b, h0, starts, reverse):
    """Each sequence of a row by itself."""
    rows = []
    for row in range(len(a)):
        flags = (starts[row].flip(0) if reverse else starts[row]).tolist()
        order = slice(None) if not reverse else torch.arange(a.shape[1] - 1, -1, -1)
        states, h = [], h0[row]
        for flag, a_t, b_t in zip(flags, a[row][order], b[row][order], strict=True):
            h = b_t + a_t * (torch.zeros_like(h) if flag else h)
            states.append(h)
        rows.append(torch.stack(states[::-1] if reverse else states))
    return torch.stack(rows)


@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=25)
@given(
    length=st.integers(1, 40),
    reverse=st.booleans(),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 9),
)
def test_sequences_in_a_row_are_scanned_one_by_one(method, length, reverse, share, seed):
    a, b, h0 = (t.requires_grad_() for t in problem(2, length, 3, seed=seed))
    starts = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) < share
    h = linear_scan(a, b, h0, starts=starts, reverse=reverse, method=method)
    expected = in_pieces(a, b, h0, starts, reverse)
    torch.testing.assert_close(h, expected, rtol=0, atol=1e-11)
    d = torch.randn(h.shape, dtype=h.dtype, generator=torch.Generator().manual_seed(seed))
    found = torch.autograd.grad(h, (a, b, h0), d, materialize_grads=True)
    wanted = torch.autograd.grad(expected, (a, b, h0), d, materialize_grads=True)
    for value, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, right, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("method", METHODS)
@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 70),
    rest=st.lists(st.integers(1, 3), max_size=2),
    reverse=st.booleans(),
    seed=st.integers(0, 9),
)
def test_every_method_gives_the_states_of_the_loop(
    method, dtype, batch, length, rest, reverse, seed
):
    a, b, h0 = problem(batch, length, *rest, dtype=dtype, seed=seed)
    h = linear_scan(a, b, h0, reverse=reverse, method=method)
    expected = loop(a.flip(1), b.flip(1), h0).flip(1) if reverse else loop(a, b, h0)
    assert h.dtype == dtype
    torch.testing.assert_close(h, expected, rtol=0, atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(1, 5000, 1), (1, 5000, 2), (1, 200, 4096), (2, 300000)])
def test_what_auto_chooses_is_right(shape):
    a, b, h0 = problem(*shape)
    expected = linear_scan(a, b, h0, method="sequential")
    torch.testing.assert_close(linear_scan(a, b, h0), expected)


@pytest.mark.parametrize("method", ALGORITHMS)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_gradients_of_a_and_b_and_h0(method, reverse, dtype, length):
    inputs = [tensor.requires_grad_() for tensor in problem(2, length, 2, dtype=dtype)]

    def function(a, b, h0):
        return linear_scan(a, b, h0, reverse=reverse, method=method)

    assert torch.autograd.gradcheck(function, inputs)


def test_second_derivatives():
    inputs = [tensor.requires_grad_() for tensor in problem(1, 5, 2)]
    assert torch.autograd.gradgradcheck(linear_scan, inputs)


def test_gradients_agree_with_those_of_the_loop():
    inputs = problem(2, 300, 8)
    upstream = torch.randn(2, 300, 8, dtype=torch.float64)
    gradients = []
    for function in (linear_scan, loop):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        gradients.append(torch.autograd.grad(function(*leaves), leaves, upstream))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_scanned_in_float32_and_rounded_once(dtype):
    a, b, h0 = (tensor.to(dtype) for tensor in problem(1, 500, 4))
    exact = loop(a.double(), b.double(), h0.double())
    torch.testing.assert_close(
        linear_scan(a, b, h0), exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5
    )


def test_a_gate_near_one_over_a_long_sequence():
    """The sum of 2^16 numbers, in float32: no error that grows with the length."""
    a = torch.full((1, 1 << 16, 1), 1 - 1e-6)
    b = torch.ones_like(a)
    decay = a.double()[0, 0, 0]
    exact = (1 - decay ** (1 << 16)) / (1 - decay)
    for method in ("hillis_steele", "blelloch", "chunked"):
        assert abs(linear_scan(a, b, method=method)[0, -1, 0] / exact - 1) < 1e-5


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", ALGORITHMS)
def test_products_of_decays_may_overflow_where_no_state_does(method, reverse):
    a = torch.tensor([0.5, 0.5, 1e30, 1e30, 0.0])[None, :, None]
    b = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])[None, :, None]
    a, b = (t.flip(1) if reverse else t for t in (a, b))
    assert torch.equal(linear_scan(a, b, reverse=reverse, method=method), b)


def element(seed):
    return problem(1, 1, 4, seed=seed)[:2]


def test_combine_is_associative_has_an_identity_and_does_not_commute():
    p, q, r = element(1), element(2), element(3)
    for left, right in zip(combine(combine(p, q), r), combine(p, combine(q, r)), strict=True):
        torch.testing.assert_close(left, right)
    one = torch.ones(1, 1, 4).double(), torch.zeros(1, 1, 4).double()
    for same in (combine(one, p), combine(p, one)):
        assert all(torch.equal(x, y) for x, y in zip(same, p, strict=True))
    assert not torch.allclose(combine(p, q)[1], combine(q, p)[1])


def test_combine_is_one_step_after_the_other():
    (a1, b1), (a2, b2), h = element(1), element(2), 3.0
    a, b = combine((a1, b1), (a2, b2))
    torch.testing.assert_close(a * h + b, a2 * (a1 * h + b1) + b2)


@pytest.mark.parametrize("algorithm", ALGORITHMS.values())
def test_scan_takes_any_monoid(algorithm):
    """Largest number so far: another associative operation, with −∞ as its identity."""
    maximum = scan.Monoid(lambda left, right: (torch.maximum(left[0], right[0]),), (-math.inf,))
    x = torch.randn(2, 37, generator=torch.Generator().manual_seed(0))
    (result,) = scan.scan(algorithm, maximum, (x,))
    assert torch.equal(result, x.cummax(1).values)
    assert scan.scan(algorithm, STEPS, (x, x))[1].shape == x.shape


WORK = {  # applications of the operation, for L = 2^k, and L = 4^k where chunks are square
    "sequential": lambda length: length - 1,
    "hillis_steele": lambda length: length * round(math.log2(length)) - length + 1,
    "blelloch": lambda length: 3 * length - 2,
    "chunked": lambda length: 2 * length - 2 * math.isqrt(length),
}
DEPTH = {
    "sequential": lambda length: length - 1,
    "hillis_steele": lambda length: round(math.log2(length)),
    "blelloch": lambda length: 2 * round(math.log2(length)) + 1,
    "chunked": lambda length: 2 * math.isqrt(length) - 1,
}


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("length", [4, 16, 64, 256])
def test_work_and_depth_are_those_of_the_formulae(name, length):
    steps = scan.trace(ALGORITHMS[name], length)
    assert sum(len(step.joined) for step in steps) == WORK[name](length)
    assert sum(bool(step.joined) for step in steps) == DEPTH[name](length)
    assert steps[0] == scan.Step([(t, t + 1) for t in range(length)], [])
    assert steps[-1].intervals == [(0, t + 1) for t in range(length)]


def test_trace_names_the_places_that_were_joined():
    up, down = scan.trace(scan.blelloch, 4)[1], scan.trace(scan.blelloch, 4)[4]
    assert up.joined == [(0, 1), (2, 3)]
    assert down.joined == [(3, 1)]  # the parent's prefix, from place 3, before the left total
    assert down.intervals == [(0, 1), (0, 0), (2, 3), (0, 2)]


def test_trace_finds_an_algorithm_that_swaps_neighbours():
    def wrong(monoid, elements):
        yield elements
        yield monoid.combine(
            tuple(part[:, 1:] for part in elements), tuple(p[:, :-1] for p in elements)
        )

    with pytest.raises(ValueError, match="wrong combines intervals that do not touch"):
        scan.trace(wrong, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": [1.0]}, TypeError, "a is a list, expected a torch.Tensor"),
        ({"a": torch.ones(2, 5, 3, dtype=torch.int64)}, TypeError, "a has dtype torch.int64"),
        (
            {"b": torch.ones(2, 5, 3)},
            TypeError,
            "b has dtype torch.float32, expected torch.float64",
        ),
        (
            {"b": torch.ones(2, 4, 3).double()},
            ValueError,
            r"b has shape \(2, 4, 3\), expected \(2, 5, 3\)",
        ),
        (
            {"h0": torch.ones(3).double()},
            ValueError,
            r"h0 has shape \(3,\), expected \(batch, ...\) = \(2, 3\)",
        ),
        (
            {"a": torch.ones(5).double()},
            ValueError,
            r"a has shape \(5,\), expected \(batch, length",
        ),
        ({"a": torch.ones(2, 0, 3).double()}, ValueError, "length ≥ 1"),
        ({"starts": torch.ones(2, 5)}, TypeError, "starts has dtype torch.float32, expected"),
        ({"starts": [True]}, TypeError, "starts is a list, expected a torch.Tensor"),
        (
            {"starts": torch.ones(2, 4, dtype=torch.bool)},
            ValueError,
            r"starts has shape \(2, 4\), expected \(batch, length\) = \(2, 5\)",
        ),
        ({"method": "tree"}, ValueError, "method is 'tree', expected one of 'auto', 'sequential'"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_bad_input_is_named(change, error, message):
    a, b, h0 = problem(2, 5, 3)
    with pytest.raises(error, match=message):
        linear_scan(**{"a": a, "b": b, "h0": h0} | change)
