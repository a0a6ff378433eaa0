"""How something is timed on a GPU, what it is compared with first, and on which machine it was."""

import gc
import importlib
import json
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from mamba_tutorial.training import environment

Run = Callable[[], object]
Row = dict[str, object]


def milliseconds(run: Run, repeats_ms: int = 60) -> tuple[float, str]:
    """Return the median time of run(), and whether it was replayed as a graph or called."""
    triton = importlib.import_module("triton")
    try:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run()
            run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # other threads, a peer's, may go on calling CUDA meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            kept = run()
        replay, how = graph.replay, "graph"
    except RuntimeError as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        torch.cuda.synchronize()
        replay, how, kept = run, "called", None
    took = triton.testing.do_bench(replay, warmup=25, rep=repeats_ms, return_mode="median")
    del kept
    return took, how


def peak_mib(run: Run) -> float:
    """Return the most memory held during run() beyond what was held before, in MiB."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_bandwidth() -> float:
    """Return the bytes per second, read and written, of a large copy on the device."""
    triton = importlib.import_module("triton")
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    took = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * source.nbytes / took * 1e3


def relative(value: Tensor, exact: Tensor) -> float:
    """Return ‖value − exact‖ / ‖exact‖, added up in float64; ‖value‖ where `exact` is zero."""
    apart, size = (
        torch.linalg.vector_norm(tensor, dtype=torch.float64)
        for tensor in (value.to(exact) - exact, exact)
    )
    return (apart / size if size else apart).item()


def attempt(row: Row, measure: Callable[[], Row]) -> Row:
    """Add what measure() returns to the row, or the reason why there is nothing."""
    try:
        return row | measure()
    except ModuleNotFoundError as error:
        return row | {"passed_over": f"{error.name} is not installed"}
    except Exception as error:  # a peer's, whatever it is, is a result
        lines = str(error).splitlines() or [""]
        return row | {"passed_over": f"{type(error).__name__}: {lines[0][:200]}"}
    finally:
        gc.collect()  # graphs, which hold memory, are parts of cycles
        torch.cuda.empty_cache()


def no_grad(run: Run) -> Run:
    """Return run() without gradients."""
    return torch.no_grad()(run)


def only(kind: str) -> AbstractContextManager:
    """Let PyTorch compute attention in this way alone."""
    return torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, kind))


def hardware() -> Row:
    """Return versions, the GPU that is used and its clocks as they are while it works."""
    query = "name,driver_version,clocks.sm,clocks.mem"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    if torch.cuda.is_available():
        command.append(f"--id=GPU-{torch.cuda.get_device_properties().uuid}")
        work = torch.zeros(1 << 28, device="cuda")
        for _ in range(1000):  # about a second, during which the clocks are asked for
            work.neg_()
        del work
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    versions = {}
    for name in ("triton", "mamba_ssm", "accelerated_scan", "transformers", "jax"):
        try:
            versions[name] = getattr(importlib.import_module(name), "__version__", "unknown")
        except ImportError:
            versions[name] = "not installed"
    return environment() | versions | {"cuda": torch.version.cuda, "nvidia_smi": said}


def saved(rows: Iterable[Row], command: str, path: Path | None) -> Iterator[Row]:
    """Yield the rows; write those so far to a file after each, so that a stop loses none.

    Args:
        rows: as they are measured.
        command: that measures them.
        path: of the record, in a folder that exists; None writes nothing.
    """
    record = {"command": command, "environment": hardware(), "results": []}
    for row in rows:
        record["results"].append(row)
        if path is not None:
            path.write_text(json.dumps(record, indent=1) + "\n")
        yield row
