"""Chapter 5: handwritten digits read pixel by pixel, by layers that differ in their A."""

import copy
import math
from collections.abc import Callable

import torch
from torch import nn

from mamba_tutorial import data, tasks
from mamba_tutorial.training import accuracy


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


EXPERIMENTS = {
    "digits": {
        "task": "digits",
        "batch": 64,
        "steps": 300,
        "learning_rates": [1e-2],
        "seeds": [0, 1, 2, 3, 4],
        "models": _readers(),
    },
}


def source(configuration: dict, entry: dict, device: str) -> Callable:
    """Return batches of images as pixels, to be named at the last one; without a size, new ones.

    Shuffled, the pixels come in an order that is random but the same for all images.
    """
    pixels, labels = data.handwritten_digits()
    pixels, labels = pixels.to(device), labels.to(device)
    sequences = pixels.reshape(-1, 64, 1) - pixels.mean()
    if "shuffled" in entry:
        sequences = sequences[:, torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    targets = labels.new_full((len(labels), 64), tasks.IGNORE)
    targets[:, -1] = labels
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    training, new = order[:1400], order[1400:]

    def batches(size: int | None, generator: torch.Generator) -> tuple:
        if size is None:
            return sequences[new], targets[new]
        places = torch.randint(len(training), (size,), generator=generator, device=generator.device)
        chosen = training[places.cpu()]
        return sequences[chosen], targets[chosen]

    return batches


def at_half_the_step(model: nn.Module, x: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the accuracy with every pixel read twice and every Δ halved."""
    model = copy.deepcopy(model)
    for layer in model.layers:
        layer.log_dt.data -= math.log(2)
    silent = torch.full_like(targets, tasks.IGNORE)
    twice = torch.stack([silent, targets], dim=2).flatten(1)
    return accuracy(model, x.repeat_interleave(2, dim=1), twice)


def measure(configuration: dict, name: str, model: nn.Module, source, generator) -> dict:
    """Return the accuracy at half the step, if the model has one."""
    if not hasattr(model.layers[0], "log_dt"):
        return {}
    return {"dense, half the step": round(at_half_the_step(model, *source(None, generator)), 5)}
