"""Tuning launches: what is tried, what survives, and what the table says."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from multiprocessing.connection import Connection

import pytest
import torch

from harness.errors import ConfigError
from harness.kernels import reference, tune
from harness.kernels.candidates import MOST_FUSED_ROWS, candidates
from harness.kernels.selection import select, takes_matrix, takes_vector
from harness.kernels.stored import stored
from harness.kernels.tune_worker import SCHEMES, Part, Trial, compile_part, graph_time, tune_part
from harness.nn.codebook import CodebookLinear
from harness.nn.packing import pack_weight
from harness.nn.quantizer import quantize_weight

from .test_weight_only import IS_INTERPRETED

PART = Part("w4-g128", 256, 64, 1, 5.0)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64, 65, 512, 8192])
def test_candidates(scheme, rows):
    form = SCHEMES[scheme].empty(4096, 11008).form
    found = candidates(form, rows)
    assert len(found) == len(set(found))
    assert len(found) <= 16, "bounded"
    chosen = select(form, rows, 16)
    if chosen is not None:
        assert found[0] == chosen, "today's choice is always tried"
    kernels = {launch.kernel for launch in found}
    assert not (form.has_outliers and kernels - {"gemv"})
    assert ("wide" in kernels) == (rows == 1 and not form.is_table)
    assert ("vector" in kernels) == (rows == 1 and takes_vector(form))
    assert ("few" in kernels) == (1 < rows <= 32 and takes_vector(form))
    assert ("matrix" in kernels) == (16 < rows <= MOST_FUSED_ROWS and takes_matrix(form))
    if form.is_table or form.has_float_zeros or form.bits == 3:
        assert "small" not in kernels
    if rows > MOST_FUSED_ROWS:
        assert not found
    elif rows > 1 and not form.has_outliers:
        assert "fused" in kernels


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_empty_matrix_has_the_form_of_a_made_one(scheme):
    """What is compiled in advance is what runs: the same shapes and types."""
    made = SCHEMES[scheme].make(torch.randn(128, 1024))
    empty = SCHEMES[scheme].empty(1024, 128)
    assert made.form == empty.form
    for name in ("codes", "scales", "zeros", "table", "outlier_index", "outlier_values"):
        one, other = getattr(made, name), getattr(empty, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert (one.shape, one.dtype) == (other.shape, other.dtype), name


@pytest.mark.parametrize("options", [{"bits": 4, "group_size": 64}, {"bits": 3}, {"bits": 8, "sym": True}])
def test_the_reference_of_a_stored_grid(options):
    packed = pack_weight(quantize_weight(torch.randn(40, 192), **{"sym": False} | options))
    assert torch.equal(reference.stored_matrix(stored(packed)), reference.dequantize(packed))


def test_the_reference_of_a_stored_table():
    for scheme in ("nf4-g64", "gobo3"):
        matrix = SCHEMES[scheme].make(torch.randn(64, 256))
        layer = CodebookLinear(256, 64, bits=matrix.bits)
        layer.codes, layer.table, layer.scales = matrix.codes, matrix.table, matrix.scales
        layer.tile = matrix.tile
        layer.group_size = 64 if scheme == "nf4-g64" else -1
        layer.outlier_index, layer.outlier_values = matrix.outlier_index, matrix.outlier_values
        assert torch.equal(reference.stored_matrix(matrix), layer.codebook_weight.dequantize())


def trial(name: str, us: float | None = None, failure: str | None = None, part: Part = PART) -> Trial:
    return Trial(part, name, us, failure=failure)


def test_the_best_is_ours_and_ran():
    trials = [trial("bf16", 1.0), trial("tinygemm", 2.0), trial("gemv a", 4.0), trial("gemv b", 3.0)]
    trials.append(trial("gemv c", failure="wrong: relative error 1"))
    best = tune.best_of(trials)
    assert best is not None
    assert best.name == "gemv b"
    assert tune.best_of([trial("bf16", 1.0), trial("gemv", failure="no")]) is None


def test_the_table():
    other = Part("nf4-g64", 256, 64, 16, 5.0)
    text = tune.summary(
        [
            trial("bf16", 9.0),
            trial("tinygemm", 6.0),
            trial("gemv b", 3.0),
            trial("left out", failure="x", part=other),
        ]
    )
    head, first, second = text.splitlines()
    assert head.split() == ["scheme", "in", "out", "rows", "us", "of", "bf16", "of", "tiny", "best"]
    assert first.split() == ["w4-g128", "256", "64", "1", "3.00", "3.00", "2.00", "gemv", "b"]
    assert second.split() == ["nf4-g64", "256", "64", "16", "-", "-", "-", "nothing", "ran"]


def fragile_worker(pipe: Connection) -> None:
    """Does what the number of rows says."""
    pipe.send(None)
    while True:
        try:
            part = pipe.recv()
        except EOFError:
            return
        pipe.send(Trial(part, "bf16", 1.0))
        if part.rows == 2:
            os._exit(9)
        if part.rows == 3:
            time.sleep(600)
        pipe.send(Trial(part, "gemv", 0.5))
        pipe.send(None)


def test_a_worker_that_dies_or_hangs_is_replaced():
    parts = [Part("w4-g128", 256, 64, rows, 1.0) for rows in (1, 2, 3, 4)]
    found = list(tune.run_parts(parts, deadline=time.monotonic() + 100, silence_s=3.0, worker=fragile_worker))
    seen = [(each.part.rows, each.name, each.failure) for each in found]
    assert seen == [
        (1, "bf16", None),
        (1, "gemv", None),
        (2, "bf16", None),
        (2, "left out", "the worker died"),
        (3, "bf16", None),
        (3, "left out", "silent for 3 s"),
        (4, "bf16", None),
        (4, "gemv", None),
    ]


def test_nothing_is_begun_after_the_deadline():
    parts = [PART, PART]
    found = list(tune.run_parts(parts, deadline=time.monotonic(), worker=fragile_worker))
    assert [each.failure for each in found] == ["no time left"] * 2


def slow_or_broken(part: Part, processors: int) -> None:
    if part.rows == 2:
        raise RuntimeError("does not compile")
    if part.rows == 3:
        time.sleep(600)


def test_compiling_survives_failures():
    parts = [Part("w4-g128", 256, 64, rows, 1.0) for rows in (1, 2)]
    assert tune.compile_parts(parts, 132, seconds=100.0, processes=2, compile_one=slow_or_broken) == 2


def test_compiling_ends_in_time():
    start = time.monotonic()
    part = Part("w4-g128", 256, 64, 3, 1.0)
    assert tune.compile_parts([part], 132, seconds=3.0, processes=1, compile_one=slow_or_broken) == 0
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schemes", "w5"], "unknown schemes"),
        (["--rows", "1,x"], "whole numbers"),
        (["--shapes", "4096"], "whole numbers"),
        (["--rows", "0"], "positive"),
        (["--seconds-per-shape", "0"], "positive"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ConfigError, match=message):
        tune.main(arguments)


@pytest.mark.skipif(not IS_INTERPRETED, reason="needs triton, numpy below 2.4 and TRITON_INTERPRET=1")
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
def test_a_wrong_result_is_a_failure_and_has_no_time():
    """The interpreter has no products of bfloat16 matrices: gemv is right there, fused is wrong."""
    trials = list(tune_part(PART, torch.device("cpu"), lambda run, calls: 1.0))
    by_kernel = {each.launch["kernel"]: each for each in trials if each.launch is not None}
    assert by_kernel["gemv"].us == 1.0
    assert by_kernel["gemv"].failure is None
    assert by_kernel["fused"].us is None
    assert by_kernel["fused"].failure is not None
    assert by_kernel["fused"].failure.startswith("wrong: relative error")


@pytest.mark.skipif(not IS_INTERPRETED, reason="needs triton, numpy below 2.4 and TRITON_INTERPRET=1")
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
def test_what_a_launch_raises_is_a_failure_and_the_seconds_end_a_part():
    def timer(run, calls):
        raise RuntimeError("out of\nresource")

    trials = list(tune_part(replace(PART, seconds=1e-9), torch.device("cpu"), timer))
    assert [each.name for each in trials] == ["bf16", "dequantize+matmul n=32 words=16 warps=4"]
    assert {each.failure for each in trials} == {"RuntimeError: out of resource"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_trials_on_a_device(scheme):
    part = Part(scheme, 1024, 512, 16, 20.0)
    compile_part(part, torch.cuda.get_device_properties(0).multi_processor_count)
    trials = list(tune_part(part, torch.device("cuda"), graph_time))
    assert trials[0].name == "bf16"
    ours = [each for each in trials if each.launch is not None]
    assert ours or scheme == "gobo3"
    wrong = [each for each in trials if each.failure and "OutOfResources" not in each.failure]
    assert not wrong


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_command(tmp_path, capsys):
    path = tmp_path / "tuned.json"
    tune.main(["--rows", "1", "--shapes", "1024x512", "--seconds", "120", "--json", str(path)])
    assert "w4-g128" in capsys.readouterr().out
    record = json.loads(path.read_text())
    assert record["device"] == torch.cuda.get_device_name()
    assert any(each["us"] for each in record["trials"])
