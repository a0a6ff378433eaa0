"""The configs of both layouts: what their fields are called, and what must be in them."""

import json
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Place = Path | str  # what a message says is wrong

HF_FIELDS = {
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layer",
    "vocab_size": "vocab_size",
    "state_size": "d_state",
    "conv_kernel": "d_conv",
    "expand": "expand",
    "time_step_rank": "dt_rank",
    "use_conv_bias": "conv_bias",
    "use_bias": "bias",
    "tie_word_embeddings": "tie_embeddings",
    "layer_norm_epsilon": "norm_eps",
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_floor": "dt_floor",
}
ORIGINAL_FIELDS = ["d_model", "n_layer", "vocab_size", "pad_vocab_size_multiple", "tie_embeddings"]
# ssm_cfg holds arguments of the released `Mamba`; these are the ones that change a trained model
SSM_FIELDS = {"dt_init_floor": "dt_floor"} | {
    name: name
    for name in ("d_state", "d_conv", "expand", "dt_rank", "dt_min", "dt_max", "conv_bias", "bias")
}
# fields with which a checkpoint would be another model than this one, and the values that are ours
HF_FIXED = {"model_type": "mamba", "hidden_act": "silu", "time_step_scale": 1.0}
ORIGINAL_FIXED = {"rms_norm": True, "d_intermediate": 0, "attn_layer_idx": []}


@contextmanager
def reading(where: Place, problem: str) -> Iterator[None]:
    """Turn whatever a library raises at a file into a ValueError that names the file.

    There is no list of what it may be. A file or a library that is missing is another matter.
    """
    try:
        yield
    except (FileNotFoundError, ImportError):
        raise
    except Exception as error:
        raise ValueError(f"{where} {problem.format(error=error)}") from error


def object_in(path: Path) -> dict:
    """Return the object that a file holds."""
    with reading(path, "is no JSON: {error}"):
        text = path.read_text(encoding="utf-8")
    return object_of(path, text)


def object_of(where: Place, text: str) -> dict:
    """Return the object that a text holds."""
    with reading(where, "is no JSON: {error}"):
        given = json.loads(text, object_pairs_hook=_distinct)
    if not isinstance(given, dict):
        raise ValueError(f"{where} holds a {type(given).__name__}, expected an object with fields")
    return given


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict; of two values for one name, json would take the last."""
    given = {}
    for name, value in pairs:
        if name in given:
            raise ValueError(f"{shown(name)} is given twice")
        given[name] = value
    return given


def fields_of(where: Place, given: dict) -> tuple[dict, dict[str, str]]:
    """Return the fields of a MambaConfig that an object gives, and what it calls each of them."""
    if "hidden_size" in given:
        _check_fixed(where, given, HF_FIXED)
        fields = {ours: given[theirs] for theirs, ours in HF_FIELDS.items() if theirs in given}
        fields["pad_vocab_size_multiple"] = 1  # vocab_size is the number of rows already
        return fields, {ours: theirs for theirs, ours in HF_FIELDS.items()}
    if "d_model" not in given or "n_layer" not in given:
        raise ValueError(
            f"{where} has neither hidden_size nor d_model and n_layer: no Mamba config"
        )
    _check_fixed(where, given, ORIGINAL_FIXED)
    ssm = {} if given.get("ssm_cfg") is None else given["ssm_cfg"]
    if not isinstance(ssm, dict):
        raise ValueError(f"{where} has a {type(ssm).__name__} as ssm_cfg, expected an object")
    if ssm.get("layer", "Mamba1") != "Mamba1":
        raise ValueError(f"{where} has ssm_cfg.layer {shown(ssm['layer'])}, expected Mamba1")
    unknown = ssm.keys() - SSM_FIELDS.keys() - {"layer", "dt_init", "dt_scale", "use_fast_path"}
    if unknown:
        raise ValueError(f"{where} has unknown fields in ssm_cfg: {', '.join(sorted(unknown))}")
    fields = {name: given[name] for name in ORIGINAL_FIELDS if name in given}
    fields |= {ours: ssm[theirs] for theirs, ours in SSM_FIELDS.items() if theirs in ssm}
    return fields, {ours: theirs for theirs, ours in SSM_FIELDS.items()}


def _check_fixed(where: Place, given: dict, fixed: dict) -> None:
    for name, value in fixed.items():
        held = given.get(name, value)
        if held != value or isinstance(held, bool) != isinstance(value, bool):
            raise ValueError(f"{where} has {name} {shown(held)}, expected {value!r}")


def shown(value: Any) -> str:
    """Return what repr says, cut short where it is long or deep."""
    shown = reprlib.Repr()
    shown.maxstring = 200
    return shown.repr(value)
