"""Sequences in a row, and prompts filled up on their left, are as each is alone."""

import importlib
import importlib.util
import itertools

import pytest
import torch

from mamba_tutorial.mamba import MambaBlock, MambaConfig, MambaLM
from mamba_tutorial.selective import _in_pytorch, selective_scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [3, 1, 7, 2, 5]
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")
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
    monkeypatch.setattr(_in_pytorch, "CHUNK_NUMBERS", 12 * 96 // pieces)
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


@pytest.mark.parametrize("length", [16, 17])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_starts_may_lie_in_any_order_in_memory(backend, length):
    if backend == "triton" and not HAS_TRITON:
        pytest.skip("Triton exists for Linux only")
    given = [tensor.detach().float() for tensor in problem(length, batch=2)]
    starts = torch.arange(2 * length, device=DEVICE).view(length, 2).mT % 5 == 0
    found, right = (
        selective_scan(*given, dt_softplus=True, backend=backend, starts=s)
        for s in (starts, starts.contiguous())
    )
    torch.testing.assert_close(found, right, rtol=0, atol=0)


# the kernels: in float32 and with half-precision inputs, against each sequence alone in float64

HAS_TRITON = importlib.util.find_spec("triton") is not None
KERNELS = ["numba"] * (DEVICE == "cpu") + ["triton"] * HAS_TRITON
SIZES = {  # batch, length, d_inner, d_state
    "odd": (2, 37, 5, 5),
    "three chunks, two halves each": (1, 150, 2, 4),
    "released state": (2, 35, 9, 16),
    "many states": (1, 67, 3, 32),
    "eight chunks": (1, 500, 2, 4),
}
PLACES = {
    "the first token": lambda t: t == 0,
    "the last token": lambda t: t == t[-1],
    "every token": lambda t: t >= 0,
    "borders of tiles and chunks": lambda t: t % 16 == 0,
    "beside borders": lambda t: (t % 64 == 63) | (t % 64 == 1),
    "anywhere": lambda t: torch.rand(len(t), generator=torch.Generator().manual_seed(3)) < 0.1,
    "nowhere": lambda t: t < 0,
}


def marked(place, batch, length):
    """(batch, length); the rows are alike but for a turn, so that they differ."""
    row = PLACES[place](torch.arange(length))
    turn = 0 if place in {"the first token", "the last token"} else 5
    return torch.stack([row.roll(turn * b) for b in range(batch)]).to(DEVICE)


def alone(given, starts, upstream, **options):
    """y, the last state and all gradients, of every sequence by itself, in float64."""
    leaves = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    ys, ends = [], []
    for b, row in enumerate(starts.tolist()):
        cuts = sorted({0, len(row), *(t for t, begins in enumerate(row) if begins)})
        outputs = []
        for first, stop in itertools.pairwise(cuts):
            parts = {
                name: t[b : b + 1, first:stop] if name in {"x", "dt", "B", "C", "z"} else t
                for name, t in leaves.items()
            }
            h0 = leaves["h0"][b : b + 1] if not row[first] else None
            y, end = selective_scan(**parts | {"h0": h0}, backend="sequential", **options)
            outputs.append(y)
        ys.append(torch.cat(outputs, 1))
        ends.append(end)
    outputs = torch.cat(ys), torch.cat(ends)
    wanted = torch.autograd.grad(outputs, list(leaves.values()), upstream, materialize_grads=True)
    return [*outputs, *wanted]


def rounding(length):
    """As in test_kernels: a GPU's exponential is off by up to 2⁻²², for every token."""
    return 2e-6 if DEVICE == "cpu" else max(2e-6, 3 * 2**-22 * length**0.5)


def assert_kernels_agree(backend, size, place, rule="mamba", dtype=torch.float32):
    batch, length, d_inner, d_state = SIZES[size]
    off = rounding(length) if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    generator = torch.Generator().manual_seed(0)

    def random(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    x, dt, z = (random(batch, length, d_inner, dtype=dtype) for _ in range(3))
    B, C = (random(batch, length, d_state, dtype=dtype) for _ in range(2))
    A = -3 * random(d_inner, d_state).abs()
    A[0, 0], h0 = 0, random(batch, d_inner, d_state)  # one that never forgets by itself
    given = {"x": x, "dt": dt - 2, "A": A, "B": B, "C": C, "D": random(d_inner), "z": z}
    given |= {"dt_bias": random(d_inner), "h0": h0}
    starts = marked(place, batch, length)
    upstream = [random(*x.shape), random(*h0.shape)]
    options = {"dt_softplus": True, "return_last_state": True, "discretization": rule}
    exact = alone(given, starts, [d.double() for d in upstream], **options)
    leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
    found = selective_scan(**leaves, starts=starts, backend=backend, **options)
    upstream = [d.to(value.dtype) for d, value in zip(upstream, found, strict=True)]
    found += torch.autograd.grad(found, list(leaves.values()), upstream)
    for name, value, right in zip(["y", "last", *given], found, exact, strict=True):
        error = (value.double() - right).abs().max() / (right.abs().max() + 1e-3)
        assert error < off, name
    assert not found[-1][starts[:, 0]].any()  # a state that is not read has no gradient, to the bit


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_read_a_row_sequence_by_sequence(backend, place):
    assert_kernels_agree(backend, "three chunks, two halves each", place)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_read_rows_of_all_sizes(backend, size):
    assert_kernels_agree(backend, size, "anywhere")


@pytest.mark.parametrize("place", ["every token", "anywhere"])
@pytest.mark.parametrize("size", ["odd", "three chunks, two halves each"])
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_read_a_row_with_the_exact_rule(backend, size, place):
    assert_kernels_agree(backend, size, place, rule="zoh")


@pytest.mark.parametrize("size", ["odd", "three chunks, two halves each"])
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_read_a_row_in_half_precision(backend, size):
    assert_kernels_agree(backend, size, "anywhere", dtype=torch.bfloat16)


@pytest.mark.parametrize("step", [0.0, 1.0])
@pytest.mark.parametrize("rule", ["mamba", "zoh"])
@pytest.mark.parametrize("backend", KERNELS)
def test_extreme_decays_in_a_row(backend, rule, step):
    """Gone at once, hardly less, none, and growth by e⁸⁰ in a sequence, which is never too much."""
    A = torch.tensor([[-1e4, -1e-6], [0.0, 2.0]], device=DEVICE)
    x, dt = torch.ones(1, 150, 2, device=DEVICE), torch.full((1, 150, 2), step, device=DEVICE)
    starts = torch.arange(150, device=DEVICE)[None] % 40 == 7
    given = [x, dt, A, x, x, torch.ones(1, 2, 2, device=DEVICE)]

    def results(given, backend):
        x, dt, A, B, C, h0 = leaves = [tensor.detach().requires_grad_() for tensor in given]
        options = {"discretization": rule, "backend": backend, "starts": starts, "h0": h0}
        y = selective_scan(x, dt, A, B, C, **options)
        return y, *torch.autograd.grad(y.sum(), leaves)

    exact = results([tensor.double() for tensor in given], "sequential")
    for value, right in zip(results(given, backend), exact, strict=True):
        torch.testing.assert_close(value.double(), right, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE == "cpu", reason="without a GPU those above are the ones in Triton")
@pytest.mark.parametrize("size", SIZES)
def test_kernels_in_triton_read_a_row_on_a_gpu_too(size, monkeypatch):
    monkeypatch.setattr("mamba_tutorial.kernels.selective_scan._takes", lambda *given: False)
    assert_kernels_agree("triton", size, "anywhere")


@pytest.mark.skipif(not HAS_TRITON, reason="Triton exists for Linux only")
@pytest.mark.parametrize("place", ["beside borders", "anywhere", "every token", "nowhere"])
@pytest.mark.parametrize(("length", "chunk"), [(150, 64), (500, 64), (2900, 2304)])
def test_what_chunks_give_to_the_next(length, chunk, place, monkeypatch):
    """In Triton, joined as the kernels join it; `test_kernels` has the same in Gluon."""
    kernel = importlib.import_module("mamba_tutorial.kernels.selective_scan")
    monkeypatch.setattr(kernel, "_takes", lambda *given: False)
    given = {name: t.detach().float() for name, t in zip(NAMES, problem(length), strict=True)}
    starts, before = marked(place, 1, length), normal(1, 4, 3).float()
    double = {name: t.double() for name, t in given.items()}
    options = {"dt_softplus": True, "return_last_state": True, "backend": "sequential"}
    x, dt, A, B, C, _, _, bias = given.values()
    (A, B, _), begins = kernel._prepared(A, B, C), kernel._words(starts)
    packed, rules = (x, dt, A, B, None, bias, begins), (True, False)  # softplus, Euler's rule
    ends, spans = kernel._run_ends(*packed, (length, chunk, 4, 3), *rules, reverse=False)
    h = before.mT.double()
    for end, span in zip(ends.flatten(0, 2), spans.flatten(0, 2), strict=True):
        h = torch.where(span < 0, 0, torch.exp(A.double() * span.clamp(min=0)) * h) + end
    last = (length - 1) // chunk * chunk  # the first token of the last chunk
    head = {k: t[:, :last] if t.ndim == 3 else t for k, t in double.items()}
    _, right = selective_scan(**head, h0=before.double(), starts=starts[:, :last], **options)
    near = {"rtol": 5 * rounding(length), "atol": 5 * rounding(length)}
    torch.testing.assert_close(h.mT, right, **near)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton exists for Linux only")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("language", ["triton", "gluon"])
@pytest.mark.parametrize(("begin", "end"), [(0, 2304), (16, 2896), (2304, 4608), (64, 64)])
def test_what_of_a_chunk_reaches_the_others(begin, end, language, reverse):
    """Alone, since a chunk that is gone through as a whole would give the same, only later."""
    if language == "gluon" and DEVICE == "cpu":
        pytest.skip("Gluon has no interpreter")
    kernel = getattr(importlib.import_module("parts_of_kernels"), f"reaching_in_{language}")
    words = importlib.import_module("mamba_tutorial.kernels.selective_scan")._words
    length = 2899
    inside = [t for t in (begin, begin + 1, begin + 700, end - 1) if begin <= t < min(end, length)]
    rows = [[], [begin - 1, end], inside, *([t] for t in inside)]
    starts = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, places in zip(starts, rows, strict=True):
        row[[t for t in places if 0 <= t < length]] = True
    found = torch.empty(len(rows), 2, dtype=torch.int32, device=DEVICE)
    kernel[(len(rows),)](words(starts.to(DEVICE)), found, length, begin, end, reverse, num_warps=1)
    for (first, last), places in zip(found.tolist(), rows, strict=True):
        places = [t for t in places if t in inside]
        if not places:
            assert (first, last) == (begin, end)
        elif reverse:
            assert (first, last) == (begin, min(end, min(places) // 16 * 16 + 16))
        else:
            assert (first, last) == (max(places) // 16 * 16, end)


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


def one_token(m):
    """Inputs of a state space model, and no gate."""
    return torch.ones(2, m.config.d_inner, device=DEVICE), None


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
    r"ids have lengths \[1, 3\] after a state, expected one length": lambda m, ids: m.generate(
        [ids[0, :1], ids[1, :3]], 2, state=m.initial_state(2)
    ),
    "starts is given with one token of each sequence, expected None": lambda m, ids: m.layers[
        0
    ].mixer.ssm(*one_token(m), starts=ids[:, :1] > 0),
    "starts is given with one token of each sequence": lambda m, ids: m.layers[0].mixer.conv1d(
        one_token(m)[0], starts=ids[:, :1] > 0
    ),
    "mask is given with a list": lambda m, ids: m.generate([ids[0]], 2, mask=ids > 0),
    r"ids\[1\] has shape \(2, 5\)": lambda m, ids: m.generate([ids[0], ids], 2),
    r"ids\[0\] has dtype torch.float64": lambda m, ids: m.generate([ids[0].double()], 2),
    "ids is an empty list": lambda m, ids: m.generate([], 2),
}


def test_prompts_of_one_length_go_on_from_a_state(model):
    ids = torch.tensor([[1, 2], [3, 4]], device=DEVICE)
    _, state = model.prefill(ids, model.initial_state(2))
    found = model.generate(list(ids), 3, temperature=0, state=state)
    assert torch.equal(torch.stack(found), model.generate(ids, 3, temperature=0, state=state))


@pytest.mark.parametrize("message", BAD)
@pytest.mark.usefixtures("as_a_user")
def test_bad_input_is_named(model, message):
    ids = torch.tensor([[1, 2, 3, 14, 15]] * 2, device=DEVICE)
    with pytest.raises((TypeError, ValueError), match=message):
        BAD[message](model, ids)
