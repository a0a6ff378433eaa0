"""The program that measures on a GPU: what of it runs without one, and what it recorded."""

import importlib.util
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from mamba_tutorial import counts
from mamba_tutorial.benchmark import gpu, measuring, recurrence, scans, units

RESULTS = Path(__file__).parents[1] / "book" / "results"


def test_a_failure_is_recorded_with_its_reason_and_a_missing_library_by_its_name():
    def fails():
        raise ValueError("wrong, by 1.0e+00\nand more")

    def lacks():
        importlib.import_module("no_such_library")

    assert measuring.attempt({"name": "a"}, lambda: {"ms": 1.0}) == {"name": "a", "ms": 1.0}
    row = measuring.attempt({"name": "a"}, fails)
    assert row == {"name": "a", "passed_over": "ValueError: wrong, by 1.0e+00"}
    row = measuring.attempt({"name": "a"}, lacks)
    assert row == {"name": "a", "passed_over": "no_such_library is not installed"}


@pytest.mark.parametrize("starts", [None, torch.arange(40).view(2, 20) % 7 == 3])
def test_the_candidates_compute_the_same(starts):
    generator = torch.Generator().manual_seed(0)
    x, dt, z = torch.randn(3, 2, 20, 3, generator=generator).unbind(0)
    B, C = torch.randn(2, 2, 20, 16, generator=generator).unbind(0)
    A = -torch.arange(1.0, 17).repeat(3, 1)
    D, bias = torch.randn(2, 3, generator=generator).unbind(0)
    given = [x, dt, A, B, C, D, z, bias]
    upstream = torch.randn(2, 20, 3, generator=generator)
    exact = scans.exact_scan(given, upstream, starts)
    candidates = [scans.unfused_scan] if starts is None else []
    if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
        candidates.append(partial(scans.ours_scan, starts=starts))
    for scan in candidates:
        leaves = [tensor.detach().requires_grad_() for tensor in given]
        y = scan(*leaves)
        found = y, *torch.autograd.grad(y, leaves, upstream)
        for value, right in zip(found, exact, strict=True):
            assert measuring.relative(value, right) < 1e-5


def test_a_wrong_candidate_is_not_timed():
    a, b = torch.rand(2, 1, 10, 4).unbind(0)
    exact = recurrence.ours_recurrence(a, b)
    with pytest.raises(ValueError, match="wrong, by"):
        recurrence._recurrence(lambda a, b: b, (a, b, b), 1, exact, slice(0, 4))


def test_a_program_takes_from_the_first_warp_that_begins_to_the_last_that_ends():
    clocks = torch.tensor([[[100, 180], [90, 170]], [[7, 60], [8, 87]], [[0, 500], [1, 600]]])
    assert units._taken(clocks) == 90
    with pytest.raises(ValueError, match=r"wrong: 2\.0 instead of 1"):
        units._check(torch.full((3, 2), 2.0), 1, 0.5)


UNITS = """
import os, re, subprocess, sys, tempfile
os.environ["TRITON_INTERPRET"] = "0"
import torch
torch.cuda.is_available = lambda: True  # to compile for a GPU, none is needed
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from mamba_tutorial.benchmark import units, units_in_gluon

disassembler = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/nvdisasm")
given = {"clocks_ptr": "*i64", "result_ptr": "*fp32", "steps": "i32"}
reads = [{"PIECE": piece, "SHARED": shared} for piece in (1, 2, 4) for shared in (False, True)]
exponentials = [{"PAIRS": pairs} for pairs in (False, True)]
for name, constants in [("exponentials", c) for c in exponentials] + [("reads", c) for c in reads]:
    kernel = getattr(units_in_gluon, name)
    values = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    source = GluonASTSource(
        kernel, signature=given | dict.fromkeys(constants, "constexpr"), constexprs=values
    )
    options = {"num_warps": units.WARPS}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile() as file:
        file.write(built.asm["cubin"])
        file.flush()
        command = [disassembler, "-c", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    loop = re.search(r"(\\.L_x_\\d+):((?:(?!\\.L_x_\\d+:).)*?BRA `\\(\\1\\))", code, re.S)[2]
    found = re.findall(r"(?:LDS|MUFU|BAR)[.\\w]*", loop)
    print(name, *constants.values(), *sorted(set(found)), len(found) % 8)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_loops_that_measure_a_unit_have_its_instruction_and_none_that_waits():
    command = [sys.executable, "-c", UNITS]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "exponentials False MUFU.EX2 0",
        "exponentials True MUFU.EX2.F16 0",
        "reads 1 False LDS 0",
        "reads 1 True LDS 0",
        "reads 2 False LDS.64 0",
        "reads 2 True LDS.64 0",
        "reads 4 False LDS.128 0",
        "reads 4 True LDS.128 0",
    ]


def test_a_measurement_that_is_stopped_keeps_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "hardware", lambda: {"gpu": "one"})

    def rows():
        yield {"name": "a", "ms": 1.0}
        raise KeyboardInterrupt

    path = tmp_path / "gpu_section.json"
    with pytest.raises(KeyboardInterrupt):
        list(measuring.saved(rows(), "a command", path))
    record = json.loads(path.read_text())
    assert record["results"] == [{"name": "a", "ms": 1.0}]
    assert record["command"] == "a command"
    assert record["environment"] == {"gpu": "one"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure for minutes")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "PyTorch sees no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize("section", gpu.SECTIONS)
def test_every_section_has_a_record_with_hardware_versions_and_command(section):
    path = RESULTS / f"gpu_{section}.json"
    record = json.loads(path.read_text("utf-8"))
    assert record["command"] == f"{gpu.COMMAND} --only {section}"
    assert {"gpu", "torch", "triton", "nvidia_smi"} <= set(record["environment"])
    assert record["results"]
    for row in record["results"]:
        if str(row.get("name")).startswith("mamba_tutorial"):
            assert "passed_over" not in row
            assert all(math.isfinite(v) for v in row.values() if isinstance(v, float))


def test_the_length_is_cut_nearly_as_well_as_it_can_be():
    times = {}
    for row in json.loads((RESULTS / "gpu_chunks.json").read_text("utf-8"))["results"]:
        size = tuple(row[k] for k in ("batch", "length", "d_inner", "d_state"))
        times.setdefault(size, {})[row["chunk"]] = row
    assert set(times) == set(scans.CUT)
    for rows in times.values():
        for key in ("forward_ms", "both_ms"):
            assert rows[None][key] < 1.1 * min(row[key] for row in rows.values() if key in row)


def test_a_multiprocessor_does_in_a_clock_what_the_counts_take_for_granted():
    chip = counts.GPU(clock=1.0, bandwidth=1.0)
    for row in json.loads((RESULTS / "gpu_units.json").read_text("utf-8"))["results"]:
        if row["what"] == "exponentials":  # pairs in float16 are no faster
            assert row["per_clock"] == pytest.approx(chip.special, rel=0.05)
        elif row["shared"] and row["bytes"] > 4:  # 56 and 61: no count asks for more than is there
            assert 1.7 * chip.shared < row["per_clock"] < 2 * chip.shared
        else:
            assert row["per_clock"] == pytest.approx(chip.shared, rel=0.05)
