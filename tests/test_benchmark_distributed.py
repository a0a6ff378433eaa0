"""The measurement over several GPUs: here over two processes with gloo, and what it recorded."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mamba_tutorial.benchmark import distributed as measured
from mamba_tutorial.distributed import join_cost

RECORD = Path(__file__).parents[1] / "book" / "results" / "gpu_distributed.json"
needs_processes = pytest.mark.skipif(
    not dist.is_available(), reason="PyTorch without torch.distributed"
)


@needs_processes
@pytest.mark.parametrize("kind", measured.KINDS)
def test_two_processes_are_compared_with_one_and_timed(kind):
    row = measured.case(kind, 66, 8, ranks=2, device="cpu")
    assert row["error"] < 1e-2
    assert 0 < row["communication_ms"] < row["both_ms"]
    assert row["communication_share"] == row["communication_ms"] / row["both_ms"]
    assert row["single_both_ms"] > 0
    join = join_cost(2, 1, 8, 16, latency=0.0, bandwidth=1.0).gather_bytes
    window = 3 * 8 * 2  # tokens, channels, bytes of a number
    assert row["bytes_sent"] == 2 * join + window * (kind == "block")


@needs_processes
def test_an_error_in_a_process_is_the_reason():
    with pytest.raises(RuntimeError, match="ValueError: x has shape"):
        measured.case("scan", 1, 8, ranks=2, device="cpu")


def test_with_fewer_than_two_gpus_the_reason_is_recorded():
    reason = "there are 1 GPUs, expected two at least"
    assert list(measured.rows(1)) == [{"passed_over": reason}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure for minutes")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        measured.main([])
    assert "PyTorch sees no GPU here" in capsys.readouterr().err


@pytest.mark.skipif(not RECORD.exists(), reason="not measured yet: it needs two GPUs")
def test_the_record_has_hardware_versions_and_command():
    record = json.loads(RECORD.read_text("utf-8"))
    assert record["command"] == measured.COMMAND
    assert {"gpu", "torch", "triton", "nvidia_smi"} <= set(record["environment"])
    assert record["results"]
    for row in record["results"]:
        assert "passed_over" not in row
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float))
