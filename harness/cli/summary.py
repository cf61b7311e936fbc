"""The table of variants: one row a variant and shape, with what must be known to read it. Pure.

Numbers that mean different things have columns of their own: another task, another window, a `--limit`.
Rows that were measured under different conditions get a footnote, and so do the paired tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from harness.cli.output import format_value
from harness.comparability import Conditions, Scope, base_mode, conditions_of, scope_of
from harness.evaluate.definitions import Score, definitions
from harness.evaluate.paired import benjamini_hochberg

__all__ = ["VariantTable", "names_of", "variant_table"]

COSTS = (
    ("weight_bytes", "weights"),
    ("compression_ratio", "smaller"),
    ("theoretical_compression_ratio", "on paper"),
    ("prefill_latency", "prefill"),
    ("prefill_speedup", "prefill speed-up"),
    ("decode_latency", "decode/token"),
    ("decode_speedup", "decode speed-up"),
    ("kv_cache_bytes_per_token", "KV/token"),
)
SCORES = (
    ("token_perplexity", "token_perplexity"),
    ("bits_per_byte", "bits/byte"),
    ("acc", "accuracy"),
    ("spearman", "Spearman"),
    ("mean_kl", "KL"),
    ("embedding_distance", "embedding distance"),
    ("flips", "flips"),
)
LEVEL = 0.05
_TESTS = {
    "acc": ("acc_difference", "higher"),
    "spearman": ("spearman_difference", "higher"),
    "token_perplexity": ("nll_rise", "lower"),
}
_TELLING = {"seed": "seed", "dtype": "dtype", "device_name": "device"}
_SKIPPED_CONDITIONS = frozenset({"limit of items"})  # its columns say so

Row = Mapping[str, Any]


@dataclass(frozen=True)
class VariantTable:
    """Rows as texts, the columns to show, and what stands below."""

    rows: list[dict[str, Any]]
    columns: list[str]
    footnotes: list[str]


class _Column(NamedTuple):
    metric: str
    label: str
    task: str | None = None
    definition: str = ""

    def holds(self, row: Row, shape: str, definition: str) -> bool:
        if row["metric"] != self.metric or row["task"] != self.task or definition != self.definition:
            return False
        return bool(row["kind"] != "scenario" or row["scenario"] == shape)


def variant_table(rows: Sequence[Row], conditions: Mapping[int, Conditions]) -> VariantTable:
    """Pivot records: figures of tasks and transforms appear in each of a variant's shapes.

    Args:
        rows: of `harness.store.queries.results`, as dicts.
        conditions: of all cells among them.
    """
    meanings = _definitions(rows, conditions)
    columns = _columns(rows, meanings)
    marks, tests = _marks(rows)
    differing = {name for group in _alike(rows) for name in _telling(group)}
    telling = [name for name in _TELLING if name in differing]
    table = []
    for records in _by_variant(rows).values():
        for shape in sorted({r["scenario"] for r in records if r["kind"] == "scenario"}) or [""]:
            line: dict[str, Any] = {
                "model": records[0]["model"],
                "method": records[0]["method"],
                **{_TELLING[name]: str(records[0][name]) for name in telling},
                "scenario": shape,
            }
            for column in columns:
                # Where a cell was measured several times, the newest counts.
                found = [r for r in records if column.holds(r, shape, meanings[id(r)])]
                if found:
                    newest = max(found, key=lambda row: row["cell"])
                    mark = marks.get((newest["cell"], newest["metric"]), "")
                    line[column.label] = f"{value_with_interval(newest)} {mark}".rstrip()
            line["status"] = _status(records)
            table.append(line)
    shown = [column.label for column in columns if any(line.get(column.label) for line in table)]
    notes = [*_condition_notes(rows, conditions), *_mode_notes(rows)]
    if marks:
        notes.append(
            f"▲ ▼ better or worse than the baseline: paired, {tests} tests, Benjamini-Hochberg at {LEVEL:.0%}"
        )
    named = ["model", "method", *(_TELLING[name] for name in telling), "scenario"]
    return VariantTable(table, [*named, *shown, "status"], notes)


def names_of(rows: Iterable[Row]) -> dict[int, str]:
    """What to call each variant beside the others: its method, what tells it from those of the same method,
    and *simulated* or *synthetic* where it is."""
    names = {}
    for group in _alike(rows):
        telling = _telling(group)
        said = {variant: tuple(str(row[name]) for name in telling) for variant, row in group.items()}
        for variant, row in group.items():
            told = [f"seed {row[name]}" if name == "seed" else str(row[name]) for name in telling]
            if list(said.values()).count(said[variant]) > 1:
                told.append(f"#{variant}")
            marks = ", ".join(mark for mark in ("simulated", "synthetic") if row[mark])
            names[variant] = " · ".join([row["method"], *told]) + (f" ({marks})" if marks else "")
    return names


def _alike(rows: Iterable[Row]) -> list[dict[int, Row]]:
    """Variants of one model and method, each with a row of it."""
    groups: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["method"]), {})[row["variant"]] = row
    return list(groups.values())


def _telling(group: Mapping[int, Row]) -> list[str]:
    """In what of seed, dtype and device these variants differ."""
    return [name for name in _TELLING if len({row[name] for row in group.values()}) > 1]


def _by_variant(rows: Iterable[Row]) -> dict[int, list[Row]]:
    variants: dict[int, list[Row]] = {}
    for row in rows:
        variants.setdefault(row["variant"], []).append(row)
    return variants


def _status(records: Sequence[Row]) -> str:
    statuses = {row["status"] for row in records}
    status = "ok" if statuses == {"ok"} else ", ".join(sorted(statuses))
    if any(row["synthetic"] for row in records):
        status += " (synthetic)"
    if any(row["simulated"] for row in records):
        status += " (simulated)"
    if origins := sorted({row["origin"] for row in records if row.get("origin")}):
        status += f" (imported: {', '.join(origins)})"
    return status


# --- columns ------------------------------------------------------------------------------------------


def _definitions(rows: Sequence[Row], conditions: Mapping[int, Conditions]) -> dict[int, str]:
    """What tells numbers of one task and metric apart, by the identity of the row."""
    scores = [Score(row["task"], row["metric"], row["note"], conditions[row["cell"]].limit) for row in rows]
    return {id(row): text for row, text in zip(rows, definitions(scores), strict=True)}


def _columns(rows: Sequence[Row], meanings: Mapping[int, str]) -> list[_Column]:
    columns = [_Column(metric, label) for metric, label in COSTS]
    tasks = list(dict.fromkeys(row["task"] for row in rows if row["task"] is not None))
    for metric, label in SCORES:
        for task in tasks:
            of_task = [row for row in rows if row["task"] == task and row["metric"] == metric]
            for definition in sorted({meanings[id(row)] for row in of_task}):
                suffix = f" ({definition})" if definition else ""
                columns.append(_Column(metric, f"{task} {label}{suffix}", task, definition))
    return columns


_SCALES = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "B": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")),
    "B/token": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")),  # the column says of what
}


def value_with_interval(record: Row) -> str:
    """``9.57 [9.41, 9.83] ms``."""
    value, unit = record["value"], record["unit"] or ""
    if value is None:
        return "nan"
    scale, shown = next(((s, u) for s, u in _SCALES.get(unit, ()) if abs(value) >= s), (1.0, ""))
    if unit in _SCALES and not shown:
        scale, shown = 1.0, unit
    text = format_value(value / scale)
    if record["lower"] is not None and record["upper"] is not None:
        text += f" [{format_value(record['lower'] / scale)}, {format_value(record['upper'] / scale)}]"
    return f"{text} {shown or ('x' if unit == 'x' else '')}".strip()


# --- what stands below --------------------------------------------------------------------------------


def _marks(rows: Sequence[Row]) -> tuple[dict[tuple[int, str], str], int]:
    """Arrows for scores that differ from the baseline's, and how many tests were made."""
    values = {(row["cell"], row["metric"]): row["value"] for row in rows if row["kind"] == "task"}
    wanted = {f"{difference}_p" for difference, _ in _TESTS.values()}
    tested = [(key, p) for key, p in values.items() if key[1] in wanted and p is not None]
    adjusted = dict(zip([key for key, _ in tested], benjamini_hochberg([p for _, p in tested]), strict=True))
    marks = {}
    for score, (difference, better) in _TESTS.items():
        for (cell, metric), p in adjusted.items():
            change = values.get((cell, difference))
            if metric == f"{difference}_p" and p < LEVEL and change:
                marks[cell, score] = "▲" if (change > 0) == (better == "higher") else "▼"
    return marks, len(tested)


def _condition_notes(rows: Sequence[Row], conditions: Mapping[int, Conditions]) -> list[str]:
    """One line for each condition in which a model's rows are not all alike."""
    notes = []
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model and row["metric"] is not None]
        methods = {row["cell"]: row["method"] for row in of_model}
        by_label: dict[str, tuple[dict[str, list[int]], list[str]]] = {}
        for scope, task in _subjects(of_model):
            cells = dict.fromkeys(
                row["cell"] for row in of_model if row["task"] == task and _scope(row) is scope
            )
            for label, values in conditions_of([conditions[cell] for cell in cells], scope):
                if label not in _SKIPPED_CONDITIONS:
                    merged, subjects = by_label.setdefault(label, ({}, []))
                    subjects.append(task or str(scope))
                    for value, found in values.items():
                        merged.setdefault(value, []).extend(found)
        for label, (values, subjects) in by_label.items():
            listed = "; ".join(
                f"{value}: {', '.join(dict.fromkeys(methods[cell] for cell in cells))}"
                for value, cells in values.items()
            )
            notes.append(f"! {model}: not comparable in {', '.join(subjects)}, {label} is {listed}")
    return notes


def _subjects(rows: Sequence[Row]) -> dict[tuple[Scope, str | None], None]:
    """What is compared with each other: timings, memory, and each task by itself."""
    return dict.fromkeys((_scope(row), row["task"]) for row in rows)


def _scope(row: Row) -> Scope:
    return scope_of(row["kind"], row["unit"] or "", row["metric"])


def _mode_notes(rows: Sequence[Row]) -> list[str]:
    """One line for each shown cost of a shape that was not taken in one mode."""
    notes = []
    shown = {metric: label for metric, label in COSTS if not metric.endswith("_speedup")}
    taken: dict[tuple[Any, ...], dict[str, list[str]]] = {}
    for row in rows:
        mode = base_mode(row["mode"])
        if row["kind"] == "scenario" and row["metric"] in shown and mode is not None:
            place = (row["model"], row["scenario"], row["metric"])
            taken.setdefault(place, {}).setdefault(mode, []).append(row["method"])
    for (model, shape, metric), modes in taken.items():
        if len(modes) > 1:
            listed = "; ".join(f"{mode}: {', '.join(dict.fromkeys(who))}" for mode, who in modes.items())
            notes.append(f"! {model} {shape}: not comparable in {shown[metric]}, taken as {listed}")
    return notes
