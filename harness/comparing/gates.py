"""Gates: conditions on a comparison that fail a build."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.comparability import Scope, scope_of
from harness.comparing.comparison import Comparison
from harness.comparing.matching import Absent
from harness.comparing.methods import LEVEL, SAME, Compared
from harness.errors import ConfigError, UnknownName

__all__ = ["Gate", "Outcome", "judged", "parse_gate", "read_gates"]

_GATE = re.compile(r"^\s*([a-z][\w,/-]*)\s*([<>])\s*([+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)(x?)(!?)\s*$", re.I)


@dataclass(frozen=True, slots=True)
class Gate:
    """``decode_latency>1.05x`` (a ratio) or ``acc<-0.01`` (a difference); with ``!`` only where it is clear.

    A plain gate looks at the estimate. A clear one trips where the whole 95 % interval lies beyond the bound
    and, for scores with a paired test, the adjusted p-value is below 0.05 as well; what has no spread
    (bytes) is as clear as it is.
    """

    text: str
    metric: str
    above: bool
    bound: float
    is_ratio: bool
    is_clear: bool = False

    def trips(self, row: Comparison) -> bool | None:
        """Whether it trips on a row; None where a clear gate has no interval to look at.

        A ratio of times is the one that was measured, paired where it could be.

        Raises:
            ConfigError: a ratio to zero, or a clear gate on what the row has no interval of.
        """
        if self.is_ratio and row.a == 0:
            raise ConfigError(f"--fail-on {self.text}: {self.metric} is 0 in a, a ratio means nothing")
        if not self.is_clear or row.basis == SAME or _is_exact(row):
            return self._beyond(self._value(row))
        if self.is_ratio != (row.ratio is not None):
            example = "a difference: acc<-0.01!" if self.is_ratio else "a ratio: decode_latency>1.05x!"
            raise ConfigError(f"--fail-on {self.text}: the interval of {self.metric} is that of {example}")
        if row.lower is None or row.upper is None:
            return None
        if not self._beyond(row.lower if self.above else row.upper):
            return False
        return row.p is None or row.p < LEVEL

    def _value(self, row: Comparison) -> float:
        if not self.is_ratio:
            return row.b - row.a
        return row.ratio if row.ratio is not None else row.b / row.a

    def excess(self, row: Comparison) -> float:
        """How far the estimate lies towards tripping; the largest of several rows is the worst one."""
        value = self._value(row) - self.bound
        return value if self.above else -value

    def _beyond(self, value: float) -> bool:
        if math.isclose(value, self.bound, rel_tol=1e-9):  # 0.79 - 0.8 is a hair below -0.01
            return False
        return value > self.bound if self.above else value < self.bound


@dataclass(frozen=True)
class Outcome:
    """What came of one gate: the rows that it was judged on, those that trip it, and what it lacks."""

    gate: Gate
    rows: tuple[Comparison, ...]
    trips: tuple[Comparison, ...]
    lacks: tuple[str, ...]

    @property
    def says(self) -> str:
        """``trips``, ``cannot be judged`` or ``passes``."""
        return "trips" if self.trips else "cannot be judged" if self.lacks else "passes"

    @property
    def worst(self) -> Comparison | None:
        """The row that is nearest to tripping, or trips most."""
        return max(self.trips or self.rows, key=self.gate.excess, default=None)


def parse_gate(text: str) -> Gate:
    """Parse a gate.

    Raises:
        ConfigError: it is not written as metric, < or >, number, x for a ratio, and ! for a clear one.
    """
    match = _GATE.match(text)
    if match is None:
        raise ConfigError(
            f"--fail-on {text!r}: write a ratio as decode_latency>1.05x, a difference as acc<-0.01, and ! "
            "behind it for one that must be clear"
        )
    metric, sign, bound, ratio, clear = match.groups()
    return Gate(text.strip(), metric, sign == ">", float(bound), bool(ratio), bool(clear))


def read_gates(file: Path) -> list[str]:
    """The gates in a YAML file: ``fail_on:`` and a list of them.

    Raises:
        ConfigError: no such file, not YAML, or not such a list.
    """
    from harness.strict_yaml import read_mapping

    content = read_mapping(file)
    gates = content.get("fail_on")
    if set(content) != {"fail_on"} or not isinstance(gates, list) or not gates:
        raise ConfigError(f"{file}: write the gates as a list under fail_on:, and nothing else")
    if odd := [gate for gate in gates if not isinstance(gate, str)]:
        raise ConfigError(f"{file}: {odd[0]!r} is no gate; write it in quotes, as 'acc<-0.01'")
    return gates


def judged(
    gates: Iterable[Gate],
    shown: Sequence[Comparison],
    found: Compared,
    refused: Sequence[Comparison] = (),
) -> list[Outcome]:
    """What each gate says of the rows that are shown.

    A gate lacks something where b has no row for what a has, where a row was refused, where a clear gate has
    no interval to look at, and where nothing of its metric was compared at all. What only b has is new:
    there is nothing to judge it by.

    Raises:
        UnknownName: a gate on a metric that neither side has.
        ConfigError: a ratio to a value of zero, or a clear gate on what a metric has no interval of.
    """
    return [_outcome(gate, shown, found, refused) for gate in gates]


def _outcome(
    gate: Gate, shown: Sequence[Comparison], found: Compared, refused: Sequence[Comparison]
) -> Outcome:
    if gate.metric not in found.metrics:
        raise UnknownName("compared metric", gate.metric, found.metrics)
    rows = [row for row in shown if row.metric == gate.metric]
    verdicts = [(row, gate.trips(row)) for row in rows]
    lacks = [f"missing in b: {each}" for each in found.absent if _concerns(gate, each, rows)]
    lacks += [f"no interval: {row.where}" for row, verdict in verdicts if verdict is None]
    lacks += [f"not compared: {row.where}" for row in refused if row.metric == gate.metric]
    if not rows and not lacks:
        lacks.append(f"no row of {gate.metric} was compared")
    trips = tuple(row for row, verdict in verdicts if verdict)
    return Outcome(gate, tuple(row for row, verdict in verdicts if verdict is not None), trips, tuple(lacks))


def _concerns(gate: Gate, absent: Absent, rows: Sequence[Comparison]) -> bool:
    if absent.lacks != "b" or gate.metric not in absent.metrics:
        return False
    # A variant is weighed in each of its cells: one of them is enough.
    is_weighed = any((row.model, row.method_b) == (absent.model, absent.method) for row in rows)
    return not (gate.metric == "weight_bytes" and is_weighed)


def _is_exact(row: Comparison) -> bool:
    """Bytes and counts: read once, without any spread."""
    return row.lower is None and scope_of(row.kind, row.unit, row.metric) is Scope.MEMORY
