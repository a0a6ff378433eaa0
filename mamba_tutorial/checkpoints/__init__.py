"""Reading and writing Mamba checkpoints in the two layouts that are in use.

- "original": `config.json` with d_model, n_layer, ssm_cfg …, as state-spaces/mamba-* have it;
- "hf": `config.json` with hidden_size, num_hidden_layers …, as transformers writes it.

Either comes as safetensors or as a pickle (`.bin`), whole or in shards. A pickle is read with
PyTorch's `weights_only`, which runs no code. This module knows names and files; the model itself is
`mamba_tutorial.mamba`.

A file may be damaged, of another model, or made to do harm, so nothing in it is taken at its word.
The weights are mapped into memory. Their names are compared with those of the model that the config
describes, then their kinds and shapes; only then is memory asked for, and are numbers copied to it.
"""

import json
import math
import os
import re
import tempfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Set
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mamba_tutorial._check import check_finite, check_library
from mamba_tutorial.checkpoints._config import (
    HF_FIELDS,
    HF_FIXED,
    Place,
    fields_of,
    object_in,
    object_of,
    reading,
    shown,
)

CONFIG = "config.json"
FILES = ["model.safetensors", "pytorch_model.bin"]
# what a checkpoint calls a tensor of a layer → what MambaLM calls it, where they differ
RENAMES = {
    "mixer.A_log": "mixer.ssm.A_log",
    "mixer.D": "mixer.ssm.D",
    "mixer.x_proj.weight": "mixer.ssm.x_proj.weight",
    "mixer.dt_proj.weight": "mixer.ssm.dt_proj.weight",
    "mixer.dt_proj.bias": "mixer.ssm.dt_bias",
}
EMBEDDING, HEAD = "embedding.weight", "lm_head.weight"
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# what `save` writes into the weights: the config that they belong to, and a checksum
CLAIM, CHECKSUM = "mamba_tutorial.config", "mamba_tutorial.crc32"
LISTED = 5  # names in one message
# an owner and a model, by the hub's rules for names
HUB_NAME = re.compile(r"(?!.*(--|\.\.|\.git$))\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)


class Entry(NamedTuple):
    """A tensor of a model.

    Attributes:
        released: what the "hf" layout calls it. The "original" layout says "embedding" for
            "embeddings", and what transformers' MambaModel writes has no "backbone." in front.
        ours: what MambaLM calls it.
        shape: its shape.
    """

    released: str
    ours: str
    shape: tuple[int, ...]


class Found(NamedTuple):
    """A tensor of a file."""

    path: Path
    tensor: Tensor


def layout(config: Any, head: bool) -> Iterator[Entry]:
    """Yield the tensors of a model one by one: a config may claim more layers than can be held.

    Args:
        config: a MambaConfig.
        head: whether the head has a matrix of its own.
    """
    d_model, d_inner, d_state, rank = config.d_model, config.d_inner, config.d_state, config.rank
    layer = {
        "norm.weight": (d_model,),
        "mixer.in_proj.weight": (2 * d_inner, d_model),
        "mixer.conv1d.weight": (d_inner, 1, config.d_conv),
        "mixer.A_log": (d_inner, d_state),
        "mixer.D": (d_inner,),
        "mixer.x_proj.weight": (rank + 2 * d_state, d_inner),
        "mixer.dt_proj.weight": (d_inner, rank),
        "mixer.dt_proj.bias": (d_inner,),
        "mixer.out_proj.weight": (d_model, d_inner),
    }
    if config.conv_bias:
        layer |= {"mixer.conv1d.bias": (d_inner,)}
    if config.bias:
        layer |= {"mixer.in_proj.bias": (2 * d_inner,), "mixer.out_proj.bias": (d_model,)}
    yield Entry("backbone.embeddings.weight", EMBEDDING, (config.rows, d_model))
    for i in range(config.n_layer):
        for name, shape in layer.items():
            ours = RENAMES.get(name, name)
            yield Entry(f"backbone.layers.{i}.{name}", f"layers.{i}.{ours}", shape)
    yield Entry("backbone.norm_f.weight", "norm_f.weight", (d_model,))
    if head:
        yield Entry(HEAD, HEAD, (config.rows, d_model))


# finding the folder


def locate(name: str | os.PathLike) -> Path:
    """Return the folder of a checkpoint: the one given, or a download of that name from the hub.

    A path always is a folder. Only a str goes to the hub, and only if no file or folder has that
    name and it has the form "owner/name" that the hub gives to names. What the hub's library raises
    passes through.

    Raises:
        TypeError: name is no str and no path.
        FileNotFoundError: there is no such folder, and the name cannot be one on the hub.
        ImportError: huggingface_hub is not installed.
    """
    folder = as_path("name", name)
    missing = f"there is no folder {str(name)!r}"
    try:
        if name != "" and folder.is_dir():
            return folder
    except OSError as error:  # a name too long, or a folder that may not be looked into
        raise FileNotFoundError(f"{missing}: {error}") from error
    if not (isinstance(name, str) and HUB_NAME.fullmatch(name)) or folder.exists():
        needed = "a folder, or a str like 'state-spaces/mamba-130m' for a model on the hub"
        raise FileNotFoundError(f"{missing}, expected {needed}")
    hub = check_library("huggingface_hub", "checkpoints")
    patterns = [CONFIG, *(pattern for file in FILES for pattern in (file, f"{file}.index.json"))]
    shards = ["model-*.safetensors", "pytorch_model-*.bin"]
    return Path(hub.snapshot_download(name, allow_patterns=patterns + shards))


def as_path(name: str, value: str | os.PathLike) -> Path:
    """Return an argument as a Path, or raise TypeError."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a str or a path")
    return Path(value)


# reading


def load(folder: Path, build: Callable[..., Any]) -> tuple[Any, dict[str, Tensor]]:
    """Return the config of a model, and its tensors by MambaLM's names.

    The tensors are float32 and finite, and each has memory of its own.

    Args:
        folder: of either layout.
        build: what makes a config of its fields and checks them, MambaConfig.

    Raises:
        FileNotFoundError: the folder has no config.json, no weights, or not all of its shards.
        ImportError: safetensors is needed and not installed.
        ValueError: anything else is wrong in the folder; the message names the file.
    """
    fields, names = read_config(folder)
    where, shards = _weight_files(folder)
    config = _build(folder / CONFIG, fields, names, build)
    found, claims = {}, {}
    for path, promised in shards.items():
        tensors, claims[path] = _read(path)
        if promised is not None:
            _check_names(path, tensors.keys(), sorted(promised), where.name)
        found |= {name: Found(path, tensor) for name, tensor in tensors.items()}
    matched = _match(where, _released(where, found), config)
    for path, claim in claims.items():
        if claim is not None:
            _check_claim(path, claim, config, build)
    tensors = {entry.ours: _as_float32(entry, *found) for entry, found in matched.items()}
    if config.tie_embeddings and HEAD in tensors:
        _check_tied(where, tensors.pop(HEAD), tensors[EMBEDDING])
    return config, tensors


def read_config(folder: Path) -> tuple[dict, dict[str, str]]:
    """Return the fields of a MambaConfig that config.json gives, and what it calls each of them."""
    path = folder / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no {CONFIG}")
    return fields_of(path, object_in(path))


def _build(where: Place, fields: dict, names: dict[str, str], build: Callable[..., Any]) -> Any:
    try:
        config = build(**fields)
        next(layout(config, head=False))  # some sizes are too large to reckon with
    except (TypeError, ValueError, OverflowError) as error:  # these name a field as we call it
        said = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(error))
        raise ValueError(f"{where} describes no model: {said}") from error
    return config


def _weight_files(folder: Path) -> tuple[Path, dict[Path, Set[str] | None]]:
    """Return the file to look into first, and each file of weights with the names it should hold.

    Without an index, they are not known.
    """
    for file in FILES:
        path, index = folder / file, folder / f"{file}.index.json"
        if path.exists():
            return path, {path: None}
        if index.exists():
            return index, _shards(index, path.suffix)
    raise FileNotFoundError(f"{folder} has no weights, expected {' or '.join(FILES)}")


def _shards(index: Path, suffix: str) -> dict[Path, Set[str]]:
    """Return the files that an index names, all of them in its own folder."""
    places = object_in(index).get("weight_map")
    if not isinstance(places, dict):
        raise ValueError(f"{index} has no weight_map, expected an object of tensors and files")
    shards = defaultdict(set)
    for name, file in places.items():
        if not isinstance(file, str) or not re.fullmatch(rf"\w[\w .-]*\{suffix}", file):
            needed = f"expected the bare name of a {suffix} file in its folder"
            raise ValueError(f"{index} places {shown(name)} in {shown(file)}, {needed}")
        shards[index.parent / file].add(name)
    return shards


def _read(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Return the tensors of a file, and the config that it claims to belong to."""
    with reading(path, "cannot be read: {error}"):
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing, one of the shards that the index names")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _read_pickle(path), None


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    safe_open = check_library("safetensors", "checkpoints").safe_open
    with (
        reading(path, "is damaged or no safetensors file: {error}"),
        safe_open(path, framework="pt") as file,
    ):
        names, notes = file.keys(), file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in names}
    tensors = _plain(path, tensors)
    if CHECKSUM in notes and notes[CHECKSUM] != _checksum(tensors):
        raise ValueError(f"{path} is damaged: its numbers are not those that were written")
    return tensors, notes.get(CLAIM)


def _checksum(tensors: dict[str, Tensor]) -> str:
    """Return a number that a change of any bit of the tensors changes."""
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy(), value)
    return str(value)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    with reading(path, "cannot be read: {error}"):
        archive = zipfile.is_zipfile(path)  # as torch.save has written them since PyTorch 1.6
        if archive:
            _check_archive(path)
    with reading(path, "cannot be read: it is damaged, or holds more than tensors and was not run"):
        given = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    return _plain(path, given)


def _check_archive(path: Path) -> None:
    """Raise ValueError if the parts of an archive are not, to the bit, what torch.save wrote."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise ValueError("it is compressed, expected an archive as torch.save writes it")
        summed = any(part.CRC for part in parts)  # PyTorch can be told to write no checksums
        damaged = archive.testzip() if summed else None
        if damaged is not None:
            raise ValueError(f"{damaged} in it is not what was written")


def _plain(path: Path, given: object) -> dict[str, Tensor]:
    """Return the tensors of a file if it holds nothing else, and every number of them."""
    if not isinstance(given, dict):
        raise ValueError(f"{path} holds a {type(given).__name__}, expected tensors by their names")
    for name, tensor in given.items():
        if not isinstance(name, str):
            raise ValueError(f"{path} has a {type(name).__name__} as a name, expected a str")
        _check_kind(name, path, tensor)
    size, needed = path.stat().st_size, sum(given[name].nbytes for name in given if name != HEAD)
    if needed > size:  # one number may stand for many, in a tensor of stride 0
        raise ValueError(f"{path} has {size} bytes, expected the {needed} bytes of its tensors")
    # a new tensor, without attributes; the class's own function, which no attribute can replace
    return {name: Tensor.detach(tensor) for name, tensor in given.items()}


def _check_kind(name: str, where: Place, tensor: object) -> None:
    if type(tensor) not in (Tensor, nn.Parameter):
        raise ValueError(f"{name} in {where} is a {type(tensor).__name__}, expected a tensor")
    if tensor.layout != torch.strided or tensor.is_nested or not tensor.is_cpu:
        kinds = "sparse, nested or without numbers"
        raise ValueError(f"{name} in {where} is {kinds}, expected a dense tensor")
    if tensor.dtype not in FLOATS:
        needed = ", ".join(map(str, FLOATS))
        raise ValueError(f"{name} in {where} has dtype {tensor.dtype}, expected one of {needed}")


def _check_shape(entry: Entry, name: str, where: Place, tensor: Tensor) -> None:
    if tensor.shape != entry.shape:
        given = f"{name} has shape {tuple(tensor.shape)} in {where}"
        raise ValueError(f"{given}, expected {entry.shape} by its config")


def _check_names(where: Place, given: Set[str], expected: Iterable[str], source: str) -> None:
    """Compare names; of the expected ones no more are asked for than needed to find a fault."""
    known, missing = set(), []
    for name in expected:
        if name in given:
            known.add(name)
        else:
            missing.append(name)
        if len(missing) > LISTED:
            break
    for problem, names in (("misses", missing), ("has unknown", sorted(given - known))):
        if names:
            listed = ", ".join(names[:LISTED]) + ", …" * (len(names) > LISTED)
            raise ValueError(f"{where} {problem} tensors: {listed} (see {source})")


def _released(where: Path, found: dict[str, Found]) -> dict[str, Found]:
    """Return the tensors by the names of the "hf" layout, whatever layout they come from."""
    prefix = "" if any(name.startswith("backbone.") for name in found) else "backbone."
    renamed = {}
    for name, held in found.items():
        full = name if name == HEAD else prefix + name
        full = re.sub(r"^backbone\.embedding\.", "backbone.embeddings.", full)
        if full in renamed:
            raise ValueError(f"{where} has two tensors for {full}, one of them by the name {name}")
        renamed[full] = held
    return renamed


def _match(where: Path, found: dict[str, Found], config: Any) -> dict[Entry, Found]:
    """Return what was found for each entry of the model, all of it and nothing else."""
    head = HEAD in found or not config.tie_embeddings
    names = (entry.released for entry in layout(config, head))
    _check_names(where, found.keys(), names, CONFIG)
    matched = {entry: found[entry.released] for entry in layout(config, head)}
    for entry, (path, tensor) in matched.items():
        _check_shape(entry, entry.released, path, tensor)
    return matched


def _check_claim(path: Path, claim: str, config: Any, build: Callable[..., Any]) -> None:
    """Compare the config that weights were written with to the one that lies beside them."""
    place = f"the config in {path}"
    claimed = _build(place, *fields_of(place, object_of(place, claim)), build)
    for name, value in vars(claimed).items():
        beside = getattr(config, name)
        if value != beside:
            two = f"{path} was written with {name} {value!r}, {CONFIG} beside it has {beside!r}"
            raise ValueError(f"{two}: writing them was interrupted, or one was changed")


def _as_float32(entry: Entry, path: Path, tensor: Tensor) -> Tensor:
    copy = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    _check_numbers(entry.released, path, copy)
    return copy


def _check_numbers(name: str, where: Place, tensor: Tensor) -> None:
    least, most = tensor.aminmax()  # NaN if one is; much faster than a question to each number
    if not (math.isfinite(least) and math.isfinite(most)):
        check_finite(f"{name} in {where}", tensor)


def _check_tied(where: Path, head: Tensor, embedding: Tensor) -> None:
    if not torch.equal(head, embedding):
        problem = f"{HEAD} differs from backbone.embeddings.weight in {where}"
        raise ValueError(f"{problem}, though the config ties them")


# writing


def save(folder: Path, config: Any, tensors: dict[str, Tensor]) -> None:
    """Write config.json and model.safetensors in the "hf" layout.

    Both are written in full before either takes its place, so that whatever fails leaves the folder
    as it was. Should the machine stop between the two, new weights lie beside an old config: the
    weights keep a copy of their own, which `load` compares.

    Args:
        folder: made if it is not there.
        config: a MambaConfig, for which the tensors are.
        tensors: by MambaLM's names.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the folder cannot be written, or the disk is full.
        ValueError: `load` would not take the tensors: they are not those of the config, no floats,
            or not finite.
    """
    write = check_library("safetensors.torch", "checkpoints").save_file
    error_of_library = check_library("safetensors", "checkpoints").SafetensorError
    named = _named(config, tensors)
    fields = {theirs: getattr(config, ours) for theirs, ours in HF_FIELDS.items()} | HF_FIXED
    notes = {"format": "pt", CLAIM: json.dumps(fields), CHECKSUM: _checksum(named)}
    fields |= {
        "architectures": ["MambaForCausalLM"],
        "intermediate_size": config.d_inner,
        "residual_in_fp32": True,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".draft-") as drafts:
            weights, text = Path(drafts, FILES[0]), Path(drafts, CONFIG)
            write(named, weights, metadata=notes)
            text.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
            weights.chmod(text.stat().st_mode)  # safetensors lets the owner alone read it
            for draft in (weights, text):
                _flush(draft)
            for draft in (weights, text):  # in this order: it is the weights that tell
                draft.replace(folder / draft.name)
    except (error_of_library, OSError) as error:
        raise OSError(f"{folder} cannot be written: {error}") from error


def _flush(path: Path) -> None:
    """Wait until a file is on the disk: a name must not outrun what it names."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _named(config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by the names of the "hf" layout if `load` will take them."""
    entries = list(layout(config, head=not config.tie_embeddings))
    names = (entry.ours for entry in entries)
    _check_names("the model", tensors.keys(), names, "its config")
    named = {}
    for entry in entries:
        tensor = tensors[entry.ours].detach().cpu().contiguous()
        _check_kind(entry.ours, "the model", tensor)
        _check_shape(entry, entry.ours, "the model", tensor)
        _check_numbers(entry.ours, "the model", tensor)
        named[entry.released] = tensor
    return named
