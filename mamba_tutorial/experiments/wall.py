"""Chapters 6 and 7: selective copying by layers of one build, time-invariant and selective."""

TASK = {"task": "selective_copying", "data": 4, "noise": 44, "vocab": 10}
LONG_TASK = {"task": "selective_copying", "data": 16, "noise": 240, "vocab": 16}
STEPS = {"dt_min": 1e-2, "dt_max": 0.5}  # for sequences as short as those of TASK
S4D_LAYER = {"layer": "S4D", "d_state": 128, "init": "lin"}
SELECTIVE_LAYER = {"layer": "selective", "d_state": 16, "dt_rank": 8}


def _contestants(**steps: float) -> dict:
    """Return the models of the wall, of about equal parameters within a row of layers."""
    return {
        "S4D, 1 layer": {**S4D_LAYER, **steps, "layers": 1},
        "S4D, 2 layers": {**S4D_LAYER, **steps, "layers": 2},
        "S4D, 4 layers": {**S4D_LAYER, **steps, "layers": 4},
        "LSTM, 1 layer": {"layer": "LSTM", "hidden": 48, "layers": 1},
        "selective, 1 layer": {**SELECTIVE_LAYER, **steps, "layers": 1},
        "selective, 2 layers": {**SELECTIVE_LAYER, **steps, "layers": 2},
    }


def _parts() -> dict:
    """Return a selective layer with each choice of what depends on the token."""
    layer = {**SELECTIVE_LAYER, **STEPS, "layers": 1}
    return {
        "none": {**layer, "selective": []},
        "B": {**layer, "selective": ["B"]},
        "C": {**layer, "selective": ["C"]},
        "B and C": {**layer, "selective": ["B", "C"]},
        "Δ": {**layer, "selective": ["dt"]},
        "Δ, B and C": layer,
        "Δ, B and C, exact": {**layer, "discretization": "zoh"},
    }


EXPERIMENTS = {
    "wall": {
        **TASK,
        "batch": 64,
        "steps": 3000,
        "learning_rates": [3e-3, 1e-2],
        "seeds": [0, 1, 2, 3, 4],
        "models": _contestants(**STEPS),
    },
    "wall_long": {
        **LONG_TASK,
        "batch": 64,
        "steps": 2000,
        "learning_rates": [3e-3, 1e-2],
        "seeds": [0, 1, 2, 3, 4],
        "models": _contestants(),
    },
    "selection": {
        **TASK,
        "batch": 32,
        "steps": 2000,
        "learning_rates": [1e-2],
        "seeds": [0, 1, 2, 3, 4],
        "models": _parts(),
    },
}
