"""Measure the kernels on a GPU side by side with others: `make bench`.

Each section measures one thing at several sizes, with every library that is installed, one after
the other on the same inputs, and writes `gpu_<section>.json` with hardware, versions and command.
A candidate is compared before it is timed: with float64 where that can be afforded, else with the
first candidate. One that is wrong is not timed; one that is missing, or that fails, is recorded
with the reason.

Times are medians of CUDA events around the replay of a CUDA graph, so that starting kernels from
Python does not count, with the second-level cache cleared before each. Where a library cannot be
recorded in a graph it is called directly, and the row says so. The kernels of `units` read the
clock of their multiprocessor instead.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from mamba_tutorial.benchmark.attention import attention
from mamba_tutorial.benchmark.learning import block, layers, training, transformers
from mamba_tutorial.benchmark.measuring import saved
from mamba_tutorial.benchmark.recurrence import recurrence
from mamba_tutorial.benchmark.scans import chunks, lessons, selective, starts, sweep
from mamba_tutorial.benchmark.units import units
from mamba_tutorial.benchmark.writing import contexts, decode, generation

COMMAND = "python -m mamba_tutorial.benchmark.gpu"
SECTIONS = {
    section.__name__: section
    for section in (
        units,
        recurrence,
        selective,
        sweep,
        starts,
        chunks,
        lessons,
        attention,
        decode,
        generation,
        contexts,
        training,
        transformers,
        layers,
        block,
    )
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the sections, print a table of each, and write the records."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections alone")
    parser.add_argument("--out", type=Path, help="a folder for the records")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.exit(1, "PyTorch sees no GPU here\n")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only or SECTIONS:
        path = options.out and options.out / f"gpu_{name}.json"
        rows = saved(SECTIONS[name](), f"{COMMAND} --only {name}", path)
        for row in tqdm(rows, desc=name, disable=None):
            shown = " ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in row.items()
            )
            tqdm.write(f"{name}: {shown}")


if __name__ == "__main__":
    main()
