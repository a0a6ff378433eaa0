"""The trainings behind the book's claims, over several seeds: python -m mamba_tutorial.experiments.

An experiment is a table: models by name, each trained with every seed and every learning rate. Its
configuration is plain data, `EXPERIMENTS`; its record, one JSON file in `book/results`, holds the
configuration, the command, versions and hardware, and of each run the scores on the way and the
time. The record is written after each run, and a run that it holds already is not run again: stop
it at any time, and start it again with the same command.
"""

import argparse
import copy
import json
import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from mamba_tutorial import data, tasks
from mamba_tutorial._check import check_choice
from mamba_tutorial.layers import (
    BilinearS4D,
    GRULayer,
    HeldS4,
    LSTMLayer,
    SelectiveLayer,
    network,
)
from mamba_tutorial.s4 import S4, S4D, SequenceModel
from mamba_tutorial.training import accuracy, environment, train

TASK = {"task": "selective_copying", "data": 4, "noise": 44, "vocab": 10}
LONG_TASK = {"task": "selective_copying", "data": 16, "noise": 240, "vocab": 16}
STEPS = {"dt_min": 1e-2, "dt_max": 0.5}  # for sequences as short as those of TASK
S4D_LAYER = {"layer": "S4D", "d_state": 128, "init": "lin"}
SELECTIVE_LAYER = {"layer": "selective", "d_state": 16, "dt_rank": 8}


def _contestants(**steps: float) -> dict:
    """Return the models of the wall, of about equal parameters within a row of layers."""
    return {
        "S4D, 1 layer": {**S4D_LAYER, **steps, "layers": 1},
        "S4D, 2 layers": {**S4D_LAYER, **steps, "layers": 2},
        "S4D, 4 layers": {**S4D_LAYER, **steps, "layers": 4},
        "LSTM, 1 layer": {"layer": "LSTM", "hidden": 48, "layers": 1},
        "selective, 1 layer": {**SELECTIVE_LAYER, **steps, "layers": 1},
        "selective, 2 layers": {**SELECTIVE_LAYER, **steps, "layers": 2},
    }


def _readers() -> dict:
    """Return the models that read digits; they differ in layer, rule and eigenvalues."""
    size = {"d_state": 16, "dt_min": 1e-2, "dt_max": 0.3, "layers": 2}
    return {
        "S4D": {"layer": "S4D", "init": "legs", **size},
        "S4": {"layer": "S4", **size},
        "S4D, bilinear": {"layer": "S4D, bilinear", "init": "legs", **size},
        "S4, zero-order hold": {"layer": "S4, zero-order hold", **size},
        "S4D, random A": {"layer": "S4D", "init": "random", **size},
        "S4D, random A, Re = -1/2": {"layer": "S4D", "init": "random, slow", **size},
        "S4D, real A": {"layer": "S4D", "init": "real", **size},
        "S4D, shuffled pixels": {"layer": "S4D", "init": "legs", **size, "shuffled": True},
        "GRU": {"layer": "GRU", "hidden": 24, "layers": 2},
    }


def _parts() -> dict:
    """Return a selective layer with each choice of what depends on the token."""
    layer = {**SELECTIVE_LAYER, **STEPS, "layers": 1}
    return {
        "none": {**layer, "selective": []},
        "B": {**layer, "selective": ["B"]},
        "C": {**layer, "selective": ["C"]},
        "B and C": {**layer, "selective": ["B", "C"]},
        "Δ": {**layer, "selective": ["dt"]},
        "Δ, B and C": layer,
        "Δ, B and C, exact": {**layer, "discretization": "zoh"},
    }


EXPERIMENTS = {
    "wall": {
        **TASK,
        "batch": 64,
        "steps": 3000,
        "learning_rates": [3e-3, 1e-2],
        "seeds": [0, 1, 2, 3, 4],
        "models": _contestants(**STEPS),
    },
    "wall_long": {
        **LONG_TASK,
        "batch": 64,
        "steps": 2000,
        "learning_rates": [3e-3, 1e-2],
        "seeds": [0, 1, 2, 3, 4],
        "models": _contestants(),
    },
    "selection": {
        **TASK,
        "batch": 32,
        "steps": 2000,
        "learning_rates": [1e-2],
        "seeds": [0, 1, 2, 3, 4],
        "models": _parts(),
    },
    "digits": {
        "task": "digits",
        "batch": 64,
        "steps": 300,
        "learning_rates": [1e-2],
        "seeds": [0, 1, 2, 3, 4],
        "models": _readers(),
    },
}
LAYERS = {
    "S4D": S4D,
    "S4D, bilinear": BilinearS4D,
    "S4": S4,
    "S4, zero-order hold": HeldS4,
    "selective": SelectiveLayer,
    "LSTM": LSTMLayer,
    "GRU": GRULayer,
}
D_MODEL, DIGITS_MODEL, TESTED, EVALUATIONS = 64, 48, 2048, 20


def quick(configuration: dict) -> dict:
    """Return a small form of an experiment, which takes seconds: two seeds, a few updates."""
    few = {"steps": 40, "seeds": [0, 1], "learning_rates": configuration["learning_rates"][:1]}
    return {**configuration, **few}


def build(configuration: dict, name: str, seed: int) -> nn.Module:
    """Return the network that an entry of "models" describes, as it starts with this seed."""
    arguments = dict(configuration["models"][name])
    kind, layers = LAYERS[arguments.pop("layer")], arguments.pop("layers")
    arguments.pop("shuffled", None)
    if arguments.get("init", "").startswith("random"):
        slow = arguments["init"] == "random, slow"
        arguments["init"] = random_eigenvalues(arguments["d_state"], seed, slow=slow)
    torch.manual_seed(seed)
    if configuration["task"] == "digits":
        stack = [kind(DIGITS_MODEL, **arguments) for _ in range(layers)]
        encoder, decoder = nn.Linear(1, DIGITS_MODEL), nn.Linear(DIGITS_MODEL, 10)
        return SequenceModel(encoder, stack, decoder, pool=False)
    vocab = configuration["vocab"]
    return network(lambda d_model: kind(d_model, **arguments), D_MODEL, vocab=vocab, layers=layers)


def random_eigenvalues(d_state: int, seed: int, *, slow: bool) -> torch.Tensor:
    """Return d_state/2 eigenvalues of a large random matrix, moved to the left half-plane.

    Args:
        d_state: the size of the state.
        seed: of the matrix.
        slow: give all of them the real part −½, as those of LegS have, and keep the frequencies.
    """
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(4 * d_state, 4 * d_state, generator=generator)
    values = torch.linalg.eigvals(matrix)
    upper = values[values.imag > 0][: d_state // 2]
    real = torch.full_like(upper.real, 0.5) if slow else upper.real.abs()
    return torch.complex(-real, upper.imag)


def run(configuration: dict, name: str, lr: float, seed: int) -> dict:
    """Train one model once; return its part of the record."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(configuration, name, seed).to(device)
    digits = configuration["task"] == "digits"
    shuffled = "shuffled" in configuration["models"][name]
    source = _digits(shuffled) if digits else _task(configuration)

    def batches(generator: torch.Generator, size: int = configuration["batch"]) -> tuple:
        return tuple(tensor.to(device) for tensor in source(size, generator))

    test = batches(torch.Generator().manual_seed(2**31 + seed), None if digits else TESTED)
    steps = configuration["steps"]
    record = train(
        model,
        batches,
        steps=steps,
        lr=lr,
        seed=seed,
        evaluate=lambda model: accuracy(model, *test),
        every=max(1, steps // EVALUATIONS),
        name=f"{name}, {lr:g}, seed {seed}",
    )
    result = {
        "model": name,
        "lr": lr,
        "seed": seed,
        "parameters": record.parameters,
        "scores": [[step, round(score, 5)] for step, score in record.scores],
        "seconds": round(record.seconds, 1),
    }
    if digits and hasattr(model.layers[0], "log_dt"):
        result["dense, half the step"] = round(_at_half_the_step(model, *test), 5)
    return result


def _task(configuration: dict) -> Callable:
    sizes = {key: configuration[key] for key in ("data", "noise", "vocab")}
    task = getattr(tasks, configuration["task"])
    return lambda size, generator: task(size, generator, **sizes)


def _digits(shuffled: bool) -> Callable:
    """Return batches of images as pixels, to be named at the last one; without a size, new ones.

    Shuffled, the pixels come in an order that is random but the same for all images.
    """
    pixels, labels = data.handwritten_digits()
    sequences = pixels.reshape(-1, 64, 1) - pixels.mean()
    if shuffled:
        sequences = sequences[:, torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    targets = torch.full((len(labels), 64), tasks.IGNORE)
    targets[:, -1] = labels
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    training, new = order[:1400], order[1400:]

    def batches(size: int | None, generator: torch.Generator) -> tuple:
        if size is None:
            return sequences[new], targets[new]
        chosen = training[torch.randint(len(training), (size,), generator=generator)]
        return sequences[chosen], targets[chosen]

    return batches


def _at_half_the_step(model: nn.Module, x: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the accuracy with every pixel read twice and every Δ halved."""
    model = copy.deepcopy(model)
    for layer in model.layers:
        layer.log_dt.data -= math.log(2)
    silent = torch.full_like(targets, tasks.IGNORE)
    twice = torch.stack([silent, targets], dim=2).flatten(1)
    return accuracy(model, x.repeat_interleave(2, dim=1), twice)


def missing(configuration: dict, runs: list[dict]) -> Iterator[tuple[str, float, int]]:
    """Yield what is still to be run: model, learning rate and seed."""
    done = {(run["model"], run["lr"], run["seed"]) for run in runs}
    for seed in configuration["seeds"]:
        for lr in configuration["learning_rates"]:
            for name in configuration["models"]:
                if (name, lr, seed) not in done:
                    yield name, lr, seed


def complete(name: str, path: Path, configuration: dict, command: str, jobs: int) -> dict:
    """Run what the record at `path` does not hold yet, save after each run, return the record."""
    record = {
        "experiment": name,
        "command": command,
        "configuration": configuration,
        "environment": environment(),
        "runs": [],
    }
    if path.exists():
        found = json.loads(path.read_text())
        if found["configuration"] != configuration:
            raise ValueError(f"{path} records another configuration; move it, or choose --out")
        record = found
    todo = list(missing(configuration, record["runs"]))
    for result in tqdm(_results(configuration, todo, jobs), total=len(todo), desc=name):
        record["runs"].append(result)
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        draft.replace(path)
    return record


def _results(configuration: dict, todo: list[tuple], jobs: int) -> Iterator[dict]:
    if jobs == 1:
        yield from (run(configuration, *which) for which in todo)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would share what a GPU holds
    with ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (1,)) as pool:
        pending = [pool.submit(run, configuration, *which) for which in todo]
        try:
            yield from (future.result() for future in as_completed(pending))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def final_scores(record: dict) -> dict[str, list[float]]:
    """Return of each model the last scores, seed by seed, at the learning rate best on average."""
    best = {}
    for name in record["configuration"]["models"]:
        by_rate = {}
        for one in sorted(record["runs"], key=lambda one: one["seed"]):
            if one["model"] == name:
                by_rate.setdefault(one["lr"], []).append(one["scores"][-1][1])
        best[name] = max(by_rate.values(), key=lambda scores: sum(scores) / len(scores))
    return best


def table(record: dict) -> str:
    """Return the mean, the least and the largest final score of each model, in per cent."""
    lines = [f"{record['experiment']:22} mean   least  largest   seeds"]
    for name, scores in final_scores(record).items():
        low, high = 100 * min(scores), 100 * max(scores)
        mean = 100 * sum(scores) / len(scores)
        lines.append(f"{name:22} {mean:5.1f}  {low:5.1f}  {high:5.1f} {len(scores):9}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None, show: Callable[[str], None] = print) -> None:
    """Run the experiments that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(EXPERIMENTS), help="which; all by default")
    parser.add_argument("--quick", action="store_true", help="a small form that takes seconds")
    parser.add_argument("--out", type=Path, default=Path("book/results"), help="where records go")
    parser.add_argument("--jobs", type=int, default=1, help="how many runs at a time")
    given = parser.parse_args(arguments)
    if not given.out.is_dir():
        parser.error(f"--out is {given.out}, expected a folder that exists")
    for name in given.names:
        check_choice("name", name, EXPERIMENTS)
        configuration = quick(EXPERIMENTS[name]) if given.quick else EXPERIMENTS[name]
        path = given.out / f"experiment_{name}{'_quick' if given.quick else ''}.json"
        command = f"python -m mamba_tutorial.experiments {name}{' --quick' if given.quick else ''}"
        show(table(complete(name, path, configuration, command, given.jobs)))


if __name__ == "__main__":
    main()
