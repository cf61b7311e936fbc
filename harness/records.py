"""What a sweep produces, as frozen values.

These cross the process border (worker to parent) and are what the store writes. Nothing here imports
torch, so the command line and the dashboard read them cheaply.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

__all__ = [
    "CellKind",
    "CellResult",
    "Item",
    "KernelUse",
    "ModuleEffect",
    "Record",
    "Scenario",
    "Status",
    "VariantReport",
]


class Status(StrEnum):
    """How a cell ended. A cell of a sweep always has exactly one of these."""

    OK = "ok"
    NOT_APPLICABLE = "not_applicable"
    NO_EFFECT = "no_effect"
    FAILED = "failed"
    OOM = "oom"
    TIMEOUT = "timeout"
    CRASHED = "crashed"
    SKIPPED = "skipped"

    @property
    def is_failure(self) -> bool:
        """True where the cell should have worked and did not: such a sweep exits with 1."""
        return self in _FAILURES


_FAILURES = frozenset({Status.FAILED, Status.OOM, Status.TIMEOUT, Status.CRASHED})


class CellKind(StrEnum):
    """What a cell asks of its variant."""

    TRANSFORM = "transform"  # what the transform cost and what it changed
    SCENARIO = "scenario"  # how fast and how large
    TASK = "task"  # how good


@dataclass(frozen=True, slots=True, order=True)
class Scenario:
    """The shape of a timed run. For encoders `new_tokens` is 0: there is nothing to decode.

    >>> Scenario(1, 512, 64).label
    'b1-p512-g64'
    """

    batch_size: int
    prompt_len: int
    new_tokens: int

    @property
    def label(self) -> str:
        return f"b{self.batch_size}-p{self.prompt_len}-g{self.new_tokens}"


@dataclass(frozen=True, slots=True)
class Record:
    """One measured value.

    `lower` and `upper` bound a 95 % interval where one can be given, `n` is the number of readings or
    items behind the value, `samples` the raw readings (may be empty), `mode` how it was taken
    (``graph``, ``eager``, ``simulated`` ...), `note` why, in words.
    """

    metric: str
    value: float
    unit: str
    lower: float | None = None
    upper: float | None = None
    n: int = 1
    samples: tuple[float, ...] = ()
    mode: str | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """The outcome of one item of a task, so that comparisons can be paired.

    `metric` names what `outcome` is (``acc``: 0 or 1; ``nll``: nats), `index` is the item's place in
    the task's documents, `detail` whatever explains it (log-likelihoods of the choices, group).
    """

    index: int
    metric: str
    outcome: float
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class KernelUse:
    """A kernel that ran in one prefill or one decode step (on the CPU: an operator).

    `phase` is ``prefill`` or ``decode``, `family` what the kernel does
    (`harness.measure.kernel_names`), `seconds` its time in all `calls` together, `share` that time over
    the time of all kernels of the phase.
    """

    phase: str
    name: str
    family: str
    calls: int
    seconds: float
    share: float


@dataclass(frozen=True, slots=True)
class ModuleEffect:
    """What a transform did to one module, measured on the module itself.

    `kind` is the class now in place, `stored_bits_per_weight` counts scales, zeros and indices,
    `sparsity` is the share of exact zeros, `nm_pattern` such as ``2:4`` where it holds in every group.
    """

    module: str
    kind: str
    changed: bool
    dtype: str
    parameters: int
    bytes_before: int
    bytes_after: int
    stored_bits_per_weight: float | None = None
    sparsity: float | None = None
    nm_pattern: str | None = None
    simulated: bool = False
    kernel: str | None = None


@dataclass(frozen=True, slots=True)
class VariantReport:
    """What a worker found when it made a variant: sent once, before any cell."""

    variant_key: str
    effects: tuple[ModuleEffect, ...] = ()
    simulated: bool = False


@dataclass(frozen=True, slots=True)
class CellResult:
    """A finished cell: what is written, in one transaction, before the next cell starts."""

    key: str
    variant_key: str
    status: Status
    reason: str | None = None
    records: tuple[Record, ...] = ()
    items: tuple[Item, ...] = ()
    kernels: tuple[KernelUse, ...] = ()
    traceback: str | None = None
    log_tail: str | None = None
    started_at: str = ""  # ISO 8601, UTC
    seconds: float = 0.0
