"""Which arguments the scan takes, and which backend suits them."""

import warnings
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

from mamba_tutorial._check import (
    HAS_TRITON,
    check_alike,
    check_all,
    check_choice,
    check_flag,
    check_shape,
    check_starts,
    check_triton,
    installed,
    wide,
)
from mamba_tutorial.selective._token import step_size

BACKENDS = ("sequential", "parallel", "numba", "triton")


def check_scan(
    x, dt, A, B, C, D, z, dt_bias, dt_softplus, h0, discretization, backend, starts=None
) -> tuple:
    """Check the arguments of `selective_scan`; return those of the operator."""
    check_choice("discretization", discretization, ["mamba", "zoh"])
    check_choice("backend", backend, ["auto", *BACKENDS])
    check_flag("dt_softplus", dt_softplus)
    sizes = check_tokens("batch length", x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    if sizes["length"] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected a length of at least 1")
    if h0 is not None:
        h0 = check_state("h0", h0, x, (sizes["batch"], *A.shape))
    if starts is not None:
        check_starts(starts, x)
    backend = choose(x) if backend == "auto" else backend
    _check_backend(backend, x)
    if not dt_softplus:
        check_step_size(dt, dt_bias)
    given = x, dt, A, B, C, D, z, dt_bias, h0, starts
    return *given, dt_softplus, discretization == "zoh", may_learn(given), backend


def check_step_size(
    dt: Tensor, bias: Tensor | None, names: tuple[str, str] = ("dt", "dt_softplus")
) -> None:
    """Check a step that is given as it is, without softplus; the names are the caller's."""
    dt = step_size(dt, bias, False, wide(dt.dtype))
    check_all(names[0], dt, ~(dt < 0), f"Δ ≥ 0, or {names[1]}=True")


def check_tokens(leading: str, **given: Tensor | None) -> dict[str, int]:
    """Check dtypes, devices and shapes; return the sizes of the axes."""
    optional = {"D", "z", "dt_bias"}
    tensors = {n: t for n, t in given.items() if not (t is None and n in optional)}
    for name, tensor in tensors.items():
        check_alike(name, tensor, given["x"])
    x, A = given["x"], given["A"]
    axes = leading.split()
    if x.ndim != len(axes) + 1:
        needed = f"expected ({', '.join(axes)}, d_inner)"
        raise ValueError(f"x has shape {tuple(x.shape)}, {needed}")
    sizes = dict(zip([*axes, "d_inner"], x.shape, strict=True))
    check_shape("A", A, "d_inner d_state", d_inner=sizes["d_inner"])
    if A.shape[1] == 0:
        raise ValueError(f"A has shape {tuple(A.shape)}, expected a d_state of at least 1")
    sizes["d_state"] = A.shape[1]
    channels, states = f"{leading} d_inner", f"{leading} d_state"
    wanted = {"dt": channels, "z": channels, "B": states, "C": states, "A": "d_inner d_state"}
    for name, tensor in tensors.items():
        names = wanted.get(name, channels if name == "x" else "d_inner")
        shape = tuple(sizes[axis] for axis in names.split())
        if tensor.shape != shape:
            needed = f"expected ({', '.join(names.split())}) = {shape}"
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, {needed}")
    return sizes


def check_state(name: str, h: Tensor, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a state that fits x, in the dtype in which states are computed."""
    check_alike(name, h, x)
    if h.shape != shape:
        needed = f"expected (batch, d_inner, d_state) = {shape}"
        raise ValueError(f"{name} has shape {tuple(h.shape)}, {needed}")
    return h.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def may_learn(given: Iterable[Tensor | None]) -> bool:
    """Say whether a backward pass may follow. An exported program is there to be run."""
    # Dynamo, which compiles, says of itself in some versions that it exports
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    learning = torch.is_grad_enabled() and not exporting
    return learning and any(t is not None and t.requires_grad for t in given)


@cache
def _numba_works() -> bool:
    """Say whether Numba, which is there, can be imported and its loop runs; if not, warn why."""
    try:
        from mamba_tutorial.kernels.cpu import forward

        one = torch.ones(1, 1, 1)
        forward(one, one, one[0], one, one, one, None, False)
    except Exception as error:  # whatever it is, there is another way
        warnings.warn(
            f"Numba cannot be used ({type(error).__name__}: {error}). PyTorch's operations scan "
            "instead, which takes longer.",
            stacklevel=2,
        )
        return False
    return True


def choose(x: Tensor) -> str:
    """Return the fastest backend for x, or two of which `in_numba` chooses when it is needed."""
    if x.dtype != torch.float64:
        if x.is_cuda and HAS_TRITON:
            return "triton"
        if x.device.type == "cpu":
            return "numba, or parallel"
    return "parallel"


def in_numba(backend: str) -> bool:
    """Choose late: a tracer, which comes by here no more, cannot try Numba out."""
    if backend == "numba, or parallel":
        return installed("numba") and _numba_works()
    return backend == "numba"


def _check_backend(backend: str, x: Tensor) -> None:
    if backend == "triton":
        check_triton(x, "backend")
    if backend == "numba":
        if x.device.type != "cpu" or x.dtype == torch.float64:
            given = f"{x.dtype} on {x.device}"
            raise ValueError(f"backend is 'numba', which computes in float32 on a CPU, not {given}")
        if not installed("numba"):
            raise ValueError("backend is 'numba', but Numba is not installed: pip install numba")
