"""Checkpoints of both layouts against transformers, and files that should not be trusted."""

import json
import os
import pickle
import random
import shutil
import string
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import MambaConfig as TheirConfig
from transformers import MambaForCausalLM, MambaModel

from mamba_tutorial import checkpoints
from mamba_tutorial.mamba import MambaConfig, MambaLM

SIZES = {"vocab_size": 37, "hidden_size": 24, "num_hidden_layers": 2}
CONFIGS = {
    "default": {},
    "state and width": {"state_size": 8, "expand": 3},
    "biases swapped": {"use_conv_bias": False, "use_bias": True},
    "untied, rank": {"tie_word_embeddings": False, "time_step_rank": 5},
    "short convolution": {"conv_kernel": 2, "layer_norm_epsilon": 1e-3},
}


def theirs(**changes):
    torch.manual_seed(0)
    return MambaForCausalLM(TheirConfig(**SIZES | changes)).eval()


def compare(ours, model):
    """Logits and greedy continuation, in float32."""
    ids = torch.randint(37, (2, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (ours(ids) - model(ids).logits).abs().max() < 1e-4
        options = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": None}
        continued = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(ours.generate(ids, 15, temperature=0), continued)


def original_layout(model, folder, pickled=True):
    """Write a transformers model in the original layout, padded vocabulary and all."""
    config = model.config
    assert config.tie_word_embeddings
    ssm = {"d_state": config.state_size, "d_conv": config.conv_kernel, "expand": config.expand}
    ssm |= {"conv_bias": config.use_conv_bias, "bias": config.use_bias}
    fields = {"d_model": config.hidden_size, "n_layer": config.num_hidden_layers, "ssm_cfg": ssm}
    fields |= {"vocab_size": 37, "pad_vocab_size_multiple": 8, "rms_norm": True}
    fields |= {"residual_in_fp32": True, "fused_add_norm": True}
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = {n.replace("embeddings", "embedding"): t for n, t in model.state_dict().items()}
    rows = torch.cat([tensors["backbone.embedding.weight"], torch.randn(3, config.hidden_size)])
    tensors |= {"backbone.embedding.weight": rows, "lm_head.weight": rows.clone()}
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", CONFIGS)
def test_reads_what_transformers_writes(name, tmp_path):
    model = theirs(**CONFIGS[name])
    model.save_pretrained(tmp_path)
    compare(MambaLM.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_what_is_written_here(name, tmp_path):
    theirs(**CONFIGS[name]).save_pretrained(tmp_path / "first")
    ours = MambaLM.from_pretrained(tmp_path / "first")
    ours.save_pretrained(tmp_path / "second")
    model, report = MambaForCausalLM.from_pretrained(tmp_path / "second", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    compare(ours, model.eval())


@pytest.mark.parametrize("pickled", [True, False])
@pytest.mark.parametrize("name", ["default", "state and width", "biases swapped"])
def test_reads_the_original_layout(name, pickled, tmp_path):
    model = theirs(**CONFIGS[name])
    original_layout(model, tmp_path, pickled)
    ours = MambaLM.from_pretrained(tmp_path)
    assert ours.embedding.weight.shape == (40, 24)
    compare(ours, model)
    ours.save_pretrained(tmp_path / "again")
    compare(MambaLM.from_pretrained(tmp_path / "again"), model)


def test_hidden_states_are_those_of_transformers(tmp_path):
    model = theirs()
    model.save_pretrained(tmp_path)
    ids = torch.randint(37, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        right = model(ids, output_hidden_states=True).hidden_states
        found = MambaLM.from_pretrained(tmp_path).hidden_states(ids)
    for value, wanted in zip(found[1:], right, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5)


def test_a_model_of_ours_comes_back_to_the_bit(tmp_path):
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(16, 2, 30, d_state=4, dt_rank=3, tie_embeddings=False))
    model.save_pretrained(tmp_path)
    again = MambaLM.from_pretrained(tmp_path)
    ids = torch.arange(30)[None]
    assert torch.equal(again(ids), model(ids))
    assert not again.training
    assert again.config.dt_rank == 3


def test_reads_shards(tmp_path):
    model = theirs()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    compare(MambaLM.from_pretrained(tmp_path), model)
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(FileNotFoundError, match="one of the shards that the index names"):
        MambaLM.from_pretrained(tmp_path)


def test_shards_may_be_links(tmp_path):  # so the hub's cache has them
    theirs().save_pretrained(tmp_path, max_shard_size="20KB")
    for number, shard in enumerate(tmp_path.glob("model-*")):
        shard.rename(tmp_path / f"blob{number}")
        shard.symlink_to(tmp_path / f"blob{number}")
    compare(MambaLM.from_pretrained(tmp_path), theirs())


def test_reads_a_body_without_a_head_as_transformers_does(tmp_path):
    torch.manual_seed(0)
    MambaModel(TheirConfig(**SIZES)).save_pretrained(tmp_path)
    assert "embeddings.weight" in load_file(tmp_path / "model.safetensors")
    compare(MambaLM.from_pretrained(tmp_path), MambaForCausalLM.from_pretrained(tmp_path).eval())
    change_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"model\.safetensors misses tensors: lm_head\.weight"):
        MambaLM.from_pretrained(tmp_path)


OURS = MambaConfig(6, 2, 11, d_state=3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dt_rank": 2, "d_conv": 2, "expand": 3, "pad_vocab_size_multiple": 1},
        {"conv_bias": False, "bias": True, "tie_embeddings": False},
    ],
)
def test_the_layout_is_that_of_the_model(changes):
    config = replace(OURS, **changes)
    entries = list(checkpoints.layout(config, head=not config.tie_embeddings))
    model = {name: tuple(tensor.shape) for name, tensor in MambaLM(config).state_dict().items()}
    assert {entry.ours: entry.shape for entry in entries} == model
    assert len({entry.released for entry in entries}) == len(model)


def test_half_precision_checkpoints_become_float32(tmp_path):
    theirs().to(torch.bfloat16).save_pretrained(tmp_path)
    assert MambaLM.from_pretrained(tmp_path).embedding.weight.dtype == torch.float32


def test_a_name_goes_to_the_hub(tmp_path, monkeypatch):
    theirs().save_pretrained(tmp_path)
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert MambaLM.from_pretrained("state-spaces/mamba-130m-hf").config.d_model == 24
    assert asked[0][0] == "state-spaces/mamba-130m-hf"
    assert "config.json" in asked[0][1]


@given(st.text("ab.-_/é", max_size=12) | st.sampled_from(["a/" + "b" * 96, "a/" + "b" * 97]))
def test_names_on_the_hub_are_those_that_the_hub_takes(name):
    try:
        validate_repo_id(name)
        valid = name.count("/") == 1 and name.isascii()
    except HFValidationError:
        valid = False
    assert bool(checkpoints.HUB_NAME.fullmatch(name)) == valid


@pytest.mark.parametrize(
    "name",
    ["../typo", "", "a/b/", "typo", "x" * 5000, "a\0b", Path("owner/name"), "tests/conftest.py"],
)
def test_nothing_else_goes_to_the_hub(name, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked"))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        MambaLM.from_pretrained(name)


# what should not load


def altered(folder, change):
    theirs().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def drop(tensors):
    del tensors["backbone.layers.1.mixer.A_log"]


def add(tensors):
    tensors["backbone.layers.2.mixer.A_log"] = torch.ones(48, 16)


def reshape(tensors):
    tensors["backbone.layers.0.mixer.dt_proj.bias"] = torch.ones(47)


def untie(tensors):
    tensors["lm_head.weight"] = torch.ones(37, 24)


def add_by_our_name(tensors):
    tensors["backbone.layers.0.mixer.ssm.A_log"] = torch.ones(48, 16)


def add_by_the_other_name(tensors):
    tensors["backbone.embedding.weight"] = torch.ones(37, 24)


def make(function):
    name = "backbone.layers.0.mixer.A_log"
    return lambda tensors: tensors.update({name: function(tensors[name])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"misses tensors: backbone\.layers\.1\.mixer\.A_log"),
        (add, r"has unknown tensors: backbone\.layers\.2\.mixer\.A_log"),
        (reshape, r"backbone\.layers\.0\.mixer\.dt_proj\.bias has shape \(47,\).*expected \(48,\)"),
        (untie, r"lm_head\.weight differs from backbone\.embeddings?\.weight"),
        (add_by_our_name, r"has unknown tensors: backbone\.layers\.0\.mixer\.ssm\.A_log"),
        (add_by_the_other_name, r"has two tensors for backbone\.embeddings\.weight"),
        (make(torch.Tensor.char), r"A_log in .* has dtype torch\.int8, expected one of"),
        (make(torch.Tensor.bool), r"A_log in .* has dtype torch\.bool, expected one of"),
        (make(lambda A: A.double() * 1e300), r"A_log in .* holds inf at index \(0, 1\)"),
        (make(lambda A: A / A), r"A_log in .* holds nan at index \(0, 0\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    altered(tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        MambaLM.from_pretrained(tmp_path)
    assert "model.safetensors" in str(caught.value)


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_a_pickle_runs_no_code(protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    original_layout(theirs(), tmp_path)
    path = tmp_path / "pytorch_model.bin"
    if protocol == "torch":
        torch.save({"lm_head.weight": Attack()}, path)
    else:
        path.write_bytes(pickle.dumps(Attack(), protocol=2))
    with pytest.raises(ValueError, match=r"pytorch_model.bin cannot be read.*more than tensors"):
        MambaLM.from_pretrained(tmp_path)
    assert not (tmp_path / "attacked").exists()


NAME = "backbone.layers.0.mixer.A_log"
WEIGHT = torch.ones(48, 16)
OTHER_PICKLES = {
    "list": (lambda: [WEIGHT], "holds a list, expected tensors by their names"),
    "nested": (lambda: {"model": {NAME: WEIGHT}}, "model in .* is a dict, expected a tensor"),
    "key": (lambda: {3: WEIGHT}, "has a int as a name, expected a str"),
    "complex": (lambda: {NAME: WEIGHT.cfloat()}, r"A_log in .* has dtype torch\.complex64, exp"),
    "sparse": (lambda: {NAME: WEIGHT.to_sparse()}, "A_log in .* is sparse"),
    "meta": (lambda: {NAME: WEIGHT.to("meta")}, "A_log in .* without numbers"),
    "ragged": (lambda: {NAME: torch.nested.as_nested_tensor([WEIGHT])}, "A_log in .* nested"),
    "one for many": (lambda: {NAME: torch.ones(1).expand(10**5, 10**5)}, "has .* bytes, expected"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("kind", OTHER_PICKLES)
def test_a_pickle_holds_tensors_by_name_and_every_number_of_them(kind, tmp_path):
    original_layout(theirs(), tmp_path)
    content, message = OTHER_PICKLES[kind]
    torch.save(content(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message) as caught:
        MambaLM.from_pretrained(tmp_path)
    assert "pytorch_model.bin" in str(caught.value)


def test_what_hangs_on_a_tensor_is_left_behind(tmp_path):
    model = theirs()
    original_layout(model, tmp_path)
    path = tmp_path / "pytorch_model.bin"
    tensors = {name: torch.nn.Parameter(t) for name, t in torch.load(path).items()}
    tensors[NAME]._no_weight_decay = True  # as mamba_ssm marks it
    tensors[NAME].to = None
    shared = tensors["backbone.layers.0.mixer.D"].data  # all ones, in every layer
    tensors["backbone.layers.1.mixer.D"] = shared
    torch.save(tensors, path)
    ours = MambaLM.from_pretrained(tmp_path)
    compare(ours, model)
    assert not hasattr(ours.layers[0].mixer.ssm.A_log, "_no_weight_decay")
    first, second = (layer.mixer.ssm.D.data_ptr() for layer in ours.layers)
    assert first != second


def test_an_archive_is_as_torch_writes_it(tmp_path):
    original_layout(theirs(), tmp_path)
    path = tmp_path / "pytorch_model.bin"
    tensors = torch.load(path)
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read: it is compressed"):
        MambaLM.from_pretrained(tmp_path)
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    torch.save(tensors, path)
    torch.serialization.set_crc32_options(checksums)
    compare(MambaLM.from_pretrained(tmp_path), theirs())  # where none are written, none are wrong


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_named(kind, share, tmp_path):
    original_layout(theirs(), tmp_path, pickled=kind == "bin")
    path = next(tmp_path.glob(f"*.{kind}"))
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=rf"{path.name} (is damaged|cannot be read)"):
        MambaLM.from_pretrained(tmp_path)


def config_file(folder, **fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 8, "model_type": "llama"}, "has model_type 'llama', expected 'mamba'"),
        ({"hidden_size": 8, "hidden_act": "gelu"}, "has hidden_act 'gelu', expected 'silu'"),
        ({"d_model": 8, "n_layer": 1, "ssm_cfg": {"layer": "Mamba2"}}, "'Mamba2', expected Mamba1"),
        ({"d_model": 8, "n_layer": 1, "ssm_cfg": {"heads": 2}}, "unknown fields in ssm_cfg: heads"),
        ({"d_model": 8, "n_layer": 1, "attn_layer_idx": [1]}, "has attn_layer_idx"),
        ({"width": 8}, "neither hidden_size nor d_model"),
    ],
)
def test_configs_of_other_models_are_named(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        checkpoints.read_config(config_file(tmp_path, **fields))


HF = {"hidden_size": 24, "num_hidden_layers": 2, "vocab_size": 37}
ORIGINAL = {"d_model": 24, "n_layer": 2, "vocab_size": 37}


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (HF | {"hidden_size": "24"}, "hidden_size is a str, expected a whole number"),
        (HF | {"num_hidden_layers": 2.0}, "num_hidden_layers is a float, expected a whole"),
        (HF | {"expand": True}, "expand is a bool, expected a whole number"),
        (HF | {"time_step_rank": "two"}, "time_step_rank is 'two', expected one of 'auto'"),
        (HF | {"use_bias": "false"}, "use_bias is a str, expected True or False"),
        (HF | {"tie_word_embeddings": 1}, "tie_word_embeddings is a int, expected True or False"),
        (HF | {"layer_norm_epsilon": None}, "layer_norm_epsilon is a NoneType, expected a num"),
        (HF | {"layer_norm_epsilon": -1}, "layer_norm_epsilon is -1, expected a finite number"),
        (HF | {"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
        (HF | {"time_step_min": 0.2}, "time_step_min is 0.2, expected a finite .* ≤ 0.1"),
        ({"hidden_size": 24, "vocab_size": 37}, "missing .* 'num_hidden_layers'"),
        (ORIGINAL | {"ssm_cfg": {"dt_init_floor": -1}}, "dt_init_floor is -1, expected"),
        (ORIGINAL | {"ssm_cfg": []}, "has a list as ssm_cfg"),
        (ORIGINAL | {"rms_norm": 1}, "has rms_norm 1, expected True"),
        ({"d_model": 24, "n_layer": 2}, "missing .* 'vocab_size'"),
    ],
)
def test_wrong_values_are_named_as_the_file_has_them(fields, message, tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=rf"config\.json .*{message}"):
        MambaLM.from_pretrained(config_file(tmp_path, **fields))


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"d_model": True}, TypeError),
        ({"n_layer": 2.0}, TypeError),
        ({"dt_rank": "two"}, ValueError),
        ({"bias": "no"}, TypeError),
        ({"norm_eps": -1.0}, ValueError),
        ({"dt_max": float("inf")}, ValueError),
        ({"dt_min": 0.2}, ValueError),
        ({"dt_floor": None}, TypeError),
    ],
)
def test_a_config_checks_every_field(changes, error):
    (name,) = changes
    with pytest.raises(error, match=f"{name} is "):
        replace(OURS, **changes)


@pytest.mark.usefixtures("as_a_user")
def test_a_config_keeps_plain_numbers():
    config = replace(OURS, d_model=np.int64(6), bias=np.True_, norm_eps=np.float32(0.5), dt_max=1)
    kept = [config.d_model, config.bias, config.norm_eps, config.dt_max]
    assert [type(value) for value in kept] == [int, bool, float, float]


@pytest.mark.parametrize("layers", [16_000, 10**12])
def test_a_config_of_many_layers_is_refused_by_the_first_names(layers, tmp_path):
    theirs().save_pretrained(tmp_path)
    change_config(tmp_path, num_hidden_layers=layers)
    with pytest.raises(ValueError, match=r"misses tensors: backbone\.layers\.2\.norm\.weight, .*…"):
        MambaLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("field", ORIGINAL)
def test_sizes_past_all_floats_are_refused(field, tmp_path):
    original_layout(theirs(), tmp_path)
    change_config(tmp_path, **{field: 10**400})
    with pytest.raises(ValueError, match=r"config\.json|pytorch_model\.bin"):
        MambaLM.from_pretrained(tmp_path)


def test_a_config_of_absurd_sizes_is_refused_before_they_are_asked_for(tmp_path):
    config = MambaConfig(60_000, 1, 50_000)
    small = torch.zeros(1, dtype=torch.half)
    entries = checkpoints.layout(config, head=False)
    tensors = {entry.released: small.expand(entry.shape) for entry in entries}
    torch.save(tensors, config_file(tmp_path, **ORIGINAL) / "pytorch_model.bin")
    change_config(tmp_path, d_model=60_000, n_layer=1, vocab_size=50_000)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin has \d+ bytes, expected the \d{11} "):
        MambaLM.from_pretrained(tmp_path)


def index_file(folder, content):
    path = config_file(folder, **HF) / "model.safetensors.index.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/b", "a\\b", "C:a", "..", "", ".a", "a\0", "a\n", "a.bin", 3, None]
    + [f"{start}a.safetensors" for start in ("../", "/", "..\\", "C:", "C:\\", ".")],
)
def test_a_shard_is_a_bare_name_in_its_folder(name, tmp_path):
    MambaLM(OURS).save_pretrained(tmp_path / "a.safetensors")  # no name may reach what is there
    (tmp_path / "inside").mkdir()
    with pytest.raises(
        ValueError, match=r"index\.json places 'x' in .*, expected the bare name of"
    ):
        MambaLM.from_pretrained(index_file(tmp_path / "inside", {"weight_map": {"x": name}}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "holds a list"),
        ({}, "has no weight_map"),
        ({"weight_map": []}, "has no weight_map"),
        ({"weight_map": {}}, "misses tensors"),
        (b"{", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b'{"\xff": 1}', "is no JSON"),
        (b'{"weight_map": {"x": "a", "x": "b"}}', "is no JSON: 'x' is given twice"),
    ],
)
def test_a_damaged_index_is_named(content, message, tmp_path):
    with pytest.raises(ValueError, match=rf"index\.json {message}"):
        MambaLM.from_pretrained(index_file(tmp_path, content))


def test_a_shard_holds_what_the_index_says(tmp_path):
    theirs().save_pretrained(tmp_path, max_shard_size="20KB")
    first, second, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    tensors = load_file(first)
    name = min(tensors)
    save_file(load_file(second) | {name: tensors[name] + 1}, second)
    with pytest.raises(ValueError, match=rf"{second.name} has unknown tensors: {name} \(see model"):
        MambaLM.from_pretrained(tmp_path)


# writing


def stop_at(monkeypatch, owner, name, count, error):
    """Let a function raise an error at its `count`-th call."""
    calls, function = [], getattr(owner, name)

    def stopping(*args, **options):
        calls.append(args)
        if len(calls) == count:
            raise error
        return function(*args, **options)

    monkeypatch.setattr(owner, name, stopping)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [
        (safetensors.torch, "save_file", 1),
        (Path, "write_text", 1),
        (os, "fsync", 2),
        (Path, "replace", 1),
    ],
)
@pytest.mark.parametrize("error", [FULL, SafetensorError(str(FULL)), KeyboardInterrupt("stopped")])
def test_a_failure_leaves_the_old_folder_whole(owner, name, count, error, tmp_path, monkeypatch):
    MambaLM(OURS).save_pretrained(tmp_path)
    before = contents(tmp_path)
    stop_at(monkeypatch, owner, name, count, error)
    message = f"{tmp_path} cannot be written: .*No space left|^stopped$"
    with pytest.raises((OSError, KeyboardInterrupt), match=message):
        MambaLM(replace(OURS, norm_eps=1.0)).save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_a_folder_that_is_half_written_is_noticed(tmp_path, monkeypatch):
    theirs().save_pretrained(tmp_path)
    torch.manual_seed(0)
    new = MambaLM(replace(MambaLM.from_pretrained(tmp_path).config, norm_eps=1.0))
    stop_at(monkeypatch, Path, "replace", 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        new.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"model\.safetensors was written with norm_eps 1\.0, config"
    ):
        MambaLM.from_pretrained(tmp_path)
    new.save_pretrained(tmp_path)
    assert MambaLM.from_pretrained(tmp_path).config.norm_eps == 1.0


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(OSError, match=f"{place} cannot be written"):
            MambaLM(OURS).save_pretrained(place)


def test_both_files_can_be_read_by_the_same_people(tmp_path):
    MambaLM(OURS).save_pretrained(tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


class Subclass(torch.Tensor):
    pass


SUBCLASS = torch.nn.Parameter(torch.ones(6).as_subclass(Subclass))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lm: lm.embedding.weight.data.fill_(float("nan")), "embedding.weight in .* nan"),
        (lambda lm: setattr(lm.norm_f.weight, "data", torch.ones(6).cfloat()), "torch.complex64"),
        (lambda lm: setattr(lm.norm_f.weight, "data", torch.ones(5)), r"norm_f.weight .* \(5,\)"),
        (lambda lm: setattr(lm.norm_f, "weight", SUBCLASS), "norm_f.weight in .* is a Subclass"),
        (lambda lm: lm.register_buffer("scale", torch.ones(1)), "has unknown tensors: scale"),
        (lambda lm: setattr(lm.norm_f, "weight", None), "misses tensors: norm_f.weight"),
    ],
)
def test_what_would_not_load_is_not_written(change, message, tmp_path):
    model = MambaLM(OURS)
    change(model)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


# whatever happens to a folder


def ours_in(folder):
    torch.manual_seed(0)
    model = MambaLM(OURS)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model.eval()


def original(fields):
    names = {"hidden_size": "d_model", "num_hidden_layers": "n_layer", "vocab_size": "vocab_size"}
    sizes = {ours: fields[theirs] for theirs, ours in names.items()}
    return sizes | {"pad_vocab_size_multiple": 1, "ssm_cfg": {"d_state": fields["state_size"]}}


# how the fields, and the names of the tensors, are told; the files of weights
LAYOUTS = {
    "hf": (dict, str, ["model.safetensors"]),
    "headless": (dict, lambda name: name.removeprefix("backbone."), ["model.safetensors"]),
    "shards": (dict, str, ["model-1.safetensors", "model-2.safetensors"]),
    "original": (original, lambda name: name.replace("ings", "ing"), ["pytorch_model.bin"]),
    "pickled shards": (original, str, ["pytorch_model-1.bin", "pytorch_model-2.bin"]),
}


def write_parts(folder, fields, parts):
    (folder / "config.json").write_text(json.dumps(fields))
    for file, tensors in parts.items():
        if file.endswith(".bin"):
            torch.save(tensors, folder / file)
        else:
            save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / file)
    if len(parts) > 1:
        places = {name: file for file, tensors in parts.items() for name in tensors}
        index = f"{file.replace('-2', '')}.index.json"
        (folder / index).write_text(json.dumps({"weight_map": places}))


# of every type, but no number that another model might have
WRONG = [None, "x", "16", [], {}, [[]], True, False, -1, -0.5, 10**400, float("nan")]


def change_field(rng, fields, parts):
    fields[rng.choice(list(fields))] = rng.choice(WRONG)


def drop_field(rng, fields, parts):
    del fields[rng.choice(list(fields))]


def change_tensor(rng, fields, parts):
    tensors = rng.choice(list(parts.values()))
    name = rng.choice(list(tensors))
    tensor = tensors[name]
    values = [float("nan"), float("inf"), float("-inf")]
    tensors[name] = rng.choice(
        [
            lambda: tensor.to(rng.choice([torch.int8, torch.bool, torch.uint8])),
            lambda: (
                tensor.flatten()
                .index_fill(0, torch.tensor([0]), rng.choice(values))
                .view_as(tensor)
            ),
            lambda: tensor[:-1],
            lambda: tensor[None],
            lambda: tensor.double(),
        ]
    )()


def drop_tensor(rng, fields, parts):
    tensors = rng.choice(list(parts.values()))
    del tensors[rng.choice(list(tensors))]


def rename_tensor(rng, fields, parts):
    tensors = rng.choice(list(parts.values()))
    name = rng.choice(list(tensors))
    letters = list(name)
    letters[rng.randrange(len(name))] = rng.choice(string.ascii_letters)
    tensors["".join(letters)] = tensors.pop(name)


def repeat_tensor(rng, fields, parts):
    first, last = (rng.choice(list(parts.values())) for _ in range(2))
    name = rng.choice(list(first))
    alias = rng.choice([name, f"backbone.{name}", name.replace("mixer.", "mixer.ssm."), name[:-1]])
    last.setdefault(alias.replace("embedding.", "embeddings."), first[name] + 1)


def change_bytes(rng, folder):
    path = rng.choice(list(folder.iterdir()))
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data))])


def change_file(rng, folder):
    files = list(folder.iterdir())
    path = rng.choice(files)
    data = rng.choice(files).read_bytes()
    path.unlink()
    kind = rng.choice(["gone", "folder", "empty", "link", "other"])
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("nowhere")
    elif kind != "gone":
        path.write_bytes(data if kind == "other" else b"")


def loads_or_names_a_file(folder, model, seed):
    """Check that the model is the one that was written, or that an error names the file."""
    ids = torch.arange(11)[None]
    loaded = problem = None
    try:
        loaded = MambaLM.from_pretrained(folder)
    except (ValueError, FileNotFoundError) as error:
        problem = str(error)
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids)) if loaded else str(folder) in problem, seed
    return loaded is not None


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_with_a_fault_is_refused_or_is_the_same_model(layout, tmp_path):
    model = ours_in(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    told, called, files = LAYOUTS[layout]
    half = -(-len(tensors) // len(files))
    names = list(tensors)
    in_parts = [change_field, drop_field, change_tensor, drop_tensor, rename_tensor, repeat_tensor]
    in_files = [change_bytes, change_file]
    loaded = 0
    for seed in range(240):
        rng = random.Random(seed)
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        fields = told(written)
        parts = {
            file: {called(name): tensors[name] for name in names[i * half : (i + 1) * half]}
            for i, file in enumerate(files)
        }
        fault = rng.choice([*in_parts, *in_files, None])
        if fault in in_parts:
            fault(rng, fields, parts)
        write_parts(tmp_path, fields, parts)
        if fault in in_files:
            fault(rng, tmp_path)
        loaded += loads_or_names_a_file(tmp_path, model, seed)
    assert 10 < loaded < 120


@pytest.mark.parametrize("files", ["*", "*.bin"])  # all that is written here; a pickle
def test_a_flipped_bit_is_noticed(files, tmp_path):
    model = ours_in(tmp_path)
    if files == "*.bin":
        weights = tmp_path / "model.safetensors"
        torch.save(load_file(weights), tmp_path / "pytorch_model.bin")
        weights.unlink()
    before = {path: path.read_bytes() for path in tmp_path.glob(files)}
    for seed in range(200):
        rng = random.Random(seed)
        path = rng.choice(list(before))
        flipped = bytearray(before[path])
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        loads_or_names_a_file(tmp_path, model, seed)
        path.write_bytes(before[path])


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder '/no/such/folder'"):
        MambaLM.from_pretrained("/no/such/folder")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        MambaLM.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no weights, expected model\.safetensors or"):
        MambaLM.from_pretrained(config_file(tmp_path, hidden_size=8, num_hidden_layers=1))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        MambaLM.from_pretrained(tmp_path)
