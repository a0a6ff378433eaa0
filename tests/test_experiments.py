"""The experiments: a record belongs to its configuration, and a run goes on where it stopped."""

import json
from pathlib import Path

import pytest

from mamba_tutorial import experiments
from mamba_tutorial.experiments import EXPERIMENTS

RESULTS = Path(__file__).parents[1] / "book" / "results"
TINY = {**EXPERIMENTS["wall"], "steps": 2, "batch": 2, "seeds": [0, 1], "learning_rates": [1e-3]}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_recorded_runs_are_all_runs_of_the_configuration(name):
    record = json.loads((RESULTS / f"experiment_{name}.json").read_text())
    assert record["configuration"] == EXPERIMENTS[name]
    assert not list(experiments.missing(EXPERIMENTS[name], record["runs"]))
    for run in record["runs"]:
        assert run["scores"][-1][0] == EXPERIMENTS[name]["steps"]
        model = experiments.build(EXPERIMENTS[name], run["model"], run["seed"])
        assert run["parameters"] == sum(p.numel() for p in model.parameters())
    assert len(EXPERIMENTS[name]["seeds"]) >= 5


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
    record = json.loads((tmp_path / "experiment_wall_quick.json").read_text())
    assert len(record["runs"]) == 2
    experiments.main(arguments, shown.append)
    again = json.loads((tmp_path / "experiment_wall_quick.json").read_text())
    assert again["runs"][:2] == record["runs"]
    assert [tuple(one[key] for key in ("model", "lr", "seed")) for one in again["runs"]] == [
        (name, 1e-3, seed) for seed in (0, 1) for name in tiny["models"]
    ]
    assert len(started) == 5
    assert shown[0].split()[:4] == ["wall", "mean", "least", "largest"]


def test_another_configuration_is_not_mixed_in(tiny, tmp_path):
    path = tmp_path / "experiment_wall_quick.json"
    path.write_text(json.dumps({"configuration": {}, "runs": []}))
    with pytest.raises(ValueError, match="records another configuration"):
        experiments.main(["wall", "--quick", "--out", str(tmp_path)])


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
