"""The experiments: a record belongs to its configuration, and a run goes on where it stopped."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from mamba_tutorial import data, experiments, training
from mamba_tutorial.experiments import EXPERIMENTS, checkpoint
from mamba_tutorial.experiments.models import GATES, GatedLayer, Invariant, Selective
from mamba_tutorial.mamba import MambaConfig, MambaLM

RESULTS = Path(__file__).parents[1] / "book" / "results"
TINY = {**EXPERIMENTS["wall"], "steps": 2, "batch": 2, "seeds": [0, 1], "learning_rates": [1e-3]}


RECORDED = [name for name in EXPERIMENTS if (RESULTS / f"experiment_{name}.json").exists()]

# runs that are still to be made, on a GPU: the same command goes on with them
UNFINISHED = Counter(gates_paper=6)


def test_what_the_chapters_draw_is_recorded():
    assert {"wall", "wall_long", "selection", "digits", "parity"} <= set(RECORDED)


@pytest.mark.parametrize("name", RECORDED)
def test_the_recorded_runs_are_all_runs_of_the_configuration(name):
    record = json.loads((RESULTS / f"experiment_{name}.json").read_text())
    assert record["configuration"] == EXPERIMENTS[name]
    assert len(list(experiments.missing(EXPERIMENTS[name], record["runs"]))) == UNFINISHED[name]
    for run in record["runs"]:
        done, score = run["scores"][-1]
        assert done == EXPERIMENTS[name]["steps"] or score >= EXPERIMENTS[name]["stop_at"]
        model = experiments.build(EXPERIMENTS[name], run["model"], run["seed"])
        assert run["parameters"] == sum(p.numel() for p in model.parameters())
    missing = list(experiments.missing(EXPERIMENTS[name], record["runs"]))
    for run in record.get("unfinished", []):
        assert tuple(run[key] for key in experiments.RUN) in missing
        assert run["scores"][-1][0] < EXPERIMENTS[name]["steps"]
    assert len(EXPERIMENTS[name]["seeds"]) >= 3 or name == "gates_long"  # a demonstration


@pytest.fixture
def tiny(monkeypatch):
    models = {
        name: EXPERIMENTS["wall"]["models"][name] for name in ("S4D, 1 layer", "LSTM, 1 layer")
    }
    configuration = {**TINY, "models": models}
    monkeypatch.setitem(EXPERIMENTS, "wall", configuration)
    monkeypatch.setattr(experiments, "quick", lambda configuration: configuration)
    monkeypatch.setattr(experiments, "TESTED", 8)
    return configuration


@pytest.mark.slow
def test_an_interrupted_experiment_runs_only_what_is_missing(tiny, tmp_path, monkeypatch):
    shown, started, run = [], [], experiments.run

    def stops_after_two(configuration, *which):
        started.append(which)
        if len(started) == 3:
            raise KeyboardInterrupt
        return run(configuration, *which)

    monkeypatch.setattr(experiments, "run", stops_after_two)
    arguments = ["wall", "--quick", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        experiments.main(arguments, shown.append)
    path = tmp_path / "experiment_wall_quick.json"
    record = json.loads(path.read_text())
    assert len(record["runs"]) == 2
    record["environment"]["gpu"] = "another"
    path.write_text(json.dumps(record))
    experiments.main(arguments, shown.append)
    again = json.loads(path.read_text())
    assert again["runs"][:2] == record["runs"]
    assert "environment" not in again["runs"][1]
    elsewhere = {"gpu": training.environment()["gpu"]}
    assert all(one["environment"] == elsewhere for one in again["runs"][2:])
    assert [tuple(one[key] for key in ("model", "lr", "seed")) for one in again["runs"]] == [
        (name, 1e-3, seed) for seed in (0, 1) for name in tiny["models"]
    ]
    assert len(started) == 5
    assert shown[0].split()[:4] == ["wall", "mean", "least", "largest"]


def test_a_record_says_how_far_an_interrupted_run_has_come(tiny, tmp_path, monkeypatch):
    """One that is kept on the way, as those on a GPU are; also where what is kept is missing."""
    for key, value in {"graph": True, "steps": 4, "evaluations": 4}.items():
        monkeypatch.setitem(tiny, key, value)
    arguments = ["wall", "--quick", "--out", str(tmp_path)]
    path, score, scored = tmp_path / "experiment_wall_quick.json", experiments.accuracy_in_parts, []

    def interrupted_twice(*given):
        scored.append(1)
        if len(scored) in {3, 5}:
            raise KeyboardInterrupt
        return score(*given)

    monkeypatch.setattr(experiments, "accuracy_in_parts", interrupted_twice)
    with pytest.raises(KeyboardInterrupt):
        experiments.main(arguments)
    (begun,) = json.loads(path.read_text())["unfinished"]
    assert [step for step, _ in begun["scores"]] == [1, 2]
    assert [begun[key] for key in experiments.RUN] == ["S4D, 1 layer", 1e-3, 0]
    (checkpoint,) = tmp_path.glob("*.pt")
    elsewhere = checkpoint.rename(tmp_path / "elsewhere")
    with pytest.raises(KeyboardInterrupt):  # after one score, which is less
        experiments.main(arguments)
    assert json.loads(path.read_text())["unfinished"] == [begun]
    elsewhere.rename(checkpoint)
    experiments.main(arguments, lambda shown: None)
    assert len(scored) == 5 + 2 + 3 * 4  # the first run goes on, three more are made
    record = json.loads(path.read_text())
    assert "unfinished" not in record
    assert record["runs"][0]["scores"][:2] == begun["scores"]
    assert not list(tmp_path.glob("*.pt"))


def test_another_configuration_is_not_mixed_in(tiny, tmp_path):
    path = tmp_path / "experiment_wall_quick.json"
    path.write_text(json.dumps({"configuration": {}, "runs": []}))
    with pytest.raises(ValueError, match="records another configuration"):
        experiments.main(["wall", "--quick", "--out", str(tmp_path)])


def test_a_run_that_fails_stops_no_other(tiny, tmp_path, monkeypatch):
    run = experiments.run

    def fails_once(configuration, name, lr, seed):
        if (name, seed) == ("S4D, 1 layer", 0):
            raise RuntimeError("no such kernel")
        return run(configuration, name, lr, seed)

    monkeypatch.setattr(experiments, "run", fails_once)
    with pytest.raises(RuntimeError, match="no such kernel"):
        experiments.main(["wall", "--quick", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "experiment_wall_quick.json").read_text())
    assert len(record["runs"]) == 2 * len(tiny["models"]) - 1


def test_scores_are_shown_in_their_units():
    runs = [{"model": "a", "lr": 1, "seed": seed, "scores": [[1, -1.5 - seed]]} for seed in (0, 1)]
    record = {"experiment": "e", "configuration": {"models": {"a": {}}, "task": "text"}}
    assert experiments.table({**record, "runs": runs}).split()[-5:] == [
        "a", "2.000", "1.500", "2.500", "2",
    ]  # fmt: skip


def test_wrong_names_and_folders_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="name is 'walls', expected one of"):
        experiments.main(["walls", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        experiments.main(["wall", "--out", str(tmp_path / "none")])
    assert "expected a folder that exists" in capsys.readouterr().err


def test_the_best_learning_rate_is_one_for_all_seeds():
    runs = [
        {"model": "a", "lr": lr, "seed": seed, "scores": [[1, score]]}
        for lr, scores in ((0.1, (0.9, 0.1)), (0.2, (0.6, 0.5)))
        for seed, score in enumerate(scores)
    ]
    record = {"configuration": {"models": {"a": {}}}, "runs": runs[::-1]}
    assert experiments.final_scores(record) == {"a": [0.6, 0.5]}


VERDICT = [
    "gates",
    "gates_long",
    "gates_mixed",
    "gates_paper",
    "gates_tied",
    "induction",
    "induction_small",
    "recall",
    "recall_convolved",
    "recall_starts",
    "recall_small",
    "copying",
    "copying_fixed",
    "parity",
    "language_small",
    "language_medium",
    "language_large",
    "ablations",
]
MODELS = [(name, model) for name in VERDICT for model in EXPERIMENTS[name]["models"]]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "model"), MODELS)
def test_every_model_trains_in_the_quick_form(name, model):
    configuration = {**experiments.quick(EXPERIMENTS[name]), "steps": 2, "batch": 4, "tested": 4}
    if "lengths" in configuration:  # the one that is trained, and a longer one
        configuration["lengths"] = configuration["lengths"][:2]
    result = experiments.run(configuration, model, 1e-3, 0)
    assert [step for step, _ in result["scores"]] == [1, 2]
    assert all(math.isfinite(score) for _, score in result["scores"])
    assert result["model"] == model
    if "lengths" in configuration:
        assert set(result["lengths"]) == set(map(str, configuration["lengths"]))
    for noise in configuration.get("noises", []):
        assert 0 <= result["noises"][str(noise)] <= 1
    for pairs, length in configuration.get("tests", []):
        assert 0 <= result[f"{pairs}, {length}"] <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs are recorded on a GPU")
@pytest.mark.parametrize(("name", "model"), MODELS)
def test_every_model_trains_as_a_graph(name, model):
    configuration = experiments.quick(EXPERIMENTS[name])
    few = {"steps": 3, "batch": 4, "tested": 4, "graph": True, "lengths": [16], "tests": []}
    if isinstance(configuration.get("noise"), list):  # a graph has one length
        few["noise"] = 9
    result = experiments.run({**configuration, **few}, model, 1e-3, 0)
    assert all(math.isfinite(score) for _, score in result["scores"])


def test_a_start_like_attention_is_one():
    entry = {"model": "Mamba", "d_model": 8, "n_layer": 1, "start": ["A", "dt", "alike"]}
    ssm = experiments.models.build(entry, 10, 0).layers[0].mixer.ssm
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    _, B, C = ssm.select(x)
    alike = C @ B.mT
    expected = alike.tril() @ x + ssm.D * x
    faded = 6e-4 * (alike.tril().abs() @ x.abs())  # six tokens, a decay of 1 − 10⁻⁴ at each
    assert ((ssm(x)[0] - expected).abs() <= faded + 1e-5).all()
    torch.testing.assert_close(alike, alike.mT)  # C_t · B_s = B_t · B_s


def test_contestants_have_about_as_many_parameters():
    for size in ("small", "medium", "large"):
        counts = {
            model: sum(p.numel() for p in experiments.build(language, model, 0).parameters())
            for language in [EXPERIMENTS[f"language_{size}"]]
            for model in language["models"]
        }
        assert len(counts) == 4
        assert max(counts.values()) < 1.06 * min(counts.values()), counts


def test_what_is_fixed_is_linear_and_what_is_selective_is_not():
    torch.manual_seed(0)
    x, y = torch.randn(2, 2, 20, 8, dtype=torch.float64).unbind(0)
    for kind, linear in ((Invariant, True), (Selective, False)):
        memory = kind(8, 4).double()
        apart = (memory(x + y) - memory(x) - memory(y)).abs().max()
        assert (apart < 1e-12) == linear


@pytest.mark.parametrize("gate", GATES)
def test_gates_are_where_the_figure_has_them(gate):
    torch.manual_seed(0)
    layer, u = GatedLayer(4, gate, Invariant, 4).double(), torch.randn(2, 9, 4).double()
    parts = layer.in_proj(layer.norm(u)).chunk(GATES[gate], dim=-1)
    x = layer.conv1d(parts[0])[0]
    memory = layer.memory
    y = {
        "none": lambda: memory(x),
        "H3": lambda: parts[1] * memory(x * parts[2]),
        "Mamba": lambda: memory(x) * torch.nn.functional.silu(parts[1]),
    }[gate]()
    assert torch.equal(layer(u), u + layer.out_proj(y))
    late = u.clone()
    late[:, 5:] += 1
    torch.testing.assert_close(layer(late)[:, :5], layer(u)[:, :5], rtol=0, atol=1e-12)  # causal


def test_text_is_held_out_by_files():
    learned, held_out = data.standard_library()
    assert learned.dtype == held_out.dtype == torch.uint8
    assert 10 < len(learned) / len(held_out) < 40
    assert held_out[:4000].numpy().tobytes() not in learned.numpy().tobytes()


@pytest.fixture
def released():
    torch.manual_seed(0)
    return MambaLM(MambaConfig(d_model=16, n_layer=2, vocab_size=64)).eval()


def test_the_price_of_a_text_is_that_of_its_tokens_one_by_one(released, monkeypatch):
    monkeypatch.setattr(checkpoint, "PIECE", 7)  # so that a state is handed on
    ids = torch.randint(64, (40,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        chances = released.double()(ids[None])[0].log_softmax(-1)
    nats = -chances[:-1].gather(1, ids[1:, None]).sum().item()
    found = checkpoint.price(released, ids, size=100)
    assert found["tokens"] == 39
    assert math.isclose(found["perplexity"], math.exp(nats / 39), rel_tol=1e-5)
    assert math.isclose(found["bits_per_byte"], nats / math.log(2) / 100, rel_tol=1e-5)


def test_a_released_model_is_examined_as_a_whole(released, monkeypatch, tmp_path):
    class Letters:
        def encode(self, text):
            self.ids = [ord(letter) % 64 for letter in text]
            return self

        def decode(self, ids):
            return "".join(chr(64 + i) for i in ids)

    monkeypatch.setattr(checkpoint, "fetch", lambda: (released, Letters()))
    monkeypatch.setattr(checkpoint, "BYTES", 300)
    shown = []
    experiments.main(["checkpoint", "--out", str(tmp_path)], shown.append)
    result = json.loads((tmp_path / "checkpoint.json").read_text())
    assert json.loads(shown[0]) == result
    assert len(result["continuation"]) == checkpoint.NEW_TOKENS
    assert 32 < result["perplexity"] < 128  # an untrained model knows nothing


def test_without_a_network_it_says_what_is_needed(monkeypatch, tmp_path):
    def refused(*_):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(MambaLM, "from_pretrained", refused)
    monkeypatch.setattr("tokenizers.Tokenizer.from_pretrained", refused)
    with pytest.raises(OSError, match="in the cache of huggingface_hub, or a network"):
        experiments.main(["checkpoint", "--out", str(tmp_path)])
