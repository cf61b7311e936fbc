"""What a device can do at most, measured here and in a worker."""

from __future__ import annotations

import json
import os

import pytest
import torch

from harness.errors import HarnessError
from harness.executors.calling import call_in_worker
from harness.measure import ceilings as ceilings_module
from harness.measure.ceilings import UNITS, Ceilings, ceilings_of_sweep, measure_ceilings


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr(ceilings_module, "_CPU_SIDE", 64)
    monkeypatch.setattr(ceilings_module, "_CPU_BYTES", 1 << 16)
    monkeypatch.setattr(ceilings_module, "_CPU_BUDGET_S", 0.002)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("brief")
def test_products_copies_reads_and_launches_are_measured():
    found = measure_ceilings("cpu", threads=1)
    assert {"matmul_float32", "matmul_bfloat16", "copy", "read", "launch"} <= set(found.values)
    assert not {"graph_launch", "matmul_tf32"} & set(found.values), "of CUDA only"
    assert all(value > 0 for value in found.values.values())
    assert found.values["launch"] < 1e-2
    assert {name.partition("_")[0] for name in found.values} <= set(UNITS)
    assert found.matmul_flops_per_s("float32") == found.values["matmul_float32"]
    assert found.bytes_per_s == max(found.values["read"], found.values["copy"])


@pytest.mark.usefixtures("brief")
def test_operations_and_bytes_are_counted_right(monkeypatch):
    monkeypatch.setattr(ceilings_module, "_best_seconds", lambda _run, _device: 2.0)
    found = measure_ceilings("cpu", threads=1)
    assert found.values["matmul_float32"] == 2 * 64**3 / 2.0
    assert found.values["copy"] == 2 * (1 << 16) / 2.0  # read and written
    assert found.values["read"] == (1 << 16) / 2.0


@pytest.mark.usefixtures("brief")
def test_what_a_device_cannot_do_is_a_note(monkeypatch):
    def refuse(*_arguments):
        raise RuntimeError('"addmm_impl_cpu_" not implemented for this\nand more')

    monkeypatch.setattr(torch, "_int_mm", refuse)
    found = measure_ceilings("cpu", threads=1)
    assert "matmul_int8" not in found.values
    assert found.notes == ('matmul_int8: "addmm_impl_cpu_" not implemented for this',)


def test_ceilings_survive_a_manifest():
    found = Ceilings("a device", 4, {"copy": 1e9}, ("note",))
    assert Ceilings.from_json(json.loads(json.dumps(found.as_json()))) == found
    assert Ceilings.from_json(None) == Ceilings()
    assert Ceilings().bytes_per_s is None


def test_a_failure_is_a_note_and_no_failed_sweep(monkeypatch):
    def dies(*_arguments, **_options):
        raise HarnessError("the process ended with exit code -9")

    monkeypatch.setattr("harness.executors.calling.call_in_worker", dies)
    assert ceilings_of_sweep("cuda", 2)["notes"] == ["not measured: the process ended with exit code -9"]


def test_a_function_runs_in_another_process():
    assert call_in_worker(os.getpid, timeout_s=60) != os.getpid()
    with pytest.raises(HarnessError, match="No such file"):
        call_in_worker(os.listdir, "/no such folder", timeout_s=60)
    with pytest.raises(HarnessError, match="exit code"):
        call_in_worker(os._exit, 3, timeout_s=60)
    with pytest.raises(HarnessError, match=r"took longer than 0\.2 s"):
        call_in_worker(ceilings_module.time.sleep, 30, timeout_s=0.2)
