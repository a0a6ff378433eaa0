"""Kernels that are started before the kernel before them has ended.

Between two kernels a GPU stands idle: the last programs of one have ended, and those of the next
are being started. From Hopper on, a kernel can be started as soon as all programs of the one before
it run, if it waits for their end by itself.

Every program of such a kernel waits, and before it touches any memory. So a kernel has not ended
before all those before it have. What it writes cannot overtake what they still read, what it reads
is what any of them wrote, not just the last; and a kernel that is started as usual may follow.
"""

from torch import Tensor

from mamba_tutorial.kernels._launch import generation
from mamba_tutorial.kernels._triton import gdc_launch_dependents, gdc_wait, tl, triton


def early(tensor: Tensor) -> dict[str, bool]:
    """Return the options of a kernel that is started early where the tensor's GPU can do so.

    EARLY is a constant of the kernel, which it hands to `take_turn`.
    """
    can = generation(tensor) >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if can else {"EARLY": False}


@triton.jit
def take_turn(EARLY: tl.constexpr):
    """Let the next kernel be started, and wait for the end of those before."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
