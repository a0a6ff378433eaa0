"""The program that measures: it checks before it times, and counts what it says."""

import json
import sys

import pytest
import torch

from mamba_tutorial.benchmark import cpu

SMALL = {"batch": 1, "length": 40, "d_inner": 8, "d_state": 4}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(cpu, "SHAPE", SMALL)


@pytest.mark.parametrize("name", cpu.CANDIDATES)
@pytest.mark.filterwarnings("ignore")  # a peer's own
def test_every_candidate_is_right(name):
    module = "mambapy" if name.startswith("mambapy") else "numba" if "numba" in name else "torch"
    pytest.importorskip(module, reason=f"{module} comes with the bench extra")
    scan = cpu.CANDIDATES[name]()
    row = cpu.measure(name, scan, cpu.inputs(**SMALL), repeats=1)
    assert row.error < cpu.TOLERANCE
    assert row.both_ms > 0


def test_a_wrong_candidate_is_not_timed():
    def wrong(x, dt, A, B, C):
        return cpu.ours("sequential")()(x, dt, A, B, C) * 1.01

    with pytest.raises(ValueError, match=r"wrong has an error of 1\.0e-02"):
        cpu.measure("wrong", wrong, cpu.inputs(**SMALL))


def test_peak_memory_counts_what_is_held_together():
    held = 1 << 20

    def run():
        one = torch.empty(held, dtype=torch.uint8)
        del one
        two, three = torch.empty(2, held, dtype=torch.uint8), torch.empty(held, dtype=torch.uint8)
        return two.numel() + three.numel()

    assert abs(cpu.peak_memory(run) - 3) < 0.01


def test_a_missing_peer_is_passed_over(small, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "mambapy.pscan", None)
    monkeypatch.setitem(sys.modules, "mambapy", None)
    monkeypatch.delitem(cpu.CANDIDATES, "torch, associative_scan")
    cpu.main(["--repeats", "1", "--out", str(tmp_path / "new" / "record.json")])
    printed = capsys.readouterr().out
    assert "mambapy, pscan: passed over, mambapy" in printed
    assert "mamba_tutorial, numba" in printed
    record = json.loads((tmp_path / "new" / "record.json").read_text())
    assert [row["name"] for row in record["results"]] == list(cpu.CANDIDATES)[:3]
    assert record["environment"]["torch"] == str(torch.__version__)
    assert record["command"] == "python -m mamba_tutorial.benchmark"
