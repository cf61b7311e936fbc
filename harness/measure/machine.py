"""The machine that numbers were measured on, and choosing the device to measure on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from harness.cpuinfo import cpu_fact
from harness.errors import ConfigError
from harness.measure import MEASURING_VERSION
from harness.privacy import without_passwords

__all__ = ["compute_environment", "device_name", "gpu_state", "manifest", "resolve_device"]

_PACKAGES = (
    "transformer-harness",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "lm-eval",
    "datasets",
    "numpy",
    "triton",
)
_VARIABLES = re.compile(
    r"^(PYTORCH_|TORCHINDUCTOR_|TORCHDYNAMO_|TRITON_|OMP_|GOMP_|MKL_|KMP_|CUBLAS_|CUBLASLT_|CUDNN_"
    r"|DNNL_|ONEDNN_|OPENBLAS_|MALLOC_|ATEN_CPU_CAPABILITY$"
    r"|CUDA_(LAUNCH_BLOCKING|MODULE_LOADING|DEVICE_MAX_CONNECTIONS|FORCE_PTX_JIT|DISABLE_PERF_BOOST)$"
    r"|NVIDIA_TF32_OVERRIDE$|TORCH_(ALLOW_TF32_CUBLAS_OVERRIDE|CUDNN_V8_API_DISABLED|BLAS_PREFER_CUBLASLT)$)"
)
"""Environment variables that change how torch and its libraries compute."""

_PLACES = re.compile(r"(DIR|HOME|PATH|LOGS?|LOG_LEVEL|DUMP\w*)$")
"""What these end in names a place or a log, and changes no number."""

_DEVICE = re.compile(r"^(cpu|cuda(:\d+)?)$")
_GIT_TIMEOUT_S = 10


def resolve_device(text: str) -> str:
    """The device that ``--device`` means: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ConfigError: an unknown device, or one that this machine does not have.
    """
    name = text.strip().lower()
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not _DEVICE.match(name):
        raise ConfigError(f"--device {text}: unknown device; use auto, cpu, cuda or cuda:N")
    if name == "cpu":
        return name
    if not torch.cuda.is_available():
        raise ConfigError(f"--device {text}: no CUDA device is available; use --device cpu")
    count = torch.cuda.device_count()
    index = torch.device(name).index or 0
    if index >= count:
        raise ConfigError(f"--device {text}: there are {count} CUDA devices, cuda:0 to cuda:{count - 1}")
    return name


def device_name(device: torch.device | str) -> str:
    """The name of the hardware, such as ``NVIDIA H100 80GB HBM3``; decides what may be compared."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model()


def manifest(device: torch.device | str) -> dict[str, Any]:
    """Everything about this machine and this checkout that numbers may depend on, as JSON values.

    What cannot be found out (no driver, no git, no `/proc`) is None.
    """
    device = torch.device(device)
    return {
        "time_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "measuring_version": MEASURING_VERSION,
        "command": [without_passwords(argument) for argument in sys.argv],
        "device": str(device),
        "device_name": device_name(device),
        "python": platform.python_version(),
        "os": platform.platform(),
        "kernel": platform.release(),
        "hostname": platform.node(),
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "cpus_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "torch_threads": torch.get_num_threads(),
        "ram_bytes": _ram_bytes(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "environment": compute_environment(),
        "gpu": gpu_state(device),
        "git": _git(Path.cwd()),
    }


def compute_environment() -> dict[str, str]:
    """The environment variables that change how fast or how exactly torch computes."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if _VARIABLES.match(name) and not _PLACES.search(name)
    }


def gpu_state(device: torch.device | str) -> dict[str, Any] | None:
    """Clocks, power, temperature and throttling of a GPU now; None for the CPU or without a driver."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    with _nvml() as nvml:
        if nvml is None:
            return None
        handle = _nvml_handle(nvml, device)
        if handle is None:
            return None
        return {
            "driver": _asked(nvml, nvml.nvmlSystemGetDriverVersion),
            "memory_bytes": _asked(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total),
            "sm_clock_mhz": _asked(nvml, lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            "sm_clock_max_mhz": _asked(
                nvml, lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)
            ),
            "memory_clock_mhz": _asked(
                nvml, lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)
            ),
            "memory_clock_max_mhz": _asked(
                nvml, lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM)
            ),
            "sm_clock_set_mhz": _asked(
                nvml, lambda: nvml.nvmlDeviceGetApplicationsClock(handle, nvml.NVML_CLOCK_SM)
            ),
            "memory_clock_set_mhz": _asked(
                nvml, lambda: nvml.nvmlDeviceGetApplicationsClock(handle, nvml.NVML_CLOCK_MEM)
            ),
            "power_w": _asked(nvml, lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
            "power_cap_w": _asked(nvml, lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000),
            "temperature_c": _asked(
                nvml,
                lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
            ),
            "throttle_reasons": _asked(nvml, lambda: _throttle_reasons(nvml, handle)),
            "violation_s": _violations_s(nvml, handle),
            "ecc": _asked(nvml, lambda: bool(nvml.nvmlDeviceGetEccMode(handle)[0])),
        }


# --- the GPU's management library ---------------------------------------------------------------------


@contextmanager
def _nvml() -> Iterator[Any]:
    """The initialised library, or None where it is absent or finds no driver."""
    try:
        import pynvml
    except ImportError:
        yield None
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        _asked(pynvml, pynvml.nvmlShutdown)  # another library may have closed it already


def _nvml_handle(nvml: Any, device: torch.device) -> Any:
    # CUDA_VISIBLE_DEVICES renumbers the devices of CUDA but not those of NVML.
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    return _asked(nvml, lambda: nvml.nvmlDeviceGetHandleByUUID(name))


def _asked(nvml: Any, question: Callable[[], Any]) -> Any:
    """The answer, or None where this device does not tell."""
    try:
        return question()
    except nvml.NVMLError:
        return None


def _throttle_reasons(nvml: Any, handle: Any) -> list[str]:
    bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    prefix = "nvmlClocksThrottleReason"
    names = {
        name.removeprefix(prefix): value
        for name, value in vars(nvml).items()
        if name.startswith(prefix) and isinstance(value, int)
    }
    return sorted(name for name, bit in names.items() if bit and bits & bit and name != "All")


def _violations_s(nvml: Any, handle: Any) -> dict[str, float | None]:
    """Seconds for which each limit has held the clocks down since the driver was loaded.

    The difference between the end and the start of a sweep is what a look at either moment misses.
    """
    policies = {
        name: getattr(nvml, f"NVML_PERF_POLICY_{name.upper()}")
        for name in ("power", "thermal", "board_limit", "reliability")
    }

    def seconds(policy: int) -> float | None:
        found = _asked(nvml, lambda: nvml.nvmlDeviceGetViolationStatus(handle, policy))
        return None if found is None else float(found.violationTime) / 1e9

    return {name: seconds(policy) for name, policy in policies.items()}


# --- the rest of the machine ---------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    return cpu_fact("model name", "Hardware") or platform.processor() or platform.machine() or "unknown CPU"


def _ram_bytes() -> int | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _git(directory: Path) -> dict[str, Any] | None:
    """The commit of the checkout that contains the directory, and whether tracked files differ."""
    commit = _git_says(directory, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git_says(directory, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def _git_says(directory: Path, *arguments: str) -> str | None:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        answer = subprocess.run(
            ["git", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
