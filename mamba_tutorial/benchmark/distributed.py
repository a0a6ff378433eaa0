"""Measure one sequence over several GPUs against one: part of `make bench`.

One process for each GPU, with NCCL; each holds a piece of one sequence, of equal length. Measured
is what a training step needs, forward with backward, called as a user calls it, of

- "scan": `distributed.selective_scan`, batch 1, 1024 channels, 16 states, bfloat16, with gate,
  bias, softplus and skip connection: 16 GiB of inputs, output and gradients for a million tokens;
- "block": a `MambaBlock` of d_model 512, so also of 1024 channels and 16 states, `over_length`, in
  bfloat16 autocast.

Before anything is timed, the output and all gradients are compared with those of one GPU that has
the whole. Where the whole does not fit one GPU, the row says so, and what is timed is unchecked.

Of a repetition the slowest rank's time counts, and of its collectives, between two CUDA events each
and with the waiting for the others, that of the rank that waited least. Times are medians.
`bytes_sent` counts tensors that a rank sends to others, the most of all ranks; some hundred bytes
that say how the calls look come on top. `peak_mib` is the most that a GPU held, inputs included.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from tqdm import tqdm

from mamba_tutorial import distributed, selective
from mamba_tutorial.benchmark.measuring import Row, attempt, relative, saved
from mamba_tutorial.benchmark.scans import scan_inputs
from mamba_tutorial.mamba import MambaBlock, MambaConfig

COMMAND = "python -m mamba_tutorial.benchmark.distributed"
LENGTHS = [1 << k for k in range(17, 22)]
CHANNELS = 1024
REPEATS = 10


class Work(NamedTuple):
    """What is measured: y = run(*tensors), and the gradients of all tensors.

    Attributes:
        tensors: the inputs.
        along: which of them have tokens along axis 1, and are cut there.
        upstream: the gradient of y.
        alone: run, on one process.
        together: run, over all ranks.
        over: the context of `together`, entered once.
    """

    tensors: list[Tensor]
    along: list[bool]
    upstream: Tensor
    alone: Callable[..., Tensor]
    together: Callable[..., Tensor]
    over: AbstractContextManager

    def piece(self, mine: slice) -> "Work":
        """Return the work with these tokens alone, in memory of their own."""
        tensors = [
            t.detach()[:, mine].clone().requires_grad_() if cut else t
            for t, cut in zip(self.tensors, self.along, strict=True)
        ]
        return self._replace(tensors=tensors, upstream=self.upstream[:, mine].clone())

    def results(self, run: Callable[..., Tensor]) -> list[Tensor]:
        """Return y and the gradients."""
        y = run(*self.tensors)
        return [y.detach(), *torch.autograd.grad(y, self.tensors, self.upstream)]


def scan(length: int, channels: int, device: str) -> Work:
    """Return the selective scan, of bfloat16."""
    tensors = [t.requires_grad_() for t in scan_inputs(1, length, channels, device=device)]
    upstream = torch.randn_like(tensors[0])
    alone, together = (
        partial(module.selective_scan, dt_softplus=True) for module in (selective, distributed)
    )
    along = [tensor.ndim == 3 for tensor in tensors]
    return Work(tensors, along, upstream, alone, together, nullcontext())


def block(length: int, channels: int, device: str) -> Work:
    """Return a block, in bfloat16 autocast; its tensors are the input and the parameters."""
    layer = MambaBlock(MambaConfig(d_model=channels // 2, n_layer=1, vocab_size=1)).to(device)
    x = torch.randn(1, length, channels // 2, device=device, requires_grad=True)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return layer(x)

    tensors = [x, *layer.parameters()]
    along = [True] + [False] * (len(tensors) - 1)
    upstream = torch.randn_like(x, dtype=torch.bfloat16)
    return Work(tensors, along, upstream, run, run, distributed.over_length(layer))


KINDS = {"scan": scan, "block": block}


# how to measure


def moment(device: str) -> object:
    """Return this moment, of the GPU's work if there is one."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first: object, second: object) -> float:
    """Return the milliseconds from one moment to another; the GPU must have passed both."""
    if isinstance(first, float):
        return 1e3 * (second - first)
    return first.elapsed_time(second)


SENT = {  # bytes, from the first two arguments of a collective: room for what arrives, and its own
    "all_gather": lambda found, own: own.nbytes * (len(found) - 1),
    "all_to_all_single": lambda found, own: own.nbytes,  # none for itself
    "all_gather_object": lambda found, own: 0,
}


class Traffic:
    """What the collectives of `distributed` send, in bytes, and when they begin and end."""

    def __init__(self, device: str):
        self.device, self.bytes, self.spans = device, 0, []

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note the calls made inside."""
        with ExitStack() as stack:
            for name, size in SENT.items():
                call = partial(self._call, getattr(dist, name), size)
                stack.enter_context(mock.patch.object(dist, name, call))
            yield

    def _call(self, collective: Callable, size: Callable, *given, **named) -> None:
        begin = moment(self.device)
        collective(*given, **named)
        self.spans.append((begin, moment(self.device)))
        self.bytes += size(*given[:2])


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def repeated(run: Callable[[], object], device: str, together: bool) -> Row:
    """Return the times of run() in milliseconds, its bytes, and the most memory held, in MiB.

    Together all ranks begin at once.
    """
    for _ in range(2):
        run()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, communication = [], []
    for _ in range(REPEATS):
        synchronize(device)
        if together:
            dist.barrier()
        traffic = Traffic(device)
        with traffic.watched():
            begin = moment(device)
            run()
            end = moment(device)
        synchronize(device)
        times.append(between(begin, end))
        communication.append(sum(between(*span) for span in traffic.spans))
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
    return {"ms": times, "communication_ms": communication, "bytes": traffic.bytes, "peak": peak}


def on_one(work: Work, rank: int, mine: slice, device: str) -> tuple[list[Tensor] | None, Row]:
    """Return this rank's part of the results of the whole, and what one GPU takes for it.

    None if it does not fit one GPU.
    """
    row = {}
    try:
        if rank == 0:
            found = repeated(lambda: work.results(work.alone), device, together=False)
            took = statistics.median(found["ms"])
            row = {"single_both_ms": took, "single_peak_mib": found["peak"]}
        cut = True, *work.along
        return [
            value[:, mine].clone() if along else value
            for value, along in zip(work.results(work.alone), cut, strict=True)
        ], row
    except torch.cuda.OutOfMemoryError:
        return None, row | {"single": "passed over: out of memory"}


def error_of(found: Sequence[Tensor], exact: Sequence[Tensor], along: Sequence[bool]) -> float:
    """Return how far this rank's results are off; of what is not cut, the sum over the ranks is."""
    errors = []
    for value, right, cut in zip(found, exact, [True, *along], strict=True):
        whole = value if cut else value.contiguous()
        if not cut:
            dist.all_reduce(whole)
        errors.append(relative(whole, right))
    return max(errors)


def measure(rank: int, ranks: int, kind: str, length: int, channels: int, device: str) -> Row:
    """Compare and time one kind of work at one length; all ranks return the same but for one GPU.

    Raises:
        ValueError: the ranks together are off by more than 1e-2.
    """
    torch.manual_seed(0)
    whole = KINDS[kind](length, channels, device)
    mine = slice(length * rank // ranks, length * (rank + 1) // ranks)
    exact, row = on_one(whole, rank, mine, device)
    work = whole.piece(mine)
    del whole
    if device == "cuda":
        torch.cuda.empty_cache()
    with work.over:
        found, checked = work.results(work.together), [None] * ranks
        dist.all_gather_object(checked, exact is not None)
        if all(checked):
            errors = [None] * ranks
            dist.all_gather_object(errors, error_of(found, exact, work.along))
            row["error"] = max(errors)
            if not row["error"] < 1e-2:
                raise ValueError(f"wrong, by {row['error']:.1e}")
        del exact, found
        everyone = [None] * ranks
        own = repeated(lambda: work.results(work.together), device, together=True)
        dist.all_gather_object(everyone, own)
    return row | summary(everyone)


def summary(everyone: Sequence[Row]) -> Row:
    """Return one row of what `repeated` gave on all ranks."""
    took, waited = (zip(*(own[key] for own in everyone), strict=True)
                    for key in ("ms", "communication_ms"))  # fmt: skip
    both, communication = statistics.median(map(max, took)), statistics.median(map(min, waited))
    peaks = [own["peak"] for own in everyone]
    return {
        "both_ms": both,
        "communication_ms": communication,
        "communication_share": communication / both,
        "bytes_sent": max(own["bytes"] for own in everyone),
        "peak_mib": None if None in peaks else max(peaks),
    }


def case(kind: str, length: int, channels: int, ranks: int, device: str = "cuda") -> Row:
    """Measure in processes of their own, so that one that fails takes nothing along."""
    with tempfile.TemporaryDirectory() as folder:
        given = ranks, folder, (kind, length, channels, device)
        try:
            mp.spawn(_work, given, nprocs=ranks)
        except mp.ProcessRaisedException as error:
            raise RuntimeError(str(error).strip().splitlines()[-1]) from error
        return json.loads((Path(folder) / "row").read_text())


def _work(rank: int, ranks: int, folder: str, given: tuple) -> None:
    own = {}
    if given[-1] == "cuda":
        torch.cuda.set_device(rank)
        own = {"device_id": torch.device("cuda", rank)}
    meeting = f"file://{folder}/meeting"
    backend = "nccl" if own else "gloo"
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=ranks, **own)
    row = measure(rank, ranks, *given)
    if rank == 0:
        (Path(folder) / "row").write_text(json.dumps(row))
    dist.destroy_process_group()  # not after an error, when others would be waited for


def rows(ranks: int) -> Iterator[Row]:
    """Yield one row for every kind and length; with fewer than two GPUs one with the reason."""
    if ranks < 2:
        yield {"passed_over": f"there are {ranks} GPUs, expected two at least"}
        return
    for kind, length in product(KINDS, LENGTHS):
        row = {"name": f"mamba_tutorial, {kind}", "length": length, "ranks": ranks}
        yield attempt(row, partial(case, kind, length, CHANNELS, ranks))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print every row, and write the record."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a folder for the record")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.exit(1, "PyTorch sees no GPU here\n")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    path = options.out and options.out / "gpu_distributed.json"
    found = saved(rows(torch.cuda.device_count()), COMMAND, path)
    for row in tqdm(found, disable=None):
        tqdm.write(json.dumps(row))


if __name__ == "__main__":
    main()
