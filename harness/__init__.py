"""Measure latency, memory and accuracy of every way to make a Transformer cheaper.

The names a plugin needs; everything else is imported from its module. Nothing here imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.errors import (
    ConfigError,
    HarnessError,
    MissingExtra,
    NotApplicable,
    NumericalFailure,
    PluginError,
    StoreError,
    UnknownName,
)

if TYPE_CHECKING:
    from harness.context import Context
    from harness.evaluate.task import TaskSource
    from harness.hookspecs import hookimpl
    from harness.measure.meter import Meter
    from harness.method import Method, Options, Paper
    from harness.models.info import ModelInfo
    from harness.models.registry import ModelEntry
    from harness.records import Record

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "Context",
    "HarnessError",
    "Meter",
    "Method",
    "MissingExtra",
    "ModelEntry",
    "ModelInfo",
    "NotApplicable",
    "NumericalFailure",
    "Options",
    "Paper",
    "PluginError",
    "Record",
    "StoreError",
    "TaskSource",
    "UnknownName",
    "hookimpl",
]

_LAZY = {
    "Context": "harness.context",
    "Meter": "harness.measure.meter",
    "Method": "harness.method",
    "ModelEntry": "harness.models.registry",
    "ModelInfo": "harness.models.info",
    "Options": "harness.method",
    "Paper": "harness.method",
    "Record": "harness.records",
    "TaskSource": "harness.evaluate.task",
    "hookimpl": "harness.hookspecs",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'harness' has no attribute {name!r}")
