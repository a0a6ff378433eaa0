"""Pieces of one sequence on several processes, against the whole on one, in float64."""

import sys
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from itertools import product
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mamba_tutorial import MambaBlock, MambaConfig, MambaLM, selective
from mamba_tutorial._check import installed
from mamba_tutorial.distributed import (
    join_cost,
    next_token_loss,
    over_length,
    selective_scan,
    sum_gradients,
)
from mamba_tutorial.ops import OPERATORS
from mamba_tutorial.scan import combine

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="PyTorch without torch.distributed")
EXACT = {"rtol": 1e-10, "atol": 1e-10}
# On Linux processes come from one that has imported everything; elsewhere forks are unsafe.
START = "forkserver" if sys.platform == "linux" else "spawn"
if START == "forkserver":
    mp.set_forkserver_preload([__name__])


def meet(rank, task, ranks, meeting, *given):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one core for each process
    try:
        task(rank, *given)
    finally:
        torch.set_num_threads(threads)
        dist.destroy_process_group()


def run(tmp_path, task, ranks, *given):
    """Run the task in as many processes; the first error of one of them is raised here."""
    given = task, ranks, str(tmp_path / "meeting"), *given
    mp.start_processes(meet, given, nprocs=ranks, start_method=START)


def piece_of(rank, lengths):
    start = sum(lengths[:rank])
    return slice(start, start + lengths[rank])


def tokens(length, batch=2, d_inner=3, d_state=4):
    """All tensors that a scan takes, by name."""
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


def check_scan(rank, lengths, settings, without=(), backend="auto", dtype=torch.float64):
    given = {name: t for name, t in tokens(sum(lengths)).items() if name not in without}
    mine, settings = piece_of(rank, lengths), {"return_last_state": True, **settings}
    own = {name: t.detach().to(dtype).requires_grad_() for name, t in cut(given, mine).items()}
    whole = selective.selective_scan(**given, **settings, backend="sequential")
    with counted() as calls:
        parts = selective_scan(**own, **settings, backend=backend)
    check_close(parts[0], whole[0][:, mine])
    check_close(parts[1], whole[1])
    # a loss of all outputs, of which the last state is counted once, on the rank in the middle
    weight = torch.linspace(-1, 1, whole[0].numel(), dtype=torch.float64).view_as(whole[0])
    ((whole[0] * weight).sum() + whole[1].square().sum()).backward()
    loss = (parts[0] * weight[:, mine]).sum()
    with counted() as calls_back:
        (loss + parts[1].square().sum() if rank == len(lengths) // 2 else loss).backward()
    if backend != "sequential":
        assert calls == {"selective_scan_end": 1, "selective_scan": 1}
        assert calls_back == {"selective_scan_end": 1, "selective_scan_backward": 1}
    for name, tensor in given.items():
        gradient, exact = own[name].grad, tensor.grad
        if name in ALONG:
            exact = exact[:, mine]
        else:
            dist.all_reduce(gradient)
        check_close(gradient, exact, msg=lambda m, n=name: f"{n}: {m}")


def check_close(value, exact, **how):
    how |= EXACT if value.dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(value, exact.to(value.dtype), **how)


@contextmanager
def counted():
    """Count how often the operators of the scan run."""
    calls = Counter()

    def count(name, run, *inputs):
        calls[name] += 1
        return run(*inputs)

    with ExitStack() as stack:
        for name in ("selective_scan", "selective_scan_backward", "selective_scan_end"):
            run = partial(count, name, OPERATORS[name].run)
            stack.enter_context(mock.patch.object(OPERATORS[name], "run", run))
        yield calls


def check_scans(rank, cuts):
    softplus = {"dt_softplus": True}
    for lengths in cuts:
        for discretization in ("mamba", "zoh"):
            check_scan(rank, lengths, softplus | {"discretization": discretization})
        check_scan(rank, lengths, softplus, {"D", "z", "dt_bias", "h0"})
    check_scan(rank, cuts[0], softplus, backend="sequential")


CUTS = {
    2: [(4, 3), (1, 6), (6, 1), (1, 1)],
    3: [(5, 2, 4), (1, 1, 9), (7, 1, 1), (1, 1, 1), (40, 3, 70)],
}


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
    ids[:, sum(lengths) // 2 :] = 0
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


def check_pieces(rank, cuts):
    check_scans(rank, cuts)
    check_models(rank, cuts)


@pytest.mark.parametrize("ranks", CUTS)
def test_scans_and_models_train_on_pieces_as_on_the_whole(tmp_path, ranks):
    """Values and all gradients."""
    run(tmp_path, check_pieces, ranks, CUTS[ranks])


def test_one_rank_has_the_whole(tmp_path):
    """In this process, where signatures are checked and warnings are errors."""
    meet(0, check_pieces, 1, str(tmp_path / "meeting"), [(7,)])


def check_derivatives(rank, lengths):
    """Second derivatives; and the first by torch.func."""
    given, mine, names = tokens(sum(lengths)), piece_of(rank, lengths), ("x", "dt", "A", "B", "C")
    own = cut(given, mine)
    given, own = ([leaves[name] for name in names] for leaves in (given, own))

    def power(scan, *values):
        return scan(*values, dt_softplus=True).square().sum()

    def curvature(scan, values):
        (slope,) = torch.autograd.grad(power(scan, *values), values[0], create_graph=True)
        return torch.autograd.grad(slope.square().sum(), values)

    exact, found = curvature(selective.selective_scan, given), curvature(selective_scan, own)
    for name, value, expected in zip(names, found, exact, strict=True):
        if name == "A":
            dist.all_reduce(value)
        torch.testing.assert_close(value, expected if name == "A" else expected[:, mine], **EXACT)

    values = [value.detach() for value in own]
    slope = torch.func.grad(lambda x: power(selective_scan, x, *values[1:]))(values[0])
    (expected,) = torch.autograd.grad(power(selective.selective_scan, *given), given[0])
    torch.testing.assert_close(slope, expected[:, mine], **EXACT)


def check_lower_precision(rank, lengths, dtype, tolerance):
    model, ids = language_model(), ids_of(sum(lengths))
    exact = model(ids)[:, piece_of(rank, lengths)]
    model = model.to(dtype)
    with over_length(model):
        loss = next_token_loss(model, ids[:, piece_of(rank, lengths)])
        logits = model(ids[:, piece_of(rank, lengths)])
    loss.backward()
    assert logits.dtype == dtype
    assert (logits - exact).norm() < tolerance * exact.norm()


def check_autocast(rank, lengths):
    model, ids = language_model().float(), ids_of(sum(lengths))
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(ids)[:, piece_of(rank, lengths)]
        with over_length(model):
            logits = model(ids[:, piece_of(rank, lengths)])
    assert (logits - expected).norm() < 1e-2 * expected.norm()


def check_overflow(rank):
    """Decays that overflow, of an unstable model, where the state is zero and so remains."""
    x, ones = torch.ones(1, 3, 1).double() * rank, torch.ones(1, 3, 1).double()
    dt = ones * (0.1 if rank else 400.0)
    y = selective_scan(x, dt, ones[0, :1], ones, ones)
    expected = selective.selective_scan(ones * rank, dt, ones[0, :1], ones, ones)
    torch.testing.assert_close(y, expected, **EXACT)


def check_last_alone(rank, lengths):
    """A loss of the last state alone, on every rank."""
    given, mine = tokens(sum(lengths)), piece_of(rank, lengths)
    own, settings = cut(given, mine), {"dt_softplus": True, "return_last_state": True}
    selective_scan(**own, **settings)[1].sum().backward()
    _, last = selective.selective_scan(**given, **settings)
    (len(lengths) * last.sum()).backward()
    for name in ("x", "dt", "B"):
        torch.testing.assert_close(own[name].grad, given[name].grad[:, mine], **EXACT)


def check_kernels(rank, lengths):
    """Those of a CPU and, in the interpreter, of a GPU: in float32, and h0 may be none."""
    interpreted = installed("triton") and not torch.cuda.is_available()
    backends = ["numba"] * installed("numba") + ["triton"] * interpreted
    for backend, without, rule in product(backends, ((), {"h0", "z"}), ("mamba", "zoh")):
        settings = {"dt_softplus": True, "discretization": rule}
        check_scan(rank, lengths, settings, without, backend, torch.float32)


def check_others(rank, lengths):
    check_kernels(rank, (50, 37))
    check_last_alone(rank, lengths)
    check_overflow(rank)
    check_derivatives(rank, lengths)
    check_lower_precision(rank, lengths, torch.float32, 1e-5)
    check_lower_precision(rank, lengths, torch.bfloat16, 5e-2)
    check_autocast(rank, lengths)


def test_second_derivatives_and_lower_precision(tmp_path):
    run(tmp_path, check_others, 2, (4, 3))


def without_gradients(given):
    return {name: tensor.detach() for name, tensor in given.items()}


def without(given, name):
    return {key: tensor for key, tensor in given.items() if key != name}


# what is different on rank 1, and what the message of every rank says
DIFFERENT = {
    "batch": (lambda: tokens(3, batch=3), "batch differs .* 2 on rank 0, 3 on rank 1"),
    "channels": (lambda: tokens(3, d_inner=5), "d_inner differs .* 3 on rank 0, 5 on rank 1"),
    "states": (lambda: tokens(3, d_state=1), "d_state differs .* 4 on rank 0, 1 on rank 1"),
    "dtype": (
        lambda: {name: tensor.float() for name, tensor in tokens(3).items()},
        "dtype of x differs .* torch.float64 on rank 0, torch.float32 on rank 1",
    ),
    "gate": (lambda: without(tokens(3), "z"), "which arguments are given differs"),
    "state": (lambda: without(tokens(3), "h0"), "which arguments are given differs"),
    "gradients": (lambda: without_gradients(tokens(3)), "ask for a gradient differs"),
    "rule": (
        lambda: tokens(3) | {"discretization": "zoh"},
        "discretization differs .* mamba .* zoh",
    ),
    "softplus": (
        lambda: tokens(3) | {"dt_softplus": False, "dt_bias": None, "dt": tokens(3)["dt"].abs()},
        "dt_softplus differs .* True on rank 0, False on rank 1",
    ),
    "last": (lambda: tokens(3) | {"return_last_state": True}, "return_last_state differs"),
    "shape": (lambda: tokens(3) | {"dt": torch.ones(2, 4, 3).double()}, "dt has shape"),
    "gate's shape": (lambda: tokens(3) | {"z": torch.ones(2, 4, 3).double()}, "z has shape"),
    "initial shape": (lambda: tokens(3) | {"h0": torch.ones(2, 4, 3).double()}, "h0 has shape"),
    "step": (
        lambda: (
            tokens(3) | {"dt_softplus": False, "dt_bias": None, "dt": -torch.ones(2, 3, 3).double()}
        ),
        "dt holds -1",
    ),
    "no token": (lambda: tokens(0), "expected a length of at least 1"),
    "backend": (lambda: tokens(3) | {"backend": "fast"}, "backend is 'fast'"),
}


def check_different_scans(rank):
    for change, message in DIFFERENT.values():
        given = {"dt_softplus": True} | (change() if rank == 1 else tokens(2))
        with pytest.raises(ValueError, match=message):
            selective_scan(**given)
    given = {"dt_softplus": True} | tokens(2) | ({"x": None} if rank == 1 else {})
    with pytest.raises(TypeError if rank == 1 else ValueError, match="x is a NoneType"):
        selective_scan(**given)
    assert selective_scan(**tokens(2), dt_softplus=True).shape == (2, 2, 3)  # still in step
    others = dist.new_group([0])
    if rank == 1:
        with pytest.raises(ValueError, match="group is without this process"):
            selective_scan(**tokens(2), dt_softplus=True, group=others)
    else:
        y = selective_scan(**tokens(2), dt_softplus=True, group=others)
        torch.testing.assert_close(y, selective.selective_scan(**tokens(2), dt_softplus=True))


def check_different_models(rank):
    ids, wrong = ids_of(5), rank == 1
    for change, message in (
        ({"d_model": 16}, "d_model of model differs .* 8 on rank 0, 16 on rank 1"),
        ({"norm_eps": 1e-3}, "norm_eps of model differs"),
    ):
        with (
            pytest.raises(ValueError, match=message),
            over_length(language_model(**change if wrong else {})),
        ):
            pass
    model = language_model()
    model.embedding.requires_grad_(not wrong)
    with (
        pytest.raises(ValueError, match=r"embedding.weight differs .* trained .* frozen"),
        over_length(model),
    ):
        pass
    with (
        pytest.raises(ValueError, match="model has no MambaBlock"),
        over_length(torch.nn.Linear(1, 1)),
    ):
        pass
    model = language_model()
    with pytest.raises(ValueError, match="not inside over_length"):
        next_token_loss(model, ids)
    with over_length(model):
        check_different_calls(model, ids, wrong)
        assert model(ids).shape == (2, 5, 11)  # still in step
    with over_length(model), pytest.raises(ValueError, match="call of the whole model"):
        model.layers[0](torch.ones(2, 3, 8).double())


def check_different_calls(model, ids, wrong):
    with pytest.raises(ValueError, match=r"batch differs .* 2 on rank 0, 1 on rank 1"):
        next_token_loss(model, ids[:1] if wrong else ids)
    with pytest.raises(ValueError, match="ids holds 11"):
        model(torch.where(ids == 0, 11, ids) if wrong else ids)
    with pytest.raises(ValueError, match="at least one token"):
        model(ids[:, :0] if wrong else ids)
    with pytest.raises(ValueError, match="state is given"):
        model(ids, model.initial_state(2) if wrong else None)
    with (
        pytest.raises(ValueError, match="recording of gradients differs"),
        torch.set_grad_enabled(wrong),
    ):
        model(ids)
    with pytest.raises(ValueError, match="autocast differs"), torch.autocast("cpu", enabled=wrong):
        model(ids)
    with pytest.raises(ValueError, match="no next token that counts"):
        next_token_loss(model, torch.zeros_like(ids), ignore_index=0)


def check_different(rank):
    check_different_scans(rank)
    check_different_models(rank)


def test_what_differs_between_ranks_is_named_on_all(tmp_path):
    run(tmp_path, check_different, 2)


def check_missing(rank, passes, how):
    """Rank 1 is late, and then both raise; or its process has ended."""
    model, ids = language_model(), ids_of(6)
    for name in passes:
        dist.barrier()  # for to make the group must not take longer than its timeout either
        group = dist.new_group(timeout=timedelta(seconds=2))
        with over_length(model, group):
            loss = next_token_loss(model, ids)
            if rank == 1 and how == "ended":
                raise SystemExit
            if rank == 1:
                time.sleep(4)
            start = time.monotonic()
            with pytest.raises(RuntimeError, match=f"rank {rank} of 2 waited in vain for"):
                loss.backward() if name == "backward" else model(ids)
            assert time.monotonic() - start < 4


@pytest.mark.parametrize(
    ("how", "passes"),
    [("late", ["forward", "backward"]), ("ended", ["forward"]), ("ended", ["backward"])],
)
def test_a_rank_that_is_missing_is_an_error_within_the_timeout(tmp_path, how, passes):
    run(tmp_path, check_missing, 2, passes, how)


def check_mesh(rank):
    """Two ranks for the batch and two for the length; gradients are means over all four."""
    # here, since every process that any test starts imports this file
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, lengths = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "length")), (6, 3)
    data, place = mesh.get_coordinate()
    group, ids = mesh["length"].get_group(), ids_of(sum(lengths), batch=4)
    mine = ids[2 * data : 2 * data + 2, piece_of(place, lengths)]
    alone = language_model()
    whole_loss(alone, ids).backward()

    replicas = DistributedDataParallel(language_model())
    with over_length(replicas, group):
        (2 * next_token_loss(replicas, mine)).backward()
    assert_same_gradients(replicas.module, alone)

    replicas = DistributedDataParallel(
        language_model(), process_group=mesh["data"].get_group()
    )  # the mean over the batch, then the sum over the length
    with over_length(replicas, group):
        next_token_loss(replicas, mine).backward()
    sum_gradients(replicas, group)
    assert_same_gradients(replicas.module, alone)

    sharded = language_model()
    for part in (*sharded.layers, sharded):
        fully_shard(part, mesh=mesh)  # copies over the batch, shards over the length
    with over_length(sharded, group):
        (2 * next_token_loss(sharded, mine)).backward()
    for parameter in sharded.parameters():
        parameter.grad = parameter.grad.full_tensor()
    assert_same_gradients(sharded, alone)


def test_data_and_length_on_one_mesh(tmp_path):
    run(tmp_path, check_mesh, 4)


def joined_by_gathering(steps):
    """Recursive doubling: the states before each rank; messages and numbers that a rank sends."""
    ranks, messages, numbers = len(steps), 0, 0
    known = [{rank: step} for rank, step in enumerate(steps)]
    for distance in (1 << k for k in range((ranks - 1).bit_length())):
        messages, numbers = messages + 1, numbers + 2 * len(known[0])
        known = [known[rank] | known[rank ^ distance] for rank in range(ranks)]
    states = [torch.zeros_like(steps[0][1])]
    for rank in range(ranks - 1):
        states.append(combine((torch.ones(()), states[-1]), known[-1][rank])[1])
    return states, messages, numbers


def joined_by_doubling(steps):
    messages, numbers, ranks = 0, 0, len(steps)
    for distance in (1 << k for k in range((ranks - 1).bit_length())):
        messages, numbers = messages + 1, numbers + 2
        steps = [
            combine(steps[rank - distance], steps[rank]) if rank >= distance else steps[rank]
            for rank in range(ranks)
        ]
    return [torch.zeros(()), *(b for _, b in steps[:-1])], messages + 1, numbers + 1


@pytest.mark.parametrize("ranks", [2, 8, 64, 256])
def test_cost_of_the_join_is_what_its_messages_sum_to(ranks):
    steps = list(zip(torch.rand(ranks).double(), torch.randn(ranks).double(), strict=True))
    (one, *gather), (other, *tree) = joined_by_gathering(steps), joined_by_doubling(steps)
    torch.testing.assert_close(torch.stack(one), torch.stack(other), check_dtype=False)
    latency, bandwidth, state = 1e-5, 4e11, 2 * 4096 * 16 * 4
    cost = join_cost(ranks, 2, 4096, 16, latency=latency, bandwidth=bandwidth)
    for (messages, numbers), sent, seconds in (
        (gather, cost.gather_bytes, cost.gather_seconds),
        (tree, cost.tree_bytes, cost.tree_seconds),
    ):
        assert sent == state * numbers
        assert seconds == pytest.approx(latency * messages + state * numbers / bandwidth)


def test_a_tree_is_faster_for_many_ranks():
    """At the 1536 channels of the smallest released model, 20 microseconds and 50 GB/s."""
    costs = {
        ranks: join_cost(ranks, 1, 1536, 16, latency=2e-5, bandwidth=5e10)
        for ranks in (8, 16, 32, 64, 128, 256, 512, 1024)
    }
    assert [ranks for ranks, c in costs.items() if c.gather_seconds < c.tree_seconds] == [8]
    assert costs[8].gather_seconds == pytest.approx(88e-6, rel=0.01)
    assert costs[8].tree_seconds == pytest.approx(94e-6, rel=0.01)
    assert costs[1024].gather_seconds == pytest.approx(4.2e-3, rel=0.01)
    assert costs[1024].tree_seconds == pytest.approx(0.26e-3, rel=0.01)


def test_wrong_sizes_of_a_join_are_named():
    assert join_cost(1, 1, 1, 1, latency=1.0, bandwidth=1.0) == (0, 0, 0, 0)
    with pytest.raises(ValueError, match="ranks is 0"):
        join_cost(0, 1, 1, 1, latency=1.0, bandwidth=1.0)
    with pytest.raises(ValueError, match="bandwidth is 0"):
        join_cost(1, 1, 1, 1, latency=1.0, bandwidth=0.0)
