"""What a claim of the survey is: a sentence, its source, the grid it needs, and how rows decide it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness.config import SweepConfig
from harness.errors import ConfigError

if TYPE_CHECKING:
    from harness.claims.decision import Decision
    from harness.claims.evidence import Evidence, StoredCell

__all__ = ["DEVICES", "SECTIONS", "Claim", "SweepNeed", "section_place"]

SECTIONS = (
    "distillation",
    "post-training quantization",
    "quantization-aware training",
    "pruning",
    "sparsity",
    "attention",
    "hardware",
)
"""The survey's own order. A plugin may name another section; it comes after these, by name."""

DEVICES = ("cpu", "cuda")
_ID = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")


@dataclass(frozen=True)
class SweepNeed:
    """A grid that a claim needs, in the terms of a sweep.

    Methods are written as tables show them (``rtn:bits=8``, not ``rtn:group_size=-1:bits=8``), which is how
    rows are found; the baseline need not be named.

    Args:
        limit: items a task at least; None means all of them.
        train_steps, calibration_samples and the like: the budget; None means a sweep's default.
        making_s, cell_s: what making a variant (its process, training) and measuring one of its cells take
            on two idle CPU cores, in seconds; an estimate until the store knows better.
    """

    models: tuple[str, ...]
    methods: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    prompt_lens: tuple[int, ...] = ()
    batch_sizes: tuple[int, ...] = (1,)
    new_tokens: int = 16
    seeds: tuple[int, ...] = (0,)
    limit: int | None = None
    dtype: str = "auto"
    train_steps: int | None = None
    train_batch_size: int | None = None
    train_len: int | None = None
    calibration_samples: int | None = None
    calibration_len: int | None = None
    making_s: float = 6.0
    cell_s: float = 8.0

    @property
    def scenarios(self) -> frozenset[str]:
        """The labels of its timed shapes; an encoder's decode nothing."""
        return frozenset(
            f"b{batch}-p{prompt}-g{new}"
            for batch in self.batch_sizes
            for prompt in self.prompt_lens
            for new in (self.new_tokens, 0)
        )

    def settings(self) -> dict[str, Any]:
        """The options of a sweep, without models and methods."""
        values: dict[str, Any] = {
            "tasks": self.tasks,
            "prompt_lens": self.prompt_lens,
            "batch_sizes": self.batch_sizes,
            "new_tokens": self.new_tokens,
            "seeds": self.seeds,
            "limit": self.limit,
            "dtype": self.dtype,
        }
        for name in (
            "train_steps", "train_batch_size", "train_len", "calibration_samples", "calibration_len",
        ):  # fmt: skip
            if getattr(self, name) is not None:
                values[name] = getattr(self, name)
        return values

    def accepts(self, cell: StoredCell) -> bool:
        """Whether a stored cell is one of this grid, on enough items and with the budget that it names."""
        if cell.model not in self.models or cell.seed not in self.seeds:
            return False
        if cell.method not in self.methods and not cell.is_baseline:
            return False
        if cell.task is not None and cell.task not in self.tasks:
            return False
        if cell.scenario is not None and cell.scenario not in self.scenarios:
            return False
        trained = {"steps": self.train_steps, "batch_size": self.train_batch_size, "len": self.train_len}
        calibrated = {"samples": self.calibration_samples, "len": self.calibration_len}
        return (
            _is_enough(cell.limit, self.limit)
            and _is_spent_as_asked(cell, cell.training, trained, "train")
            and _is_spent_as_asked(cell, cell.calibration, calibrated, "calibration")
        )


def _is_spent_as_asked(
    cell: StoredCell, spent: Mapping[str, str] | None, asked: Mapping[str, int | None], of: str
) -> bool:
    """Whether a budget (None where nothing of it was spent) is the one that is asked for.

    Args:
        asked: None is for a score what a sweep spends by default, and anything where the device decides
            that; times and sizes do not depend on it.
        of: what the options of a sweep for it begin with.
    """
    wanted = dict(asked)
    if cell.task is not None:
        fields = SweepConfig.model_fields
        wanted |= {name: fields[f"{of}_{name}"].default for name, n in asked.items() if n is None}
    return spent is None or all(
        spent.get(name) == str(value) for name, value in wanted.items() if value is not None
    )


def _is_enough(limit: int | None, wanted: int | None) -> bool:
    return limit is None or (wanted is not None and limit >= wanted)


@dataclass(frozen=True)
class Claim:
    """A claim that rows of a store decide.

    Args:
        id: lower-case words with hyphens, unique over all plugins.
        section: one of `SECTIONS`, or a plugin's own.
        says: the sentence, in the harness's own words.
        source: paper, table or figure.
        methods: the names of the methods that it is about.
        sweep: the grids that it needs.
        decide: from the evidence to a decision. It reads rows and nothing else, so it can be asked without
            running anything; see `harness.claims.deciding` for what it is made of.
        where: the kinds of devices on which it can be decided.
        scale: at which size it is decided here, and what that leaves open.

    Raises:
        ConfigError: an empty field, an id that is none, a device that does not exist.
    """

    id: str
    section: str
    says: str
    source: str
    methods: tuple[str, ...]
    sweep: tuple[SweepNeed, ...]
    decide: Callable[[Evidence], Decision] = field(repr=False)
    where: tuple[str, ...] = ("cpu", "cuda")
    scale: str = ""

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id):
            raise ConfigError(f"claim {self.id!r}: an id is lower-case words with hyphens between them")
        for name in ("section", "says", "source"):
            if not str(getattr(self, name)).strip():
                raise ConfigError(f"claim {self.id}: {name} is empty")
        for name in ("methods", "sweep", "where"):
            if not getattr(self, name):
                raise ConfigError(f"claim {self.id}: {name} is empty")
        if unknown := sorted(set(self.where) - set(DEVICES)):
            raise ConfigError(
                f"claim {self.id}: where must be some of {', '.join(DEVICES)}, not {unknown[0]}"
            )


def section_place(section: str) -> tuple[int, str]:
    """Where a section stands: the survey's in its order, a plugin's own after them, by name."""
    return (SECTIONS.index(section), "") if section in SECTIONS else (len(SECTIONS), section)
