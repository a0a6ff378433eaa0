"""State space models, from the differential equation to Mamba.

One module per idea, in the order of the book:

- `discretize`: from continuous time to steps (`zoh`, `bilinear`, `euler`)
- `ssm`: the linear state space model, continuous and discrete
- `data`: the recorded signals the chapters use
- `plotting`: the pictures of the chapters (needs matplotlib)
"""

from mamba_tutorial.discretize import bilinear, euler, zoh
from mamba_tutorial.ssm import DiscreteStateSpace, StateSpace, causal_convolution

__version__ = "0.1.0"

__all__ = ["DiscreteStateSpace", "StateSpace", "bilinear", "causal_convolution", "euler", "zoh"]
