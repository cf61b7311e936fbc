"""The batch size at which two methods break even, from the stored cells of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from harness.comparability import Difference
from harness.comparing.cells import cells_of
from harness.comparing.crossings import crossings, crossings_in_words
from harness.comparing.growth import Axis, shape_of
from harness.errors import ConfigError, UnknownName
from harness.scaling import BreakEven
from harness.store.store import Store

__all__ = ["BreakEvenRow", "break_even_batches"]


@dataclass(frozen=True)
class BreakEvenRow:
    """One crossing, or its absence, of one metric of two methods at one prompt length, on one device.

    `ratios` are the measured b/a by batch size (below 1: b is faster) with their `intervals` (95 %), and
    `bases` what each rests on.
    """

    model: str
    method_a: str
    method_b: str
    metric: str
    prompt_len: int
    new_tokens: int
    seed: int
    dtype: str
    device: str
    found: BreakEven
    ratios: dict[int, float]
    bases: dict[int, str]
    flags: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()
    intervals: Mapping[int, tuple[float, float] | tuple[None, None]] = field(default_factory=dict)

    @property
    def says(self) -> str:
        """In words: where b is the faster one."""
        return crossings_in_words(self.found, self.ratios, self.method_b, intervals=self.intervals)


def break_even_batches(
    store: Store, a: str, others: Sequence[str], models: Sequence[str] | None = None
) -> list[BreakEvenRow]:
    """Where each of the others stops or starts being faster than `a`, for every model, prompt length, seed,
    type and device.

    Raises:
        UnknownName: a method that the store has no rows of.
        ConfigError: no two batch sizes at one prompt length that both were timed at.
    """
    cells = [cell for cell in cells_of(store, models) if shape_of(cell.label) is not None]
    known = sorted({cell.method for cell in cells})
    for name in (a, *others):
        if name not in known:
            raise UnknownName("timed method in this store:", name, known)
    mine = [cell for cell in cells if cell.method == a]
    rows = [
        BreakEvenRow(
            model=each.model, method_a=a, method_b=b, metric=each.metric, prompt_len=each.fixed,
            new_tokens=each.new_tokens, seed=each.seed, dtype=each.dtype, device=each.device,
            found=each.found, ratios=each.ratios, bases=each.bases, flags=each.flags,
            differences=each.differences, intervals=each.intervals,
        )
        for b in others
        for each in crossings(mine, [cell for cell in cells if cell.method == b], Axis.BATCH_SIZE)
    ]  # fmt: skip
    if not rows:
        raise ConfigError(
            f"{a} and {', '.join(others)} were not both timed at two batch sizes and one prompt length: "
            "sweep both with --batch-sizes 1,8,64"
        )
    return rows
