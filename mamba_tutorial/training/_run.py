"""A run: the model, its optimizer, the random numbers and the record, as they change together."""

import copy
import io
import json
import math
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_tutorial.tasks import IGNORE
from mamba_tutorial.training._checks import (
    as_number,
    check_alike,
    check_generator,
    check_keys,
    check_kind,
    check_pair,
    check_targets,
    wrong_targets,
)
from mamba_tutorial.training._files import file_place, without_nan, write

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
        """Write the record as JSON, where a number that is not finite becomes null.

        Raises:
            ValueError: the folder of the path does not exist, or the path is no file.
            OSError: the file cannot be written.
        """
        text = json.dumps(without_nan(asdict(self)), indent=1, allow_nan=False)
        write(file_place("path", path), text.encode())


@dataclass
class Run:
    """All that changes while a model trains, so that it can be saved and restored together.

    A step, and an evaluation, happens as a whole or not at all. `kept` is the state before the one
    that is going on, for `undo`; it is None between two of them. (Where steps are replayed, it is
    the state at the last milestone, since to copy it would take longer than a step.) The learning
    rate follows from the number of losses, so it is set anew rather than saved.

    An exception can come from anywhere in a step: a handler of signals, a hook, the optimizer. So
    the state is copied before each step, into `room` where an earlier copy was: taking new memory
    would take longer than the copying does.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    record: Record
    path: Path | None
    graphed: "GraphedStep | None" = None
    kept: dict | None = None
    room: dict = field(default_factory=dict)

    def begin(self) -> None:
        """Set the seeds, or go on from the checkpoint if it is there."""
        saved = self.read() if self.path is not None and self.path.exists() else None
        torch.manual_seed(self.record.settings["seed"])
        self.generator.manual_seed(self.record.settings["seed"])
        if saved is not None:
            self.record.losses = saved["record"]["losses"]
            self.record.scores = saved["record"]["scores"]
            self.record.seconds = saved["record"]["seconds"]
            self.restore(saved)
        if self.graphed is not None:
            self.keep()

    @torch.enable_grad()  # an interruption at the wrong place leaves no_grad() on
    def update(self, batches: Batches) -> float:
        start = time.perf_counter()
        if self.graphed is None:
            self.keep()
        inputs, targets = check_pair(batches(self.generator))
        self.set_rate()
        value = (self.graphed or Run.step)(self, inputs, targets)
        self.record.seconds += time.perf_counter() - start
        self.record.losses.append(value)
        if self.graphed is None:
            self.kept = None
        return value

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        loss, flags, given = self.loss(inputs, targets)
        value = self.judged(flags, given)
        self.descend(loss)
        return value

    def loss(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, tuple]:
        """The loss; flags that say whether all is well; and what was wrong with targets if not."""
        logits = self.model(inputs)
        targets, scored, outside = check_targets(logits, targets)
        # A GPU is waited for once, in `judged`; and it would stop for good at a target outside.
        inside = targets.masked_fill(outside, IGNORE).flatten()
        flat = logits.reshape(-1, logits.shape[-1])
        loss = F.cross_entropy(flat, inside, ignore_index=IGNORE)
        flags = torch.stack([loss.detach(), scored.any(), outside.any()])
        return loss, flags, (logits.shape[-1], targets, outside)

    def judged(self, flags: Tensor, given: tuple[int, Tensor, Tensor]) -> float:
        """The value of the loss if all is well with it and with the targets."""
        value, any_scored, any_outside = flags.tolist()
        if any_outside or not any_scored:
            raise wrong_targets(*given)
        if not math.isfinite(value):
            step = len(self.record.losses) + 1
            raise ValueError(f"the loss is {value} at step {step}; try a smaller lr")
        return value

    def descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def set_rate(self) -> None:
        """Set the learning rate of the step that comes, where a graph reads it in its place."""
        settings = self.record.settings
        factor = SCHEDULES[settings["schedule"]](settings["steps"])
        rate = settings["lr"] * factor(len(self.record.losses))
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def milestone(self, evaluate: Callable[[nn.Module], float] | None, every: int) -> None:
        """Every `every` steps and at the end: a score, if there is none yet, and a checkpoint."""
        done = len(self.record.losses)
        if done == 0 or (done % every != 0 and done != self.record.settings["steps"]):
            return
        scored = bool(self.record.scores) and self.record.scores[-1][0] == done
        if evaluate is not None and not scored:
            self.score(evaluate)
        self.save()
        if self.graphed is not None:
            self.keep()

    def score(self, evaluate: Callable[[nn.Module], float]) -> None:
        self.keep()
        resting = [module for module in self.model.modules() if not module.training]
        try:
            self.model.eval()
            with torch.no_grad():
                score = as_number(evaluate(self.model))
        finally:
            self.model.train()
            for module in resting:
                module.training = False
        self.record.scores.append((len(self.record.losses), score))
        self.kept = None

    def state(self) -> dict:
        """What the next step depends on, but for the record. The tensors are those in use."""
        moments = self.optimizer.state
        named = self.model.named_parameters()
        return {
            "model": self.model.state_dict(),
            "optimizer": {name: moments[p] for name, p in named if p in moments},
            "generator": self.generator.get_state(),
            "random": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        }

    def restore(self, state: dict) -> None:
        """Go to a state, at the step that the record has reached."""
        self.model.load_state_dict(state["model"])
        self.optimizer.state.clear()
        for name, parameter in self.model.named_parameters():
            for key, value in state["optimizer"].get(name, {}).items():
                on_cpu = key == "step" and self.graphed is None
                device = "cpu" if on_cpu else parameter.device
                self.optimizer.state[parameter][key] = value.to(device)
        self.generator.set_state(state["generator"])
        self.restore_random(state)

    def restore_random(self, state: dict) -> None:
        torch.set_rng_state(state["random"])
        for gpu, random in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(random, gpu)

    def keep(self) -> None:
        if self.path is not None:
            self.room = copied(self.state(), self.room)
            self.kept = self.room | {"done": (len(self.record.losses), len(self.record.scores))}

    def undo(self) -> None:
        """Go back to before the step or the evaluation that is going on, if one is."""
        if self.kept is not None:
            losses, scores = self.kept["done"]
            del self.record.losses[losses:], self.record.scores[scores:]
            self.restore(self.kept)
            self.kept = None

    def save(self) -> None:
        if self.path is not None:
            # into memory, since torch.save hides what went wrong with a file behind its own error
            self.room = {}
            file = io.BytesIO()
            torch.save(self.state() | {"record": asdict(self.record)}, file)
            write(self.path, file.getbuffer())

    def read(self) -> dict:
        """Return the content of the checkpoint, after all of it was compared with this run."""
        with self.path.open("rb") as file:
            try:
                # the checksums are compared here alone; torch.load does not
                damaged = zipfile.ZipFile(file).testzip()
                file.seek(0)
                state = torch.load(file, map_location="cpu", weights_only=True)
            except Exception as error:
                raise ValueError(f"checkpoint {self.path} cannot be read: {error}") from error
        if damaged is not None:
            raise ValueError(f"checkpoint {self.path} is damaged in {damaged}")
        self.check(state)
        return state

    def check(self, saved: object) -> None:
        """Raise ValueError unless a checkpoint's content is of this model and these settings."""
        where = f"checkpoint {self.path}"
        record = asdict(self.record) | {"losses": [0.0], "scores": [(0, 0.0)]}
        needed = self.state() | {"record": record}
        check_keys(where, saved, needed)
        check_kind(f"optimizer of {where}", saved["optimizer"], {})
        count = torch.zeros((), dtype=torch.promote_types(torch.get_default_dtype(), torch.float32))
        needed["optimizer"] = {
            name: {"step": count, "exp_avg": parameter, "exp_avg_sq": parameter}
            for name, parameter in self.model.named_parameters()
            if name in saved["optimizer"]  # without a gradient there is none
        }
        check_alike(f"record of {where}", saved["record"], record)
        if saved["record"]["settings"] != self.record.settings:
            given = saved["record"]["settings"]
            raise ValueError(f"{where} is of a run with {given}, expected {self.record.settings}")
        check_alike(where, saved, needed)
        for name in ("generator", "random"):
            check_generator(f"{name} of {where}", saved[name], "cpu")
        for gpu, state in zip(range(torch.cuda.device_count()), saved["cuda"], strict=False):
            check_generator(f"cuda of {where}", state, f"cuda:{gpu}")


class GraphedStep:
    """`Run.step` as a CUDA graph: recorded at the first batch, then replayed.

    A graph reads and writes fixed places, so batches are copied to where it reads them. The step is
    over before its loss can be looked at.
    """

    graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, run: Run, inputs: Tensor, targets: Tensor) -> float:
        """Make a step with this batch; return its loss."""
        if self.graph is None:
            self.record(run, inputs, targets)
        for place, given in zip(self.places, (inputs, targets), strict=True):
            if given.shape != place.shape:
                shapes = f"{tuple(given.shape)} after {tuple(place.shape)}"
                raise ValueError(f"batches returned shape {shapes}, expected one shape for a graph")
            place.copy_(given)
        self.graph.replay()
        return run.judged(self.flags, self.given)

    def record(self, run: Run, inputs: Tensor, targets: Tensor) -> None:
        """Record a step. What the steps before it change, as they must be run, is undone."""
        self.places = inputs.clone(), targets.clone()
        before = copied(run.state(), {})

        def step() -> tuple[Tensor, tuple]:
            loss, flags, given = run.loss(*self.places)
            run.descend(loss)
            return flags, given

        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # kernels are compiled and libraries set up beforehand
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.flags, self.given = step()
        self.graph = graph
        run.model.load_state_dict(before["model"])
        for name, parameter in run.model.named_parameters():
            for key, value in run.optimizer.state.get(parameter, {}).items():
                known = before["optimizer"].get(name, {})
                value.copy_(known[key]) if key in known else value.zero_()
        run.restore_random(before)


def copied(value: object, room: object) -> object:
    """A copy of a state, written over an earlier copy where that has the same form."""
    if isinstance(value, dict):
        room = room if isinstance(room, dict) else {}
        return {key: copied(part, room.get(key)) for key, part in value.items()}
    if isinstance(value, Tensor):
        fits = isinstance(room, Tensor) and room.shape == value.shape and room.dtype == value.dtype
        return room.copy_(value) if fits else value.clone()
    return copy.deepcopy(value)


def one_cycle(steps: int) -> Callable[[int], float]:
    """The learning rate's factor: up a line for a tenth of the steps, down a cosine to zero."""
    rise = max(1, steps // 10)
    fall = max(1, steps - rise)
    return lambda k: (
        (k + 1) / rise if k < rise else 0.5 * (1 + math.cos(math.pi * (k - rise) / fall))
    )


# the learning rate's factor for all steps, given how many there will be
SCHEDULES = {"cycle": one_cycle, "constant": lambda steps: lambda k: 1.0}
