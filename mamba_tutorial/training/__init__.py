"""One small training loop: a progress bar, a seed, an early stop, a checkpoint, a record.

`train` minimises the cross-entropy of a model on batches from a function, such as those of
`mamba_tutorial.tasks`. Interrupt it anywhere and call it again with the same checkpoint, and it
goes on as if nothing had happened, to the last bit: a checkpoint holds whole steps only.
"""

import math
import platform
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mamba_tutorial._check import check_choice, check_flag, check_length, check_number, precise
from mamba_tutorial.training._checks import check_targets, kind_of, wrong_targets
from mamba_tutorial.training._files import alone, file_place
from mamba_tutorial.training._progress import bar_settings
from mamba_tutorial.training._run import SCHEDULES, Batches, GraphedStep, Record, Run

__all__ = ["Record", "accuracy", "environment", "parameter_groups", "train"]


def train(
    model: nn.Module,
    batches: Batches,
    *,
    steps: int,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    schedule: Literal["cycle", "constant"] = "cycle",
    seed: int = 0,
    evaluate: Callable[[nn.Module], float] | None = None,
    every: int = 100,
    stop_at: float = float("inf"),
    checkpoint: str | Path | None = None,
    graph: bool = False,
    name: str = "training",
) -> Record:
    """Train a model with AdamW, by default with a warm-up and a cosine; return the run's record.

    Args:
        model: maps inputs to logits (..., classes).
        batches: called with a generator for each step; returns inputs and targets (...), where a
            target of `tasks.IGNORE` is not scored.
        steps: the number of updates.
        lr: the highest learning rate.
        weight_decay: of AdamW, for the parameters that `parameter_groups` lets decay.
        schedule: "cycle", where the learning rate rises along a line for a tenth of the steps and
            falls along a cosine to zero; or "constant".
        seed: of the batches and of whatever is random in the model's forward pass.
        evaluate: returns a score of the model, higher is better; called every `every` steps and at
            the end, in evaluation mode and without gradients.
        every: the steps between evaluations, and between checkpoints.
        stop_at: stop early once the score reaches this.
        checkpoint: a file. Written every `every` steps, when interrupted, and at the end; read at
            the start if it is there. A lock beside it keeps other runs away from it meanwhile.
        graph: record the first step as a CUDA graph and replay it. On a GPU that spares small
            models the starting of kernels one by one, which takes longer than they run. All batches
            must have one shape and lie on the GPU, as the model does.
        name: what the progress bar and the record call the run.

    With a checkpoint, a copy of the model and of the optimizer's moments is kept in memory, so that
    a step that is interrupted can be undone. With `graph` the copy is made every `every` steps, and
    an interrupted run goes back to the last one.

    Raises:
        TypeError, ValueError: an argument is of another kind or outside its range; the model is in
            evaluation mode; or what `batches`, the model or `evaluate` returns does not fit.
        ValueError: the checkpoint cannot be written there, is in use by another process, is
            damaged, or of another model or other settings, before anything is changed; or the loss
            is not finite.
        OSError: the checkpoint cannot be written.
    """
    steps, every = check_length(steps, name="steps"), check_length(every, name="every")
    check_choice("schedule", schedule, SCHEDULES)
    _check_arguments(model, batches, evaluate, stop_at, graph, name)
    settings = {
        "steps": steps,
        "lr": float(check_number("lr", lr, least=0)),
        "weight_decay": float(check_number("weight_decay", weight_decay, least=0)),
        "schedule": schedule,
        "seed": check_number("seed", check_length(seed, name="seed", least=-(2**63)), below=2**64),
    }
    optimizer = _optimizer(model, settings, graph)
    record = Record(name, settings, sum(p.numel() for p in model.parameters()))
    record.environment = environment()
    path = None if checkpoint is None else file_place("checkpoint", checkpoint)
    run = Run(model, optimizer, torch.Generator(), record, path, GraphedStep() if graph else None)
    with nullcontext() if path is None else alone(path):
        run.begin()
        bar = tqdm(total=steps, initial=len(record.losses), desc=name, **bar_settings())
        try:
            run.milestone(evaluate, every)  # for the score that an interrupted run still owes
            while len(record.losses) < steps and not _reached(record, stop_at):
                bar.set_postfix(loss=f"{run.update(batches):.3g}", refresh=False)
                bar.update()
                run.milestone(evaluate, every)
        except KeyboardInterrupt:
            run.undo()
            run.save()
            raise
        finally:
            bar.close()
    return record


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Return the share of scored targets that the model's largest logit hits.

    Raises:
        TypeError, ValueError: the targets do not fit the logits, or none of them is scored.
    """
    logits = model(inputs)
    targets, scored, outside = check_targets(logits, targets)
    if outside.any() or not scored.any():
        raise wrong_targets(logits.shape[-1], targets, outside)
    return precise((logits.argmax(-1) == targets)[scored]).mean().item()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return the parameters in two groups for an optimizer: those that decay, those that do not.

    Matrices decay. Vectors (biases, norms, log Δ) do not, nor do the parameters that a module lists
    in an attribute `no_weight_decay`, as `SelectiveSSM` does for A_log and D, and `S4` for A, P and
    B: if A_log decayed, all its time scales would drift to one.
    """
    spared = {
        parameter
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim < 2 or name in getattr(module, "no_weight_decay", ())
    }
    decaying = [parameter for parameter in model.parameters() if parameter not in spared]
    others = [parameter for parameter in model.parameters() if parameter in spared]
    return [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def environment() -> dict:
    """Return the versions and the hardware that a number was measured with."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": platform.processor() or "unknown",
        "threads": torch.get_num_threads(),
        "gpu": device,
    }


def _optimizer(model: nn.Module, settings: dict, graph: bool) -> torch.optim.Optimizer:
    """Return AdamW; for a graph, with all that changes from step to step on the GPU."""
    groups = parameter_groups(model, settings["weight_decay"])
    if not graph:
        return torch.optim.AdamW(groups, settings["lr"])
    device = next(model.parameters()).device
    for group in groups:
        group["lr"] = torch.tensor(settings["lr"], device=device)
    return torch.optim.AdamW(groups, capturable=True)


def _check_arguments(
    model: nn.Module,
    batches: Batches,
    evaluate: Callable | None,
    stop_at: float,
    graph: bool,
    name: str,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {kind_of(model)}, expected a torch.nn.Module")
    if not model.training:
        raise ValueError("model is in evaluation mode, expected training mode: call model.train()")
    if not callable(batches):
        raise TypeError(f"batches is {kind_of(batches)}, expected a function")
    if not (evaluate is None or callable(evaluate)):
        raise TypeError(f"evaluate is {kind_of(evaluate)}, expected a function or None")
    if stop_at != math.inf:
        check_number("stop_at", stop_at)
    if check_flag("graph", graph) and not all(p.is_cuda for p in model.parameters()):
        raise ValueError("graph is True and the model not on a GPU, expected it there")
    if not isinstance(name, str):
        raise TypeError(f"name is {kind_of(name)}, expected a string")


def _reached(record: Record, stop_at: float) -> bool:
    return bool(record.scores) and record.scores[-1][1] >= stop_at
