"""In every precision, and at the ends of the numbers' range, what the loop in float64 gives."""

import math

import pytest
import scipy.linalg
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mamba_tutorial import (
    S4,
    S4D,
    MambaBlock,
    MambaConfig,
    MambaLM,
    SelectiveSSM,
    StateSpace,
    _check,
    bilinear,
    causal_convolution,
    euler,
    linear_scan,
    selective_scan,
    zoh,
)
from mamba_tutorial.attention import Transformer, TransformerConfig
from mamba_tutorial.hippo import hippo_legs, online_memory
from mamba_tutorial.ops import OPERATORS, Operator
from mamba_tutorial.scan import ALGORITHMS

HALF = [torch.float16, torch.bfloat16]
LAYERS = {
    "MambaBlock": lambda: MambaBlock(MambaConfig(2, 1, 5, d_state=2)),
    "SelectiveSSM": lambda: SelectiveSSM(2, 2, 1),
    "S4": lambda: S4(2, 2),
    "S4D": lambda: S4D(2, 2),
}


def close(value, exact, dtype):
    """Equal up to some roundings of this dtype, measured by the largest number."""
    scale = exact.abs().max()
    error = ((value.double() - exact) / scale).abs().max()
    assert error < 4 * torch.finfo(dtype).eps, error.item()


@pytest.mark.parametrize("name", LAYERS)
def test_layers_in_double_precision(name):
    torch.manual_seed(0)
    layer, x = LAYERS[name]().double(), torch.randn(1, 3, 2, dtype=torch.float64)

    def run(x, *parameters):
        names = [name for name, _ in layer.named_parameters()]
        values = dict(zip(names, parameters, strict=True))
        y = torch.func.functional_call(layer, values, (x,))
        return y if isinstance(y, torch.Tensor) else y[0]

    leaves = [p.detach().requires_grad_() for p in layer.parameters()]
    assert run(x, *leaves).dtype == torch.float64
    assert torch.autograd.gradcheck(run, [x.requires_grad_(), *leaves])


@pytest.mark.parametrize("name", [*LAYERS, "MambaLM"])
def test_layers_made_in_double_precision_are_those_converted(name):
    make = LAYERS.get(name, lambda: MambaLM(MambaConfig(8, 2, 5)))
    torch.set_default_dtype(torch.float64)
    try:
        made = make()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(p.dtype == torch.float64 for p in made.parameters())
    converted = make().double()
    converted.load_state_dict(made.state_dict())
    x = torch.tensor([[1, 2, 3]]) if name == "MambaLM" else torch.randn(1, 3, 2).double()
    first, second = ([y] if isinstance(y, torch.Tensor) else y for y in (made(x), converted(x)))
    assert torch.equal(first[0], second[0])
    assert first[0].dtype == torch.float64


@pytest.mark.parametrize("dtype", HALF)
def test_discretisation_in_half_precision(dtype):
    A = torch.tensor([[0.0, 1.0], [-4.0, -0.5]])
    B = torch.tensor([[0.0], [1.0]])
    for rule in (zoh, bilinear, euler):
        exact = rule(A.double(), B.double(), torch.tensor(0.125).double())
        for value, reference in zip(rule(A.to(dtype), B.to(dtype), 0.125), exact, strict=True):
            assert value.dtype == dtype
            close(value, reference, dtype)
    exact, system = (
        StateSpace(A.to(t), B.to(t), torch.eye(2, dtype=t)) for t in (torch.float64, dtype)
    )
    x = torch.randn(200, 1).to(dtype)
    close(system.simulate(x, 0.125)[1], exact.simulate(x.double(), 0.125)[1], dtype)
    time = torch.tensor([0.5, 1.0])
    close(system.impulse_response(time.to(dtype)), exact.impulse_response(time.double()), dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_memory_and_convolution_in_half_precision(dtype):
    x, kernel = torch.randn(2000).to(dtype), torch.randn(50, 3).to(dtype)
    close(online_memory(x, 3), online_memory(x.double(), 3), dtype)
    signal = x[:1800].reshape(600, 3)
    close(
        causal_convolution(signal, kernel),
        causal_convolution(signal.double(), kernel.double()),
        dtype,
    )


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", [S4, S4D])
def test_s4_in_half_precision(kind, dtype):
    """Against the same rounded parameters in float64; the layer itself rounds a few times more."""
    torch.manual_seed(0)
    layer = kind(4, 8).to(dtype)
    x = torch.randn(2, 30, 4).to(dtype)
    y, exact = layer(x), kind(4, 8).double()
    exact.load_state_dict(layer.state_dict())
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact(x.double()), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("backend", ["sequential", "parallel", "numba"])
def test_autocast_does_not_reach_into_the_scan(backend):
    generator = torch.Generator().manual_seed(0)
    x, dt = torch.randn(2, 1, 50, 4, generator=generator)
    B, C = torch.randn(2, 1, 50, 3, generator=generator)
    given = x, dt.abs(), -torch.ones(4, 3), B, C
    exact = selective_scan(*(t.double() for t in given), backend="sequential")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(selective_scan(*given, backend=backend), exact, torch.float32)


# where products of decays are no numbers, though the states are


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", ["auto", *ALGORITHMS])
def test_decays_above_one(method, reverse):
    """Nothing to grow; a little that grows; and what grows and shrinks again."""
    grow, shrink = torch.full((1, 200, 3), 2.0), torch.full((1, 200, 3), 0.5)
    few = torch.full((1, 3), 1e-30)
    for a, b, h0 in (
        (grow, torch.zeros_like(grow), None),
        (grow, torch.zeros_like(grow), few),
        (torch.cat([grow, shrink], 1), torch.zeros(1, 400, 3), few),
        (torch.cat([grow, grow * 0, grow], 1), torch.ones(1, 600, 3), None),
    ):
        loop = linear_scan(a, b, h0, reverse=reverse, method="sequential")
        states = linear_scan(a, b, h0, reverse=reverse, method=method)
        finite = loop.isfinite()
        # the smallest numbers of all have no digits left to compare
        torch.testing.assert_close(states[finite], loop[finite], rtol=1e-5, atol=1e-37)
        assert not states[~finite].isfinite().any()


@pytest.mark.parametrize("backend", ["parallel", "numba"])
def test_growing_states_and_decays_at_the_ends_of_the_range(backend):
    one = torch.ones(1, 1, 1)
    for A, h0 in ((-1e4, 3e38), (-90.0, 3e38), (-95.0, 3e38), (88.0, 1.0), (88.0, 1e-30)):
        given = one, one, one[0] * A, one * 0, one
        loop = selective_scan(*given, h0=one * h0, backend="sequential")
        value = selective_scan(*given, h0=one * h0, backend=backend)
        torch.testing.assert_close(value, loop, rtol=1e-5, atol=0)
    grown = selective_scan(one, one, one[0] * 200, one, one, h0=one, backend=backend)
    assert grown.item() == math.inf
    x, B = torch.zeros(1, 500, 2), torch.ones(1, 500, 2)
    y = selective_scan(x, x + 0.5, torch.ones(2, 2), B, B, backend=backend)
    assert (y == 0).all()


def test_stiff_systems_in_float32():
    """The slow mode is not lost beside one that is 10⁷ or more times faster."""
    for stiff in (1e7, 1e9, 1e12):
        A = torch.tensor([[-stiff, 0.0], [1.0, -1.0]])
        A_bar, _ = zoh(A, torch.ones(2, 1), 1.0)
        exact = scipy.linalg.expm(A.double().numpy())
        assert abs(A_bar[1, 1].item() - exact[1, 1]) < 1e-6


def test_the_exponential_of_a_matrix_that_is_far_from_normal():
    A, B = hippo_legs(32)
    for step in (1e-3, 0.1, 1.0):
        A_bar, _ = zoh(A, B, step)
        exact = torch.from_numpy(scipy.linalg.expm((step * A).numpy()))
        assert (A_bar - exact).abs().max() / exact.abs().max() < 1e-12


# where there is no double precision, as on a Mac's GPU


class NoDouble(TorchDispatchMode):
    """Refuse every operation that gives double precision."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run it, and look at what it gives."""
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            double = torch.float64, torch.complex128
            assert not (isinstance(value, torch.Tensor) and value.dtype in double), func
        return result


IDS = torch.arange(10).view(2, 5)
MODELS = {
    "MambaLM": (lambda: MambaLM(MambaConfig(8, 2, 10)), IDS),
    "Transformer": (lambda: Transformer(TransformerConfig(8, 2, 10, n_head=2)), IDS),
    "S4": (lambda: S4(4, 8), torch.ones(2, 5, 4)),
    "S4D": (lambda: S4D(4, 8), torch.ones(2, 5, 4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_run_and_train_without_double_precision(name, monkeypatch):
    build, given = MODELS[name]
    torch.manual_seed(0)
    model = build()
    parameters = list(model.parameters())

    def results():
        y = model(given)
        return [y, *torch.autograd.grad(y.square().mean(), parameters)]

    expected = results()
    monkeypatch.setattr(_check, "WITHOUT_DOUBLE", {"cpu"})
    # a mode does not see what a compiled routine does, but its definition
    monkeypatch.setattr(
        Operator, "__call__", lambda operator, *inputs: operator.definition(*inputs)
    )
    with NoDouble():
        found = results()
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-5)


def test_the_matrices_of_s4_and_its_steps_without_double_precision(monkeypatch):
    torch.manual_seed(0)
    layer, x, d = S4(4, 8), torch.ones(2, 4), torch.ones(4, 9)
    given = *layer.pairs(), layer.dt, 9
    expected = OPERATORS["dplr_kernel_backward"](d, OPERATORS["dplr_kernel"](*given)[1], *given)
    monkeypatch.setattr(_check, "WITHOUT_DOUBLE", {"cpu"})
    with NoDouble(), torch.no_grad():
        _, truncated = OPERATORS["dplr_kernel"].run(*given)
        found = OPERATORS["dplr_kernel_backward"].run(d, truncated, *given)
        layer.step(x, layer.initial_state(2))
        layer.discrete()
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-4)


def test_a_model_writes_without_double_precision(monkeypatch):
    monkeypatch.setattr(_check, "WITHOUT_DOUBLE", {"cpu"})
    model = MambaLM(MambaConfig(8, 2, 10))
    with NoDouble():
        assert model.generate(IDS, 3, top_k=5, top_p=0.9, min_p=0.01).shape == (2, 8)
