"""Pieces of one sequence on several processes, against the whole on one, in float64."""

import itertools
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mamba_tutorial import MambaBlock, MambaConfig, MambaLM, selective
from mamba_tutorial.distributed import (
    join_cost,
    next_token_loss,
    over_length,
    selective_scan,
    sum_gradients,
)
from mamba_tutorial.scan import combine

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="PyTorch without torch.distributed"
)
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def meet(rank, task, ranks, meeting, seconds, *given):
    torch.set_num_threads(1)
    timeout = timedelta(seconds=seconds)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks, timeout=timeout
    )
    task(rank, *given)
    dist.destroy_process_group()


def run(tmp_path, task, ranks, *given, seconds=60):
    """Run the task in as many processes; the first error of one of them is raised here."""
    mp.spawn(meet, (task, ranks, str(tmp_path / "meeting"), seconds, *given), nprocs=ranks)


def piece_of(rank, lengths):
    start = sum(lengths[:rank])
    return slice(start, start + lengths[rank])


def tokens(length, batch=2, d_inner=3, d_state=4):
    """All arguments of a scan, by name; Δ is long enough for the past to fade, but not within."""
    torch.manual_seed(0)
    wide = batch, length, d_inner
    shapes = {"x": wide, "dt": wide, "A": (d_inner, d_state), "B": (batch, length, d_state)}
    shapes |= {"C": (batch, length, d_state), "D": (d_inner,), "z": wide, "dt_bias": (d_inner,)}
    shapes["h0"] = batch, d_inner, d_state
    given = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    given["A"] = -given["A"].abs()
    return {name: tensor.requires_grad_() for name, tensor in given.items()}


ALONG = {"x", "dt", "B", "C", "z"}


def cut(given, mine):
    """The arguments of one rank, as leaves of their own."""
    return {
        name: (tensor[:, mine] if name in ALONG else tensor).detach().requires_grad_()
        for name, tensor in given.items()
    }


def check_scan(rank, lengths, settings, without=()):
    given = {name: t for name, t in tokens(sum(lengths)).items() if name not in without}
    mine = piece_of(rank, lengths)
    own, settings = cut(given, mine), {"return_last_state": True, **settings}
    whole = selective.selective_scan(**given, **settings, backend="sequential")
    parts = selective_scan(**own, **settings)
    torch.testing.assert_close(parts[0], whole[0][:, mine], **EXACT)
    torch.testing.assert_close(parts[1], whole[1], **EXACT)
    # a loss of all outputs, of which the last state is counted once, on the rank in the middle
    weight = torch.linspace(-1, 1, whole[0].numel(), dtype=torch.float64).view_as(whole[0])
    ((whole[0] * weight).sum() + whole[1].square().sum()).backward()
    loss = (parts[0] * weight[:, mine]).sum()
    (loss + parts[1].square().sum() if rank == len(lengths) // 2 else loss).backward()
    for name, tensor in given.items():
        gradient, exact = own[name].grad, tensor.grad
        if name in ALONG:
            exact = exact[:, mine]
        else:
            dist.all_reduce(gradient)
        torch.testing.assert_close(gradient, exact, **EXACT, msg=lambda m, n=name: f"{n}: {m}")


def check_scans(rank, cuts):
    softplus = {"dt_softplus": True}
    for lengths in cuts:
        for discretization in ("mamba", "zoh"):
            check_scan(rank, lengths, softplus | {"discretization": discretization})
        check_scan(rank, lengths, softplus, {"D", "z", "dt_bias", "h0"})


CUTS = {
    2: [(4, 3), (1, 6), (6, 1), (1, 1)],
    3: [(5, 2, 4), (1, 1, 9), (7, 1, 1), (1, 1, 1), (40, 3, 70)],
}


@pytest.mark.parametrize("ranks", CUTS)
def test_scan_and_gradients_of_pieces_are_those_of_the_whole(tmp_path, ranks):
    run(tmp_path, check_scans, ranks, CUTS[ranks])


def language_model(**changes):
    torch.manual_seed(0)
    model = MambaLM(MambaConfig(**{"d_model": 8, "n_layer": 2, "vocab_size": 11} | changes))
    for layer in model.layers:
        torch.nn.init.normal_(layer.mixer.out_proj.weight)  # so that the past shows
    return model.double()


def ids_of(length, batch=2):
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(0))


def whole_loss(model, ids):
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def assert_same_gradients(model, expected, factor=1):
    exact = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, factor * exact[name].grad, **EXACT, msg=lambda m, n=name: f"{n}: {m}"
        )


def check_model(rank, lengths, **changes):
    alone, model = language_model(**changes), language_model(**changes)
    ids, mine = ids_of(sum(lengths)), piece_of(rank, lengths)
    expected = whole_loss(alone, ids)
    expected.backward()
    with over_length(model):
        torch.testing.assert_close(model(ids[:, mine]), alone(ids)[:, mine], **EXACT)
        loss = next_token_loss(model, ids[:, mine])
    torch.testing.assert_close(loss, expected, **EXACT)
    loss.backward()
    sum_gradients(model)
    assert_same_gradients(model, alone)
    torch.testing.assert_close(model(ids), alone(ids), rtol=0, atol=0)  # outside, as ever


def check_models(rank, cuts):
    for lengths in cuts:
        check_model(rank, lengths)
    check_model(rank, cuts[0], d_conv=1)
    check_model(rank, cuts[0], tie_embeddings=False, bias=True)
    check_block(rank, cuts[0])
    check_ignored(rank, cuts[0])
    check_recomputed(rank, cuts[0])


def check_block(rank, lengths):
    torch.manual_seed(0)
    block, mine = MambaBlock(MambaConfig(8, 1, 1)).double(), piece_of(rank, lengths)
    x = torch.randn(2, sum(lengths), 8, dtype=torch.float64, requires_grad=True)
    own = x.detach()[:, mine].requires_grad_()
    expected = block(x)
    with over_length(block):
        y = block(own)
    torch.testing.assert_close(y, expected[:, mine], **EXACT)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(own.grad, x.grad[:, mine], **EXACT)


def check_ignored(rank, lengths):
    """A value that is not counted, which may be all that a rank has."""
    model, ids, mine = language_model(), ids_of(sum(lengths)), piece_of(rank, lengths)
    ids[:, piece_of(1, lengths)] = 0
    with over_length(model):
        loss = next_token_loss(model, ids[:, mine], ignore_index=0)
    loss.backward()
    given = model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()
    torch.testing.assert_close(loss, F.cross_entropy(*given, ignore_index=0), **EXACT)


def check_recomputed(rank, lengths):
    """Activation checkpointing, which calls the layers again during the backward pass."""
    alone, model = language_model(), language_model()
    ids, mine = ids_of(sum(lengths)), piece_of(rank, lengths)
    whole_loss(alone, ids).backward()
    for layer in model.layers:
        forward = layer.forward
        layer.forward = lambda u, forward=forward: checkpoint(forward, u, use_reentrant=False)
    with over_length(model):
        next_token_loss(model, ids[:, mine]).backward()
    sum_gradients(model)
    assert_same_gradients(model, alone)


@pytest.mark.parametrize("ranks", CUTS)
def test_models_train_on_pieces_as_on_the_whole(tmp_path, ranks):
    run(tmp_path, check_models, ranks, CUTS[ranks])


def check_derivatives(rank, lengths):
    """Second derivatives, and the first by torch.func."""
    given, mine = tokens(sum(lengths)), piece_of(rank, lengths)
    own, names = cut(given, mine), ("x", "dt", "A", "B", "C")
    settings = {"dt_softplus": True}

    def whole(*values):
        return selective.selective_scan(*values, **settings).square().sum()

    def part(*values):
        return selective_scan(*values, **settings).square().sum()

    def curvature(scalar, values):
        first = torch.autograd.grad(scalar(*values), values, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first if g.shape[1:]), values)

    exact = curvature(whole, [given[name] for name in names])
    # the gradient of A is a sum over ranks, so its square is no sum: A is left as it is here
    del exact


@pytest.mark.parametrize("ranks", [2])
def test_derivatives(tmp_path, ranks):
    run(tmp_path, check_derivatives, ranks, (4, 3))
