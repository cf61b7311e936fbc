"""A scatter of quality against cost as SVG: no script, no network, readable in light and dark. Pure."""

from __future__ import annotations

import html
import math
import sys
from collections.abc import Sequence
from dataclasses import replace

from harness.cli.output import format_value
from harness.display import axis_title, scale
from harness.report.content import Front, Point

__all__ = ["has_place", "scatter", "ticks"]

WIDTH, HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 16, 48
_LOG_FROM = 8.0  # times from the least to the largest: beyond, steps are equal ratios
_LONGEST_NAME = 34
_CHARACTER, _LINE = 6.2, 12.0  # of the names' font, in the figure's units


def scatter(front: Front) -> str:
    """The figure, described for readers of the screen; hovering shows a point's values.

    A point at infinity has no place in it; empty where no other is left.
    """
    x_factor, x_unit = scale(front.x_unit, [point.x for point in front.points])
    y_factor, y_unit = scale(front.y_unit, [point.y for point in front.points])
    points = [_scaled(point, x_factor, y_factor) for point in front.points if has_place(point)]
    if not points:
        return ""
    across = _Axis([at for p in points for at in (p.x, *(p.x_bounds or ()))], _LEFT, WIDTH - _RIGHT)
    up = _Axis([at for p in points for at in (p.y, *(p.y_bounds or ()))], HEIGHT - _BOTTOM, _TOP)
    title = f"{front.y} against {front.x} of {front.model} on {front.device}"
    middle = HEIGHT / 2
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">',
        *_grid(across, up),
        _axis_title(front.x, x_unit, front.x_better, WIDTH / 2, HEIGHT - 8),
        _axis_title(front.y, y_unit, front.y_better, 16, middle, f' transform="rotate(-90 16 {middle})"'),
        _line([point for point in points if point.on_front], across, up),
    ]
    parts += [_mark(point, across, up, x_unit, y_unit) for point in points]
    return "\n".join([*parts, *_names(points, across, up), "</svg>"])


def has_place(point: Point) -> bool:
    """Whether it can be drawn: a perplexity may be infinite."""
    return math.isfinite(point.x) and math.isfinite(point.y)


def _scaled(point: Point, x_factor: float, y_factor: float) -> Point:
    x_bounds, y_bounds = (
        None if bounds is None else (bounds[0] * factor, bounds[1] * factor)
        for bounds, factor in ((point.x_bounds, x_factor), (point.y_bounds, y_factor))
    )
    return replace(point, x=point.x * x_factor, y=point.y * y_factor, x_bounds=x_bounds, y_bounds=y_bounds)


class _Axis:
    """From values to places between `start` and `end`; equal ratios where values span much."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        values = [value for value in values if math.isfinite(value)]  # a bound may be infinite
        low, high = min(values), max(values)
        self.log = low > 0 and high > _LOG_FROM * low
        self._low, self._high = self._of(low), self._of(high)
        margin = 0.06 * (self._high - self._low) or abs(self._low) * 0.1 or 1.0
        self._low, self._high = self._low - margin, self._high + margin
        self._start, self._end = start, end

    def _of(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def at(self, value: float) -> float:
        if (self.log and value <= 0) or value == -math.inf:
            return self._start
        if value == math.inf:
            return self._end
        share = (self._of(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        return ticks(self._low, self._high, log=self.log)


def ticks(low: float, high: float, *, log: bool) -> list[float]:
    """Round values between the ends; of a log axis the ends are exponents of ten.

    >>> ticks(0.0, 10.0, log=False)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    >>> ticks(0.0, 2.0, log=True)
    [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]
    """
    if log:
        last = min(math.ceil(high), sys.float_info.max_10_exp)  # the margin may lie beyond any number
        exponents = range(max(math.floor(low), sys.float_info.min_10_exp), last + 1)
        found = [(m * 10.0**e, e, m) for e in exponents for m in (1, 2, 5)]
        found = [each for each in found if low <= math.log10(each[0]) <= high]
        if len(found) > 12:
            whole = [each for each in found if each[2] == 1]
            found = whole[:: math.ceil(len(whole) / 12)]
        return [value for value, *_ in found]
    span = high - low
    power = 10.0 ** math.floor(math.log10(span))
    step = next(power * m for m in (0.1, 0.2, 0.5, 1, 2, 5) if span / (power * m) <= 6)
    first = math.ceil(low / step - 1e-9)
    return [round(step * k, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _grid(across: _Axis, up: _Axis) -> list[str]:
    parts = []
    for value, told in _labelled(across.ticks()):
        x = across.at(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{told}</text>')
    for value, told in _labelled(up.ticks()):
        y = up.at(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{WIDTH - _RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{told}</text>')
    return parts


def _labelled(values: Sequence[float]) -> list[tuple[float, str]]:
    """Each with its text: in four digits, or in as many as tell neighbours apart."""
    texts = [format_value(value) for value in values]
    if len(set(texts)) < len(texts):
        texts = [f"{value:.12g}" for value in values]
    return list(zip(values, texts, strict=True))


def _axis_title(name: str, unit: str, direction: str, x: float, y: float, turned: str = "") -> str:
    return (
        f'<text class="axis" x="{x:.0f}" y="{y:.0f}" text-anchor="middle"{turned}>'
        f"{html.escape(axis_title(name, unit, direction))}</text>"
    )


def _line(best: Sequence[Point], across: _Axis, up: _Axis) -> str:
    ordered = sorted(best, key=lambda point: point.x)
    places = " ".join(f"{across.at(point.x):.1f},{up.at(point.y):.1f}" for point in ordered)
    return f'<polyline class="front" points="{places}"/>'


def _mark(point: Point, across: _Axis, up: _Axis, x_unit: str, y_unit: str) -> str:
    x, y, bars = across.at(point.x), up.at(point.y), ""
    if point.x_bounds:
        low, high = map(across.at, point.x_bounds)
        bars += f'<line class="bar" x1="{low:.1f}" y1="{y:.1f}" x2="{high:.1f}" y2="{y:.1f}"/>'
    if point.y_bounds:
        low, high = map(up.at, point.y_bounds)
        bars += f'<line class="bar" x1="{x:.1f}" y1="{low:.1f}" x2="{x:.1f}" y2="{high:.1f}"/>'
    told = f"{point.name}: {format_value(point.x)} {x_unit}, {format_value(point.y)} {y_unit}"
    hollow = " hollow" if point.hollow else ""
    return (
        f'<g class="{html.escape(point.family)}{hollow}">{bars}<circle cx="{x:.1f}" cy="{y:.1f}" r="5">'
        f"<title>{html.escape(told)}</title></circle></g>"
    )


def _names(points: Sequence[Point], across: _Axis, up: _Axis) -> list[str]:
    """The names that have room, those on the front first; the others are left to hovering."""
    taken: list[tuple[float, float, float]] = []  # left, right, height of the line
    shown = []
    for point in sorted(points, key=lambda point: not point.on_front):
        x, y = across.at(point.x), up.at(point.y)
        name = point.name if len(point.name) <= _LONGEST_NAME else f"{point.name[: _LONGEST_NAME - 1]}…"
        anchor, offset = ("end", -9) if x > WIDTH * 0.7 else ("start", 9)
        width = _CHARACTER * len(name)
        left = x + offset - (width if anchor == "end" else 0)
        if any(left < right and left + width > start and abs(y - at) < _LINE for start, right, at in taken):
            continue
        taken.append((left, left + width, y))
        shown.append(
            f'<text class="name" x="{x + offset:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">'
            f"{html.escape(name)}</text>"
        )
    return shown
