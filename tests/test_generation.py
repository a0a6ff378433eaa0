"""The graph of a step, and when it may be used again."""

import copy

import pytest
import torch
from torch import nn

from mamba_tutorial import generation
from mamba_tutorial.generation import StepGraph, lent_graph
from mamba_tutorial.mamba import MambaConfig, MambaLM

CONFIG = MambaConfig(d_model=16, n_layer=2, vocab_size=11)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Scaled(nn.Linear):
    """A layer of somebody else, with a number that a graph would freeze."""

    scale = 2.0

    def forward(self, x):
        return self.scale * super().forward(x)


def test_a_step_graph_wants_a_gpu():
    with pytest.raises(ValueError, match="model is on cpu, expected a GPU"):
        StepGraph(MambaLM(CONFIG), 1)


CHANGES = {
    "a parameter elsewhere": lambda m: m.load_state_dict(
        copy.deepcopy(m.state_dict()), assign=True
    ),
    "another dtype": lambda m: m.double(),
    "another module": lambda m: setattr(m.layers[0], "norm", nn.Identity()),
    "training": lambda m: m.train(),
    "other numbers in place": lambda m: m.embedding.weight.data.mul_(2),
    "a hook": lambda m: m.layers[1].register_forward_hook(lambda *_: None),
    "a module of others": lambda m: setattr(m.layers[0].mixer, "out_proj", Scaled(32, 16)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_graph_is_recorded_anew_where_something_else_would_be_recorded(change):
    model = MambaLM(CONFIG).eval()
    before = generation._recipe(model, 2)
    assert generation._recipe(model, 2) == before != generation._recipe(model, 3)
    with torch.inference_mode():  # its tensors cannot be written to outside
        assert generation._recipe(model, 2) != before
    CHANGES[change](model)
    after = generation._recipe(model, 2)
    if change == "other numbers in place":
        assert after == before  # which the graph reads where they are
    else:
        assert after != before
    assert (after is None) == (change in {"a hook", "a module of others"})


class Recorded:
    """What stands for a graph where there is no GPU."""

    def __init__(self, model, batch):
        self.batch = batch


def test_a_graph_is_lent_to_one_at_a_time(monkeypatch):
    monkeypatch.setattr(generation, "StepGraph", Recorded)
    model, other = MambaLM(CONFIG), MambaLM(CONFIG)
    with lent_graph(model, 2) as first, lent_graph(model, 2) as second:
        assert first is not second
    with lent_graph(other, 2) as theirs:
        assert theirs is not first
    with lent_graph(model, 2) as again:
        assert again is first  # the last to come back
    lent = lent_graph(model, 2)
    assert lent.__enter__() is first
    assert not lent.__exit__(KeyError, KeyError(), None)  # an error goes on
    with lent_graph(model, 2) as fourth, torch.no_grad():
        assert fourth is first
    with lent_graph(model, 3) as wider:
        assert wider.batch == 3
    model.layers[0].register_forward_hook(lambda *_: None)
    with lent_graph(model, 3) as hooked:
        assert hooked is not wider
    with lent_graph(model, 3) as hooked_again:
        assert hooked_again is not hooked


def test_a_graph_goes_with_its_model(monkeypatch):
    monkeypatch.setattr(generation, "StepGraph", Recorded)
    model, count = MambaLM(CONFIG), len(generation._IDLE)
    with lent_graph(model, 2):
        pass
    assert len(generation._IDLE) == count + 1
    copy.deepcopy(model)
    del model
    assert len(generation._IDLE) == count


@on_gpu
def test_a_graph_of_an_earlier_call_writes_the_same(monkeypatch):
    torch.manual_seed(0)
    model = MambaLM(CONFIG).cuda().eval()
    made, init = [], StepGraph.__init__

    def counted(self, *given):
        made.append(given)
        init(self, *given)

    monkeypatch.setattr(StepGraph, "__init__", counted)
    ids = torch.randint(11, (2, 5), device="cuda")

    def alone(prompt, count=12):
        for _ in range(count):
            best = model(prompt)[:, -1].argmax(-1, keepdim=True)
            prompt = torch.cat([prompt, best], dim=1)
        return prompt

    for change in (lambda: None, lambda: model.embedding.weight.data.mul_(-1.5)):
        change()
        assert torch.equal(model.generate(ids, 12, temperature=0), alone(ids))
    assert len(made) == 1
    one, two = (model.stream(p, 12, temperature=0) for p in (ids, ids.flip(1)))
    written = [torch.stack(pair) for pair in zip(one, two, strict=True)]
    assert len(made) == 2  # the first had been lent
    for prompt, tokens in ((ids, 0), (ids.flip(1), 1)):
        new = torch.stack([pair[tokens] for pair in written], dim=1)
        assert torch.equal(torch.cat([prompt, new], dim=1), alone(prompt))
    with torch.inference_mode():
        assert torch.equal(model.generate(ids, 12, temperature=0), alone(ids))
    assert torch.equal(model.generate(ids, 12, temperature=0), alone(ids))
