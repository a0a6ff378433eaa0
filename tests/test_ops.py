"""What PyTorch has to know of the compiled routines: all transforms give what the definition gives.

On a GPU the operators that have kernels there run there.
"""

import copy
import io
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import func, nn
from torch.autograd import gradcheck, gradgradcheck

from mamba_tutorial import (
    S4,
    S4D,
    MambaBlock,
    MambaConfig,
    MambaLM,
    SelectiveSSM,
    linear_scan,
    selective_scan,
)
from mamba_tutorial.ops import OPERATORS
from mamba_tutorial.selective import _checks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = ("triton",) if torch.cuda.is_available() else ("numba", "triton")


def random(*shape, dtype=torch.float32, seed=0, device=DEVICE):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def scan_inputs(batch=2, length=40, d_inner=6, d_state=4, dtype=torch.float32, device=DEVICE):
    tokens, shared = (batch, length, d_inner), (batch, length, d_state)
    shapes = {
        "x": tokens,
        "dt": tokens,
        "A": (d_inner, d_state),
        "B": shared,
        "C": shared,
        "D": (d_inner,),
        "z": tokens,
        "dt_bias": (d_inner,),
        "h0": (batch, d_inner, d_state),
    }
    given = {
        name: random(*shape, dtype=dtype, seed=k, device=device)
        for k, (name, shape) in enumerate(shapes.items())
    }
    return given | {"A": -given["A"].abs(), "dt": given["dt"] - 1}


# examples of calls, by operator: every operator must have one


def examples():
    a, b, d = (random(2, 9, 3, seed=k) for k in range(3))
    h0 = random(2, 3, seed=3)
    for method in ("sequential", "blelloch", "triton"):
        for reverse in (False, True):
            yield "linear_scan", (a.sigmoid(), b, h0, reverse, method)
            yield "linear_scan_backward", (d, a.sigmoid(), b, h0, reverse, method)
    waves = [torch.complex(t, t.flip(1)) for t in (d, a / 3, b)]
    yield "linear_scan", (*waves[1:], torch.complex(h0, h0), False, "blelloch")
    yield "linear_scan_backward", (*waves, torch.complex(h0, h0), False, "blelloch")
    fused = tuple(scan_inputs(length=20).values())
    core = *fused[:1], fused[1].abs(), *fused[2:5], None, None, None, fused[8]
    dy, dh_last = random(2, 20, 6, seed=10), random(2, 6, 4, seed=11)
    begins = random(2, 20, seed=12) > 1
    for backend in ("parallel", *KERNELS):
        given, softplus = (fused, True) if backend == "triton" else (core, False)
        for exact, marks in ((False, None), (True, None), (False, begins), (True, begins)):
            whole = *given, marks, softplus, exact, True, backend
            yield "selective_scan", whole
            starts = OPERATORS["selective_scan"](*whole)[2]
            ends = dy, dh_last, starts.detach(), softplus, exact, backend
            yield "selective_scan_backward", (*given, marks, *ends)
        for exact, reverse in ((False, False), (True, False), (False, True)):
            gate = given[6] if reverse else None
            tensors = dy if reverse else given[0], *given[1:4], gate, given[7]
            yield "selective_scan_end", (*tensors, softplus, exact, reverse, backend)
    step = [t[:, 0] if t.ndim == 3 else t for t in fused[:8]]
    yield "selective_step", (fused[8], *step[:2], fused[2], *step[3:])
    x, before, weight = random(2, 9, 5), random(2, 3, 5, seed=1), random(5, 4, seed=2)
    row = torch.arange(18, device=DEVICE).view(2, 9) % 4 == 2
    for starts in (None, row):
        yield "causal_conv", (x, before, weight, random(5, seed=3), starts)
        yield "causal_conv_backward", (random(2, 9, 5, seed=4), x, before, weight, None, starts)
    yield "causal_conv_step", (x[:, 0], before, weight, None)
    Lambda, P, B, C = (
        torch.complex(random(3, 4, seed=k), random(3, 4, seed=k + 9)) for k in range(4)
    )
    weights = torch.stack([C * B, C * P, P.conj() * B, P.conj() * P], -2)
    z = torch.exp(-2j * torch.pi * torch.arange(5, device=DEVICE) / 8).to(P)
    roots = Lambda - 3, weights, random(3).exp(), 1 - z, (1 + z) / 2
    yield "dplr_spectrum", roots
    modes = Lambda - 3, C, random(3).exp() / 9
    yield "diagonal_kernel", (*modes, 13)
    yield "diagonal_kernel_backward", (random(3, 13), *modes)
    for length in (1, 8, 13):
        given = Lambda - 3, P, B, C, random(3).exp() / 9, length
        yield "dplr_kernel", given
        truncated = OPERATORS["dplr_kernel"](*given)[1]
        yield "dplr_kernel_backward", (random(3, length), truncated, *given)
        given = *given[:2], *given[3:]
        yield "dplr_truncate", given
        yield "dplr_truncate_backward", (random(3, 4, dtype=P.dtype), *given)
    for taps in (1, 5, 9):
        signals = random(2, 3, 7, 4), random(taps, 4, seed=1)
        yield "fft_convolution", signals
        yield "fft_convolution_backward", (random(2, 3, 7, 4, seed=2), *signals)
    yield (
        "fft_convolution",
        (random(7, 4, dtype=torch.complex64), random(5, 4, dtype=torch.complex64)),
    )
    yield "dplr_spectrum_backward", (torch.complex(random(3, 5), random(3, 5, seed=1)), *roots)


EXAMPLES = list(examples())
IDS = [f"{name}-{k}" for k, (name, _) in enumerate(EXAMPLES)]


def test_every_operator_has_an_example():
    assert {name for name, _ in EXAMPLES} == set(OPERATORS)


def kind(name, arguments):
    """What PyTorch is told of a call: which tensors, which method; not sizes and flags.

    A size of one is a kind of its own, to PyTorch, too.
    """
    told = {torch.Tensor: lambda a: (a.ndim, a.dtype), int: lambda a: a == 1, bool: type}
    return name, *(told.get(type(a), lambda a: a)(a) for a in arguments)


KINDS = {kind(*example): example for example in EXAMPLES}.values()


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(("name", "arguments"), KINDS, ids=[name for name, _ in KINDS])
def test_pytorch_is_told_the_truth(name, arguments):
    """Schema, shapes without numbers, and gradients, as PyTorch's own check sees them."""
    leaves = [
        a.detach().clone().requires_grad_(a.dtype != torch.bool)
        if isinstance(a, torch.Tensor)
        else a
        for a in arguments
    ]
    if name.startswith("dplr_spectrum"):  # at given roots
        leaves[-2:] = arguments[-2:]
    torch.library.opcheck(OPERATORS[name].op, tuple(leaves))


FUSIBLE = [example for example in EXAMPLES if OPERATORS[example[0]].fusible]


@pytest.mark.parametrize(("name", "arguments"), FUSIBLE, ids=[name for name, _ in FUSIBLE])
def test_what_a_compiler_fuses_is_the_definition(name, arguments):
    operator = OPERATORS[name]
    leaves = [wide(a).requires_grad_() for a in arguments if isinstance(a, torch.Tensor)]
    calls = [f(*leaves, *arguments[len(leaves) :]) for f in (operator.fusible, operator.definition)]
    results = [call if isinstance(call, torch.Tensor) else call[0] for call in calls]
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
    d = torch.randn_like(results[0])
    for ours, expected in zip(*(torch.autograd.grad(r, leaves, d) for r in results), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)


def wide(tensor):
    double = torch.complex128 if tensor.is_complex() else torch.float64
    return tensor.detach().to(double)


@pytest.mark.parametrize(("name", "arguments"), EXAMPLES, ids=IDS)
def test_a_kernel_computes_its_definition(name, arguments):
    operator = OPERATORS[name]
    results, expected = operator(*arguments), operator.definition(*arguments)
    if isinstance(results, torch.Tensor):
        results, expected = (results,), (expected,)
    for result, exact in zip(results, expected, strict=False):
        torch.testing.assert_close(result, exact.to(result.dtype), rtol=2e-5, atol=2e-5)


def test_second_derivatives_of_linear_scan():  # test_scan has the first ones
    for dtype in (torch.float64, torch.complex128):
        a, b = (
            torch.randn(1, 5, 2, dtype=dtype, device=DEVICE, requires_grad=True) for _ in range(2)
        )
        h0 = torch.randn(1, 2, dtype=dtype, device=DEVICE, requires_grad=True)
        for reverse in (False, True):
            for method in ("sequential", "blelloch"):

                def run(a, b, h0, reverse=reverse, method=method):
                    return linear_scan(a, b, h0, reverse=reverse, method=method)

                assert gradgradcheck(run, (a, b, h0))


@pytest.mark.parametrize("rule", ["mamba", "zoh"])
def test_first_and_second_derivatives_of_the_selective_scan(rule):
    given = scan_inputs(1, 3, 2, 2, dtype=torch.float64)

    def run(*values, backend="parallel"):
        return selective_scan(
            **dict(zip(given, values, strict=True)),
            dt_softplus=True,
            return_last_state=True,
            discretization=rule,
            backend=backend,
        )

    leaves = [tensor.requires_grad_() for tensor in given.values()]
    assert gradcheck(run, leaves)
    assert gradgradcheck(run, leaves)


@pytest.mark.parametrize("backend", ["parallel", *KERNELS])
@pytest.mark.parametrize("rule", ["mamba", "zoh"])
def test_second_derivatives_on_every_backend(backend, rule):
    """A gradient penalty, against the loop in float64."""

    def penalty(backend, dtype):
        leaves = {k: v.to(dtype).requires_grad_() for k, v in scan_inputs().items()}
        options = {"dt_softplus": True, "discretization": rule, "backend": backend}
        y, h = selective_scan(**leaves, **options, return_last_state=True)
        loss = y.sum() + h.square().sum()
        gradients = torch.autograd.grad(loss, [leaves["x"], leaves["dt"]], create_graph=True)
        return torch.autograd.grad(
            sum(g.square().sum() for g in gradients), list(leaves.values()), allow_unused=True
        )

    for result, exact in zip(
        penalty(backend, torch.float32), penalty("sequential", torch.float64), strict=True
    ):
        scale = exact.abs().max()
        torch.testing.assert_close(result.double() / scale, exact / scale, rtol=0, atol=2e-5)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler has many of its own
@pytest.mark.parametrize("backend", ["parallel", *KERNELS])
def test_sequences_in_a_row_under_every_transform(backend):
    given, starts = scan_inputs(2, 9, 3, 2), random(2, 9, seed=12) > 0.5
    x = given.pop("x")

    def scan(x, starts, backend=backend):
        return selective_scan(x, **given, dt_softplus=True, backend=backend, starts=starts)

    def one(x, z, starts, backend):
        shared = {k: given[k][:1] for k in ("dt", "B", "C", "h0")}
        rest = {k: given[k] for k in ("A", "D", "dt_bias")} | {"starts": starts[None]}
        y = selective_scan(x[None], **shared, **rest, z=z[None], dt_softplus=True, backend=backend)
        return y.square().sum()

    def results(backend):
        yield func.jvp(lambda x: scan(x, starts, backend), (x,), (x.cos(),))[1]
        yield func.vmap(func.grad(partial(one, backend=backend)))(x, given["z"], starts)
        yield func.hessian(lambda x: scan(x, starts, backend).square().sum())(x)

    for result, exact in zip(results(backend), results("sequential"), strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    leaf = x.detach().clone().requires_grad_()
    for run in (scan, compiled):
        y = run(leaf, starts)
        torch.testing.assert_close(y, scan(x, starts, "sequential"), rtol=1e-4, atol=1e-4)
        (found,) = torch.autograd.grad(y.square().sum(), leaf)
        (right,) = torch.autograd.grad(scan(leaf, starts, "sequential").square().sum(), leaf)
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [lambda: S4(3, 4), lambda: S4D(3, 4)], ids=["S4", "S4D"])
def test_second_derivatives_of_the_layers(make):
    """A product of the Hessian with a vector, against differences of gradients, in float64."""
    torch.manual_seed(0)
    layer, x = make().double().to(DEVICE), random(2, 6, 3, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    direction = {
        name: random(*p.shape, dtype=torch.float64, seed=k)
        for k, (name, p) in enumerate(parameters.items())
    }

    def gradient(values):
        return func.grad(lambda v: func.functional_call(layer, v, (x,)).square().sum())(values)

    def moved(step):
        return {name: p + step * direction[name] for name, p in parameters.items()}

    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    loss = func.functional_call(layer, leaves, (x,)).square().sum()
    first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    product = sum((g * d).sum() for g, d in zip(first, direction.values(), strict=True))
    exact = torch.autograd.grad(product, list(leaves.values()))
    ahead, behind = gradient(moved(1e-5)), gradient(moved(-1e-5))
    for name, value in zip(leaves, exact, strict=True):
        difference = (ahead[name] - behind[name]) / 2e-5
        torch.testing.assert_close(value, difference, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("backend", ["parallel", *KERNELS])
def test_transforms_of_functions(backend):
    given = scan_inputs(3, 5, 4, 2)
    x = given.pop("x")

    def scan(x, backend=backend):
        return selective_scan(x, **given, dt_softplus=True, backend=backend)

    def one(x, z, backend=backend):
        shared = {k: given[k][:1] for k in ("dt", "B", "C", "h0")}
        rest = {k: given[k] for k in ("A", "D", "dt_bias")}
        y = selective_scan(x[None], **shared, **rest, z=z[None], dt_softplus=True, backend=backend)
        return y.square().sum()

    def all_of_them(backend):
        yield func.grad(lambda x: scan(x, backend).square().sum())(x)
        yield func.jvp(lambda x: scan(x, backend), (x,), (x.cos(),))[1]
        yield func.vmap(lambda x, z: one(x, z, backend))(x, given["z"])
        yield func.vmap(func.grad(lambda x, z: one(x, z, backend)))(x, given["z"])  # each sample's
        yield func.hessian(lambda x: scan(x, backend).square().sum())(x[:, :, :])
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x.sin())
            tangent = torch.autograd.forward_ad.unpack_dual(scan(dual, backend)).tangent
        yield tangent

    for result, exact in zip(all_of_them(backend), all_of_them("sequential"), strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-4, atol=1e-4)


def test_transforms_of_linear_scan_and_of_a_block():
    a, b = random(3, 5, 2).sigmoid(), random(3, 5, 2, seed=1)
    torch.testing.assert_close(
        func.vmap(lambda a, b: linear_scan(a[None], b[None])[0])(a, b), linear_scan(a, b)
    )
    none = func.vmap(lambda a, b: linear_scan(a[None], b[None])[0])(a[:0], b[:0])
    assert none.shape == a[:0].shape
    tangent = func.jvp(lambda a: linear_scan(a, b), (a,), (a,))[1]
    difference = (linear_scan(a * 1.01, b) - linear_scan(a * 0.99, b)) / 0.02
    torch.testing.assert_close(tangent, difference, rtol=1e-2, atol=1e-3)
    torch.manual_seed(0)
    block, u = MambaBlock(MambaConfig(16, 1, 11)).to(DEVICE), random(3, 5, 16)
    torch.testing.assert_close(func.vmap(lambda u: block(u[None])[0])(u), block(u))
    parameters = dict(block.named_parameters())

    def loss(parameters, u):
        return func.functional_call(block, parameters, (u[None],)).square().sum()

    each = func.vmap(func.grad(loss), in_dims=(None, 0))(parameters, u)
    for k in range(3):
        alone = torch.autograd.grad(loss(parameters, u[k]), list(parameters.values()))
        for name, gradient in zip(parameters, alone, strict=True):
            torch.testing.assert_close(each[name][k], gradient, rtol=1e-4, atol=1e-5)


# modules, as a user compiles and exports them; without the checks of signatures that tests add


def modules():
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(16, 2, 11))
    return {
        "MambaLM": (model, torch.randint(11, (2, 7))),
        "MambaBlock": (MambaBlock(MambaConfig(16, 1, 11)), torch.randn(2, 7, 16)),
        "SelectiveSSM": (SelectiveSSM(8, 4, 2), torch.randn(2, 7, 8)),
        "S4": (S4(4, 8), torch.randn(2, 7, 4)),
        "S4D": (S4D(4, 8), torch.randn(2, 7, 4)),
    }


def outputs_and_gradients(module, run, given):
    y = run(given)
    y = y if isinstance(y, torch.Tensor) else y[0]
    gradients = torch.autograd.grad(y.square().mean(), list(module.parameters()))
    return [y, *gradients]


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.filterwarnings("ignore")  # PyTorch's compiler has many of its own
@pytest.mark.parametrize("name", ["MambaLM", "MambaBlock", "SelectiveSSM", "S4", "S4D"])
def test_compiled_modules_give_the_same(name):
    module, given = modules()[name]
    module, given = module.to(DEVICE), given.to(DEVICE)
    backend = "inductor" if torch.cuda.is_available() else "aot_eager"
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for result, expected in zip(
        outputs_and_gradients(module, compiled, given),
        outputs_and_gradients(module, module, given),
        strict=True,
    ):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.filterwarnings("ignore")
def test_an_exported_model_takes_every_batch_and_length_after_saving_and_loading():
    model, ids = modules()["MambaLM"]
    model, ids = model.to(DEVICE).eval(), ids.to(DEVICE)
    sizes = {0: torch.export.Dim("batch", min=2, max=64)}
    sizes[1] = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(model, (ids,), dynamic_shapes=(sizes,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    run = torch.export.load(file).module()
    for size in ((2, 2), (3, 7), (2, 33), (5, 300)):
        ids = torch.randint(11, size, device=DEVICE)
        torch.testing.assert_close(run(ids), model(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.filterwarnings("ignore")
def test_a_traced_model_gives_the_same():
    model, ids = modules()["MambaLM"]
    with torch.no_grad():
        traced = torch.jit.trace(model, (ids,))
        torch.testing.assert_close(traced(ids), model(ids))


def test_layers_are_built_without_numbers():
    for make in (lambda: S4(4, 8), lambda: S4D(4, 8), lambda: MambaLM(MambaConfig(16, 2, 11))):
        with torch.device("meta"):
            layer = make()
        assert all(parameter.is_meta for parameter in layer.parameters())
        expected = {name: p.shape for name, p in make().named_parameters()}
        assert {name: p.shape for name, p in layer.named_parameters()} == expected


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
def test_a_training_step_is_captured_in_a_cuda_graph():
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(64, 2, 11)).cuda()
    reference = copy.deepcopy(model)
    ids = torch.randint(11, (4, 33), device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad(set_to_none=False)
        logits = model(ids[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    model.load_state_dict(reference.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        graph.replay()
    model, replayed = reference, copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(replayed[name], value, rtol=1e-4, atol=1e-5)


@needs_gpu
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # of PyTorch's own warm-up
def test_a_block_becomes_a_graphed_callable():
    torch.manual_seed(0)
    block = MambaBlock(MambaConfig(64, 1, 11)).cuda()
    x = torch.randn(2, 33, 64, device="cuda", requires_grad=True)
    expected = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    graphed = torch.cuda.make_graphed_callables(
        copy.deepcopy(block), (x.detach().requires_grad_(),)
    )
    leaf = x.detach().clone().requires_grad_()
    result = torch.autograd.grad(graphed(leaf).square().sum(), [leaf, *graphed.parameters()])
    for value, exact in zip(result, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-4)


# an optional accelerator never takes an ability away


def in_a_process(code, **environment):
    root = Path(__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(root), **environment},
    )
    assert result.returncode == 0, result.stderr
    return result


MODEL = """
import torch
from mamba_tutorial import MambaConfig, MambaLM
model = MambaLM(MambaConfig(16, 1, 11))
model(torch.randint(11, (2, 7))).sum().backward()
model(torch.randint(11, (2, 7)))
"""


def test_a_numba_that_cannot_be_imported_is_done_without(tmp_path):
    (tmp_path / "numba.py").write_text('raise ImportError("Numba needs NumPy 2.2 or less")')
    result = in_a_process(f"import sys; sys.path.insert(0, {str(tmp_path)!r})" + MODEL)
    assert result.stderr.count("Numba cannot be used (ImportError: Numba needs NumPy 2.2") == 1


def test_a_numba_that_cannot_compile_is_done_without():
    broken = "import numba; numba.njit = lambda **options: lambda function: 1 / 0\n"
    result = in_a_process(broken + MODEL)
    assert result.stderr.count("Numba cannot be used (ZeroDivisionError") == 1


def test_a_numba_that_cannot_keep_what_it_compiles_compiles_without():
    no_place = """
import numba.core.caching as caching
caching.CacheImpl._locator_classes = []
from mamba_tutorial.kernels import cpu
"""
    result = in_a_process(no_place + MODEL)
    assert "Numba" not in result.stderr


def test_a_forked_process_scans_after_its_parent():
    code = """
import os, sys, torch
from mamba_tutorial import selective_scan
torch.set_num_threads(2)
x, B = torch.randn(2, 40, 130), torch.randn(2, 40, 8)
def scan():
    return selective_scan(x, x.abs(), -torch.ones(130, 8), B, B, backend="numba")
before = scan()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(scan(), before) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    if hasattr(os, "fork"):
        in_a_process(code)


def test_one_pool_of_threads_serves_all_sizes():
    code = """
import threading, torch
from mamba_tutorial import selective_scan
from mamba_tutorial.kernels.cpu import MOST_THREADS
torch.set_num_threads(8)
for batch in range(1, 17):
    x, B = torch.randn(batch, 8, 70), torch.randn(batch, 8, 2)
    selective_scan(x, x.abs(), -torch.ones(70, 2), B, B, backend="numba")
assert threading.active_count() <= 1 + MOST_THREADS, threading.active_count()
"""
    in_a_process(code)


def test_a_scan_on_a_cpu_leaves_the_environment_alone():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = MODEL + "import os; assert 'TRITON_INTERPRET' not in os.environ"
    root = str(Path(__file__).parents[1])
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**environment, "PYTHONPATH": root}
    )


def test_the_fastest_way_is_chosen_late(monkeypatch):
    """So that a traced program does not depend on what was installed when it was traced."""
    given = scan_inputs(dtype=torch.float32, device="cpu")
    expected = selective_scan(**given, dt_softplus=True, backend="parallel")
    monkeypatch.setattr(_checks, "installed", lambda library: False)
    torch.testing.assert_close(selective_scan(**given, dt_softplus=True), expected, rtol=0, atol=0)


def test_the_convolution_knows_the_tokens_before():
    operator = OPERATORS["causal_conv"]
    x, before, weight = (
        random(2, 9, 5).requires_grad_(),
        random(2, 3, 5, seed=1).requires_grad_(),
        random(5, 4, seed=2).requires_grad_(),
    )
    result = torch.autograd.grad(operator(x, before, weight, None, None).sum(), [x, before, weight])
    expected = torch.autograd.grad(
        operator.definition(x, before, weight, None, None).sum(), [x, before, weight]
    )
    for value, exact in zip(result, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-5)
