"""Recall of many pairs (MQAR) and copying verbatim: what a state of fixed size can hold.

MQAR is trained at length 256 with 4 to 64 pairs, a number drawn for each batch; the authors of the
task (Arora et al. 2023) train at lengths 64 to 256 in a fixed order. It is tested at up to 256
pairs in 1024 tokens. In "recall" nothing is learned; "recall_convolved" gives attention the short
convolution that a Mamba block has, as their code does, and "recall_starts" gives Mamba another
start and higher rates. "recall_small" has all of these at a size for a CPU.

Copying is trained with one number of tokens for each model. "copying_fixed" is its control: layers
that are linear and time-invariant, whose state has 4096 numbers a layer, when that of Mamba has 512
(N = 4) or 8192 (N = 64).

"reciting" is copying as in the literature: the distance is not fixed, and what was said last is
read again. "reciting_starts" takes apart what a start like attention's changes; it is small enough
for a CPU.
"""

import torch
from torch import nn

from mamba_tutorial.training import accuracy

_TESTS = [[4, 64], [8, 64], [16, 64], [16, 256], [32, 256], [64, 256], [128, 512], [256, 1024]]
_RATES = [1e-3, 3e-3]
_ROWS = [16, 64, 256]  # tokens to copy


def _mamba(d_model: int, d_state: int) -> dict:
    return {"model": "Mamba", "d_model": d_model, "n_layer": 2, "d_state": d_state}


def _attention(d_model: int) -> dict:
    return {"model": "Transformer", "d_model": d_model, "n_layer": 2, "n_head": 1}


_COPIERS = {
    "Mamba, N = 4": _mamba(64, 4),
    "Mamba, N = 64": _mamba(64, 64),
    "Mamba that attends": {**_mamba(64, 64), "start": ["A", "dt", "alike"]},
    "attention": {**_attention(64), "n_head": 4},
    "S4D": {"layer": "S4D", "d_state": 64, "init": "lin", "layers": 2},
}


def _copying(task: dict, copiers: list[str], numbers: list[int]) -> dict:
    """Return an experiment in which each of these models copies so many tokens."""
    return {
        **task,
        "vocab": 34,
        "batch": 64,
        "steps": 5000,
        "stop_at": 0.9999,
        "tested": 512,
        "learning_rates": [1e-3],
        "seeds": [0, 1, 2],
        "graph": True,
        "quick": {"steps": 200, "batch": 32, "tested": 128},
        "models": {
            f"{name}, {data} tokens": {**_COPIERS[name], "sizes": {"data": data}}
            for data in numbers
            for name in copiers
        },
    }


_RECALL = {
    "task": "associative_recall",
    "length": 256,
    "pairs": [4, 8, 16, 32, 64],
    "vocab": 8192,
    "batch": 64,
    "steps": 5000,
    "stop_at": 0.9999,
    "tested": 256,
    "tests": _TESTS,
    "precision": "high",
    "learning_rates": _RATES,
    "seeds": [0, 1, 2],
    "graph": True,
    "quick": {
        "steps": 200,
        "batch": 32,
        "tested": 128,
        "vocab": 64,
        "length": 64,
        "pairs": [4, 8],
        "tests": [[4, 64], [8, 64]],
    },
}


EXPERIMENTS = {
    "recall": {
        **_RECALL,
        "models": {
            "Mamba, 64 × 4": _mamba(64, 4),
            "Mamba, 64 × 16": _mamba(64, 16),
            "Mamba, 64 × 64": _mamba(64, 64),
            "Mamba, 128 × 64": _mamba(128, 64),
            "attention, 64": _attention(64),
        },
    },
    "recall_convolved": {
        **_RECALL,
        "models": {"attention after a convolution, 64": {**_attention(64), "conv": 4}},
    },
    "recall_starts": {
        **_RECALL,
        "steps": 8000,
        "learning_rates": [1e-2, 3e-3],
        "models": {
            **{
                f"{d_model} × {d_state}, A near 0, Δ = 1": {
                    **_mamba(d_model, d_state),
                    "start": ["A", "dt"],
                }
                for d_model, d_state in ((64, 4), (64, 16), (64, 64), (128, 64))
            },
            "64 × 64, as usual": _mamba(64, 64),
        },
    },
    "recall_small": {
        "task": "associative_recall",
        "length": 64,
        "pairs": [4, 8],
        "vocab": 64,
        "batch": 32,
        "steps": 3000,
        "stop_at": 0.9999,
        "tested": 256,
        "tests": [[4, 64], [8, 64]],
        "learning_rates": [1e-2, 3e-3],
        "seeds": [0, 1, 2],
        "quick": {"length": 32, "pairs": 4, "steps": 400, "tested": 128, "tests": [[4, 32]]},
        "models": {
            "Mamba": _mamba(32, 16),
            "Mamba, A near 0, Δ = 1": {**_mamba(32, 16), "start": ["A", "dt"]},
            "attention": _attention(32),
            "attention after a convolution": {**_attention(32), "conv": 4},
        },
    },
    "copying": _copying(
        {"task": "copying", "noise": 1}, ["Mamba, N = 4", "Mamba, N = 64", "attention"], _ROWS
    ),
    "copying_fixed": _copying({"task": "copying", "noise": 1}, ["S4D"], _ROWS),
    "reciting": _copying({"task": "reciting"}, list(_COPIERS), _ROWS),
    "reciting_starts": {
        "task": "reciting",
        "data": 16,
        "vocab": 34,
        "batch": 32,
        "steps": 1000,
        "stop_at": 0.9999,
        "tested": 512,
        "learning_rates": [3e-3],
        "seeds": [0, 1, 2],
        "quick": {"data": 8, "vocab": 10, "steps": 120, "batch": 32, "tested": 128},
        "models": {
            name: {**_mamba(64, 32), "start": start}
            for name, start in {
                "as usual": [],
                "C like B": ["alike"],
                "A near 0": ["A"],
                "Δ = 1": ["dt"],
                "A near 0, Δ = 1": ["A", "dt"],
                "all three": ["A", "dt", "alike"],
            }.items()
        },
    },
}


def measure(configuration: dict, name: str, model: nn.Module, source, generator) -> dict:
    """Return the accuracy at each test of MQAR, and how many numbers the state of Mamba has."""
    found = {}
    for pairs, length in configuration.get("tests", []):
        part, tested = max(1, 2**14 // length), configuration["tested"]
        hits = []
        for _ in range(0, tested, part):
            inputs, targets = source(part, generator, pairs=pairs, length=length)
            with torch.no_grad():
                hits.append(accuracy(model, inputs, targets))
        found[f"{pairs}, {length}"] = round(sum(hits) / len(hits), 5)
    entry = configuration["models"][name]
    if entry.get("model") == "Mamba":
        found["state"] = 2 * entry["d_model"] * entry["d_state"] * entry["n_layer"]
    return found
