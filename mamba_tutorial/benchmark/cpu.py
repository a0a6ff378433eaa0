"""Measure the selective scan side by side with others: `make bench`.

Each candidate computes the same thing from the same inputs. Before it is timed, its output and all
its gradients are compared with the definition in float64; one that is wrong is not timed. A
candidate whose library is missing is passed over with a line that says so. The results are printed
as a table and written as JSON, with versions, hardware and the command.
"""

import argparse
import importlib
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mamba_tutorial.selective import Backend, selective_scan
from mamba_tutorial.training import environment

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # (x, dt, A, B, C) → y

SHAPE = {"batch": 1, "length": 1024, "d_inner": 512, "d_state": 16}
TOLERANCE = 1e-4  # of the largest number, in float32
COMMAND = "python -m mamba_tutorial.benchmark"


@dataclass(frozen=True)
class Measurement:
    """What one candidate took for a forward and a backward pass.

    Attributes:
        name: of the candidate.
        forward_ms: the median time of the forward pass, in milliseconds, gradients being recorded.
        both_ms: the median time of forward and backward together.
        peak_mib: the most memory that PyTorch's allocator held at a time beyond the inputs, forward
            and backward, in MiB.
        error: the largest error of the output or a gradient, relative to its largest number.
    """

    name: str
    forward_ms: float
    both_ms: float
    peak_mib: float
    error: float


def inputs(batch: int, length: int, d_inner: int, d_state: int) -> list[Tensor]:
    """Return x, dt, A, B, C as a Mamba block has them at the start, float64, always the same."""
    generator = torch.Generator().manual_seed(0)
    tokens, shared = (batch, length, d_inner), (2, batch, length, d_state)
    x = torch.randn(tokens, dtype=torch.float64, generator=generator)
    log_dt = torch.rand(tokens, dtype=torch.float64, generator=generator) * 2 - 3
    A = -torch.arange(1.0, d_state + 1, dtype=torch.float64).repeat(d_inner, 1)
    B, C = torch.randn(shared, dtype=torch.float64, generator=generator).unbind(0)
    return [x, 10**log_dt, A, B, C]


def ours(backend: Backend) -> Callable[[], Scan]:
    """Return an adapter for a backend of `selective_scan`."""

    def adapter() -> Scan:
        if backend == "numba":
            importlib.import_module("numba")
        return lambda x, dt, A, B, C: selective_scan(x, dt, A, B, C, backend=backend)

    return adapter


def unfused(scan: Callable[[Tensor, Tensor], Tensor]) -> Scan:
    """Return a selective scan that stores decays, inputs and states, around a linear scan."""

    def run(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        a, b = torch.exp(dt[..., None] * A), (dt * x)[..., None] * B[:, :, None]
        return (scan(a, b) @ C[..., None]).squeeze(-1)

    return run


def mambapy() -> Scan:
    """Adapt `pscan` of mambapy, a Blelloch scan in PyTorch with a backward pass of its own."""
    return unfused(importlib.import_module("mambapy.pscan").pscan)


def associative_scan() -> Scan:
    """Adapt PyTorch's `associative_scan` in its generic mode, which runs on every device."""
    module = importlib.import_module("torch._higher_order_ops.associative_scan")

    def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]):
        return left[0] * right[0], right[0] * left[1] + right[1]

    def scan(a: Tensor, b: Tensor) -> Tensor:
        return module.associative_scan(combine, (a, b), 1, combine_mode="generic")[1]

    return unfused(scan)


CANDIDATES: dict[str, Callable[[], Scan]] = {
    "mamba_tutorial, numba": ours("numba"),
    "mamba_tutorial, parallel": ours("parallel"),
    "mamba_tutorial, sequential": ours("sequential"),
    "mambapy, pscan": mambapy,
    "torch, associative_scan": associative_scan,
}


def evaluate(scan: Scan, given: Sequence[Tensor]) -> list[Tensor]:
    """Return y and the gradients of its sum with respect to all inputs."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
    y = scan(*leaves)
    return [y.detach(), *torch.autograd.grad(y.sum(), leaves)]


def relative_error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest error of any tensor, relative to the tensor's largest number."""
    return max(
        ((result - reference).abs().max() / reference.abs().max()).item()
        for result, reference in zip(results, exact, strict=True)
    )


def peak_memory(run: Callable[[], object]) -> float:
    """Return the most that PyTorch's CPU allocator held at a time during run(), in MiB.

    Memory that was held before, such as the inputs, does not count.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / 2**20


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Return the median time of run() after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def measure(name: str, scan: Scan, given: Sequence[Tensor], repeats: int = 10) -> Measurement:
    """Check a candidate against the definition in float64, then time it in float32.

    Raises:
        ValueError: the output or a gradient is wrong by more than TOLERANCE.
    """
    exact = evaluate(ours("sequential")(), given)
    single = [tensor.float() for tensor in given]
    error = relative_error([result.double() for result in evaluate(scan, single)], exact)
    if not error < TOLERANCE:
        raise ValueError(f"{name} has an error of {error:.1e}, expected less than {TOLERANCE:.0e}")
    leaves = [tensor.requires_grad_() for tensor in single]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(scan(*leaves).sum(), leaves)

    return Measurement(
        name=name,
        forward_ms=milliseconds(lambda: scan(*leaves), repeats),
        both_ms=milliseconds(both, repeats),
        peak_mib=peak_memory(both),
        error=error,
    )


def table(results: Sequence[Measurement]) -> str:
    """Return the results as lines of text, with ratios to the first."""
    lines = [f"{'':27} forward     both   ratio    peak   ratio    error"]
    for row in results:
        slower, larger = row.both_ms / results[0].both_ms, row.peak_mib / results[0].peak_mib
        lines.append(
            f"{row.name:27} {row.forward_ms:4.1f} ms {row.both_ms:5.1f} ms {slower:6.1f}×"
            f" {row.peak_mib:4.0f} MiB {larger:5.1f}×  {row.error:.0e}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all candidates that are installed; print the table and write the record."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of each candidate")
    parser.add_argument("--out", type=Path, help="a JSON file for the record")
    options = parser.parse_args(arguments)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler logs each of its starts
    given = inputs(**SHAPE)
    results = []
    bar = tqdm(CANDIDATES.items(), disable=None, leave=False)
    for name, adapter in bar:
        bar.set_description(name)
        try:
            scan = adapter()
        except ModuleNotFoundError as error:
            tqdm.write(f"{name}: passed over, {error.name} is not installed")
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a peer's own
            results.append(measure(name, scan, given, options.repeats))
    print(f"selective scan on the CPU, {torch.get_num_threads()} threads, float32, {SHAPE}")
    print(table(results))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"command": COMMAND, "shape": SHAPE, "environment": environment()}
        record["results"] = [asdict(result) for result in results]
        options.out.write_text(json.dumps(record, indent=1) + "\n")
