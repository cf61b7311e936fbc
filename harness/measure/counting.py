"""What layers count while they run, as records.

A layer that decides by its data what it does keeps a buffer `counters` (int64, on its device, no part of
the state), `reset_counters()`, and a static `count_records(totals)` that says in records what the sums
over all layers of its class mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from harness.records import Record

__all__ = ["count_records", "reset_counters"]


def reset_counters(model: nn.Module) -> None:
    """Let all layers begin to count anew."""
    for layer in _counting(model):
        layer.reset_counters()


def count_records(model: nn.Module) -> tuple[Record, ...]:
    """What was counted since `reset_counters`; nothing for a model whose layers do not count."""
    by_class: dict[Any, list[torch.Tensor]] = {}
    for layer in _counting(model):
        by_class.setdefault(type(layer), []).append(layer.counters)
    return tuple(
        record
        for kind, counters in by_class.items()
        for record in kind.count_records(torch.stack(counters).sum(0))
    )


def _counting(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(type(module), "count_records")]
