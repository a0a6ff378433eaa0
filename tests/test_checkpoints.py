"""Checkpoints of both layouts against transformers, and files that should not be trusted."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MambaConfig as TheirConfig
from transformers import MambaForCausalLM

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


# what should not load


def altered(folder, change):
    theirs().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def drop(tensors):
    del tensors["backbone.layers.1.mixer.A_log"]


def add(tensors):
    tensors["backbone.layers.2.mixer.A_log"] = torch.ones(48, 16)


def reshape(tensors):
    tensors["backbone.layers.0.mixer.dt_proj.bias"] = torch.ones(47)


def untie(tensors):
    tensors["lm_head.weight"] = torch.ones(37, 24)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"misses tensors: backbone\.layers\.1\.mixer\.A_log"),
        (add, r"has unknown tensors: backbone\.layers\.2\.mixer\.A_log"),
        (reshape, r"backbone\.layers\.0\.mixer\.dt_proj\.bias has shape \(47,\).*expected \(48,\)"),
        (untie, r"lm_head\.weight differs from backbone\.embeddings?\.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    altered(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        MambaLM.from_pretrained(tmp_path)


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
