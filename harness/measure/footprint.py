"""The meters of memory: stored weights, peaks of prefill and decode, cache per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harness.errors import NotApplicable
from harness.measure.generation import Generation, forward_only, random_prompt
from harness.measure.memory import PeakMemory, kv_cache_bytes_per_token, weight_bytes
from harness.measure.meter import Measured
from harness.records import Record

__all__ = ["cache_per_token", "decode_peak", "prefill_peak", "stored_weights"]

_SHARED = "peak_memory"
_DECODE_STEPS = 2  # the second step reuses what the first allocated


def stored_weights(measured: Measured) -> list[Record]:
    """Bytes of all parameters and buffers, tied ones once."""
    return [Record("weight_bytes", weight_bytes(measured.model), "B")]


def cache_per_token(measured: Measured) -> list[Record]:
    """Bytes that one more token of one sequence adds to the cache."""
    value, note = kv_cache_bytes_per_token(
        measured.model.eval(), measured.info, measured.device, measured.dtype
    )
    return [Record("kv_cache_bytes_per_token", value, "B/token", note=note)]


def prefill_peak(measured: Measured) -> list[Record]:
    """Peak bytes while the prompt is processed."""
    return _records("prefill", _peaks(measured).prefill)


def decode_peak(measured: Measured) -> list[Record]:
    """Peak bytes while tokens are generated."""
    if measured.scenario.new_tokens == 0:
        raise NotApplicable(f"{measured.scenario.label} decodes nothing")
    decode = _peaks(measured).decode
    assert decode is not None
    return _records("decode", decode)


@dataclass(frozen=True, slots=True)
class _Peaks:
    prefill: PeakMemory
    decode: PeakMemory | None


def _records(phase: str, memory: PeakMemory) -> list[Record]:
    records = [Record(f"{phase}_peak_bytes", memory.peak_bytes, "B", mode=memory.mode, note=memory.note)]
    if memory.reserved_bytes is not None:
        records.append(Record(f"{phase}_reserved_bytes", memory.reserved_bytes, "B", mode=memory.mode))
    return records


def _peaks(measured: Measured) -> _Peaks:
    """Measured once a cell, eagerly: the memory pools of CUDA graphs would hide what a phase needs."""
    if _SHARED not in measured.shared:
        measured.shared[_SHARED] = _measure_peaks(measured)
    peaks = measured.shared[_SHARED]
    assert isinstance(peaks, _Peaks)
    return peaks


def _measure_peaks(measured: Measured) -> _Peaks:
    model, scenario, device = measured.model.eval(), measured.scenario, measured.device
    prompt = random_prompt(
        measured.info.vocab_size, scenario.batch_size, scenario.prompt_len, measured.seed, device
    )
    if measured.info.kind == "encoder":
        forward_only(model, prompt)
        with PeakMemory(device) as memory:
            forward_only(model, prompt)
        return _Peaks(memory, None)
    _warm_up(model, prompt)
    with PeakMemory(device) as prefill:
        generation = Generation(model, prompt, scenario.new_tokens)
        generation.prefill()
    if scenario.new_tokens == 0:
        return _Peaks(prefill, None)
    with PeakMemory(device, since=prefill) as decode:
        for _ in range(min(_DECODE_STEPS, scenario.new_tokens)):
            generation.step()
    return _Peaks(prefill, decode)


def _warm_up(model: torch.nn.Module, prompt: torch.Tensor) -> None:
    """Workspaces of libraries and compiled kernels are made once and belong to no phase."""
    generation = Generation(model, prompt, 1)
    generation.prefill()
    generation.step()
