"""Induction heads, Table 11 of the Mamba paper: trained at length 256, tested from 2⁶ to 2²⁰.

The paper trains with batches of 8 for 204,800 steps; here they are 64, and the steps a sixteenth,
so half as many sequences are seen. No run stops early: one that makes no mistake at length 256 has
still to learn to go on beyond. The paper's attention has no MLP, ours has. Vectors of places beyond
the trained length are as they start.

"induction_small" is trained at length 32, on a CPU; there Mamba also loses its short convolution,
and attention gets one.
"""

import torch
from torch import nn

from mamba_tutorial.training import accuracy

_LENGTHS = [2**power for power in range(6, 21)]
_MAMBA = {"model": "Mamba", "d_model": 64, "n_layer": 2}
_ATTENTION = {"model": "Transformer", "d_model": 128, "n_layer": 2, "n_head": 8}
_NARROW = {"model": "Transformer", "d_model": 64, "n_layer": 2, "n_head": 4}
_TRAINING = {
    "task": "induction_heads",
    "length": 256,
    "vocab": 16,
    "batch": 64,
    "steps": 12800,
    "learning_rates": [2e-4, 1e-3],
    "seeds": [0, 1, 2],
    "lengths": _LENGTHS,
    "graph": True,
    "quick": {
        "length": 32,
        "steps": 300,
        "batch": 32,
        "tested": 256,
        "lengths": [32, 64, 128, 256],
    },
}

EXPERIMENTS = {
    "induction": {
        **_TRAINING,
        "models": {
            "Mamba": _MAMBA,
            "attention, absolute": {**_ATTENTION, "position": "absolute", "max_length": 2**14},
            "attention, RoPE": {**_ATTENTION, "position": "rope"},
            "attention, ALiBi": {**_ATTENTION, "position": "alibi"},
            "S4D": {"layer": "S4D", "d_state": 64, "init": "lin", "layers": 2},
        },
    },
    "induction_small": {
        "task": "induction_heads",
        "length": 32,
        "vocab": 16,
        "batch": 32,
        "steps": 2000,
        "learning_rates": [3e-3],
        "seeds": [0, 1, 2],
        "tested": 512,
        "lengths": [2**power for power in range(4, 15)],
        "attended": 2**11,
        "quick": {"steps": 300, "tested": 256, "lengths": [32, 64, 128, 256]},
        "models": {
            "Mamba": _MAMBA,
            "Mamba without a convolution": {**_MAMBA, "d_conv": 1},
            "attention": _NARROW,
            "attention after a convolution": {**_NARROW, "conv": 4},
            "attention, ALiBi": {**_NARROW, "position": "alibi"},
            "S4D": {"layer": "S4D", "d_state": 64, "init": "lin", "layers": 2},
        },
    },
}


def measure(configuration: dict, name: str, model: nn.Module, source, generator) -> dict:
    """Return the accuracy at each length, as far as the model, the memory and the time go."""
    found = {}
    attends = configuration["models"][name].get("model") == "Transformer"
    # beyond 2¹⁴ ALiBi's scores would fill a GPU's memory; the paper stops there, too
    longest = configuration.get("attended", 2**14) if attends else max(configuration["lengths"])
    for length in configuration["lengths"]:
        if length > longest:
            break
        tested = max(16, min(512, 2**20 // length))
        part = max(1, 2**20 // length) if not attends else max(1, 2**16 // length)
        hits = []
        for first in range(0, tested, part):
            size = min(part, tested - first)
            inputs, targets = source(size, generator, length=length)
            with torch.no_grad():
                hits.append(size * accuracy(model, inputs, targets))
        found[str(length)] = round(sum(hits) / tested, 5)
    return {"lengths": found}
