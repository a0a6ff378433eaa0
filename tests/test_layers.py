"""The layers that are compared: their formula, and that nothing flows back in time."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from mamba_tutorial import S4D, bilinear, zoh
from mamba_tutorial.layers import (
    BilinearS4D,
    GRULayer,
    HeldS4,
    LSTMLayer,
    SelectiveLayer,
    network,
)

LAYERS = {
    "LSTM": partial(LSTMLayer, hidden=6),
    "selective": partial(SelectiveLayer, d_state=4, dt_rank=2),
    "GRU": partial(GRULayer, hidden=6),
    "S4D": partial(S4D, d_state=4),
    "S4D, bilinear": partial(BilinearS4D, d_state=4),
    "S4, zero-order hold": partial(HeldS4, d_state=4),
}


def test_a_selective_layer_is_norm_memory_gelu_mixing_and_residual():
    torch.manual_seed(0)
    layer, x = SelectiveLayer(8, 4, 2), torch.randn(2, 9, 8)
    memory, _ = layer.ssm(F.layer_norm(x, (8,)))
    value, gate = F.linear(F.gelu(memory), layer.mix.weight, layer.mix.bias).chunk(2, -1)
    torch.testing.assert_close(layer(x), x + value * torch.sigmoid(gate))


def test_an_lstm_begins_with_an_open_memory():
    torch.manual_seed(0)
    layer = LSTMLayer(8, 6)
    assert (layer.lstm.bias_hh_l0[6:12] == 2).all()
    assert (layer.lstm.bias_hh_l0[:6].abs() < 1).all()


@pytest.mark.parametrize("name", LAYERS)
def test_a_network_maps_tokens_to_logits_and_looks_at_the_past_alone(name):
    torch.manual_seed(0)
    model = network(LAYERS[name], 8, vocab=5, layers=2)
    assert len(model.layers) == 2
    tokens = torch.randint(5, (3, 12))
    logits = model(tokens)
    assert logits.shape == (3, 12, 5)
    changed = torch.cat([tokens[:, :7], (tokens[:, 7:] + 1) % 5], 1)
    torch.testing.assert_close(model(changed)[:, :7], logits[:, :7])
    assert not torch.allclose(model(changed)[:, 7:], logits[:, 7:])


@pytest.mark.parametrize("kind", [BilinearS4D, HeldS4])
def test_steps_go_by_the_rule_of_the_kernel(kind):
    torch.manual_seed(0)
    layer, x = kind(3, 4).double(), torch.randn(2, 6, 3, dtype=torch.float64)
    state, outputs = layer.initial_state(2), []
    for token in x.unbind(1):
        y, state = layer.step(token, state)
        outputs.append(y)
    torch.testing.assert_close(torch.stack(outputs, 1), layer(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kind", "rule"), [(BilinearS4D, bilinear), (HeldS4, zoh)])
def test_the_other_rule_is_the_rule_of_a_dense_system(kind, rule):
    torch.manual_seed(0)
    layer = kind(3, 4).double()
    if kind is HeldS4:
        Lambda, P, B, C = layer.modes()
        A = torch.diag_embed(Lambda) - P[..., None] * P.conj()[..., None, :]
    else:
        half = torch.complex(-layer.log_A_real.exp(), layer.A_imag)
        A = torch.diag_embed(torch.cat([half, half.conj()], -1))
        C = torch.view_as_complex(layer.C)
        B, C = torch.ones_like(A[..., 0]), torch.cat([C, C.conj()], -1)
    A_bar, B_bar = rule(A, B[..., None], layer.dt)
    taps = [
        (C[:, None] @ torch.linalg.matrix_power(A_bar, k) @ B_bar)[:, 0, 0].real for k in range(6)
    ]
    torch.testing.assert_close(layer.kernel(6), torch.stack(taps, -1))
