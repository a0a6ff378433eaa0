"""State space models, from the differential equation to Mamba.

One module per idea, in the order of the book:

- `discretize`: from continuous time to steps (`zoh`, `bilinear`, `euler`)
- `ssm`: the linear state space model, continuous and discrete
- `hippo`: state matrices that remember, and the structure of LegS
- `s4`: long kernels from structure; the layers `S4` and `S4D`
- `selective`: the selective scan, where Δ, B and C depend on the token
- `scan`: the linear recurrence in parallel, `linear_scan`
- `mamba`: the block and the language model; `checkpoints`: the files of trained models
- `distributed`: one sequence over many processes, cut along its length
- `attention`: a causal Transformer, the model to compare with
- `compat`: the official function's signature, and transformers' Mamba on these kernels
- `ops`: the compiled routines as operators of PyTorch
- `kernels`: compiled loops, for those who have a compiler; `counts`: how fast they can be at best;
  `benchmark`: how fast they are
- `tasks`, `training`: synthetic tasks, and one loop to train on them
- `data`: the recorded signals the chapters use; `records`: the measurements they quote
- `plotting`: the pictures of the chapters (needs matplotlib)
"""

from mamba_tutorial.discretize import bilinear, euler, zoh
from mamba_tutorial.hippo import hippo_legs
from mamba_tutorial.mamba import MambaBlock, MambaConfig, MambaLM
from mamba_tutorial.s4 import S4, S4D
from mamba_tutorial.scan import linear_scan
from mamba_tutorial.selective import SelectiveSSM, selective_scan, selective_step
from mamba_tutorial.ssm import DiscreteStateSpace, StateSpace, causal_convolution

__version__ = "0.1.0"

__all__ = [
    "S4",
    "S4D",
    "DiscreteStateSpace",
    "MambaBlock",
    "MambaConfig",
    "MambaLM",
    "SelectiveSSM",
    "StateSpace",
    "bilinear",
    "causal_convolution",
    "euler",
    "hippo_legs",
    "linear_scan",
    "selective_scan",
    "selective_step",
    "zoh",
]
