"""The trainings behind the book's claims, over several seeds: python -m mamba_tutorial.experiments.

An experiment is a table: models by name, each trained with every seed and every learning rate. Its
configuration is plain data, `EXPERIMENTS`; its record, one JSON file in `book/results`, holds the
configuration, the command, versions and hardware, and of each run the scores on the way and the
time, and what of versions and hardware was not as for the first. The record is written after each
run, and a run that it holds already is not run again: stop it at any time, and start it again with
the same command. Runs that are meant for a GPU ("graph") are kept on the way, too, and how far they
have come is in the record as "unfinished".

Each room of this package has the configurations of its experiments; some have batches and a score
of their own, or measure more after the training.
"""

import argparse
import functools
import json
import multiprocessing
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mamba_tutorial import tasks
from mamba_tutorial._check import check_choice
from mamba_tutorial.experiments import (
    checkpoint,
    digits,
    gates,
    induction,
    language,
    models,
    parity,
    recall,
    wall,
)
from mamba_tutorial.experiments.models import random_eigenvalues
from mamba_tutorial.training import Record, accuracy, environment, train

__all__ = [
    "EXPERIMENTS",
    "best_runs",
    "build",
    "complete",
    "final_scores",
    "quick",
    "random_eigenvalues",
    "run",
]

_ROOMS = wall, digits, gates, induction, recall, parity, language
EXPERIMENTS = {name: made for room in _ROOMS for name, made in room.EXPERIMENTS.items()}
# rooms with more than configurations, by the task
_OF_TASK = {
    "digits": digits,
    "selective_copying": gates,
    "induction_heads": induction,
    "associative_recall": recall,
    "copying": recall,
    "reciting": recall,
    "parity": parity,
    "text": language,
}
TESTED, EVALUATIONS = 2048, 20
RUN = "model", "lr", "seed"  # what says which run it is
TOKENS = 2**19  # of a test, at a time


def quick(configuration: dict) -> dict:
    """Return a small form of an experiment, which takes seconds: two seeds, a few updates."""
    few = {"steps": 40, "seeds": [0, 1], "learning_rates": configuration["learning_rates"][:1]}
    return {**configuration, **few, **configuration.get("quick", {})}


def build(configuration: dict, name: str, seed: int) -> nn.Module:
    """Return the network that an entry of "models" describes, as it starts with this seed."""
    return models.build(configuration["models"][name], configuration.get("vocab"), seed)


def run(
    configuration: dict, name: str, lr: float, seed: int, checkpoint: Path | None = None
) -> dict:
    """Train one model once; return its part of the record."""
    with _precision(configuration):
        return _run(configuration, name, lr, seed, checkpoint)


@contextmanager
def _precision(configuration: dict) -> Iterator[None]:
    """Let a GPU multiply matrices of float32 in the "precision" of the configuration, if it says.

    "high" is TensorFloat-32: 8 bits of exponent and 10 of fraction go in, float32 adds up.
    """
    before = torch.get_float32_matmul_precision()
    try:
        if torch.cuda.is_available():
            torch.set_float32_matmul_precision(configuration.get("precision", before))
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _run(configuration: dict, name: str, lr: float, seed: int, checkpoint: Path | None) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    room = _OF_TASK.get(configuration["task"])
    model = build(configuration, name, seed).to(device)
    source = _source(configuration, name, device)
    fixed = configuration["task"] in ("digits", "text")  # which have a part that is held out
    generator = torch.Generator(device).manual_seed(2**31 + seed)
    size = None if fixed else configuration.get("tested", TESTED)
    test = source(size, generator, **configuration.get("tested_on", {}))
    steps, score = configuration["steps"], getattr(room, "score", accuracy_in_parts)
    record = train(
        model,
        _batches(source, configuration["batch"], device),
        steps=steps,
        lr=lr,
        schedule=configuration.get("schedule", "cycle"),
        seed=seed,
        evaluate=lambda model: score(model, *test),
        every=max(1, steps // configuration.get("evaluations", EVALUATIONS)),
        stop_at=configuration.get("stop_at", float("inf")),
        checkpoint=checkpoint,
        graph=device == "cuda" and configuration.get("graph", False),
        name=f"{name}, {lr:g}, seed {seed}",
    )
    result = _summary(name, lr, seed, record)
    if hasattr(room, "measure"):
        result |= room.measure(configuration, name, model.eval(), source, generator)
    return result


def _source(configuration: dict, name: str, device: str) -> Callable:
    """Return (size, generator, other sizes) → inputs and targets, on the generator's device."""
    room, entry = _OF_TASK.get(configuration["task"]), configuration["models"][name]
    if hasattr(room, "source"):
        return room.source(configuration, entry, device)
    known = ("data", "noise", "length", "pairs", "vocab")
    sizes = {key: configuration[key] for key in known if key in configuration}
    if configuration["task"] == "parity":
        del sizes["vocab"]
    task = getattr(tasks, configuration["task"])

    def batch(size: int, generator: torch.Generator, **others) -> tuple[Tensor, Tensor]:
        chosen = sizes | entry.get("sizes", {}) | others
        for key, value in chosen.items():
            if isinstance(value, list):  # one of them for each batch
                place = torch.randint(len(value), (), generator=generator, device=generator.device)
                chosen[key] = value[place]
        return task(size, generator, **chosen)

    return batch


def _batches(source: Callable, size: int, device: str) -> Callable:
    """Return batches for `train`; on a GPU made there, from a seed for each."""
    if device == "cpu":
        return lambda generator: source(size, generator)
    there = torch.Generator(device)

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        there.manual_seed(torch.randint(2**62, (), generator=generator).item())
        return source(size, there)

    return batch


def accuracy_in_parts(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Return `accuracy`, of some sequences at a time, so that there is room for their logits."""
    size = max(1, TOKENS // inputs.shape[1])
    hits = scored = 0.0
    for x, y in zip(inputs.split(size), targets.split(size), strict=True):
        count = (y != tasks.IGNORE).sum().item()
        hits += count * accuracy(model, x, y)
        scored += count
    return hits / scored


def missing(configuration: dict, runs: list[dict]) -> Iterator[tuple[str, float, int]]:
    """Yield what is still to be run: model, learning rate and seed.

    The first learning rate comes first with all its seeds: a record cut short compares seeds.
    """
    done = {tuple(run[key] for key in RUN) for run in runs}
    for lr in configuration["learning_rates"]:
        for seed in configuration["seeds"]:
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
    other = _elsewhere(record, environment())
    todo = list(missing(configuration, record["runs"]))
    try:
        for result in tqdm(_results(configuration, todo, jobs, path), total=len(todo), desc=name):
            record["runs"].append(result | other)
            _save(record, path)
    except KeyboardInterrupt:
        _save(record, path)
        raise
    return record


def _elsewhere(record: dict, here: dict) -> dict:
    """Return under "environment" what of it is not as for the record's first run, if anything."""
    other = {key: here[key] for key in here if here[key] != record["environment"].get(key)}
    return {"environment": other} if other else {}


def _save(record: dict, path: Path) -> None:
    """Write the record, and in it how far the runs have come that are kept beside it."""
    begun = {tuple(one[key] for key in RUN): one for one in record.pop("unfinished", [])}
    left = list(missing(record["configuration"], record["runs"]))
    for which in left:
        checkpoint = _checkpoint(path, which)
        if checkpoint.exists():
            kept = torch.load(checkpoint, map_location="cpu", weights_only=True)["record"]
            come = _summary(*which, Record(**kept)) | _elsewhere(record, kept["environment"])
            if which not in begun or len(come["scores"]) > len(begun[which]["scores"]):
                begun[which] = come
    if unfinished := [begun[which] for which in left if which in begun]:
        record["unfinished"] = unfinished
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    draft.replace(path)


def _summary(name: str, lr: float, seed: int, record: Record) -> dict:
    return {
        "model": name,
        "lr": lr,
        "seed": seed,
        "parameters": record.parameters,
        "scores": [[step, round(score, 5)] for step, score in record.scores],
        "seconds": round(record.seconds, 1),
    }


def _results(configuration: dict, todo: list[tuple], jobs: int, path: Path) -> Iterator[dict]:
    kept = functools.partial(_kept, configuration, path)
    if jobs == 1:
        yield from _those_that_succeed(functools.partial(kept, which) for which in todo)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would share what a GPU holds
    with ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (1,)) as pool:
        pending = [pool.submit(kept, which) for which in todo]
        try:
            yield from _those_that_succeed(future.result for future in as_completed(pending))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _those_that_succeed(runs: Iterable[Callable[[], dict]]) -> Iterator[dict]:
    """Yield what the runs return; one that fails stops no other, and is told at the end."""
    failed = None
    for one in runs:
        try:
            result = one()
        except Exception as error:
            failed = failed or error
        else:
            yield result
    if failed is not None:
        raise failed


def _kept(configuration: dict, path: Path, which: tuple[str, float, int]) -> dict:
    """Return a run's result; one that takes minutes is kept in a file beside the record."""
    if not configuration.get("graph"):
        return run(configuration, *which)
    checkpoint = _checkpoint(path, which)
    result = run(configuration, *which, checkpoint)
    checkpoint.unlink()
    return result


def _checkpoint(path: Path, which: tuple[str, float, int]) -> Path:
    words = re.sub(r"[^\w.]+", "_", "_".join(map(str, which)))
    return path.with_name(f"{path.stem}_{words}.pt")


def best_runs(record: dict) -> dict[str, list[dict]]:
    """Return the runs of each model, seed by seed, at the learning rate best on average.

    A model of which there are none yet is left out.
    """
    best = {}
    for name in record["configuration"]["models"]:
        by_rate = {}
        for one in sorted(record["runs"], key=lambda one: one["seed"]):
            if one["model"] == name:
                by_rate.setdefault(one["lr"], []).append(one)
        if by_rate:
            best[name] = max(by_rate.values(), key=_mean_score)
    return best


def _mean_score(runs: list[dict]) -> float:
    return sum(one["scores"][-1][1] for one in runs) / len(runs)


def final_scores(record: dict) -> dict[str, list[float]]:
    """Return the last score of each of `best_runs`."""
    return {
        name: [one["scores"][-1][1] for one in runs] for name, runs in best_runs(record).items()
    }


def table(record: dict) -> str:
    """Return the mean, the least and the largest final score of each model.

    They are in per cent, but for texts, where they are bits per byte.
    """
    unit, decimals = (-1, 3) if record["configuration"]["task"] == "text" else (100, 1)
    lines = [f"{record['experiment']:22} mean   least  largest   seeds"]
    for name, scores in final_scores(record).items():
        values = [unit * score for score in scores]
        shown = sum(values) / len(values), min(values), max(values)
        numbers = "  ".join(f"{value:5.{decimals}f}" for value in shown)
        lines.append(f"{name:22} {numbers} {len(scores):9}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None, show: Callable[[str], None] = print) -> None:
    """Run the experiments that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", default=list(EXPERIMENTS), help="which, or checkpoint; all by default"
    )
    parser.add_argument("--quick", action="store_true", help="a small form that takes seconds")
    parser.add_argument("--out", type=Path, default=Path("book/results"), help="where records go")
    parser.add_argument("--jobs", type=int, default=1, help="how many runs at a time")
    given = parser.parse_args(arguments)
    if not given.out.is_dir():
        parser.error(f"--out is {given.out}, expected a folder that exists")
    for name in given.names:
        if name == "checkpoint":
            show(json.dumps(checkpoint.record(given.out), indent=1, ensure_ascii=False))
            continue
        check_choice("name", name, [*EXPERIMENTS, "checkpoint"])
        configuration = quick(EXPERIMENTS[name]) if given.quick else EXPERIMENTS[name]
        path = given.out / f"experiment_{name}{'_quick' if given.quick else ''}.json"
        command = f"python -m mamba_tutorial.experiments {name}{' --quick' if given.quick else ''}"
        command += f" --jobs {given.jobs}" if given.jobs > 1 else ""
        show(table(complete(name, path, configuration, command, given.jobs)))


if __name__ == "__main__":
    main()
