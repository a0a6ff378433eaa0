"""Language models of bytes, of equal parameters at three sizes; and Mamba's parts one by one.

The text is the source of Python's standard library, its comments and documentation included, which
every reader has. The score is minus the bits per byte of files that were held out, so higher is
better. Mamba's layer has 6 d² weights and a Transformer's 12 d², so that has half as many
layers; the widths of MLPs, of S4D and of the LSTM make up for the rest.

"ablations" follows Tables 7, 8 and 10 of the Mamba paper, which has 350 million parameters and 7
billion tokens; here they are half a million and 33 million bytes.
"""

import functools
import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mamba_tutorial import data, tasks

# of each size: of Mamba, and what gives the others as many parameters, to 3 per cent
_SIZES = {
    "small": {"d_model": 128, "layers": 4, "MLP": 432, "S4D": 192, "cells": 104},
    "medium": {"d_model": 256, "layers": 6, "MLP": 800, "S4D": 424, "cells": 200},
    "large": {"d_model": 384, "layers": 8, "MLP": 1160, "S4D": 648, "cells": 304},
}
_TRAINING = {
    "task": "text",
    "vocab": 256,
    "length": 512,
    "batch": 32,
    "tested": 256,
    "graph": True,
    "precision": "high",
    "quick": {"length": 64, "batch": 8, "steps": 60, "tested": 16},
}


def _mamba(size: str = "small", **parts) -> dict:
    known = _SIZES[size]
    return {"model": "Mamba", "d_model": known["d_model"], "n_layer": known["layers"], **parts}


def _contestants(size: str) -> dict:
    """Return four models of one size."""
    known = _SIZES[size]
    d_model, layers = known["d_model"], known["layers"]
    return {
        "Mamba": _mamba(size),
        "Transformer": {
            "model": "Transformer",
            "d_model": d_model,
            "n_layer": layers // 2,
            "n_head": d_model // 32,
            "d_hidden": known["MLP"],
        },
        "S4D": {
            "layer": "S4D",
            "d_model": known["S4D"],
            "d_state": 64,
            "init": "lin",
            "layers": layers,
        },
        "LSTM": {
            "layer": "LSTM",
            "d_model": d_model,
            "hidden": known["cells"],
            "layers": layers,
        },
    }


def _parts() -> dict:
    """Return Mamba with some of its parts selective, with fewer states, and with other A."""
    models = {
        f"selective: {', '.join(parts) or 'none'}": _mamba(selective=parts)
        for parts in ([], ["B"], ["C"], ["dt"], ["dt", "B", "C"])
    }
    for d_state in (1, 2, 4, 8):
        models[f"N = {d_state}"] = _mamba(d_state=d_state)
        models[f"N = {d_state}, B and C fixed"] = _mamba(d_state=d_state, selective=["dt"])
    for A in ("-1/2", "random"):
        models[f"A = {A}"] = _mamba(A=A)
    return models


EXPERIMENTS = {
    **{
        f"language_{size}": {
            **_TRAINING,
            "steps": 2000,
            "learning_rates": [1e-3, 3e-3],
            "seeds": [0, 1, 2],
            "models": _contestants(size),
        }
        for size in _SIZES
    },
    "ablations": {
        **_TRAINING,
        "steps": 2000,
        "learning_rates": [3e-3],
        "seeds": [0, 1, 2],
        "models": _parts(),
    },
}


@functools.cache
def _texts(device: str) -> tuple[Tensor, Tensor]:
    return tuple(text.to(device) for text in data.standard_library())


def source(configuration: dict, entry: dict, device: str) -> Callable:
    """Return batches of text to learn from; without a size, the pieces that are held out."""
    length = configuration["length"]
    learned, held_out = _texts(device)

    def batches(size: int | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if size is not None:
            return tasks.next_token(size, generator, tokens=learned, length=length)
        fixed = torch.Generator(device).manual_seed(0)
        return tasks.next_token(configuration["tested"], fixed, tokens=held_out, length=length)

    return batches


@torch.no_grad()
def score(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Return minus the bits that the model needs for each byte."""
    nats = 0.0
    for x, y in zip(inputs.split(16), targets.split(16), strict=True):
        logits = model(x).float().flatten(0, 1)
        nats += nn.functional.cross_entropy(logits, y.flatten(), reduction="sum").item()
    return -nats / math.log(2) / targets.numel()


def measure(configuration: dict, name: str, model: nn.Module, *_) -> dict:
    """Return which text it was: its bytes, and the hash of those learned from and held out."""
    texts = [text.numpy().tobytes() for text in _texts("cpu")]
    return {
        "bytes": [len(text) for text in texts],
        "sha256": [hashlib.sha256(text).hexdigest()[:16] for text in texts],
    }
