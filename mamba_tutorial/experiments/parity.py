"""Parity: what decays between 0 and 1 cannot do, and factors that may be negative can.

Trained at length 32, tested up to 512. On a CPU it takes a quarter of an hour.
"""

import torch
from torch import nn

from mamba_tutorial.training import accuracy

EXPERIMENTS = {
    "parity": {
        "task": "parity",
        "length": 32,
        "vocab": 2,
        "batch": 64,
        "steps": 2000,
        "learning_rates": [3e-3, 1e-2],
        "seeds": [0, 1, 2],
        "lengths": [32, 64, 128, 256, 512],
        "quick": {"length": 12, "steps": 300, "tested": 256, "lengths": [12, 24, 48, 96]},
        "models": {
            "selective, 1 layer": {"layer": "selective", "d_state": 16, "dt_rank": 2, "layers": 1},
            "selective, 2 layers": {"layer": "selective", "d_state": 16, "dt_rank": 2, "layers": 2},
            "signed, 1 layer": {"layer": "signed", "layers": 1},
            "LSTM, 1 layer": {"layer": "LSTM", "hidden": 32, "layers": 1},
            "attention, 2 layers": {
                "model": "Transformer",
                "d_model": 64,
                "n_layer": 2,
                "n_head": 4,
            },
        },
    },
}
for _entry in EXPERIMENTS["parity"]["models"].values():
    _entry["d_model"] = _entry.get("d_model", 32)


def measure(configuration: dict, name: str, model: nn.Module, source, generator) -> dict:
    """Return the accuracy at the last place of sequences of each length."""
    found = {}
    for length in configuration["lengths"]:
        inputs, targets = source(256, generator, length=length)
        targets[:, :-1] = -100
        with torch.no_grad():
            found[str(length)] = round(accuracy(model, inputs, targets), 5)
    return {"lengths": found}
