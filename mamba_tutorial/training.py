"""One small training loop: a progress bar, a seed, an early stop, a checkpoint, a record.

`train` minimises the cross-entropy of a model on batches from a function, such as those of
`mamba_tutorial.tasks`. Interrupt it anywhere and call it again with the same checkpoint, and it
goes on as if nothing had happened, to the last bit: a checkpoint holds whole steps only.
"""

import copy
import io
import json
import math
import os
import platform
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TextIO

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from mamba_tutorial._check import check_flag, check_length, check_number, precise
from mamba_tutorial.tasks import IGNORE

if os.name == "nt":
    import msvcrt
else:
    import fcntl

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
        text = json.dumps(_without_nan(asdict(self)), indent=1, allow_nan=False)
        _write(_place("path", path), text.encode())


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
    graph: bool = False,
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
    _check_arguments(model, batches, evaluate, stop_at, graph, name)
    settings = {
        "steps": steps,
        "lr": float(check_number("lr", lr, least=0)),
        "weight_decay": float(check_number("weight_decay", weight_decay, least=0)),
        "seed": check_number("seed", check_length(seed, name="seed", least=-(2**63)), below=2**64),
    }
    optimizer = _optimizer(model, settings, graph)
    record = Record(name, settings, sum(p.numel() for p in model.parameters()))
    record.environment = environment()
    path = None if checkpoint is None else _place("checkpoint", checkpoint)
    run = _Run(model, optimizer, torch.Generator(), record, path, _GraphedStep() if graph else None)
    with nullcontext() if path is None else _alone(path):
        run.begin()
        bar = tqdm(total=steps, initial=len(record.losses), desc=name, **_bar_settings())
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
    targets, scored, outside = _targets(logits, targets)
    if outside.any() or not scored.any():
        raise _wrong_targets(logits.shape[-1], targets, outside)
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


@dataclass
class _Run:
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
    graphed: "_GraphedStep | None" = None
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
        inputs, targets = _pair(batches(self.generator))
        self.set_rate()
        value = (self.graphed or _Run.step)(self, inputs, targets)
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
        targets, scored, outside = _targets(logits, targets)
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
            raise _wrong_targets(*given)
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
        rate = settings["lr"] * _one_cycle(settings["steps"])(len(self.record.losses))
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
                score = _number(evaluate(self.model))
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
            self.room = _copy(self.state(), self.room)
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
            _write(self.path, file.getbuffer())

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
        _check_keys(where, saved, needed)
        _check_kind(f"optimizer of {where}", saved["optimizer"], {})
        count = torch.zeros((), dtype=torch.promote_types(torch.get_default_dtype(), torch.float32))
        needed["optimizer"] = {
            name: {"step": count, "exp_avg": parameter, "exp_avg_sq": parameter}
            for name, parameter in self.model.named_parameters()
            if name in saved["optimizer"]  # without a gradient there is none
        }
        _check_alike(f"record of {where}", saved["record"], record)
        if saved["record"]["settings"] != self.record.settings:
            given = saved["record"]["settings"]
            raise ValueError(f"{where} is of a run with {given}, expected {self.record.settings}")
        _check_alike(where, saved, needed)
        for name in ("generator", "random"):
            _check_generator(f"{name} of {where}", saved[name], "cpu")
        for gpu, state in zip(range(torch.cuda.device_count()), saved["cuda"], strict=False):
            _check_generator(f"cuda of {where}", state, f"cuda:{gpu}")


class _GraphedStep:
    """`_Run.step` as a CUDA graph: recorded at the first batch, then replayed.

    A graph reads and writes fixed places, so batches are copied to where it reads them. The step is
    over before its loss can be looked at.
    """

    graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, run: _Run, inputs: Tensor, targets: Tensor) -> float:
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

    def record(self, run: _Run, inputs: Tensor, targets: Tensor) -> None:
        """Record a step. What the steps before it change, as they must be run, is undone."""
        self.places = inputs.clone(), targets.clone()
        before = _copy(run.state(), {})

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
        raise TypeError(f"model is {_kind(model)}, expected a torch.nn.Module")
    if not model.training:
        raise ValueError("model is in evaluation mode, expected training mode: call model.train()")
    if not callable(batches):
        raise TypeError(f"batches is {_kind(batches)}, expected a function")
    if not (evaluate is None or callable(evaluate)):
        raise TypeError(f"evaluate is {_kind(evaluate)}, expected a function or None")
    if stop_at != math.inf:
        check_number("stop_at", stop_at)
    if check_flag("graph", graph) and not all(p.is_cuda for p in model.parameters()):
        raise ValueError("graph is True and the model not on a GPU, expected it there")
    if not isinstance(name, str):
        raise TypeError(f"name is {_kind(name)}, expected a string")


def _copy(value: object, room: object) -> object:
    """A copy of a state, written over an earlier copy where that has the same form."""
    if isinstance(value, dict):
        room = room if isinstance(room, dict) else {}
        return {key: _copy(part, room.get(key)) for key, part in value.items()}
    if isinstance(value, Tensor):
        fits = isinstance(room, Tensor) and room.shape == value.shape and room.dtype == value.dtype
        return room.copy_(value) if fits else value.clone()
    return copy.deepcopy(value)


def _pair(batch: object) -> tuple[Tensor, Tensor]:
    fits = isinstance(batch, (tuple, list)) and len(batch) == 2
    if not (fits and all(isinstance(part, Tensor) for part in batch)):
        given = ", ".join(map(_kind, batch)) if fits else _kind(batch)
        raise TypeError(f"batches returned {given}, expected two tensors: inputs and targets")
    return batch[0], batch[1]


def _targets(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Check kinds and shapes; return the targets as int64, which are scored, and which no class."""
    if not (isinstance(logits, Tensor) and logits.is_floating_point()):
        raise TypeError(f"model returned {_kind(logits)}, expected logits in floating point")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        given = tuple(logits.shape)
        raise ValueError(f"model returned logits of shape {given}, expected (..., classes)")
    integer = not (targets.is_floating_point() or targets.is_complex())
    if not integer or targets.dtype == torch.bool:
        raise TypeError(f"targets have dtype {targets.dtype}, expected whole numbers, as int64")
    if targets.shape != logits.shape[:-1]:
        given, needed = tuple(targets.shape), tuple(logits.shape[:-1])
        raise ValueError(f"targets have shape {given}, expected that of the logits, {needed}")
    targets = targets.long()
    scored = targets != IGNORE
    return targets, scored, scored & ((targets < 0) | (targets >= logits.shape[-1]))


def _wrong_targets(classes: int, targets: Tensor, outside: Tensor) -> ValueError:
    if outside.any():
        given = targets[outside][0].item()
        needed = f"expected classes 0 to {classes - 1}, or {IGNORE} for no score"
        return ValueError(f"targets hold {given}, {needed}")
    given = tuple(targets.shape)
    return ValueError(f"targets of shape {given} are all {IGNORE}, expected some that are scored")


def _number(score: object) -> float:
    try:
        return float(score)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"evaluate returned {_kind(score)}, expected a number") from None


def _kind(value: object) -> str:
    """What a value is, in words: two states that fit have the same kinds everywhere."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return "a dict" if isinstance(value, dict) else f"a {type(value).__name__}"


def _check_kind(where: str, given: object, needed: object) -> None:
    if _kind(given) != _kind(needed):
        raise ValueError(f"{where} is {_kind(given)}, expected {_kind(needed)}")


def _check_keys(where: str, given: object, needed: dict) -> None:
    _check_kind(where, given, needed)
    for key, other in zip_longest(map(repr, given), map(repr, needed), fillvalue="nothing"):
        if key != other:
            raise ValueError(f"{where} has {key} where {other} is expected")


def _check_alike(where: str, given: object, needed: object) -> None:
    """Raise ValueError unless one state has the keys, types, dtypes and shapes of the other.

    A list may have any length; the first item needed stands for all.
    """
    _check_kind(where, given, needed)
    if isinstance(needed, dict):
        _check_keys(where, given, needed)
        pairs = [(key, given[key], needed[key]) for key in needed]
    elif isinstance(needed, tuple):
        pairs = zip(range(len(needed)), given, needed, strict=True)
    elif isinstance(needed, list) and needed:
        pairs = [(place, item, needed[0]) for place, item in enumerate(given)]
    else:
        pairs = []
    for name, part, other in pairs:
        _check_alike(f"{name} of {where}", part, other)


def _check_generator(where: str, state: Tensor, device: str) -> None:
    """Raise ValueError unless a generator takes the state."""
    try:
        torch.Generator(device).set_state(state)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{where} is no state of a generator: {error}") from error


def _one_cycle(steps: int) -> Callable[[int], float]:
    """The learning rate's factor: up a line for a tenth of the steps, down a cosine to zero."""
    rise = max(1, steps // 10)
    fall = max(1, steps - rise)
    return lambda k: (
        (k + 1) / rise if k < rise else 0.5 * (1 + math.cos(math.pi * (k - rise) / fall))
    )


def _reached(record: Record, stop_at: float) -> bool:
    return bool(record.scores) and record.scores[-1][1] >= stop_at


def _place(name: str, path: str | Path) -> Path:
    """Return the whole path of a file, links followed, or raise ValueError if none can be there."""
    path = Path(path).resolve()
    if not path.parent.is_dir():
        raise ValueError(f"{name} is {path}, expected a file in a folder that exists")
    if path.exists() and not path.is_file():
        raise ValueError(f"{name} is {path}, expected a file, not a folder or a device")
    return path


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other runs from a file. The lock ends with its process, however that ends."""
    lock = path.with_name(path.name + ".lock")
    with lock.open("a") as file:
        if not _locked(file):
            raise ValueError(f"checkpoint {path} is in use by another run, expected one at a time")
        try:
            yield
        finally:
            with suppress(OSError):  # Windows does not remove an open file
                lock.unlink()


def _locked(file: TextIO) -> bool:
    """Lock a file until it is closed; return whether no other process has locked it."""
    try:
        if os.name == "nt":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True  # a file system without locks: network disks of clusters are used so
    try:  # a run that ends removes the file, perhaps after it was opened here
        return os.path.samestat(os.fstat(file.fileno()), Path(file.name).stat())
    except FileNotFoundError:
        return False


def _write(path: Path, content: bytes | memoryview) -> None:
    """Write a file in one piece: whoever reads it finds the old one or the new one, whole."""
    draft = path.with_name(path.name + ".part")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk is reported without a name
        raise
    finally:
        draft.unlink(missing_ok=True)


def _without_nan(value: object) -> object:
    """The same, with None for each number that JSON does not know."""
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
