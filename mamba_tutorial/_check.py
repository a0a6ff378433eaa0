"""Checks of arguments. Each message names the argument, what was given and what is needed."""

import importlib
import importlib.util
import math
import numbers
import operator
import os
from collections.abc import Collection, Iterable
from types import ModuleType

import numpy as np
import torch
from torch import Tensor


def check_tensors(optional: Collection[str] = (), **tensors: Tensor | None) -> None:
    """Check that the named tensors are finite numbers of one dtype on one device.

    The first tensor sets the dtype and the device; one that is optional may be None.

    Raises:
        TypeError: if one is no tensor, is not floating or complex, or has another dtype.
        ValueError: if one lies on another device, or holds a NaN or an infinity.
    """
    check_dtypes(optional, **tensors)
    for name, tensor in tensors.items():
        if tensor is not None:
            check_finite(name, tensor)


def check_dtypes(optional: Collection[str] = (), **tensors: Tensor | None) -> None:
    """Check the same but for NaN and infinity, which takes no pass over the numbers."""
    given = {
        name: tensor
        for name, tensor in tensors.items()
        if not (tensor is None and name in optional)
    }
    for name, tensor in given.items():
        check_is_tensor(name, tensor)
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


def check_is_tensor(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless it is a tensor with numbers, one after the other, in memory."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} has layout {tensor.layout}, expected {torch.strided}")


def check_input(name: str, x: Tensor, layer: torch.nn.Module) -> None:
    """Check that x has the dtype and the device of the layer that takes it next.

    Under autocast the layer converts x; and what others put in the place of PyTorch's own layer
    takes what it takes.
    """
    check_is_tensor(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}, expected a floating one")
    if type(layer) not in (torch.nn.Linear, torch.nn.LayerNorm):
        return
    needed = layer.weight
    if x.device != needed.device:
        raise ValueError(f"{name} is on device {x.device}, expected {needed.device}, the layer's")
    if x.dtype != needed.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{name} has dtype {x.dtype}, expected {needed.dtype}, the layer's")


def can_look_at(tensor: Tensor) -> bool:
    """Say whether the numbers of a tensor can be asked for.

    Not if a tracer or a transform runs the program for numbers that come later or for many at once,
    nor while a CUDA graph is recorded. Checks of values are left out then.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return not tensor.is_meta and type(tensor) in (Tensor, torch.nn.Parameter)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError if the tensor holds a NaN or an infinity; the message says where."""
    if not can_look_at(tensor):
        return
    finite = torch.isfinite(tensor)
    if not finite.all():
        where = tuple((~finite).nonzero()[0].tolist())
        value = tensor[where].item()
        raise ValueError(f"{name} holds {value} at index {where}, expected finite numbers")


def check_shape(name: str, tensor: Tensor, axes: str, **sizes: int) -> None:
    """Check the axes of a tensor.

    Args:
        name: the argument's name, for the message.
        tensor: the tensor to check.
        axes: names of its axes, such as `"state inputs"`; after "..." of its last ones, as in
            `"... length channels"`.
        sizes: sizes that are known, by axis name; an axis without one may have any size.

    Raises:
        ValueError: if there are too few axes, or too many, or one has another size than needed.
    """
    names, given = axes.split(), tuple(tensor.shape)
    free = names[0] == "..."
    named = names[1:] if free else names
    enough = len(given) >= len(named) if free else len(given) == len(named)
    last = given[len(given) - len(named) :] if enough else ()
    if not (
        enough and all(size == sizes.get(n, size) for n, size in zip(named, last, strict=True))
    ):
        symbols = ", ".join(names)
        numbers = ", ".join(str(sizes.get(axis, axis)) for axis in names)
        equal = "" if numbers == symbols else f" = ({numbers})"
        raise ValueError(f"{name} has shape {given}, expected ({symbols}){equal}")


def check_ids_axes(ids: Tensor, axes: tuple[int, ...]) -> None:
    """Check that ids are whole numbers, with one of these numbers of axes, and not without tokens.

    Raises:
        TypeError: they are no tensor, or of another dtype.
        ValueError: they have other axes, or none along the length.
    """
    check_is_tensor("ids", ids)
    if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"ids has dtype {ids.dtype}, expected whole numbers")
    if ids.ndim not in axes or (ids.ndim == 2 and ids.shape[1] == 0):
        shapes = {1: "(batch,)", 2: "(batch, length) with at least one token"}
        needed = f"expected {' or '.join(shapes[count] for count in axes)}"
        raise ValueError(f"ids has shape {tuple(ids.shape)}, {needed}")


def check_ids(ids: Tensor, vocab_size: int, axes: tuple[int, ...], device: torch.device) -> Tensor:
    """Check ids for a model on this device, and return them as its embedding takes them.

    Raises:
        TypeError, ValueError: as `check_ids_axes`; or an id is outside the vocabulary (on a GPU,
            where that is not waited for, such an id ends the program), or they lie elsewhere.
    """
    check_ids_axes(ids, axes)
    ids = ids.long()
    if can_look_at(ids) and ids.numel():
        right = (ids >= 0) & (ids < vocab_size)
        if ids.is_cuda:  # without waiting
            torch._assert_async(right.all())
        elif not right.all():
            wrong = ids[~right][0].item()
            raise ValueError(f"ids holds {wrong}, expected token ids from 0 to {vocab_size - 1}")
    if ids.device != device:
        raise ValueError(f"ids is on device {ids.device}, expected {device}, the model's")
    return ids


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
    if isinstance(dt, Tensor):
        check_is_tensor("dt", dt)
    elif isinstance(dt, (bool, np.bool_)) or not isinstance(dt, numbers.Real):
        raise TypeError(f"dt is a {type(dt).__name__}, expected a positive number or tensor")
    else:
        dt = torch.tensor(_float(dt), dtype=real, device=like.device)
    if dt.dtype != real:
        raise TypeError(f"dt has dtype {dt.dtype}, expected {real}")
    if dt.device != like.device:
        raise ValueError(f"dt is on device {dt.device}, expected {like.device}")
    check_finite("dt", dt)
    check_all("dt", dt, dt > 0, "every step to be positive")
    return dt


def check_all(name: str, tensor: Tensor, right: Tensor, needed: str) -> None:
    """Raise ValueError unless `right`, a comparison with the tensor, holds everywhere."""
    if can_look_at(tensor) and not right.all():
        raise ValueError(f"{name} holds {_first(tensor, ~right)}, expected {needed}")


def _first(tensor: Tensor, which: Tensor) -> str:
    where = tuple(which.nonzero()[0].tolist())
    return f"{tensor[where].item():g}" + (f" at index {where}" if where else "")


def check_alike(name: str, tensor: Tensor, other: Tensor, of: str = "x") -> None:
    """Check that a tensor can be computed with another, which is named too.

    Raises:
        TypeError: it is no floating tensor, or one of the two is float64 and the other is not.
        ValueError: it lies on another device.
    """
    check_is_tensor(name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected a floating one")
    if (tensor.dtype == torch.float64) != (other.dtype == torch.float64):
        needed = "expected all of float64 or none"
        raise TypeError(f"{name} has dtype {tensor.dtype} and {of} {other.dtype}, {needed}")
    if tensor.device != other.device:
        needed = f"expected {other.device}, that of {of}"
        raise ValueError(f"{name} is on device {tensor.device}, {needed}")


def check_row(starts: Tensor, tokens: Tensor, axes: int) -> None:
    """Check where sequences begin in tokens, which have so many axes if they have a length."""
    if tokens.ndim < axes:
        raise ValueError("starts is given with one token of each sequence, expected None")
    check_starts(starts, tokens)


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise ValueError unless the value is one of the choices; the message lists them."""
    choices = list(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_length(length: int, name: str = "length", least: int = 1) -> int:
    """Return a whole number that is at least `least`, NumPy's among them, as an int.

    Raises:
        TypeError: length is no whole number, or True or False.
        ValueError: it is below `least`.
    """
    others = bool, np.bool_, np.ndarray, Tensor  # which may be indices as well
    if isinstance(length, others) or not hasattr(type(length), "__index__"):
        raise TypeError(f"{name} is a {type(length).__name__}, expected a whole number")
    length = operator.index(length)
    if length < least:
        raise ValueError(f"{name} is {length}, expected at least {least}")
    return length


def check_memory(name: str, value: object, numbers: int, size: int = 8) -> None:
    """Raise ValueError if so many numbers of `size` bytes are more than the machine's memory."""
    if size * numbers > MEMORY:
        needed = f"expected less: it takes {size * numbers >> 30} GiB of {MEMORY >> 30}"
        raise ValueError(f"{name} is {value}, {needed}")


def check_room(name: str, value: object, numbers: int) -> None:
    """Check the same of parameters, unless they are made elsewhere, as on the meta device."""
    if torch.get_default_device().type == "cpu":
        check_memory(name, value, numbers)


def _memory() -> int:
    """Return the bytes of the machine's memory; where that is not known, a lot."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 1 << 40


MEMORY = _memory()


def check_number(
    name: str,
    value: float,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> float:
    """Return a finite real number with above < value < below and least ≤ value ≤ most.

    Raises:
        TypeError: value is no real number, or True or False.
        ValueError: it is NaN or infinite, or lies outside.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a number")
    number = _float(value)
    if not (math.isfinite(number) and above < number < below and least <= number <= most):
        bounds = [
            f"{sign} {bound:g}"
            for sign, bound in ((">", above), ("≥", least), ("<", below), ("≤", most))
            if math.isfinite(bound)
        ]
        needed = f"expected a finite number {' and '.join(bounds)}".rstrip()
        raise ValueError(f"{name} is {value}, {needed}")
    return value


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number may be larger than any float
        return math.inf


def check_range(dt_min: float, dt_max: float) -> None:
    """Raise TypeError or ValueError unless these are numbers with 0 < dt_min ≤ dt_max."""
    for name, value in (("dt_min", dt_min), ("dt_max", dt_max)):
        check_number(name, value, above=0)
    if dt_min > dt_max:
        raise ValueError(f"dt_min is {dt_min} and dt_max {dt_max}, expected 0 < dt_min ≤ dt_max")


def check_starts(starts: object, like: Tensor, name: str = "starts") -> None:
    """Raise unless starts is a tensor of bool (batch, length), as `like`, on its device."""
    check_is_tensor(name, starts)
    if starts.dtype != torch.bool:
        raise TypeError(f"{name} has dtype {starts.dtype}, expected torch.bool")
    batch, length = like.shape[:2]
    check_shape(name, starts, "batch length", batch=batch, length=length)
    if starts.device != like.device:
        raise ValueError(f"{name} is on device {starts.device}, expected {like.device}")


def check_flag(name: str, value: bool) -> bool:
    """Return value if it is True or False, else raise TypeError."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} is a {type(value).__name__}, expected True or False")
    return bool(value)


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


HAS_TRITON = installed("triton")  # looked up once: a tracer cannot look for files


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the real dtype to compute in: float64 for double precision, else float32."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


WITHOUT_DOUBLE = {"mps"}  # kinds of devices that have no double precision: a Mac's GPU


def precise(tensor: Tensor) -> Tensor:
    """Return the numbers in double precision, or the best that their device has."""
    if tensor.device.type in WITHOUT_DOUBLE:
        return tensor.to(torch.complex64 if tensor.is_complex() else torch.float32)
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def check_triton(tensor: Tensor, name: str) -> None:
    """Raise ValueError unless the tensor can enter a Triton kernel; `name` asked for one.

    Where there is a GPU it must lie there; where there is none, kernels run in the interpreter.
    """
    if not HAS_TRITON:
        raise ValueError(f"{name} is 'triton', but Triton is not installed: pip install triton")
    small = tensor.dtype in (torch.float16, torch.bfloat16, torch.float32)
    if not small or tensor.is_cuda != torch.cuda.is_available():
        given = f"{tensor.dtype} on {tensor.device}"
        raise ValueError(f"{name} is 'triton', which computes in float32 on a GPU, not {given}")
