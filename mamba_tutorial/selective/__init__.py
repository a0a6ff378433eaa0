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
from collections.abc import Collection, Sequence, Set
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mamba_tutorial._check import (
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
    wide,
)
from mamba_tutorial.ops import without_autocast
from mamba_tutorial.selective._checks import (
    check_scan,
    check_state,
    check_step_size,
    check_tokens,
    choose,
)
from mamba_tutorial.selective._operators import STEP, read_token, run_scan, scan
from mamba_tutorial.selective._token import step_size

Discretization = Literal["mamba", "zoh"]
Backend = Literal["auto", "sequential", "parallel", "numba", "triton"]
Tokens = Float[Tensor, "batch length d_inner"]
Shared = Float[Tensor, "batch length d_state"]
State = Float[Tensor, "batch d_inner d_state"]


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
    sizes = check_tokens("batch", x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    h = check_state("h", h, x, (sizes["batch"], *A.shape))
    exact = discretization == "zoh"
    if not dt_softplus:
        check_step_size(dt, dt_bias)
    with without_autocast(x):
        if choose(x) == "triton" and dt_softplus and not exact:
            return STEP(h, x, dt, A, B, C, D, z, dt_bias)
        return read_token(h, x, dt, A, B, C, D, z, dt_bias, dt_softplus, exact)


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
            h = check_state("h", h, x, (x.shape[0], *self.A_log.shape))
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
