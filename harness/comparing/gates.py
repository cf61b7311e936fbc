"""Gates: conditions on a comparison that fail a build."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.comparing.comparison import Comparison
from harness.errors import ConfigError, UnknownName

__all__ = ["Gate", "parse_gate", "tripped"]

_GATE = re.compile(r"^\s*([a-z][\w,/-]*)\s*([<>])\s*([+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)(x?)\s*$", re.I)


@dataclass(frozen=True, slots=True)
class Gate:
    """``decode_latency>1.05x`` (a ratio) or ``acc<-0.01`` (a difference)."""

    text: str
    metric: str
    above: bool
    bound: float
    is_ratio: bool

    def trips(self, comparison: Comparison) -> bool:
        """Whether it trips; a ratio of times is the one that was measured, paired where it could be."""
        if not self.is_ratio:
            value = comparison.b - comparison.a
        elif comparison.ratio is not None:
            value = comparison.ratio
        else:
            value = comparison.b / comparison.a
        return value > self.bound if self.above else value < self.bound


def parse_gate(text: str) -> Gate:
    """Parse a gate.

    Raises:
        ConfigError: it is not written as metric, < or >, number, and x for a ratio.
    """
    match = _GATE.match(text)
    if match is None:
        raise ConfigError(
            f"--fail-on {text!r}: write a ratio as decode_latency>1.05x, a difference as acc<-0.01"
        )
    metric, sign, bound, ratio = match.groups()
    return Gate(text.strip(), metric, sign == ">", float(bound), bool(ratio))


def tripped(gates: Iterable[Gate], found: Sequence[Comparison]) -> list[tuple[Gate, Comparison]]:
    """The gates that trip, each with the comparison that trips it.

    Raises:
        UnknownName: a gate on a metric that was not compared; a gate that cannot trip is no gate.
        ConfigError: a ratio to a value of zero.
    """
    trips = []
    for gate in gates:
        concerned = [each for each in found if each.metric == gate.metric]
        if not concerned:
            raise UnknownName("compared metric", gate.metric, {each.metric for each in found})
        if gate.is_ratio and any(each.a == 0 for each in concerned):
            raise ConfigError(f"--fail-on {gate.text}: {gate.metric} is 0 in a, a ratio means nothing")
        trips += [(gate, each) for each in concerned if gate.trips(each)]
    return trips
