"""What a run asks of batches, targets, scores and checkpoints."""

from itertools import zip_longest

import torch
from torch import Tensor

from mamba_tutorial.tasks import IGNORE


def check_pair(batch: object) -> tuple[Tensor, Tensor]:
    fits = isinstance(batch, (tuple, list)) and len(batch) == 2
    if not (fits and all(isinstance(part, Tensor) for part in batch)):
        given = ", ".join(map(kind_of, batch)) if fits else kind_of(batch)
        raise TypeError(f"batches returned {given}, expected two tensors: inputs and targets")
    return batch[0], batch[1]


def check_targets(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Check kinds and shapes; return the targets as int64, which are scored, and which no class."""
    if not (isinstance(logits, Tensor) and logits.is_floating_point()):
        raise TypeError(f"model returned {kind_of(logits)}, expected logits in floating point")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        given = tuple(logits.shape)
        raise ValueError(f"model returned logits of shape {given}, expected (..., classes)")
    integer = not (targets.is_floating_point() or targets.is_complex())
    if not integer or targets.dtype == torch.bool:
        raise TypeError(f"targets have dtype {targets.dtype}, expected whole numbers, as int64")
    if targets.shape != logits.shape[:-1]:
        given, needed = tuple(targets.shape), tuple(logits.shape[:-1])
        raise ValueError(f"targets have shape {given}, expected that of the logits, {needed}")
    targets = targets.long()
    scored = targets != IGNORE
    return targets, scored, scored & ((targets < 0) | (targets >= logits.shape[-1]))


def wrong_targets(classes: int, targets: Tensor, outside: Tensor) -> ValueError:
    if outside.any():
        given = targets[outside][0].item()
        needed = f"expected classes 0 to {classes - 1}, or {IGNORE} for no score"
        return ValueError(f"targets hold {given}, {needed}")
    given = tuple(targets.shape)
    return ValueError(f"targets of shape {given} are all {IGNORE}, expected some that are scored")


def as_number(score: object) -> float:
    try:
        return float(score)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"evaluate returned {kind_of(score)}, expected a number") from None


def kind_of(value: object) -> str:
    """What a value is, in words: two states that fit have the same kinds everywhere."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return "a dict" if isinstance(value, dict) else f"a {type(value).__name__}"


def check_kind(where: str, given: object, needed: object) -> None:
    if kind_of(given) != kind_of(needed):
        raise ValueError(f"{where} is {kind_of(given)}, expected {kind_of(needed)}")


def check_keys(where: str, given: object, needed: dict) -> None:
    check_kind(where, given, needed)
    for key, other in zip_longest(map(repr, given), map(repr, needed), fillvalue="nothing"):
        if key != other:
            raise ValueError(f"{where} has {key} where {other} is expected")


def check_alike(where: str, given: object, needed: object) -> None:
    """Raise ValueError unless one state has the keys, types, dtypes and shapes of the other.

    A list may have any length; the first item needed stands for all.
    """
    check_kind(where, given, needed)
    if isinstance(needed, dict):
        check_keys(where, given, needed)
        pairs = [(key, given[key], needed[key]) for key in needed]
    elif isinstance(needed, tuple):
        pairs = zip(range(len(needed)), given, needed, strict=True)
    elif isinstance(needed, list) and needed:
        pairs = [(place, item, needed[0]) for place, item in enumerate(given)]
    else:
        pairs = []
    for name, part, other in pairs:
        check_alike(f"{name} of {where}", part, other)


def check_generator(where: str, state: Tensor, device: str) -> None:
    """Raise ValueError unless a generator takes the state."""
    try:
        torch.Generator(device).set_state(state)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{where} is no state of a generator: {error}") from error
