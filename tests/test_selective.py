"""The selective scan: the definition in float64, and every other way against it."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_tutorial.selective import (
    SelectiveSSM,
    _checks,
    _in_pytorch,
    inverse_softplus,
    selective_scan,
    selective_step,
)

FAST = ["parallel", "numba"]
RULES = ["mamba", "zoh"]


def problem(batch=2, length=7, d_inner=3, d_state=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    tokens, shared = (batch, length, d_inner), (batch, length, d_state)
    return {
        "x": random(*tokens),
        "dt": random(*tokens) - 2,
        "A": -3 * random(d_inner, d_state).abs(),
        "B": random(*shared),
        "C": random(*shared),
        "D": random(d_inner),
        "z": random(*tokens),
        "dt_bias": random(d_inner),
        "h0": random(batch, d_inner, d_state),
    }


def written_out(x, dt, A, B, C, D, z, dt_bias, h0, exact):
    """The formulae, number by number."""
    y, h = torch.zeros_like(x), h0.clone()
    dt = torch.log1p(torch.exp(dt + dt_bias))
    for b, t, d in itertools.product(*map(range, x.shape)):
        total = D[d] * x[b, t, d]
        for n in range(A.shape[1]):
            a = torch.exp(dt[b, t, d] * A[d, n])
            weight = (a - 1) / A[d, n] if exact else dt[b, t, d]
            h[b, d, n] = a * h[b, d, n] + weight * B[b, t, n] * x[b, t, d]
            total += C[b, t, n] * h[b, d, n]
        y[b, t, d] = total * z[b, t, d] * torch.sigmoid(z[b, t, d])
    return y, h


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", ["sequential", "parallel"])
def test_is_the_formula(backend, rule):
    inputs = problem()
    expected = written_out(**inputs, exact=rule == "zoh")
    result = selective_scan(
        **inputs, dt_softplus=True, return_last_state=True, discretization=rule, backend=backend
    )
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def run(inputs, upstream, **options):
    """Outputs and all gradients."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    outputs = selective_scan(**leaves, dt_softplus=True, return_last_state=True, **options)
    upstream = [g.to(out.dtype) for g, out in zip(upstream, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return dict(zip(["y", "last", *leaves], [*outputs, *gradients], strict=True))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", FAST)
@settings(deadline=None, max_examples=12)
@given(
    batch=st.integers(1, 3),
    length=st.sampled_from([1, 2, 31, 32, 33, 70]),
    d_inner=st.sampled_from([1, 3, 63, 64, 65]),
    d_state=st.sampled_from([1, 2, 5, 16]),
    seed=st.integers(0, 99),
)
def test_fast_backends_and_all_their_gradients(
    backend, rule, batch, length, d_inner, d_state, seed
):
    inputs = problem(batch, length, d_inner, d_state, torch.float32, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    upstream = (
        torch.randn(inputs["x"].shape, generator=generator),
        torch.randn(inputs["h0"].shape, generator=generator),
    )
    double = {name: tensor.double() for name, tensor in inputs.items()}
    exact = run(double, upstream, discretization=rule, backend="sequential")
    fast = run(inputs, upstream, discretization=rule, backend=backend)
    # A sum over tokens or channels may cancel: a unit of float32 is allowed for each of its terms.
    tokens = batch * length
    terms = {"D": tokens, "dt_bias": tokens, "A": tokens, "B": d_inner, "C": d_inner}
    for name, value in fast.items():
        scale = exact[name].abs().max() + 0.01 * (1 + terms.get(name, 0))
        assert ((value - exact[name]).abs().max() / scale).item() < 1e-5, name


@pytest.mark.parametrize("rule", RULES)
def test_gradcheck(rule):
    inputs = problem(1, 4, 2, 3)
    names, tensors = list(inputs), [tensor.requires_grad_() for tensor in inputs.values()]
    for backend in ("sequential", "parallel"):

        def function(*tensors, backend=backend):
            options = {"discretization": rule, "backend": backend, "return_last_state": True}
            given = dict(zip(names, tensors, strict=True))
            return selective_scan(**given, dt_softplus=True, **options)

        assert torch.autograd.gradcheck(function, tensors)


def test_parallel_over_several_chunks(monkeypatch):
    monkeypatch.setattr(_in_pytorch, "CHUNK_NUMBERS", 2 * 3 * 4 * 5)  # five tokens at a time
    inputs = problem(length=23)
    upstream = torch.randn(2, 23, 3).double(), torch.randn(2, 3, 4).double()
    for name, value in run(inputs, upstream, backend="parallel").items():
        expected = run(inputs, upstream, backend="sequential")[name]
        torch.testing.assert_close(value, expected, msg=name)


@pytest.mark.parametrize("backend", ["sequential", *FAST])
@settings(deadline=None, max_examples=15)
@given(cuts=st.lists(st.integers(1, 39), max_size=3, unique=True))
def test_a_sequence_may_be_cut_anywhere(backend, cuts):
    inputs = problem(length=40, dtype=torch.float32)
    whole, last = selective_scan(**inputs, dt_softplus=True, return_last_state=True)
    pieces, h = [], inputs["h0"]
    for start, stop in itertools.pairwise([0, *sorted(cuts), 40]):
        cut = {name: inputs[name][:, start:stop] for name in ("x", "dt", "z", "B", "C")}
        y, h = selective_scan(
            **inputs | cut | {"h0": h}, dt_softplus=True, return_last_state=True, backend=backend
        )
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(h, last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_step_by_step_is_the_scan(rule):
    inputs = problem()
    options = {"dt_softplus": True, "discretization": rule}
    y, last = selective_scan(**inputs, **options, return_last_state=True)
    h, tokens = inputs.pop("h0"), ["x", "dt", "z", "B", "C"]
    for t in range(7):
        token = {name: part[:, t] if name in tokens else part for name, part in inputs.items()}
        y_t, h = selective_step(h, **token, **options)
        torch.testing.assert_close(y_t, y[:, t])
    torch.testing.assert_close(h, last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_state_in_float32(dtype):
    inputs = problem(1, 300, 8, 4, dtype)
    y, last = selective_scan(**inputs, dt_softplus=True, return_last_state=True)
    double = {name: tensor.double() for name, tensor in inputs.items()}
    exact, exact_last = selective_scan(**double, dt_softplus=True, return_last_state=True)
    assert (y.dtype, last.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(y, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    torch.testing.assert_close(last, exact_last.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["sequential", *FAST])
@pytest.mark.parametrize("rule", RULES)
def test_extreme_decays_stay_finite(backend, rule):
    """Δ up to 50 and A down to −10⁴: the state is forgotten; A = 0: it is kept for good."""
    x = torch.ones(1, 40, 2, requires_grad=True)
    A = torch.tensor([[-1e4, -1e-6], [0.0, -1.0]], requires_grad=True)
    B, C = torch.ones(2, 1, 40, 2)
    dt = torch.full((1, 40, 2), 50.0, requires_grad=True)
    y = selective_scan(x, dt, A, B, C, discretization=rule, backend=backend)
    gradients = torch.autograd.grad(y.sum(), [x, dt, A])
    assert all(torch.isfinite(tensor).all() for tensor in (y, *gradients))
    kept = 50 * torch.arange(1.0, 41)  # ∫ 1 dt
    forgotten = 50.0 if rule == "mamba" else 1.0
    torch.testing.assert_close(y[0, :, 1], kept + forgotten)


@pytest.mark.parametrize("backend", FAST)
def test_nan_is_not_swallowed(backend):
    for name in ("x", "dt", "A", "B", "C"):
        inputs = problem(dtype=torch.float32)
        inputs[name][..., -1, -1] = torch.nan
        assert selective_scan(**inputs, dt_softplus=True, backend=backend).isnan().any(), name


def test_numba_is_repeatable_to_the_bit():
    inputs = problem(2, 100, 130, 16, torch.float32)
    upstream = torch.randn(2, 100, 130), torch.randn(2, 130, 16)
    first, second = (run(inputs, upstream, backend="numba") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_numba_plain_pytorch_does_the_work(monkeypatch):
    inputs = problem(dtype=torch.float32)
    expected = selective_scan(**inputs, dt_softplus=True, backend="parallel")
    monkeypatch.setattr(_checks, "installed", lambda library: False)
    assert torch.equal(selective_scan(**inputs, dt_softplus=True), expected)
    with pytest.raises(ValueError, match="Numba is not installed: pip install numba"):
        selective_scan(**inputs, dt_softplus=True, backend="numba")


def test_an_independent_peer():
    """`selective_scan_ref` of transformers' Mamba, the plain PyTorch path of its mixer."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, use_associative_scan=False
    )
    mixer = MambaForCausalLM(config).backbone.layers[0].mixer
    captured = {}
    mixer.out_proj.register_forward_pre_hook(lambda _, given: captured.update(y=given[0]))
    x = torch.randn(2, 11, 8)
    with torch.no_grad():
        mixer(x)
        inner, z = mixer.in_proj(x).chunk(2, -1)
        inner = torch.nn.functional.silu(mixer.conv1d(inner.mT)[..., :11].mT)
        ssm = SelectiveSSM(16, 16, 1)
        names = {"A_log", "D", "x_proj.weight", "dt_proj.weight"}
        state = mixer.state_dict()
        values = {name: state[name] for name in names} | {"dt_bias": state["dt_proj.bias"]}
        ssm.load_state_dict(values)
        y, _ = ssm(inner, z)
    torch.testing.assert_close(y, captured["y"].reshape(2, 11, 16), rtol=1e-4, atol=1e-5)


# the selective layer


def test_inverse_softplus():
    y = torch.logspace(-12, 2, 50, dtype=torch.float64)
    torch.testing.assert_close(torch.nn.functional.softplus(inverse_softplus(y), threshold=800), y)


def test_starts_as_the_released_code_does():
    torch.manual_seed(0)
    layer = SelectiveSSM(2048, 16, dt_rank=64)
    dt = torch.nn.functional.softplus(layer.dt_bias).detach()
    torch.testing.assert_close(layer.A, -torch.arange(1.0, 17).expand(2048, 16))
    assert (layer.D == 1).all()
    assert dt.min() > 0.00099
    assert dt.max() < 0.101
    share = (dt < 0.01).float().mean()  # log-uniform: half below the geometric mean
    assert abs(share - 0.5) < 0.04
    weight = layer.dt_proj.weight.detach().abs()
    assert weight.max() <= 64**-0.5
    assert abs(weight.mean() * 64**0.5 - 0.5) < 0.01
    assert layer.x_proj.weight.shape == (64 + 2 * 16, 2048)
    assert layer.x_proj.bias is None


def test_layer_forward_is_its_steps():
    torch.manual_seed(0)
    for parts in ((), ("dt",), ("B",), ("C",), ("dt", "B", "C")):
        layer = SelectiveSSM(6, 4, 2, selective=parts)
        x, z = torch.randn(2, 3, 9, 6).unbind(0)
        y, last = layer(x, z)
        h = torch.zeros(3, 6, 4)
        for t in range(9):
            y_t, h = layer.step(x[:, t], h, z[:, t])
            torch.testing.assert_close(y_t, y[:, t], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(h, last, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("part", ["dt", "B", "C"])
def test_only_what_is_selective_depends_on_the_token(part):
    torch.manual_seed(0)
    layer = SelectiveSSM(6, 4, 2, selective=(part,))
    values = dict(zip(["dt", "B", "C"], layer.select(torch.randn(1, 9, 6)), strict=True))
    for name, value in values.items():
        varies = not torch.equal(value[:, :1].expand_as(value), value)
        assert varies == (name == part)


def test_step_size_is_what_the_scan_uses():
    torch.manual_seed(0)
    layer = SelectiveSSM(6, 4, 2)
    x = torch.randn(1, 9, 6)
    _, B, C = layer.select(x)
    y = selective_scan(x, layer.step_size(x), layer.A, B, C, layer.D)
    torch.testing.assert_close(y, layer(x)[0])


# bad input


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"x": torch.ones(2, 7)},
            ValueError,
            r"x has shape \(2, 7\), expected \(batch, length, d_inner\)",
        ),
        ({"x": torch.ones(2, 7, 3, dtype=torch.int64)}, TypeError, "x has dtype torch.int64"),
        (
            {"dt": torch.ones(2, 5)},
            ValueError,
            r"dt has shape \(2, 5\), expected \(batch, length, d_inner\) = \(2, 7, 3\)",
        ),
        ({"A": torch.ones(4, 4)}, ValueError, "A has shape"),
        (
            {"A": torch.ones(3, 4, dtype=torch.complex64)},
            TypeError,
            "A has dtype torch.complex64, expected a floating",
        ),
        (
            {"B": torch.ones(2, 7, 5)},
            ValueError,
            r"B has shape .* \(batch, length, d_state\) = \(2, 7, 4\)",
        ),
        (
            {"C": torch.ones(2, 7, 4).double()},
            TypeError,
            "C has dtype torch.float64 and x torch.float32",
        ),
        ({"D": torch.ones(4)}, ValueError, r"D has shape \(4,\), expected \(d_inner\) = \(3,\)"),
        (
            {"z": None, "h0": torch.ones(2, 3)},
            ValueError,
            r"h0 has shape .* \(batch, d_inner, d_state\)",
        ),
        (
            {"dt_softplus": False},
            ValueError,
            r"dt holds -.*expected Δ ≥ 0, or dt_softplus=True",
        ),
        ({"discretization": "euler"}, ValueError, "discretization is 'euler', expected one of"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda', expected one of 'auto'"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_bad_input_is_named(change, error, message):
    inputs = problem(dtype=torch.float32) | {"dt_softplus": True} | change
    with pytest.raises(error, match=message):
        selective_scan(**inputs)


@pytest.mark.usefixtures("as_a_user")
def test_numba_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="float32 on a CPU, not torch"):
        selective_scan(**problem(), dt_softplus=True, backend="numba")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_state": 0}, "d_state is 0"),
        ({"selective": ("A",)}, "selective is 'A', expected one of 'dt', 'B', 'C'"),
        ({"dt_min": 1.0}, "dt_min is 1.0 and dt_max 0.1"),
    ],
)
def test_layer_names_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        SelectiveSSM(**{"d_inner": 4, "d_state": 2, "dt_rank": 1} | arguments)
