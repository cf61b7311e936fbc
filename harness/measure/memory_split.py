"""The peak of a phase, split into weights, KV cache, activations and workspace.

On a GPU the parts are exact and add up to what the process holds of the device at the peak:

===============  ==============================================================================
part             what it is
===============  ==============================================================================
weights          the storages of all parameters and buffers on the device
KV cache         the storages of the cache, as it is allocated
activations      what else the allocator had handed out at the peak: activations, gradients,
                 temporary copies, dequantized weights
workspace        what serves no tensor of the phase: allocations that last (workspaces of
                 libraries), memory the allocator took and did not hand out, and all that is used
                 beside it (CUDA context, code of kernels, libraries)
===============  ==============================================================================

On the CPU the device is the host: weights and cache are counted in the same way, the rest of the growth
is activations and workspace together, because the heap does not tell them apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from harness.measure.memory import PeakMemory
from harness.measure.storage import storage_bytes
from harness.records import Record

__all__ = ["MemorySplit", "bytes_on", "split_of", "split_records", "weight_tensors"]


@dataclass(frozen=True, slots=True)
class MemorySplit:
    """Bytes by part; `workspace` is None where it cannot be told from the activations."""

    weights: int
    kv_cache: int
    activations: int
    workspace: int | None = None
    note: str | None = None

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations + (self.workspace or 0)


def split_of(memory: PeakMemory, weights: int, kv_cache: int, lasting: int = 0) -> MemorySplit:
    """Split what `memory` measured.

    Args:
        weights: bytes of the weights on the device.
        kv_cache: bytes of the cache on the device.
        lasting: allocated before the phase and by neither weights nor cache (CUDA).
    """
    if memory.reserved_bytes is None or memory.outside_bytes is None:
        rest = max(0, memory.peak_bytes - kv_cache)
        note = "activations and workspace together: growth of the resident memory without the cache"
        return MemorySplit(weights, kv_cache, rest, None, note)
    activations = max(0, memory.peak_bytes - weights - kv_cache - lasting)
    spare = max(0, memory.reserved_bytes - memory.peak_bytes)
    note = (
        f"{_mib(lasting)} lasting in the allocator, {_mib(spare)} reserved and not allocated, "
        f"{_mib(memory.outside_bytes)} beside the allocator (context, libraries, other processes)"
    )
    return MemorySplit(weights, kv_cache, activations, lasting + spare + memory.outside_bytes, note)


def split_records(phase: str, split: MemorySplit, memory: PeakMemory) -> list[Record]:
    """``<phase>_weight_bytes`` and so on; a part that cannot be told is left out, and its note says so."""
    rest_note = split.note if split.workspace is None else None
    records = [
        Record(f"{phase}_weight_bytes", split.weights, "B"),
        Record(f"{phase}_kv_cache_bytes", split.kv_cache, "B"),
        Record(f"{phase}_activation_bytes", split.activations, "B", mode=memory.mode, note=rest_note),
    ]
    if split.workspace is not None:
        records.append(
            Record(f"{phase}_workspace_bytes", split.workspace, "B", mode=memory.mode, note=split.note)
        )
    note = "resident memory of the whole process at its highest within the phase"
    if memory.host_mode == "rss_lifetime":
        note = "resident memory of the whole process at its highest since it began: an upper bound"
    records.append(
        Record(f"{phase}_host_peak_bytes", memory.host_peak_bytes, "B", mode=memory.host_mode, note=note)
    )
    return records


def weight_tensors(model: nn.Module) -> list[torch.Tensor]:
    """All parameters and buffers, tied ones under each name."""
    parameters = [tensor for _, tensor in model.named_parameters(remove_duplicate=False)]
    return parameters + [tensor for _, tensor in model.named_buffers(remove_duplicate=False)]


def bytes_on(tensors: Iterable[torch.Tensor], device: torch.device | str) -> int:
    """Bytes of the unique storages that are on a kind of device (``cuda``, ``cpu``)."""
    kind = torch.device(device).type
    return storage_bytes(tensor for tensor in tensors if tensor.device.type == kind)


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
