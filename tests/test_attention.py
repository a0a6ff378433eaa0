"""The Transformer: against softmax written out, against Llama of transformers, and in pieces."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import func

from mamba_tutorial.attention import (
    Attention,
    Places,
    Transformer,
    TransformerConfig,
    alibi_slopes,
    rotary,
)

POSITIONS = ["absolute", "rope", "alibi"]


def model(position="rope", **options):
    torch.manual_seed(0)
    config = TransformerConfig(16, 2, 11, n_head=4, position=position, max_length=32, **options)
    made = Transformer(config).double()
    with torch.no_grad():  # larger weights, so that attention looks at something
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter *= 10
    return made


def ids(batch=2, length=9):
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(1))


def written_out(layer, u, position):
    """Attention with loops: token by token, head by head."""
    size = u.shape[-1] // layer.heads
    q, k, v = layer.qkv(u).chunk(3, dim=-1)
    slopes = [2 ** (-8 * (h + 1) / layer.heads) for h in range(layer.heads)]
    rows = []
    for t in range(u.shape[1]):
        parts = []
        for h in range(layer.heads):
            own = slice(h * size, (h + 1) * size)
            scores = []
            for s in range(t + 1):
                query, key = q[:, t, own], k[:, s, own]
                if position == "rope":
                    query, key = turned(query, t), turned(key, s)
                score = (query * key).sum(-1) / math.sqrt(size)
                scores.append(score - slopes[h] * (t - s) * (position == "alibi"))
            weights = torch.stack(scores, -1).softmax(-1)
            parts.append((weights[..., None] * v[:, : t + 1, own]).sum(1))
        rows.append(torch.cat(parts, -1))
    return layer.out(torch.stack(rows, 1))


def turned(x, place):
    """By complex numbers: each pair is multiplied by exp(iφ)."""
    first, second = x.chunk(2, dim=-1)
    size = x.shape[-1]
    rates = torch.tensor([10000 ** (-2 * i / size) for i in range(size // 2)], dtype=torch.float64)
    z = torch.complex(first, second) * torch.exp(1j * place * rates)
    return torch.cat([z.real, z.imag], -1)


@pytest.mark.parametrize("position", POSITIONS)
def test_attention_is_the_softmax_written_out(position):
    torch.manual_seed(0)
    config = TransformerConfig(16, 1, 3, n_head=4, position=position)
    layer, u = Attention(config).double(), torch.randn(2, 7, 16).double()
    y = layer(u, Places.of(config, torch.arange(7), None, u))
    torch.testing.assert_close(y, written_out(layer, u, position), rtol=0, atol=1e-13)


def test_products_of_turned_vectors_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0)).double()

    def product(*places):
        first, second = (rotary(x, torch.tensor([p])) for x, p in zip((q, k), places, strict=True))
        return (first * second).sum()

    torch.testing.assert_close(product(5, 2), product(100_005, 100_002), rtol=0, atol=1e-10)
    assert abs(product(5, 3) - product(5, 2)) > 0.01
    torch.testing.assert_close(rotary(q, torch.tensor([7])).norm(), q.norm())


def test_slopes_are_those_of_the_paper():
    assert alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("position", POSITIONS)
def test_whole_in_pieces_and_token_by_token_are_the_same(position, tied):
    made, given = model(position, tie_embeddings=tied), ids()
    with torch.no_grad():
        whole = made(given)
        state, logits = made.initial_state(2, 12), []
        for piece in (given[:, :3], given[:, 3:4], given[:, 4:7]):
            found, state = made.prefill(piece, state)
            logits.append(found)
        for token in given[:, 7:].T:
            found, state = made.step(token, state)
            logits.append(found[:, None])
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(made(given, last=True), whole[:, -1])
    assert state.length == 9


@pytest.mark.parametrize("position", POSITIONS)
def test_no_token_sees_what_comes_later(position):
    made, given = model(position), ids()
    other = given.clone()
    other[:, 5:] = (other[:, 5:] + 1) % 11
    torch.testing.assert_close(made(given)[:, :5], made(other)[:, :5], rtol=0, atol=1e-14)
    assert (made(given)[:, 5:] - made(other)[:, 5:]).abs().min(1).values.max() > 1e-6


@pytest.mark.parametrize("position", POSITIONS)
def test_the_order_of_the_tokens_matters(position):
    made = model(position)
    a, b = made(torch.tensor([[1, 2, 3]])), made(torch.tensor([[2, 1, 3]]))
    assert (a[:, -1] - b[:, -1]).abs().max() > 1e-3


def test_it_is_llama():
    transformers = pytest.importorskip("transformers")
    ours = model(tie_embeddings=False, d_hidden=24)
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).double().eval()
    weights = {"model.embed_tokens.weight": ours.embedding.weight, "lm_head.weight": None}
    weights |= {"lm_head.weight": ours.lm_head.weight, "model.norm.weight": ours.norm_f.weight}
    for k, layer in enumerate(ours.layers):
        at = f"model.layers.{k}."
        names = ("q_proj", "k_proj", "v_proj")
        rows = layer.attention.qkv.weight.chunk(3)
        weights |= {f"{at}self_attn.{n}.weight": w for n, w in zip(names, rows, strict=True)}
        weights[f"{at}self_attn.o_proj.weight"] = layer.attention.out.weight
        for part in ("gate", "up", "down"):
            weights[f"{at}mlp.{part}_proj.weight"] = getattr(layer.mlp, part).weight
        weights[f"{at}input_layernorm.weight"] = layer.norm1.weight
        weights[f"{at}post_attention_layernorm.weight"] = layer.norm2.weight
    theirs.load_state_dict(weights)
    with torch.no_grad():
        # its angles are computed in float32
        torch.testing.assert_close(ours(ids()), theirs(ids()).logits, rtol=0, atol=1e-5)


def test_gradients_reach_every_parameter():
    for position in POSITIONS:
        made = model(position, tie_embeddings=False)
        F.cross_entropy(made(ids()).flatten(0, 1), ids().flatten()).backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in made.parameters())


def test_gradients_are_those_of_differences():
    made, given = model("rope"), ids(1, 4)
    name = "layers.0.attention.qkv.weight"
    start = dict(made.named_parameters())[name].detach()

    def loss(weight):
        return func.functional_call(made, {name: weight}, (given,)).square().mean()

    direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(0)).double()
    slope = (func.grad(loss)(start) * direction).sum()
    difference = (loss(start + 1e-6 * direction) - loss(start - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(slope, difference.detach(), rtol=1e-7, atol=1e-9)


def test_sizes():
    config = TransformerConfig(12, 1, 5, n_head=2)
    assert config.hidden == 32
    assert TransformerConfig(768, 1, 5).hidden == 2048  # 8/3 · 768, exactly
    made = Transformer(config)
    # embedding; queries, keys, values and output; SwiGLU; three norms
    assert made.num_parameters() == 5 * 12 + 4 * 12 * 12 + 3 * 12 * 32 + 3 * 12


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n_head": 3}, ValueError, "n_head is 3, expected a divisor of d_model / 2 = 8"),
        ({"position": "xpos"}, ValueError, "position is 'xpos', expected one of"),
        ({"n_head": 0}, ValueError, "n_head is 0, expected at least 1"),
        ({"d_hidden": 2.5}, TypeError, "d_hidden is a float"),
    ],
)
def test_bad_sizes(arguments, error, message):
    with pytest.raises(error, match=message):
        TransformerConfig(16, 2, 11, **arguments)


def test_far_places_are_turned_to_the_last_digits():
    x, place = torch.ones(1, 1, 128, dtype=torch.float64), 100_000
    found = rotary(x, torch.tensor([place]))[0, 0]
    angles = [place * 10000.0 ** (-2 * i / 128) for i in range(64)]
    right = [math.cos(angle) - math.sin(angle) for angle in angles]
    torch.testing.assert_close(
        found[:64], torch.tensor(right, dtype=torch.float64), rtol=0, atol=1e-10
    )


def test_a_saved_cache_is_loaded(tmp_path):
    state = model("rope").prefill(ids(1, 3), model("rope").initial_state(1, 5))[1]
    torch.save(state, tmp_path / "state.pt")
    for found, right in zip(torch.load(tmp_path / "state.pt"), state, strict=True):
        assert torch.equal(found, right)


@pytest.mark.usefixtures("as_a_user")
def test_bad_input():
    made = model("absolute")
    calls = {
        "expected token ids from 0 to 10": lambda: made(torch.tensor([[11]])),
        "length is 33, expected at most max_length = 32": lambda: made(ids(1, 33)),
        "ids has dtype torch.float32": lambda: made(torch.ones(1, 2)),
        "with at least one token": lambda: made(torch.ones(1, 0, dtype=torch.long)),
        "with state.length = 0, expected at most 2, the room": lambda: made.prefill(
            ids(1, 3), made.initial_state(1, 2)
        ),
        "the room of state.keys is 40, expected at most max_length = 32": lambda: made.prefill(
            ids(1, 3), model("rope").initial_state(1, 40)
        ),
        "state is a NoneType, expected a Cache": lambda: made.step(ids()[:, 0], None),
        "state.keys has shape": lambda: made.step(ids()[:, 0], made.initial_state(1, 2)),
        "x has a size of 3, expected an even one": lambda: rotary(
            torch.ones(2, 3), torch.arange(2)
        ),
    }
    for message, call in calls.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call()
