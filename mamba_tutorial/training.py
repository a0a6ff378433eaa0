"""One small training loop: a progress bar, a seed, an early stop, a checkpoint, a record.

`train` minimises the cross-entropy of a model on batches from a function, such as those of
`mamba_tutorial.tasks`. Interrupt it and call it again with the same checkpoint, and it goes on as
if nothing had happened, to the last bit.
"""

import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from mamba_tutorial._check import check_length
from mamba_tutorial.tasks import IGNORE

Batches = Callable[[torch.Generator], tuple[Tensor, Tensor]]


@dataclass
class Record:
    """What a run did and on what; `save` writes it as JSON.

    Attributes:
        name: a label of the run.
        settings: steps, learning rate, seed and the like.
        parameters: the number of the model's parameters.
        losses: the training loss of each step.
        scores: pairs (step, score) from the evaluations.
        seconds: the time spent training, over all interruptions.
        environment: versions and hardware.
    """

    name: str
    settings: dict
    parameters: int
    losses: list[float] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    environment: dict = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the record as JSON."""
        _write(Path(path), lambda file: file.write_text(json.dumps(asdict(self), indent=1)))


def train(
    model: nn.Module,
    batches: Batches,
    *,
    steps: int,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    seed: int = 0,
    evaluate: Callable[[nn.Module], float] | None = None,
    every: int = 100,
    stop_at: float = float("inf"),
    checkpoint: str | Path | None = None,
    name: str = "training",
) -> Record:
    """Train a model with AdamW, a warm-up and a cosine; return the record of the run.

    Args:
        model: maps inputs to logits (..., classes).
        batches: called with a generator for each step; returns inputs and targets (...), where a
            target of `tasks.IGNORE` is not scored.
        steps: the number of updates.
        lr: the highest learning rate; it rises for a tenth of the steps and falls to zero.
        weight_decay: of AdamW, for the parameters that `parameter_groups` lets decay.
        seed: of the batches and of whatever is random in the model's forward pass.
        evaluate: returns a score of the model, higher is better; called every `every` steps and at
            the end, in evaluation mode and without gradients.
        every: the steps between evaluations, and between checkpoints.
        stop_at: stop early once the score reaches this.
        checkpoint: a file. Written every `every` steps, when interrupted, and at the end; read at
            the start if it is there.
        name: what the progress bar and the record call the run.

    Raises:
        TypeError, ValueError: steps or every is not a positive whole number.
        ValueError: the checkpoint is of a run with other settings, or the loss is not finite.
    """
    check_length(steps, name="steps")
    check_length(every, name="every")
    settings = {"steps": steps, "lr": lr, "weight_decay": weight_decay, "seed": seed}
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _one_cycle(steps))
    record = Record(name, settings, sum(p.numel() for p in model.parameters()))
    record.environment = environment()
    run = _Run(model, optimizer, schedule, generator, record)
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and path.exists():
        run.load(path)
    bar = tqdm(total=steps, initial=len(record.losses), desc=name, **_bar_settings())
    try:
        while len(record.losses) < steps and not _reached(record, stop_at):
            bar.set_postfix(loss=f"{run.update(batches):.3g}", refresh=False)
            bar.update()
            if len(record.losses) % every == 0 or len(record.losses) == steps:
                if evaluate is not None:
                    record.scores.append((len(record.losses), run.score(evaluate)))
                if path is not None:
                    run.save(path)
    except KeyboardInterrupt:
        if path is not None:
            run.save(path)
        raise
    finally:
        bar.close()
    return record


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Return the share of scored targets that the model's largest logit hits."""
    scored = targets != IGNORE
    return (model(inputs).argmax(-1) == targets)[scored].double().mean().item()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return the parameters in two groups for an optimizer: those that decay, those that do not.

    Matrices decay. Vectors (biases, norms, log Δ) do not, nor do the parameters that a module lists
    in an attribute `no_weight_decay`, as `SelectiveSSM` does for A_log and D: if A_log decayed, all
    its time scales would drift to one.
    """
    decaying, others = [], []
    for module in model.modules():
        spared = getattr(module, "no_weight_decay", ())
        for name, parameter in module.named_parameters(recurse=False):
            decays = parameter.ndim >= 2 and name not in spared
            (decaying if decays else others).append(parameter)
    return [
        {"params": list(dict.fromkeys(decaying)), "weight_decay": weight_decay},
        {"params": list(dict.fromkeys(others)), "weight_decay": 0.0},
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


@dataclass
class _Run:
    """All that changes while a model trains, so that it can be saved and restored together."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    generator: torch.Generator
    record: Record

    def update(self, batches: Batches) -> float:
        start = time.perf_counter()
        inputs, targets = batches(self.generator)
        logits = self.model(inputs)
        loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE)
        if not torch.isfinite(loss):
            step = len(self.record.losses) + 1
            raise ValueError(f"the loss is {loss.item()} at step {step}; try a smaller lr")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.record.losses.append(loss.item())
        self.record.seconds += time.perf_counter() - start
        return loss.item()

    def score(self, evaluate: Callable[[nn.Module], float]) -> float:
        self.model.eval()
        with torch.no_grad():
            score = evaluate(self.model)
        self.model.train()
        return score

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": self.generator.get_state(),
            "random": torch.get_rng_state(),
            "record": asdict(self.record),
        }
        _write(path, lambda file: torch.save(state, file))

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        saved = state["record"]["settings"]
        if saved != self.record.settings:
            needed = f"expected {self.record.settings}"
            raise ValueError(f"checkpoint {path} is of a run with {saved}, {needed}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["random"])
        self.record.losses = state["record"]["losses"]
        self.record.scores = state["record"]["scores"]
        self.record.seconds = state["record"]["seconds"]


def _one_cycle(steps: int) -> Callable[[int], float]:
    """The learning rate's factor: up a line for a tenth of the steps, down a cosine to zero."""
    rise = max(1, steps // 10)
    fall = max(1, steps - rise)
    return lambda k: (
        (k + 1) / rise if k < rise else 0.5 * (1 + math.cos(math.pi * (k - rise) / fall))
    )


def _reached(record: Record, stop_at: float) -> bool:
    return bool(record.scores) and record.scores[-1][1] >= stop_at


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file in one piece: whoever reads it finds the old one or the new one, whole."""
    draft = path.with_name(path.name + ".part")
    write(draft)
    draft.replace(path)


def _bar_settings() -> dict:
    """In a notebook one line of output that is replaced; on a terminal tqdm's own; else nothing."""
    if "IPython" in sys.modules:
        from IPython import get_ipython

        if hasattr(get_ipython(), "kernel"):
            return {"file": _NotebookLine(), "mininterval": 0.5}
    return {"disable": None}


class _NotebookLine:
    """A stream for tqdm that shows the last thing written to it as one line of output."""

    def __init__(self):
        from IPython.display import display

        self.handle = display({"text/plain": ""}, raw=True, display_id=True)

    def write(self, text: str) -> None:
        if text.strip():
            self.handle.update({"text/plain": text.strip()}, raw=True)

    def flush(self) -> None:
        """Nothing waits."""
