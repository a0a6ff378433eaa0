"""Reading and writing Mamba checkpoints in the two layouts that are in use.

- "original": `config.json` with d_model, n_layer, ssm_cfg …, as state-spaces/mamba-* have it;
- "hf": `config.json` with hidden_size, num_hidden_layers …, as transformers writes it.

Either comes as safetensors or as a pickle (`.bin`), whole or in shards. A pickle is read with
PyTorch's `weights_only`, which runs no code. This module knows names and files; the model itself is
`mamba_tutorial.mamba`.
"""

import json
import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from mamba_tutorial._check import check_library

# what a checkpoint calls a tensor → what MambaLM calls it, in the order of application
RENAMES = [
    (r"^backbone\.embeddings?\.", "embedding."),
    (r"^backbone\.", ""),
    (r"\.mixer\.(A_log|D|x_proj|dt_proj)\b", r".mixer.ssm.\1"),
]
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
FILES = ["model.safetensors", "pytorch_model.bin"]


def locate(name: str | Path) -> Path:
    """Return the folder of a checkpoint: the one given, or a download of that name from the hub.

    Raises:
        FileNotFoundError: there is no such folder, and the name cannot be one on the hub.
        ImportError: huggingface_hub is not installed.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise FileNotFoundError(f"there is no folder {str(name)!r}, and the hub has no such names")
    hub = check_library("huggingface_hub", "checkpoints")
    patterns = [
        "config.json",
        *(pattern for file in FILES for pattern in (file, f"{file}.index.json")),
    ]
    shards = ["model-*.safetensors", "pytorch_model-*.bin"]
    return Path(hub.snapshot_download(str(name), allow_patterns=patterns + shards))


def load(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """Return the arguments of MambaConfig and the tensors by MambaLM's names.

    Raises:
        FileNotFoundError: the folder has no config.json, or no weights.
        ValueError: the config is of another model, or a file is damaged or would run code.
    """
    config = read_config(folder)
    tensors = {}
    for path in _weight_files(folder):
        tensors |= _read(path)
    return config, {_ours(name): tensor for name, tensor in tensors.items()}


def read_config(folder: Path) -> dict:
    """Return the arguments of MambaConfig that config.json gives, in either layout."""
    path = folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no config.json")
    try:
        given = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if "hidden_size" in given:
        _check_fixed(path, given, HF_FIXED)
        config = {ours: given[theirs] for theirs, ours in HF_FIELDS.items() if theirs in given}
        return config | {"pad_vocab_size_multiple": 1}  # vocab_size is the number of rows already
    if "d_model" not in given or "n_layer" not in given:
        raise ValueError(f"{path} has neither hidden_size nor d_model and n_layer: no Mamba config")
    ssm = dict(given.get("ssm_cfg") or {})
    if ssm.pop("layer", "Mamba1") != "Mamba1":
        raise ValueError(f"{path} has ssm_cfg.layer {given['ssm_cfg']['layer']!r}, expected Mamba1")
    unknown = set(ssm) - set(SSM_FIELDS) - {"dt_init", "dt_scale", "use_fast_path"}
    if unknown:
        raise ValueError(f"{path} has unknown fields in ssm_cfg: {', '.join(sorted(unknown))}")
    _check_fixed(path, given, ORIGINAL_FIXED)
    config = {name: given[name] for name in ORIGINAL_FIELDS if name in given}
    return config | {SSM_FIELDS[name]: ssm[name] for name in ssm if name in SSM_FIELDS}


def save(folder: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    """Write config.json and model.safetensors in the "hf" layout.

    Args:
        folder: made if it is not there.
        config: the fields of MambaConfig.
        tensors: by MambaLM's names.
    """
    write = check_library("safetensors.torch", "checkpoints").save_file
    folder.mkdir(parents=True, exist_ok=True)
    fields = {theirs: config[ours] for theirs, ours in HF_FIELDS.items()} | HF_FIXED
    fields |= {
        "architectures": ["MambaForCausalLM"],
        "intermediate_size": config["expand"] * config["d_model"],
        "residual_in_fp32": True,
    }
    named = {hf_name(name): tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    draft = folder / "model.safetensors.part"
    write(named, draft, metadata={"format": "pt"})
    draft.replace(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def hf_name(name: str) -> str:
    """Return what the "hf" layout calls one of MambaLM's tensors."""
    name = name.replace(".mixer.ssm.", ".mixer.").replace("embedding.", "embeddings.")
    return name if name.startswith("lm_head.") else f"backbone.{name}"


def _ours(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _check_fixed(path: Path, given: dict, fixed: dict) -> None:
    for name, value in fixed.items():
        if given.get(name, value) != value:
            raise ValueError(f"{path} has {name} {given[name]!r}, expected {value!r}")


def _weight_files(folder: Path) -> list[Path]:
    for file in FILES:
        index = folder / f"{file}.index.json"
        if (folder / file).exists():
            return [folder / file]
        if index.exists():
            return [
                folder / shard
                for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))
            ]
    raise FileNotFoundError(f"{folder} has no weights, expected {' or '.join(FILES)}")


def _read(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing, one of the shards that the index names")
    if path.suffix == ".safetensors":
        library = check_library("safetensors", "checkpoints")
        try:
            return check_library("safetensors.torch", "checkpoints").load_file(path)
        except library.SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "it is damaged, or holds more than tensors and was not run"
        raise ValueError(f"{path} cannot be read: {reason}") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
