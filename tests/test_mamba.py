"""The block and the language model: parts, the three ways to read, the start, sampling."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_tutorial.generation import sample
from mamba_tutorial.mamba import BlockState, MambaBlock, MambaConfig, MambaLM
from mamba_tutorial.selective import selective_scan
from mamba_tutorial.training import parameter_groups

SMALL = {"d_model": 12, "n_layer": 2, "vocab_size": 19, "d_state": 4}
CONFIGS = {
    "default": {},
    "wide state": {"d_state": 16, "expand": 3},
    "no biases": {"conv_bias": False},
    "all biases": {"bias": True},
    "untied, rank": {"tie_embeddings": False, "dt_rank": 3},
    "no convolution": {"d_conv": 1},
}


def model(seed=0, **changes):
    torch.manual_seed(seed)
    return MambaLM(MambaConfig(**SMALL | changes))


def prompts(batch=2, length=40, seed=0):
    return torch.randint(19, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_block_is_its_formula():
    torch.manual_seed(0)
    block = MambaBlock(MambaConfig(**SMALL))
    u = torch.randn(2, 9, 12)
    x, z = (u @ block.in_proj.weight.T).split(24, dim=-1)
    padded = F.pad(x, (0, 0, 3, 0))
    taps = block.conv1d.weight[:, 0]
    x = F.silu(sum(padded[:, k : k + 9] * taps[:, k] for k in range(4)) + block.conv1d.bias)
    dt, B, C = (x @ block.ssm.x_proj.weight.T).split([1, 4, 4], dim=-1)
    dt = F.softplus(dt @ block.ssm.dt_proj.weight.T + block.ssm.dt_bias)
    A = -block.ssm.A_log.exp()
    y = selective_scan(x, dt, A, B, C, backend="sequential") + block.ssm.D * x
    expected = (y * z * torch.sigmoid(z)) @ block.out_proj.weight.T
    torch.testing.assert_close(block(u), expected, rtol=1e-4, atol=1e-6)


def test_model_is_its_formula():
    lm, ids = model(), prompts()
    u = lm.embedding.weight[ids]
    for layer in lm.layers:
        scale = (u.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        u = u + layer.mixer(u / scale * layer.norm.weight)
    u = u / (u.square().mean(-1, keepdim=True) + 1e-5).sqrt() * lm.norm_f.weight
    torch.testing.assert_close(lm(ids), u @ lm.embedding.weight[:19].T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@settings(deadline=None, max_examples=8)
@given(cuts=st.lists(st.integers(1, 39), max_size=4, unique=True), steps=st.integers(0, 40))
def test_three_ways_to_read_are_one(name, cuts, steps):
    """Pieces cut anywhere, then token by token: the logits of the whole, to 1e-4."""
    lm, ids = model(**CONFIGS[name]), prompts()
    with torch.no_grad():
        whole, state, logits = lm(ids), None, []
        edges = [0, *[cut for cut in sorted(cuts) if cut < 40 - steps], 40 - steps]
        for start, stop in itertools.pairwise(edges):
            if stop > start:
                piece, state = lm.prefill(ids[:, start:stop], state)
                logits.append(piece)
        state = state or lm.initial_state(2)
        for t in range(40 - steps, 40):
            token, state = lm.step(ids[:, t], state)
            logits.append(token[:, None])
    assert (torch.cat(logits, 1) - whole).abs().max() < 1e-4


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 63, 64, 65, 300])
def test_steps_agree_at_every_length(length):
    lm, ids = model(), prompts(length=length)
    with torch.no_grad():
        state = lm.initial_state(2)
        for t in range(length):
            logits, state = lm.step(ids[:, t], state)
            assert state[0].h.shape == (2, 24, 4)
        assert (logits - lm(ids)[:, -1]).abs().max() < 1e-4


def test_later_tokens_do_not_change_earlier_logits():
    lm, ids = model(), prompts()
    changed = ids.clone()
    changed[:, 20] = (ids[:, 20] + 1) % 19
    before, after = lm(ids), lm(changed)
    torch.testing.assert_close(after[:, :20], before[:, :20])
    assert not torch.allclose(after[:, 20], before[:, 20])


def test_states_are_values():
    """A step does not change the state that it was given, so one prompt can be continued twice."""
    lm = model()
    _, state = lm.prefill(prompts())
    copy = [BlockState(*(part.clone() for part in block)) for block in state]
    lm.step(torch.tensor([1, 2]), state)
    assert all(
        torch.equal(a, b)
        for x, y in zip(state, copy, strict=True)
        for a, b in zip(x, y, strict=True)
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with the CPU")
def test_a_gpu_gives_the_logits_and_gradients_of_the_cpu():
    lm, ids = model(), prompts()
    results = []
    for device in ("cpu", "cuda"):
        lm.to(device).zero_grad()
        logits, state = lm.prefill(ids.to(device))
        logits.square().sum().backward()
        step, _ = lm.step(ids[:, 0].to(device), state)
        gradient = lm.layers[0].mixer.in_proj.weight.grad
        results.append([part.detach().cpu() for part in (logits, step, gradient)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


# how it starts


def test_starts_as_the_released_code_does():
    torch.manual_seed(0)
    lm = MambaLM(MambaConfig(d_model=256, n_layer=4, vocab_size=1000, bias=True))
    block = lm.layers[0].mixer
    assert abs(lm.embedding.weight.std() - 0.02) < 1e-3
    assert block.in_proj.weight.abs().max() <= 1 / math.sqrt(256)
    assert block.out_proj.weight.abs().max() <= 1 / math.sqrt(512) / math.sqrt(4)
    assert block.out_proj.weight.abs().max() > 0.99 / math.sqrt(512) / math.sqrt(4)
    assert not block.in_proj.bias.any()
    assert not block.out_proj.bias.any()
    assert block.ssm.dt_proj.weight.shape == (512, 16)


def test_parameters_of_the_released_sizes():
    """d_model and n_layer of state-spaces/mamba-*; the counts that mamba_ssm gives for them."""
    sizes = {"130m": (768, 24), "370m": (1024, 48), "790m": (1536, 48), "1.4b": (2048, 48)}
    counts = {}
    for name, (d_model, n_layer) in sizes.items():
        with torch.device("meta"):
            lm = MambaLM(MambaConfig(d_model, n_layer, vocab_size=50277))
        counts[name] = lm.num_parameters()
        inner, rank = 2 * d_model, math.ceil(d_model / 16)
        block = (
            3 * d_model * inner + 5 * inner + inner * (rank + 32) + inner * (rank + 1) + 17 * inner
        )
        assert counts[name] == 50280 * d_model + n_layer * (block + d_model) + d_model
    assert counts["130m"] == 129_135_360


def test_what_decays():
    lm = model(tie_embeddings=False)
    decaying, others = (group["params"] for group in parameter_groups(lm, 0.1))
    names = {id(parameter): name for name, parameter in lm.named_parameters()}
    spared = {names[id(parameter)].split(".")[-2:][-1] for parameter in others}
    assert spared == {
        "A_log",
        "D",
        "bias",
        "dt_bias",
        "weight",
    }  # the weights are those of the norms
    assert {names[id(p)] for p in others if names[id(p)].endswith("weight")} == {
        "norm_f.weight",
        "layers.0.norm.weight",
        "layers.1.norm.weight",
    }
    assert len(decaying) + len(others) == len(list(lm.parameters()))
    assert not any(names[id(parameter)].endswith(("A_log", ".D")) for parameter in decaying)


def test_autocast_keeps_the_state_and_its_parameters_in_float32():
    lm, ids = model(), prompts()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, state = lm.prefill(ids)
        logits.float().sum().backward()
        assert lm.layers[0].mixer.ssm.A.dtype == torch.float32
    assert state[0].h.dtype == torch.float32
    assert lm.layers[0].mixer.ssm.A_log.grad.dtype == torch.float32
    assert (logits - lm(ids)).abs().max() < 0.05 * lm(ids).abs().max()


def test_half_precision_model_keeps_residual_and_state_in_float32():
    lm = model().to(torch.bfloat16)
    logits, state = lm.prefill(prompts())
    step, _ = lm.step(torch.tensor([1, 2]), state)
    assert logits.dtype == step.dtype == torch.bfloat16
    assert state[0].h.dtype == torch.float32


def test_padding_rows_are_no_tokens():
    lm = model()
    assert lm.embedding.weight.shape == (24, 12)
    assert lm(prompts()).shape == (2, 40, 19)


# generation


def test_greedy_takes_the_likeliest_token_each_time():
    lm, ids = model(), prompts(length=5)
    with torch.no_grad():
        expected = ids
        for _ in range(12):
            expected = torch.cat([expected, lm(expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(lm.generate(ids, 12, temperature=0), expected)


def test_generation_is_repeatable_and_streams():
    lm, ids = model(), prompts(length=5)

    def source():
        return torch.Generator().manual_seed(3)

    whole = lm.generate(ids, 9, top_k=5, generator=source())
    stream = list(lm.stream(ids, 9, top_k=5, generator=source()))
    assert whole.shape == (2, 14)
    assert torch.equal(torch.stack(stream, 1), whole[:, 5:])
    assert torch.equal(whole[:, :5], ids)


def test_a_stop_token_ends_a_sequence_and_all_ended_end_the_stream():
    lm, ids = model(), prompts(length=5)
    greedy = lm.generate(ids, 12, temperature=0)[:, 5:]
    eos = greedy[0, 3].item()
    result = lm.generate(ids, 12, temperature=0, eos=eos)[:, 5:]
    for row, free in zip(result, greedy, strict=True):
        hits = (free == eos).nonzero().flatten().tolist()
        end = hits[0] if hits else 12
        assert torch.equal(row[:end], free[:end][: len(row)])
        assert (row[end:] == eos).all()
    assert lm.generate(ids[:1], 12, temperature=0, eos=eos).shape[1] <= 5 + 4


def test_several_stop_tokens_end_a_sequence():
    lm, ids = model(), prompts(length=5)
    greedy = lm.generate(ids, 12, temperature=0)[:, 5:]
    ends = [greedy[0, 4].item(), greedy[1, 2].item()]
    result = lm.generate(ids, 12, temperature=0, eos=ends)[:, 5:]
    for row, free in zip(result, greedy, strict=True):
        end = next(k for k, token in enumerate(free.tolist()) if token in ends)
        assert torch.equal(row[: end + 1], free[: end + 1])
        assert (row[end + 1 :] == ends[0]).all()
    assert torch.equal(
        lm.generate(ids, 12, temperature=0, eos=ends[:1]),
        lm.generate(ids, 12, temperature=0, eos=ends[0]),
    )


def test_a_penalty_on_repetition_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    lm, ids, penalty = model(), prompts(length=5), 1.7
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    expected = ids
    with torch.no_grad():
        for _ in range(12):
            scores = theirs(expected, lm(expected)[:, -1])
            expected = torch.cat([expected, scores.argmax(-1, keepdim=True)], 1)
    found = lm.generate(ids, 12, temperature=0, repetition_penalty=penalty)
    assert torch.equal(found, expected)
    assert not torch.equal(found, lm.generate(ids, 12, temperature=0))


def test_hidden_states_lead_to_the_logits():
    lm, ids = model(), prompts()
    stream = lm.hidden_states(ids)
    assert len(stream) == lm.config.n_layer + 2
    torch.testing.assert_close(stream[0], lm.embedding(ids))
    torch.testing.assert_close(lm.layers[0](stream[0]), stream[1])
    logits = torch.nn.functional.linear(stream[-1], lm.embedding.weight[:19])
    torch.testing.assert_close(logits, lm(ids))


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([1.0, 3.0, 0.0, 2.0]).expand(40_000, 4)
    generator = torch.Generator().manual_seed(0)

    def shares(**options):
        tokens = sample(logits, generator=generator, **options)
        return torch.bincount(tokens, minlength=4) / len(logits)

    p = logits[0].softmax(-1)
    torch.testing.assert_close(shares(), p, atol=0.01, rtol=0)
    torch.testing.assert_close(
        shares(temperature=2.0), (logits[0] / 2).softmax(-1), atol=0.01, rtol=0
    )
    two = torch.tensor([0, p[1], 0, p[3]]) / (p[1] + p[3])
    torch.testing.assert_close(shares(top_k=2), two, atol=0.01, rtol=0)
    torch.testing.assert_close(shares(top_p=p[1].item() + 0.01), two, atol=0.01, rtol=0)
    least = p[3].item() / p[1].item()
    torch.testing.assert_close(shares(min_p=0.99 * least), two, atol=0.01, rtol=0)
    assert shares(min_p=1.01 * least)[1] == shares(min_p=1.0)[1] == 1
    torch.testing.assert_close(shares(min_p=0.0), p, atol=0.01, rtol=0)
    assert shares(top_p=0.01)[1] == 1  # the likeliest token is always kept
    assert shares(top_k=99, top_p=1.0).min() > 0.02
    assert shares(temperature=0)[1] == 1


# bad input


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.tensor([[1, 19]]), ValueError, "ids holds 19, expected token ids from 0 to 18"),
        (torch.tensor([[-1, 3]]), ValueError, "ids holds -1"),
        (torch.zeros(2, 0, dtype=torch.int64), ValueError, "expected .* at least one token"),
        (
            torch.zeros(2, 3),
            TypeError,
            "ids has dtype torch.float32, expected whole numbers",
        ),
        ([1, 2], TypeError, r"ids(\[0\])? is an? (list|int)"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), ValueError, r"ids has shape \(1, 2, 3\)"),
    ],
)
@pytest.mark.usefixtures("as_a_user")
def test_bad_ids_are_named(ids, error, message):
    for read in (model(), lambda ids: model().generate(ids, 3)):
        with pytest.raises(error, match=message):
            read(ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, r"top_p is 0.0, expected a finite number > 0 and ≤ 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"eos": []}, r"eos is \[\], expected token ids below 19"),
        ({"eos": [3, 19]}, r"eos is \[3, 19\], expected token ids below 19"),
    ],
)
def test_bad_sampling_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        model().generate(prompts(), **{"max_new_tokens": 3} | options)


@pytest.mark.usefixtures("as_a_user")
def test_a_state_of_something_else_is_named():
    lm = model()
    for state, message in (
        (lm.initial_state(3), r"state.conv has shape \(3, 3, 24\), expected \(2, 3, 24\)"),
        (lm.initial_state(2)[:1], "state has 1 blocks, expected 2"),
        (model(d_state=5).initial_state(2), r"state.h has shape .* expected \(2, 24, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            lm.step(torch.tensor([1, 2]), state)


@pytest.mark.parametrize(
    "field", ["d_model", "n_layer", "vocab_size", "d_state", "d_conv", "dt_rank"]
)
def test_bad_config_is_named(field):
    with pytest.raises(ValueError, match=f"{field} is 0"):
        MambaConfig(**SMALL | {field: 0})
