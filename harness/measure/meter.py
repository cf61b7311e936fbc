"""A meter measures one thing about a variant in a scenario."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.records import Record, Scenario

if TYPE_CHECKING:
    import torch
    from torch import nn

    from harness.models.info import ModelInfo

__all__ = ["Measured", "Meter"]


@dataclass(frozen=True)
class Measured:
    """What a meter gets: the very object that is also scored, and the shape to run it in.

    `shared` is one dict per cell in which meters leave what others can use: under ``records`` is what the
    meters before this one measured, by metric, under ``ceilings`` what the device can do at most.
    """

    model: nn.Module
    info: ModelInfo
    scenario: Scenario
    device: torch.device
    dtype: torch.dtype
    seed: int
    shared: dict[str, Any]
    baseline: Callable[[], nn.Module] | None = None
    baseline_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Meter:
    """A registered measurement.

    Args:
        name: unique over all plugins.
        measure: returns the records; raises `NotApplicable` where it does not fit.
        kinds: the kinds of model it fits.
        better: ``lower`` or ``higher``, for tables and charts.
    """

    name: str
    measure: Callable[[Measured], Iterable[Record]]
    kinds: tuple[str, ...] = ("decoder", "encoder")
    better: str = "lower"
