"""The training loop learns, stops, records, and resumes to the last bit."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mamba_tutorial.s4 import S4, S4D
from mamba_tutorial.selective import SelectiveSSM
from mamba_tutorial.tasks import IGNORE
from mamba_tutorial.training import Record, _run, accuracy, parameter_groups, train

ROOMS = tuple(str(path) for path in Path(_run.__file__).parent.glob("*.py"))


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


class Restless(nn.Module):
    """Changes its weights and buffers in the forward pass, and draws random numbers there."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(8, 4, max_norm=0.5)
        self.layers = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 3))

    def forward(self, ids):
        return self.layers(self.table(ids))


def tokens(generator):
    ids = torch.randint(8, (16,), generator=generator)
    return ids, ids % 3


def sampled_score(net):
    ids = torch.randint(8, (64,))  # from the global generator, which the training uses too
    return accuracy(net, ids, ids % 3)


def restless(file, **settings):
    """Train; return all that a run leaves but its time and the machine's name."""
    settings = {"steps": 3, "every": 2, "lr": 0.01, "evaluate": sampled_score} | settings
    train(Restless(), tokens, checkpoint=file, **settings)
    state = torch.load(file, weights_only=True)
    record = state.pop("record")
    return state | {"losses": record["losses"], "scores": record["scores"]}


def assert_equal(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0)


class Tracer:
    """Notes the lines that are executed in some files, or interrupts before one, as a signal can.

    What a handler of signals raises comes up between two instructions of the main thread.
    """

    def __init__(self, files, stop=None):
        self.files, self.stop, self.lines = files, stop, []

    def __call__(self, frame, event, arg):
        file = frame.f_code.co_filename
        if not file.endswith(self.files):
            return None
        if event == "line":
            self.lines.append((file, frame.f_lineno))
            if len(self.lines) == self.stop:
                raise KeyboardInterrupt
        return self

    def watch(self, call):
        before = sys.gettrace()
        sys.settrace(self)
        try:
            call()
        finally:
            sys.settrace(before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files left open
@pytest.mark.parametrize(
    ("files", "stride"),
    [
        ((*ROOMS, "test_training.py"), 1),
        (("optim/adam.py", "optim/optimizer.py", "optim/lr_scheduler.py"), 10),
        (("torch/serialization.py", "modules/batchnorm.py", "nn/functional.py"), 10),
    ],
)
@torch.enable_grad()  # puts back what an interrupted no_grad() leaves behind
def test_an_interruption_anywhere_loses_nothing(tmp_path, files, stride):
    expected = restless(tmp_path / "whole.pt")
    whole, file = Tracer(files), tmp_path / "run.pt"
    whole.watch(lambda: restless(file))
    places = {}
    for count, line in enumerate(whole.lines, start=1):
        places.setdefault(line, []).append(count)
    stops = [counts[len(counts) // 2] for counts in list(places.values())[::stride]]
    assert len(stops) > 10
    for stop in stops:
        file.unlink(missing_ok=True)
        with pytest.raises(KeyboardInterrupt):
            Tracer(files, stop).watch(lambda: restless(file))
        assert not file.with_name("run.pt.part").exists()
        assert_equal(restless(file), expected)


def test_an_interruption_keeps_the_steps_that_were_done(tmp_path):
    file = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        train(model(), Interrupted(7), steps=20, every=5, checkpoint=file)
    assert len(torch.load(file, weights_only=True)["record"]["losses"]) == 7


@pytest.mark.parametrize(("owner", "method"), [(torch.optim.AdamW, "step"), (_run.Run, "set_rate")])
def test_an_interruption_inside_the_update_undoes_the_step(tmp_path, monkeypatch, owner, method):
    expected = restless(tmp_path / "whole.pt", steps=6)
    original, calls = getattr(owner, method), iter(range(100))

    def interrupted(self, *arguments):
        result = original(self, *arguments)
        if next(calls) == 3:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, method, interrupted)
    file = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        restless(file, steps=6)
    monkeypatch.undo()
    assert len(torch.load(file, weights_only=True)["record"]["losses"]) == 3
    assert_equal(restless(file, steps=6), expected)


def test_a_second_interruption_while_the_first_is_saved_leaves_the_file_whole(
    tmp_path, monkeypatch
):
    whole, fresh, file = model(), model(), tmp_path / "run.pt"
    settings = {"steps": 20, "every": 5}
    train(whole, batches, **settings)

    def interrupt(_):
        raise KeyboardInterrupt

    class Batches(Interrupted):
        def __call__(self, generator):
            if self.left == 0:
                monkeypatch.setattr(os, "fsync", interrupt)
            return super().__call__(generator)

    with pytest.raises(KeyboardInterrupt):
        train(model(), Batches(7), checkpoint=file, **settings)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]
    assert len(torch.load(file, weights_only=True)["record"]["losses"]) == 5
    train(fresh, batches, checkpoint=file, **settings)
    assert same(whole, fresh)


SIGNALLED = """
import os, random, signal, sys, threading, time, torch
from mamba_tutorial.training import train

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background lacks
calls, timer, chance = 0, None, random.Random(0)

def batches(generator):  # Ctrl-C comes soon after each 23rd call, and before the next such
    global calls, timer
    calls += 1
    if file is not None and calls % 23 == 0:
        if timer is not None:
            timer.join()
        timer = threading.Timer(1e-3 * chance.random(), os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
    x = torch.randn(32, 4, generator=generator)
    return x, (x[:, 0] > 0).long()

def run():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Dropout(0.2), torch.nn.Linear(16, 2))
    score = lambda net: torch.rand(()).item()
    return net, train(net, batches, steps=200, every=5, evaluate=score, checkpoint=file)

file = None
whole, expected = run()
file, interruptions = sys.argv[1], 0
while True:
    timer = None
    try:
        net, record = run()
        if timer is None:
            break
        time.sleep(60)  # until the last signal comes
    except KeyboardInterrupt:
        interruptions += 1
same = all(map(torch.equal, net.parameters(), whole.parameters()))
print(same, record.losses == expected.losses, record.scores == expected.scores, interruptions > 5)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C to a whole console")
def test_real_signals_lose_nothing(tmp_path):
    command = [sys.executable, "-c", SIGNALLED, tmp_path / "run.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "True True True True\n"


def test_a_second_process_is_refused_until_the_first_ends_even_if_it_is_killed(tmp_path):
    code = """
import sys, torch
from mamba_tutorial.training import train
train(torch.nn.Linear(4, 2), lambda _: print("at work", flush=True) or input(), steps=3,
      checkpoint=sys.argv[1])
"""
    file = tmp_path / "run.pt"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, file], **pipes) as process:
        assert process.stdout.readline() == b"at work\n"
        with pytest.raises(ValueError, match=r"checkpoint .*run\.pt is in use by another run"):
            train(model(), batches, steps=3, checkpoint=file)
        process.kill()
    train(model(), batches, steps=3, checkpoint=file)
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


def test_it_trains_where_an_interruption_left_gradients_off():
    net = model()
    with torch.no_grad():
        train(net, batches, steps=1)
    assert not same(net, model())


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


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("model", model().eval(), ValueError, r"model is in evaluation mode, .* model.train\(\)"),
        ("model", print, TypeError, "model is a builtin_function_or_method, expected a torch.nn"),
        ("batches", [1], TypeError, "batches is a list, expected a function"),
        ("evaluate", 0.5, TypeError, "evaluate is a float, expected a function or None"),
        ("steps", 1.5, TypeError, "steps is a float, expected a whole number"),
        ("every", 0, ValueError, "every is 0, expected at least 1"),
        ("lr", -1.0, ValueError, "lr is -1.0, expected a finite number ≥ 0"),
        (
            "weight_decay",
            torch.nan,
            ValueError,
            "weight_decay is nan, expected a finite number ≥ 0",
        ),
        ("seed", 0.5, TypeError, "seed is a float, expected a whole number"),
        ("seed", 2**64, ValueError, "seed is 18446744073709551616, expected"),
        ("stop_at", "0.9", TypeError, "stop_at is a str, expected a number"),
        ("stop_at", torch.nan, ValueError, "stop_at is nan, expected a finite number"),
        ("name", 7, TypeError, "name is a int, expected a string"),
    ],
)
def test_arguments_are_checked_before_the_first_step(as_a_user, argument, value, error, message):
    arguments = {"model": model(), "batches": Interrupted(0), "steps": 3} | {argument: value}
    with pytest.raises(error, match=message):
        train(**arguments)


def ids(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (torch.ones(2, 4), TypeError, "batches returned a tensor .*, expected two tensors"),
        ((torch.ones(2, 4), [0, 1]), TypeError, "a list, expected two tensors: inputs and targets"),
        ((torch.ones(2, 4), ids(0, 1, 1)), ValueError, r"shape \(3,\), expected .* logits, \(2,\)"),
        ((torch.ones(2, 3, 4), ids([0, 1], [1, 1], [0, 1])), ValueError, r"\(3, 2\), .* \(2, 3\)"),
        (
            (torch.ones(2, 4), torch.ones(2)),
            TypeError,
            "dtype torch.float32, expected whole numbers",
        ),
        (
            (torch.ones(2, 4), ids(0, 1).bool()),
            TypeError,
            "dtype torch.bool, expected whole numbers",
        ),
        (
            (torch.ones(2, 4), ids(IGNORE, IGNORE)),
            ValueError,
            r"shape \(2,\) are all -100, expected",
        ),
        ((torch.ones(0, 4), ids()), ValueError, r"targets of shape \(0,\) are all -100"),
        (
            (torch.ones(2, 4), ids(0, 2)),
            ValueError,
            "targets hold 2, expected classes 0 to 1, or -100",
        ),
        ((torch.ones(2, 4), ids(-1, 0)), ValueError, "targets hold -1, expected classes 0 to 1"),
    ],
)
def test_batches_are_checked(as_a_user, batch, error, message):
    with pytest.raises(error, match=message):
        train(model(), lambda generator: batch, steps=1)
    if isinstance(batch, tuple) and isinstance(batch[1], torch.Tensor):
        with pytest.raises(error, match=message):
            accuracy(model(), *batch)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_targets_may_be_any_whole_numbers(dtype):
    def small(generator):
        x, targets = batches(generator)
        return x, targets.to(dtype)

    first, second = model(), model()
    train(first, batches, steps=3)
    train(second, small, steps=3)
    assert same(first, second)


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (lambda x: (x, x), TypeError, "model returned a tuple of 2, expected logits in floating"),
        (
            lambda x: x.long(),
            TypeError,
            "model returned a tensor of torch.int64 and .*, expected logits",
        ),
        (lambda x: x.sum(), ValueError, r"logits of shape \(\), expected \(..., classes\)"),
    ],
)
def test_what_the_model_returns_is_checked(as_a_user, output, error, message):
    class Net(nn.Linear):
        def forward(self, x):
            return output(super().forward(x))

    with pytest.raises(error, match=message):
        train(Net(4, 2), batches, steps=1)


def test_a_score_is_a_number_and_a_layer_at_rest_stays_at_rest(as_a_user):
    net = model()
    net[1].eval()
    record = train(net, batches, steps=1, evaluate=lambda net: np.float32(net.training))
    assert record.scores == [(1, 0.0)]
    assert type(record.scores[0][1]) is float
    with pytest.raises(TypeError, match="evaluate returned a NoneType, expected a number"):
        train(net, batches, steps=1, evaluate=lambda net: None)
    assert [module.training for module in net.modules()] == [True, True, False, True, True]


def test_settings_may_be_numbers_of_numpy(tmp_path, as_a_user):
    settings = {"lr": np.float64(0.01), "seed": np.int64(3), "weight_decay": np.float32(0)}
    for _ in range(2):
        train(model(), batches, steps=np.int64(2), checkpoint=tmp_path / "run.pt", **settings)


def state_of(net):
    return [*(p.clone() for p in net.parameters()), torch.get_rng_state()]


def saved(path, change=lambda state: None):
    """A checkpoint, perhaps with a part changed."""
    train(model(), batches, steps=2, checkpoint=path)
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    return path.read_bytes()


WRONG_PARTS = {
    "has 'optimizer' where 'model' is expected": lambda s: s.pop("model"),
    r"0\.bias of model of .* is a tensor of torch.float64": lambda s: s["model"].update(
        {"0.bias": torch.zeros(16, dtype=torch.float64)}
    ),
    r"0\.bias of model of .* shape \(15,\), expected .* \(16,\)": lambda s: s["model"].update(
        {"0.bias": torch.zeros(15)}
    ),
    "model of .* has nothing where '3.bias' is expected": lambda s: s["model"].pop("3.bias"),
    "model of .* has '3.weight' where '0.bias' is": lambda s: s["model"].move_to_end("0.bias"),
    "exp_avg of 0.bias of optimizer of .* is a int": lambda s: s["optimizer"]["0.bias"].update(
        {"exp_avg": 1}
    ),
    "optimizer of .* has 'x' where nothing is": lambda s: s["optimizer"].update({"x": {}}),
    "optimizer of .* is a list, expected a dict": lambda s: s.update({"optimizer": [1]}),
    r"generator of .* shape \(3,\)": lambda s: s.update({"generator": s["generator"][:3]}),
    "random of .* is no state of a generator": lambda s: s["random"].fill_(7),
    "cuda of .* is a dict, expected a list": lambda s: s.update({"cuda": {}}),
    "record of .* is a list, expected a dict": lambda s: s.update({"record": []}),
    "1 of losses of record of .* is a str": lambda s: s["record"].update({"losses": [1.0, "1"]}),
    "0 of scores of record of .* is a tuple of 1": lambda s: s["record"].update({"scores": [(1,)]}),
    "is of a run with .*'seed': 1": lambda s: s["record"]["settings"].update({"seed": 1}),
}
WRONG_FILES = {
    "File is not a zip file": lambda data: b"",
    "cannot be read: File is not a zip file": lambda data: json.dumps({"losses": []}).encode(),
    "cannot be read: File is not": lambda data: pickle.dumps({"model": {}}),
    "cannot be read: .*": lambda data: data[: len(data) // 2],
}


@pytest.mark.parametrize("message", [*WRONG_PARTS, *WRONG_FILES])
def test_a_wrong_checkpoint_is_named_and_changes_nothing(tmp_path, message):
    file, net = tmp_path / "run.pt", model()
    data = saved(file, WRONG_PARTS.get(message, lambda state: None))
    file.write_bytes(WRONG_FILES.get(message, lambda data: data)(data))
    before = state_of(net)
    with pytest.raises(ValueError, match=message) as caught:
        train(net, Interrupted(0), steps=2, checkpoint=file)
    assert f"checkpoint {file}" in str(caught.value)
    assert_equal(state_of(net), before)


def test_no_damaged_byte_goes_unnoticed(tmp_path):
    file, whole = tmp_path / "run.pt", model()
    train(whole, batches, steps=2)
    data = saved(file)
    for place in range(0, len(data), 211):
        file.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        net = model()
        before = state_of(net)
        try:
            train(net, batches, steps=2, checkpoint=file)
        except ValueError as error:
            refused = str(error)
            assert_equal(state_of(net), before)
        else:
            refused = None
            assert same(net, whole)  # the byte does not matter: of a time stamp, or a gap
        assert refused is None or str(file) in refused


@pytest.mark.parametrize(
    "net", [nn.Sequential(model()), model().double(), nn.Sequential(*model(), nn.Linear(2, 2))]
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, net):
    file = tmp_path / "run.pt"
    saved(file)
    before = state_of(net)
    with pytest.raises(ValueError, match=r"model of checkpoint .*run\.pt (has|is) .* expected"):
        train(net, Interrupted(0), steps=2, checkpoint=file)
    assert_equal(state_of(net), before)


def test_a_checkpoint_from_a_gpu_goes_on_without_one(tmp_path):
    whole, file, moved = model(), tmp_path / "run.pt", tmp_path / "moved.pt"
    train(whole, batches, steps=4)
    with pytest.raises(KeyboardInterrupt):
        train(model(), Interrupted(2), steps=4, checkpoint=file)
    state = torch.load(file, weights_only=True)
    torch.save(state | {"cuda": [torch.zeros(16, dtype=torch.uint8)]}, file)
    with zipfile.ZipFile(file) as given, zipfile.ZipFile(moved, "w") as out:
        for entry in given.namelist():  # the device is a string in the pickle
            out.writestr(entry, given.read(entry).replace(b"\3\0\0\0cpu", b"\6\0\0\0cuda:0"))
    fresh = model()
    train(fresh, batches, steps=4, checkpoint=moved)
    assert same(whole, fresh)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("no/run.pt", ValueError, "no/run.pt, expected a file in a folder that exists"),
        ("file/run.pt", ValueError, "file/run.pt, expected a file in a folder that exists"),
        ("folder", ValueError, "folder, expected a file, not a folder or a device"),
        ("x" * 300, OSError, "File name too long: .*xxx"),
    ],
)
def test_where_a_file_cannot_be_is_said_before_the_first_step(tmp_path, path, error, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(error, match=message):
        train(model(), Interrupted(0), steps=3, checkpoint=tmp_path / path)
    with pytest.raises(error, match=message):
        Record("name", {}, 0).save(tmp_path / path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"file", "folder"}


def test_the_file_is_that_of_the_start_wherever_links_and_the_process_lead(tmp_path, monkeypatch):
    for name in ("disk", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "link.pt").symlink_to(tmp_path / "disk" / "run.pt")
    monkeypatch.chdir(tmp_path)

    def moving(generator):
        os.chdir(tmp_path / "elsewhere")
        return batches(generator)

    train(model(), moving, steps=1, checkpoint="link.pt")
    assert (tmp_path / "link.pt").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["run.pt"]
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limits of a process")
def test_a_full_disk_is_named_and_leaves_no_draft(tmp_path):
    import resource

    file = tmp_path / "run.pt"
    train(model(), batches, steps=2, checkpoint=file)
    data = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(data) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: .*run\.pt"):
            train(model(), batches, steps=2, checkpoint=file)
        with pytest.raises(OSError, match=r"File too large: .*record\.json"):
            Record("a" * len(data), {}, 0).save(tmp_path / "record.json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]
    assert file.read_bytes() == data


def test_a_record_is_json_that_everyone_reads(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    file = tmp_path / "record.json"
    settings = {"lr": 0.1, "stop_at": float("inf"), "clip": [float("nan"), 1]}
    Record("run", settings, 3, scores=[(1, float("-inf")), (2, 0.5)]).save(file)
    read = json.loads(file.read_text(), parse_constant=refuse)
    assert read["settings"] == {"lr": 0.1, "stop_at": None, "clip": [None, 1]}
    assert read["scores"] == [[1, None], [2, 0.5]]
    before = file.read_text()
    with pytest.raises(TypeError, match="not JSON serializable"):
        Record("run", {"device": torch.device("cpu")}, 3).save(file)
    assert file.read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


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


@pytest.mark.parametrize(
    ("layer", "decaying"),
    [
        (S4(4, 8), {"C", "mix.weight"}),
        (S4D(4, 8), {"C", "mix.weight"}),
        (SelectiveSSM(4, 8, 2), {"x_proj.weight", "dt_proj.weight"}),
    ],
)
def test_what_sets_the_time_scales_does_not_decay(layer, decaying):
    groups = parameter_groups(layer, 0.1)
    names = {parameter: name for name, parameter in layer.named_parameters()}
    assert {names[parameter] for parameter in groups[0]["params"]} == decaying
    assert len(groups[0]["params"]) + len(groups[1]["params"]) == len(names)


def test_a_parameter_that_one_of_its_modules_spares_does_not_decay():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight, second.no_weight_decay = first.weight, {"weight"}
    decaying, others = (
        group["params"] for group in parameter_groups(nn.ModuleList([first, second]), 0.1)
    )
    assert not decaying
    assert len(others) == 3


def test_the_rate_is_constant_or_rises_in_a_line_and_falls_in_a_cosine(monkeypatch):
    seen, original = [], _run.Run.set_rate

    def noted(self):
        original(self)
        seen.append([group["lr"] for group in self.optimizer.param_groups])

    monkeypatch.setattr(_run.Run, "set_rate", noted)
    train(model(), batches, steps=20, lr=0.4, schedule="constant")
    assert seen == [[0.4, 0.4]] * 20
    seen.clear()
    train(model(), batches, steps=20, lr=0.4)
    assert seen[:3] == [[0.2, 0.2], [0.4, 0.4], [0.4, 0.4]]
    assert seen[11] == pytest.approx([0.2, 0.2])
    assert seen[19] == pytest.approx([0.4 * (1 - np.cos(np.pi / 18)) / 2] * 2)
    with pytest.raises(ValueError, match="schedule is 'cosine', expected one of 'cycle', 'cons"):
        train(model(), batches, steps=1, schedule="cosine")


def test_a_graph_wants_a_gpu():
    with pytest.raises(ValueError, match="graph is True and the model not on a GPU"):
        train(model(), batches, steps=2, graph=True)
    with pytest.raises(TypeError, match="graph"):
        train(model(), batches, steps=2, graph=1)


class OnGpu:
    """Batches on a GPU, of a task that depends on the generator given, interrupted if asked."""

    def __init__(self, before=10**9):
        self.source = Interrupted(before)

    def __call__(self, generator):
        return tuple(tensor.cuda() for tensor in self.source(generator))


def on_gpu():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 2)).cuda()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_replayed_step_is_the_step(tmp_path):
    settings = {"steps": 40, "lr": 0.02, "every": 10, "weight_decay": 0.1}
    eager, graphed, again = on_gpu(), on_gpu(), on_gpu()
    expected = train(eager, OnGpu(), **settings)
    record = train(graphed, OnGpu(), graph=True, **settings)
    assert record.losses == pytest.approx(expected.losses, rel=1e-4)
    for one, other in zip(eager.parameters(), graphed.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    file = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        train(again, OnGpu(before=27), graph=True, checkpoint=file, **settings)
    assert len(torch.load(file, weights_only=True)["record"]["losses"]) == 20
    resumed = train(on_gpu(), OnGpu(), graph=True, checkpoint=file, **settings)
    assert resumed.losses == record.losses


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("wrong", ["loss", "target", "shape"])
def test_a_replayed_step_says_what_is_wrong(wrong):
    done = []

    def source(generator):
        x, targets = OnGpu()(generator)
        done.append(1)
        if len(done) == 5:
            if wrong == "shape":
                return x[:5], targets[:5]
            x, targets = (x * float("inf"), targets) if wrong == "loss" else (x, targets + 7)
        return x, targets

    said = {
        "loss": "the loss is nan at step 5",
        "target": "targets hold [78], expected classes 0 to 1",
    }
    with pytest.raises(ValueError, match=said.get(wrong, "expected one shape for a graph")):
        train(on_gpu(), source, steps=9, graph=True)
