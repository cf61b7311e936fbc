"""What ``harness compare`` prints, and the exit code that follows from it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from harness.cli.output import Format, clean, format_value, print_rows, say
from harness.display import in_times

if TYPE_CHECKING:
    from harness.comparing import Absent, Compared, Comparison, Gate, Outcome, Side

__all__ = ["print_comparison"]

REFUSED = 2
GATE_TRIPPED = 3
_MOST_LINES = 50  # of what is missing, in a comment on a pull request

_COLUMNS = (
    "model", "method_b", "side_b", "cell", "metric", "unit", "a", "b", "ratio", "difference", "lower",
    "upper", "p", "test", "detectable", "basis", "verdict", "flags",
)  # fmt: skip


def print_comparison(
    found: Compared,
    sides: Sequence[Side],
    gates: Sequence[Gate],
    output: Format,
    allow_different: bool,
    allow_missing: bool,
    leading_only: bool,
) -> int:
    """Print the rows to standard output and what is to be said of them to standard error.

    Args:
        leading_only: tables for people leave out what few questions are about (how loading went, the
            parts of the memory, kernels); scores and what a gate asks for are always there.

    Returns:
        3 where a gate trips; else 2 where rows were refused; else 3 where a gate cannot be judged and
        nothing allows that; else 0.

    Raises:
        UnknownName, ConfigError: a gate that can never be judged.
    """
    from harness.comparing import adjusted, judged
    from harness.errors import ConfigError

    refused = [row for row in found.rows if not row.is_comparable]
    kept = found.rows if allow_different else [row for row in found.rows if row.is_comparable]
    shown = adjusted(kept)
    outcomes = judged(gates, shown, found, () if allow_different else refused)
    if leading_only and output in (Format.TABLE, Format.MARKDOWN):
        listed = _leading(shown, {gate.metric for gate in gates})
    else:
        listed = list(shown)
    if output is Format.MARKDOWN:
        print(_markdown(listed, found, sides, outcomes, [] if allow_different else refused))
    else:
        _print_rows(listed, sides, output)
    if left := len(shown) - len(listed):
        say(
            f"{left} more row{'s' if left > 1 else ''} of other metrics: --metrics all, or --format json",
            err=True,
        )
    for line in _remarks(shown, found, refused, outcomes, allow_different, output):
        say(line, err=True)
    if any(outcome.trips for outcome in outcomes):
        return GATE_TRIPPED
    if refused and not allow_different:
        return REFUSED
    if not found.rows and not gates:
        raise ConfigError("nothing could be compared: what one side has is missing on the other")
    return GATE_TRIPPED if any(o.lacks for o in outcomes) and not allow_missing else 0


def _leading(shown: Sequence[Comparison], gated: Collection[str]) -> list[Comparison]:
    """The rows that most questions are about; all of them where none is."""
    from harness.display import LEADING

    wanted = {*LEADING, *gated}
    return [row for row in shown if row.kind == "task" or row.metric in wanted] or list(shown)


def _print_rows(shown: Sequence[Comparison], sides: Sequence[Side], output: Format) -> None:
    rows = [_row(row, output) for row in shown]
    columns = list(asdict(shown[0])) if output is Format.CSV and shown else _filled(_columns(sides), rows)
    print_rows(rows, columns, output, title=_title(sides))
    tests = next((row.tests for row in shown if row.tests), 0)
    if tests and tests > 1 and output is Format.TABLE:
        say(f"p is adjusted over {tests} tests (Benjamini-Hochberg)")


def _columns(sides: Sequence[Side]) -> list[str]:
    is_matrix, is_many = sides[0].name.is_matrix, len(sides) > 2
    left_out = set()
    if not (is_matrix or is_many):
        left_out.add("method_b")
    if not (is_matrix and is_many):
        left_out.add("side_b")
    return [name for name in _COLUMNS if name not in left_out]


def _filled(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Without the columns that hold nothing, where there are rows."""
    if not rows:
        return list(columns)
    return [name for name in columns if any(row.get(name) not in (None, "") for row in rows)]


def _title(sides: Sequence[Side]) -> str:
    return f"a = {sides[0].text}, b = {', '.join(side.text for side in sides[1:])}"


def _row(row: Comparison, output: Format) -> dict[str, Any]:
    """A comparison as a row; for people, what is different stands among the flags."""
    shown = asdict(row)
    if output is Format.JSON:
        return shown
    different = [f"DIFFERENT {each}" for each in row.differences]
    shown["flags"] = "; ".join((*different, *row.flags))
    shown["differences"] = "; ".join(map(str, row.differences))
    return shown


# --- in words -----------------------------------------------------------------------------------------


def _remarks(
    shown: Sequence[Comparison],
    found: Compared,
    refused: Sequence[Comparison],
    outcomes: Sequence[Outcome],
    allow_different: bool,
    output: Format,
) -> Iterator[str]:
    from harness.comparing import incomparable

    for line in incomparable(refused):
        yield f"{'DIFFERENT' if allow_different else 'not compared'}: {line}"
    yield from _absences(found.absent)
    same = sum(row.basis == "same measurement" for row in shown)
    if same:
        yield f"{same} of {len(shown)} rows are the same measurement on both sides (reused, or copied)"
    for outcome in outcomes:
        yield from _outcome_lines(outcome)
    if refused and not allow_different:
        yield f"{len(refused)} of {len(found.rows)} rows are left out; --allow-different shows them, marked"


def _absences(absent: Sequence[Absent]) -> Iterator[str]:
    """One line for the cells of a variant that are missing for one reason."""
    cells: dict[tuple[str, str, str, str], list[str]] = {}
    for each in absent:
        what = f"{', '.join(each.metrics)} of {each.cell}" if each.is_part else each.cell
        cells.setdefault((each.lacks, each.model, each.method, each.why), []).append(what)
    for (lacks, model, method, why), found in cells.items():
        where = "missing in b" if lacks == "b" else "only in b"
        yield f"{where}: {model} {method} {', '.join(dict.fromkeys(found))} ({why})"


def _outcome_lines(outcome: Outcome) -> Iterator[str]:
    gate = outcome.gate.text
    for row in outcome.trips:
        mark = "" if row.is_comparable else " (rows that should not be compared)"
        yield f"gate {gate} trips on {row.where}: {_values(row)}{mark}"
    for lack in outcome.lacks:
        yield f"gate {gate} cannot be judged ({lack})"
    if outcome.says == "passes" and outcome.worst is not None:
        rows = f"{len(outcome.rows)} row{'' if len(outcome.rows) == 1 else 's'}"
        yield f"gate {gate} passes on {rows}, nearest {outcome.worst.where}: {_values(outcome.worst)}"


def _values(row: Comparison) -> str:
    """Both values, then the ratio or the difference with its interval."""
    text = f"{row.a:.6g} -> {row.b:.6g}"
    value, mark = (row.ratio, "x") if row.ratio is not None else (row.difference, "")
    if value is None:
        return text
    if not mark:
        interval = "" if row.lower is None else f", {row.lower:.4g} to {row.upper:.4g}"
        return f"{text} ({value:+.4g}{interval})"
    bounds = () if row.lower is None or row.upper is None else (row.lower, row.upper)
    interval = f", {' to '.join(in_times(each, 4) for each in bounds)}" if bounds else ""
    return f"{text} ({in_times(value, 4)}{mark}{interval})"


# --- for a comment on a pull request ------------------------------------------------------------------


def _markdown(
    shown: Sequence[Comparison],
    found: Compared,
    sides: Sequence[Side],
    outcomes: Sequence[Outcome],
    refused: Sequence[Comparison],
) -> str:
    """The gates first, then the rows, then what is missing or was refused; stored texts draw nothing."""
    from harness.comparing import incomparable
    from harness.reference_tables import markdown_table

    parts = []
    if outcomes:
        parts.append(markdown_table(("gate", "outcome", "rows", "where"), [_gate_row(o) for o in outcomes]))
    rows = [_row(row, Format.MARKDOWN) for row in shown]
    columns = _filled(_columns(sides), rows)
    lines = [[_cell(row.get(name)) for name in columns] for row in rows]
    parts.append(markdown_table(columns, lines))
    parts.append(_plain(f"{_title(sides)}; lower and upper bound the 95 % interval of ratio or difference"))
    notes = list(_absences(found.absent))
    notes += [f"not compared: {line}" for line in incomparable(refused)]
    if notes:
        more = [f"and {len(notes) - _MOST_LINES} more"] if len(notes) > _MOST_LINES else []
        parts.append("\n".join(f"- {_plain(note)}" for note in (*notes[:_MOST_LINES], *more)))
    return "\n\n".join(parts)


def _gate_row(outcome: Outcome) -> list[str]:
    shown = [f"{row.where}: {_values(row)}" for row in outcome.trips]
    shown += outcome.lacks
    if not shown and outcome.worst is not None:
        shown = [f"nearest {outcome.worst.where}: {_values(outcome.worst)}"]
    return [_cell(each) for each in (outcome.gate.text, outcome.says, len(outcome.rows), "; ".join(shown))]


def _cell(value: Any) -> str:
    return clean(format_value(value))


def _plain(text: str) -> str:
    return "".join(f"\\{char}" if char in "\\`*_<>[]|#" else char for char in clean(text))
