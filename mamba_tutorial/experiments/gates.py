"""Selective copying as in Table 1 of the Mamba paper: gates around a memory, fixed or selective.

The paper's task is 4096 tokens long, with 16 of them to remember, and its models have two layers of
width 64; so here in "gates_long", for the Mamba block alone. "gates" has all six cells at a
sixteenth of the length. The paper's learning rate is constant, 1e-4, for up to 400,000 steps; here
it rises and falls, the steps are fewer, and a run ends when all is right.
"""


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
        "quick": {"data": 3, "noise": 9, "vocab": 6, "steps": 250, "batch": 32, "tested": 256},
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
        "quick": {"data": 3, "noise": 9, "vocab": 6, "steps": 250, "batch": 32, "tested": 256},
        "models": _cells(("Mamba",)),
    },
}
