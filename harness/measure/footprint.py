"""The meters of memory: stored weights, peaks of prefill and decode, cache per token."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import nn

from harness.errors import NotApplicable
from harness.measure.generation import Generation, forward_only, random_prompt
from harness.measure.memory import PeakMemory, kv_cache_bytes_per_token, weight_bytes
from harness.measure.memory_split import MemorySplit, bytes_on, split_of, split_records, weight_tensors
from harness.measure.meter import Measured
from harness.measure.storage import storage_bytes, tensors_in
from harness.measure.workload import cache_of, work_of
from harness.records import Record

__all__ = ["cache_per_token", "decode_peak", "prefill_peak", "stored_weights"]

_SHARED = "peak_memory"
_DECODE_STEPS = 2  # the second step reuses what the first allocated


def stored_weights(measured: Measured) -> list[Record]:
    """Bytes of all parameters and buffers, tied ones once; on a GPU also those left on the host."""
    records = [Record("weight_bytes", weight_bytes(measured.model), "B")]
    if measured.device.type == "cuda":
        on_host = bytes_on(weight_tensors(measured.model), "cpu")
        records.append(Record("host_weight_bytes", on_host, "B"))
    return records


def cache_per_token(measured: Measured) -> list[Record]:
    """Bytes that one more token of one sequence adds to the cache."""
    value, note = kv_cache_bytes_per_token(
        measured.model.eval(), measured.info, measured.device, measured.dtype
    )
    return [Record("kv_cache_bytes_per_token", value, "B/token", note=note)]


def prefill_peak(measured: Measured) -> list[Record]:
    """Peak bytes while the prompt is processed, and what they consist of."""
    return _records("prefill", _peaks(measured).prefill)


def decode_peak(measured: Measured) -> list[Record]:
    """Peak bytes while tokens are generated, and what they consist of."""
    if measured.scenario.new_tokens == 0:
        raise NotApplicable(f"{measured.scenario.label} decodes nothing")
    decode = _peaks(measured).decode
    assert decode is not None
    return _records("decode", decode)


@dataclass(frozen=True, slots=True)
class _Phase:
    memory: PeakMemory
    split: MemorySplit


@dataclass(frozen=True, slots=True)
class _Peaks:
    prefill: _Phase
    decode: _Phase | None


def _records(phase: str, measured: _Phase) -> list[Record]:
    memory = measured.memory
    records = [Record(f"{phase}_peak_bytes", memory.peak_bytes, "B", mode=memory.mode, note=memory.note)]
    if memory.reserved_bytes is not None:
        records.append(Record(f"{phase}_reserved_bytes", memory.reserved_bytes, "B", mode=memory.mode))
    return records + split_records(phase, measured.split, memory)


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
    # One run first: workspaces of libraries and compiled kernels are made once and belong to no phase.
    work_of(measured)
    if "torch._dynamo" in sys.modules:  # it ran what may be compiled as it was written
        _warm_up(model, prompt, measured.info.kind)
    weights = bytes_on(weight_tensors(model), device)
    if measured.info.kind == "encoder":
        with PeakMemory(device) as memory:
            forward_only(model, prompt)
        lasting = max(0, memory.start_bytes - weights)
        return _Peaks(_Phase(memory, split_of(memory, weights, 0, lasting)), None)
    with PeakMemory(device) as prefill:
        generation = Generation(model, prompt, scenario.new_tokens)
        generation.prefill()
    lasting = max(0, prefill.start_bytes - weights)
    first = _Phase(prefill, split_of(prefill, weights, _cache_bytes(generation), lasting))
    if scenario.new_tokens == 0:
        return _Peaks(first, None)
    with PeakMemory(device, since=prefill) as decode:
        for _ in range(min(_DECODE_STEPS, scenario.new_tokens)):
            generation.step()
    return _Peaks(first, _Phase(decode, split_of(decode, weights, _cache_bytes(generation), lasting)))


def _warm_up(model: nn.Module, prompt: torch.Tensor, kind: str) -> None:
    if kind == "encoder":
        forward_only(model, prompt)
        return
    generation = Generation(model, prompt, 1)
    generation.prefill()
    generation.step()


def _cache_bytes(generation: Generation) -> int:
    """Bytes of everything that the cache holds, on whatever device."""
    return storage_bytes(tensors_in(cache_of(generation)))
