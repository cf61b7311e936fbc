"""The script that tunes the 8-bit kernels: what it tries, how it survives, what it says."""

from __future__ import annotations

import time

import pytest
import torch

from harness.errors import ConfigError
from harness.kernels import _int8_cases, fp8, int8, outlier_int8, tune_int8, weight_only
from harness.kernels.tune_int8 import Candidate, Case, Result, run_case
from tests.kernels.interpreting import IS_INTERPRETED, OLD_NUMPY

pytestmark = OLD_NUMPY


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 32, 64, 65, 128, 512, 2048, 8192])
@pytest.mark.parametrize("columns", [4096, 11008, 100])
def test_what_is_tried_is_bounded_and_fits_the_device(rows, columns):
    tried = tune_int8.launches(rows, columns)
    assert len(tried) <= 22
    assert len(set(tried)) == len(tried)
    assert bool(tried) or (rows == 1 and columns == 100)
    for launch in [*tried, *tune_int8.packed_launches(rows)]:
        assert (launch.kind == "gemv") == (rows == 1)
        assert columns % 16 == 0 or launch.kind != "tma"
        for size in (launch.m, launch.n, launch.k, launch.warps):
            assert size & (size - 1) == 0
        if launch.kind != "gemv":
            assert launch.m >= 16
            assert launch.stages * (launch.m + launch.n) * launch.k <= 227 << 10


def case(*candidates: Candidate) -> Case:
    return Case("w8a8", 2, 3, 4, torch.ones(2, 4), candidates)


def test_what_is_wrong_or_breaks_is_reported_and_not_timed():
    timed = []

    def clock(call, seconds):
        timed.append(call)
        return 7.0

    def breaks(_):
        raise RuntimeError("out of registers\nand a trace")

    found = list(
        run_case(
            case(
                Candidate("good", "ours", lambda i: torch.ones(2, 4)),
                Candidate("an ulp off", "ours", lambda i: torch.ones(2, 4) * (1 + 2**-23)),
                Candidate("close enough", "ours", lambda i: torch.ones(2, 4) * 1.001, tolerance=0.01),
                Candidate("too far", "ours", lambda i: torch.ones(2, 4) * 1.1, tolerance=0.01),
                Candidate("no number", "ours", lambda i: torch.full((2, 4), float("nan")), tolerance=0.01),
                Candidate("another shape", "ours", lambda i: torch.ones(4, 2)),
                Candidate("breaks", "ours", breaks),
                Candidate("something else", "peer", lambda i: torch.zeros(1), checked=False),
            ),
            clock,
            60.0,
        )
    )
    assert [each.us for each in found] == [7.0, None, 7.0, None, None, None, None, 7.0]
    assert [each.problem.partition(":")[0] for each in found] == [
        "", "wrong", "", "wrong", "wrong", "wrong", "RuntimeError", "",
    ]  # fmt: skip
    assert found[6].problem == "RuntimeError: out of registers"
    assert len(timed) == 3


def test_a_case_ends_with_its_time():
    def slow(_):
        time.sleep(0.03)
        return torch.ones(2, 4)

    found = list(run_case(case(*[Candidate(str(i), "ours", slow) for i in range(9)]), lambda *_: 1.0, 0.05))
    assert len(found) == 9
    assert [bool(each.us) for each in found[:2]] == [True, True]
    assert found[-1].problem == "not tried: out of time"


def test_the_table_names_the_fastest_of_each_kind():
    about = ("w8a8", 8192, 4096, 11008)
    results = [
        Result(*about, "cuBLAS", "bf16", 1100.0),
        Result(*about, "default", "default", 700.0),
        Result(*about, "slow", "ours", 800.0),
        Result(*about, "fast", "ours", 550.0),
        Result(*about, "broken", "ours", None, "RuntimeError: registers"),
        Result(*about, "late", "ours", None, "not tried: out of time"),
        Result(*about, "_int_mm alone", "peer", 880.0),
        Result("w8a8", 1, 4096, 11008, "default", "default", 20.0),
    ]
    head, first, broken, late, second = tune_int8.summary(results)
    assert head.split()[:4] == ["part", "rows", "in", "out"]
    assert "700.0 (1.57x)" in first
    assert "550.0 (2.00x)  fast | _int_mm alone 880.0 (1.25x)" in first
    assert "slow" not in first
    assert broken.strip() == "broken: RuntimeError: registers"
    assert late.strip() == "1 not tried"
    assert second.split()[4:6] == ["-", "20.0"]


def test_unknown_parts_and_no_device_are_said():
    with pytest.raises(ConfigError, match="unknown parts"):
        tune_int8.main(["--parts", "w8a9"])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="needs a CUDA device"):
            tune_int8.main([])


@pytest.mark.skipif(not IS_INTERPRETED, reason="needs triton and TRITON_INTERPRET=1")
@pytest.mark.parametrize("part", sorted(set(_int8_cases.PARTS) - {"fp8"}))  # no float8 products there
@pytest.mark.parametrize("rows", [1, 20])
def test_every_part_runs_and_is_right(part, rows, monkeypatch):
    """In the interpreter, in float16: it cuts bfloat16 off."""
    monkeypatch.setattr(_int8_cases, "DEVICE", "cpu")
    monkeypatch.setattr(_int8_cases, "DTYPE", torch.float16)
    monkeypatch.setattr(_int8_cases, "_ROTATION_BYTES", 1)
    monkeypatch.setattr(_int8_cases.importlib.util, "find_spec", lambda name: None)
    for module in (int8, weight_only, outlier_int8, fp8):
        monkeypatch.setattr(module, "has_triton", lambda device: True)
    made, copies = _int8_cases.PARTS[part](rows, 128, 48, 4)
    assert copies >= 1
    found = list(run_case(made, lambda call, seconds: 1.0, 300.0))
    assert {each.label: each.problem for each in found if each.problem} == {}
    assert {"bf16", "default"} <= {each.kind for each in found}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device(tmp_path, capsys):
    options = ["--rows", "1,40", "--shapes", "256x512", "--seconds-per-shape", "30", "--seconds", "300"]
    tune_int8.main([*options, "--parts", "w8a8,rows,norm", "--json", str(tmp_path / "out.json")])
    printed = capsys.readouterr().out
    assert "wrong" not in printed
    assert (tmp_path / "out.json").stat().st_size > 1000
