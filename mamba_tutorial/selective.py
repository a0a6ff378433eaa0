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
from collections.abc import Callable, Collection
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mamba_tutorial._check import (
    check_choice,
    check_length,
    check_shape,
    check_triton,
    installed,
)
from mamba_tutorial.discretize import exprel
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

    Returns:
        y: (batch, length, d_inner), in the dtype of x; and, if asked for, the last state (batch,
        d_inner, d_state). The state is float64 if x is, and float32 for any other x: a decay of
        0.999 cannot be written in bfloat16.

    Raises:
        TypeError: an argument is no floating tensor; one is float64 and another is not.
        ValueError: a shape does not fit, devices differ, Δ is negative, there is no such backend
            or discretization, or the backend does not fit.
    """
    check_choice("discretization", discretization, ["mamba", "zoh"])
    check_choice("backend", backend, ["auto", *BACKENDS, "triton"])
    sizes = _check_tokens("batch length", x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    if sizes["length"] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected a length of at least 1")
    if h0 is not None:
        h0 = _check_state("h0", h0, x, (sizes["batch"], *A.shape))
    name = _choose(x) if backend == "auto" else backend
    run = _triton if name == "triton" else partial(_unfused_ends, BACKENDS[name])
    exact = discretization == "zoh"
    y, h_last = run(x, dt, A, B, C, D, z, dt_bias, h0, dt_softplus, exact)
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
    over the old one, this one returns it. On a GPU, where no gradient is wanted and dt_softplus is
    set, it is one kernel.

    Returns:
        y: (batch, d_inner), and the state after the token.

    Raises:
        TypeError, ValueError: as `selective_scan`.
    """
    check_choice("discretization", discretization, ["mamba", "zoh"])
    sizes = _check_tokens("batch", x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    h = _check_state("h", h, x, (sizes["batch"], *A.shape))
    given = h, x, dt, A, B, C, D, z, dt_bias
    learning = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    if _choose(x) == "triton" and dt_softplus and discretization == "mamba" and not learning:
        from mamba_tutorial.kernels import decode

        return decode.selective_step(*given, dt_softplus)
    step = _step_size(dt, dt_bias, dt_softplus, h.dtype)
    inputs = [tensor.to(h.dtype) for tensor in (A, B, C)]
    y, h = _advance(h, x.to(h.dtype), step, *inputs, discretization == "zoh")
    return _skip_and_gate(y, x, D, z), h


class SelectiveSSM(nn.Module):
    """The selective state space model with its projections ("S6" in the Mamba paper).

    Of every token x (d_inner numbers):

        Δ = softplus(W_dt W_down x + bias)        W_down: d_inner → dt_rank,  W_dt: → d_inner
        B = W_B x,  C = W_C x                     each d_inner → d_state

    and then `selective_scan` with A = −exp(A_log) and D. The parameters and their start are those
    of `Mamba` in mamba_ssm: A_n = −n in every channel; D = 1; the softplus of dt_proj.bias is
    log-uniform in [dt_min, dt_max]; dt_proj.weight is uniform in ± dt_rank^−½. (The paper writes
    that dt is uniform; the released code draws its logarithm uniformly.) A_log and D
    are to be trained without weight decay, which `mamba_tutorial.training.parameter_groups` heeds.

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
        for name, size in (("d_inner", d_inner), ("d_state", d_state), ("dt_rank", dt_rank)):
            check_length(size, name=name)
        for part in selective:
            check_choice("selective", part, ["dt", "B", "C"])
        check_choice("discretization", discretization, ["mamba", "zoh"])
        if not 0 < dt_min <= dt_max:
            raise ValueError(
                f"dt_min is {dt_min} and dt_max {dt_max}, expected 0 < dt_min ≤ dt_max"
            )
        self.discretization = discretization
        # in the order in which the released code joins them in x_proj
        self.sizes = {
            part: size
            for part, size in (("dt", dt_rank), ("B", d_state), ("C", d_state))
            if part in selective
        }
        if self.sizes:
            self.x_proj = nn.Linear(d_inner, sum(self.sizes.values()), bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        for part in {"B", "C"} - set(self.sizes):
            self.register_parameter(part, nn.Parameter(torch.ones(d_state)))
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        nn.init.uniform_(self.dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
        log_dt = torch.rand(d_inner) * math.log(dt_max / dt_min) + math.log(dt_min)
        with torch.no_grad():
            self.dt_proj.bias.copy_(inverse_softplus(log_dt.exp().clamp(min=dt_floor)))

    @property
    def A(self) -> Float[Tensor, "d_inner d_state"]:
        """−exp(A_log), negative whatever is learned, in float32."""
        return -self.A_log.float().exp()

    def select(
        self, x: Float[Tensor, "*batch d_inner"]
    ) -> tuple[
        Float[Tensor, "*batch d_inner"],
        Float[Tensor, "*batch d_state"],
        Float[Tensor, "*batch d_state"],
    ]:
        """Return Δ before bias and softplus, B and C of every token."""
        projected = self.x_proj(x).split(list(self.sizes.values()), -1) if self.sizes else ()
        parts = dict(zip(self.sizes, projected, strict=True))
        dt = F.linear(parts["dt"], self.dt_proj.weight) if "dt" in parts else torch.zeros_like(x)
        B, C = (
            parts[name] if name in parts else getattr(self, name).to(x).expand(*x.shape[:-1], -1)
            for name in ("B", "C")
        )
        return dt, B, C

    def step_size(self, x: Float[Tensor, "*batch d_inner"]) -> Float[Tensor, "*batch d_inner"]:
        """Return the step Δ that each token is given, in float32."""
        return _step_size(self.select(x)[0], self.dt_proj.bias, True, torch.float32)

    def forward(
        self, x: Tokens, z: Tokens | None = None, h0: State | None = None
    ) -> tuple[Tokens, State]:
        """Run over whole sequences, gated by silu(z) if given; return y and the last state."""
        dt, B, C = self.select(x)
        return selective_scan(
            x, dt, self.A, B, C, self.D, z, self.dt_proj.bias, True, h0, True, self.discretization
        )

    def step(
        self,
        x: Float[Tensor, "batch d_inner"],
        h: State,
        z: Float[Tensor, "batch d_inner"] | None = None,
    ) -> tuple[Float[Tensor, "batch d_inner"], State]:
        """Read one token; return its output and the new state."""
        dt, B, C = self.select(x)
        return selective_step(
            h, x, dt, self.A, B, C, self.D, z, self.dt_proj.bias, True, self.discretization
        )


def inverse_softplus(y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the x with log(1 + e^x) = y, for y > 0: y + log(1 − e^−y), without cancellation."""
    return y + torch.log(-torch.expm1(-y))


def _triton(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    dt_softplus: bool,
    exact: bool,
) -> tuple[Tensor, Tensor]:
    """The whole of it in one kernel: bias, softplus, scan, skip connection and gate."""
    check_triton(x, "backend")
    if not dt_softplus:
        _step_size(dt, dt_bias, False, torch.float32)  # for its check alone
    from mamba_tutorial.kernels.selective_scan import SelectiveScan

    return SelectiveScan.apply(x, dt, A, B, C, D, z, dt_bias, h0, dt_softplus, exact)


def _unfused_ends(
    scan: Callable,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    h0: Tensor | None,
    dt_softplus: bool,
    exact: bool,
) -> tuple[Tensor, Tensor]:
    """Bias and softplus before a scan, skip connection and gate after it, as PyTorch operations."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if h0 is None:
        h0 = x.new_zeros(len(x), *A.shape, dtype=dtype)
    step = _step_size(dt, dt_bias, dt_softplus, dtype)
    y, h_last = scan(x.to(dtype), step, A.to(dtype), B.to(dtype), C.to(dtype), h0, exact)
    return _skip_and_gate(y, x, D, z), h_last


# Scans: (x, Δ, A, B, C, h0, exact) → (y, last state), all of one dtype, without D and gate.


def _sequential(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, exact: bool
) -> tuple[Tensor, Tensor]:
    outputs = []
    for x_t, dt_t, B_t, C_t in zip(*(part.unbind(1) for part in (x, dt, B, C)), strict=True):
        y_t, h = _advance(h, x_t, dt_t, A, B_t, C_t, exact)
        outputs.append(y_t)
    return torch.stack(outputs, 1), h


def _parallel(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, exact: bool
) -> tuple[Tensor, Tensor]:
    """Scan some tokens at a time; the backward pass computes their states once more."""
    batch, length, _ = x.shape
    size = max(1, CHUNK_NUMBERS // (batch * A.numel()))
    outputs = []
    for start in range(0, length, size):
        parts = [part[:, start : start + size] for part in (x, dt, B, C)]
        y, h = checkpoint(
            _chunk, *parts, A, h, exact, use_reentrant=False, preserve_rng_state=False
        )
        outputs.append(y)
    return torch.cat(outputs, 1), h


def _chunk(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, h: Tensor, exact: bool
) -> tuple[Tensor, Tensor]:
    states = linear_scan(*_discrete(x, dt, A, B, exact), h)
    return (states @ C[..., None]).squeeze(-1), states[:, -1]


def _numba(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, exact: bool
) -> tuple[Tensor, Tensor]:
    if not installed("numba"):
        raise ValueError("backend is 'numba', but Numba is not installed: pip install numba")
    if x.device.type != "cpu" or x.dtype != torch.float32:
        given = f"{x.dtype} on {x.device}"
        raise ValueError(f"backend is 'numba', which computes in float32 on a CPU, not {given}")
    from mamba_tutorial.kernels.cpu import SelectiveScan

    return SelectiveScan.apply(x, dt, A, B, C, h, exact)


BACKENDS = {"sequential": _sequential, "parallel": _parallel, "numba": _numba}


def _choose(x: Tensor) -> Backend:
    if x.dtype != torch.float64:
        if x.is_cuda and installed("triton"):
            return "triton"
        if x.device.type == "cpu" and installed("numba"):
            return "numba"
    return "parallel"


def _advance(
    h: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, exact: bool
) -> tuple[Tensor, Tensor]:
    """One step of the recurrence, and its output."""
    a, b = _discrete(x, dt, A, B, exact)
    h = a * h + b
    return (h @ C[..., None]).squeeze(-1), h


def _discrete(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Return exp(Δ A) and w(Δ A) Δ x B, both (..., d_inner, d_state)."""
    z = dt[..., None] * A
    b = (dt * x)[..., None] * B[..., None, :]
    return z.exp(), exprel(z) * b if exact else b


def _step_size(dt: Tensor, bias: Tensor | None, softplus: bool, dtype: torch.dtype) -> Tensor:
    dt = dt.to(dtype) if bias is None else dt.to(dtype) + bias.to(dtype)
    if softplus:
        return F.softplus(dt)
    if (dt < 0).any():
        needed = "expected Δ ≥ 0, or dt_softplus=True"
        raise ValueError(f"dt has minimum {dt.min().item():g} (with its bias), {needed}")
    return dt


def _skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = y + D.to(y.dtype) * x.to(y.dtype)
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(x.dtype)


def _check_tokens(leading: str, **given: Tensor | None) -> dict[str, int]:
    """Check dtypes, devices and shapes; return the sizes of the axes."""
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    x, A = tensors["x"], tensors["A"]
    for name, tensor in tensors.items():
        _check_kind(name, tensor, x)
    axes = leading.split()
    if x.ndim != len(axes) + 1:
        needed = f"expected ({', '.join(axes)}, d_inner)"
        raise ValueError(f"x has shape {tuple(x.shape)}, {needed}")
    sizes = dict(zip([*axes, "d_inner"], x.shape, strict=True))
    check_shape("A", A, "d_inner d_state", d_inner=sizes["d_inner"])
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
    _check_kind(name, h, x)
    if h.shape != shape:
        needed = f"expected (batch, d_inner, d_state) = {shape}"
        raise ValueError(f"{name} has shape {tuple(h.shape)}, {needed}")
    return h.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _check_kind(name: str, tensor: Tensor, x: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected a floating one")
    if (tensor.dtype == torch.float64) != (x.dtype == torch.float64):
        needed = "expected all of float64 or none"
        raise TypeError(f"{name} has dtype {tensor.dtype} and x {x.dtype}, {needed}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on device {tensor.device}, expected {x.device}, that of x")
