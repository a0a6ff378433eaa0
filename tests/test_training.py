"""The training loop learns, stops, records, and resumes to the last bit."""

import json

import pytest
import torch
from torch import nn

from mamba_tutorial.training import accuracy, parameter_groups, train


def batches(generator):
    x = torch.randn(32, 4, generator=generator)
    return x, (x[:, 0] > 0).long()


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.2), nn.GELU(), nn.Linear(16, 2))


def score(net):
    return accuracy(net, *batches(torch.Generator().manual_seed(9)))


class Interrupted:
    """Batches that are interrupted, as by Ctrl-C, before the given one."""

    def __init__(self, before):
        self.left = before

    def __call__(self, generator):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return batches(generator)


def same(first, second):
    return all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


def test_it_learns():
    net = model()
    record = train(net, batches, steps=200, lr=0.02, evaluate=score, every=50)
    assert [step for step, _ in record.scores] == [50, 100, 150, 200]
    assert record.scores[-1][1] > 0.9
    assert len(record.losses) == 200
    assert record.losses[-1] < record.losses[0]


def test_a_seed_fixes_everything():
    nets = [model() for _ in range(3)]
    for net, seed in zip(nets, [1, 1, 2], strict=True):
        train(net, batches, steps=5, seed=seed)
    assert same(nets[0], nets[1])
    assert not same(nets[0], nets[2])


@pytest.mark.parametrize("before", [1, 7, 10, 19])
def test_an_interruption_loses_nothing(tmp_path, before):
    whole, cut = model(), model()
    settings = {"steps": 20, "lr": 0.01, "evaluate": score, "every": 5}
    expected = train(whole, batches, **settings)
    file = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        train(cut, Interrupted(before), checkpoint=file, **settings)
    fresh = model()
    record = train(fresh, batches, checkpoint=file, **settings)
    assert same(whole, fresh)
    assert record.losses == expected.losses
    assert [list(pair) for pair in record.scores] == [list(pair) for pair in expected.scores]


def test_a_finished_run_is_not_run_again(tmp_path):
    file = tmp_path / "run.pt"
    train(model(), batches, steps=3, checkpoint=file)
    again = train(model(), Interrupted(0), steps=3, checkpoint=file)
    assert len(again.losses) == 3


def test_early_stop():
    record = train(model(), batches, steps=500, lr=0.02, evaluate=score, every=10, stop_at=0.8)
    assert len(record.losses) < 500
    assert record.scores[-1][1] >= 0.8


def test_record_is_saved_with_versions_and_hardware(tmp_path):
    record = train(model(), batches, steps=2, name="a run")
    record.save(tmp_path / "record.json")
    saved = json.loads((tmp_path / "record.json").read_text())
    assert saved["name"] == "a run"
    assert saved["parameters"] == sum(p.numel() for p in model().parameters())
    assert saved["environment"]["torch"] == torch.__version__
    assert len(saved["losses"]) == 2
    assert saved["seconds"] > 0


def test_vectors_do_not_decay():
    net = nn.Linear(3, 2)
    with torch.no_grad():
        net.weight.fill_(1.0)
        net.bias.fill_(1.0)

    def still(generator):
        return torch.zeros(4, 3), torch.tensor([0, 1, 0, 1])

    train(net, still, steps=10, lr=1e-2, weight_decay=0.5)
    assert (net.weight < 1).all()
    assert torch.allclose(net.bias, torch.ones(2))


def test_bad_input(tmp_path, as_a_user):
    with pytest.raises(ValueError, match="steps is 0, expected at least 1"):
        train(model(), batches, steps=0)
    file = tmp_path / "run.pt"
    train(model(), batches, steps=2, checkpoint=file)
    with pytest.raises(ValueError, match=r"is of a run with .*'steps': 2.*, expected .*'steps': 3"):
        train(model(), batches, steps=3, checkpoint=file)
    with pytest.raises(ValueError, match="the loss is nan at step 1"):
        train(model(), lambda g: (torch.full((2, 4), torch.nan), torch.tensor([0, 1])), steps=1)


def test_what_decays_and_what_does_not():
    class Layer(nn.Module):
        no_weight_decay = frozenset({"scale"})

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, 3))
            self.inner = nn.Linear(3, 3)
            self.tied = self.inner

    layer = Layer()
    decaying, others = (group["params"] for group in parameter_groups(layer, 0.1))
    assert [id(p) for p in decaying] == [id(layer.inner.weight)]
    assert {id(p) for p in others} == {id(layer.scale), id(layer.inner.bias)}
