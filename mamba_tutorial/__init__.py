"""State space models, from the differential equation to Mamba.

One module per idea, in the order of the book:

- `discretize`: from continuous time to steps (`zoh`, `bilinear`, `euler`)
- `ssm`: the linear state space model, continuous and discrete
- `hippo`: state matrices that remember, and the structure of LegS
- `s4`: long kernels from structure; the layers `S4` and `S4D`
- `tasks`, `training`: synthetic tasks, and one loop to train on them
- `data`: the recorded signals the chapters use
- `plotting`: the pictures of the chapters (needs matplotlib)
"""

from mamba_tutorial.discretize import bilinear, euler, zoh
from mamba_tutorial.hippo import hippo_legs
from mamba_tutorial.s4 import S4, S4D
from mamba_tutorial.ssm import DiscreteStateSpace, StateSpace, causal_convolution

__version__ = "0.1.0"

__all__ = [
    "S4",
    "S4D",
    "DiscreteStateSpace",
    "StateSpace",
    "bilinear",
    "causal_convolution",
    "euler",
    "hippo_legs",
    "zoh",
]
