"""Modules are called, not read: what is hooked to them or put in their place takes effect."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

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
    """A low-rank addition around any module, which shows nothing of what it wraps."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class OpenAdapter(Adapter):
    """An adapter that shows the weight and the bias of what it wraps, as those of peft do."""

    def __init__(self, base):
        super().__init__(base)
        self.weight, self.bias = base.weight, base.bias


LINEARS = ["in_proj", "ssm.x_proj", "ssm.dt_proj", "out_proj", "lm_head"]


def path_of(linear):
    return linear if linear == "lm_head" else f"layers.0.mixer.{linear}"


def put(lm, path, module):
    owner, _, name = path.rpartition(".")
    setattr(lm.get_submodule(owner), name, module)


def by_steps(lm):
    state, logits = lm.initial_state(2), []
    for ids in prompts().unbind(1):
        step, state = lm.step(ids, state)
        logits.append(step)
    return torch.stack(logits, 1)


@pytest.mark.parametrize("kind", [Adapter, OpenAdapter])
@pytest.mark.parametrize("linear", LINEARS)
def test_an_adapter_is_an_addition_to_the_weight(linear, kind):
    """In both ways of reading; and so are its gradients, with all that is below it frozen."""
    lm, path = model(tie_embeddings=False).requires_grad_(False), path_of(linear)
    plain, merged = lm(prompts()), copy.deepcopy(lm)
    adapter = kind(lm.get_submodule(path))
    nn.init.normal_(adapter.up.weight)
    put(lm, path, adapter)
    weight, up, down = merged.get_submodule(path).weight, adapter.up.weight, adapter.down.weight
    weight += (up @ down).detach()
    weight.requires_grad_()
    for read in (lambda lm: lm(prompts()), by_steps):
        logits, expected = read(lm), merged(prompts())
        assert (logits - plain).abs().max() > 1e-4  # far more than rounding may do below
        torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-5)
        given = torch.autograd.grad(logits.square().mean(), [up, down])
        d = torch.autograd.grad(expected.square().mean(), weight)[0]
        for value, exact in zip(given, (d @ down.mT, up.mT @ d), strict=True):
            assert exact.abs().max() > 0
            assert (value - exact).norm() < 1e-4 * exact.norm()


@pytest.mark.parametrize("linear", LINEARS)
@torch.no_grad()
def test_a_bias_of_a_projection_in_its_place_counts_once(linear):
    lm, path = model(tie_embeddings=False), path_of(linear)
    biased, base = copy.deepcopy(lm), lm.get_submodule(path)
    projection = nn.Linear(base.in_features, base.out_features)
    projection.weight.copy_(base.weight)
    put(biased, path, projection)
    base.register_forward_hook(lambda module, given, y: y + projection.bias)
    for read in (lambda lm: lm(prompts()), by_steps):
        torch.testing.assert_close(read(biased), read(lm))


@torch.no_grad()
def test_a_bias_of_dt_proj_is_added_to_dt_bias():
    lm = model()
    shifted = copy.deepcopy(lm)
    for layer, other in zip(lm.layers, shifted.layers, strict=True):
        layer.mixer.ssm.dt_bias += 0.5
        other.mixer.ssm.dt_proj.bias = nn.Parameter(torch.full_like(layer.mixer.ssm.dt_bias, 0.5))
    torch.testing.assert_close(shifted(prompts()), lm(prompts()))
    torch.testing.assert_close(by_steps(shifted), by_steps(lm))


@pytest.mark.filterwarnings("ignore")  # PyTorch's, that its quantization moves elsewhere
@torch.no_grad()
def test_projections_of_int8_are_near_those_of_floats():
    lm = model(tie_embeddings=False)
    small = torch.ao.quantization.quantize_dynamic(lm, {nn.Linear}, dtype=torch.qint8)
    kinds = [type(module) for module in small.modules()]
    assert nn.Linear not in kinds
    assert kinds.count(torch.ao.nn.quantized.dynamic.Linear) == 4 * SIZES["n_layer"] + 1
    plain = lm(prompts())
    for logits in (small(prompts()), by_steps(small)):
        assert 0 < (logits - plain).norm() < 0.05 * plain.norm()
    assert small.generate(prompts(), 3).shape == (2, 10)


@pytest.mark.usefixtures("as_a_user")  # plain tuples will do
def test_a_state_is_saved_loaded_and_continued_from(tmp_path):
    lm, ids = model(tie_embeddings=False), prompts()
    for layer in lm.layers:
        nn.init.normal_(layer.mixer.out_proj.weight)  # so that the past shows
    whole = lm.generate(ids, 5, temperature=0)
    _, state = lm.prefill(ids[:, :4])
    assert type(state[0]).__module__ == "mamba_tutorial.mamba"  # which no move of a file changes
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt")
    rest = lm.generate(ids[:, 4:], 5, temperature=0, state=loaded)
    assert torch.equal(rest[:, 3:], whole[:, 7:])
    assert not torch.equal(lm.generate(ids[:, 4:], 5, temperature=0), rest)
    pairs = [tuple(block) for block in loaded]
    assert torch.equal(lm.generate(ids[:, 4:], 5, temperature=0, state=pairs), rest)


def s4_layer(kind):
    torch.manual_seed(0)
    return kind(3, 8).double(), torch.randn(2, 10, 3, dtype=torch.float64)


def read_on(layer, x, state):
    outputs = []
    for token in x.unbind(1):
        y, state = layer.step(token, state)
        outputs.append(y)
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("kind", [S4, S4D])
def test_steps_and_their_gradients_are_those_of_the_convolution(kind):
    layer, x = s4_layer(kind)
    y, expected = read_on(layer, x, layer.initial_state(2))[0], layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    parameters = list(layer.parameters())
    for value, exact in zip(
        torch.autograd.grad(y.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [S4, S4D])
def test_the_matrices_of_a_recurrence_are_made_once(kind, monkeypatch):
    (layer, x), made, original = s4_layer(kind), [], kind.recurrence
    monkeypatch.setattr(kind, "recurrence", lambda self: made.append(self) or original(self))
    with torch.no_grad():
        _, state = read_on(layer, x, layer.initial_state(2))
        assert len(made) == 1
        read_on(layer, x, state)
        assert len(made) == 1
        read_on(layer, x, layer.initial_state(2))
        assert len(made) == 2
    layer.requires_grad_(False)
    read_on(layer, x, state)
    assert len(made) == 2
    layer.requires_grad_(True)
    read_on(layer, x[:, :1], state)  # with gradients, which go through them
    assert len(made) == 3
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        read_on(layer, x, state)
    assert len(made) == 4


def optimized(layer):
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)  # counts no version
    layer(torch.ones(1, 5, 3, dtype=torch.float64)).square().sum().backward()
    optimizer.step()


@torch.no_grad()
def written_in_place(layer):
    layer.log_dt += 0.1


def loaded(layer):
    layer.load_state_dict({name: value + 0.3 for name, value in layer.state_dict().items()})


def replaced(layer):
    layer.log_dt = nn.Parameter(layer.log_dt.detach() + 0.3)


def given_other_data(layer):
    layer.log_dt.data += 0.3


def thawed(layer):
    layer.requires_grad_(True)


@pytest.mark.parametrize("kind", [S4, S4D])
@pytest.mark.parametrize(
    "change", [optimized, written_in_place, loaded, replaced, given_other_data, thawed]
)
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


@pytest.mark.parametrize("kind", [S4, S4D])
def test_gradients_of_steps_reach_whatever_stands_for_the_parameters(kind):
    layer, x = s4_layer(kind)
    _, state = layer.step(x[:, 0], layer.initial_state(2))
    others = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}

    def loss(start):
        return torch.func.functional_call(Stepped(layer), prefixed(others), (x[:, 1], start)).sum()

    found = torch.autograd.grad(loss(state.detach()), list(others.values()))
    again = torch.autograd.grad(loss(state), list(others.values()))
    for one, other in zip(found, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


class Stepped(nn.Module):
    """`functional_call` calls a module."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, state):
        return self.layer.step(x, state)[0]


def prefixed(parameters):
    return {f"layer.{name}": parameter for name, parameter in parameters.items()}


@pytest.mark.parametrize("kind", [S4, S4D])
def test_a_state_that_is_detached_in_place_ends_the_gradient(kind):
    layer, x = s4_layer(kind)
    state = layer.initial_state(2)
    for token in x.unbind(1)[:3]:
        y, state = layer.step(token, state)
        y.sum().backward()
        state.detach_()
    assert layer.log_dt.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", [S4, S4D])
def test_nothing_of_a_backward_pass_lies_on_another_device(kind):
    """A copy between devices cannot be part of a CUDA graph."""
    layer = kind(3, 8).to("meta")
    y = layer(torch.ones(2, 10, 3, device="meta"))
    with NoCopies():
        y.sum().backward()


class NoCopies(TorchDispatchMode):
    """Refuses to copy between devices."""

    def __torch_dispatch__(self, function, types, given=(), options=None):
        made = function(*given, **(options or {}))
        for before in given:
            if isinstance(before, torch.Tensor) and isinstance(made, torch.Tensor):
                assert before.device == made.device, function
        return made


@pytest.mark.parametrize("kind", [S4, S4D])
def test_a_step_after_a_change_of_precision_has_the_new_one(kind):
    torch.manual_seed(0)
    layer, x = kind(3, 8), torch.randn(2, 3)
    with torch.no_grad():
        _, state = layer.step(x, layer.initial_state(2))
        layer.double()
        y, expected = (layer.step(x.double(), start)[0] for start in (state, state.clone()))
    torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-14)


PROCESS = """
import sys
import torch, torch.distributed as dist, torch.nn.functional as F
from datetime import timedelta
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from mamba_tutorial import MambaConfig, MambaLM, SelectiveSSM

rank, meeting = int(sys.argv[1]), sys.argv[2]
dist.init_process_group(
    "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
)
ids = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(0))
x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
mine = slice(2 * rank, 2 * rank + 2)

def seeded(kind, *sizes, **settings):
    torch.manual_seed(0)
    return kind(*sizes, **settings)

def language_model():
    return seeded(MambaLM, MambaConfig(16, 2, 11))

def surprise(model, ids):
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

def power(ssm, x):
    return ssm(x)[0].square().mean()

def train(model, loss, data):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):  # a parameter without a gradient would stop the second step of DDP
        optimizer.zero_grad()
        loss(model, data).backward()
        optimizer.step()
    return model

def same(module, expected):
    given, exact = dict(module.named_parameters()), dict(expected.named_parameters())
    assert given.keys() == exact.keys()
    for name, value in given.items():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        torch.testing.assert_close(
            value, exact[name], rtol=1e-5, atol=1e-6, msg=lambda text: f"{name}: {text}"
        )

def generated(model):
    return model.generate(ids[:, :4], 5, temperature=0)

alone = train(language_model(), surprise, ids)
replicas = train(DistributedDataParallel(language_model()), surprise, ids[mine]).module
same(replicas, alone)
assert torch.equal(generated(replicas), generated(alone))

sharded = language_model()
for layer in sharded.layers:
    fully_shard(layer)
train(fully_shard(sharded), surprise, ids[mine])
same(sharded, alone)
assert torch.equal(generated(sharded), generated(alone))

unselective = lambda: seeded(SelectiveSSM, 8, 4, 2, selective=("B", "C"))
same(
    train(DistributedDataParallel(unselective()), power, x[mine]).module,
    train(unselective(), power, x),
)
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without distributed")
def test_two_processes_train_and_generate_as_one(tmp_path):
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(tmp_path / "meeting")],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=60)[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    finally:
        for process in processes:
            process.kill()
