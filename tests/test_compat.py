"""The official function against its definition in float64, and transformers' Mamba with ours."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from mamba_tutorial import compat
from mamba_tutorial.compat import selective_scan_fn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(B="shared", C="shared", dtype=torch.float32, length=19, seed=0):
    batch, dim, dstate = 2, 4, 8
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    shapes = {
        "shared": (batch, dstate, length),
        "two groups": (batch, 2, dstate, length),
        "four groups": (batch, 4, dstate, length),
        "constant": (dim, dstate),
    }
    kind = {key: torch.float32 if key == "constant" else dtype for key in shapes}
    return {
        "u": random(batch, dim, length, dtype=dtype),
        "delta": 0.5 * random(batch, dim, length, dtype=dtype),
        "A": -0.5 * random(dim, dstate).abs(),
        "B": random(*shapes[B], dtype=kind[B]),
        "C": random(*shapes[C], dtype=kind[C]),
        "D": random(dim),
        "z": random(batch, dim, length, dtype=dtype),
        "delta_bias": 0.5 * random(dim),
    }


def definition(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=True):
    """Token by token, in the official layout."""
    batch, dim, length = u.shape

    def at(shared, t):  # (batch or 1, dim, dstate)
        if shared.ndim == 2:
            return shared[None]
        shared = shared[:, None] if shared.ndim == 3 else shared
        return shared[..., t].repeat_interleave(dim // shared.shape[1], dim=1)

    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = F.softplus(delta) if delta_softplus else delta
    h, outputs = u.new_zeros(batch, dim, A.shape[1]), []
    for t in range(length):
        step = delta[:, :, t, None]
        h = torch.exp(step * A) * h + step * at(B, t) * u[:, :, t, None]
        outputs.append((h * at(C, t)).sum(-1))
    y = torch.stack(outputs, -1)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), h


FORMS = ["shared", "two groups", "four groups", "constant"]


def compare(given, tolerance, **options):
    leaves = {n: t.detach().requires_grad_() for n, t in given.items()}
    wide = {n: t.detach().double().requires_grad_() for n, t in given.items()}
    found = selective_scan_fn(
        **leaves, return_last_state=True, **{"delta_softplus": True} | options
    )
    right = definition(**wide, **options)
    assert found[0].dtype == given["u"].dtype
    upstream = [torch.randn_like(r) for r in right]
    found += torch.autograd.grad(
        found, list(leaves.values()), [d.to(f) for d, f in zip(upstream, found, strict=True)]
    )
    right += torch.autograd.grad(right, list(wide.values()), upstream)
    for name, value, wanted in zip(["y", "last", *given], found, right, strict=True):
        assert value.shape == wanted.shape
        error = (value - wanted).abs().max() / (wanted.abs().max() + 1e-3)
        assert error < tolerance, name


@pytest.mark.parametrize(("B", "C"), list(itertools.product(FORMS, FORMS)))
def test_every_form_of_B_and_C_with_all_gradients(B, C):
    compare(problem(B, C), 2e-5)


@pytest.mark.parametrize("without", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
@pytest.mark.parametrize("form", ["shared", "constant"])
def test_without_optional_inputs(without, form):
    compare({n: t for n, t in problem(form).items() if n not in without}, 2e-5)


def test_without_softplus():
    given = problem()
    given["delta"], given["delta_bias"] = given["delta"].abs(), given["delta_bias"].abs()
    compare(given, 2e-5, delta_softplus=False)


@pytest.mark.parametrize("form", ["shared", "two groups", "constant"])
def test_half_precision(form):
    compare(problem(form, form, dtype=torch.bfloat16), 2e-2)


# The cases and tolerances of the official test, test_selective_scan in mamba_ssm's repository, with
# those that it has in comments. The inputs are drawn as there, two sequences of four channels and
# eight states; the reference is ours, in float64.

LENGTHS = [8, 16, 32, 64, 128, 256, 372, 512, 784, 1024, 1134, 2048, 4096]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCES = {  # relative and absolute
    torch.float32: (6e-4, 2e-3),
    torch.float16: (3e-3, 5e-3),
    torch.bfloat16: (3e-2, 5e-2),
}


def official_case(dtype, length, B="shared", C="shared", without=()):
    """Outputs and all gradients of the official case, and how far off each may be."""
    given = problem(B, C, dtype, length)
    generator = torch.Generator().manual_seed(1)
    for name, scale in (("A", -0.5), ("delta", 0.5), ("delta_bias", 0.5)):
        uniform = torch.rand(given[name].shape, generator=generator)
        given[name] = (scale * uniform).to(given[name])
    given = {name: tensor for name, tensor in given.items() if name not in without}
    rtol, atol = TOLERANCES[dtype]
    weights = max(1e-3, rtol * ("z" in given)), max(1e-3, atol * ("z" in given))
    limits = {name: (rtol, atol) for name in ("y", "last", "z", "B", "C")}
    limits |= {"u": (2 * rtol, 2 * atol), "delta": (5 * rtol, 10 * atol)}
    limits |= {"A": (weights[0], 5 * weights[1]), "D": weights, "delta_bias": weights}
    return given, limits


def assert_official(given, limits, softplus=True):
    ours = {name: t.detach().requires_grad_() for name, t in given.items()}
    exact = {name: t.detach().cpu().double().requires_grad_() for name, t in given.items()}
    found = selective_scan_fn(**ours, delta_softplus=softplus, return_last_state=True)
    right = definition(**exact, delta_softplus=softplus)
    upstream = torch.randn(found[0].shape, generator=torch.Generator().manual_seed(2))
    upstream = upstream.to(found[0])
    results = *found, *torch.autograd.grad(found[0], list(ours.values()), upstream)
    wanted = *right, *torch.autograd.grad(right[0], list(exact.values()), upstream.cpu().double())
    for name, value, reference in zip(["y", "last", *given], results, wanted, strict=True):
        rtol, atol = limits[name]
        torch.testing.assert_close(
            value.cpu().double(), reference, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("groups", ["shared", "two groups"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS if DEVICE == "cuda" else [8, 128, 372])
def test_the_official_cases(length, dtype, groups):
    assert_official(*official_case(dtype, length, groups, groups))


@pytest.mark.parametrize("without", [(), ("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_official_cases_without_options(dtype, softplus, without):
    assert_official(*official_case(dtype, 128, without=without), softplus)


@pytest.mark.parametrize(("B", "C"), [("constant", "shared"), ("shared", "constant"),
                                      ("constant", "constant")])  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_official_cases_with_constants(dtype, B, C):
    assert_official(*official_case(dtype, 128, B, C))


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("name", ["A", "B", "C"])
def test_the_official_complex_case_is_refused_by_name(name):
    given, _ = official_case(torch.float32, 128)
    given[name] = given[name].to(torch.complex64)
    with pytest.raises(TypeError, match=f"{name} has dtype torch.complex64, expected a real one"):
        selective_scan_fn(**given, delta_softplus=True)


def test_constants_are_rounded_once():
    given = problem("constant", "constant", torch.bfloat16)
    y = selective_scan_fn(**given, delta_softplus=True)
    exact = definition(**{name: tensor.double() for name, tensor in given.items()})[0]
    assert (y == exact.bfloat16()).double().mean() > 0.98


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("form", ["shared", "constant"])
def test_negative_steps_are_refused_by_their_name(form):
    with pytest.raises(ValueError, match=r"delta holds -.*, expected .* delta_softplus=True"):
        selective_scan_fn(**problem(form, form))


def test_the_output_alone():
    given = problem()
    y = selective_scan_fn(**given, delta_softplus=True)
    torch.testing.assert_close(y, selective_scan_fn(**given, delta_softplus=True,
                                                    return_last_state=True)[0])  # fmt: skip


@pytest.mark.usefixtures("as_a_user")
def test_bad_input():
    given = problem()
    bad = {
        "A has dtype torch.complex64, expected a real one": {"A": given["A"].to(torch.complex64)},
        "B has 3 groups, expected a number that divides the 4 channels": {
            "B": given["B"][:, None].expand(-1, 3, -1, -1)
        },
        "B has shape": {"B": given["B"][:, :3]},
        "C has shape": {"C": given["C"].mT},
        "A has shape": {"A": given["A"][:2]},
        "delta_softplus is": {"delta_softplus": 1},
        "u is a list": {"u": [1.0]},
    }
    for message, change in bad.items():
        with pytest.raises((TypeError, ValueError), match=message):
            selective_scan_fn(**given | change)


def model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=37, hidden_size=24, state_size=8, num_hidden_layers=2, time_step_rank=3
    )
    return transformers.MambaForCausalLM(config).to(DEVICE)


def test_transformers_gives_the_same_with_our_scan(monkeypatch):
    made, ids = model(), torch.randint(37, (2, 21), device=DEVICE)
    names = [name for name, _ in made.named_parameters()]

    def results():
        loss = made(ids, labels=ids).loss
        return [loss, *torch.autograd.grad(loss, list(made.parameters()))]

    before = results()
    calls, ours = [], compat.selective_scan_fn
    monkeypatch.setattr(
        compat, "selective_scan_fn", lambda *g, **o: calls.append(1) or ours(*g, **o)
    )
    with compat.patched_transformers():
        during = results()
    assert len(calls) == 2  # one for each layer
    assert torch.equal(results()[0], before[0])
    assert len(calls) == 2
    for name, value, wanted in zip(["loss", *names], during, before, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-5, msg=name)


def test_transformers_writes_the_same_with_our_step(monkeypatch):
    made, ids = model().eval(), torch.randint(37, (2, 9), device=DEVICE)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    before = made.generate(ids, **options)
    calls, ours = [], compat.selective_step
    monkeypatch.setattr(compat, "selective_step", lambda *g: calls.append(1) or ours(*g))
    with compat.patched_transformers():
        assert torch.equal(made.generate(ids, **options), before)
    assert len(calls) == 2 * 11  # two layers, eleven tokens after the first new one


def test_the_patch_ends_with_an_error_too():
    where = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    scan = where.mamba_selective_scan

    def fails():
        with compat.patched_transformers():
            assert where.mamba_selective_scan is not scan
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert where.mamba_selective_scan is scan
