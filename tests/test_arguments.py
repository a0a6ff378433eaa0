"""Every public function, called with odd arguments: a right answer, or an error that names them."""

import copy
import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mamba_tutorial import (
    S4,
    S4D,
    DiscreteStateSpace,
    MambaBlock,
    MambaConfig,
    MambaLM,
    SelectiveSSM,
    StateSpace,
    bilinear,
    causal_convolution,
    euler,
    hippo_legs,
    linear_scan,
    selective_scan,
    selective_step,
    zoh,
)
from mamba_tutorial._check import HAS_TRITON, installed
from mamba_tutorial.attention import Transformer, TransformerConfig, alibi_slopes, rotary
from mamba_tutorial.compat import selective_scan_fn
from mamba_tutorial.discretize import exprel, exprel_slope, matrix_exp_and_exprel
from mamba_tutorial.generation import sample
from mamba_tutorial.hippo import basis, dplr, hippo_fourier, hippo_legt, nplr, online_memory
from mamba_tutorial.s4 import diagonal_init, diagonal_kernel, dplr_kernel, truncate
from mamba_tutorial.scan import ALGORITHMS, trace
from mamba_tutorial.selective import inverse_softplus
from mamba_tutorial.tasks import (
    associative_recall,
    copying,
    induction_heads,
    next_token,
    parity,
    selective_copying,
)

# The checks of the package are tested, not those that the tests put before every function.
pytestmark = pytest.mark.usefixtures("as_a_user")

GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.tensor([[1, 2, 3], [4, 0, 1]])


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=GENERATOR, dtype=dtype)


def seeded(task):
    """The task with a generator of its own for each call, so that equal calls agree."""
    return lambda batch, **sizes: task(batch, torch.Generator().manual_seed(0), **sizes)


def stable(*shape, dtype=torch.float32):
    return -normal(*shape, dtype=dtype).abs() - 0.1


def modes(*shape):
    return torch.complex(stable(*shape), normal(*shape))


A = torch.diag(stable(3)) + torch.triu(normal(3, 3), 1)
SYSTEM = {"B": normal(3, 2), "C": normal(1, 3), "D": normal(1, 2)}
STEPS = {"A_bar": A / 4, "B_bar": SYSTEM["B"], "C": SYSTEM["C"], "D": SYSTEM["D"]}
SIGNAL = {"x": normal(2, 5, 2), "h0": normal(2, 3)}
SCAN = {"a": torch.rand(2, 5, 3), "b": normal(2, 5, 3), "h0": normal(2, 3), "reverse": False}
DPLR = {name: modes(2, 4) for name in ("Lambda", "P", "B", "C_truncated")}
TOKEN = {
    "x": normal(2, 4),
    "dt": torch.rand(2, 4),
    "A": stable(4, 3),
    "B": normal(2, 3),
    "C": normal(2, 3),
    "D": normal(4),
    "z": normal(2, 4),
    "dt_bias": torch.rand(4),
    "dt_softplus": True,
    "discretization": "zoh",
}
ONE_BY_ONE = ("x", "dt", "B", "C", "z")
TOKENS = TOKEN | {n: TOKEN[n][:, None].expand(-1, 5, -1).clone() for n in ONE_BY_ONE}
TOKENS |= {"h0": normal(2, 4, 3), "return_last_state": True, "backend": "sequential"}
OFFICIAL = {
    "u": normal(2, 4, 5),
    "delta": torch.rand(2, 4, 5),
    "A": stable(4, 3),
    "B": normal(2, 2, 3, 5),
    "C": normal(2, 3, 5),
    "D": normal(4),
    "z": normal(2, 4, 5),
    "delta_bias": torch.rand(4),
    "delta_softplus": True,
    "return_last_state": True,
}
SIZES = {"dt_min": 1e-3, "dt_max": 0.1}
CONFIG = {"d_model": 4, "n_layer": 2, "vocab_size": 6, "d_state": 3, "norm_eps": 1e-5, **SIZES}
CONFIG |= {"dt_rank": 2, "conv_bias": True, "bias": False, "expand": 2, "d_conv": 3}
ATTENTION = {"d_model": 8, "n_layer": 2, "vocab_size": 6, "n_head": 2, "position": "absolute"}
ATTENTION |= {"max_length": 40, "d_hidden": 8, "norm_eps": 1e-5}
SAMPLING = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.01}


class Call(NamedTuple):
    """A function, arguments that it takes, and the shape of (the first of) what it returns then."""

    function: Callable
    arguments: dict
    shape: Callable[..., tuple] | None = None
    in_double: Callable | None = None  # the same for double precision; None for the function


def method(module: nn.Module, name: str, arguments: dict, shape: Callable | None = None) -> Call:
    double = copy.deepcopy(module).double()
    return Call(getattr(module, name), arguments, shape, getattr(double, name))


torch.manual_seed(0)
BLOCK, MODEL = MambaBlock(MambaConfig(**CONFIG)), MambaLM(MambaConfig(**CONFIG))
DOUBLE, SSM = copy.deepcopy(MODEL).double(), SelectiveSSM(4, 3, 2)
LAYERS = {"S4": S4(3, 4), "S4D": S4D(3, 4)}
PEER = Transformer(TransformerConfig(**ATTENTION))
SEQUENCE, STATE = normal(2, 5, 4), BLOCK.initial_state(2)
PROMPT = {"ids": IDS, "state": MODEL.initial_state(2)}
DRAWS = PROMPT | SAMPLING | {"max_new_tokens": 2, "eos": 3, "generator": None}
DRAWS |= {"repetition_penalty": 1.2}
like_x = lambda x, **_: x.shape  # noqa: E731

CALLS = {
    "zoh": Call(zoh, {"A": A, "B": SYSTEM["B"], "dt": 0.1}),
    "bilinear": Call(bilinear, {"A": A, "B": SYSTEM["B"], "dt": torch.rand(2) + 0.1}),
    "euler": Call(euler, {"A": A, "B": SYSTEM["B"], "dt": torch.tensor(0.1), "diagonal": False}),
    "zoh of diagonals": Call(
        lambda **given: zoh(**given, diagonal=True), {"A": modes(2, 3), "B": modes(3), "dt": 0.1}
    ),
    "exprel": Call(exprel, {"z": stable(4)}, lambda z: z.shape),
    "exprel_slope": Call(exprel_slope, {"z": stable(4)}, lambda z: z.shape),
    "matrix_exp_and_exprel": Call(matrix_exp_and_exprel, {"Z": A}, lambda Z: Z.shape),
    "hippo_legs": Call(hippo_legs, {"n": 3}, lambda n: (n, n)),
    "hippo_legt": Call(hippo_legt, {"n": 3, "window": 2.0}, lambda n, window: (n, n)),
    "hippo_fourier": Call(hippo_fourier, {"n": 3, "window": 2.0}, lambda n, window: (n, n)),
    "nplr": Call(nplr, {"n": 3}, lambda n: (n, n)),
    "dplr": Call(dplr, {"n": 4}, lambda n: (n,)),
    "basis": Call(
        basis,
        {"position": torch.rand(4), "n": 3, "measure": "legs"},
        lambda position, n, measure: (*position.shape, n),
    ),
    "online_memory": Call(
        online_memory,
        {"x": normal(2, 5), "n": 3, "measure": "legt", "window": 4.0},
        lambda x, n, measure, window: (*x.shape, n),
    ),
    "StateSpace": Call(StateSpace, {"A": A, **SYSTEM}),
    "DiscreteStateSpace": Call(DiscreteStateSpace, STEPS),
    "discretize": Call(
        lambda dt, method, **system: StateSpace(**system).discretize(dt, method),
        {"A": A, **SYSTEM, "dt": 0.1, "method": "zoh"},
    ),
    "simulate": Call(
        lambda x, dt, h0, between, **system: StateSpace(**system).simulate(
            x, dt, h0, between=between
        ),
        {"A": A, **SYSTEM, **SIGNAL, "dt": 0.1, "between": "line"},
        lambda x, C, **_: (*x.shape[:-1], len(C)),
    ),
    "impulse_response": Call(
        lambda t, **system: StateSpace(**system).impulse_response(t),
        {"A": A, **SYSTEM, "t": torch.rand(4)},
        lambda t, B, C, **_: (*t.shape, len(C), B.shape[1]),
    ),
    "recur": Call(
        lambda x, h0, **system: DiscreteStateSpace(**system).recur(x, h0),
        STEPS | SIGNAL,
        lambda x, C, **_: (*x.shape[:-1], len(C)),
    ),
    "convolve": Call(
        lambda x, method, **system: DiscreteStateSpace(**system).convolve(x, method),
        {**STEPS, "x": SIGNAL["x"], "method": "direct"},
        lambda x, C, **_: (*x.shape[:-1], len(C)),
    ),
    "kernel": Call(
        lambda length, **system: DiscreteStateSpace(**system).kernel(length),
        {**STEPS, "length": 4},
        lambda length, B_bar, C, **_: (length, len(C), B_bar.shape[1]),
    ),
    "causal_convolution": Call(
        causal_convolution, {"x": SIGNAL["x"], "kernel": normal(3, 2), "method": "fft"}, like_x
    ),
    "linear_scan": Call(linear_scan, SCAN | {"method": "blelloch"}, lambda a, **_: a.shape),
    "trace": Call(lambda length: trace(ALGORITHMS["blelloch"], length), {"length": 4}),
    "diagonal_init": Call(diagonal_init, {"n": 4, "kind": "lin"}, lambda n, kind: (n // 2,)),
    "diagonal_kernel": Call(
        diagonal_kernel,
        {"A_bar": modes(2, 4) / 4, "CB_bar": modes(2, 4), "length": 5},
        lambda A_bar, CB_bar, length: (*(A_bar * CB_bar).shape[:-1], length),
    ),
    "dplr_kernel": Call(dplr_kernel, DPLR | {"dt": torch.rand(2) + 0.1, "length": 5}),
    "truncate": Call(truncate, {"C": modes(2, 4), "A_bar": modes(2, 4, 4) / 8, "length": 5}),
    "S4": Call(S4, {"d_model": 3, "d_state": 4, **SIZES}),
    "S4D": Call(S4D, {"d_model": 3, "d_state": 4, "init": "legs", **SIZES}),
    "S4D of eigenvalues": Call(S4D, {"d_model": 3, "d_state": 4, "init": modes(2), **SIZES}),
    **{
        f"{name}.{call}": method(layer, call, arguments, shape)
        for name, layer in LAYERS.items()
        for call, arguments, shape in (
            ("forward", {"x": normal(2, 5, 3)}, like_x),
            ("step", {"x": normal(2, 3), "state": layer.initial_state(2)}, like_x),
            ("kernel", {"length": 5}, lambda length: (3, length)),
            ("initial_state", {"batch": 2}, None),
        )
    },
    "selective_scan": Call(selective_scan, TOKENS, like_x),
    "selective_step": Call(selective_step, {"h": TOKENS["h0"], **TOKEN}, like_x),
    "selective_scan_fn": Call(selective_scan_fn, OFFICIAL, lambda u, **_: u.shape),
    "SelectiveSSM": Call(
        SelectiveSSM,
        {"d_inner": 4, "d_state": 3, "dt_rank": 2, "selective": ("dt", "B"), **SIZES}
        | {"dt_floor": 1e-4, "discretization": "zoh"},
    ),
    "SelectiveSSM.forward": method(
        SSM, "forward", {n: TOKENS[n] for n in "xz"} | {"h": TOKENS["h0"]}, like_x
    ),
    "SelectiveSSM.step": method(
        SSM, "step", {n: TOKEN[n] for n in "xz"} | {"h": TOKENS["h0"]}, like_x
    ),
    "SelectiveSSM.select": method(SSM, "select", {"x": TOKENS["x"]}, like_x),
    "SelectiveSSM.step_size": method(SSM, "step_size", {"x": TOKENS["x"]}, like_x),
    "inverse_softplus": Call(inverse_softplus, {"y": torch.rand(4)}, lambda y: y.shape),
    "MambaConfig": Call(MambaConfig, CONFIG),
    "MambaBlock": Call(MambaBlock, {"config": MambaConfig(**CONFIG)}),
    "MambaBlock.forward": method(BLOCK, "forward", {"x": SEQUENCE, "state": STATE}, like_x),
    "MambaBlock.prefill": method(BLOCK, "prefill", {"x": SEQUENCE, "state": STATE}, like_x),
    "MambaBlock.step": method(BLOCK, "step", {"x": SEQUENCE[:, 0], "state": STATE}, like_x),
    "MambaBlock.initial_state": method(BLOCK, "initial_state", {"batch": 2}),
    "MambaLM": Call(MambaLM, {"config": MambaConfig(**CONFIG)}),
    "MambaLM.forward": method(
        MODEL,
        "forward",
        PROMPT | {"last": False},
        lambda ids, last, **_: (*(ids.shape[:1] if last else ids.shape), 6),
    ),
    "MambaLM.prefill": method(MODEL, "prefill", PROMPT, lambda ids, state: (*ids.shape, 6)),
    "MambaLM.step": method(
        MODEL, "step", PROMPT | {"ids": IDS[:, 0]}, lambda ids, state: (*ids.shape, 6)
    ),
    "MambaLM.hidden_states": method(MODEL, "hidden_states", {"ids": IDS}),
    "MambaLM.generate": method(MODEL, "generate", DRAWS),
    "MambaLM.stream": Call(
        lambda **given: [*islice(MODEL.stream(**given), 3)],
        DRAWS,
        in_double=lambda **given: [*islice(DOUBLE.stream(**given), 3)],
    ),
    "MambaLM.initial_state": method(MODEL, "initial_state", {"batch": 2}),
    "rotary": Call(
        rotary, {"x": normal(2, 5, 4), "places": torch.arange(5)}, lambda x, places: x.shape
    ),
    "alibi_slopes": Call(alibi_slopes, {"n_head": 4}, lambda n_head: (n_head,)),
    "TransformerConfig": Call(TransformerConfig, ATTENTION),
    "Transformer": Call(Transformer, {"config": TransformerConfig(**ATTENTION)}),
    "Transformer.forward": method(
        PEER,
        "forward",
        {"ids": IDS, "last": False},
        lambda ids, last: (*(ids.shape[:1] if last else ids.shape), 6),
    ),
    "Transformer.prefill": method(
        PEER,
        "prefill",
        {"ids": IDS, "state": PEER.initial_state(2, 40)},
        lambda ids, state: (*ids.shape, 6),
    ),
    "Transformer.step": method(
        PEER,
        "step",
        {"ids": IDS[:, 0], "state": PEER.initial_state(2, 40)},
        lambda ids, state: (*ids.shape, 6),
    ),
    "Transformer.initial_state": method(PEER, "initial_state", {"batch": 2, "length": 5}),
    "sample": Call(
        sample,
        {"logits": normal(2, 6), **SAMPLING, "generator": None},
        lambda logits, **_: logits.shape[:1],
    ),
    **{
        task.__name__: Call(seeded(task), {"batch": 2, **sizes}, shape)
        for task, sizes, shape in (
            (copying, {"data": 2, "noise": 3, "vocab": 6}, None),
            (selective_copying, {"data": 2, "noise": 3, "vocab": 6}, None),
            (induction_heads, {"length": 5, "vocab": 6}, None),
            (associative_recall, {"length": 9, "pairs": 2, "vocab": 8}, None),
            (parity, {"length": 5}, lambda batch, length, **_: (batch, length)),
            (next_token, {"tokens": torch.arange(9), "length": 4}, None),
        )
    },
}

NUMBERS = [True, -1, 0, 1, 2, 5, 0.3, 2.5, 10**12, 10**400, math.nan, math.inf, -math.inf, 1j]
NUMBERS += [np.int64(2), np.int64(-1), np.float32(0.5), np.float64(math.nan), np.bool_(True)]
ODD = [None, "", "odd", b"legs", [], [1.0], (1, 2), {}, object(), *NUMBERS]
ODD += [np.ones(2), np.array(2), np.array("odd"), torch.tensor(2), torch.tensor(0.5)]
ODD += [torch.zeros(0), torch.ones(2, 3), torch.ones(2, dtype=torch.complex64)]
KINDS = [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16]
KINDS += [torch.float32, torch.float64, torch.complex64, torch.complex128]


def spoiled(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1:] = value
    return tensor


def variants(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor with other dtypes, axes, sizes, numbers, and places."""
    for dtype in KINDS:
        yield tensor.real.to(dtype) if not dtype.is_complex else tensor.to(dtype)
    yield from (tensor[None], tensor[..., None], tensor.expand(2, *tensor.shape))
    for axis in range(tensor.ndim):
        yield tensor.select(axis, 0)
        yield from (tensor.narrow(axis, 0, size) for size in (0, 1))
        yield torch.cat([tensor, tensor], axis)
    yield from (tensor.to_sparse(), tensor.to("meta"), tensor.mT if tensor.ndim > 1 else tensor)
    if tensor.dtype != torch.bool:
        yield from (-tensor, 0 * tensor)
    if tensor.is_floating_point() or tensor.is_complex():
        yield tensor.clone().requires_grad_()
        yield from (spoiled(tensor, value) for value in (math.nan, math.inf, -math.inf))


def alternatives(value: object) -> Iterator[object]:
    """Yield what may be given in the place of a right value."""
    yield from ODD
    if isinstance(value, Tensor):
        yield from variants(value)
    if isinstance(value, tuple) and value and not isinstance(value[0], str):
        yield from (list(value), value[:1], (*value, value[0]))
        for index, part in enumerate(value):
            for other in alternatives(part):
                yield (*value[:index], other, *value[index + 1 :])


ALTERNATIVES = {
    name: {n: list(alternatives(value)) for n, value in call.arguments.items()}
    for name, call in CALLS.items()
}


def tensors(value: object) -> Iterator[Tensor]:
    """Yield the tensors in arguments or results, and their numbers as tensors."""
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if isinstance(value, dict):
        value = list(value.values())
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, tuple | list):
        for part in value:
            yield from tensors(part)
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, float | complex):
        yield torch.tensor(value)
    elif isinstance(value, int):
        yield torch.tensor(value % 2**31)


def precise(value: object) -> object:
    """The same value, in double precision, or as one of Python's numbers."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, tuple | list) and any(isinstance(part, tuple | Tensor) for part in value):
        return tuple(map(precise, value))
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return value
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def tolerance(values: list[Tensor]) -> float:
    kinds = {value.dtype for value in values}
    return 0.1 if torch.bfloat16 in kinds else 0.02 if torch.float16 in kinds else 1e-3


def outcome(function: Callable, arguments: dict) -> list[Tensor] | Exception:
    torch.manual_seed(0)
    try:
        return list(tensors(function(**arguments)))
    except (TypeError, ValueError) as error:
        return error


def check(call: Call, changed: dict) -> None:
    """Make a call with some arguments changed: it answers rightly, or says what is wrong."""
    arguments = call.arguments | changed
    result = outcome(call.function, arguments)
    if isinstance(result, Exception):
        blamed = set(changed)
        if isinstance(result, ValueError) or any(isinstance(changed[n], Tensor) for n in changed):
            # of those that do not fit together any may be named, or what the model made of them
            blamed |= {n for n, v in call.arguments.items() if isinstance(v, Tensor | tuple)}
            blamed.add("logits")
        assert any(re.search(rf"(?<!\w){n}(?!\w)", str(result)) for n in blamed), repr(result)
        return
    if call.shape is not None:
        assert result[0].shape == call.shape(**arguments)
    inputs = [value for value in tensors(arguments) if value.ndim]
    if any(value.is_meta or not value.isfinite().all() for value in inputs):
        return
    exact = {name: precise(value) for name, value in arguments.items()}
    right = outcome(call.in_double or call.function, exact)
    assert not isinstance(right, Exception), repr(right)
    for value, wanted in zip(result, right, strict=True):
        assert value.isfinite().all()
        assert value.shape == wanted.shape
        error = (value - wanted).to(torch.complex128).norm()
        assert error <= tolerance(inputs) * (1 + wanted.to(torch.complex128).norm())


@pytest.mark.parametrize("name", CALLS)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_odd_arguments(name, data):
    call = CALLS[name]
    count = data.draw(st.integers(1, min(2, len(call.arguments))))
    chosen = data.draw(st.permutations(list(call.arguments)))[:count]
    check(call, {n: data.draw(st.sampled_from(ALTERNATIVES[name][n])) for n in chosen})


OPTIONAL = {"D", "z", "dt_bias", "delta_bias", "h0"}
REQUIRED = [
    (name, argument)
    for name, call in CALLS.items()
    for argument, value in call.arguments.items()
    if isinstance(value, Tensor)
    and argument not in OPTIONAL
    and name + argument != "SelectiveSSM.forwardh"
]


@pytest.mark.parametrize(("name", "argument"), REQUIRED)
def test_a_tensor_that_is_needed_is_never_none(name, argument):
    call = CALLS[name]
    with pytest.raises((TypeError, ValueError), match=rf"\b{argument} is (a NoneType|None)"):
        call.function(**call.arguments | {argument: None})


X, KERNEL = normal(2, 5, 3), normal(4, 3)
NO_NUMBER = "expected a finite number > 0"
HUGE = "is 1000000000000, expected less: it takes"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: causal_convolution(X, KERNEL[None]), ValueError, r"kernel has shape \(1, 4, 3\)"),
        (lambda: causal_convolution(X, KERNEL[:0]), ValueError, "kernel .* at least 1 for taps"),
        (
            lambda: LAYERS["S4D"].step(X[:, 0], LAYERS["S4D"].initial_state(2)[..., :1]),
            ValueError,
            r"state has shape \(2, 3, 1\), expected \(batch, d_model, n\) = \(2, 3, 2\)",
        ),
        (
            lambda: LAYERS["S4"].step(X[:, 0], LAYERS["S4"].initial_state(2).real),
            TypeError,
            "state has dtype torch.float32, expected a complex one",
        ),
        (lambda: LAYERS["S4"](X.double()), TypeError, "x has dtype torch.float64, expected .*32"),
        (lambda: LAYERS["S4"](X.to("meta")), ValueError, "x is on device meta, expected cpu"),
        (lambda: basis(torch.tensor([1]), 4), TypeError, "position has dtype torch.int64"),
        *(
            (lambda hippo=hippo, w=w: hippo(3, w), ValueError, f"window is {w}, {NO_NUMBER}")
            for hippo in (hippo_legt, hippo_fourier)
            for w in (0, -4.0, math.nan, math.inf, 10**400)
        ),
        (lambda: hippo_legt(3, 1j), TypeError, "window is a complex, expected a number"),
        (lambda: hippo_legt(np.bool_(True)), TypeError, "n is a bool.*, expected a whole number"),
        (lambda: hippo_legt(np.ones(2)), TypeError, "n is a ndarray, expected a whole number"),
        *(
            (lambda w=w: online_memory(X, 3, "legt", w), ValueError, f"window is {w}, {NO_NUMBER}")
            for w in (0, -4.0, math.nan, math.inf)
        ),
        *(
            (lambda make=make, dt_min=dt_min: make(dt_min=dt_min), error, f"dt_min is {message}")
            for make in (
                lambda **dt: S4(2, 4, **dt),
                lambda **dt: S4D(2, 4, **dt),
                lambda **dt: SelectiveSSM(4, 3, 2, **dt),
                lambda **dt: MambaConfig(4, 1, 9, **dt),
            )
            for dt_min, error, message in (
                (math.nan, ValueError, "nan, expected a finite number > 0"),
                (True, TypeError, "a bool, expected a number"),
            )
        ),
        *(
            (lambda dt=dt: dplr_kernel(**DPLR, dt=dt, length=5), error, message)
            for dt, error, message in (
                ("0.1", TypeError, "dt is a str, expected a positive number or tensor"),
                (torch.tensor(1), TypeError, "dt has dtype torch.int64, expected torch.float32"),
                (-1.0, ValueError, "dt holds -1, expected every step to be positive"),
                (torch.ones(3), ValueError, r"channels do not broadcast together: dt \(3,\)"),
            )
        ),
        (
            lambda: dplr_kernel(**DPLR | {"Lambda": 0 * DPLR["P"]}, dt=0.1, length=5),
            ValueError,
            "Lambda has a pole at a root of unity",
        ),
        (lambda: truncate(A[0], A, 5), TypeError, "C has dtype torch.float32, expected a complex"),
        (lambda: truncate(modes(4), modes(4), 5), ValueError, r"A_bar has shape \(4,\)"),
        (lambda: truncate(modes(4), modes(4, 4), 0), ValueError, "length is 0, expected at least"),
        (lambda: exprel(1.0), TypeError, "z is a float, expected a torch.Tensor"),
        (lambda: exprel(torch.ones(2).int()), TypeError, "z has dtype torch.int32, expected"),
        (lambda: S4D(3, 4, None), ValueError, "init is None, expected one of 'legs'"),
        (lambda: S4(3, 5), ValueError, "d_state is 5, expected an even number"),
        (lambda: SelectiveSSM(4.0, 3, 2), TypeError, "d_inner is a float, expected a whole number"),
        (lambda: SelectiveSSM(4, 3, 2, selective="dt"), TypeError, "selective is a str, expected"),
        (lambda: MambaBlock({"d_model": 4}), TypeError, "config is a dict, expected a MambaConfig"),
        (lambda: BLOCK.step(SEQUENCE[:, 0], None), TypeError, "state is a NoneType, expected a B"),
        (lambda: BLOCK.step(SEQUENCE[:, 0], STATE[:1]), TypeError, "state is a tuple, expected"),
        (
            lambda: BLOCK.step(SEQUENCE[:, 0], (STATE.conv, STATE.h[:1])),
            ValueError,
            r"state.h has shape \(1, 8, 3\), expected \(2, 8, 3\)",
        ),
        (lambda: MODEL(IDS[0]), ValueError, r"ids has shape \(3,\), expected \(batch, length\)"),
        (lambda: MODEL.prefill(IDS[0]), ValueError, r"ids has shape \(3,\), expected \(batch, len"),
        (lambda: MODEL.step(**PROMPT), ValueError, r"ids has shape \(2, 3\), expected \(batch,\)"),
        (lambda: MODEL(IDS > 0), TypeError, "ids has dtype torch.bool, expected whole numbers"),
        (
            lambda: MODEL.generate(IDS, 2, eos=99),
            ValueError,
            "eos is 99, expected token ids below",
        ),
        (lambda: MODEL.generate(IDS, 2, eos=2.5), TypeError, "eos is a float, expected a whole"),
        (lambda: sample(torch.tensor([[1.0, math.nan]])), ValueError, "logits .* and no NaN"),
        (lambda: CALLS["kernel"].function(**STEPS, length=10**12), ValueError, f"length {HUGE}"),
        (lambda: LAYERS["S4"].kernel(10**12), ValueError, f"length {HUGE}"),
        (lambda: LAYERS["S4D"].kernel(10**12), ValueError, f"length {HUGE}"),
        (lambda: hippo_legs(10**12), ValueError, f"n {HUGE}"),
        (lambda: S4D(10**12, 4), ValueError, f"d_model {HUGE}"),
        (lambda: SelectiveSSM(4, 10**12, 2), ValueError, f"d_state {HUGE}"),
        (lambda: copying(10**12, GENERATOR, data=1, noise=1), ValueError, f"batch {HUGE}"),
    ],
)
def test_message(call, error, message):
    with pytest.raises(error, match=message) as raised:
        call()
    assert str(raised.value) == str(raised.value).strip()


def test_a_pair_of_tensors_is_a_state_and_bytes_are_ids():
    right, after = BLOCK.step(SEQUENCE[:, 0], STATE)
    y, (conv, h) = BLOCK.step(SEQUENCE[:, 0], tuple(STATE))
    assert all(map(torch.equal, (y, conv, h), (right, *after)))
    assert torch.equal(MODEL(IDS.to(torch.uint8)), MODEL(IDS))
    text, start = torch.arange(9), torch.Generator().manual_seed(0).get_state()
    for dtype in (torch.uint8, torch.int64):
        generator = torch.Generator()
        generator.set_state(start)
        inputs, targets = next_token(2, generator, tokens=text.to(dtype), length=4)
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(targets, inputs + 1)


def test_a_tiny_temperature_takes_the_most_probable_token():
    logits = normal(50, 6)
    assert torch.equal(sample(logits, 1e-320), logits.argmax(-1))


def test_whole_numbers_of_numpy_are_whole_numbers():
    sizes = {name: v for name, v in CONFIG.items() if type(v) is int}
    config = MambaConfig(**CONFIG | {name: np.int64(size) for name, size in sizes.items()})
    assert config == MambaConfig(**CONFIG)
    assert all(type(getattr(config, name)) is int for name in sizes)
    assert LAYERS["S4"].kernel(np.int32(5)).shape == (3, 5)
    assert SelectiveSSM(*map(np.int64, (4, 3, 2))).A_log.shape == (4, 3)


def empty(tensor: Tensor) -> Tensor:
    """The same without a batch, and with gradients."""
    return tensor[:0].detach().clone().requires_grad_()


BACKENDS = ["auto", "sequential", "parallel", *(["numba"] if installed("numba") else [])]
BACKENDS += ["triton"] if HAS_TRITON and not torch.cuda.is_available() else []
FILLED = (*ONE_BY_ONE, "h0")
NO_BATCH = {
    **{
        f"selective_scan, {b}": (
            lambda b=b, **given: selective_scan(**TOKENS | given | {"backend": b}),
            {name: TOKENS[name] for name in FILLED},
        )
        for b in BACKENDS
    },
    **{
        f"linear_scan, {m}": (lambda m=m, **given: linear_scan(**given, method=m), dict(SCAN))
        for m in ("auto", *ALGORITHMS)
    },
    "selective_step": (
        lambda **given: selective_step(**TOKEN | given),
        {"h": TOKENS["h0"], **{name: TOKEN[name] for name in ONE_BY_ONE}},
    ),
    "causal_convolution, fft": (lambda x: causal_convolution(x, KERNEL, "fft"), {"x": X}),
    "causal_convolution, direct": (lambda x: causal_convolution(x, KERNEL, "direct"), {"x": X}),
    "recur": (lambda **given: DiscreteStateSpace(**STEPS).recur(**given), SIGNAL),
    "simulate": (lambda **given: StateSpace(A, **SYSTEM).simulate(**given, dt=0.1), SIGNAL),
    "S4": (LAYERS["S4"], {"x": X}),
    "S4D": (LAYERS["S4D"], {"x": X}),
    "SelectiveSSM": (SSM, {"x": TOKENS["x"]}),
    "MambaBlock": (BLOCK, {"x": SEQUENCE}),
}


@pytest.mark.parametrize("name", NO_BATCH)
def test_no_batch_gives_nothing_with_gradients(name):
    function, arguments = NO_BATCH[name]
    inputs = {n: empty(v) if isinstance(v, Tensor) else v for n, v in arguments.items()}
    result = [part for part in tensors(function(**inputs)) if part.requires_grad]
    assert all(len(part) == 0 for part in result)
    sum(part.abs().sum() for part in result).backward()
    assert all(v.grad.shape == v.shape for v in inputs.values() if isinstance(v, Tensor))


def test_a_model_reads_no_sequences():
    logits = MODEL(IDS[:0])
    assert logits.shape == (0, 3, 6)
    logits.sum().backward()
    assert all(not p.grad.any() for p in MODEL.parameters())
    assert MODEL.generate(IDS[:0], 2).shape == (0, 5)
    MODEL.zero_grad()


def test_values_are_not_looked_at_where_there_are_none():
    system, t = StateSpace(A, **SYSTEM), torch.rand(4)
    response = torch.func.vmap(system.impulse_response)(t)
    assert torch.allclose(response, system.impulse_response(t), atol=1e-5)
    assert exprel(torch.empty(3, device="meta")).is_meta
    assert inverse_softplus(torch.empty(3, device="meta")).is_meta
