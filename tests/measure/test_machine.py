"""The device to measure on and the description of the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from harness.errors import ConfigError
from harness.measure import MEASURING_VERSION, machine
from harness.measure.machine import device_name, gpu_state, manifest, resolve_device


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("no_cuda")
def test_without_cuda_there_is_the_cpu():
    assert resolve_device("auto") == "cpu"
    assert resolve_device("CPU") == "cpu"
    for text in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError) as refused:
            resolve_device(text)
        expected = f"--device {text}: no CUDA device is available; use --device cpu"
        assert str(refused.value) == expected


@pytest.mark.usefixtures("two_cuda")
def test_with_cuda_a_device_can_be_chosen():
    assert resolve_device("auto") == "cuda"
    assert resolve_device("cuda") == "cuda"
    assert resolve_device("cuda:1") == "cuda:1"
    assert resolve_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="there are 2 CUDA devices, cuda:0 to cuda:1"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("text", ["mps", "gpu", "cuda:", "cuda:x", "", "cpu:0"])
def test_other_devices_are_refused(text):
    with pytest.raises(ConfigError, match="unknown device; use auto, cpu, cuda or cuda:N"):
        resolve_device(text)


def test_the_manifest_is_json_and_complete():
    found = json.loads(json.dumps(manifest("cpu")))
    assert found["versions"]["torch"] == torch.__version__
    assert found["measuring_version"] == MEASURING_VERSION
    assert found["device"] == "cpu"
    assert found["device_name"] == found["cpu"] == device_name("cpu") != ""
    assert found["time_utc"].endswith("+00:00")
    assert found["ram_bytes"] > 2**28
    assert found["gpu"] is None
    assert found["cpu_count"] >= 1


def test_variables_that_change_numbers_are_noted_and_places_are_not(monkeypatch):
    for name in list(machine.compute_environment()):
        monkeypatch.delenv(name)
    for name, value in {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "NVIDIA_TF32_OVERRIDE": "0",
        "OMP_NUM_THREADS": "1",
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MALLOC_ARENA_MAX": "1",
        "TRITON_CACHE_DIR": "/somewhere",
        "TORCH_HOME": "/elsewhere",
        "HF_TOKEN": "secret",
        "CUDA_VISIBLE_DEVICES": "3",
    }.items():
        monkeypatch.setenv(name, value)
    assert manifest("cpu")["environment"] == {
        "ATEN_CPU_CAPABILITY": "default",
        "MALLOC_ARENA_MAX": "1",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "NVIDIA_TF32_OVERRIDE": "0",
        "OMP_NUM_THREADS": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }


def test_a_package_that_is_absent_has_no_version(monkeypatch):
    monkeypatch.setattr(machine, "_PACKAGES", ("torch", "no-such-package"))
    assert manifest("cpu")["versions"] == {"torch": torch.__version__, "no-such-package": None}


def test_the_commit_and_its_dirtiness_are_noted(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert manifest("cpu")["git"] is None
    git("init", "--quiet")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "--quiet", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert manifest("cpu")["git"] == {"commit": commit, "dirty": False}
    (tmp_path / "file").write_text("two")
    assert manifest("cpu")["git"] == {"commit": commit, "dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert manifest("cpu")["git"] is None


# --- the GPU's management library, played by a stand-in -----------------------------------------------


class NVMLError(Exception):
    pass


class StandIn:
    """As much of pynvml as is asked, for a device that does not tell its power."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVML_PERF_POLICY_POWER, NVML_PERF_POLICY_THERMAL = 0, 1
    NVML_PERF_POLICY_BOARD_LIMIT, NVML_PERF_POLICY_RELIABILITY = 3, 5

    def __init__(self) -> None:
        self.nvmlClocksThrottleReasonNone = 0
        self.nvmlClocksThrottleReasonSwPowerCap = 4
        self.nvmlClocksThrottleReasonHwSlowdown = 8
        self.nvmlClocksThrottleReasonAll = 12
        self.open = 0

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlSystemGetDriverVersion(self):
        return "580.1"

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == "GPU-abc"
        return "handle"

    def nvmlDeviceGetMemoryInfo(self, _handle):
        return SimpleNamespace(total=80)

    def nvmlDeviceGetClockInfo(self, _handle, which):
        return {1: 1500, 2: 2600}[which]

    def nvmlDeviceGetMaxClockInfo(self, _handle, which):
        return {1: 1980, 2: 2619}[which]

    def nvmlDeviceGetApplicationsClock(self, _handle, which):
        return {1: 1755, 2: 2619}[which]

    def nvmlDeviceGetViolationStatus(self, _handle, policy):
        if policy == self.NVML_PERF_POLICY_RELIABILITY:
            raise NVMLError("not supported")
        return SimpleNamespace(referenceTime=9, violationTime=policy * 2_000_000_000)

    def nvmlDeviceGetPowerUsage(self, _handle):
        raise NVMLError("not supported")

    def nvmlDeviceGetEnforcedPowerLimit(self, _handle):
        return 700_000

    def nvmlDeviceGetTemperature(self, _handle, _which):
        return 41

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, _handle):
        return 4

    def nvmlDeviceGetEccMode(self, _handle):
        return [1, 1]


@pytest.fixture
def one_gpu(monkeypatch):
    properties = SimpleNamespace(uuid="abc")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "pynvml", stand_in)
    return stand_in


def test_clocks_power_and_throttling_are_read(one_gpu):
    assert gpu_state("cuda") == {
        "driver": "580.1",
        "memory_bytes": 80,
        "sm_clock_mhz": 1500,
        "sm_clock_max_mhz": 1980,
        "memory_clock_mhz": 2600,
        "memory_clock_max_mhz": 2619,
        "sm_clock_set_mhz": 1755,
        "memory_clock_set_mhz": 2619,
        "power_w": None,
        "power_cap_w": 700.0,
        "temperature_c": 41,
        "throttle_reasons": ["SwPowerCap"],
        "violation_s": {"power": 0.0, "thermal": 2.0, "board_limit": 6.0, "reliability": None},
        "ecc": True,
    }
    assert one_gpu.open == 0


@pytest.mark.parametrize("name", ["nvmlSystemGetDriverVersion", "nvmlShutdown", "nvmlDeviceGetClockInfo"])
def test_what_fails_does_not_cost_the_rest(one_gpu, name):
    def fails(*_):
        raise NVMLError("uninitialized")

    setattr(one_gpu, name, fails)
    state = gpu_state("cuda")
    assert state["power_cap_w"] == 700
    assert state["driver"] == (None if name == "nvmlSystemGetDriverVersion" else "580.1")


def test_without_driver_or_library_there_is_nothing_to_read(one_gpu, monkeypatch):
    def no_driver():
        raise NVMLError("driver not loaded")

    one_gpu.nvmlInit = no_driver
    assert gpu_state("cuda") is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # makes the import fail
    assert gpu_state("cuda") is None
    assert gpu_state("cpu") is None
