"""Selective copying as in Table 1 of the Mamba paper: gates around a memory, fixed or selective.

The paper's task is 4096 tokens long, with 16 of them to remember, and its models have two layers of
width 64. Its learning rate is constant, 1e-4, for 400,000 steps.

In the first three the learning rate rises and falls, and the steps are fewer:

- "gates" has all six cells at a sixteenth of the length.
- "gates_long" has the Mamba block at the paper's length.
- "gates_mixed" has it trained on shorter ones, too: each batch draws one, from that of "gates" to
  the paper's, at which it is tested. Afterwards it is tested at each, and beyond.

In the others it is constant:

- "gates_paper" has the paper's length and learning rate, and the Mamba that the rest of this
  package uses. It differs from `GatedLayer` in its start, which is that of the authors' code: the
  embeddings, which are its decoder as well, are fifty times smaller, the projections out of the
  blocks √2 times; and there is a norm before the decoder. Matrices are multiplied in
  TensorFloat-32. Beside it the same with Δ, B and C that are the same for every token.
- "gates_tied" asks on a CPU, at a length of 260, what it does that the decoder is the embeddings,
  and how much the seed does.
"""

from torch import nn

from mamba_tutorial.training import accuracy

_MAMBA = {"model": "Mamba", "d_model": 64, "n_layer": 2}
_QUICK = {"data": 3, "noise": 9, "vocab": 6, "steps": 250, "batch": 32, "tested": 256}


def _cells(gates: tuple[str, ...]) -> dict:
    """Return each gate around each memory, by name."""
    size = {"model": "gated", "d_model": 64, "n_layer": 2}
    memories = {
        "fixed": {"memory": "invariant", "d_state": 64},
        "selective": {"memory": "selective", "d_state": 16},
    }
    return {
        f"{gate}, {name}": {**size, "gate": gate, **memory}
        for gate in gates
        for name, memory in memories.items()
    }


EXPERIMENTS = {
    "gates": {
        "task": "selective_copying",
        "data": 16,
        "noise": 240,
        "vocab": 16,
        "batch": 64,
        "steps": 8000,
        "stop_at": 0.9999,
        "learning_rates": [1e-3, 3e-3],
        "seeds": [0, 1, 2],
        "graph": True,
        "quick": _QUICK,
        "models": _cells(("none", "H3", "Mamba")),
    },
    "gates_long": {
        "task": "selective_copying",
        "data": 16,
        "noise": 4080,
        "vocab": 16,
        "batch": 64,
        "steps": 12000,
        "stop_at": 0.9999,
        "tested": 512,
        "learning_rates": [3e-3, 1e-3, 3e-4],
        "seeds": [0],
        "graph": True,
        "quick": _QUICK,
        "models": _cells(("Mamba",)),
    },
    "gates_mixed": {
        "task": "selective_copying",
        "data": 16,
        "noise": [240, 496, 1008, 2032, 4080],
        "vocab": 16,
        "batch": 64,
        "steps": 8000,
        "tested": 512,
        "tested_on": {"noise": 4080},
        "learning_rates": [3e-3],
        "seeds": [0, 1, 2],
        "noises": [240, 496, 1008, 2032, 4080, 8176, 16368],
        "quick": {
            **_QUICK,
            "noise": [5, 9, 17],
            "tested_on": {"noise": 17},
            "noises": [5, 17],
        },
        "models": _cells(("Mamba",)),
    },
    "gates_tied": {
        "task": "selective_copying",
        "data": 4,
        "noise": 252,
        "vocab": 16,
        "batch": 32,
        "steps": 2000,
        "tested": 256,
        "learning_rates": [1e-3],
        "schedule": "constant",
        "seeds": [0, 1, 2],
        "quick": {"noise": 12, "steps": 250},
        "models": {"tied": _MAMBA, "untied": {**_MAMBA, "tie_embeddings": False}},
    },
    "gates_paper": {
        "task": "selective_copying",
        "data": 16,
        "noise": 4080,
        "vocab": 16,
        "batch": 64,
        "steps": 400_000,
        "stop_at": 0.9999,
        "tested": 512,
        "evaluations": 200,
        "learning_rates": [1e-4],
        "schedule": "constant",
        "seeds": [0, 1, 2],
        "graph": True,
        "precision": "high",
        "quick": {**_QUICK, "evaluations": 20},
        "models": {"Mamba": _MAMBA, "Mamba, nothing selective": {**_MAMBA, "selective": []}},
    },
}


def measure(configuration: dict, name: str, model: nn.Module, source, generator) -> dict:
    """Return the accuracy at each number of noise tokens that the configuration names."""
    found = {}
    for noise in configuration.get("noises", ()):
        hits = []
        for _ in range(8):  # so that a GPU has room for them
            size = max(1, configuration["tested"] // 8)
            hits.append(accuracy(model, *source(size, generator, noise=noise)))
        found[str(noise)] = round(sum(hits) / len(hits), 5)
    return {"noises": found} if found else {}
