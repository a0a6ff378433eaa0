"""Sequences in a row, and prompts filled up on their left, are as each is alone."""

import itertools

import pytest
import torch

from mamba_tutorial import selective
from mamba_tutorial.mamba import MambaBlock, MambaConfig, MambaLM
from mamba_tutorial.selective import selective_scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [3, 1, 7, 2, 5]
CONFIG = {"d_model": 12, "n_layer": 2, "vocab_size": 19, "d_state": 3}


def row_of(lengths):
    starts = torch.zeros(1, sum(lengths), dtype=torch.bool, device=DEVICE)
    starts[0, [0, *itertools.accumulate(lengths[:-1])]] = True
    return starts


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64, device=DEVICE)


def problem(length, batch=1):
    torch.manual_seed(0)
    x, dt, z = normal(3, batch, length, 4).unbind(0)
    B, C = normal(2, batch, length, 3).unbind(0)
    D, bias = normal(2, 4).unbind(0)
    given = x, dt, -normal(4, 3).abs(), B, C, D, z, bias
    return [tensor.requires_grad_() for tensor in given]


def assert_same(found, wanted):
    for value, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, right, rtol=0, atol=1e-10)


@pytest.mark.parametrize("discretization", ["mamba", "zoh"])
@pytest.mark.parametrize("backend", ["auto", "sequential", "parallel"])
@pytest.mark.parametrize("pieces", [1, 4])
def test_a_row_is_scanned_sequence_by_sequence(backend, discretization, pieces, monkeypatch):
    lengths = [*LENGTHS, 40, 33]
    monkeypatch.setattr(selective, "CHUNK_NUMBERS", 12 * 96 // pieces)
    given, starts = problem(sum(lengths)), row_of(lengths)
    options = {"dt_softplus": True, "return_last_state": True, "discretization": discretization}
    y, last = selective_scan(*given, backend=backend, starts=starts, **options)
    alone, first = [], 0
    for length in lengths:
        piece = slice(first, first + length)
        parts = [t[:, piece] if t.ndim == 3 else t for t in given]
        alone.append(selective_scan(*parts, **options))
        first += length
    right, right_last = torch.cat([one for one, _ in alone], 1), alone[-1][1]
    assert_same((y, last), (right, right_last))
    d = normal(*y.shape), normal(*last.shape)
    wanted = torch.autograd.grad((right, right_last), given, d)
    assert_same(torch.autograd.grad((y, last), given, d), wanted)


def test_a_state_before_counts_up_to_the_first_start():
    given, starts = problem(9, batch=2), torch.zeros(2, 9, dtype=torch.bool, device=DEVICE)
    starts[1, 4] = True
    h0 = normal(2, 4, 3)
    options = {"dt_softplus": True, "h0": h0, "return_last_state": True}
    y, last = selective_scan(*given, starts=starts, **options)
    whole, end = selective_scan(*given, **options)
    assert_same((y[0], last[0], y[1, :4]), (whole[0], end[0], whole[1, :4]))
    parts = [t[1:, 4:] if t.ndim == 3 else t for t in given]
    again, again_last = selective_scan(*parts, dt_softplus=True, return_last_state=True)
    assert_same((y[1:, 4:], last[1:]), (again, again_last))


@pytest.mark.parametrize("d_conv", [1, 2, 4])
def test_a_block_reads_a_row_sequence_by_sequence(d_conv):
    torch.manual_seed(0)
    block = MambaBlock(MambaConfig(**CONFIG, d_conv=d_conv)).double().to(DEVICE)
    x, starts = normal(1, sum(LENGTHS), 12).requires_grad_(), row_of(LENGTHS)
    y, state = block.prefill(x, block.initial_state(1), starts)
    parts = x.split(LENGTHS, dim=1)
    alone = torch.cat([block(part) for part in parts], 1)
    assert_same((y, block(x, starts=starts)), (alone, alone))
    _, right = block.prefill(parts[-1], block.initial_state(1))
    assert_same(state, right)
    wanted, d = [x, *block.parameters()], normal(*y.shape)
    assert_same(torch.autograd.grad(y, wanted, d), torch.autograd.grad(alone, wanted, d))
    short = x[:, :2], torch.tensor([[False, True]], device=DEVICE)  # shorter than the window
    _, state = block.prefill(short[0], right, short[1])
    _, expected = block.prefill(x[:, 1:2], block.initial_state(1))
    assert_same(state, expected)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MambaLM(MambaConfig(**CONFIG)).double().to(DEVICE).eval()


def test_a_model_trains_on_packed_rows_as_on_each_sequence(model):
    ids, starts = torch.randint(19, (1, sum(LENGTHS)), device=DEVICE), row_of(LENGTHS)
    logits = model(ids, starts=starts)
    alone = torch.cat([model(part) for part in ids.split(LENGTHS, dim=1)], 1)
    assert_same((logits, model.prefill(ids, starts=starts)[0]), (alone, alone))
    weights, d = list(model.parameters()), normal(*logits.shape)
    found, wanted = (torch.autograd.grad(value, weights, d) for value in (logits, alone))
    assert_same(found, wanted)


def prompts():
    torch.manual_seed(1)
    return [torch.randint(19, (length,), device=DEVICE) for length in LENGTHS]


@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_prompts_of_any_lengths_are_continued_as_each_alone(model, penalty):
    options = {"max_new_tokens": 6, "temperature": 0, "repetition_penalty": penalty}
    alone = [model.generate(prompt[None], **options)[0] for prompt in prompts()]
    together = model.generate(prompts(), **options)
    for row, right in zip(together, alone, strict=True):
        assert torch.equal(row, right)
    ids = torch.full((len(LENGTHS), max(LENGTHS)), 5, device=DEVICE)  # any token fills up
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for k, prompt in enumerate(prompts()):
        ids[k, -len(prompt) :], mask[k, -len(prompt) :] = prompt, True
    rows = model.generate(ids, mask=mask, **options)
    assert rows.shape == (5, 7 + 6)
    assert torch.equal(rows[:, 7:], torch.stack([row[-6:] for row in alone]))
    streamed = torch.stack(list(model.stream(ids, mask=mask, **options)), 1)
    assert torch.equal(streamed, rows[:, 7:])


def test_the_mask_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=19, hidden_size=12, state_size=3, num_hidden_layers=2, time_step_rank=1
    )
    theirs = transformers.MambaForCausalLM(config).double().to(DEVICE).eval()
    sizes = {**CONFIG, "pad_vocab_size_multiple": 1, "norm_eps": config.layer_norm_epsilon}
    ours = MambaLM(MambaConfig(**sizes)).double().to(DEVICE).eval()
    names = {
        "backbone.embeddings.weight": "embedding.weight",
        "backbone.norm_f.weight": "norm_f.weight",
    }
    state = {
        names.get(k, k.removeprefix("backbone.")
                 .replace("mixer.A_log", "mixer.ssm.A_log").replace("mixer.D", "mixer.ssm.D")
                 .replace("mixer.x_proj", "mixer.ssm.x_proj")
                 .replace("mixer.dt_proj.weight", "mixer.ssm.dt_proj.weight")
                 .replace("mixer.dt_proj.bias", "mixer.ssm.dt_bias")): v
        for k, v in theirs.state_dict().items() if k != "lm_head.weight"
    }  # fmt: skip
    ours.load_state_dict(state)
    ids = torch.randint(19, (3, 8), device=DEVICE)
    mask = torch.arange(8, device=DEVICE) >= torch.tensor([[0], [3], [7]], device=DEVICE)
    starts = mask & ~torch.nn.functional.pad(mask[:, :-1], (1, 0))
    found = ours(ids, starts=starts)
    right = theirs(ids, attention_mask=mask.long()).logits
    torch.testing.assert_close(found[mask].float(), right[mask], rtol=0, atol=1e-5)


BAD = {
    "starts has dtype torch.int64": lambda m, ids: m(ids, starts=torch.ones_like(ids)),
    r"starts has shape \(2, 4\), expected": lambda m, ids: m(
        ids, starts=torch.ones(2, 4, dtype=torch.bool, device=DEVICE)
    ),
    "starts is given with one token of each": lambda m, ids: m(
        ids[:, 0], m.initial_state(2), starts=torch.ones(2, 1, dtype=torch.bool, device=DEVICE)
    ),
    "mask has a row of another form": lambda m, ids: m.generate(ids, 2, mask=ids.roll(1, 1) > 9),
    "mask is given with a state": lambda m, ids: m.generate(
        ids, 2, mask=torch.ones_like(ids, dtype=torch.bool), state=m.initial_state(2)
    ),
    "mask is given with a list": lambda m, ids: m.generate([ids[0]], 2, mask=ids > 0),
    r"ids\[1\] has shape \(2, 5\)": lambda m, ids: m.generate([ids[0], ids], 2),
    r"ids\[0\] has dtype torch.float64": lambda m, ids: m.generate([ids[0].double()], 2),
    "ids is an empty list": lambda m, ids: m.generate([], 2),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.usefixtures("as_a_user")
def test_bad_input_is_named(model, message):
    ids = torch.tensor([[1, 2, 3, 14, 15]] * 2, device=DEVICE)
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message](model, ids)


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_kernels_that_know_no_starts_say_so(backend):
    given = problem(4)
    with pytest.raises(ValueError, match=f"backend is '{backend}', expected 'auto', 'parallel'"):
        selective_scan(*given, dt_softplus=True, backend=backend, starts=row_of([4]))
