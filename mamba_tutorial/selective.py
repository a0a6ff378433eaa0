"""Selection: a state space model whose step Δ, input B and output C depend on the token.

    h_t = exp(Δ_t A) h_{t−1} + w(Δ_t A) Δ_t x_t B_t,     y_t = Σ_n C_t h_t + D x_t

for each channel of x and each of its d_state numbers. A and D do not depend on the token; the decay
exp(Δ_t A) does, through Δ alone. Δ has one value per channel; B and C are shared by all channels.
From the Mamba paper (Gu and Dao 2023), Algorithm 2.

- `selective_scan`: a whole sequence; `selective_step`: one token. They give the same.
- `SelectiveSSM`: with the projections that make Δ, B and C of the tokens.

The weight w says how B is discretised. With "zoh" it is (e^{ΔA} − 1)/(ΔA), the exact zero-order
hold that the paper prints. With "mamba" it is 1, Euler's rule, which is what the released code
computes (`selective_scan_ref` of mamba_ssm), and so what its checkpoints were trained with.
"""

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence, Set
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mamba_tutorial._check import (
    HAS_TRITON,
    check_alike,
    check_all,
    check_choice,
    check_dtypes,
    check_flag,
    check_input,
    check_is_tensor,
    check_length,
    check_number,
    check_range,
    check_room,
    check_row,
    check_shape,
    check_starts,
    check_triton,
    installed,
    wide,
)
from mamba_tutorial.discretize import exprel, exprel_slope
from mamba_tutorial.ops import register, vjp, without_autocast
from mamba_tutorial.scan import linear_scan

Discretization = Literal["mamba", "zoh"]
Backend = Literal["auto", "sequential", "parallel", "numba", "triton"]
Tokens = Float[Tensor, "batch length d_inner"]
Shared = Float[Tensor, "batch length d_state"]
State = Float[Tensor, "batch d_inner d_state"]

# Numbers of (batch, tokens, d_inner, d_state) that the plain PyTorch path holds at a time.
CHUNK_NUMBERS = 1 << 20


def selective_scan(
    x: Tokens,
    dt: Tokens,
    A: Float[Tensor, "d_inner d_state"],
    B: Shared,
    C: Shared,
    D: Float[Tensor, " d_inner"] | None = None,
    z: Tokens | None = None,
    dt_bias: Float[Tensor, " d_inner"] | None = None,
    dt_softplus: bool = False,
    h0: State | None = None,
    return_last_state: bool = False,
    discretization: Discretization = "mamba",
    backend: Backend = "auto",
    starts: Bool[Tensor, "batch length"] | None = None,
) -> Tokens | tuple[Tokens, State]:
    """Run the selective state space model over whole sequences.

    The official function is `selective_scan_fn` of mamba_ssm. Differences: the layout is (batch,
    length, channels), the letters are the paper's (its u is x here, its delta is dt), h0 can be
    given, and B can be discretised exactly.

    Args:
        x: (batch, length, d_inner), the input.
        dt: (batch, length, d_inner), the step Δ; before bias and softplus, if those are asked for.
        A: (d_inner, d_state), negative for a stable model.
        B: (batch, length, d_state), what of the input enters the state.
        C: (batch, length, d_state), what of the state is read.
        D: (d_inner,), the skip connection; none by default.
        z: (batch, length, d_inner), a gate: the output is multiplied by silu(z).
        dt_bias: (d_inner,), added to dt.
        dt_softplus: take Δ = softplus(dt + dt_bias), which is positive.
        h0: (batch, d_inner, d_state), the state before the first token; zero by default.
        return_last_state: return the state after the last token as well.
        discretization: of B, "mamba" or "zoh"; see above.
        backend: "sequential" is the definition, a loop over the tokens; "parallel" goes through
            `linear_scan`, some tokens at a time; "numba" is one fused loop on a CPU, "triton" one
            fused kernel on a GPU (without a GPU: in Triton's interpreter), both with a state of
            float32, where Numba or Triton is installed. "auto" takes the fastest that fits.
        starts: (batch, length), true where a new sequence begins: there the state before is zero,
            h0 included. So sequences can lie one after the other in a row.

    Returns:
        y: (batch, length, d_inner), in the dtype of x; and, if asked for, the last state (batch,
        d_inner, d_state). The state is float64 if x is, and float32 for any other x: a decay of
        0.999 cannot be written in bfloat16.

    Raises:
        TypeError: an argument is no floating tensor; one is float64 and another is not; starts is
            no tensor of bool.
        ValueError: a shape does not fit, devices differ, Δ is negative, there is no such backend
            or discretization, or the backend does not fit.
    """
    check_flag("return_last_state", return_last_state)
    given = x, dt, A, B, C, D, z, dt_bias, dt_softplus, h0, discretization, backend, starts
    y, h_last = run_scan(scan, check_scan(*given))
    return (y, h_last) if return_last_state else y


def selective_step(
    h: State,
    x: Float[Tensor, "batch d_inner"],
    dt: Float[Tensor, "batch d_inner"],
    A: Float[Tensor, "d_inner d_state"],
    B: Float[Tensor, "batch d_state"],
    C: Float[Tensor, "batch d_state"],
    D: Float[Tensor, " d_inner"] | None = None,
    z: Float[Tensor, "batch d_inner"] | None = None,
    dt_bias: Float[Tensor, " d_inner"] | None = None,
    dt_softplus: bool = False,
    discretization: Discretization = "mamba",
) -> tuple[Float[Tensor, "batch d_inner"], State]:
    """Read one token: the arguments of `selective_scan` without the length, and the state h.

    The official function is `selective_state_update` of mamba_ssm; that one writes the new state
    over the old one, this one returns it. On a GPU, where dt_softplus is set, it is one kernel.

    Returns:
        y: (batch, d_inner), and the state after the token.

    Raises:
        TypeError, ValueError: as `selective_scan`.
    """
    check_choice("discretization", discretization, ["mamba", "zoh"])
    check_flag("dt_softplus", dt_softplus)
    sizes = _check_tokens("batch", x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    h = _check_state("h", h, x, (sizes["batch"], *A.shape))
    exact = discretization == "zoh"
    if not dt_softplus:
        check_step_size(dt, dt_bias)
    with without_autocast(x):
        if _choose(x) == "triton" and dt_softplus and not exact:
            return _STEP(h, x, dt, A, B, C, D, z, dt_bias)
        return _step(h, x, dt, A, B, C, D, z, dt_bias, dt_softplus, exact)


class SelectiveSSM(nn.Module):
    """The selective state space model with its projections ("S6" in the Mamba paper).

    Of every token x (d_inner numbers):

        Δ = softplus(W_dt W_down x + bias)        W_down: d_inner → dt_rank,  W_dt: → d_inner
        B = W_B x,  C = W_C x                     each d_inner → d_state

    and then `selective_scan` with A = −exp(A_log) and D. The parameters and their start are those
    of `Mamba` in mamba_ssm: A_n = −n in every channel; D = 1; the softplus of dt_bias is
    log-uniform in [dt_min, dt_max]; dt_proj.weight is uniform in ± dt_rank^−½. (The paper writes
    that dt is uniform; the released code draws its logarithm uniformly.) A_log and D
    are to be trained without weight decay, which `mamba_tutorial.training.parameter_groups` heeds.

    One difference in a name: what the released code holds as dt_proj.bias is dt_bias here. It is
    added in float32, inside the scan, so it is no part of the projection, and the projection is
    called as it is, whatever takes its place.

    Args:
        d_inner: the number of channels.
        d_state: the numbers that each channel remembers, N.
        dt_rank: the rank of the projection to Δ.
        selective: which of "dt", "B", "C" depend on the token. One that does not is the same
            parameter for all tokens: the bias alone for Δ, a vector that starts at 1 for B and C.
        dt_min, dt_max: the range of Δ at the start.
        dt_floor: the least Δ at the start, whatever dt_min.
        discretization: of B, as in `selective_scan`.

    Raises:
        TypeError, ValueError: a size is not positive, the range of Δ is empty, or there is no such
            part or discretization.
    """

    no_weight_decay = frozenset({"A_log", "D"})

    def __init__(
        self,
        d_inner: int,
        d_state: int,
        dt_rank: int,
        *,
        selective: Collection[str] = ("dt", "B", "C"),
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_floor: float = 1e-4,
        discretization: Discretization = "mamba",
    ):
        super().__init__()
        d_inner, d_state, dt_rank = (
            check_length(size, name=name)
            for name, size in (("d_inner", d_inner), ("d_state", d_state), ("dt_rank", dt_rank))
        )
        if not isinstance(selective, Sequence | Set) or isinstance(selective, str):
            given = type(selective).__name__
            raise TypeError(f"selective is a {given}, expected a collection of str")
        check_room("d_inner", d_inner, d_inner)
        check_room("d_state", d_state, d_state * d_inner)
        check_room("dt_rank", dt_rank, dt_rank * d_inner)
        for part in selective:
            check_choice("selective", part, ["dt", "B", "C"])
        check_choice("discretization", discretization, ["mamba", "zoh"])
        check_range(dt_min, dt_max)
        check_number("dt_floor", dt_floor, least=0)
        self.discretization = discretization
        # in the order in which the released code joins them in x_proj
        self.sizes = {
            part: size
            for part, size in (("dt", dt_rank), ("B", d_state), ("C", d_state))
            if part in selective
        }
        if self.sizes:
            self.x_proj = nn.Linear(d_inner, sum(self.sizes.values()), bias=False)
        dt_proj = nn.Linear(dt_rank, d_inner)
        self.dt_bias = dt_proj.bias
        dt_proj.register_parameter("bias", None)
        nn.init.uniform_(dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
        if "dt" in self.sizes:
            self.dt_proj = dt_proj
        for part in {"B", "C"} - set(self.sizes):
            self.register_parameter(part, nn.Parameter(torch.ones(d_state)))
        A = torch.arange(1, d_state + 1, dtype=torch.get_default_dtype())
        self.A_log = nn.Parameter(A.log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        log_dt = torch.rand(d_inner) * math.log(dt_max / dt_min) + math.log(dt_min)
        with torch.no_grad():
            self.dt_bias.copy_(inverse_softplus(log_dt.exp().clamp(min=dt_floor)))

    @property
    def A(self) -> Float[Tensor, "d_inner d_state"]:
        """−exp(A_log), negative whatever is learned, in float32 at least."""
        return -self.A_log.to(wide(self.A_log.dtype)).exp()

    def select(
        self, x: Float[Tensor, "*batch d_inner"]
    ) -> tuple[
        Float[Tensor, "*batch d_inner"],
        Float[Tensor, "*batch d_state"],
        Float[Tensor, "*batch d_state"],
    ]:
        """Return Δ before bias and softplus, B and C of every token.

        Raises:
            TypeError, ValueError: x is no floating tensor, or not (…, d_inner).
        """
        check_input("x", x, getattr(self, "x_proj", self))
        check_shape("x", x, "... d_inner", d_inner=len(self.D))
        projected = self.x_proj(x).split(list(self.sizes.values()), -1) if self.sizes else ()
        parts = dict(zip(self.sizes, projected, strict=True))
        dt = self.dt_proj(parts["dt"]) if "dt" in parts else torch.zeros_like(x)
        B, C = (
            parts[name] if name in parts else getattr(self, name).to(x).expand(*x.shape[:-1], -1)
            for name in ("B", "C")
        )
        return dt, B, C

    def step_size(self, x: Float[Tensor, "*batch d_inner"]) -> Float[Tensor, "*batch d_inner"]:
        """Return the step Δ that each token is given, in float32 at least."""
        return step_size(self.select(x)[0], self.dt_bias, True, wide(x.dtype))

    def forward(
        self,
        x: Tokens | Float[Tensor, "batch d_inner"],
        z: Tokens | Float[Tensor, "batch d_inner"] | None = None,
        h: State | None = None,
        starts: Bool[Tensor, "batch length"] | None = None,
    ) -> tuple[Tokens | Float[Tensor, "batch d_inner"], State]:
        """Run over whole sequences, or read one token of each; return y and the state after it.

        Args:
            x: (batch, length, d_inner), or (batch, d_inner) for one token.
            z: like x; the output is multiplied by silu(z).
            h: (batch, d_inner, d_state), the state before; zero by default.
            starts: (batch, length), true where a new sequence begins.

        Raises:
            TypeError, ValueError: as `selective_scan`; or starts is given with one token.
        """
        if starts is not None:
            check_row(starts, x, 3)
        dt, B, C = self.select(x)
        given = x, dt, self.A, B, C, self.D, z, self.dt_bias, True
        if h is not None:
            h = _check_state("h", h, x, (x.shape[0], *self.A_log.shape))
        if x.ndim != 2:
            return selective_scan(*given, h, True, self.discretization, starts=starts)
        if h is None:
            h = x.new_zeros(x.shape[0], *self.A_log.shape, dtype=wide(x.dtype))
        return selective_step(h, *given, self.discretization)

    def step(
        self,
        x: Float[Tensor, "batch d_inner"],
        h: State,
        z: Float[Tensor, "batch d_inner"] | None = None,
    ) -> tuple[Float[Tensor, "batch d_inner"], State]:
        """Read one token; return its output and the new state.

        Raises:
            TypeError, ValueError: as `selective_step`.
        """
        check_is_tensor("x", x)
        check_is_tensor("h", h)
        check_shape("x", x, "batch d_inner", d_inner=len(self.D))
        return self(x, z, h)


def inverse_softplus(y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the x with log(1 + e^x) = y, for y > 0: y + log(1 − e^−y), without cancellation.

    Raises:
        TypeError: y is no floating tensor.
        ValueError: a number is not positive.
    """
    check_dtypes(y=y)
    if y.is_complex():
        raise TypeError(f"y has dtype {y.dtype}, expected a real one")
    check_all("y", y, y > 0, "positive numbers")
    return y + torch.log(-torch.expm1(-y))


# The scan as an operator. Its arguments, all positional, are those of `selective_scan` up to h0,
# then `begins`, its starts, softplus, exact, whether to keep some states for the gradient, and the
# backend. Where a sequence begins, the decay is zero, which is all that it takes.

BACKENDS = ("sequential", "parallel", "numba", "triton")
KEPT = 32  # tokens between two states that the backends on a CPU keep


def check_scan(
    x, dt, A, B, C, D, z, dt_bias, dt_softplus, h0, discretization, backend, starts=None
) -> tuple:
    """Check the arguments of `selective_scan`; return those of the operator."""
    check_choice("discretization", discretization, ["mamba", "zoh"])
    check_choice("backend", backend, ["auto", *BACKENDS])
    check_flag("dt_softplus", dt_softplus)
    sizes = _check_tokens("batch length", x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    if sizes["length"] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected a length of at least 1")
    if h0 is not None:
        h0 = _check_state("h0", h0, x, (sizes["batch"], *A.shape))
    if starts is not None:
        check_starts(starts, x)
    backend = _choose(x) if backend == "auto" else backend
    _check_backend(backend, x)
    if not dt_softplus:
        check_step_size(dt, dt_bias)
    given = x, dt, A, B, C, D, z, dt_bias, h0, starts
    return *given, dt_softplus, discretization == "zoh", _learning(given), backend


def run_scan(operator: Callable, inputs: tuple) -> tuple[Tensor, Tensor | None]:
    """Return y and the last state, of what `check_scan` returned.

    The operator is `scan`, or takes its place. On a GPU it does all of it; elsewhere PyTorch does
    bias and softplus before it, skip connection and gate after it.
    """
    x, dt, A, B, C, D, z, dt_bias, h0, begins, softplus, exact, _, backend = inputs
    with without_autocast(x):
        if backend == "triton":
            return operator(*inputs)
        dtype = wide(x.dtype)
        if h0 is None:
            h0 = x.new_zeros(x.shape[0], *A.shape, dtype=dtype)
        step = step_size(dt, dt_bias, softplus, dtype)
        tokens = [tensor.to(dtype) for tensor in (x, step, A, B, C)]
        rest = h0, begins, False, exact, _learning([*tokens, h0]), backend
        y, h_last = operator(*tokens, None, None, None, *rest)
        return skip_and_gate(y, x, D, z), h_last


def scan(*inputs) -> tuple[Tensor, Tensor]:
    """Return y and the last state."""
    return _sequential(*inputs) if inputs[-1] == "sequential" else SCAN(*inputs)[:2]


def _learning(given: Iterable[Tensor | None]) -> bool:
    """Say whether a backward pass may follow. An exported program is there to be run."""
    # Dynamo, which compiles, says of itself in some versions that it exports
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    learning = torch.is_grad_enabled() and not exporting
    return learning and any(t is not None and t.requires_grad for t in given)


def _sequential(
    x, dt, A, B, C, D, z, dt_bias, h, begins, softplus, exact, keep, backend
) -> tuple[Tensor, Tensor]:
    outputs = []
    for t, token in enumerate(zip(*(part.unbind(1) for part in (x, dt, B, C)), strict=True)):
        x_t, dt_t, B_t, C_t = token
        if begins is not None:
            h = h.masked_fill(begins[:, t, None, None], 0)
        y_t, h = _advance(h, x_t, dt_t, A, B_t, C_t, exact)
        outputs.append(y_t)
    return torch.stack(outputs, 1), h


def _definition(
    x, dt, A, B, C, D, z, dt_bias, h0, begins, softplus, exact, keep, backend
) -> tuple[Tensor, Tensor]:
    """What the operator computes, without a kernel: all states at once."""
    dtype = wide(x.dtype)
    step = step_size(dt, dt_bias, softplus, dtype)
    a, b = _discrete(x.to(dtype), step, A.to(dtype), B.to(dtype), exact, begins)
    states = linear_scan(a, b, h0)
    y = (states * C.to(dtype)[:, :, None]).sum(-1)
    return skip_and_gate(y, x, D, z), states[:, -1]


def _run_scan(
    x, dt, A, B, C, D, z, dt_bias, h0, begins, softplus, exact, keep, backend
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "triton":
        from mamba_tutorial.kernels.selective_scan import forward

        given = x, dt, A, B, C, D, z, dt_bias, h0, begins
        y, h_last, starts = forward(*given, softplus, exact, keep)
    elif _in_numba(backend):
        from mamba_tutorial.kernels.cpu import forward

        y, h_last, starts = forward(x, dt, A, B, C, h0, begins, exact)
    else:
        y, h_last, starts = _parallel(x, dt, A, B, C, h0, begins, exact)
    return y, h_last, starts if keep else h_last.new_empty(0)


def _like_scan(
    x, dt, A, B, C, D, z, dt_bias, h0, begins, softplus, exact, keep, backend
) -> tuple[Tensor, Tensor, Tensor]:
    y, h_last = x.new_empty(x.shape), _like_state(x, A, backend)
    if not keep:
        return y, h_last, h_last.new_empty(0)
    (batch, length, d_inner), d_state, every = x.shape, A.shape[1], KEPT
    state = d_inner, d_state
    if backend == "triton":
        from mamba_tutorial.kernels.selective_scan import kept_states, spacing

        every, state = spacing(x, d_state, exact), (kept_states(x, d_state, exact), d_inner)
    return y, h_last, h_last.new_empty(batch, -(-length // every), *state)


def _like_state(x: Tensor, A: Tensor, backend: str) -> Tensor:
    """Make room for a state; on a GPU neighbouring channels are neighbours in memory."""
    d_inner, d_state = A.shape
    if backend == "triton":
        return x.new_empty(x.shape[0], d_state, d_inner, dtype=torch.float32).mT
    return x.new_empty(x.shape[0], d_inner, d_state)


def _scan_gradient(wanted, upstream, inputs, kept) -> tuple:
    *given, softplus, exact, _, backend = inputs
    dy, dh_last, _ = upstream
    dx, ddt, dz, shared, own, dh0 = _GRADIENTS(*given, dy, dh_last, *kept, softplus, exact, backend)
    (dB, dC), n = shared.unbind(0), given[2].shape[1]
    return dx, ddt, own[:n].mT, dB, dC, own[n], dz, own[n + 1], dh0, *(None,) * 5


# Its gradients: of x, dt and z (empty if there is none); of B and C, one above the other; of A, D
# and dt_bias in the rows of (d_state + 2, d_inner); and of h0.


def _run_gradients(
    x, dt, A, B, C, D, z, dt_bias, h0, begins, dy, dh_last, starts, softplus, exact, backend
) -> tuple[Tensor, ...]:
    if starts.numel() == 0:  # nobody could know that they would be asked for
        given = x, dt, A, B, C, D, z, dt_bias, h0, begins
        starts = _run_scan(*given, softplus, exact, True, backend)[2]
    if backend == "triton":
        from mamba_tutorial.kernels.selective_scan import backward

        given = x, dt, A, B, C, D, z, dt_bias, begins
        return backward(dy, dh_last, starts, *given, softplus, exact)
    dy = torch.zeros_like(x) if dy is None else dy
    dh_last = torch.zeros_like(h0) if dh_last is None else dh_last
    backward = _parallel_backward
    if _in_numba(backend):
        from mamba_tutorial.kernels.cpu import backward
    dx, ddt, dA, dB, dC, dh0 = backward(dy, dh_last, starts, x, dt, A, B, C, begins, exact)
    own = torch.cat([dA.mT, dA.new_zeros(2, len(dA))])
    return dx, ddt, x.new_empty(0), torch.stack([dB, dC]), own, dh0


def _like_gradients(
    x, dt, A, B, C, D, z, dt_bias, h0, begins, dy, dh_last, starts, softplus, exact, backend
) -> tuple[Tensor, ...]:
    dh0 = _like_state(x, A, backend)
    shared = B.dtype if B.dtype == C.dtype else torch.float32
    return (
        x.new_empty(x.shape),
        dt.new_empty(dt.shape),
        x.new_empty(0) if z is None else z.new_empty(z.shape),
        B.new_empty(2, *B.shape, dtype=shared),
        dh0.new_empty(A.shape[1] + 2, A.shape[0]),
        dh0,
    )


def _gradients_definition(
    x, dt, A, B, C, D, z, dt_bias, h0, begins, dy, dh_last, starts, softplus, exact, backend
) -> tuple[Tensor, ...]:
    given = x, dt, A, B, C, D, z, dt_bias, h0
    wanted = [tensor is not None for tensor in given]
    inputs = *given, begins, softplus, exact, False, backend
    found = vjp(_definition, wanted, (dy, dh_last), inputs)
    dx, ddt, dA, dB, dC, dD, dz, dbias, dh0 = found
    none = dA.new_zeros(len(dA))
    own = torch.cat([dA.mT, *((none if row is None else row)[None] for row in (dD, dbias))])
    empty = x.new_empty(0)
    dh0 = torch.zeros_like(_like_state(x, A, backend)) if dh0 is None else dh0
    return dx, ddt, empty if dz is None else dz, torch.stack([dB, dC]), own, dh0


_TENSORS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias"
)
SCAN = register(
    "selective_scan",
    f"({_TENSORS}, Tensor? h0, Tensor? begins, bool softplus, bool exact, bool keep, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    run=_run_scan,
    like=_like_scan,
    definition=_definition,
    gradient=_scan_gradient,
    kept=(2,),
    hidden=1,
)
_GRADIENTS = register(
    "selective_scan_backward",
    f"({_TENSORS}, Tensor? h0, Tensor? begins, Tensor? dy, Tensor? dh_last, Tensor starts,"
    " bool softplus, bool exact, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    run=_run_gradients,
    like=_like_gradients,
    definition=_gradients_definition,
)


# The scan without y: what all tokens give, and ΣΔ. Forwards that is the last state, begun at zero,
#     Σ_t exp(A Σ_{s>t} Δ_s) w(Δ_t A) Δ_t u_t V_t,     of u = x and V = B;
# in reverse, what they add to the gradient of h0,
#     Σ_t exp(A Σ_{s≤t} Δ_s) silu(z_t) u_t V_t,     of u = dy and V = C.


def _run_end(u, dt, A, V, z, dt_bias, softplus, exact, reverse, backend) -> tuple[Tensor, Tensor]:
    given = u, dt, A, V, z, dt_bias, softplus, exact, reverse
    if backend == "triton":
        from mamba_tutorial.kernels.selective_scan import end

        return end(*given)
    return _end(*given, backend)


def _end(u, dt, A, V, z, dt_bias, softplus, exact, reverse, backend) -> tuple[Tensor, Tensor]:
    dtype = wide(u.dtype)
    step = step_size(dt, dt_bias, softplus, dtype)
    u, A, V = (tensor.to(dtype) for tensor in (u, A, V))
    if z is not None:
        u = u * F.silu(z.to(dtype))
    total = step.cumsum(1) if reverse else step.flip(1).cumsum(1).flip(1)
    between, drive = (total, u) if reverse else (total - step, step * u)
    end = torch.zeros_like(_like_state(u, A, backend))
    for piece in _pieces(u, A):
        # of an unstable model it may overflow where nothing is given, and ∞ · 0 is not a number
        decay = torch.exp(between[:, piece, :, None] * A).clamp(max=torch.finfo(dtype).max)
        if exact and not reverse:
            decay = decay * exprel(step[:, piece, :, None] * A)
        end = end + (decay * drive[:, piece, :, None] * V[:, piece, None]).sum(1)
    return end, step.sum(1)


END = register(
    "selective_scan_end",
    "(Tensor u, Tensor dt, Tensor A, Tensor V, Tensor? z, Tensor? dt_bias, bool softplus,"
    " bool exact, bool reverse, str backend) -> (Tensor, Tensor)",
    run=_run_end,
    like=lambda u, dt, A, *rest: (end := _like_state(u, A, rest[-1]), end.new_empty(u.shape[::2])),
    definition=_end,
)


def _run_step(h, x, dt, A, B, C, D, z, dt_bias) -> tuple[Tensor, Tensor]:
    from mamba_tutorial.kernels.decode import selective_step

    return selective_step(h, x, dt, A, B, C, D, z, dt_bias)


def _step(h, x, dt, A, B, C, D, z, dt_bias, softplus=True, exact=False) -> tuple[Tensor, Tensor]:
    step = step_size(dt, dt_bias, softplus, h.dtype)
    y, h = _advance(h, *(tensor.to(h.dtype) for tensor in (x, step, A, B, C)), exact)
    return skip_and_gate(y, x, D, z), h


_STEP = register(
    "selective_step",
    f"(Tensor h, {_TENSORS}) -> (Tensor, Tensor)",
    run=_run_step,
    like=lambda h, x, *_: (x.new_empty(x.shape), h.new_empty(h.shape)),
    definition=_step,
)


# The scan in PyTorch's operations, some tokens at a time, so that not all states are stored.


def _pieces(x: Tensor, A: Tensor) -> list[slice]:
    """Cut the length into pieces of CHUNK_NUMBERS numbers, and of whole multiples of KEPT."""
    size = KEPT * max(1, CHUNK_NUMBERS // (KEPT * len(x) * A.numel()))
    return [slice(start, start + size) for start in range(0, x.shape[1], size)]


def _discrete_piece(piece, x, dt, A, B, exact, begins) -> tuple[Tensor, Tensor]:
    x, dt, B = (part[:, piece] for part in (x, dt, B))
    return _discrete(x, dt, A, B, exact, None if begins is None else begins[:, piece])


def _parallel(x, dt, A, B, C, h, begins, exact) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, the last state, and the states before every KEPT tokens."""
    outputs, starts = [], []
    for piece in _pieces(x, A):
        a, b = _discrete_piece(piece, x, dt, A, B, exact, begins)
        states = linear_scan(a, b, h)
        outputs.append((states @ C[:, piece, :, None]).squeeze(-1))
        starts += [h[:, None], states[:, KEPT - 1 : -1 : KEPT]]
        h = states[:, -1].clone()
    return torch.cat(outputs, 1), h, torch.cat(starts, 1)


def _parallel_backward(dy, G, starts, x, dt, A, B, C, begins, exact) -> tuple[Tensor, ...]:
    """Return the gradients of x, dt, A, B, C and h0.

    With γ_t = dy_t C_t + a_{t+1} γ_{t+1} the gradient of the state, what arrives at z = Δ A is
    γ_t (a_t h_{t−1} + w'(z) Δ x B), and A and Δ get theirs from there. G is that of the last state.
    """
    dA, results = torch.zeros_like(A), []
    for piece in reversed(_pieces(x, A)):
        x_, dt_, B_, C_, dy_ = (part[:, piece] for part in (x, dt, B, C, dy))
        h = starts[:, piece.start // KEPT]
        a, b = _discrete_piece(piece, x, dt, A, B, exact, begins)
        states = linear_scan(a, b, h)
        before = torch.cat([h[:, None], states[:, :-1]], 1)
        arriving = dy_[..., None] * C_[:, :, None]
        arriving[:, -1] += G
        later = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1)
        g = linear_scan(later, arriving, reverse=True)
        z, drive = dt_[..., None] * A, (dt_ * x_)[..., None]
        dz, weighed = g * a * before, g
        if exact:
            dz = dz + g * drive * B_[:, :, None] * exprel_slope(z)
            weighed = g * exprel(z)
        dA += (dz * dt_[..., None]).sum((0, 1))
        ddrive = (weighed * B_[:, :, None]).sum(-1)
        results.append(
            (
                ddrive * dt_,
                ddrive * x_ + (dz * A).sum(-1),
                (weighed * drive).sum(2),
                (states * dy_[..., None]).sum(2),
            )
        )
        G = a[:, 0] * g[:, 0]
    dx, ddt, dB, dC = (torch.cat(parts[::-1], 1) for parts in zip(*results, strict=True))
    return dx, ddt, dA, dB, dC, G


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


def _choose(x: Tensor) -> str:
    if x.dtype != torch.float64:
        if x.is_cuda and HAS_TRITON:
            return "triton"
        if x.device.type == "cpu":
            return "numba, or parallel"
    return "parallel"


def _in_numba(backend: str) -> bool:
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


def _advance(
    h: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, exact: bool
) -> tuple[Tensor, Tensor]:
    """One step of the recurrence, and its output."""
    a, b = _discrete(x, dt, A, B, exact)
    h = a * h + b
    return (h @ C[..., None]).squeeze(-1), h


def _discrete(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, exact: bool, begins: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return exp(Δ A), but 0 where a sequence begins, and w(Δ A) Δ x B.

    Both are (..., d_inner, d_state).
    """
    z = dt[..., None] * A
    a, b = z.exp(), (dt * x)[..., None] * B[..., None, :]
    a = a if begins is None else a.masked_fill(begins[..., None, None], 0)
    return a, exprel(z) * b if exact else b


def step_size(dt: Tensor, bias: Tensor | None, softplus: bool, dtype: torch.dtype) -> Tensor:
    """Return Δ in a dtype, after bias and softplus."""
    dt = dt.to(dtype) if bias is None else dt.to(dtype) + bias.to(dtype)
    return F.softplus(dt) if softplus else dt


def check_step_size(
    dt: Tensor, bias: Tensor | None, names: tuple[str, str] = ("dt", "dt_softplus")
) -> None:
    """Check a step that is given as it is, without softplus; the names are the caller's."""
    dt = step_size(dt, bias, False, wide(dt.dtype))
    check_all(names[0], dt, ~(dt < 0), f"Δ ≥ 0, or {names[1]}=True")


def skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """Return (y + D x) · silu(z), computed in the dtype of y, in that of x."""
    if D is not None:
        y = y + D.to(y.dtype) * x.to(y.dtype)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype)


def _check_tokens(leading: str, **given: Tensor | None) -> dict[str, int]:
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


def _check_state(name: str, h: Tensor, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    check_alike(name, h, x)
    if h.shape != shape:
        needed = f"expected (batch, d_inner, d_state) = {shape}"
        raise ValueError(f"{name} has shape {tuple(h.shape)}, {needed}")
    return h.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
