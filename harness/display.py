"""How metrics are shown: their unit, their direction and their order. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable

from harness.evaluate.metrics import metric_of

__all__ = [
    "COUNTED",
    "DARK_FAMILY_COLOURS",
    "FAMILY_COLOURS",
    "LEADING",
    "axis_title",
    "better",
    "column_name",
    "in_times",
    "order_key",
    "scale",
]

LEADING = (
    "weight_bytes",
    "prefill_latency",
    "decode_latency",
    "end_to_end_latency",
    "decode_throughput",
    "prefill_throughput",
    "decode_peak_bytes",
    "prefill_peak_bytes",
    "kv_cache_bytes_per_token",
    "token_perplexity",
    "word_perplexity",
    "bits_per_byte",
    "acc",
    "acc_norm",
    "spearman",
    "mean_kl",
    "choice_kl",
    "top1_agreement",
    "embedding_distance",
    "transform_s",
)
"""The metrics that most questions are about, in the order in which tables and lists show them."""

FAMILY_COLOURS = {
    "baseline": "#000000",
    "quantization": "#727EF6",
    "pruning": "#98615D",
    "distillation": "#1E711A",
    "sparsity": "#2887BE",
    "moe": "#691695",
    "attention": "#AA8B5A",
    "recurrence": "#619B97",
    "adaptive": "#A40D7B",
    "serving": "#293605",
    "external": "#B38D18",
    "other": "#3E3E3E",
}
"""One colour for each family, everywhere, on a light ground.

Found by search, so that each has a contrast of 3:1 and more with its ground (WCAG 2.2, 1.4.11), and any two
differ by 19 and more (CIE76) also as somebody with deuteranopia or protanopia sees them (Machado, Oliveira
and Fernandes 2009, IEEE TVCG 15)."""

DARK_FAMILY_COLOURS = {
    "baseline": "#FFFFFF",
    "quantization": "#7062E3",
    "pruning": "#B13E44",
    "distillation": "#BAFC9B",
    "sparsity": "#2A7099",
    "moe": "#E09CFD",
    "attention": "#D2A453",
    "recurrence": "#40EEB6",
    "adaptive": "#D19FBF",
    "serving": "#E4EA4D",
    "external": "#9C570F",
    "other": "#7F7F7F",
}
"""The same hues on a dark ground, found in the same way."""

COUNTED = frozenset(
    {
        "compression_ratio",
        "disk_bytes",
        "kv_cache_bytes_per_token",
        "stored_bits_per_weight",
        "theoretical_compression_ratio",
        "weight_bytes",
    }
)
"""Metrics that have no interval because they are counted: a second reading would be the same."""

_DIRECTIONS = {
    "calibration_tokens": "lower",
    "compression_ratio": "higher",
    "decode_mbu": "higher",
    "decode_mfu": "higher",
    "prefill_mfu": "higher",
    "stored_bits_per_weight": "lower",
    "theoretical_compression_ratio": "higher",
    "trained_steps": "lower",
    "trained_tokens": "lower",
}
# Tokens and steps are not always a cost: the reach of an attention is counted in tokens too.
_LOWER_UNITS = frozenset({"s", "B", "B/token", "J", "J/token", "W"})
_HIGHER_UNITS = frozenset({"tokens/s", "B/s", "FLOP/s"})
_SIZES = ("B", "KiB", "MiB", "GiB", "TiB")


def better(metric: str, unit: str, kind: str = "") -> str | None:
    """``lower`` or ``higher``; None where nobody knows (a number that a method recorded itself)."""
    if metric in _DIRECTIONS:
        return _DIRECTIONS[metric]
    if unit in _LOWER_UNITS:
        return "lower"
    if unit in _HIGHER_UNITS:
        return "higher"
    if kind in ("transform", "scenario"):
        return None
    return metric_of(metric).better


def scale(unit: str, values: Iterable[float | None]) -> tuple[float, str]:
    """The factor and the unit in which values are easy to read; the largest one decides.

    >>> scale("s", [0.002, 0.03])
    (1000.0, 'ms')
    >>> scale("B", [3 * 2**30])
    (9.313225746154785e-10, 'GiB')
    """
    finite = [abs(value) for value in values if value is not None and math.isfinite(value)]
    largest = max(finite, default=0.0)
    base, per, rest = unit.partition("/")
    if base == "s" and 0 < largest < 1:
        factor, name = (1e3, "ms") if largest >= 1e-3 else (1e6, "µs")
        return factor, name + per + rest
    if base == "B":
        power = int(math.log(largest, 1024)) if largest >= 1 else 0
        power = min(power, len(_SIZES) - 1)
        return 1024.0**-power, _SIZES[power] + per + rest
    if unit == "fraction":
        return 100.0, "%"
    if unit == "1":  # a number without a unit
        return 1.0, ""
    return 1.0, unit


def column_name(metric: str, place: str) -> str:
    """A metric at a place: the task or the shape that it was measured in.

    >>> column_name("acc", "hellaswag"), column_name("transform_s", "transform")
    ('acc · hellaswag', 'transform_s')
    """
    return metric if place == "transform" else f"{metric} · {place}"


def axis_title(name: str, unit: str, direction: str | None) -> str:
    """What an axis says: the name, the unit and which way is good."""
    arrow = {"lower": " (lower is better)", "higher": " (higher is better)"}.get(direction or "", "")
    return f"{name} [{unit}]{arrow}" if unit else f"{name}{arrow}"


def order_key(metric: str, place: str = "") -> tuple[int, str, str]:
    """Sorts the leading metrics first, in their order, then the rest by name."""
    name = metric.partition("/")[0]
    leading = LEADING.index(name) if name in LEADING else len(LEADING)
    return leading, metric, place


def in_times(factor: float, digits: int = 3) -> str:
    """A factor with as many significant digits as it takes to tell it from 1.

    >>> in_times(2.948), in_times(1.0004), in_times(0.99996), in_times(1.0)
    ('2.95', '1.0004', '0.99996', '1')
    """
    text = f"{factor:.{digits}g}"
    while factor != 1 and float(text) == 1 and digits < 9:
        digits += 1
        text = f"{factor:.{digits}g}"
    return text
