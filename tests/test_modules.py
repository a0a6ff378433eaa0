"""Modules are called, not read: what is hooked to them or put in their place takes effect."""

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mamba_tutorial import S4, S4D, MambaConfig, MambaLM

SIZES = {"d_model": 16, "n_layer": 2, "vocab_size": 11}


def model(**changes):
    torch.manual_seed(0)
    return MambaLM(MambaConfig(**SIZES | changes)).eval()


def prompts():
    return torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(0))


READERS = {
    "forward": lambda lm: lm(prompts()),
    "prefill": lambda lm: lm.prefill(prompts()),
    "step": lambda lm: lm.step(prompts()[:, 0], lm.initial_state(2)),
    "generate": lambda lm: lm.generate(prompts(), 2),
}


@pytest.mark.parametrize("way", READERS)
def test_every_hook_is_called(way):
    lm, called = model(tie_embeddings=False), set()
    names = {name for name, _ in lm.named_modules() if name != "layers"}
    for name, module in lm.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    READERS[way](lm)
    assert called == names


class Adapter(nn.Module):
    """A low-rank addition around any module."""

    def __init__(self, base, inputs, outputs):
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("name", ["in_proj", "ssm.x_proj", "ssm.dt_proj", "out_proj", "lm_head"])
def test_an_adapter_takes_effect_in_all_ways_of_reading(name):
    lm = model(tie_embeddings=False)
    plain = lm(prompts())
    path = name if name == "lm_head" else f"layers.0.mixer.{name}"
    base = lm.get_submodule(path)
    owner = lm.get_submodule(path.rpartition(".")[0])
    adapter = Adapter(base, base.in_features, base.out_features)
    nn.init.normal_(adapter.up.weight)
    setattr(owner, path.rpartition(".")[2], adapter)
    logits = lm(prompts())
    assert (logits - plain).abs().max() > 1e-5
    logits.square().mean().backward()
    assert adapter.up.weight.grad.abs().max() > 0
    state = lm.initial_state(2)
    with torch.no_grad():
        for t, ids in enumerate(prompts().unbind(1)):
            step, state = lm.step(ids, state)
            torch.testing.assert_close(step, logits[:, t], rtol=1e-4, atol=1e-5)


def test_a_bias_of_a_projection_in_its_place_counts_once():
    lm = model()
    with torch.no_grad():
        shifted = copy.deepcopy(lm)
        for layer, other in zip(lm.layers, shifted.layers, strict=True):
            layer.mixer.ssm.dt_bias += 0.5
            ssm = other.mixer.ssm
            linear = nn.Linear(ssm.dt_proj.in_features, ssm.dt_proj.out_features)
            linear.weight.copy_(ssm.dt_proj.weight)
            linear.bias.fill_(0.5)
            ssm.dt_proj = linear
        torch.testing.assert_close(shifted(prompts()), lm(prompts()))


@pytest.mark.usefixtures("as_a_user")  # plain tuples will do
def test_a_state_is_saved_loaded_and_continued_from(tmp_path):
    lm, ids = model(), prompts()
    whole = lm.generate(ids, 5, temperature=0)
    _, state = lm.prefill(ids[:, :4])
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt")
    rest = lm.generate(ids[:, 4:], 5, temperature=0, state=loaded)
    assert torch.equal(rest[:, 3:], whole[:, 7:])
    pairs = [tuple(block) for block in loaded]
    assert torch.equal(lm.generate(ids[:, 4:], 5, temperature=0, state=pairs), rest)


@pytest.mark.parametrize("kind", [S4, S4D])
def test_the_matrices_of_a_recurrence_are_made_once(kind, monkeypatch):
    torch.manual_seed(0)
    layer, x = kind(3, 8).double(), torch.randn(2, 10, 3, dtype=torch.float64)
    made = []
    original = kind.recurrence
    monkeypatch.setattr(kind, "recurrence", lambda self: made.append(self) or original(self))

    def by_steps():
        state, outputs = layer.initial_state(2), []
        for token in x.unbind(1):
            y, state = layer.step(token, state)
            outputs.append(y)
        return torch.stack(outputs, 1), state

    with torch.no_grad():
        _, state = by_steps()
    assert len(made) == 1
    y, _ = by_steps()  # with gradients
    assert len(made) == 2
    expected = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    parameters = list(layer.parameters())
    for value, exact in zip(
        torch.autograd.grad(y.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(value, exact, rtol=1e-7, atol=1e-7)
    with torch.no_grad():
        layer.step(x[:, 0], state)
        assert len(made) == 2
        layer.log_dt += 0.1  # as an optimizer does
        y, _ = layer.step(x[:, 0], state)
        assert len(made) == 3
        torch.testing.assert_close(y, layer.step(x[:, 0], state.clone())[0])


def optimized(layer):
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)  # counts no version
    layer(torch.ones(1, 5, 3, dtype=torch.float64)).square().sum().backward()
    optimizer.step()


def loaded(layer):
    layer.load_state_dict({name: value + 0.3 for name, value in layer.state_dict().items()})


def replaced(layer):
    layer.log_dt = nn.Parameter(layer.log_dt.detach() + 0.3)


def given_other_data(layer):
    layer.log_dt.data += 0.3


def thawed(layer):
    layer.requires_grad_(True)


@pytest.mark.parametrize("kind", [S4, S4D])
@pytest.mark.parametrize("change", [optimized, loaded, replaced, given_other_data, thawed])
def test_a_step_goes_by_the_parameters_as_they_are(kind, change):
    torch.manual_seed(0)
    layer, x = kind(3, 8).double(), torch.randn(2, 3, dtype=torch.float64)
    layer.requires_grad_(change is not thawed)
    _, state = layer.step(x, layer.initial_state(2))
    state = layer.step(x, state.detach())[1].detach()
    _, state = layer.step(x, state)
    change(layer)
    y, expected = (layer.step(x, start)[0] for start in (state, state.detach().clone()))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    if change is thawed:
        assert torch.autograd.grad(y.sum(), layer.log_dt)[0].abs().sum() > 0


PROCESS = """
import sys
import torch, torch.distributed as dist, torch.nn.functional as F
from datetime import timedelta
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from mamba_tutorial import MambaConfig, MambaLM, SelectiveSSM

rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group(
    "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2,
    timeout=timedelta(seconds=60),
)
ids = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(0))

def fresh():
    torch.manual_seed(0)
    return MambaLM(MambaConfig(16, 2, 11))

def train(model, ids):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        logits = model(ids[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    return model

def same(parameters, expected):
    for (name, value), (_, exact) in zip(parameters, expected):
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-6, msg=name)

alone, own = train(fresh(), ids), ids[2 * rank : 2 * rank + 2]
tokens = alone.generate(ids[:, :4], 5, temperature=0)

replicas = train(DistributedDataParallel(fresh()), own).module
same(replicas.named_parameters(), alone.named_parameters())
assert torch.equal(replicas.generate(ids[:, :4], 5, temperature=0), tokens)

sharded = fresh()
for layer in sharded.layers:
    fully_shard(layer)
train(fully_shard(sharded), own)
same(sharded.named_parameters(), alone.named_parameters())
assert torch.equal(sharded.generate(ids[:, :4], 5, temperature=0), tokens)

ssm = DistributedDataParallel(SelectiveSSM(8, 4, 2, selective=("B", "C")))
for _ in range(3):  # a parameter without a gradient would stop the second
    ssm(torch.randn(2, 5, 8))[0].sum().backward()
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without distributed")
def test_two_processes_train_and_generate_as_one():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), port],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
