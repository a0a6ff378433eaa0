"""What the ranks must have in common, and what one hears of another that fails."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from mamba_tutorial._check import check_ids, check_input, check_shape
from mamba_tutorial.mamba import MambaLM
from mamba_tutorial.selective import SelectiveSSM

# quoted, since PyTorch may have been built without it
Group = "dist.ProcessGroup | None"


def traits_of(x: Tensor, A: Tensor, tensors: dict[str, Tensor | None]) -> dict[str, object]:
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    asking = [name for name, tensor in given.items() if tensor.requires_grad]
    return {
        "batch": len(x),
        "d_inner": A.shape[0],
        "d_state": A.shape[1],
        "dtype of x": str(x.dtype),
        "device": x.device.type,
        "which arguments are given": list(given),
        "which arguments ask for a gradient": asking if torch.is_grad_enabled() else [],
    }


def input_traits(module: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor, dict[str, object]]:
    """Check the input of a model or a block; return it, and what of it must be alike."""
    name = "ids" if isinstance(module, MambaLM) else "x"
    x = args[0] if args else kwargs.get(name)
    if (args[1] if len(args) > 1 else kwargs.get("state")) is not None:
        raise ValueError("state is given, expected None: pieces are read from the start of a whole")
    if (args[2] if len(args) > 2 else kwargs.get("starts")) is not None:
        raise ValueError("starts is given, expected None: pieces are of one sequence each")
    if isinstance(module, MambaLM):
        check_ids(x, module.config.vocab_size, (2,), module.embedding.weight.device)
    else:
        check_input("x", x, module.in_proj)
        check_shape("x", x, "batch length d_model", d_model=module.d_model)
        if x.shape[1] == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected a length of at least 1")
    kind, learning = x.device.type, torch.is_grad_enabled()
    autocast = torch.is_autocast_enabled(kind) and str(torch.get_autocast_dtype(kind))
    return x, {
        "call": type(module).__name__,
        "batch": len(x),
        f"dtype of {name}": str(x.dtype),
        "device": kind,
        "autocast": autocast,
        "recording of gradients": learning,
        f"whether {name} asks for a gradient": learning and x.requires_grad,
    }


def model_traits(model: nn.Module) -> dict[str, object]:
    traits: dict[str, object] = {"call": "over_length"}
    for name, module in model.named_modules():
        if isinstance(module, MambaLM):
            traits |= {
                f"config.{key} of {name or 'model'}": v for key, v in vars(module.config).items()
            }
        if isinstance(module, SelectiveSSM):
            traits[f"discretization of {name}"] = module.discretization
    for name, parameter in model.named_parameters():
        trained = "trained" if parameter.requires_grad else "frozen"
        traits[name] = f"{tuple(parameter.shape)}, {parameter.dtype}, {trained}"
    return traits


def agree(
    settings: dict[str, object], problem: Exception | None, group: Group, own: object = None
) -> list:
    """Go on only if the input is right on all ranks, and alike; return `own` of all ranks.

    A rank with a problem says so before it raises: the others would wait for it.
    """
    rank = rank_in(group)
    mine = None if problem is None else f"{type(problem).__name__}: {problem}"
    found: list = [None] * dist.get_world_size(group)
    # torch.func would take the exchange for a part of what it transforms
    with heard("how their calls look", group), temporarily_clear_interpreter_stack():
        dist.all_gather_object(found, (mine, settings, own), group)
    if problem is not None:
        raise problem
    problems, everyone, owns = zip(*found, strict=True)
    for other, text in enumerate(problems):
        if text is not None:
            raise ValueError(f"the call is wrong on rank {other}, not on rank {rank}: {text}")
    for name in dict.fromkeys(name for theirs in everyone for name in theirs):
        values = [theirs.get(name, "missing") for theirs in everyone]
        for other, value in enumerate(values):
            if value != values[0]:
                where = f"{values[0]} on rank 0, {value} on rank {other}"
                raise ValueError(f"{name} differs between ranks, expected the same: {where}")
    return list(owns)


def rank_in(group: Group) -> int:
    """Return this process's place in the group, if it has one."""
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group is without this process, expected one that it belongs to")
    return rank


@contextmanager
def heard(what: str, group: Group) -> Iterator[None]:
    """Say what was waited for if another rank does not do its part."""
    try:
        yield
    except RuntimeError as error:
        ranks = dist.get_world_size(group)
        raise RuntimeError(
            f"rank {dist.get_rank(group)} of {ranks} waited in vain for {what}: another rank has "
            f"stopped, is later than the timeout of the group, or did something else ({error})"
        ) from error
