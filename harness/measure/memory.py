"""Memory: the peak of a phase, the stored weights, the KV cache per token.

Three different things, measured apart: `PeakMemory` is what a phase needed at its worst moment,
`weight_bytes` what the model stores, `kv_cache_bytes_per_token` what each further token costs.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
import threading
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from harness.errors import NotApplicable
from harness.measure.storage import bytes_per_tensor, storage_bytes, tensors_in
from harness.models.info import ModelInfo

__all__ = ["PeakMemory", "kv_cache_bytes_per_token", "weight_bytes"]

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATM = Path("/proc/self/statm")
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"  # proc(5): writing 5 sets the peak resident size to the current one
_SAMPLE_EVERY_S = 0.001
_CACHE_LENGTHS = (16, 32, 128)  # tokens; two to measure the growth, one to see whether it stops


class PeakMemory:
    """The peak memory of a block of code: ``with PeakMemory(device) as memory: ...``.

    On CUDA the peak is what the allocator handed out at most, weights and everything else that was
    already there included, and `reserved_bytes` what it took from the device for that. On the CPU
    there is no such counter: the peak is the growth of the process's resident memory over its size
    at the start. `mode` and `note` say which of the ways it was.

    Args:
        since: on the CPU, count the growth from the start of this earlier block.

    Attributes:
        peak_bytes: set when the block ends.
        reserved_bytes: CUDA only, else None.
        start_bytes: CUDA only: what was allocated when the block began.
        outside_bytes: CUDA only: what is used of the device beside the allocator when the block ends
            (context, code of kernels, libraries; other processes on the device too).
        host_peak_bytes: the process's resident memory at its highest within the block, where the
            system tells; for `host_mode` ``rss_lifetime``, since the process began.
        mode: ``cuda_allocator``, ``rss_high_water``, ``rss_sampled`` or ``rss_lifetime``.
        note: the same in words.
    """

    def __init__(self, device: torch.device | str, since: PeakMemory | None = None) -> None:
        self.device = torch.device(device)
        self._since = since
        self.peak_bytes = 0
        self.reserved_bytes: int | None = None
        self.mode = "cuda_allocator" if self.device.type == "cuda" else ""
        self.note = "peak allocated on the device, weights included" if self.mode else ""
        self.start_bytes = 0
        self.outside_bytes: int | None = None
        self.host_peak_bytes = 0
        self.host_mode = ""
        self._start_bytes = 0
        self._sampler: _ResidentSampler | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start_bytes = torch.cuda.memory_allocated(self.device)
            self.host_mode = "rss_high_water" if _reset_high_water() else "rss_lifetime"
        else:
            _return_free_heap()
            self._start_resident()
            if self._since is not None:
                self._start_bytes = self._since._start_bytes
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
            self.reserved_bytes = torch.cuda.max_memory_reserved(self.device)
            free, total = torch.cuda.mem_get_info(self.device)
            self.outside_bytes = max(0, total - free - torch.cuda.memory_reserved(self.device))
            self.host_peak_bytes = _high_water_bytes()
        else:
            self.host_peak_bytes = self._peak_resident_bytes()
            self.peak_bytes = max(0, self.host_peak_bytes - self._start_bytes)

    def _start_resident(self) -> None:
        growth = "growth of the process's resident memory"
        if _reset_high_water():
            self.mode, self.note = "rss_high_water", f"{growth} (kernel's high-water mark)"
            self._start_bytes = _high_water_bytes()
        elif _STATM.exists():
            self.mode, self.note = "rss_sampled", f"{growth} (sampled every millisecond)"
            self._start_bytes = _resident_bytes()
            self._sampler = _ResidentSampler()
            self._sampler.start()
        else:
            self.mode = "rss_lifetime"
            self.note = f"{growth} over its peak so far: a lower bound on this system"
            self._start_bytes = _lifetime_peak_bytes()
        self.host_mode = self.mode

    def _peak_resident_bytes(self) -> int:
        if self.mode == "rss_high_water":
            return _high_water_bytes()
        if self._sampler is not None:
            return self._sampler.stop()
        return _lifetime_peak_bytes()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the unique storages of all parameters and buffers.

    Tied weights and views count once. Non-persistent buffers (rotary frequencies, packed copies)
    count too: they occupy memory although they are not in a checkpoint. Tensors kept in plain
    attributes do not count; what a method stores belongs into parameters or buffers.
    """
    parameters = (tensor for _, tensor in model.named_parameters(remove_duplicate=False))
    buffers = (tensor for _, tensor in model.named_buffers(remove_duplicate=False))
    return storage_bytes((*parameters, *buffers))


def kv_cache_bytes_per_token(
    model: nn.Module, info: ModelInfo, device: torch.device, dtype: torch.dtype
) -> tuple[float, str | None]:
    """Bytes that one more token of one sequence adds to the cache, and a note where it stops growing.

    Measured: the model runs with its own growing cache at two lengths and the difference of the
    cache's bytes is divided by that of the lengths. A window shorter than those lengths limits them,
    so that the growth before the limit is what is measured.

    Raises:
        NotApplicable: an encoder, a model without a cache, a window of one token.
    """
    if info.kind == "encoder":
        raise NotApplicable(f"{info.label} is an encoder: it keeps no cache")
    window = _window(model)
    # A window of w tokens needs the w-1 before the current one, so growth shows below that.
    longest = min(info.max_positions, _CACHE_LENGTHS[1], (window or sys.maxsize) - 1)
    shortest = min(_CACHE_LENGTHS[0], longest // 2)
    if shortest < 1:
        raise NotApplicable("the model's window or number of positions is too short for a cache")
    held = {length: _cache_bytes(model, length, device) for length in (shortest, longest)}
    growth = (held[longest] - held[shortest]) / (longest - shortest)
    if growth == 0:
        kept = str(dtype).removeprefix("torch.")
        return 0.0, f"a fixed state of {held[longest]} B per sequence ({kept} model)"
    if window is not None:
        return growth, f"layers with a window stop growing at {window} tokens"
    beyond = min(info.max_positions, _CACHE_LENGTHS[2])
    if beyond > longest:
        further = (_cache_bytes(model, beyond, device) - held[longest]) / (beyond - longest)
        if further < 0.9 * growth:
            return growth, f"at {longest} tokens; beyond it grows more slowly ({further:.1f} B/token)"
    return growth, None


def _window(model: nn.Module) -> int | None:
    """The fewest tokens that any layer's cache is limited to; None where all grow without limit."""
    from harness.nn.ring_cache import ring_size

    config = getattr(model, "config", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    limits = [ring_size(kind) for kind in kinds]
    if not kinds or "sliding_attention" in kinds:
        limits.append(getattr(config, "sliding_window", None))
    return min((int(limit) for limit in limits if limit), default=None)


@torch.inference_mode()
def _cache_bytes(model: nn.Module, length: int, device: torch.device) -> int:
    tokens = torch.zeros(1, length, dtype=torch.int64, device=device)
    output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=True)
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise NotApplicable("the model returns no cache")
    # By elements, not by storage: a window's cache is a view of a larger tensor that lives until the
    # next step only.
    return bytes_per_tensor(tensor for tensor in tensors_in(cache) if tensor.numel() > 1)


# --- resident memory of the process -------------------------------------------------------------


class _ResidentSampler(threading.Thread):
    """Follows the resident size of the process; for systems where its peak cannot be reset."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="resident-memory-sampler")
        self._done = threading.Event()
        self._peak_bytes = 0

    def run(self) -> None:
        while not self._done.wait(_SAMPLE_EVERY_S):
            self._peak_bytes = max(self._peak_bytes, _resident_bytes())

    def stop(self) -> int:
        self._done.set()
        self.join()
        return max(self._peak_bytes, _resident_bytes())


def _return_free_heap() -> None:
    """Give freed memory back to the system, so that using it again shows as growth."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc only
        trim(0)


def _reset_high_water() -> bool:
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _high_water_bytes() -> int:
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return _lifetime_peak_bytes()


def _resident_bytes() -> int:
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _lifetime_peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
