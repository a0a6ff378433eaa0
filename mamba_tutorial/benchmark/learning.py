"""Training: whole models, transformers' own with these kernels, layers, and one block in parts."""

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_tutorial.attention import Transformer
from mamba_tutorial.benchmark.measuring import (
    Row,
    attempt,
    milliseconds,
    peak_mib,
    relative,
)
from mamba_tutorial.benchmark.models import (
    SMALL,
    SMALL_TRANSFORMER,
    mamba_of_transformers,
    official_model,
)
from mamba_tutorial.compat import patched_transformers
from mamba_tutorial.layers import LSTMLayer, SelectiveLayer
from mamba_tutorial.mamba import MambaBlock, MambaConfig, MambaLM
from mamba_tutorial.s4 import S4D


def training() -> Iterator[Row]:
    """One step, forward and backward, of models of 130 million parameters, bfloat16 autocast.

    The Transformer has 12 layers of the same width; "compiled", each layer by `torch.compile`, at
    one shape, for it takes its time. "ms" is as Python calls it, so it depends on the host, too;
    "replayed_ms" is the same as a CUDA graph, where the program can be one.
    """
    for batch, length in ((8, 1024), (8, 2048), (1, 16384)):
        ids = torch.randint(50000, (batch, length), device="cuda")
        for name, make in {
            "mamba_tutorial": lambda: MambaLM(SMALL).cuda(),
            "mamba_tutorial, compiled": lambda: _compiled(MambaLM(SMALL).cuda()),
            "mamba_ssm": lambda: copy.deepcopy(official_model()),
            "transformers, Mamba": mamba_of_transformers,
            "Transformer": lambda: Transformer(SMALL_TRANSFORMER).cuda(),
            "Transformer, compiled": lambda: _compiled(Transformer(SMALL_TRANSFORMER).cuda()),
        }.items():
            if length == 2048 or not name.endswith("compiled"):
                row = {"batch": batch, "length": length, "name": name}
                yield attempt(row, lambda make=make, ids=ids: _step(make(), ids))


def _compiled(model: torch.nn.Module) -> torch.nn.Module:
    for layer in model.layers:
        layer.compile(fullgraph=True, dynamic=False)
    return model


def _step(model: torch.nn.Module, ids: Tensor) -> Row:
    """Time one step as Python calls it, and as a CUDA graph, without the host."""
    run = _step_of(model, ids)
    row = _called(run, ids)
    replayed, how = milliseconds(run, 500)
    return {**row, "replayed_ms": replayed} if how == "graph" else row


def _step_of(model: torch.nn.Module, ids: Tensor) -> Callable[[], None]:
    model.train()

    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            found = model(ids)
        found = getattr(found, "logits", found)
        F.cross_entropy(found[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        model.zero_grad(set_to_none=True)

    return run


def _called(run: Callable[[], None], ids: Tensor) -> Row:
    run()
    triton = importlib.import_module("triton")
    peak = peak_mib(run)
    took = triton.testing.do_bench(run, warmup=200, rep=1000, return_mode="median")
    return {"ms": took, "tokens_per_s": 1e3 * ids.numel() / took, "peak_mib": peak}


def transformers() -> Iterator[Row]:
    """A training step of transformers' Mamba, as it comes and with the scan of this package.

    130 million parameters, 2 × 128 tokens, bfloat16 autocast. As it comes it goes token by token,
    in PyTorch's operations, unless mamba_ssm is installed. Before it is timed, the logits are
    compared with those of the model as it comes, in float32.
    """
    ids = torch.randint(50000, (2, 128), device="cuda")
    for name, way in {
        "transformers, as it comes": nullcontext,
        "mamba_tutorial, in transformers": patched_transformers,
    }.items():
        yield attempt({"batch": 2, "length": 128, "name": name}, partial(_trained, way, ids))


def _trained(way: Callable[[], AbstractContextManager], ids: Tensor) -> Row:
    torch.manual_seed(0)
    model = mamba_of_transformers().eval()
    with torch.no_grad():
        right = model(ids, use_cache=False).logits
        with way():
            error = relative(model(ids, use_cache=False).logits, right)
    if not error < 1e-3:
        raise ValueError(f"wrong, by {error:.1e}")
    with way():
        return {"error": error} | _called(_step_of(model, ids), ids)  # too long for a graph


def layers() -> Iterator[Row]:
    """A training step of one layer of the wall, 64 channels, 65536 tokens in all, float32."""
    kinds = {
        "LSTM": partial(LSTMLayer, hidden=48),
        "S4D": partial(S4D, d_state=128, init="lin"),
        "selective": partial(SelectiveLayer, d_state=16, dt_rank=8),
    }
    for length in (64, 256, 1024, 4096, 16384, 65536):
        batch = 65536 // length
        x = torch.randn(batch, length, 64, device="cuda")
        for name, kind in kinds.items():

            def step(kind=kind, x=x) -> Row:
                torch.manual_seed(0)
                layer = kind(64).cuda()
                weights = list(layer.parameters())
                took, how = milliseconds(
                    lambda: torch.autograd.grad(layer(x).square().mean(), weights)
                )
                return {"both_ms": took, "how": how}

            yield attempt({"batch": batch, "length": length, "name": name}, step)


def block() -> Iterator[Row]:
    """Where the time of a whole block goes, forward and backward, kernel by kernel.

    d_model 1024, batch 8, length 2048, bfloat16 autocast.
    """
    torch.manual_seed(0)
    layer = MambaBlock(MambaConfig(d_model=1024, n_layer=1, vocab_size=1)).cuda()
    x = torch.randn(8, 2048, 1024, device="cuda", requires_grad=True)

    def run() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(x)
        y.float().sum().backward()

    for _ in range(3):
        run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            run()
        torch.cuda.synchronize()
    for event in profile.key_averages():
        yield {"name": event.key[:80], "us": event.self_device_time_total / 5,
               "calls": event.count / 5}  # fmt: skip
