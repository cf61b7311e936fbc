"""The batch size at which two methods break even, from the stored cells of both."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from harness.comparability import Difference, Scope
from harness.comparing.cells import Cell, cells_of
from harness.comparing.matching import pairs_of
from harness.comparing.ratios import TimingRatio, timing_ratio
from harness.errors import ConfigError, UnknownName
from harness.scaling import BreakEven, Point, break_even
from harness.store.store import Store

__all__ = ["BreakEvenRow", "break_even_batches", "shape_of"]

METRICS = ("prefill_latency", "decode_latency", "end_to_end_latency")
_SHAPE = re.compile(r"^b(\d+)-p(\d+)-g(\d+)$")


@dataclass(frozen=True)
class BreakEvenRow:
    """One crossing, or its absence, of one metric of two methods at one prompt length.

    `ratios` are the measured b/a by batch size (below 1: b is faster) and `bases` what each rests on.
    """

    model: str
    method_a: str
    method_b: str
    metric: str
    prompt_len: int
    new_tokens: int
    found: BreakEven
    ratios: dict[int, float]
    bases: dict[int, str]
    flags: tuple[str, ...] = ()
    differences: tuple[Difference, ...] = ()

    @property
    def says(self) -> str:
        """In words: where b is the faster one."""
        found, b = self.found, self.method_b
        if found.outcome == "crosses":
            side = "below" if found.better_below else "above"
            return f"{b} is faster {side} it"
        ratios = self.ratios.values()
        sizes = f"{found.smallest:g} to {found.largest:g}"
        if all(ratio == 1 for ratio in ratios):
            return f"equally fast at every measured batch size ({sizes})"
        return f"{b} is {'faster' if max(ratios) <= 1 else 'slower'} at every measured batch size ({sizes})"


def shape_of(label: str) -> tuple[int, int, int] | None:
    """Batch size, prompt length and new tokens of a scenario's label; None for anything else.

    >>> shape_of("b8-p512-g64"), shape_of("transform")
    ((8, 512, 64), None)
    """
    match = _SHAPE.match(label)
    if match is None:
        return None
    batch, prompt, new = (int(part) for part in match.groups())
    return batch, prompt, new


def break_even_batches(
    store: Store, a: str, others: Sequence[str], models: Sequence[str] | None = None
) -> list[BreakEvenRow]:
    """Where each of the others stops or starts being faster than `a`, for every model and prompt length.

    Raises:
        UnknownName: a method that the store has no rows of.
        ConfigError: no two batch sizes at one prompt length that both were timed at.
    """
    cells = [cell for cell in cells_of(store, models) if shape_of(cell.label) is not None]
    known = sorted({cell.method for cell in cells})
    for name in (a, *others):
        if name not in known:
            raise UnknownName("timed method in this store:", name, known)
    rows = []
    for b in others:
        series: dict[_Series, list[_Measured]] = {}
        for key, measured in _ratios(cells, a, b):
            series.setdefault(key, []).append(measured)
        for key, found in series.items():
            if len(found) >= 2:
                rows += _rows(key, sorted(found, key=lambda each: each.batch), a, b)
    if not rows:
        raise ConfigError(
            f"{a} and {', '.join(others)} were not both timed at two batch sizes and one prompt length: "
            "sweep both with --batch-sizes 1,8,64"
        )
    return rows


class _Series(NamedTuple):
    """What the batch sizes of one sweep have in common."""

    model: str
    seed: int
    prompt_len: int
    new_tokens: int
    metric: str


class _Measured(NamedTuple):
    """The ratio at one batch size."""

    batch: int
    ratio: TimingRatio
    differences: tuple[Difference, ...]
    passed_over: str | None


def _ratios(cells: Sequence[Cell], a: str, b: str) -> Iterator[tuple[_Series, _Measured]]:
    for place in dict.fromkeys(cell.place for cell in cells):
        shape = shape_of(str(place[4]))
        assert shape is not None
        for metric in METRICS:
            mine, theirs = (
                [c for c in cells if c.place == place and c.method == name and metric in c.records]
                for name in (a, b)
            )
            if not (mine and theirs):
                continue
            first, second, found, passed = next(pairs_of(mine, theirs, Scope.TIMING, metric))
            ratio = timing_ratio(
                metric,
                first.records,
                second.records,
                a_is_baseline=first.is_baseline,
                b_is_baseline=second.is_baseline,
            )
            series = _Series(str(place[0]), int(place[1]), shape[1], shape[2], metric)
            yield series, _Measured(shape[0], ratio, found, passed)


def _rows(key: _Series, measured: Sequence[_Measured], a: str, b: str) -> list[BreakEvenRow]:
    flags = [
        f"b{each.batch}: {flag}"
        for each in measured
        for flag in (*each.ratio.flags, *filter(None, [each.passed_over]))
    ]
    points = [Point(each.batch, each.ratio.value, each.ratio.draws) for each in measured]
    return [
        BreakEvenRow(
            model=key.model,
            method_a=a,
            method_b=b,
            metric=key.metric,
            prompt_len=key.prompt_len,
            new_tokens=key.new_tokens,
            found=found,
            ratios={each.batch: each.ratio.value for each in measured},
            bases={each.batch: each.ratio.basis for each in measured},
            flags=tuple(flags),
            differences=tuple(dict.fromkeys(d for each in measured for d in each.differences)),
        )
        for found in break_even(points)
    ]
