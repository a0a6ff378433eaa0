"""Triton and Gluon as all kernels import them: with the interpreter where there is no GPU.

Triton decides when it defines a function, those of its own library included, so it has to be told
before it is imported. It reads that from the environment, which is put back at once: a process
started later decides for itself.
"""

import os

import torch

_alone = not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ
if _alone:
    os.environ["TRITON_INTERPRET"] = "1"
try:
    import triton
    import triton.language as tl
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import async_copy
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
finally:
    if _alone:
        del os.environ["TRITON_INTERPRET"]

if _alone:
    triton.knobs.propagate_env = False  # what is set below stays in this process
    triton.knobs.runtime.interpret = True
    triton.knobs.propagate_env = True

if not torch.cuda.is_available() and isinstance(tl.sum, triton.JITFunction):
    raise ImportError(
        "there is no GPU, and Triton was imported before its interpreter could be asked for; set "
        "TRITON_INTERPRET=1, or import mamba_tutorial.kernels.scan before triton"
    )

__all__ = ["async_copy", "gdc_launch_dependents", "gdc_wait", "gl", "gluon", "tl", "triton"]
