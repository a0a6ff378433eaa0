"""Checks of arguments. Each message names the argument, what was given and what is needed."""

import importlib
import importlib.util
from collections.abc import Iterable
from types import ModuleType

import torch
from torch import Tensor


def check_tensors(**tensors: Tensor | None) -> None:
    """Check that the named tensors are finite numbers of one dtype on one device.

    The first tensor sets the dtype and the device; a tensor that is None is passed over.

    Raises:
        TypeError: if one is no tensor, is not floating or complex, or has another dtype.
        ValueError: if one lies on another device, or holds a NaN or an infinity.
    """
    check_dtypes(**tensors)
    for name, tensor in tensors.items():
        if tensor is not None:
            check_finite(name, tensor)


def check_dtypes(**tensors: Tensor | None) -> None:
    """Check the same but for NaN and infinity, which takes no pass over the numbers."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected a floating or complex one")
    (first, model), *others = given.items()
    for name, tensor in others:
        if tensor.dtype != model.dtype:
            needed = f"expected {model.dtype}, the dtype of {first}"
            raise TypeError(f"{name} has dtype {tensor.dtype}, {needed}")
        if tensor.device != model.device:
            needed = f"expected {model.device}, the device of {first}"
            raise ValueError(f"{name} is on device {tensor.device}, {needed}")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError if the tensor holds a NaN or an infinity; the message says where."""
    finite = torch.isfinite(tensor)
    if not finite.all():
        where = tuple((~finite).nonzero()[0].tolist())
        value = tensor[where].item()
        raise ValueError(f"{name} holds {value} at index {where}, expected finite numbers")


def check_shape(name: str, tensor: Tensor, axes: str, **sizes: int) -> None:
    """Check the last axes of a tensor; axes in front of them are free.

    Args:
        name: the argument's name, for the message.
        tensor: the tensor to check.
        axes: names of its last axes, such as `"state inputs"`.
        sizes: sizes that are known, by axis name; an axis without one may have any size.

    Raises:
        ValueError: if there are too few axes or one has another size than needed.
    """
    names = axes.split()
    given = tuple(tensor.shape)
    fits = len(given) >= len(names) and all(
        size == sizes.get(axis, size)
        for axis, size in zip(reversed(names), reversed(given), strict=False)
    )
    if not fits:
        symbols = ", ".join(["...", *names])
        numbers = ", ".join(["...", *(str(sizes.get(axis, axis)) for axis in names)])
        equal = "" if numbers == symbols else f" = ({numbers})"
        raise ValueError(f"{name} has shape {given}, expected ({symbols}){equal}")


def check_square(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the last two axes have the same size."""
    if tensor.ndim < 2 or tensor.shape[-2] != tensor.shape[-1]:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, expected square matrices (..., state, state)"
        )


def check_step(dt: float | Tensor, like: Tensor) -> Tensor:
    """Return the step Δ as a tensor of the real dtype and the device of `like`.

    Raises:
        TypeError: if dt is no real number, or a tensor of another dtype.
        ValueError: if dt is not finite and positive everywhere, or on another device.
    """
    real = like.real.dtype
    if isinstance(dt, bool) or not isinstance(dt, (int, float, Tensor)):
        raise TypeError(f"dt is a {type(dt).__name__}, expected a positive number or tensor")
    if not isinstance(dt, Tensor):
        dt = torch.tensor(dt, dtype=real, device=like.device)
    if dt.dtype != real:
        raise TypeError(f"dt has dtype {dt.dtype}, expected {real}")
    if dt.device != like.device:
        raise ValueError(f"dt is on device {dt.device}, expected {like.device}")
    check_finite("dt", dt)
    if not (dt > 0).all():
        raise ValueError(f"dt has minimum {dt.min().item():g}, expected every step to be positive")
    return dt


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise ValueError unless the value is one of the choices; the message lists them."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_length(length: int, name: str = "length") -> None:
    """Raise TypeError or ValueError unless length is a positive whole number."""
    if isinstance(length, bool) or not isinstance(length, int):
        raise TypeError(f"{name} is a {type(length).__name__}, expected a whole number")
    if length < 1:
        raise ValueError(f"{name} is {length}, expected at least 1")


def check_library(module: str, extra: str) -> ModuleType:
    """Import and return a library; where it is missing, ImportError names the extra that has it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{module} is not installed; it comes with pip install 'mamba-tutorial[{extra}]'"
        ) from error


def installed(library: str) -> bool:
    """Say whether a library can be imported, without importing it."""
    return importlib.util.find_spec(library) is not None


def check_triton(tensor: Tensor, name: str) -> None:
    """Raise ValueError unless the tensor can enter a Triton kernel; `name` asked for one.

    Where there is a GPU it must lie there; where there is none, kernels run in the interpreter.
    """
    if not installed("triton"):
        raise ValueError(f"{name} is 'triton', but Triton is not installed: pip install triton")
    small = tensor.dtype in (torch.float16, torch.bfloat16, torch.float32)
    if not small or tensor.is_cuda != torch.cuda.is_available():
        given = f"{tensor.dtype} on {tensor.device}"
        raise ValueError(f"{name} is 'triton', which computes in float32 on a GPU, not {given}")
