"""A report as Markdown, for a README or a comment on a pull request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.reference_tables import markdown_table
from harness.report.content import Front, Report
from harness.untrusted import clean

__all__ = ["to_markdown"]


def to_markdown(report: Report) -> str:
    """The tables, the fronts in words, the verdicts, what went wrong, and where it was measured."""
    table = report.table
    parts = [
        "# What was measured",
        f"{report.made_at}, harness {report.version}.",
        _rows(table.columns, table.rows),
        *(f"- {_text(note)}" for note in table.footnotes),
    ]
    if report.fronts:
        parts += ["## On the front", "\n".join(_front(front) for front in report.fronts)]
    if report.verdicts:
        parts += ["## Why", markdown_table(("model", "method", "shape", "verdict"), report.verdicts)]
    if report.problems:
        columns = ("model", "method", "cell", "status", "reason")
        parts += ["## Not measured", markdown_table(columns, report.problems)]
    parts += ["## Where", "\n".join(_machine(machine.sweep, machine.facts) for machine in report.machines)]
    return "\n\n".join(parts) + "\n"


def _rows(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [[clean(str(row.get(name) or "")) for name in columns] for row in rows]
    return markdown_table([clean(name) for name in columns], cells)


def _front(front: Front) -> str:
    best = sorted((point for point in front.points if point.on_front), key=lambda point: point.x)
    names = ", ".join(_text(point.name) for point in best)
    about = f"{_text(front.model)} on {_text(front.device)}"
    return f"- {about}, {_text(front.y)} against {_text(front.x)}: {names}"


def _machine(sweep: int, facts: Mapping[str, Any]) -> str:
    versions = facts.get("versions") or {}
    about = [
        facts.get("device_name"),
        *(f"{name} {versions[name]}" for name in ("torch", "transformers") if versions.get(name)),
        f"measuring version {facts.get('measuring_version')}",
        facts.get("time_utc"),
    ]
    return f"- sweep {sweep}: {', '.join(_text(str(each)) for each in about if each)}"


def _text(text: str) -> str:
    """In a line of its own: what was stored by others draws nothing."""
    return "".join(f"\\{char}" if char in "\\`*_<>[]|#" else char for char in clean(" ".join(text.split())))
