"""The lessons of the last chapter are the definition, in float64, each at the sizes it is for."""

import importlib

import pytest
import torch

pytest.importorskip("triton", exc_type=ImportError)

from mamba_tutorial import linear_scan, selective_scan
from mamba_tutorial.kernels import lessons
from mamba_tutorial.kernels.lessons import backward, forward, recurrence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(length=16, channels=32, states=16):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE)

    x, dt, z = (random(2, length, channels) for _ in range(3))
    B, C = (random(2, length, states) for _ in range(2))
    given = {"x": x, "dt": dt, "A": -random(channels, states).abs(), "B": B, "C": C}
    return given | {"D": random(channels), "z": z, "dt_bias": random(channels)}


def exact(given, **options):
    wide = {name: value.double() for name, value in given.items()}
    return selective_scan(**wide, **options, backend="sequential")


def one_channel(x, dt, A, B, C):
    """The first channel with the first state, as rows."""
    parts = x[:, :, 0], dt[:, :, 0], A[:1, 0].expand(len(x)), B[:, :, 0], C[:, :, 0]
    return [part.contiguous() for part in parts]


@pytest.mark.parametrize("length", [1, 64, 150])
def test_the_recurrence(length):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(3, length, generator=generator).to(DEVICE) for _ in range(2))
    states = linear_scan(a, b, method="sequential")
    torch.testing.assert_close(recurrence.scan_row(a, b), states)
    torch.testing.assert_close(recurrence.step(a, b, b), a * b + b)
    if length & (length - 1) == 0:
        torch.testing.assert_close(recurrence.scan_block(a, b), states)


@pytest.mark.parametrize("name", ["all_states", "many_channels", "in_tiles"])
def test_forward(name):
    given = {key: value for key, value in inputs().items() if key in {"x", "dt", "A", "B", "C"}}
    given["dt"] = given["dt"].abs()
    y = getattr(forward, name)(**given)
    torch.testing.assert_close(y.double(), exact(given), rtol=1e-5, atol=2e-5)


def test_forward_of_one_state():
    given = inputs(length=13)
    parts = one_channel(*(given[key] for key in ("x", "dt", "A", "B", "C")))
    x, dt, A, B, C = (part[..., None] for part in parts)
    y = exact({"x": x, "dt": dt.abs(), "A": A[:1], "B": B, "C": C})
    parts[1] = parts[1].abs()
    torch.testing.assert_close(forward.one_state(*parts).double(), y[..., 0], rtol=1e-5, atol=1e-5)


def test_forward_with_gate():
    given = inputs()
    y = exact(given, dt_softplus=True)
    torch.testing.assert_close(forward.gated(**given).double(), y, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (13, 30, 5), (40, 65, 16)])
def test_forward_of_any_size(sizes):
    given = inputs(*sizes)
    h0 = torch.randn(2, *given["A"].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = forward.any_size(**given, h0=h0)
    wanted = exact(given | {"h0": h0}, dt_softplus=True, return_last_state=True)
    for value, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=2e-5)


def states_of(x, dt, A, B):
    h, states = x.new_zeros(len(x), *A.shape), []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt * x)[:, t, :, None] * B[:, t, None, :]
        states.append(h)
    return torch.stack(states, 1)


def test_backward():
    given = inputs(length=24, channels=64)
    x, dt, A, B, C, dy = (given[key] for key in ("x", "dt", "A", "B", "C", "z"))
    dt = dt.abs()
    h = states_of(x, dt, A, B)
    leaves = [value.double().requires_grad_() for value in (x, dt, A, B, C)]
    y = selective_scan(*leaves, backend="sequential")
    right = torch.autograd.grad(y, leaves, dy.double())
    before = [torch.zeros_like(h[:, :1]), h[:, 7:-1:8]]
    starts = torch.cat(before, 1).mT.contiguous()
    found = backward.in_tiles(x, dt, A, B, C, starts, dy)
    for value, wanted in zip(found, right, strict=True):
        assert (value - wanted).abs().max() < 1e-6 * wanted.abs().max()


def test_backward_with_gate():
    given = inputs(length=24, channels=64)
    dy = torch.randn(given["x"].shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    leaves = {name: value.double().requires_grad_() for name, value in given.items()}
    y = selective_scan(**leaves, dt_softplus=True, backend="sequential")
    right = torch.autograd.grad(y, list(leaves.values()), dy.double())
    step = torch.nn.functional.softplus(given["dt"] + given["dt_bias"])
    h = states_of(given["x"], step, given["A"], given["B"])
    starts = torch.cat([torch.zeros_like(h[:, :1]), h[:, 7:-1:8]], 1).mT.contiguous()
    for value, wanted in zip(backward.gated(**given, starts=starts, dy=dy), right, strict=True):
        assert (value - wanted).abs().max() < 2e-6 * wanted.abs().max()


def test_backward_of_one_state():
    given = inputs(length=13)
    x, dt, A, B, C = one_channel(*(given[key] for key in ("x", "dt", "A", "B", "C")))
    dt, dy = dt.abs(), given["z"][:, :, 0].contiguous()
    h = states_of(x[..., None], dt[..., None], A[:1, None], B[..., None])[..., 0, 0]
    leaves = [v[..., None].double().requires_grad_() for v in (x, dt, A, B, C)]
    every = [leaves[0], leaves[1], leaves[2][:1], leaves[3], leaves[4]]
    y = selective_scan(*every, backend="sequential")
    right = torch.autograd.grad(y, leaves, dy[..., None].double())
    found = backward.one_state(x, dt, A, B, C, h.contiguous(), dy)
    for k, (value, wanted) in enumerate(zip(found, right, strict=True)):
        value = value.sum()[None] if k == 2 else value  # A is one for all rows
        wanted = wanted.sum()[None] if k == 2 else wanted[..., 0]
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_difference_marks_what_is_new():
    text = lessons.difference(forward._in_tiles, forward._gated).splitlines()
    assert "+         step = softplus(dt + bias)" in text
    assert "          hs = b" in text
    assert not [line for line in text if line.startswith("- ")]
    alone = lessons.difference(None, forward._one_state)
    assert alone.startswith("def _one_state(")
    kernel = importlib.import_module("mamba_tutorial.kernels.selective_scan.forward_in_triton")
    assert "zero-order" not in lessons.difference(None, kernel.step_size)
