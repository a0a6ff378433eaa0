"""For code that was written for others: the official function, and transformers' Mamba.

`selective_scan_fn` takes the arguments of the function of that name in mamba_ssm, in its layout.
`patched_transformers` lets a `MambaForCausalLM` of transformers run on this package's kernels.
"""

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from mamba_tutorial._check import check_alike, check_flag, check_is_tensor, check_shape, wide
from mamba_tutorial.scan import linear_scan
from mamba_tutorial.selective import selective_scan, selective_step
from mamba_tutorial.selective._checks import check_step_size
from mamba_tutorial.selective._token import skip_and_gate, step_size

Channels = Float[Tensor, "batch dim length"]


def selective_scan_fn(
    u: Channels,
    delta: Channels,
    A: Float[Tensor, "dim dstate"] | Complex[Tensor, "dim dstate"],
    B: Float[Tensor, "*shape"],
    C: Float[Tensor, "*shape2"],
    D: Float[Tensor, " dim"] | None = None,
    z: Channels | None = None,
    delta_bias: Float[Tensor, " dim"] | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`mamba_ssm.ops.selective_scan_interface.selective_scan_fn`, by the kernels of this package.

    Differences: the gradient of the last state counts; A is real. Constant B or C are computed
    with all states in memory, for no kernel of ours has them.

    Args:
        u: (batch, dim, length), the input.
        delta: (batch, dim, length), the step before bias and softplus.
        A: (dim, dstate), real.
        B: (batch, dstate, length); (batch, groups, dstate, length), each for dim/groups
            neighbouring channels; or constant, (dim, dstate).
        C: as B, in any of the three forms.
        D: (dim,), the skip connection.
        z: (batch, dim, length), the gate.
        delta_bias: (dim,), added to delta.
        delta_softplus: whether the step goes through the softplus.
        return_last_state: whether to return the state after the last token, too.

    Returns:
        (batch, dim, length), in the dtype of u; and, if asked for, the last state (batch, dim,
        dstate).

    Raises:
        TypeError: A is complex, an argument is no tensor of floats, a flag no bool.
        ValueError: a shape does not fit, groups do not divide the channels, or as `selective_scan`.
    """
    needed = {"u": u, "delta": delta, "A": A, "B": B, "C": C}
    optional = {"D": D, "z": z, "delta_bias": delta_bias}
    given = needed | {name: t for name, t in optional.items() if t is not None}
    for name, tensor in given.items():
        check_is_tensor(name, tensor)
        if tensor.is_complex():
            right = "expected a real one: complex systems are not among the kernels (see S4D)"
            raise TypeError(f"{name} has dtype {tensor.dtype}, {right}")
        check_alike(name, tensor, u, "u")
    check_flag("delta_softplus", delta_softplus)
    check_flag("return_last_state", return_last_state)
    check_shape("u", u, "batch dim length")
    check_shape("A", A, "dim dstate", dim=u.shape[1])
    sizes = {"batch": len(u), "dim": u.shape[1], "dstate": A.shape[1], "length": u.shape[2]}
    if sizes["length"] == 0:
        raise ValueError(f"u has shape {tuple(u.shape)}, expected a length of at least 1")
    for name in given.keys() & {"delta", "z", "D", "delta_bias"}:
        axes = "batch dim length" if name in {"delta", "z"} else "dim"
        check_shape(name, given[name], axes, **{axis: sizes[axis] for axis in axes.split()})
    B, C = (_grouped(name, shared, sizes) for name, shared in (("B", B), ("C", C)))
    if not delta_softplus:
        check_step_size(delta.mT, delta_bias, ("delta", "delta_softplus"))
    x, dt, gate = (None if t is None else t.mT for t in (u, delta, z))
    run = _by_groups if B.ndim == C.ndim == 4 else _with_constants
    y, h = run(B, C, x, dt, A, D, gate, delta_bias, delta_softplus)
    return (y.mT, h) if return_last_state else y.mT


def _grouped(name: str, shared: Tensor, sizes: dict[str, int]) -> Tensor:
    """Check B or C; return (dim, dstate) as it is, else (groups, batch, length, dstate)."""
    if shared.ndim == 2:
        check_shape(name, shared, "dim dstate", dim=sizes["dim"], dstate=sizes["dstate"])
        return shared
    shared = shared[:, None] if shared.ndim == 3 else shared
    rest = {key: size for key, size in sizes.items() if key != "dim"}
    check_shape(name, shared, "batch groups dstate length", **rest)
    groups = shared.shape[1]
    if groups == 0 or sizes["dim"] % groups:
        needed = f"expected a number that divides the {sizes['dim']} channels"
        raise ValueError(f"{name} has {groups} groups, {needed}")
    return shared.permute(1, 0, 3, 2)


def _by_groups(B, C, x, dt, A, D, z, bias, softplus) -> tuple[Tensor, Tensor]:
    """One scan for each group of channels that share B and C."""
    groups = max(len(B), len(C))
    if groups % min(len(B), len(C)):
        raise ValueError(f"C has {len(C)} groups, expected as many as B, {len(B)}, or a factor")
    B, C = (t.repeat_interleave(groups // len(t), dim=0) for t in (B, C))
    parts = [[None] * groups if t is None else t.chunk(groups, -1) for t in (x, dt, z, D, bias)]
    results = [
        selective_scan(x, dt, A, B, C, D, z, bias, softplus, return_last_state=True)
        for x, dt, z, D, bias, A, B, C in zip(*parts, A.chunk(groups), B, C, strict=True)
    ]
    ys, states = zip(*results, strict=True)
    return torch.cat(ys, dim=-1), torch.cat(states, dim=1)


def _with_constants(B, C, x, dt, A, D, z, bias, softplus) -> tuple[Tensor, Tensor]:
    """The same where B or C is one vector for each channel: by `linear_scan`, with all states."""
    dtype = wide(x.dtype)
    step = step_size(dt, bias, softplus, dtype)
    B, C = (_for_channels(t, x.shape[-1]).to(dtype) for t in (B, C))
    a = torch.exp(step[..., None] * A.to(dtype))
    h = linear_scan(a, (step * x.to(dtype))[..., None] * B)
    return skip_and_gate((h * C).sum(-1), x, D, z), h[:, -1]


def _for_channels(shared: Tensor, dim: int) -> Tensor:
    """Return (batch, length, dim, dstate), or (dim, dstate), of what `_grouped` returns."""
    if shared.ndim == 2:
        return shared
    return shared.permute(1, 2, 0, 3).repeat_interleave(dim // len(shared), dim=2)


@contextmanager
def patched_transformers() -> Iterator[None]:
    """While in force, Mamba of transformers scans by this package: nothing has to be built.

        with patched_transformers():
            logits = model(ids).logits

    Both the scan over a sequence and the step of a token are replaced, forward and backward, for
    all models of the class. At the end everything is as before.

    Raises:
        ImportError: transformers is not installed, or does not have these functions (5.17 has).
    """
    where = importlib.import_module("transformers.models.mamba.modeling_mamba")
    with ExitStack() as stack:
        for name, ours in (
            ("mamba_selective_scan", _scan_of_transformers),
            ("mamba_selective_state_update", _step_of_transformers),
            ("mamba_inner_fn", _not_all_at_once),
        ):
            if not hasattr(where, name):
                version = importlib.import_module("transformers").__version__
                raise ImportError(f"transformers {version} has no {name}, expected one that has")
            stack.enter_context(mock.patch.object(where, name, ours))
        yield


def _scan_of_transformers(*given, use_mambapy=False, use_associative_scan=False, **options):
    return selective_scan_fn(*given, **options)


def _not_all_at_once(*given, **options) -> None:
    """Say that there is no function for the whole block, which mamba_ssm's would be in training."""


def _step_of_transformers(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus) -> Tensor:
    """Write the new state where the old one is, as transformers wants it."""
    y, after = selective_step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
    state.copy_(after)
    return y
