"""The models of 130 million parameters that the benchmarks compare."""

import importlib
from functools import lru_cache

import torch

from mamba_tutorial.attention import TransformerConfig
from mamba_tutorial.mamba import MambaConfig

SMALL = MambaConfig(d_model=768, n_layer=24, vocab_size=50280)  # the size of mamba-130m
SMALL_TRANSFORMER = TransformerConfig(d_model=768, n_layer=12, vocab_size=50280, n_head=12)


@lru_cache
def official_model() -> torch.nn.Module:
    """Return the model of mamba_ssm, with its fused norms, of the size of ours."""
    models = importlib.import_module("mamba_ssm.models.mixer_seq_simple")
    sizes = importlib.import_module("mamba_ssm.models.config_mamba")
    config = sizes.MambaConfig(d_model=768, n_layer=24, vocab_size=50280)
    return models.MambaLMHeadModel(config, device="cuda")


def mamba_of_transformers() -> torch.nn.Module:
    """Return transformers' model, of the size of ours."""
    library = importlib.import_module("transformers")
    config = library.MambaConfig(hidden_size=768, num_hidden_layers=24, vocab_size=50280)
    return library.MambaForCausalLM(config).cuda()
