"""The tasks: shapes, seeds, and that the targets are what the inputs say."""

import pytest
import torch

from mamba_tutorial.tasks import (
    GO,
    IGNORE,
    NOISE,
    associative_recall,
    copying,
    induction_heads,
    next_token,
    parity,
    reciting,
    selective_copying,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("task", [copying, selective_copying])
def test_copying_asks_for_the_data_in_order(task):
    inputs, targets = task(50, seeded(), data=5, noise=20, vocab=9)
    assert inputs.shape == targets.shape == (50, 30)
    assert (inputs[:, -5:] == GO).all()
    assert (targets[:, :-5] == IGNORE).all()
    for row, wanted in zip(inputs[:, :-5], targets[:, -5:], strict=True):
        assert torch.equal(row[row != NOISE], wanted)
        assert ((wanted >= 2) & (wanted < 9)).all()


def test_reciting_reads_again_what_was_said():
    inputs, targets = reciting(200, seeded(), data=6, vocab=9)
    assert inputs.shape == targets.shape == (200, 12)
    lengths = (targets != IGNORE).sum(1)
    assert set(lengths.tolist()) == {3, 4, 5, 6}
    for row, wanted, m in zip(inputs.tolist(), targets.tolist(), lengths.tolist(), strict=True):
        read = row[:m]
        assert min(read) > GO
        assert row[m] == GO
        assert row[m + 1 :] == read[:-1] + [NOISE] * (12 - 2 * m)
        assert wanted == [IGNORE] * m + read + [IGNORE] * (12 - 2 * m)


def test_places_are_fixed_for_copying_and_free_for_selective_copying():
    fixed = copying(50, seeded(), data=3, noise=10)[0] > GO
    free = selective_copying(50, seeded(), data=3, noise=10)[0] > GO
    assert fixed[:, :3].all()
    assert len(free.unique(dim=0)) > 40


def test_every_place_is_as_likely_as_any_other():
    inputs, _ = selective_copying(20_000, seeded(), data=4, noise=12)
    share = (inputs[:, :-4] > GO).double().mean(dim=0)
    assert (share - 0.25).abs().max() < 0.02


def test_induction_heads_asks_for_what_came_after_the_special_token():
    inputs, targets = induction_heads(200, seeded(), length=12, vocab=6)
    assert (inputs[:, -1] == 5).all()
    assert ((inputs == 5).sum(dim=1) == 2).all()
    assert (targets[:, :-1] == IGNORE).all()
    for row, wanted in zip(inputs, targets[:, -1], strict=True):
        first = (row == 5).nonzero()[0, 0]
        assert row[first + 1] == wanted


def test_associative_recall_asks_for_the_value_of_each_key_once():
    inputs, targets = associative_recall(200, seeded(), length=32, pairs=5, vocab=40)
    assert inputs.shape == targets.shape == (200, 32)
    asked = targets != IGNORE
    assert not asked[:, :10].any()
    assert (asked.sum(dim=1) == 5).all()
    for row, wanted in zip(inputs, targets, strict=True):
        value = dict(zip(row[0:10:2].tolist(), row[1:10:2].tolist(), strict=True))
        assert len(value) == len(set(value.values())) == 5
        assert all(0 < k < 20 <= v < 40 for k, v in value.items())
        places = (wanted != IGNORE).nonzero()[:, 0]
        assert {value[row[p].item()] for p in places} == set(value.values())
        assert all(value[row[p].item()] == wanted[p] for p in places)
        assert (places % 2 == 0).all()


def test_most_keys_come_back_soon():
    _, targets = associative_recall(5000, seeded(), length=104, pairs=2, vocab=40)
    share = (targets[:, 4::2] != IGNORE).double().mean(dim=0)
    chances = torch.arange(1.0, 51) ** -0.99
    chances /= chances.sum()
    # drawn without putting back: the first as it says, the second from what is left
    second = (chances[:, None] * chances / (1 - chances[:, None])).fill_diagonal_(0).sum(0)
    assert (share - chances - second).abs().max() < 0.02


def test_parity_counts_the_ones():
    bits, odd = parity(50, seeded(), length=20)
    for row, wanted in zip(bits.tolist(), odd.tolist(), strict=True):
        assert wanted == [sum(row[: t + 1]) % 2 for t in range(20)]


@pytest.mark.parametrize(
    "make",
    [
        lambda g: copying(4, g, data=3, noise=5),
        lambda g: reciting(4, g, data=3),
        lambda g: selective_copying(4, g, data=3, noise=5),
        lambda g: induction_heads(4, g, length=9),
        lambda g: associative_recall(4, g, length=9, pairs=2, vocab=20),
        lambda g: parity(4, g, length=9),
    ],
)
def test_a_seed_fixes_the_data(make):
    first, again, other = make(seeded(1)), make(seeded(1)), make(seeded(2))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda g: copying(0, g, data=1, noise=1), ValueError, "batch is 0, expected at least 1"),
        (
            lambda g: copying(1, g, data=1.5, noise=1),
            TypeError,
            "data is a float, expected a whole",
        ),
        (
            lambda g: selective_copying(1, g, data=1, noise=1, vocab=3),
            ValueError,
            "vocab is 3, exp",
        ),
        (lambda g: induction_heads(1, g, length=2), ValueError, "length is 2, expected at least 3"),
        (
            lambda g: associative_recall(1, g, length=7, pairs=2),
            ValueError,
            "length is 7, expected at least 8",
        ),
        (
            lambda g: associative_recall(1, g, length=9, pairs=2, vocab=4),
            ValueError,
            "vocab is 4, expected an even number above 4",
        ),
        (lambda g: parity(1, g, length=0), ValueError, "length is 0, expected at least 1"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(seeded())


def test_next_token_is_the_text_moved_by_one():
    tokens = torch.arange(1000) % 251
    inputs, targets = next_token(64, torch.Generator().manual_seed(0), tokens=tokens, length=20)
    assert inputs.shape == targets.shape == (64, 20)
    assert torch.equal(targets, (inputs + 1) % 251)
    assert len(set(inputs[:, 0].tolist())) > 40
    whole, _ = next_token(500, torch.Generator().manual_seed(0), tokens=tokens[:22], length=20)
    assert set(whole[:, 0].tolist()) == {0, 1}  # every place can come first, the last one too
    with pytest.raises(ValueError, match="tokens has length 20, expected more than 20"):
        next_token(1, torch.Generator(), tokens=tokens[:20], length=20)


@pytest.mark.parametrize("wrong", [None, 3, torch.rand(2)])
def test_without_a_generator_nothing_is_drawn(wrong):
    for task, sizes in (
        (copying, {"data": 2, "noise": 3}),
        (induction_heads, {"length": 5}),
        (associative_recall, {"length": 8, "pairs": 2}),
        (parity, {"length": 5}),
        (next_token, {"tokens": torch.arange(9), "length": 5}),
    ):
        with pytest.raises(TypeError, match="generator"):
            task(2, wrong, **sizes)
