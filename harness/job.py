"""What crosses the border between the parent and a worker, as plain picklable values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.evaluate.index import ResolvedTask
from harness.models.loading import ModelDescription
from harness.records import CellKind, CellResult, Scenario, VariantReport

__all__ = ["Budget", "CellJob", "Message", "OutOfDisk", "Phase", "Progress", "VariantJob"]


@dataclass(frozen=True, slots=True)
class Budget:
    """What methods may spend, the same for all: calibration, training, and the text of both.

    `text` is the file that the user named, or None for the bundled default.
    """

    calibration_samples: int
    calibration_len: int
    train_steps: int
    train_batch_size: int
    train_len: int
    text: Path | None
    text_hash: str

    def identity(self) -> dict[str, dict[str, Any]]:
        """What the values of calibrated and trained cells depend on."""
        return {
            "calibration": {
                "samples": self.calibration_samples,
                "len": self.calibration_len,
                "text": self.text_hash,
            },
            "training": {
                "steps": self.train_steps,
                "batch_size": self.train_batch_size,
                "len": self.train_len,
                "text": self.text_hash,
            },
        }


@dataclass(frozen=True, slots=True)
class CellJob:
    """One cell that a worker measures."""

    key: str
    kind: CellKind
    task: ResolvedTask | None
    scenario: Scenario | None


@dataclass(frozen=True)
class VariantJob:
    """Everything a fresh process needs to make a variant and measure its cells.

    The chain travels as names and options, not as functions: the worker loads the plugins itself. `sources`
    are the hashes of its methods' sources, by which it knows that they are those that the keys count.
    """

    variant_key: str
    label: str
    chain: tuple[tuple[str, Mapping[str, Any]], ...]
    model: ModelDescription
    seed: int
    dtype: str
    device: str
    cells: tuple[CellJob, ...]
    plugins: tuple[str, ...]
    budget: Budget
    limit: int | None
    eval_batch_size: int
    cache_dir: Path
    threads: int
    environment: Mapping[str, Any]
    together: bool = True  # score the task cells in one pass; off after a worker died doing so
    sources: tuple[str, ...] = ()
    ceilings: Mapping[str, Any] | None = None  # of the device, as the sweep's manifest stores them


@dataclass(frozen=True, slots=True)
class Phase:
    """A worker starts something that has its own time limit: ``transform`` or a cell's key.

    What serves several `cells` at once may take as long as all of them, and loses none of them.
    """

    name: str
    cells: int = 1


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the current phase is."""

    what: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class OutOfDisk:
    """The worker cannot write to the cache: the sweep has to end."""

    reason: str


Message = Phase | Progress | VariantReport | CellResult | OutOfDisk
