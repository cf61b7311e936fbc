"""The values that only the store knows: what describes a variant, and what is already done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.records import Status

__all__ = ["FinishedCell", "VariantRow"]


@dataclass(frozen=True, slots=True)
class FinishedCell:
    """The newest cell of a key, whatever its status."""

    id: int
    key: str
    status: Status
    reason: str | None


@dataclass(frozen=True, slots=True)
class VariantRow:
    """A variant as it is stored.

    Args:
        key: the content hash that identifies it.
        model, model_identity: as the user wrote it, and the hash or revision behind the label.
        method: the chain as the user wrote it (``gptq:bits=3``, ``smoothquant+gptq``).
        chain: one ``{"name": ..., "options": {...}}`` per step, with all options, canonical.
        synthetic: random weights, so only speed and memory mean anything.
        simulated: None until the effect has been measured.
    """

    key: str
    model: str
    model_identity: str
    method: str
    chain: Sequence[Mapping[str, Any]]
    family: str
    seed: int
    dtype: str
    device: str
    device_name: str
    synthetic: bool
    model_info: Mapping[str, Any]
    simulated: bool | None = None
